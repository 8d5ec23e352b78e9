"""What of gradwatch works, what failed, and what it costs.

A failure inside gradwatch never reaches the user's training: a :class:`Guard` absorbs
it and has the first of a part reported. The part is tried again; after three failures
it is off, alone.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final

from gradwatch.record import TrainingAlert

_STRIKES: Final = 3
"""Failures after which a part is off."""
_FORGIVEN: Final = 1000
"""Steps without another failure after which the earlier ones count no more."""


class Health:
    """The state of one watch.

    Its lock is held while a guard is entered, so that a watch may be read, flushed and
    closed in another thread than the one that trains.

    Args:
        report: Told about the first failure of each part, and where it is off.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.failed: dict[str, str] = {}
        """The first error of each part that has failed."""
        self.off: set[str] = set()
        """The parts that are off."""
        self._lasting: set[str] = set()
        self.lock = threading.RLock()
        self._strikes: dict[str, tuple[int, int]] = {}  # how many, at which step
        self._steps = 0
        self.overhead = 0.0
        """Share of the time so far, from the first step's end on, that was ours."""
        self._ours = self._all = 0.0
        self.spent = 0.0
        """Seconds that were ours since the last step."""
        self._depth = 0
        self._began = self._stepped = time.perf_counter()
        self._report = report
        self._strict = os.environ.get("GRADWATCH_STRICT") == "1"
        _all.add(self)

    def guard(
        self,
        part: str,
        recover: Callable[[bool], None] = lambda off: None,
        *,
        lasting: bool = False,
    ) -> Guard:
        """Return the guard of a part.

        Args:
            part: Its name, as a user is told it.
            recover: Called after each failure; whether the part is off from now on.
            lasting: Whether it is never off, however often it fails.
        """
        if lasting:
            self._lasting.add(part)
        return Guard(self, part, recover)

    def fail(self, part: str, error: Exception) -> bool:
        """Note a failure; tell whether the part is off from now on.

        The first is reported with its traceback, and once more that a part is off.
        """
        lasting = part in self._lasting
        if part in self.off:
            return True
        times, last = self._strikes.get(part, (0, 0))
        times = 1 if self._steps - last > _FORGIVEN else times + 1
        self._strikes[part] = times, self._steps
        what = _described(error)
        if part not in self.failed:
            self.failed[part] = what
            trace = "".join(traceback.format_exception(error)).rstrip()
            then = "" if lasting else f", and is off after {_STRIKES} failures"
            self._report(
                f"{part} failed; training is not affected. It is tried again{then}.\n"
                f"{trace}"
            )
        if times >= _STRIKES and not lasting:
            self.off.add(part)
            self._report(
                f"{part} has failed {_STRIKES} times ({what}) and is off from now on; "
                "training is not affected."
            )
        return part in self.off

    def absorb(self, part: str, error: Exception) -> bool:
        """Note a failure that a part's own loop has caught; see :meth:`fail`.

        Raises:
            Exception: The same, where failures are let through.
        """
        if self._strict or isinstance(error, TrainingAlert):
            raise error
        return self.fail(part, error)

    def switch_off(self, part: str) -> None:
        """Switch a part off that has failed, and could not recover either."""
        self.off.add(part)

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
            "off": sorted(self.off),
            "dropped": dict(dropped),
            "queue": queued,
            "overhead": self.overhead,
        }

    def enter(self) -> None:
        """Begin work of ours, and count its time; guards may nest."""
        self.lock.acquire()
        if self._depth == 0:
            self._began = time.perf_counter()
        self._depth += 1

    def leave(self) -> None:
        """End it."""
        self._depth -= 1
        if self._depth == 0:
            self.spent += time.perf_counter() - self._began
        self.lock.release()

    def step(self) -> tuple[float, float]:
        """Note that a training step has closed.

        Returns:
            The seconds since the one before that were ours, and the others.
        """
        self._steps += 1
        now, spent = time.perf_counter(), self.spent
        elapsed, self._stepped, self.spent = now - self._stepped, now, 0.0
        if self._steps > 1:  # the first one has our start in it
            self._ours += spent
            self._all += elapsed
            self.overhead = self._ours / self._all if self._all else 0.0
        return spent, elapsed - spent

    def free(self) -> None:
        """Take a new lock where another thread holds this one, and is no more."""
        if self.lock.acquire(blocking=False):
            self.lock.release()
        else:
            self.lock, self._depth = threading.RLock(), 0

    @property
    def strict(self) -> bool:
        """Whether failures are let through: ``GRADWATCH_STRICT=1``."""
        return self._strict


def _described(error: Exception) -> str:
    """Return an error in a line, whatever its own text does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as other:
        return f"{type(error).__name__} (its text fails: {type(other).__name__})"


class Guard:
    """A context in which one part works; entered at every hook, so it is a class.

    Attributes:
        tripped: Whether the part failed when it last worked.
    """

    __slots__ = ("_health", "_part", "_recover", "tripped")

    def __init__(
        self, health: Health, part: str, recover: Callable[[bool], None]
    ) -> None:
        self._health, self._part, self._recover = health, part, recover
        self.tripped = False

    @property
    def off(self) -> bool:
        """Whether the part has failed too often and is off."""
        return self._part in self._health.off

    def __enter__(self) -> None:
        self._health.enter()
        self.tripped = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        health = self._health
        if error is None or isinstance(error, TrainingAlert) or health.strict:
            health.leave()
            return False
        try:
            self.tripped = True
            absorbed = isinstance(error, Exception)  # Ctrl-C is the user's
            off = isinstance(error, Exception) and health.fail(self._part, error)
            self._recover(off)
        except Exception:  # reported already, and not to be tried a third time
            health.switch_off(self._part)
        finally:
            health.leave()
        return absorbed


_all: weakref.WeakSet[Health] = weakref.WeakSet()


def _new_locks() -> None:
    """Free the locks in a forked process that another thread held: it is not there."""
    for health in _all:
        health.free()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_locks)
