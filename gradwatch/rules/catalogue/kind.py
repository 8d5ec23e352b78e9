"""What a row of the catalogue of kinds holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gradwatch.record import Severity


class Cause(NamedTuple):
    """Why there is an alert.

    Attributes:
        known: How the cause is told from the others, for the alert's page.
        why: The message's line on it.
        do: The message's line on what to do, where no remedy of
            :mod:`gradwatch.remedies` is named: a line to paste, or an instruction.
            ``{weight}``, ``{module}``, ``{biases}`` and ``{since}`` are filled in.
    """

    known: str
    why: str
    do: str = ""


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
        confirmed: How often, or how long, before it is said.
        over: When the incident ends.
        excused: What looks the same and is no fault; empty for nothing.
        causes: Name -> cause; the key None is what is said while undecided.
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

    def at(self, name: str) -> float:
        """Return the value from which on a number counts."""
        return self.evidence[name].at

    def clear(self, name: str) -> float:
        """Return the value at which a number is calm again."""
        found = self.evidence[name].clear
        assert found is not None
        return found
