"""Where records go. A sink neither computes nor decides.

``write`` gets every record and the alerts that are given out with it; ``close`` may be
called twice. What a sink may also have is in :class:`Seldom`, :class:`ByBlock` and
:class:`Holding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from gradwatch.block import Block
from gradwatch.record import Alert, StepRecord
from gradwatch.sinks.scalars import Scalars
from gradwatch.sinks.tensorboard import TensorBoard
from gradwatch.sinks.wandb import Wandb

__all__ = ["Scalars", "Sink", "TensorBoard", "Wandb"]


@runtime_checkable
class Sink(Protocol):
    """A destination for records and alerts."""

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Store one record and the alerts given out with it."""

    def close(self) -> None:
        """Flush and release. Safe to call twice."""


@runtime_checkable
class Seldom(Protocol):
    """A sink that asks for every so many steps only; alarms always come.

    Attributes:
        every: The steps between two records.
    """

    every: int | None


@runtime_checkable
class ByBlock(Protocol):
    """A sink that takes a block of steps at which there was no alert."""

    def write_block(self, block: Block) -> None:
        """Store what :meth:`Sink.write` would, given its records one by one."""


@runtime_checkable
class Holding(Protocol):
    """A sink that holds records back for a while."""

    def flush(self) -> None:
        """Hand on what is held."""
