"""Sick runs whose steps are far too large, by their rate or by one batch."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.detection import truth
from benchmarks.detection.case import Case, Draw, History, Measured, family
from benchmarks.detection.sick_flow import SYMBOLS, adam, net
from benchmarks.detection.sick_loop import hh, looped, rows
from benchmarks.detection.truth import compared
from testbed.nets import Reader, values
from testbed.tasks import Pair, adding, recall
from testbed.weights import orthogonal

ANYTHING_LARGE = (
    "exploding",
    "vanishing",
    "spike",
    "loss_divergence",
    "drift",
    "dead_units",
    "gate_stuck",
)


# ---- how they are known to be sick


def stays_high(case: Case, history: History) -> Measured:
    """Finite, and the loss stays above 3 times its best and a third of its start."""
    found = truth.loss_rises(case, history)
    start = sum(history.losses[:20]) / 20
    numbers = dict(found.values) | {"start": start}
    lowest = numbers["lowest_after"]
    high = lowest > 3 * numbers["before"] and lowest > start / 3
    return Measured(found.holds and high and history.nonfinite is None, numbers)


# ---- rates


def _raised(case: Case, onset: int, rate: float) -> Case:
    """Return the case with a rate that is too high from the onset on."""
    begun = case.before

    def before(number: int) -> None:
        if begun is not None:
            begun(number)
        if number == onset:
            for group in case.optimizer.param_groups:
                group["lr"] = rate

    case.before = before
    return case


def _too_high(
    draw: Draw,
    sick: bool,
    layer: Any,
    optimizer: Any,
    onset: int,
    low: float,
    high: float,
    **more: Any,
) -> Case:
    model, batches = rows(draw, layer)
    if layer is nn.RNN:
        orthogonal(model.layer)
    case = looped(
        "lr_too_high",
        truth.too_large_steps,
        model,
        batches,
        "lr",
        onset=onset,
        others=ANYTHING_LARGE,
        same=("loss_divergence",),
        counted=(hh(model),),
        optimizer=optimizer(model.parameters(), lr=low),
        **more,
    )
    return _raised(case, onset, high if sick else low)


@family
@compared
def lr_too_high_schedule_adamw(draw: Draw, sick: bool) -> Case:
    """A wrong schedule raises the rate a hundredfold in mid-run; AdamW, decay 0.9."""
    kind, onset = draw.one_of(nn.LSTM, nn.GRU, nn.RNN), draw.between(90, 140)
    optimizer = partial(torch.optim.AdamW, weight_decay=0.9, betas=(0.8, 0.95))
    return _too_high(draw, sick, kind, optimizer, onset, 1e-2, 1.0)


@family
@compared
def lr_too_high_schedule_sgd(draw: Draw, sick: bool) -> Case:
    """A wrong schedule raises the rate 40-fold in mid-run; SGD 0.5, clipped at 1."""
    kind, onset = draw.one_of(nn.RNN, nn.GRU), draw.between(90, 140)
    optimizer = partial(torch.optim.SGD, weight_decay=0.015)
    return _too_high(draw, sick, kind, optimizer, onset, 0.5, 20.0, clip=1.0)


@family
@compared
def lr_too_high_oscillates(draw: Draw, sick: bool) -> Case:
    """SGD with a rate of 8 from the start, clipped at 1: the loss goes up and down."""
    kind = draw.one_of(nn.RNN, nn.GRU)
    optimizer = partial(torch.optim.SGD, weight_decay=0.04)
    return _too_high(draw, sick, kind, optimizer, 0, 0.5, 8.0, clip=1.0)


def _diverges(
    model: Reader,
    batches: Any,
    optimizer: torch.optim.Optimizer,
    onset: int,
    rate: float,
    **more: Any,
) -> Case:
    case = looped(
        "loss_divergence",
        stays_high,
        model,
        batches,
        "lr",
        onset=onset,
        steps=400,
        others=("exploding", "vanishing", "spike"),
        same=("lr_too_high",),
        optimizer=optimizer,
        **more,
    )
    return _raised(case, onset, rate)


@family
@compared
def loss_divergence_rate_adam(draw: Draw, sick: bool) -> Case:
    """The rate of Adam goes from 5e-3 to 0.4 in mid-run; a gated net that recalls."""
    model = net(draw, draw.one_of(nn.LSTM, nn.GRU))
    onset, lag = draw.between(200, 230), draw.between(1, 3)
    length = draw.between(12, 18)
    pairs = recall(draw.source(), length, draw.between(16, 32), SYMBOLS, lag)
    rate = 0.4 if sick else 5e-3
    return _diverges(model, pairs, adam(model, 5e-3), onset, rate)


@family
@compared
def loss_divergence_rate_sgd(draw: Draw, sick: bool) -> Case:
    """The rate of SGD goes from 1 to 20 in mid-run; a gated net that reads rows."""
    model, batches = rows(draw, draw.one_of(nn.LSTM, nn.GRU))
    onset = draw.between(200, 230)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    return _diverges(model, batches, optimizer, onset, 20.0 if sick else 1.0)


# ---- one batch


@family
@compared
def spike_scaled_inputs(draw: Draw, sick: bool) -> Case:
    """One batch of a ReLU net's inputs is a thousand times too large."""
    model = net(draw, partial(nn.RNN, nonlinearity="relu"), 2, outputs=1)
    orthogonal(model.layer)
    onset = draw.between(70, 100)
    pairs = adding(draw.source(), draw.between(8, 12), draw.between(16, 32))

    def batches() -> Iterator[Pair]:
        for number, (x, y) in enumerate(pairs):
            yield (1000 * x, y) if sick and number == onset else (x, y)

    return looped(
        "spike",
        truth.stands_out,
        model,
        batches(),
        "bad_batch",
        loss=values,
        onset=onset,
        optimizer=adam(model, 3e-3),
    )


def _readings(
    source: torch.Generator, length: int, size: int, gain: float
) -> Iterator[Pair]:
    """Yield noise ``(T, B, 1)`` and, at each step, its mean of 3 steps."""
    while True:
        x = gain * torch.randn(length, size, 1, generator=source)
        yield x, torch.cat([torch.zeros(2, size, 1), x]).unfold(0, 3, 1).mean(-1)


def _summed(model: nn.Module, batch: Pair) -> Tensor:
    x, y = batch
    return mse_loss(model(x), y, reduction="sum") / x.shape[1]


@family
@compared
def spike_long_and_loud(draw: Draw, sick: bool) -> Case:
    """A tanh net whose loss is a sum over steps meets 100 times as many, once.

    They are four times as large, too.
    """
    rnn = nn.RNN(1, draw.between(20, 40))
    model = Reader(draw.module_name(), rnn, 1, every=True)
    onset, length = draw.between(70, 100), draw.between(15, 25)
    size = draw.between(8, 16)
    usual = _readings(draw.source(), length, size, 1.0)
    wrong = _readings(draw.source(), 100 * length, size, 4.0)

    def batches() -> Iterator[Pair]:
        for number, pair in enumerate(usual):
            yield next(wrong) if sick and number == onset else pair

    return looped(
        "spike",
        truth.stands_out,
        model,
        batches(),
        "bad_batch",
        loss=_summed,
        onset=onset,
        optimizer=adam(model, 8e-4),
    )
