"""What passes on from the step to rules and sinks: a block of rows, 1 to 16 steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.facts import NO_FACTS, Facts
from gradwatch.record import StepRecord

ROWS: Final = 16
"""Most rows of a block; anything remarkable closes one before."""

Row = Sequence[float | None]
"""The values of one step, by the columns of its block; None: not measured."""


@dataclass(slots=True, kw_only=True)
class Rest:
    """What only a remarkable step has.

    Attributes:
        metrics: Values that have no column.
        profiles: Lists of at most 128 values by key.
        facts: What is no number, and has changed.
        events: Such as ``skipped_step``.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    profiles: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Facts = NO_FACTS
    events: tuple[str, ...] = ()


@dataclass(slots=True)
class Block:
    """Consecutive steps with the same columns, a row each.

    Attributes:
        columns: Metric keys, one a column.
        steps: The step of each row.
        times: When each step closed, in seconds since the epoch.
        rows: The values.
        rests: Index of a remarkable row -> what it has beside its values.
    """

    columns: Sequence[str]
    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    rests: dict[int, Rest] = field(default_factory=dict)

    def add(self, step: int, time: float, row: Row, rest: Rest | None) -> None:
        """Add a step."""
        if rest is not None:
            self.rests[len(self.rows)] = rest
        self.steps.append(step)
        self.times.append(time)
        self.rows.append(row)

    def records(self) -> Iterator[StepRecord]:
        """Yield each row as a record."""
        for i, row in enumerate(self.rows):
            pairs = zip(self.columns, row, strict=True)
            metrics = {key: value for key, value in pairs if value is not None}
            rest = self.rests.get(i)
            if rest is None:
                yield StepRecord(
                    step=self.steps[i], time=self.times[i], metrics=metrics
                )
                continue
            yield StepRecord(
                step=self.steps[i],
                time=self.times[i],
                metrics={**metrics, **rest.metrics},
                profiles=rest.profiles,
                facts=rest.facts,
                events=rest.events,
            )
