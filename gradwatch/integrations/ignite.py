"""PyTorch-Ignite: ``GradwatchHandler(model).attach(trainer)``."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradwatch.integrations.fit import Fit, Watching, needs
from gradwatch.sinks import Scalars, Sink, TensorBoard

_engine = needs("ignite.engine", extra="ignite")


class GradwatchHandler(Watching):
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

    def attach(self, trainer: Any) -> GradwatchHandler:
        """Watch whenever an engine runs; return the handler itself."""
        events = _engine.Events
        trainer.add_event_handler(events.STARTED, self._begin)
        trainer.add_event_handler(events.COMPLETED, self._end)
        trainer.add_event_handler(events.TERMINATE, self._end)
        return self

    def _begin(self, engine: Any) -> None:
        if self._running in (None, engine):  # else another one runs within it
            self._running = engine
            start = engine.state.iteration
            self._fit.begin(self._model, self._sinks, start_step=start)

    def _end(self, engine: Any) -> None:
        if engine is self._running:
            self._running = None
            self._fit.end()


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
