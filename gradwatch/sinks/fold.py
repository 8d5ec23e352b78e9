"""Several records into one row, for a bounded file and for rare W&B rows."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from typing import Any

from gradwatch import metrics
from gradwatch.block import Block
from gradwatch.facts import NO_FACTS, Facts
from gradwatch.record import StepRecord


class Fold:
    """Folds records into one: the last value of each metric, and its extremes.

    Extremes are kept for the gradients depth alone, whose metrics come at every step.

    Args:
        keys: The metric keys to take in, or None for all.
    """

    def __init__(self, keys: Container[str] | None = None) -> None:
        self._keys = keys
        self.clear()

    def clear(self) -> None:
        """Start again."""
        self.count = 0
        self._record = StepRecord(step=0)
        self._last: dict[str, float] = {}
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._profiles: dict[str, Any] = {}
        self._facts = NO_FACTS
        self._events: list[str] = []

    def add(self, record: StepRecord) -> None:
        """Take one record in."""
        self.count += 1
        self._record = record
        keys, last, low, high = self._keys, self._last, self._low, self._high
        for key, value in record.metrics.items():
            if keys is not None and key not in keys:
                continue
            last[key] = value
            if _per_step(key):
                self._widen(low, high, key, value, value)
        self._add_rest(record.profiles, record.facts, record.events)

    def add_rows(self, block: Block, start: int, stop: int) -> None:
        """Take in some rows of a plain block: only the keys that are wanted."""
        self.count += stop - start
        self._record = StepRecord(
            step=block.steps[stop - 1], time=block.times[stop - 1]
        )
        for key in block.columns:
            if self._keys is not None and key not in self._keys:
                continue
            column = block.column(key) or ()
            values = [value for value in column[start:stop] if value is not None]
            if not values:
                continue
            self._last[key] = values[-1]
            if _per_step(key):
                self._widen(self._low, self._high, key, min(values), max(values))

    @staticmethod
    def _widen(
        low: dict[str, float],
        high: dict[str, float],
        key: str,
        least: float,
        most: float,
    ) -> None:
        """Take in the extremes of one key; what is not a number outranks the rest."""
        if key not in low or least < low[key] or least != least:
            low[key] = least
        if key not in high or most > high[key] or most != most:
            high[key] = most

    def _add_rest(
        self,
        profiles: Mapping[str, Any],
        facts: Facts,
        events: Iterable[str],
    ) -> None:
        self._profiles.update(profiles)
        if facts is not NO_FACTS:
            self._facts = self._facts.with_later(facts)
        self._events += [e for e in events if e not in self._events]

    def absorb(self, later: Fold) -> None:
        """Take in what another fold holds, which came after this one's."""
        if not later.count:
            return
        self.count += later.count
        self._record = later._record
        self._last.update(later._last)
        for key, least in later._low.items():
            self._widen(self._low, self._high, key, least, later._high[key])
        self._add_rest(later._profiles, later._facts, later._events)

    def row(self) -> StepRecord:
        """Return what was folded, with ``_min`` and ``_max`` beside the last values."""
        values = dict(self._last)
        for end, extremes in (("_min", self._low), ("_max", self._high)):
            values |= {key + end: v for key, v in extremes.items()}
        return StepRecord(
            step=self._record.step,
            time=self._record.time,
            metrics=values,
            profiles=self._profiles,
            facts=self._facts,
            events=tuple(self._events),
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
