"""Rules: what counts as trouble, why, and when it is over.

A rule sees StepRecords and the static facts of the streams alone, so that it can be
replayed from a run's files with no model. It never changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.rules.divergence import LossDivergence
from gradwatch.rules.drift import Drift
from gradwatch.rules.exploding import Exploding
from gradwatch.rules.growth import Growth
from gradwatch.rules.incidents import Incidents
from gradwatch.rules.judge import Judge, Rule
from gradwatch.rules.learning import NoGradient, NotUpdating, Underflow
from gradwatch.rules.loop import (
    ClearedEarly,
    NotCleared,
    OverClipping,
    RepeatedBatch,
)
from gradwatch.rules.nonfinite import Nonfinite
from gradwatch.rules.rates import LrTooHigh
from gradwatch.rules.spike import Spike
from gradwatch.rules.units import DeadUnits, GateStuck
from gradwatch.rules.vanishing import Truncated, Vanishing

__all__ = [
    "ClearedEarly",
    "DeadUnits",
    "Drift",
    "Exploding",
    "GateStuck",
    "Growth",
    "Incidents",
    "Judge",
    "LossDivergence",
    "LrTooHigh",
    "NoGradient",
    "Nonfinite",
    "NotCleared",
    "NotUpdating",
    "OverClipping",
    "RepeatedBatch",
    "Rule",
    "Spike",
    "Truncated",
    "Underflow",
    "Vanishing",
    "default_rules",
    "replay",
]

_RULES: Final[Sequence[Callable[[Sequence[Stream]], Rule]]] = (
    Exploding,
    Growth,
    Nonfinite,
    LrTooHigh,
    LossDivergence,
    Spike,
    DeadUnits,
    GateStuck,
    ClearedEarly,
    NotCleared,
    OverClipping,
    NoGradient,
    NotUpdating,
    Underflow,
    Drift,
    Vanishing,
    Truncated,
    RepeatedBatch,
)
"""What explains comes before what it explains."""


def default_rules(streams: Sequence[Stream]) -> list[Rule]:
    """Return the catalogue's rules for the streams of one model."""
    return [rule(streams) for rule in _RULES]


def replay(
    records: Iterable[StepRecord],
    streams: Sequence[Stream],
    *,
    rules: Sequence[Rule] | None = None,
    mute: Iterable[str | tuple[str, str]] = (),
) -> list[Alert]:
    """Judge the records of a run again, with no model.

    Args:
        records: One a step, in their order, such as ``gradwatch.load(dir).records``.
        streams: The streams that they are of: ``gradwatch.load(dir).streams``.
        rules: In place of the catalogue's.
        mute: Kinds, or ``(kind, stream)`` pairs, that are not wanted.

    Returns:
        The alerts that the watch gave in that run, where its file still holds a row for
        each step and the run was not resumed.
    """
    judge = Judge(default_rules(streams) if rules is None else rules, mute)
    return [alert for record in records for alert in judge.take(record)[0]]
