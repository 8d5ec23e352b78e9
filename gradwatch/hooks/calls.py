"""The calls of a module, seen without a forward hook.

A compiler breaks its graphs at a forward hook, and torch.jit compiles it. So calls are
seen from the slot that ``module.compile()`` fills: ``nn.Module.__call__`` runs what is
there, and nothing is registered that a compiler or a scripter reads.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from gradwatch import _torch


class Seeing(Protocol):
    """Whoever sees the calls of a module.

    Attributes:
        sees: Whether the next call is to be shown; nearly always it is not.
    """

    sees: bool

    def before_forward(self, module: nn.Module) -> None:
        """A call begins."""

    def on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """A call has returned."""


class Call:
    """Stands in the slot, and shows calls to whoever sees them.

    A copy or a pickle of the module has nothing there.

    Attributes:
        seeing: Who sees the calls; a tuple that is replaced, never changed.

    Args:
        module: The module.
        compiled: What ``module.compile()`` has put there before; None for nothing.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any] | None) -> None:
        self.seeing: tuple[Seeing, ...] = ()
        self.compiled = compiled
        self._module = weakref.ref(module)
        self._begins = _torch.OutOfGraphs(self._show_begin)
        self._ended = _torch.OutOfGraphs(self._show_end)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward with its hooks, and show it."""
        # Replicas copy the slot: the module is the one that is being called.
        module: Any
        try:
            module = sys._getframe(1).f_locals["self"]
            run = module._call_impl
        except (KeyError, AttributeError):  # not called by nn.Module
            module = self._module()
            run = module._call_impl
        if torch.compiler.is_dynamo_compiling():
            return run(*args, **kwargs)
        if self.compiled is not None and module is self._module():
            run = self.compiled
        for seeing in self.seeing:
            if seeing.sees:
                break
        else:
            return run(*args, **kwargs)
        self._begins(module)
        output = run(*args, **kwargs)
        self._ended(module, args, kwargs, output)
        return output

    def _show_begin(self, module: nn.Module) -> None:
        for seeing in self.seeing:
            seeing.before_forward(module)

    def _show_end(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        for seeing in self.seeing:
            seeing.on_forward(module, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave nothing in copies and pickles, which need no gradwatch to be read."""
        return type(None), ()


def attach(module: nn.Module, seeing: Seeing) -> None:
    """Show the calls of a module from now on; nothing happens where it does already."""
    call = _torch.call_slot(module)
    if not isinstance(call, Call):
        call = Call(module, call)
        _torch.set_call_slot(module, call)
    if seeing not in call.seeing:
        call.seeing = (*call.seeing, seeing)


def detach(module: nn.Module, seeing: Seeing) -> None:
    """Show them no more, and leave the slot as it was once nobody sees them."""
    call = _torch.call_slot(module)
    if not isinstance(call, Call):
        return
    call.seeing = tuple(other for other in call.seeing if other is not seeing)
    if not call.seeing:
        _torch.set_call_slot(module, call.compiled)


def seeing(module: nn.Module) -> tuple[Seeing, ...]:
    """Return who sees the calls of a module."""
    call = _torch.call_slot(module)
    return call.seeing if isinstance(call, Call) else ()
