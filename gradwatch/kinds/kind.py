"""What a row of the catalogue of kinds holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gradwatch import remedies
from gradwatch.record import Remedy, Severity, Stream


class Cause(NamedTuple):
    """Why there is an alert.

    Attributes:
        known: How the cause is told from the others, for the alert's page.
        why: The message's line on it.
        do: The message's line on what to do, where no remedy is named: a line to
            paste, or an instruction. ``{weight}``, ``{module}``, ``{biases}`` and
            ``{since}`` are filled in.
        remedy: Name of the remedy of :mod:`gradwatch.remedies` that helps; empty where
            it is not for a program to mend.
    """

    known: str
    why: str
    do: str = ""
    remedy: str = ""


class Evidence(NamedTuple):
    """One number that an alert is decided on.

    Attributes:
        what: Which number, for the alert's page: a metric, or in words.
        at: Value from which on it counts.
        clear: Value at which it is over; None where that is the other side of ``at``.
        reason: Why the threshold is where it is: what was measured.
    """

    what: str
    at: float
    clear: float | None
    reason: str


class Number(NamedTuple):
    """One number more that a rule uses: a count, a span, or a share.

    Attributes:
        value: The number; several where it is a sequence of them.
        what: What it is, for the alert's page.
        reason: Why it is what it is: what was measured, or what it is for.
    """

    value: float | Sequence[float]
    what: str
    reason: str = "chosen: no measurement is on record"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of alert.

    Attributes:
        name: As in ``alert.kind``.
        title: Constant, at most 64 characters: W&B drops repeats by title.
        severity: ``error``, ``warning`` or ``info``; of its alarm, if it has one.
        meaning: What is wrong, in a sentence.
        evidence: The numbers it is decided on.
        warm_up: What has to have been seen before anything is judged.
        confirmed: How often, or how long, before it is reported.
        over: When the incident ends.
        excused: What looks the same and is no fault; empty for nothing.
        causes: Name -> cause; the key None is what is reported while undecided.
        numbers: The other numbers of its rule.
        rank: Where several of the ranked kinds are open, an alert is evidence of the
            incident of the lowest rank, or of an open error; None for no rank.
        explained_by: Kinds whose open alarms explain it: it is evidence of theirs.
        undecided_by: The same, where it could name no cause of its own.
    """

    name: str
    title: str
    severity: Severity
    meaning: str
    evidence: Mapping[str, Evidence]
    warm_up: str
    confirmed: str
    over: str
    excused: str = ""
    causes: Mapping[str | None, Cause]
    numbers: Mapping[str, Number] = field(default_factory=dict)
    rank: int | None = None
    explained_by: Sequence[str] = ()
    undecided_by: Sequence[str] = ()

    def at(self, name: str) -> float:
        """Return the value from which on a number counts."""
        return self.evidence[name].at

    def clear(self, name: str) -> float:
        """Return the value at which a number is calm again."""
        found = self.evidence[name].clear
        assert found is not None
        return found

    def number(self, name: str) -> float:
        """Return one of the other numbers of the rule."""
        value = self.numbers[name].value
        assert isinstance(value, int | float)
        return value

    def count(self, name: str) -> int:
        """Return one of them that counts something."""
        return int(self.number(name))

    def counts(self, name: str) -> tuple[int, ...]:
        """Return one of them that is a sequence."""
        values = self.numbers[name].value
        assert isinstance(values, Sequence)
        return tuple(int(value) for value in values)

    def remedy(
        self, cause: str | None, stream: Stream, length: int = 0
    ) -> Remedy | None:
        """Return what helps against a cause in a stream; None where no program can.

        Args:
            cause: One of the causes.
            stream: The stream that shows it.
            length: Steps of the sequence; 0 if unknown.
        """
        name = self.causes[cause].remedy
        return remedies.fitted(name, stream, length) if name else None
