"""What is raised and cleared: a level over measurements, a sign over steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gradwatch.kinds.kind import Kind

Change = Literal["suspected", "raised", ""]


@dataclass(slots=True)
class Levels:
    """What is remembered of several keys.

    Attributes:
        over: Key -> how many consecutive measurements have counted, and since when.
        raised: Raised key -> how many consecutive ones were calm.
    """

    over: dict[str, list[int]] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)


class Hysteresis:
    """Levels of several keys, such as streams.

    Attributes:
        state: What is remembered; saved with the rule's.

    Args:
        raise_at: Value from which on a measurement counts.
        clear_at: Value up to which it counts as calm.
        at_once: Value from which on one measurement is enough.
        running: How many consecutive measurements are needed else.
        calm: Consecutive measurements at the clear value or below after which it is
            over.
    """

    def __init__(
        self,
        raise_at: float,
        clear_at: float,
        at_once: float = math.inf,
        *,
        running: int,
        calm: int,
    ) -> None:
        self.raise_at, self.clear_at, self.at_once = raise_at, clear_at, at_once
        self.running, self.calm = running, calm
        self.state = Levels()

    @classmethod
    def of(cls, row: Kind, evidence: str, at_once: float = math.inf) -> Hysteresis:
        """Return the levels of a row's evidence, with its ``confirm`` and ``calm``."""
        return cls(
            row.at(evidence),
            row.clear(evidence),
            at_once,
            running=row.count("confirm"),
            calm=row.count("calm"),
        )

    def update(self, key: str, step: int, value: float) -> Change:
        """Take in one measurement.

        Returns:
            ``raised`` where the level has just been confirmed, ``suspected`` where a
            measurement counts and more are needed, else nothing.
        """
        if key in self.state.raised:
            calm = self.state.raised[key] + 1 if value <= self.clear_at else 0
            self.state.raised[key] = calm
            if calm >= self.calm:
                del self.state.raised[key]
                self.state.over.pop(key, None)
            return ""
        if not value >= self.raise_at:
            self.state.over.pop(key, None)
            return ""
        times, since = self.state.over.get(key, (0, step))
        self.state.over[key] = [times + 1, since]
        if times + 1 < self.running and value < self.at_once:
            return "suspected"
        self.state.raised[key] = 0
        return "raised"

    def suspicions(self, key: str) -> int:
        """Return how many consecutive measurements have counted; 0 for a raised key."""
        return 0 if key in self.state.raised else self.state.over.get(key, [0])[0]

    def since(self, key: str) -> int:
        """Return the step at which a raised key's evidence began."""
        return self.state.over[key][1]

    def raised(self, key: str) -> bool:
        """Tell whether a key is raised."""
        return key in self.state.raised

    @property
    def active(self) -> bool:
        """Whether any key is raised."""
        return bool(self.state.raised)

    def forget(self, key: str) -> None:
        """Forget a key whose reference has changed."""
        self.state.over.pop(key, None)
        self.state.raised.pop(key, None)


@dataclass(slots=True)
class Running:
    """Counts the consecutive steps that show something, and when that began.

    Attributes:
        steps: How many so far.
        since: Step of the first of them.
        away: Consecutive steps without.
        raised: Whether it has been reported, and is not over.
        back: Consecutive steps without, after which it is over, if more than the least.
    """

    steps: int = 0
    since: int = 0
    away: int = 0
    raised: bool = False
    back: int = 0

    def take(self, step: int, there: bool, hold: float, least: int) -> bool:
        """Take in one step; tell whether it has just been there for long enough.

        Args:
            step: Its number.
            there: Whether it shows it.
            hold: Steps that are long enough.
            least: Consecutive steps without, after which it is over, at least.
        """
        if there:
            self.since = self.since if self.steps else step
            self.steps += 1
            self.away = 0
        else:
            self.away += 1
            back = self.back if self.back > least else least
            if self.away >= back or not self.raised:
                self.steps, self.raised, self.back = 0, False, 0
        if self.raised or self.steps < hold:
            return False
        self.raised = True
        return True

    @property
    def at_rest(self) -> bool:
        """Whether no step has shown it lately."""
        return not self.raised and not self.steps

    def rest(self, steps: int) -> None:
        """Take in steps without, at rest; see :attr:`at_rest`."""
        self.away += steps
        self.back = 0
