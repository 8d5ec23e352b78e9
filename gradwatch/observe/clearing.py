"""Whether gradients are cleared between an optimizer's step and the next backward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor, nn


class Clearing:
    """Follows one gradient a step: the one that its backward reached first.

    It was not cleared where it is the tensor that the optimizer used, written once
    since; zeroing it in place would have been a second time.
    """

    def __init__(self) -> None:
        self._first = -1
        self._used: tuple[int, weakref.ref[Tensor], int] | None = None

    def begins(self, index: int, grad: Tensor | None) -> bool | None:
        """Take note of the first gradient of a step.

        Args:
            index: Of its parameter.
            grad: As it is now.

        Returns:
            Whether it had been cleared; None where that cannot be told.
        """
        self._first = index
        if self._used is None or self._used[0] != index or grad is None:
            return None
        _, used, version = self._used
        return not (used() is grad and grad._version == version + 1)

    def ends(self, params: Sequence[nn.Parameter]) -> None:
        """Take note of the same gradient as the optimizers leave it.

        Args:
            params: All parameters; none where no optimizer has stepped.
        """
        grad = params[self._first].grad if 0 <= self._first < len(params) else None
        self._used = None
        if grad is not None:
            self._used = (self._first, weakref.ref(grad), grad._version)
