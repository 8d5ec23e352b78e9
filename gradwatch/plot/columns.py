"""A run by metric in place of by step, and what lines are made of it.

A line of a long run shows bins: of each the smallest and the largest value, so that a
spike of one step survives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from gradwatch.facts import NO_FACTS, Facts
from gradwatch.metrics import PREFIX, run_key
from gradwatch.metrics import of as metric_of
from gradwatch.record import StepRecord, printable

POINTS: Final = 240
"""Most values of a line: two a bin."""
_LOOK: Final = "/act_deriv"
"""What is measured at every look."""

Row = dict[str, Any]


class Series(NamedTuple):
    """One metric over a run.

    Attributes:
        steps: The steps at which it was measured.
        values: Its values, NaN and Inf among them.
    """

    steps: np.ndarray
    values: np.ndarray

    def finite(self) -> Series:
        """Return it without what is not finite."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])

    def ends(self) -> tuple[float, float] | None:
        """Return the medians of the first and of the last tenth of what is finite."""
        values = self.finite().values
        if not len(values):
            return None
        tenth = max(len(values) // 10, 1)
        return float(np.median(values[:tenth])), float(np.median(values[-tenth:]))

    def last(self) -> float | None:
        """Return the last finite value, or None."""
        known = self.finite().values
        return float(known[-1]) if len(known) else None


NOTHING: Final = Series(np.zeros(0, np.int64), np.zeros(0))


class Columns(NamedTuple):
    """A run by metric in place of by step.

    Attributes:
        series: By key.
        flows: The step and the profiles of each record that has some.
        facts: All facts as they are at the end.
        rates: The learning rate of each group of parameters, where it changes.
        looked: Step of the last look at rates, states and weights; below 0 for none.
        first: First step.
        last: Last step; below the first one where there is none.
    """

    series: Mapping[str, Series]
    flows: Sequence[tuple[int, Mapping[str, Sequence[float]]]]
    facts: Facts
    rates: Mapping[str, Series]
    looked: int
    first: int
    last: int

    def of(self, key: str) -> Series:
        """Return one metric; an empty one where it was not measured."""
        return self.series.get(key, NOTHING)

    def run(self, metric: str) -> Series:
        """Return a metric of the whole run."""
        return self.of(run_key(metric))

    def stream(self, name: str, metric: str) -> Series:
        """Return a metric of a stream."""
        return self.of(f"{base(name)}/{metric}")


def base(stream: str) -> str:
    """Return what the keys of a stream begin with."""
    return f"{PREFIX}/{printable(stream).replace('.', '/')}"


def columns(records: Iterable[StepRecord]) -> Columns:
    """Return the records of a run by metric, in one pass."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    rates: dict[str, tuple[list[int], list[float]]] = {}
    flows: list[tuple[int, Mapping[str, Sequence[float]]]] = []
    facts, first, last = NO_FACTS, 0, -1
    for record in records:
        first, last = (record.step if last < 0 else first), record.step
        for key, value in record.metrics.items():
            whole = key.removesuffix("_max").removesuffix("_min")
            if whole not in record.metrics:
                whole = key  # else it is of a folded row: its peak is of the metric
            _add(found, whole, record.step, value)
        if any(record.profiles.values()):
            flows.append((record.step, {k: v for k, v in record.profiles.items() if v}))
        if record.facts:
            facts = facts.with_later(record.facts)
            for name, group in (record.facts.run.optimizers or {}).items():
                rate = group.get("lr", 0.0)  # what is 0 is left out there
                if isinstance(rate, int | float):
                    _add(rates, name, record.step, float(rate))
    series = _series(found)
    looks = [own.steps[-1] for key, own in series.items() if _LOOK in key]
    looked = int(max(looks, default=-1))
    return Columns(series, flows, facts, _series(rates), looked, first, last)


def _add(
    found: dict[str, tuple[list[int], list[float]]], key: str, step: int, value: float
) -> None:
    steps, values = found.setdefault(key, ([], []))
    steps.append(step)
    values.append(value)


def _series(found: Mapping[str, tuple[list[int], list[float]]]) -> dict[str, Series]:
    return {
        key: Series(np.array(steps, np.int64), np.array(values, np.float64))
        for key, (steps, values) in found.items()
    }


def line(series: Series, name: str = "", points: int = POINTS) -> list[Row]:
    """Return the points of a line: of each bin the smallest and the largest value.

    Args:
        series: The metric; what is not finite is left out.
        name: What the line is called.
        points: Most of them.
    """
    steps, values = series.finite()
    chosen = np.arange(len(steps))
    if len(steps) > points:
        parts = np.array_split(chosen, points // 2)
        ends = [chosen[:1], chosen[-1:]]
        picked = [p[[values[p].argmin(), values[p].argmax()]] for p in parts]
        chosen = np.unique(np.concatenate([*picked, *ends]))
    return [
        {"step": int(steps[i]), "value": float(values[i]), "line": name} for i in chosen
    ]


def broken(series: Series, points: int = 20) -> list[Row]:
    """Return where a metric is not finite: the first such step, and some others."""
    odd = series.steps[~np.isfinite(series.values)]
    return [{"step": int(odd[i])} for i in thinned(len(odd), points)]


def wide(series: Sequence[Series]) -> bool:
    """Tell whether values are better seen on a logarithmic axis: positive, and wide."""
    values = np.concatenate([s.finite().values for s in series] or [np.zeros(0)])
    return bool(len(values) and values.min() > 0 and values.max() > 30 * values.min())


def number(value: float | None) -> str:
    """Return a number as a title has it."""
    return "not measured" if value is None else f"{value:.3g}"


def span(series: Series) -> str:
    """Return where a metric began and where it ended, in words."""
    ends = series.ends()
    if ends is None:
        return "not measured"
    first, last = map(number, ends)
    return first if first == last else f"{first} to {last}"


def binned(profile: Sequence[float], points: int) -> list[float]:
    """Return at most so many values: the largest of each bin."""
    if len(profile) <= points:
        return list(profile)
    edges = np.linspace(0, len(profile), points, endpoint=False).astype(int)
    return [float(v) for v in np.maximum.reduceat(np.asarray(profile, float), edges)]


def thinned(length: int, most: int) -> list[int]:
    """Return indices that are spread evenly, the first and the last among them."""
    if length <= most:
        return list(range(length))
    return sorted({round(i * (length - 1) / (most - 1)) for i in range(most)})


def as_columns(records: Iterable[StepRecord] | Columns) -> Columns:
    """Return records by metric, unless they are so already."""
    return records if isinstance(records, Columns) else columns(records)


def label(key: str) -> str:
    """Return the metric of a key, and its gate, as a person says it."""
    row, last = metric_of(key), key.rpartition("/")[2]
    if row is None or last == row.name:
        return last
    return f"{row.name} of gate {last}"


def counted(count: int, noun: str) -> str:
    """Return a count of things, in words."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def not_finite(series: Series) -> str:
    """Return at which steps a metric is not finite, in words; empty for none."""
    odd = series.steps[~np.isfinite(series.values)]
    if not len(odd):
        return ""
    if len(odd) == 1:
        return f"at step {odd[0]}"
    if odd[0] == series.steps[-len(odd)]:
        return f"from step {odd[0]} on"
    return f"at {len(odd):,} steps, first at {odd[0]}"
