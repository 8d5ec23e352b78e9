"""One pair of hooks on all optimizers of the process, for all watches.

torch keeps such hooks in a dict, and a step of another thread that goes through it
raises if a hook comes or goes meanwhile. So the pair is registered at the first watch
and stays; whom it tells is a tuple, replaced and never changed.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Final, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradwatch import _torch


class Hearing(Protocol):
    """Whoever hears of every optimizer's step."""

    def begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer steps; its own hooks come after this."""

    def ended(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer has stepped."""


class _Told:
    """Who is told of steps; nobody is kept alive by it."""

    def __init__(self) -> None:
        self.now: tuple[weakref.ref[Hearing], ...] = ()
        self.registered = False
        self.renew()

    def renew(self) -> None:
        """Take a lock that nobody holds; again in a forked process."""
        self.lock = threading.RLock()  # a collected watch may be removed in add()


_TOLD: Final = _Told()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TOLD.renew)


def add(hearing: Hearing) -> None:
    """Tell somebody of every step from now on."""
    with _TOLD.lock:
        if not _TOLD.registered:
            before, after = HOOKS
            register_optimizer_step_pre_hook(before)
            register_optimizer_step_post_hook(after)
            _TOLD.registered = True
        living = (ref for ref in _TOLD.now if ref() is not None)
        _TOLD.now = (*living, weakref.ref(hearing))


def remove(hearing: Hearing) -> None:
    """Tell somebody no more; nothing happens where nobody did."""
    with _TOLD.lock:
        _TOLD.now = tuple(r for r in _TOLD.now if r() not in (None, hearing))


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for ref in _TOLD.now:
        if (hearing := ref()) is not None:
            hearing.begins(optimizer, args, kwargs)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for ref in _TOLD.now:
        if (hearing := ref()) is not None:
            hearing.ended(optimizer, args, kwargs)


HOOKS: Final = _torch.OutOfGraphs(_before), _torch.OutOfGraphs(_after)
"""The pair that is registered."""
