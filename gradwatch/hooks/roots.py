"""The loss of a backward pass: the number that backward was called on."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gradwatch import _torch
from gradwatch.hooks import breaks
from gradwatch.hooks.readout import Readout

Loss = float | Tensor | None
"""A number; on an accelerator a tensor of no axis, not waited for; None: not known."""


class Roots:
    """Reads the loss from the call of backward that a gradient hook runs in."""

    def __init__(self) -> None:
        self.loss: Loss = None
        """Of the call that was found last: the sum of the numbers it was called on,
        each times the gradient given for it; None where they are no single numbers."""
        self.readout: Readout | None = None
        """Who looks at what the loss is made of, where that is wanted."""
        self.broken = ""
        """What of a call was not finite, where its loss is the first that is not; empty
        where nobody can tell."""
        self._last: Callable[[], Tensor | None] = _none
        self._nested, self._finite = False, True

    def find(self, *, elsewhere: bool = False) -> bool:
        """Read the loss; tell whether it is of a call that was not found before.

        A backward inside a backward, as reentrant checkpointing has it, is another pass
        of the same call.

        Args:
            elsewhere: Whether another thread may have called backward: on an
                accelerator the hooks run in one of the autograd engine.
        """
        call = _torch.backward_call(elsewhere=elsewhere)
        if call is None:
            self.loss, self._last = None, _none
            return True
        roots, weights, nested = call
        several = type(roots) is not Tensor
        first = (roots[0] if roots else None) if several else roots
        either, self._nested = nested or self._nested, nested
        if either and self._last() is first:
            return False
        if type(first) is not Tensor:
            self.loss, self._last = None, _none
            return True
        again, self._last = self._last() is first, weakref.ref(first)
        if self.readout is not None and self.readout.sees:
            self.readout.on_loss(first)
        if weights is None and not (several and roots[1:]):
            self.loss = _number(first)
        else:
            self.loss = _total(roots, weights)
        loss = self.loss
        finite = type(loss) is not float or -math.inf < loss < math.inf
        if not again and not (finite and self._finite):
            self.broken = breaks.first(first) if self._finite else ""
            self._finite = finite
        return True


def _total(roots: Sequence[Any], weights: Any) -> Loss:
    """Return the sum of the roots, each times its weight; None where one is unknown."""
    if weights is None or isinstance(weights, Tensor):
        weights = (weights,) * len(roots)
    total: float | Tensor = 0.0
    for root, weight in zip(roots, weights, strict=True):
        number = _number(root)
        factor = 1.0 if weight is None else _number(weight)
        if number is None or factor is None:
            return None
        total = total + number * factor
    return total


def _number(root: Any) -> Loss:
    """Return the one value of a tensor; a copy of it where it is on an accelerator."""
    if type(root) is not Tensor or (root.shape and root.numel() != 1):
        return None
    if root.dtype.is_complex or root.is_meta:
        return None
    if root.is_cpu:
        value: float = root.item()
        return value
    return root.detach().reshape(()).clone()


def _none() -> None:
    """Stand in for a reference to a tensor that is gone."""
