"""How far the recurrent weights move in one step of the optimizers that hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.numerics.norms import Norms, joined, norms

_SMALL: Final = 1 << 16
"""Up to this many entries numpy costs a third of torch on the CPU, in one thread."""

_APART: Final = 1e-3
"""Difference of two norms, over one of them, that no rounding explains."""
_SELDOM: Final = 50
"""Steps for which a weight that is written outside is not told of again."""


class _View(NamedTuple):
    """A small weight as numpy sees it, and two buffers of its size.

    The view keeps the memory alive, so that the same address is the same memory.
    """

    address: int
    values: np.ndarray
    before: np.ndarray
    gap: np.ndarray


Moving = Sequence[tuple[str, nn.Parameter]]
"""Names of streams with the weight that an optimizer is about to change."""


class Moved(NamedTuple):
    """How far recurrent weights have moved in one step.

    Attributes:
        names: Names of the streams.
        change: Norm of the change of each.
        weight: Norm of each before it.
    """

    names: list[str]
    change: Norms
    weight: Norms


class _Left(NamedTuple):
    """A weight as the optimizers of a step have left it.

    Attributes:
        step: The step.
        version: Its version.
        size: Its norm; NaN where that is not known at once.
    """

    step: int
    version: int
    size: float


class Changes:
    """Compares weights with what they were before the first optimizer of a step.

    Args:
        weights: Name of a stream -> its W_hh, where that is a parameter itself.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._tracked = {id(w): (name, w) for name, w in weights.items()}
        self._copies: dict[str, Tensor] = {}
        self._views: dict[str, _View] = {}
        self._sizes: dict[str, Norms] = {}
        self._changes: dict[str, Norms] = {}
        self._left: dict[str, _Left] = {}
        self._told: dict[str, int] = {}

    def among(self, params: Iterable[nn.Parameter]) -> Moving:
        """Return which of some parameters are recurrent weights, with their names."""
        known = [self._tracked.get(id(param)) for param in params]
        return [pair for pair in known if pair is not None]

    def remember(self, moving: Moving, step: int) -> list[str]:
        """Copy and measure weights that no optimizer of the step has changed yet.

        Returns:
            Names of those that somebody else has written since the last step; of one
            that is written step after step, the first time alone.
        """
        written: list[str] = []
        with np.errstate(all="ignore"):  # what overflows is measured again, wider
            for name, weight in moving:
                if name not in self._sizes:
                    size = self._sizes[name] = self._one(name, weight)
                    left = self._left.pop(name, None)
                    if left is None or left.step + 1 != step:
                        continue
                    if _is_written(left, weight._version, size):
                        if step - self._told.get(name, -_SELDOM) >= _SELDOM:
                            written.append(name)
                        self._told[name] = step
        return written

    def forget(self) -> None:
        """Forget how weights were left: they are written by somebody who is known."""
        self._left.clear()

    def _one(self, name: str, weight: nn.Parameter) -> Norms:
        view = self._views.get(name)
        if view is None or view.address != weight.data_ptr():
            view = _view(weight)
            if view is not None:
                self._views[name] = view
        if view is not None:
            np.copyto(view.before, view.values)
            return [_norm(view.before)]
        self._views.pop(name, None)
        copy = self._copies.get(name)
        if copy is None or copy.shape != weight.shape or copy.dtype != weight.dtype:
            copy = torch.empty_like(weight, requires_grad=False)
            self._copies[name] = copy
        copy.copy_(weight.detach())
        return norms([weight])

    def compare(self, moving: Moving, step: int) -> None:
        """Measure how far weights have come by now from what was remembered."""
        with np.errstate(all="ignore"):
            for name, weight in moving:
                if name in self._sizes:
                    change = self._changes[name] = self._change(name, weight)
                    size = self._size_now(name, change)
                    self._left[name] = _Left(step, weight._version, size)

    def _size_now(self, name: str, change: Norms) -> float:
        """Return the norm of a small weight after its change."""
        if name not in self._views:
            return math.nan
        view, [gap], [size] = self._views[name], change, self._sizes[name]
        if not gap < size:  # what is left over may be anything
            return math.nan
        square: float = size * size - 2 * view.before.dot(view.gap) + gap * gap
        return float(square**0.5) if square > 0 else 0.0

    def _change(self, name: str, weight: nn.Parameter) -> Norms:
        view = self._views.get(name)
        if view is None:
            return norms([self._copies[name] - weight.detach()])
        values = view.values
        if view.address != weight.data_ptr():  # an optimizer that replaces the data
            values = weight.detach().numpy().reshape(-1)
        return [_norm(np.subtract(view.before, values, out=view.gap))]

    def compared(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Return the weights compared in this step, each as it was before it."""
        found: list[tuple[str, nn.Parameter, Tensor]] = []
        for name, weight in self._tracked.values():
            view = self._views.get(name)
            if name in self._changes and view is not None:
                copy = torch.from_numpy(view.before).view_as(weight)
                found.append((name, weight, copy))
            elif name in self._changes and name in self._copies:
                found.append((name, weight, self._copies[name]))
        return found

    def take(self) -> Moved | None:
        """Return what was compared in the step; None where nothing was."""
        changes, sizes = self._changes, self._sizes
        if not sizes:
            return None
        self._changes, self._sizes = {}, {}
        if not changes:
            return None
        names = list(changes)
        before = [sizes[name] for name in names]
        return Moved(names, joined(list(changes.values())), joined(before))


def _is_written(left: _Left, version: int, size: Norms) -> bool:
    """Tell whether a weight is not as it was left, by its version or by its norm."""
    if version != left.version:
        return True
    now = size[0] if isinstance(size, list) else math.nan
    return abs(now - left.size) > _APART * left.size


def _view(weight: Tensor) -> _View | None:
    """Return the view of a small float32 weight on the CPU, else None."""
    small = weight.dtype is torch.float32 and 0 < weight.numel() <= _SMALL
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu"
    if not small or not plain or not weight.is_contiguous():
        return None
    values = weight.detach().numpy().reshape(-1)
    return _View(weight.data_ptr(), values, values.copy(), values.copy())


def _norm(values: np.ndarray) -> float:
    square = float(values.dot(values))
    if math.isfinite(square) and square > 1e-30:
        return math.sqrt(square)
    wide = values.astype(np.float64)  # overflow, underflow, or not finite
    return math.sqrt(float(wide.dot(wide)))
