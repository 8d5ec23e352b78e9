"""Set a, sick: mistakes from public threads, made in forecasts of time series."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from benchmarks.detection import truth
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
from benchmarks.detection.truth import Truth, compared

Once = Callable[[Any], Tensor]


def sick_run(
    kind: str,
    cause: str,
    measure: Truth,
    model: nn.Module,
    batches: Iterator[Any],
    *,
    lr: float = 5e-3,
    onset: int = 0,
    others: Iterable[str] = (),
    same: Iterable[str] = (),
    curable: bool = False,
    **more: Any,
) -> Case:
    """Return a case of one fault; Adam and the squared error if nothing is given."""
    label = Label(
        kind=kind,
        causes=frozenset({cause} if cause else ()),
        onset=onset,
        others=frozenset(others),
        same=frozenset(same),
        curable=curable,
    )
    more.setdefault("optimizer", torch.optim.Adam(model.parameters(), lr))
    more.setdefault("loss", squared)
    more.setdefault("steps", 400)
    return Case(model=model, batches=batches, label=label, truth=measure, **more)


# ---- loss


def _compares_all(case: Case, history: History) -> Measured:
    """At every step the shapes differ; another sample's target moves the gradient."""
    x, y = next(case.batches)

    def pull(target: Tensor) -> Tensor:
        made = case.model(x)
        error = (made - target).square().mean()
        (gradient,) = torch.autograd.grad(error, made)
        first: Tensor = gradient[0]
        return first

    moved = float((pull(y) - pull(torch.cat([y[:1], y[1:] + 1]))).abs().max())
    differing = sum(made != given for made, given in case.notes["shapes"])
    values = {"steps_differing": differing, "moved_by_others": moved}
    return Measured(differing == case.steps and moved > 0.01, values)


@family
@compared
def a_target_broadcast_demand(draw: Draw, sick: bool) -> Case:
    """Outputs (B, 1) against targets (B): each forecast is held against all of them."""
    model = forecaster(draw, draw.one_of(nn.LSTM, nn.GRU))
    pairs, shapes = windows(draw), list[tuple[torch.Size, torch.Size]]()
    goal = validated(model, windows(draw), squared)

    def compare(model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        made = model(x)
        shapes.append((made.shape, y.shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mse_loss(made, y)

    return sick_run(
        "target_broadcast",
        "shape",
        _compares_all,
        model,
        ((x, y[:, 0]) for x, y in pairs) if sick else pairs,
        loss=compare,
        others=("not_learning",),
        goal=goal,
        thread="https://github.com/timeseriesAI/tsai/issues/22",
        notes={"shapes": shapes},
    )


def _never_negative(case: Case, history: History) -> Measured:
    """A good part of the targets is negative, and no forecast ever is."""
    pairs = [next(case.batches) for _ in range(20)]
    with torch.no_grad():
        lowest = min(float(case.model(x).min()) for x, _ in pairs)
    below = float(torch.cat([y for _, y in pairs]).lt(0).double().mean())
    values = {"lowest_forecast": lowest, "share_negative": below}
    return Measured(lowest >= 0 and below > 0.3, values)


@family
@compared
def a_relu_on_returns(draw: Draw, sick: bool) -> Case:
    """The head ends in a ReLU, and half of the standardised targets are negative."""
    model = forecaster(draw, draw.one_of(nn.LSTM, nn.GRU))
    if sick:
        model.head = nn.Sequential(model.head, nn.ReLU())
    return sick_run(
        "loss_mismatch",
        "relu",
        _never_negative,
        model,
        windows(draw),
        others=("dead_units", "not_learning"),
        thread="https://github.com/cran2367/lstm_autoencoder_classifier/issues/2",
    )


def _root(made: Tensor, y: Tensor, seen: Tensor, floor: float) -> Tensor:
    squares = ((made - y).square() * seen).sum(0) / seen.sum(0).clamp(min=1)
    return (squares + floor).sqrt().mean()


@family
@compared
def a_root_of_no_error(draw: Draw, sick: bool) -> Case:
    """The root of each sensor's mean squared error; in mid-run one sensor goes dark."""
    sensors, size = draw.between(3, 5), draw.between(12, 24)
    model = forecaster(draw, draw.one_of(nn.LSTM, nn.GRU), sensors, sensors)
    onset, length = draw.between(120, 180), draw.between(10, 16)
    curves, source = waves(draw.source(), size * sensors, length + 1), draw.source()

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for number, curve in enumerate(curves):
            series = curve.view(size, sensors, -1).transpose(1, 2)
            seen = (torch.rand(size, sensors, generator=source) < 0.8).float()
            seen[0] = 1.0
            if number >= onset:
                seen[:, 0] = 0.0
            yield series[:, :-1], series[:, -1], seen

    def by_sensor(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, seen = batch
        return _root(model(x), y, seen, 0.0 if sick else 1e-8)

    return sick_run(
        "nonfinite",
        "nan_backward",
        truth.breaks(finite_loss=True),
        model,
        batches(),
        loss=by_sensor,
        onset=onset,
        steps=300,
        thread="https://discuss.pytorch.org/t/"
        "function-mselossbackward-returned-nan-values-in-its-0th-output/94875",
    )


# ---- axes


def _mixes(case: Case, history: History) -> Measured:
    """One sample is changed, and the forecasts of others move."""
    model = deepcopy(case.model).double()
    x = next(case.batches)[0].double()
    other = x.clone()
    other[0] += 1.0
    with torch.no_grad():
        moved = (model(other) - model(x))[1:].abs().amax(1)
    found = {"others_moved": float((moved > 1e-9).double().mean())}
    return Measured(found["others_moved"] > 0.1, found)


@family
@compared
def a_batch_first_missing(draw: Draw, sick: bool) -> Case:
    """Windows (B, T, 1) go into a net without batch_first, which recurs along B."""
    kind = draw.one_of(nn.RNN, nn.LSTM, nn.GRU)
    return sick_run(
        "axes_mixed",
        "batch_axis",
        _mixes,
        forecaster(draw, kind, batch_first=not sick, num_layers=draw.between(1, 2)),
        windows(draw),
        others=("not_learning",),
        thread="https://github.com/pytorch/pytorch/issues/1538",
    )


def _foresees(case: Case, history: History) -> Measured:
    """What comes behind a step is changed, and the forecast made there moves."""
    model = deepcopy(case.model).double()
    x = next(case.batches)[0].double()
    half = x.shape[1] // 2
    later = x.clone()
    later[:, half + 1 :] += 1.0
    with torch.no_grad():
        moved = (model(later) - model(x)).abs().amax((0, 2))
    found = {"moved_at_half": float(moved[half])}
    return Measured(found["moved_at_half"] > 0.01, found)


def _at_the_end(model: nn.Module, batch: Pair) -> Tensor:
    x, y = batch
    return mse_loss(model(x)[:, -1], y[:, -1])


@family
@compared
def a_bidirectional_next_value(draw: Draw, sick: bool) -> Case:
    """A net in both directions forecasts at each step the value that it reads next."""
    kind = draw.one_of(nn.LSTM, nn.GRU)
    model = forecaster(draw, kind, build=Tracker, bidirectional=sick)
    size, length = draw.between(12, 24), draw.between(24, 36)

    def pairs() -> Iterator[Pair]:
        for curve in waves(draw.source(), size, length + 1):
            yield curve[:, :-1, None], curve[:, 1:, None]

    return sick_run(
        "axes_mixed",
        "future",
        _foresees,
        model,
        pairs(),
        goal=validated(model, pairs(), _at_the_end),
        steps=300,
        thread="https://github.com/mostafaalishahi/eICU_Benchmark/issues/1",
    )


# ---- loop and optimizer


def _never_cleared(case: Case, history: History) -> Measured:
    """Before each backward but the first, the gradients of all steps are there."""
    left = case.notes["left"]
    found = {"steps_uncleared": sum(norm > 0 for norm in left), "largest": max(left)}
    return Measured(found["steps_uncleared"] == case.steps - 1, found)


@family
@compared
def a_zero_grad_forgotten(draw: Draw, sick: bool) -> Case:
    """A loop by hand, without zero_grad, continues ramps by a step."""
    kind = draw.one_of(nn.LSTM, nn.GRU)
    model: nn.Module = forecaster(draw, kind, build=Tracker)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3 * draw.between(3, 6))
    size, length, left = draw.between(4, 8), draw.between(12, 20), list[float]()
    source = draw.source()

    def ramps() -> Iterator[Pair]:
        while True:
            begin, rise = torch.rand(2, size, 1, 1, generator=source) - 0.5
            ramp = begin + rise * torch.arange(length + 1)[:, None] / 10
            yield ramp[:, :-1], ramp[:, 1:]

    def once(batch: Pair) -> Tensor:
        if not sick:
            optimizer.zero_grad()
        left.append(
            sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
        )
        loss = squared(model, batch)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss

    return sick_run(
        "not_cleared",
        "",
        _never_cleared,
        model,
        ramps(),
        optimizer=optimizer,
        once=once,
        others=("lr_too_high", "loss_divergence"),
        thread="https://stats.stackexchange.com/questions/376851/"
        "why-is-lstm-so-ineffective-at-this-ridiculously-simple-sequence",
        notes={"left": left},
    )


@family
@compared
def a_optimizer_of_first_fold(draw: Draw, sick: bool) -> Case:
    """A new net is made for this fold, and the optimizer has that of the first."""
    kind, hidden = draw.one_of(nn.LSTM, nn.GRU, nn.RNN), draw.between(20, 40)
    name = draw.module_name()

    def fresh() -> Forecaster:
        rnn = kind(1, hidden, batch_first=True)
        return Forecaster(name, rnn, nn.Linear(hidden, 1))

    model = fresh()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    if sick:
        model = fresh()
    case = sick_run(
        "not_updating",
        "stale_parameters",
        truth.no_update,
        model,
        windows(draw),
        optimizer=optimizer,
        steps=300,
        others=("not_cleared", "not_learning"),
        thread="https://github.com/pytorch/pytorch/issues/14467",
    )
    truth.count(case, [key for key, _ in model.named_parameters()])
    return case


def _unclipped(limit: float, case: Case, history: History) -> Measured:
    """Most steps are made with gradients far above the clip, and nothing is learnt."""
    used = case.notes["used"]
    above = sum(norm > 2 * limit for norm in used) / len(used)
    share = history.final / history.losses[0]
    holds = above > 0.8 and share > 0.5 and history.nonfinite is None
    return Measured(holds, {"steps_above": above, "share": share})


@family
@compared
def a_clip_after_step(draw: Draw, sick: bool) -> Case:
    """SGD at a rate that needs the clip, which comes behind the step."""
    model: Any = forecaster(draw, nn.RNN)
    optimizer = torch.optim.SGD(model.parameters(), draw.one_of(0.5, 0.7, 1.0))
    limit, used = draw.one_of(0.15, 0.25), list[float]()
    scale = float(draw.between(15, 25))
    weights = [*model.parameters()]
    clip = partial(nn.utils.clip_grad_norm_, weights, limit)

    def once(batch: Pair) -> Tensor:
        x, y = batch
        optimizer.zero_grad()
        loss = l1_loss(model(x), scale * y)
        torch.autograd.backward(loss)
        if not sick:
            clip()
        used.append(float(nn.utils.get_total_norm([w.grad for w in weights])))
        optimizer.step()
        if sick:
            clip()
        return loss

    return sick_run(
        "lr_too_high",
        "clip_order",
        partial(_unclipped, limit),
        model,
        windows(draw),
        optimizer=optimizer,
        once=once,
        others=("exploding", "spike"),
        same=("loss_divergence", "saturated"),
        thread="https://github.com/VGraphRNN/VGRNN/issues/4",
        notes={"used": used},
    )
