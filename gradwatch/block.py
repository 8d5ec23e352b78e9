"""What passes on from the step to rules and sinks: a block of rows, 1 to 16 steps.

Where steps are very short, up to 64.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, repeat
from operator import is_not, itemgetter
from typing import Final

from gradwatch.facts import NO_FACTS, Facts
from gradwatch.record import StepRecord, dump_line

ROWS: Final = 16
"""Most rows of a block; a remarkable step closes it earlier."""
LONGEST: Final = 64
"""The same where steps are so short that few are read in full."""

Row = Sequence[float | None]
"""The values of one step, by the columns of its block; None: not measured."""


@functools.lru_cache(maxsize=64)
def _places(columns: tuple[str, ...]) -> Mapping[str, int]:
    return {key: i for i, key in enumerate(columns)}


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
        full: Of each row whether all was read; see :attr:`StepRecord.partial`.
    """

    columns: Sequence[str]
    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    extras: dict[int, Extras] = field(default_factory=dict)
    full: list[bool] = field(default_factory=list)
    _read: dict[str, Sequence[float | None] | None] = field(default_factory=dict)
    _plain: bool | None = None
    _records: list[StepRecord] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.rows)

    @property
    def _places(self) -> Mapping[str, int]:
        return _places(tuple(self.columns))

    def add(
        self,
        step: int,
        time: float,
        row: Row,
        extras: Extras | None = None,
        *,
        full: bool = True,
    ) -> None:
        """Add a step."""
        if extras is not None:
            self.extras[len(self.rows)] = extras
        self.steps.append(step)
        self.times.append(time)
        self.rows.append(row)
        self.full.append(full)

    @property
    def plain(self) -> bool:
        """Whether the rows have nothing beside, and all their values are finite."""
        if self._plain is None:  # once all rows are there
            values = filter(None, chain.from_iterable(self.rows))
            self._plain = not self.extras and math.isfinite(sum(values))
        return self._plain

    def parts(self) -> list[Block]:
        """Return the block in parts, each of rows that are all plain or none is."""
        if self.plain or len(self.rows) < 2:
            return [self]
        runs: list[tuple[bool, list[int]]] = []
        for i, row in enumerate(self.rows):
            plain = i not in self.extras and math.isfinite(sum(filter(None, row)))
            if not runs or runs[-1][0] is not plain:
                runs.append((plain, []))
            runs[-1][1].append(i)
        return [self._part(rows[0], rows[-1] + 1) for _, rows in runs]

    def _part(self, start: int, stop: int) -> Block:
        return Block(
            self.columns,
            self.steps[start:stop],
            self.times[start:stop],
            self.rows[start:stop],
            {i - start: e for i, e in self.extras.items() if start <= i < stop},
            self.full[start:stop],
        )

    def column(self, key: str) -> Sequence[float | None] | None:
        """Return the values of a key, one a row; None where it is no column."""
        if key not in self._read:
            at = self._places.get(key)
            values = None if at is None else list(map(itemgetter(at), self.rows))
            self._read[key] = values
        return self._read[key]

    def whole(self, key: str) -> Sequence[float] | None:
        """Return the values of a key; None where a row has none."""
        values = self.column(key)
        return None if values is None or None in values else values  # type: ignore[return-value] # none is None

    def read(self, key: str) -> Sequence[float] | None:
        """Return the values of a key, one a full row; None where one of them has none.

        There may be no full row.
        """
        if all(self.full):
            return self.whole(key)
        values = list(compress(self.column(key) or (None,), self.full))
        return None if None in values else values  # type: ignore[return-value] # none is None

    def largest(self, keys: Sequence[str]) -> Sequence[float] | None:
        """Return the largest value of some keys, one a full row; None as above.

        Args:
            keys: At least one.
        """
        found = [self.read(key) for key in keys]
        if len(found) == 1 or None in found:
            return found[0] if len(found) == 1 else None
        return list(map(max, *found))  # type: ignore[arg-type] # none is None

    def last(self) -> dict[str, float]:
        """Return the last value of every column that has any."""
        found: dict[str, float] = {}
        for at, key in enumerate(self.columns):
            for row in reversed(self.rows):
                value = row[at]
                if value is not None:
                    found[key] = value
                    break
        return found

    def records(self) -> Sequence[StepRecord]:
        """Return each row as a record; they are made once."""
        if len(self._records) < len(self.rows):
            self._records = [self._record(i) for i in range(len(self.rows))]
        return self._records

    def _record(self, index: int) -> StepRecord:
        pairs = zip(self.columns, self.rows[index], strict=True)
        metrics = {key: value for key, value in pairs if value is not None}
        step, time = self.steps[index], self.times[index]
        beside = self.extras.get(index)
        if beside is None:
            partial = not self.full[index]
            return StepRecord(step=step, time=time, metrics=metrics, partial=partial)
        return StepRecord(
            step=step,
            time=time,
            metrics={**metrics, **beside.metrics},
            profiles=beside.profiles,
            facts=beside.facts,
            events=beside.events,
        )

    def lines(self) -> list[str]:
        """Return each row as :func:`~gradwatch.record.dump_line` has its record.

        Where rows are plain, their values are filled into a line that is made once.
        """
        if not self.plain:
            return list(map(dump_line, self.records()))
        known: dict[bool, _Form] = {}
        lines: list[str] = []
        for i, row in enumerate(self.rows):
            full = self.full[i]
            if full not in known:
                here = tuple(compress(range(len(row)), map(is_not, row, repeat(None))))
                known[full] = _form(tuple(self.columns), here, full)
            values_of, without, line = known[full]
            values = values_of(row)
            if None in values or row.count(None) != without:
                lines.append(dump_line(self.records()[i]))
            else:
                lines.append(line % (self.steps[i], self.times[i], *values))
        return lines


_Form = tuple[Callable[[Row], Sequence[float | None]], int, str]


@functools.lru_cache(maxsize=64)
def _form(columns: tuple[str, ...], here: tuple[int, ...], full: bool) -> _Form:
    """Return what picks the values of a row, how many it lacks, and its line.

    Args:
        columns: Of the block.
        here: Those that the row has values of.
        full: Whether all of it was read.
    """
    names = (json.dumps(columns[i]).replace("%", "%%") for i in here)
    metrics = ",".join(f"{name}:%r" for name in names)
    rest = "" if full else ',"partial":true'
    line = '{"step":%d,"time":%r,"metrics":{' + metrics + "}" + rest + "}"
    if len(here) > 1:
        return itemgetter(*here), len(columns) - len(here), line
    first = here[0] if here else 0  # a row without values fits no form
    return itemgetter(slice(first, first + 1)), len(columns) - 1, line
