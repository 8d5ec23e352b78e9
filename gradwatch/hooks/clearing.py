"""Whether gradients are cleared between an optimizer's step and the next backward."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SUSPICIONS = 3
"""Consecutive steps that look so before it is looked up once."""


class Clearing:
    """Follows one gradient a step: the one that its backward reached first.

    It was not cleared where it is the tensor that the optimizer used, written once
    since: zeroing it in place would have been a second time. What zeroes it behind
    autograd's back, through ``.data`` or numpy, leaves no trace; so after a few such
    steps it is looked up, once, whether there is anything in it before backward adds.
    """

    def __init__(self) -> None:
        self.known = False
        """Whether the gradient that is followed is one that the optimizers use."""
        self._first = -1
        self._used: tuple[int, weakref.ref[Tensor], int] | None = None
        self._suspicions = 0
        self._confirmed: bool | None = None
        self._hook: Any = None

    def suspects(self, index: int, grad: Tensor | None) -> bool:
        """Tell whether the first gradient of a step seems not to have been cleared."""
        if self._used is None or self._used[0] != index or grad is None:
            return False
        return self._used[1]() is grad and grad._version == self._used[2] + 1

    def begins(self, index: int, grad: Tensor | None) -> bool | None:
        """Note the first gradient of a step.

        Args:
            index: Of its parameter.
            grad: As it is now.

        Returns:
            Whether it had been cleared; None where that cannot be told.
        """
        self.close()
        self._first, self.known = index, False
        if self._used is None or self._used[0] != index or grad is None:
            return None
        if not self.suspects(index, grad):
            self._suspicions = 0
            return True
        self._suspicions += 1
        return self._confirmed is False

    def used(self, params: Sequence[nn.Parameter], idle: Collection[int]) -> None:
        """Note the same gradient as an optimizer leaves it.

        Args:
            params: All parameters.
            idle: Places of those that an optimizer holds which has not stepped: theirs
                are cleared when it does.
        """
        first = self._first
        self._used, self.known = None, 0 <= first < len(params) and first not in idle
        grad = params[first].grad if self.known else None
        if grad is not None:
            self._used = (first, weakref.ref(grad), grad._version)
            unsure = self._suspicions >= _SUSPICIONS and self._confirmed is None
            if unsure and self._hook is None:
                self._look_up(params[first])

    def unused(self) -> None:
        """Note that no optimizer has used the gradients of a step."""
        self._used = None

    def _look_up(self, param: nn.Parameter) -> None:
        """Look at a gradient once, as the next backward is about to add to it."""
        own, ref = weakref.ref(self), weakref.ref(param)

        def hook(_: Tensor) -> None:
            clearing, held = own(), ref()
            if clearing is not None and held is not None:
                clearing.confirm(held.grad)

        self._hook = param.register_hook(hook)

    def confirm(self, grad: Tensor | None) -> None:
        """Take note, once, of whether there is anything in a gradient."""
        if self._confirmed is None:
            there = grad is not None and bool(torch.count_nonzero(grad.detach()))
            self._confirmed = there

    def close(self) -> None:
        """Take the hook off, if there is one. Safe to call twice."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
