"""PyTorch-Ignite: ``GradwatchHandler(model).attach(trainer)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import gradwatch
from gradwatch.integrations.fit import Fit, needs
from gradwatch.sinks import Scalars, Sink, TensorBoard

_engine = needs("ignite.engine", extra="ignite")


class GradwatchHandler:
    """Watches a model while an engine runs.

    ``Checkpoint({"model": model, "gradwatch": handler}, ...)`` holds its state.

    Args:
        model: The model that the engine trains.
        logger: A logger of Ignite that gets the numbers too: TensorBoard's, or any
            with ``log_metrics``. W&B's run is found without it.
        arguments: Of :func:`gradwatch.watch`.

    Raises:
        TypeError: If one of them is unknown, or the logger takes no numbers.
    """

    def __init__(self, model: nn.Module, logger: Any = None, **arguments: Any) -> None:
        self._model, self._sinks = model, _sinks(logger)
        self._fit = Fit(arguments)
        self._running: Any = None

    @property
    def watch(self) -> gradwatch.Watch | None:
        """The watch; None before the engine has run."""
        return self._fit.watch

    def attach(self, trainer: Any) -> GradwatchHandler:
        """gradwatch.Watch whenever an engine runs; return the handler itself."""
        events = _engine.Events
        trainer.add_event_handler(events.STARTED, self._begin)
        trainer.add_event_handler(events.COMPLETED, self._end)
        trainer.add_event_handler(events.TERMINATE, self._end)
        return self

    def _begin(self, engine: Any) -> None:
        if self._running is None:  # else another engine runs within this one
            self._running = engine
            start = engine.state.iteration
            self._fit.begin(self._model, self._sinks, start_step=start)

    def _end(self, engine: Any) -> None:
        if engine is self._running:
            self._running = None
            self._fit.end()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return self._fit.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there when the engine starts."""
        self._fit.load_state_dict(state_dict)


def _sinks(logger: Any) -> list[Sink]:
    """Return where a logger of Ignite has its numbers."""
    if logger is None or type(logger).__name__ == "WandBLogger":
        return []
    if hasattr(logger, "writer"):
        return [TensorBoard(logger.writer)]
    if hasattr(logger, "log_metrics"):
        return [Scalars(logger.log_metrics)]
    raise TypeError(
        f"logger is a {type(logger).__name__}; expected one of Ignite's with a writer "
        "or log_metrics. For another, pass sinks=[gradwatch.sinks.Scalars(function)]."
    )
