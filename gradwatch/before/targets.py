"""Whether the outputs of a model can be what its targets are, whatever the weights.

An output behind a tanh stays between -1 and 1, and no training brings it to a target of
3. Nothing is read of the code: weights are moved far, and outputs are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.before.trial import LossFn, Subject, checked, returned

_NEAR: Final = 1.0
"""How far weights are moved where targets are read again, in units of their size."""
_FAR: Final = (100.0, 100.0, 1000.0, 1000.0)
"""The same of each look at what outputs can be."""
_UPHILL: Final = (1.0, 1.0, 3.0, 10.0, 30.0, 100.0)
"""The same of each step towards larger outputs."""
_ALIKE: Final = 0.01
"""Share of the largest target by which two looks at a target or a bound may differ."""


class Targets(NamedTuple):
    """Targets beside what outputs can be.

    Attributes:
        lowest: The least target.
        highest: The largest one.
        least: What no output is below; None where targets are not below it.
        most: What no output is above; None where targets are not above it.
        outside: Share of the targets that lie outside these.
    """

    lowest: float
    highest: float
    least: float | None
    most: float | None
    outside: float


def reachable(given: Subject, batch: Any, loss_fn: LossFn) -> Targets | None:
    """Return the targets of a loss of squared errors, and what outputs can be.

    The loss is ``weight * sum((output - target)^2)``: from it and its gradient follow
    both, and the targets have to be the same at other weights.

    Args:
        given: The model.
        batch: One batch.
        loss_fn: Returns the loss of a model on it.

    Returns:
        None where the loss is not of this kind, the model's output not one tensor, or
        the model refuses other weights.
    """
    first = _read(given.model, batch, loss_fn)
    if first is None:
        return None
    try:
        return _beside(first, given.model, batch, loss_fn)
    except Exception:  # user's own lines may refuse weights such as these
        return None


def _beside(
    first: tuple[Tensor, Tensor], model: nn.Module, batch: Any, loss_fn: LossFn
) -> Targets | None:
    """Return targets beside bounds, once they were the same at other weights."""
    with _moved(model, _NEAR):
        second = _read(model, batch, loss_fn)
    if second is None or second[0].shape != first[0].shape:
        return None
    known = first[1].isfinite() & second[1].isfinite()
    if not known.any():
        return None
    # They stay where they are while outputs move; those of other losses follow.
    moved, changed = (a[known] - b[known] for a, b in zip(first, second, strict=True))
    if not changed.abs().amax() < _ALIKE * moved.square().mean().sqrt():
        return None
    found = first[1][known]
    lowest, highest = float(found.amin()), float(found.amax())
    near = _ALIKE * max(abs(lowest), abs(highest))
    most = _bound(model, batch, loss_fn, 1, highest, near)
    low = _bound(model, batch, loss_fn, -1, -lowest, near)
    outside = torch.zeros_like(found, dtype=torch.bool)
    if most is not None:
        outside |= found > most + near
    if low is not None:
        outside |= found < -low - near
    share = float(outside.float().mean())
    return Targets(lowest, highest, None if low is None else -low, most, share)


def _read(
    model: nn.Module, batch: Any, loss_fn: LossFn
) -> tuple[Tensor, Tensor] | None:
    """Return outputs, and targets of squared errors; NaN where the loss reads none."""
    loss, output = returned(model, batch, loss_fn)
    if output is None or not output.requires_grad or not output.is_floating_point():
        return None
    (grad,) = torch.autograd.grad(checked(loss), output, allow_unused=True)
    if grad is None:
        return None
    square, size = grad.double().square().sum(), loss.detach().double()
    if not square > 0 or not size > 0 or not square.isfinite():
        return None
    weight = square / (4 * size)
    output = output.detach().double()
    targets = output - grad.double() / (2 * weight)
    return output, targets.where(grad != 0, torch.nan)


def _bound(
    model: nn.Module, batch: Any, loss_fn: LossFn, sign: int, asked: float, near: float
) -> float | None:
    """Return what ``sign`` times an output is never above; None if it can be ``asked``.

    A way uphill arrives there and stays, in ever larger steps, and no weights far off
    lead beyond.

    Args:
        model: The model.
        batch: One batch.
        loss_fn: Runs the model on it.
        sign: -1 for what outputs are never below.
        asked: ``sign`` times what the outputs have to be.
        near: By how much two looks at one bound may differ.
    """
    least, most = math.inf, -math.inf
    for far in _FAR:
        with torch.no_grad(), _moved(model, far):
            _, output = returned(model, batch, loss_fn)
        if output is None or not output.isfinite().all():
            return None
        least = min(least, float((sign * output).amin()))
        most = max(most, float((sign * output).amax()))
        if most >= asked - near:
            return None
    way = list(_uphill(model, batch, loss_fn, sign))
    most = max(most, *way)
    stays = min(way[-2:]) >= most - near > least
    return most if stays and most < asked - near else None


def _uphill(
    model: nn.Module, batch: Any, loss_fn: LossFn, sign: int
) -> Iterator[float]:
    """Yield the largest output, times the sign, before and after each step uphill."""
    with _kept(model) as weights:
        last = None
        for far in (0.0, *_UPHILL):
            if last is not None:
                grads = torch.autograd.grad(last, weights, allow_unused=True)
                with torch.no_grad():
                    for weight, grad in zip(weights, grads, strict=True):
                        if grad is not None:
                            weight.add_(far * _size(weight) * grad.sign())
            _, output = returned(model, batch, loss_fn)
            last = None if output is None else (sign * output).amax()
            yield math.inf if last is None else float(last.detach())


def _size(weight: Tensor) -> Tensor:
    return weight.detach().square().mean().sqrt().clamp_min(0.1)


@contextmanager
def _moved(model: nn.Module, far: float) -> Iterator[None]:
    """Move weights at random; put them back."""
    with _kept(model) as weights:
        with torch.no_grad():
            for weight in weights:
                noise = torch.randn(weight.shape).to(weight)
                weight.add_(far * _size(weight) * noise)
        yield


@contextmanager
def _kept(model: nn.Module) -> Iterator[Sequence[nn.Parameter]]:
    """Yield the weights that may be moved, and put them back.

    Those that recur stay: they would let the states of a ReLU overflow.
    """
    moved = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and "weight_hh" not in name
    ]
    kept = [p.detach().clone() for p in moved]
    try:
        yield moved
    finally:
        with torch.no_grad():
            for p, was in zip(moved, kept, strict=True):
                p.copy_(was)
