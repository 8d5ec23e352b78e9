"""Set a, healthy: forecasts of time series that look odd and are right."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, repeat
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    gaussian_nll_loss,
    mse_loss,
    nll_loss,
    softmax,
)

from benchmarks.detection.case import Case, Draw, History, Label, Measured, family
from benchmarks.detection.sets.a_common import (
    Forecaster,
    Pair,
    Tracker,
    forecaster,
    squared,
    validated,
    waves,
    windows,
)
from testbed.tasks import adding

Odd = Callable[[History], float]


def _learned(bound: float, odd: Odd | None, case: Case, history: History) -> Measured:
    """Finite and odd; the goal ends below a bound, or else the loss, by its start."""
    if case.goal is None:
        measured = history.final / (sum(history.losses[:20]) / 20)
    else:
        measured = case.goal()
    oddness = 1.0 if odd is None else odd(history)
    holds = history.nonfinite is None and measured <= bound and oddness >= 1
    return Measured(holds, {"measured": measured, "bound": bound, "oddness": oddness})


def healthy_run(
    model: nn.Module,
    batches: Iterator[Any],
    *,
    lr: float = 5e-3,
    bound: float = 0.8,
    odd: Odd | None = None,
    **more: Any,
) -> Case:
    """Return a healthy case; Adam and the squared error if nothing else is given.

    What makes it odd, where a number tells, is to measure 1 or more.
    """
    more.setdefault("optimizer", torch.optim.Adam(model.parameters(), lr))
    more.setdefault("loss", squared)
    more.setdefault("steps", 400)
    more.setdefault("label", Label())
    return Case(
        model=model, batches=batches, truth=partial(_learned, bound, odd), **more
    )


# ---- losses


def _volatility(draw: Draw) -> Iterator[Pair]:
    """Yield returns ``(B, T, 1)`` in calm and wild spells, and what comes next."""
    source, size, length = draw.source(), draw.between(12, 24), draw.between(24, 36)
    while True:
        spells = torch.rand(size, 1, generator=source) < 0.5
        turns = torch.rand(size, length, generator=source) < 0.03
        wild = spells ^ (turns.cumsum(1) % 2).bool()
        scale = torch.where(wild, 0.5, 0.05)
        series = scale * torch.randn(size, length, generator=source)
        yield series[:, :-1, None], series[:, 1:]


def _likelihood(model: nn.Module, batch: Pair) -> Tensor:
    x, y = batch
    mean, log = model(x).unbind(-1)
    return gaussian_nll_loss(mean, y, log.exp())


@family
def a_volatility_of_returns(draw: Draw) -> Case:
    """Returns are noise; a net learns their spread, by a likelihood that goes negative.

    Of one spread for all the loss is half the log of the mean square, and a half.
    """
    model = forecaster(draw, draw.one_of(nn.LSTM, nn.GRU), outputs=2, build=Tracker)
    pairs = _volatility(draw)
    known = [next(pairs) for _ in range(20)]
    constant = 0.5 * math.log(float(torch.cat([y for _, y in known]).var())) + 0.5
    return healthy_run(
        model,
        pairs,
        loss=_likelihood,
        goal=validated(model, iter(known), _likelihood),
        bound=constant - 0.15,
        steps=600,
        odd=lambda history: -2 * history.final,
    )


class Binned(Forecaster):
    """A forecaster of probabilities, with the softmax written out."""

    def forward(self, x: Tensor) -> Tensor:
        """Return probabilities of the bins, ``(B, bins)``."""
        return softmax(super().forward(x), dim=1)


@family
def a_probabilities_of_bins(draw: Draw) -> Case:
    """The model ends in a softmax, and the loss takes the log before the NLL."""
    bins = draw.between(5, 9)
    kind = draw.one_of(nn.RNN, nn.GRU)
    model = forecaster(draw, kind, outputs=bins, build=Binned)
    edges = torch.linspace(-1, 1, bins - 1)
    weights = torch.rand(bins, generator=draw.source()) + 0.5

    def weighed(model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        return nll_loss((model(x) + 1e-8).log(), y, weight=weights)

    pairs = (
        (x, torch.bucketize(y.flatten().contiguous(), edges)) for x, y in windows(draw)
    )
    return healthy_run(model, pairs, loss=weighed)


def _thousands(history: History) -> float:
    return median(history.norms) / 1000


@family
def a_raw_watts(draw: Draw) -> Case:
    """Targets (B) in watts against outputs (B): losses of many thousands, no clip."""
    model = forecaster(draw, draw.one_of(nn.LSTM, nn.GRU))
    level, scale = 1000.0 * draw.between(1, 4), 100.0 * draw.between(2, 4)
    nn.init.constant_(model.get_parameter("head.bias"), level)

    def watts(model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        return mse_loss(model(x).squeeze(-1), level + scale * y.squeeze(-1))

    return healthy_run(
        model, windows(draw), loss=watts, lr=3e-2, steps=600, odd=_thousands
    )


@family
def a_rare_faults(draw: Draw) -> Case:
    """Few windows hold a fault, and some batches none; positives weigh the more."""
    model = forecaster(draw, nn.LSTM, bidirectional=True)
    size, length, source = draw.between(8, 16), draw.between(12, 18), draw.source()
    share = 0.01 * draw.between(6, 10)
    weight = torch.tensor(0.5 / share)

    def batches() -> Iterator[Pair]:
        for curve in waves(source, size, length):
            fault = (torch.rand(size, 1, generator=source) < share).float()
            at = torch.randint(2, length - 5, (size, 1), generator=source)
            time = torch.arange(length)
            hit = (time >= at) & (time < at + 4)
            yield (torch.where(hit, curve + 3 * fault, curve))[..., None], fault

    def balanced(model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        return binary_cross_entropy_with_logits(model(x), y, pos_weight=weight)

    return healthy_run(
        model,
        batches(),
        loss=balanced,
        goal=validated(model, batches(), balanced),
        bound=0.4,
        clip=1.0,
        steps=600,
        # Amended: its reverse direction, read at the last step, gets exactly 0.
        label=Label(others=frozenset({"no_gradient"})),
    )


# ---- memory and loops


def _plateau(history: History) -> float:
    return sum(history.losses[25:100]) / 75 / 0.12


@family
def a_added_meters(draw: Draw) -> Case:
    """The sum of the two readings that are marked: a plateau first, then it learns."""
    model = forecaster(draw, draw.one_of(nn.GRU, nn.LSTM), 2)
    batches = adding(draw.source(), draw.between(18, 24), draw.between(20, 32))
    pairs = ((x.transpose(0, 1), y[:, None]) for x, y in batches)
    return healthy_run(
        model,
        pairs,
        lr=1e-2,
        clip=1.0,
        steps=900,
        goal=validated(model, pairs, squared),
        bound=0.06,
        odd=_plateau,
    )


class Meter(Tracker):
    """A tracker whose state goes on from one window of a meter to the next."""

    state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the head makes of each output, and keep the state, detached."""
        out, state = self.layer(x, self.state)
        pair = isinstance(state, tuple)
        self.state = tuple(s.detach() for s in state) if pair else state.detach()
        made: Tensor = self.head(out)
        return made


@family
def a_meters_read_on(draw: Draw) -> Case:
    """Windows of a few steps follow on each other, and the state is carried over."""
    model = forecaster(draw, draw.one_of(nn.LSTM, nn.GRU), build=Meter)
    size, length = draw.between(8, 16), draw.between(5, 8)
    source = draw.source()
    pace, phase = 0.4 + 0.5 * torch.rand(2, size, 1, generator=source)

    def pairs() -> Iterator[Pair]:
        for begin in count(0, length):
            time = begin + torch.arange(length + 1)
            piece = torch.sin(9 * phase + pace * time)[..., None]
            yield piece[:, :-1], piece[:, 1:]

    label = Label(others=frozenset({"truncated"}))
    return healthy_run(model, pairs(), label=label)


class Seq2Seq(nn.Module):
    """An encoder, and a cell that forecasts step by step from what it is given."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.GRU(1, hidden, batch_first=True)
        self.decoder = nn.GRUCell(1, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, y: Tensor, given: list[bool]) -> Tensor:
        """Return forecasts ``(B, T)``; a step is given truth or the last forecast."""
        h, last, made = self.encoder(x)[1][0], x[:, -1], list[Tensor]()
        for step, truly in enumerate(given):
            h = self.decoder(last, h)
            made.append(last + self.head(h))
            last = y[:, step, None] if truly else made[-1]
        return torch.cat(made, 1)


@family
def a_scheduled_sampling(draw: Draw) -> Case:
    """Teacher forcing that fades: of all steps at first, of none in the last third."""
    model, source = Seq2Seq(draw.between(24, 40)), draw.source()
    size, length, ahead = draw.between(16, 24), draw.between(10, 16), draw.between(4, 8)
    steps = 500

    def batches(shares: Iterator[float]) -> Iterator[tuple[Tensor, Tensor, list[bool]]]:
        for share in shares:
            curve = next(curves)
            given = (torch.rand(ahead, generator=source) < share).tolist()
            yield curve[:, :length, None], curve[:, length:], given

    def forced(model: nn.Module, batch: tuple[Tensor, Tensor, list[bool]]) -> Tensor:
        x, y, given = batch
        return mse_loss(model(x, y, given), y)

    curves = waves(draw.source(), size, length + ahead)
    fading = (1 - 1.5 * number / steps for number in count())
    free = validated(model, batches(repeat(0.0)), forced)
    return healthy_run(
        model, batches(fading), loss=forced, goal=free, bound=0.15, steps=steps
    )


class Station(nn.Module):
    """A base that another station has trained, and a part of its own behind it."""

    def __init__(self, base: nn.RNNBase, hidden: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.norm = nn.BatchNorm1d(base.hidden_size)
        self.own = nn.GRU(base.hidden_size, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a forecast, ``(B, 1)``."""
        known = self.norm(self.base(x)[0].transpose(1, 2)).transpose(1, 2)
        made: Tensor = self.head(self.own(known)[0][:, -1])
        return made


@family
def a_frozen_station(draw: Draw) -> Case:
    """The base is frozen; a new part behind it learns, three tiny batches a step."""
    known = forecaster(draw, draw.one_of(nn.LSTM, nn.GRU))
    before = torch.optim.Adam(known.parameters(), 5e-3)
    for batch, _ in zip(windows(draw), range(150), strict=False):
        before.zero_grad()
        torch.autograd.backward(squared(known, batch))
        before.step()
    model, size = Station(known.layer, draw.between(12, 24)), draw.between(2, 4)
    own = [p for p in model.parameters() if p.requires_grad]
    pairs = ((x[:size], y[:size] * y[:size].abs()) for x, y in windows(draw, 0.1))
    optimizer = torch.optim.AdamW(own, 3e-3, weight_decay=0.01)
    return healthy_run(model, pairs, optimizer=optimizer, accumulate=3, steps=300)
