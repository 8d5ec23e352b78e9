"""What of gradwatch works, what failed, and what it costs.

A failure inside gradwatch never reaches the user's training: a :class:`Guard` absorbs
it, has it reported once, and the part that failed is off from then on.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from gradwatch.record import TrainingAlert


class Health:
    """The state of one watch.

    Args:
        report: Told once about each part that failed.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.failed: dict[str, str] = {}
        self.overhead = 0.0
        """Share of the last step's time that was ours."""
        self._spent = 0.0
        self._depth = 0
        self._began = self._stepped = time.perf_counter()
        self._report = report
        self._strict = os.environ.get("GRADWATCH_STRICT") == "1"

    def guard(self, part: str, off: Callable[[], None] = lambda: None) -> Guard:
        """Return the guard of a part; ``off`` is called once if the part fails."""
        return Guard(self, part, off)

    def fail(self, part: str, error: Exception) -> bool:
        """Report a failure with its traceback, once a part; tell whether it is new."""
        if part in self.failed:
            return False
        self.failed[part] = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error)).rstrip()
        self._report(
            f"{part} failed and is off from now on; training is not affected.\n{trace}"
        )
        return True

    def as_dict(
        self, state: str, *, queued: int, dropped: Mapping[str, int]
    ) -> dict[str, Any]:
        """Return the state in plain values.

        Args:
            state: ``on`` or ``off``.
            queued: How many records wait to be sent.
            dropped: How many were lost, by sink.
        """
        lost = self.failed or any(dropped.values())
        return {
            "state": "degraded" if lost and state == "on" else state,
            "failed": dict(self.failed),
            "dropped": dict(dropped),
            "queue": queued,
            "overhead": self.overhead,
        }

    def enter(self) -> None:
        """Start counting our own time; guards may nest."""
        if self._depth == 0:
            self._began = time.perf_counter()
        self._depth += 1

    def leave(self) -> None:
        """Stop counting our own time."""
        self._depth -= 1
        if self._depth == 0:
            self._spent += time.perf_counter() - self._began

    def step(self) -> float:
        """Note that a training step has closed.

        Returns:
            The seconds since the one before that were not ours.
        """
        now, spent = time.perf_counter(), self._spent
        elapsed, self._stepped, self._spent = now - self._stepped, now, 0.0
        self.overhead = min(max(spent / elapsed, 0.0), 1.0) if elapsed else 0.0
        return elapsed - spent

    @property
    def strict(self) -> bool:
        """Whether failures are let through: ``GRADWATCH_STRICT=1``."""
        return self._strict


class Guard:
    """A context in which one part works; entered at every hook, so it is a class."""

    __slots__ = ("_health", "_off", "_part")

    def __init__(self, health: Health, part: str, off: Callable[[], None]) -> None:
        self._health = health
        self._part = part
        self._off = off

    @property
    def failed(self) -> bool:
        """Whether the part has failed and is off."""
        return self._part in self._health.failed

    def __enter__(self) -> None:
        self._health.enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._health.leave()
        if not isinstance(error, Exception) or isinstance(error, TrainingAlert):
            return False
        if self._health.strict:
            return False
        if self._health.fail(self._part, error):
            self._off()
        return True
