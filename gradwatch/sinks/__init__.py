"""Where records go. A sink neither computes nor decides.

``write`` gets every record and the alerts that are given out with it; ``close`` may be
called twice. An optional attribute ``every`` asks for every so many steps only (alerts
always come).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from gradwatch.record import Alert, StepRecord
from gradwatch.sinks.tensorboard import TensorBoard
from gradwatch.sinks.wandb import Wandb

__all__ = ["Sink", "TensorBoard", "Wandb"]


@runtime_checkable
class Sink(Protocol):
    """A destination for records and alerts."""

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Store one record and the alerts given out with it."""

    def close(self) -> None:
        """Flush and release. Safe to call twice."""
