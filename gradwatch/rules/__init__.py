"""Rules: what counts as trouble, why, and when it is over.

A rule sees StepRecords and the static facts of the streams alone, so that it can be
replayed from a run's files with no model. It never changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.rules.drift import Drift
from gradwatch.rules.exploding import Exploding
from gradwatch.rules.growth import Growth
from gradwatch.rules.incidents import Incidents
from gradwatch.rules.learning import NoGradient, NotUpdating
from gradwatch.rules.nonfinite import Nonfinite
from gradwatch.rules.spike import Spike
from gradwatch.rules.units import DeadUnits, GateStuck
from gradwatch.rules.vanishing import Truncated, Vanishing

__all__ = [
    "DeadUnits",
    "Drift",
    "Exploding",
    "GateStuck",
    "Growth",
    "Incidents",
    "NoGradient",
    "Nonfinite",
    "NotUpdating",
    "Rule",
    "Spike",
    "Truncated",
    "Vanishing",
    "default_rules",
]


@runtime_checkable
class Rule(Protocol):
    """Judges one record after the other.

    A rule may also have: ``wants``, the name of a depth that it asks for at the next
    step, or several; ``wishes``, the same where the budget allows it; ``kind`` and
    ``active``, by which an incident of that kind stays open; and
    ``state_dict`` / ``load_state_dict`` of plain values.
    """

    def update(self, record: StepRecord) -> list[Alert]:
        """Return the alerts that a record raises; mostly none."""


def default_rules(streams: Sequence[Stream]) -> list[Rule]:
    """Return the catalogue's rules for the streams of one model."""
    return [
        Exploding(streams),
        Growth(streams),
        Nonfinite(streams),
        Spike(streams),
        DeadUnits(streams),
        GateStuck(streams),
        NoGradient(streams),
        NotUpdating(streams),
        Drift(streams),
        Vanishing(streams),
        Truncated(streams),
    ]
