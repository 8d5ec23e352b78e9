"""The watch of one fit: what all frameworks have in common."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import gradwatch
from gradwatch.sinks import Sink


def needs(*packages: str, extra: str) -> Any:
    """Import a framework.

    Args:
        packages: Its module, and others in its place.
        extra: What of gradwatch installs it.

    Returns:
        The first of the modules that is there.

    Raises:
        ModuleNotFoundError: If none is.
    """
    for package in packages:
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            root = package.partition(".")[0]
            if error.name is None or error.name.partition(".")[0] != root:
                raise  # it is there, and lacks something itself
    raise ModuleNotFoundError(
        f"gradwatch.integrations.{extra} needs {packages[0].partition('.')[0]}; "
        f"pip install 'gradwatch[{extra}]'."
    )


class Watching:
    """What callbacks have in common: their watch, and its state for a checkpoint.

    Args:
        arguments: Of :func:`gradwatch.watch`.
    """

    _fit: Fit

    @property
    def watch(self) -> gradwatch.Watch | None:
        """The watch; None before the first fit."""
        return self._fit.watch

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return self._fit.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there when the next fit begins."""
        self._fit.load_state_dict(state_dict)


class Fit:
    """Begins a watch with each fit and ends it; its state lives on between them.

    Args:
        arguments: Of :func:`gradwatch.watch`, as the user gave them.

    Raises:
        TypeError: If one of them is unknown.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        inspect.signature(gradwatch.watch).bind(None, **arguments)
        self.watch: gradwatch.Watch | None = None
        """The watch of this fit, and between two fits the closed one of the last."""
        self._arguments = dict(arguments)
        self._state: dict[str, Any] = {}
        self._model: weakref.ref[nn.Module] | None = None  # that the state is of
        self._open = False

    def begin(self, model: nn.Module, sinks: Sequence[Sink] = (), **more: Any) -> None:
        """Watch a model from here.

        Args:
            model: The model.
            sinks: Of the framework's loggers, beside the user's own.
            more: Arguments of ``watch`` that the user's own replace.
        """
        self.end()
        other = self._model is not None and self._model() is not model
        if other or more.get("start_step") == 0:
            self._state = {}  # it is of another training
        self._model = weakref.ref(model)
        own = [*self._arguments.get("sinks", ())]
        given = {**more, **self._arguments, "sinks": [*own, *sinks]}
        self.watch = gradwatch.watch(model, **given)
        self._open = True
        if self._state:
            self.watch.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the watch for the framework's checkpoint."""
        if self._open and self.watch is not None:
            self._state = self.watch.state_dict()
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, at once or when the next fit begins."""
        self._state, self._model = dict(state), None
        if self._open and self.watch is not None and self._state:
            self.watch.load_state_dict(self._state)

    def end(self) -> None:
        """Close the watch. Safe to call twice."""
        if self.watch is not None and self._open:
            self.state_dict()
            self._open = False
            self.watch.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: the state, and no watch."""
        return {"_arguments": self._arguments, "_state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be as :meth:`__getstate__` was."""
        self.watch, self._model, self._open = None, None, False
        self.__dict__.update(state)
