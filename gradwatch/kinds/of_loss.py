"""What the rules share that judge what a loss is made of."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.block import Block
from gradwatch.facts import RunFacts
from gradwatch.kinds import text
from gradwatch.kinds.kind import Kind
from gradwatch.kinds.remembering import Remembering
from gradwatch.record import Alert, StepRecord, Stream

_OF_LOSS: Final = (
    "readout",
    "loss_kind",
    "loss_reads",
    "loss_classes",
    "loss_broadcast",
    "loss_negative",
)
"""The facts that are judged here."""


@dataclass(slots=True)
class LossState:
    """What such a rule remembers.

    Attributes:
        run: What is known of the loss.
        cause: What is wrong with it; None for nothing.
        since: Since when.
        raised: Whether that was said.
    """

    run: RunFacts = field(default_factory=RunFacts)
    cause: str | None = None
    since: int = 0
    raised: bool = False


class OfLoss(Remembering[LossState], ABC):
    """A fault that the graph of the loss shows, at every look for some steps."""

    kind: str
    _row: Kind

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__(LossState())

    @property
    def active(self) -> bool:
        """Whether it still holds."""
        return self._state.raised

    @property
    def suspected(self) -> tuple[str, str] | None:
        """The cause and what shows it, after however few looks; None for none."""
        state = self._state
        return None if state.cause is None else (state.cause, self._shown(state.run))

    @abstractmethod
    def _fault(self, run: RunFacts) -> str | None:
        """Return the cause of the fault; None where there is none."""

    @abstractmethod
    def _shown(self, run: RunFacts) -> str:
        """Return what was seen."""

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: no look is among them."""
        return self._state.cause is None or self._state.raised

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        state = self._state
        told = {name: getattr(record.facts.run, name) for name in _OF_LOSS}
        known = {name: value for name, value in told.items() if value is not None}
        if known:
            negative = state.run.loss_negative or 0.0
            if known.get("loss_negative", negative) < negative:
                del known["loss_negative"]  # targets of one sign are no proof
            state.run = dataclasses.replace(state.run, **known)
        cause = self._fault(state.run)
        if cause != state.cause:
            state.cause, state.since, state.raised = cause, record.step, False
        if cause is None or state.raised:
            return []
        if record.step - state.since < self._row.at("steps"):
            return []
        state.raised = True
        return [
            text.alert(
                self._row,
                record,
                since=state.since,
                what=text.first_line(self._row),
                shown=self._shown(state.run),
                cause=cause,
                evidence={},
            )
        ]
