"""Kinds that are decided on whole steps, and on how many run: their base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from gradwatch.facts import RUN_SCOPE, RunFacts, joined
from gradwatch.kinds.kind import Kind
from gradwatch.kinds.latch import Running
from gradwatch.kinds.remembering import Remembering
from gradwatch.metrics import run_key, stream_key
from gradwatch.record import StepRecord, Stream

NORM, CLIPPED = map(run_key, ("grad_norm", "grad_norm_clipped"))

CLIP = run_key("clip_ratio")


@dataclass(slots=True)
class StepsState:
    """What a rule of whole steps remembers.

    Attributes:
        run: Facts of the loop.
        running: How long it has shown.
    """

    run: RunFacts = RUN_SCOPE
    running: Running = field(default_factory=Running)


S = TypeVar("S", bound=StepsState)


class OfSteps(Remembering[S]):
    """A kind that is decided on whole steps, and on how many run."""

    _row: Kind

    def __init__(self, state: S, streams: Sequence[Stream] = ()) -> None:
        super().__init__(state)
        self._back = self._row.count("back")
        self._streams = tuple(streams)
        self._ratios = [stream_key(s, "update_ratio") for s in streams]

    @property
    def active(self) -> bool:
        """Whether it is still so."""
        return self._state.running.raised

    def _note(self, record: StepRecord) -> None:
        if record.facts.run is not RUN_SCOPE:
            self._state.run = joined(self._state.run, record.facts.run)

    def _moved(self, record: StepRecord) -> float | None:
        """Return the largest update ratio of the step; None where none was measured."""
        found = [record.metrics[key] for key in self._ratios if key in record.metrics]
        return max(found, default=None)
