"""What passes on from the step to rules and sinks: a block of rows, 1 to 16 steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.facts import NO_FACTS, Facts
from gradwatch.record import StepRecord

ROWS: Final = 16
"""Most rows of a block; a remarkable step closes it earlier."""

Row = Sequence[float | None]
"""The values of one step, by the columns of its block; None: not measured."""


@dataclass(slots=True, kw_only=True)
class Extras:
    """What only some rows have beside their values.

    Attributes:
        metrics: Values that have no column.
        profiles: Lists of at most 128 values by key.
        facts: What is not a number, and has changed.
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
        extras: Index of a remarkable row -> what it has beside its values.
    """

    columns: Sequence[str]
    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    extras: dict[int, Extras] = field(default_factory=dict)

    def add(self, step: int, time: float, row: Row, extras: Extras | None) -> None:
        """Add a step."""
        if extras is not None:
            self.extras[len(self.rows)] = extras
        self.steps.append(step)
        self.times.append(time)
        self.rows.append(row)

    def records(self) -> Iterator[StepRecord]:
        """Yield each row as a record."""
        for i, row in enumerate(self.rows):
            pairs = zip(self.columns, row, strict=True)
            metrics = {key: value for key, value in pairs if value is not None}
            step, time, beside = self.steps[i], self.times[i], self.extras.get(i)
            if beside is None:
                yield StepRecord(step=step, time=time, metrics=metrics)
                continue
            yield StepRecord(
                step=step,
                time=time,
                metrics={**metrics, **beside.metrics},
                profiles=beside.profiles,
                facts=beside.facts,
                events=beside.events,
            )
