"""Whom the hooks report to. They look and tell; what follows is not theirs to say."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer


class Listener(Protocol):
    """What a training loop is seen to do, in the order in which it does it."""

    def on_gradient(self, task: int, param: Tensor) -> None:
        """The first gradient of a backward pass has been accumulated."""

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


def nobody() -> None:
    """Stand in for a reference to somebody who is not there."""
