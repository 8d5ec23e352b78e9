"""Sick runs whose step is wrong: the scale, the clip, or when gradients are cleared."""

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.detection.case import Case, Draw, History, Measured, family
from benchmarks.detection.sick_flow import RATE, SYMBOLS, adam, net, streams
from benchmarks.detection.sick_loop import hh, looped, rows
from benchmarks.detection.truth import compared, unrolled
from testbed.nets import Loss, classes
from testbed.tasks import Pair, recall

SCALE, TINY = 2.0**16, 1e-30


# ---- how they are known to be sick


def overflows(case: Case, history: History) -> Measured:
    """Every step from the onset on overflows in float16, and none does in float64.

    The scale is halved as often as that.
    """
    assert case.scaler is not None
    onset = case.label.onset
    finite = [math.isfinite(norm) for norm in history.norms]
    wide, _, model = unrolled(case)
    exact = torch.autograd.grad(wide, [*model.parameters()])
    sound = all(bool(g.isfinite().all()) for g in (wide, *exact))
    halved = math.log2(case.notes["scale"] / max(case.scaler.get_scale(), 2.0**-149))
    values = {
        "overflows_before": finite[:onset].count(False),
        "overflows": finite[onset:].count(False),
        "finite_in_float64": float(sound),
        "halvings": halved,
    }
    skipped = len(finite) - onset
    holds = values["overflows"] == skipped > 10 and all(finite[:onset])
    return Measured(holds and sound and halved >= min(skipped, 100), values)


def clipped_while_scaled(case: Case, history: History) -> Measured:
    """The clip leaves a hundredth of the scaled gradient or less; nothing moves."""
    assert case.clip is not None
    assert case.scaler is not None
    smallest = min(history.norms)
    kept = case.clip / (smallest * case.scaler.get_scale())
    moved = max(case.notes["ratios"])
    values = {
        "clip_ratio_largest": kept,
        "unscaled_clip_ratio": case.clip / smallest,
        "update_largest": moved,
    }
    return Measured(kept <= 0.01 and moved < 1e-4, values)


def hold(case: Case, name: str) -> None:
    """Have what a gradient holds before backward noted, and what backward adds."""
    weight, plain, behind = case.model.get_parameter(name), case.loss, case.after
    held, added = (case.notes.setdefault(key, []) for key in ("held", "added"))
    old = torch.zeros_like(weight)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        old.zero_()
        if weight.grad is not None:
            old.copy_(weight.grad)
        return plain(model, batch)

    def after(number: int) -> None:
        if behind is not None:
            behind(number)
        assert weight.grad is not None
        held.append(float(old.double().norm()))
        added.append(float((weight.grad - old).double().norm()))

    case.loss, case.after = loss, after


def piles_up(case: Case, history: History) -> Measured:
    """From the onset on each backward adds to what is there: 3 times as much or more.

    Nothing is there before the onset.
    """
    held, added = case.notes["held"], case.notes["added"]
    begun = max(case.label.onset, 1)  # at the first step there is nothing to clear
    values = {
        "held_before": max(held[:begun]),
        "held_smallest": min(held[begun:]),
        "held_by_added": median(held[begun:]) / max(median(added[begun:]), TINY),
    }
    holds = values["held_before"] == 0 < values["held_smallest"]
    return Measured(holds and values["held_by_added"] >= 3, values)


def stands_still(case: Case, history: History) -> Measured:
    """Backward gives a gradient at every step; from the onset on none is left to use.

    The recurrent weights change at each step before it, and at no step behind.
    """
    onset, grads, ratios = case.label.onset, case.notes["grads"], case.notes["ratios"]
    values = {
        "steps_without_gradient": sum(n == 0 for n in grads),
        "norm_left": max(history.norms[onset:]),
        "update_before": min(ratios[:onset], default=1.0),
        "update_largest": max(ratios[onset:]),
    }
    still = values["norm_left"] == values["update_largest"] == 0
    moved = values["update_before"] > 0
    return Measured(still and moved and values["steps_without_gradient"] == 0, values)


# ---- a scaler


def _half(wanted: bool, model: nn.Module) -> Any:
    """Return autocast to float16 where it is wanted, never for a copy in float64."""
    enabled = wanted and next(model.parameters()).dtype == torch.float32
    return torch.autocast("cpu", torch.float16, enabled=enabled)


def _scaled(scale: float, *given: Any, **more: Any) -> Case:
    """Return a case with a loss scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    case = looped(*given, scaler=scaler, **more)
    case.notes["scale"] = scale
    return case


@family
@compared
def nonfinite_fp16_overflow_sigmoid(draw: Draw, sick: bool) -> Case:
    """A sigmoid by hand, in float16: exp overflows once a unit is closed by its bias.

    The loss stays finite, and no scale is low enough. The control is in float32.
    """
    model: Any
    model, batches = rows(draw, draw.one_of(nn.RNN, nn.GRU))
    width = model.layer.hidden_size
    model.gate = nn.Linear(width, width)
    onset, unit = draw.between(80, 120), draw.between(0, width - 1)

    def gated(model: Any, batch: Pair) -> Tensor:
        x, y = batch
        with _half(sick, model):
            h = model.layer(x)[0][-1]
            opened = 1 / (1 + (-model.gate(h)).exp())
            return cross_entropy(model.head(h * opened), y)

    @torch.no_grad()
    def before(number: int) -> None:
        if number == onset:
            model.gate.bias[unit] = -25.0

    case = _scaled(
        2.0**10,
        "nonfinite",
        overflows,
        model,
        batches,
        "fp16_overflow",
        loss=gated,
        onset=onset,
        before=before,
        optimizer=adam(model, 2 * RATE),
    )
    if not sick:
        case.scaler = None
    return case


@family
@compared
def nonfinite_fp16_overflow_inputs(draw: Draw, sick: bool) -> Case:
    """From mid-run on inputs are in another unit, too large for float16 alone."""
    model, digits = rows(draw, draw.one_of(nn.RNN, nn.GRU))
    onset, unit = draw.between(100, 150), draw.one_of(1e6, 1e7)

    def half(model: nn.Module, batch: Pair) -> Tensor:
        with _half(True, model):
            return classes(model, batch)

    begun = onset if sick else math.inf
    given = (
        (x if number < begun else unit * x, y) for number, (x, y) in enumerate(digits)
    )
    return _scaled(
        2.0**10,
        "nonfinite",
        overflows,
        model,
        given,
        "fp16_overflow",
        loss=half,
        onset=onset,
    )


def _clipped_scaled(draw: Draw, sick: bool, half: bool, **more: Any) -> Case:
    kinds = (nn.RNN, nn.GRU) if half else (nn.RNN, nn.GRU, nn.LSTM)
    model, batches = rows(draw, draw.one_of(*kinds))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        with _half(half, model):
            return classes(model, batch)

    return _scaled(
        SCALE,
        "over_clipping",
        clipped_while_scaled,
        model,
        batches,
        "scaled_gradients",
        loss=loss,
        clip=1.0,
        clip_scaled=sick,
        counted=(hh(model),),
        optimizer=torch.optim.SGD(model.parameters(), **more),
    )


@family
@compared
def over_clipping_scaled_half(draw: Draw, sick: bool) -> Case:
    """Float16: the clip at 1 sees gradients that are scaled by 65536; SGD."""
    return _clipped_scaled(draw, sick, half=True, lr=0.3)


@family
@compared
def over_clipping_scaled_momentum(draw: Draw, sick: bool) -> Case:
    """The same with a scaler left on in float32, and momentum."""
    return _clipped_scaled(draw, sick, half=False, lr=0.05, momentum=0.9)


# ---- when gradients are cleared


def _never_cleared(
    draw: Draw,
    sick: bool,
    layer: Any,
    onset: int,
    optimizer: Callable[..., torch.optim.Optimizer],
) -> Case:
    model, batches = rows(draw, layer)

    def before(number: int) -> None:
        if number >= onset:
            case.clears = not sick

    case = looped(
        "not_cleared",
        piles_up,
        model,
        batches,
        "zero_grad",
        onset=onset,
        before=before,
        others=("loss_divergence", "drift"),
        optimizer=optimizer(model.parameters()),
    )
    hold(case, hh(model))
    return case


@family
@compared
def not_cleared_from_start(draw: Draw, sick: bool) -> Case:
    """Nobody calls zero_grad; Adam 3e-3."""
    kind = draw.one_of(nn.RNN, nn.GRU, nn.LSTM)
    return _never_cleared(draw, sick, kind, 0, lambda p: torch.optim.Adam(p, 3e-3))


@family
@compared
def not_cleared_sgd(draw: Draw, sick: bool) -> Case:
    """Nobody calls zero_grad; SGD 0.2."""
    kind = draw.one_of(nn.GRU, nn.LSTM)
    return _never_cleared(draw, sick, kind, 0, lambda p: torch.optim.SGD(p, 0.2))


@family
@compared
def not_cleared_midway(draw: Draw, sick: bool) -> Case:
    """From mid-run on zero_grad is not called any more; Adam 3e-3."""
    kind, onset = draw.one_of(nn.RNN, nn.GRU, nn.LSTM), draw.between(80, 120)
    return _never_cleared(draw, sick, kind, onset, lambda p: torch.optim.Adam(p, 3e-3))


def _cleared_early(
    draw: Draw, sick: bool, onset: int, to_none: bool, rate: float, **more: Any
) -> Case:
    model = net(draw, draw.one_of(nn.LSTM, nn.GRU))
    length, lag = draw.between(12, 20), draw.between(1, 3)
    batches = recall(draw.source(), length, draw.between(16, 32), SYMBOLS, lag)
    plain: Loss = classes
    kind = torch.optim.Adam if to_none else torch.optim.SGD
    case = looped(
        "cleared_early",
        stands_still,
        model,
        batches,
        "zero_grad",
        loss=plain,
        onset=onset,
        shown=tuple(streams(model)),
        counted=(hh(model),),
        others=("not_updating", "no_gradient"),
        optimizer=kind(model.parameters(), lr=rate, **more),
    )
    counted = case.after
    assert counted is not None

    def after(number: int) -> None:
        counted(number)
        if sick and number >= onset:
            case.optimizer.zero_grad(set_to_none=to_none)

    case.after = after
    return case


@family
@compared
def cleared_early_to_none(draw: Draw, sick: bool) -> Case:
    """Gradients are None again before the step; Adam 5e-3."""
    return _cleared_early(draw, sick, 0, True, 5e-3)


@family
@compared
def cleared_early_to_zero(draw: Draw, sick: bool) -> Case:
    """From some step on gradients are 0 again before the step; SGD 0.5."""
    return _cleared_early(draw, sick, draw.between(30, 60), False, 0.5)
