"""Whether the outputs of a model can be what its targets are, whatever the weights.

An output behind a tanh stays between -1 and 1, and no training brings it to a target of
3. Nothing is read of the code: weights are moved far, and outputs are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwatch.before.trial import LossFn, Subject, checked, returned

_NEAR: Final = 1.0
"""How far weights are moved where targets are read again, in units of their size."""
_FAR: Final = (100.0, 100.0, 1000.0, 1000.0)
"""The same of each look at what outputs can be."""
_UPHILL: Final = (1.0, 1.0, 3.0, 10.0, 30.0, 100.0)
"""The same of each step towards larger outputs."""
_WAYS: Final = 3
"""Ways uphill, from different weights, of which two have to end alike."""
_MANY: Final = 16
"""Outputs from which on two are enough: weights far off have shown most of it."""
_CLOSE: Final = 0.01
"""Share of the largest target by which an output may miss a target or a bound."""
_SAME: Final = 1e-3
"""The same by which two readings of one target may differ."""
_MOVED: Final = 0.01
"""Share of what outputs have moved by that targets may have moved, too."""
_ROUNDING: Final = 500.0
"""Units in the last place of an output, in which no target can be read."""
_MORE: Final = 1000
"""Calls of torch beyond twice as many as usual, after which a run is given up."""


class Targets(NamedTuple):
    """Targets beside what outputs can be.

    Attributes:
        lowest: The least target.
        highest: The largest one.
        least: What no output is below; -Inf where no target is.
        most: What no output is above; Inf where no target is.
        outside: Share of the targets that lie outside these.
        left: The least loss that is possible, over the variance of the targets.
    """

    lowest: float
    highest: float
    least: float
    most: float
    outside: float
    left: float


def reachable(given: Subject, batch: Any, loss_fn: LossFn) -> Targets | None:
    """Return the targets of a loss of squared errors, and what outputs can be.

    The loss is ``weight * sum((output - target)^2)``: from it and its gradient follow
    both, and the targets have to be the same at other weights.

    Args:
        given: The model.
        batch: One batch.
        loss_fn: Returns the loss of a model on it.

    Returns:
        None where the loss is not of this kind, the model's output not one tensor, the
        model refuses other weights, or it cannot be told what outputs can be.
    """
    try:
        return _Look(given.model, batch, loss_fn).targets()
    except Exception:  # the user's own lines may refuse weights such as these
        return None


@dataclass
class _Look:
    """A model that is looked at with other weights.

    Attributes:
        model: The model.
        batch: One batch.
        loss_fn: Runs the model on it.
        calls: How many of torch it may take.
    """

    model: nn.Module
    batch: Any
    loss_fn: LossFn
    calls: float = math.inf

    def targets(self) -> Targets | None:
        """Return what :func:`reachable` does."""
        first = self._read()
        if first is None:
            return None
        with _moved(self.model, _NEAR):
            second = self._read()
        if second is None or second[0].shape != first[0].shape:
            return None
        known = first[1].isfinite() & second[1].isfinite()
        if not known.any():
            return None
        # They stay where they are while outputs move; those of other losses follow.
        moved, changed = (
            (a[known] - b[known]).abs() for a, b in zip(first, second, strict=True)
        )
        found = first[1].where(known, math.nan)
        size, differ = float(first[1][known].abs().amax()), float(changed.amax())
        same = differ <= _SAME * size and differ <= _MOVED * float(moved.amax())
        return self._beside(found, _CLOSE * size) if same and size > 0 else None

    def _beside(self, targets: Tensor, near: float) -> Targets | None:
        """Return targets beside bounds; None where these cannot be told."""
        high, low = (self._bound(targets, sign, near) for sign in (1, -1))
        most = math.inf if high is None else high
        least = -math.inf if low is None else -low
        known = targets[targets.isfinite()]
        beyond = torch.maximum(known - most, least - known).clamp_min(0)
        outside = float((beyond > near).double().mean())
        if not outside and (high is None or low is None):
            return None
        variance = max(float(known.var(unbiased=False)), near**2)
        left = float(beyond.square().mean()) / variance
        ends = float(known.amin()), float(known.amax())
        return Targets(*ends, least, most, outside, left)

    def _returned(self) -> tuple[Tensor, Tensor | None]:
        """Return the loss and the output, unless the model runs on and on."""
        with _Counting(self.calls) as counting:
            found = returned(self.model, self.batch, self.loss_fn)
        if self.calls == math.inf:
            self.calls = 2 * counting.calls + _MORE
        return found

    def _read(self) -> tuple[Tensor, Tensor] | None:
        """Return outputs, and targets of squared errors; NaN where none can be read."""
        loss, output = self._returned()
        if output is None or not output.requires_grad:
            return None
        (grad,) = torch.autograd.grad(checked(loss), output, allow_unused=True)
        if grad is None or not output.is_floating_point():
            return None
        square, size = grad.double().square().sum(), loss.detach().double()
        if not square > 0 or not size > 0 or not square.isfinite():
            return None
        weight = square / (4 * size)
        rounding = _ROUNDING * torch.finfo(output.dtype).eps
        output = output.detach().double()
        targets = output - grad.double() / (2 * weight)
        if float(targets.abs().amax()) < rounding * float(output.abs().amax()):
            return None
        return output, targets.where(grad != 0, math.nan)

    def _bound(self, targets: Tensor, sign: int, near: float) -> float | None:
        """Return what ``sign`` times an output is never above; Inf: what is asked for.

        Two ways uphill arrive there and stay, in ever larger steps, and no weights far
        off lead beyond. What climbs is the output whose target is highest.

        Args:
            targets: Of each output, NaN where it is not known.
            sign: -1 for what outputs are never below.
            near: By how much two looks at one bound may differ.

        Returns:
            None where it cannot be told.
        """
        wanted = (sign * targets).nan_to_num(-math.inf, -math.inf, -math.inf).flatten()
        place, asked = int(wanted.argmax()), float(wanted.amax()) - near
        least, most = math.inf, -math.inf
        for far in _FAR:
            with torch.no_grad(), _moved(self.model, far):
                _, output = self._returned()
            if output is None or not output.isfinite().all():
                return None
            least = min(least, float((sign * output).amin()))
            most = max(most, float((sign * output).amax()))
            if most >= asked:
                return math.inf
        ends = []
        for way in range(_WAYS):
            with _moved(self.model, _NEAR if way else 0.0):
                climbed = list(self._uphill(place, sign))
            if not all(map(math.isfinite, climbed)):
                return None
            most = max(most, *climbed)
            if most >= asked:
                return math.inf
            ends.append(min(climbed[-2:]))
            enough = len(wanted) >= _MANY or len(ends) == _WAYS
            if enough and sum(end >= most - near for end in ends) > 1:
                return most if least < most - near else None
        return None

    def _uphill(self, place: int, sign: int) -> Iterator[float]:
        """Yield an output, times the sign, before and after each step uphill."""
        with _kept(self.model) as weights:
            last: Tensor | None = None
            for far in (0.0, *_UPHILL):
                if last is not None:
                    grads = torch.autograd.grad(last, weights, allow_unused=True)
                    with torch.no_grad():
                        for weight, grad in zip(weights, grads, strict=True):
                            if grad is not None:
                                weight.add_(far * _size(weight) * grad.sign())
                _, output = self._returned()
                last = None if output is None else sign * output.flatten()[place]
                yield math.nan if last is None else float(last.detach())


class _Counting(TorchFunctionMode):
    """Counts calls of torch, and ends what runs on and on.

    A loop that goes on until a gate has opened may never end with other weights.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.calls, self._most = 0, most

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        if self.calls > self._most:
            raise RuntimeError("the model runs on and on with these weights")
        return function(*args, **(kwargs or {}))


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
