"""Scalars into any logger that takes several values and a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from gradwatch.block import Block
from gradwatch.record import Alert, StepRecord
from gradwatch.sinks.fold import Fold


@final
class Scalars:
    """Hands values to a function, such as ``mlflow.log_metrics``.

    Args:
        log: Called as ``log(values, step=step)``: a dict of numbers by metric key, and
            the last step that they are of. The dict is the function's own.
        every: Steps that are folded into one call: the last value, for gradient norms
            the largest.

    Raises:
        TypeError: If ``log`` cannot be called.
        ValueError: If ``every`` is below 1.
    """

    def __init__(self, log: Callable[..., Any], *, every: int = 10) -> None:
        if not callable(log):
            raise TypeError(
                f"Scalars() got a {type(log).__name__}; expected a function that is "
                "called as log(values, step=step), such as mlflow.log_metrics."
            )
        if every < 1:
            raise ValueError(f"every is {every!r}; expected at least 1 step.")
        self._log, self._size, self._fold = log, every, Fold()

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Take one record in; a logger of numbers has no use for alerts."""
        self._fold.add(record)
        if self._fold.count >= self._size:
            self.flush()

    def write_block(self, block: Block) -> None:
        """Take plain rows in."""
        first = 0
        for after in range(1, len(block) + 1):
            if self._fold.count + after - first >= self._size:
                self._fold.add_rows(block, first, after)
                self.flush()
                first = after
        if first < len(block):
            self._fold.add_rows(block, first, len(block))

    def flush(self) -> None:
        """Hand on what is folded."""
        if self._fold.count:
            values, step = dict(self._fold.envelope()), self._fold.step
            self._fold.clear()
            self._log(values, step=step)

    def close(self) -> None:
        """Hand on what is folded; the logger stays open. Safe to call twice."""
        self.flush()
