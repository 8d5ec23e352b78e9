"""What is raised and cleared: a level over measurements, a sign over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from gradwatch.kinds.kind import Kind

Change = Literal["suspected", "raised", ""]


class Hysteresis:
    """Levels of several keys, such as streams.

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
        self._over: dict[str, list[int]] = {}  # key: times over, since which step
        self._raised: dict[str, int] = {}  # key: calm consecutive measurements

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
        if key in self._raised:
            calm = self._raised[key] + 1 if value <= self.clear_at else 0
            self._raised[key] = calm
            if calm >= self.calm:
                del self._raised[key]
                self._over.pop(key, None)
            return ""
        if not value >= self.raise_at:
            self._over.pop(key, None)
            return ""
        times, since = self._over.get(key, (0, step))
        self._over[key] = [times + 1, since]
        if times + 1 < self.running and value < self.at_once:
            return "suspected"
        self._raised[key] = 0
        return "raised"

    def suspicions(self, key: str) -> int:
        """Return how many consecutive measurements have counted; 0 for a raised key."""
        return 0 if key in self._raised else self._over.get(key, [0])[0]

    def since(self, key: str) -> int:
        """Return the step at which a raised key's evidence began."""
        return self._over[key][1]

    def raised(self, key: str) -> bool:
        """Tell whether a key is raised."""
        return key in self._raised

    @property
    def active(self) -> bool:
        """Whether any key is raised."""
        return bool(self._raised)

    def forget(self, key: str) -> None:
        """Forget a key whose reference has changed."""
        self._over.pop(key, None)
        self._raised.pop(key, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"over": dict(self._over), "raised": dict(self._raised)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._over, self._raised = dict(state["over"]), dict(state["raised"])


class Running:
    """Counts the consecutive steps that show something, and when that began.

    Args:
        back: Consecutive steps without, after which it is over.

    Attributes:
        steps: How many so far.
        since: Step of the first of them.
        raised: Whether it has been said, and is not over.
        back: Steps without, after which it is over.
    """

    def __init__(self, back: int) -> None:
        self.steps = self.since = self._back = 0
        self.raised, self.back = False, back
        self._least = back

    def take(self, step: int, there: bool, hold: float) -> bool:
        """Take in one step; tell whether it has just been there for long enough."""
        if there:
            self.since = self.since if self.steps else step
            self.steps += 1
            self._back = 0
        else:
            self._back += 1
            if self._back >= self.back or not self.raised:
                self.steps, self.raised, self.back = 0, False, self._least
        if self.raised or self.steps < hold:
            return False
        self.raised = True
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {k: v for k, v in vars(self).items() if k != "_least"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        vars(self).update(state)
