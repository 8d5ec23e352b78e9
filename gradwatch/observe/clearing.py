"""Whether gradients are cleared between an optimizer's step and the next backward."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SUSPICIONS = 3
"""Steps running that look so before it is looked up once."""


class Clearing:
    """Follows one gradient a step: the one that its backward reached first.

    It was not cleared where it is the tensor that the optimizer used, written once
    since: zeroing it in place would have been a second time. What zeroes it behind
    autograd's back, through ``.data`` or numpy, leaves no trace; so after a few such
    steps it is looked up, once, whether there is anything in it before backward adds.
    """

    def __init__(self) -> None:
        self._first = -1
        self._used: tuple[int, weakref.ref[Tensor], int] | None = None
        self._suspicions = 0
        self._confirmed: bool | None = None
        self._hook: Any = None

    def begins(self, index: int, grad: Tensor | None) -> bool | None:
        """Take note of the first gradient of a step.

        Args:
            index: Of its parameter.
            grad: As it is now.

        Returns:
            Whether it had been cleared; None where that cannot be told.
        """
        self.close()
        self._first = index
        if self._used is None or self._used[0] != index or grad is None:
            return None
        _, used, version = self._used
        if used() is not grad or grad._version != version + 1:
            self._suspicions = 0
            return True
        self._suspicions += 1
        return self._confirmed is False

    def ends(self, params: Sequence[nn.Parameter], idle: Collection[int]) -> bool:
        """Take note of the same gradient as the optimizers leave it.

        Args:
            params: All parameters; none where no optimizer has stepped.
            idle: Indices of those that an optimizer holds which has not stepped: theirs
                are cleared when it does.

        Returns:
            Whether the gradient is one that these optimizers use.
        """
        first = self._first
        self._used = None
        if not 0 <= first < len(params) or first in idle:
            return False
        grad = params[first].grad
        if grad is not None:
            self._used = (first, weakref.ref(grad), grad._version)
            if self._suspicions >= _SUSPICIONS and self._confirmed is None:
                self._look_up(params[first])
        return True

    def _look_up(self, param: nn.Parameter) -> None:
        """Look at a gradient once, as the next backward is about to add to it."""
        own, ref = weakref.ref(self), weakref.ref(param)

        def hook(_: Tensor) -> None:
            clearing, held = own(), ref()
            grad = None if held is None else held.grad
            if clearing is not None and clearing._confirmed is None:
                there = grad is not None and bool(torch.count_nonzero(grad.detach()))
                clearing._confirmed = there

        self._hook = param.register_hook(hook)

    def close(self) -> None:
        """Take the hook off, if there is one. Safe to call twice."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
