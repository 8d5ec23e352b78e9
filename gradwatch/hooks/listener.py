"""Whom the hooks report to. They look and tell; what follows is not theirs to say."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from gradwatch import _torch


class Listener(Protocol):
    """What a training loop is seen to do, in the order in which it does it."""

    def on_gradient(self, task: int, param: Tensor) -> None:
        """The first gradient of a backward pass has been accumulated."""

    def on_backward_end(self) -> None:
        """A backward pass has ended."""

    def failed(self, error: Exception) -> None:
        """A hook has failed before it could report."""

    def before_optimizer(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer is about to use its gradients, its own hooks behind it."""

    def after_optimizer(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer has stepped."""


class Quick(Protocol):
    """Whoever takes what is as usual, so that it need not be reported."""

    def begins(self, task: int, param: Tensor) -> bool:
        """Take a backward pass that begins; tell whether it was taken."""

    def uses(self, optimizer: Optimizer, *, quickly: bool) -> bool:
        """The same of an optimizer that is about to use its gradients."""

    def stepped(self, optimizer: Optimizer, *, quickly: bool) -> bool:
        """The same of one that has stepped."""


def end_of_pass(listener: Listener) -> Callable[[], None]:
    """Return what reports the end of a backward pass, and keeps nobody alive."""
    ref = weakref.ref(listener)

    def ended() -> None:
        told = ref()
        if told is not None:
            told.on_backward_end()

    return _torch.OutOfGraphs(ended)


def nobody() -> None:
    """Stand in for a reference to somebody who is not there."""
