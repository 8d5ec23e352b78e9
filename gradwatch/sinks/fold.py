"""Several records into one row, for a bounded file and for rare W&B rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from gradwatch import metrics
from gradwatch.record import StepRecord


class Fold:
    """Folds records into one: the last value of each metric, and its extremes.

    Extremes are kept for the gradients depth alone, whose metrics come at every step.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.count = 0
        self._record = StepRecord(step=0)
        self._last: dict[str, float] = {}
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._rest: dict[str, dict[str, Any]] = {"profiles": {}, "facts": {}}
        self._events: list[str] = []

    def add(self, record: StepRecord) -> None:
        """Take one record in."""
        self.count += 1
        self._record = record
        self._last.update(record.metrics)
        for key, value in record.metrics.items():
            if _per_step(key):
                self._low[key] = _extreme(min, self._low.get(key, value), value)
                self._high[key] = _extreme(max, self._high.get(key, value), value)
        self._rest["profiles"].update(record.profiles)
        self._rest["facts"].update(record.facts)
        self._events += [e for e in record.events if e not in self._events]

    def absorb(self, later: Fold) -> None:
        """Take in what another fold holds, which came after this one's."""
        if not later.count:
            return
        self.count += later.count
        self._record = later._record
        self._last.update(later._last)
        for key, value in later._low.items():
            self._low[key] = _extreme(min, self._low.get(key, value), value)
        for key, value in later._high.items():
            self._high[key] = _extreme(max, self._high.get(key, value), value)
        for part, values in later._rest.items():
            self._rest[part].update(values)
        self._events += [e for e in later._events if e not in self._events]

    def row(self) -> StepRecord:
        """Return what was folded, with ``_min`` and ``_max`` beside the last values."""
        values = dict(self._last)
        for end, extremes in (("_min", self._low), ("_max", self._high)):
            values |= {key + end: v for key, v in extremes.items()}
        return StepRecord(
            step=self._record.step,
            time=self._record.time,
            metrics=values,
            events=tuple(self._events),
            **self._rest,
        )

    def envelope(self) -> Mapping[str, float]:
        """Return one value a metric: the last, or the extreme that matters.

        For the gradients depth that is the largest, for ``clip_ratio`` the smallest:
        a peak between two rows is not lost.
        """
        low = {k: v for k, v in self._low.items() if k.endswith("/clip_ratio")}
        return {**self._last, **self._high, **low}

    @property
    def step(self) -> int:
        """The step of the last record."""
        return self._record.step


_COUNTERS = ("/skipped", "/overhead", "/loss")


@functools.lru_cache(maxsize=4096)  # asked for every key at every step
def _per_step(key: str) -> bool:
    row = metrics.of(key)
    return row is not None and row.depth == "gradients" and not key.endswith(_COUNTERS)


def _extreme(choose: Any, old: float, new: float) -> float:
    """Return the smaller or larger of two; what is not a number outranks both."""
    return old if math.isnan(old) else new if math.isnan(new) else choose(old, new)
