"""Records in order, and the last value of each metric: what a watch holds and gives."""

from __future__ import annotations

import difflib
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, overload

import numpy as np

from gradwatch.record import StepRecord

if TYPE_CHECKING:
    import pandas

KEPT_RECORDS = 1024
"""How many records a watch holds in memory."""


class Latest(dict[str, float]):
    """The last value of every key; a key that is missing names those that are near."""

    def __missing__(self, key: str) -> float:
        """Raise a KeyError that names the nearest keys, or how many there are."""
        if not self:
            raise KeyError(f"{key!r} has not been measured; nothing has been yet")
        raise KeyError(f"{key!r} has not been measured; {_near(key, self)}")


def _near(key: object, known: Collection[str]) -> str:
    """Return which keys are near one that is missing, or how many there are."""
    last = str(key).rpartition("/")[2]
    ending = [name for name in sorted(known) if name.rpartition("/")[2] == last]
    near = ending[:3] or difflib.get_close_matches(str(key), known, n=3)
    return f"near it: {', '.join(near)}" if near else f"there are {len(known)} keys"


class Rows(Protocol):
    """Several steps that are records once somebody asks."""

    def __len__(self) -> int:
        """Return how many there are."""

    def records(self) -> Sequence[StepRecord]:
        """Return them as records, oldest first."""


class Records(Sequence[StepRecord]):
    """The last records of a run, oldest first."""

    def __init__(
        self, records: Iterable[StepRecord] = (), limit: int | None = KEPT_RECORDS
    ) -> None:
        self._limit = sys.maxsize if limit is None else limit
        self._parts: deque[StepRecord | Rows] = deque()
        self._held = 0
        for record in records:
            self.append(record)

    def append(self, record: StepRecord) -> None:
        """Add one record; the oldest goes when the limit is reached."""
        self._add(record, 1)

    def extend(self, rows: Rows) -> None:
        """Add several; they are made records when somebody reads them."""
        self._add(rows, len(rows))

    def _add(self, part: StepRecord | Rows, size: int) -> None:
        self._parts.append(part)
        self._held += size
        while self._held - _size(self._parts[0]) >= self._limit:
            self._held -= _size(self._parts.popleft())

    def _all(self) -> list[StepRecord]:
        """Return what is held now: another thread may go on adding to it."""
        found: list[StepRecord] = []
        for part in list(self._parts):
            found += [part] if isinstance(part, StepRecord) else part.records()
        return found[-self._limit :] if self._limit else []

    def keys(self) -> list[str]:
        """Return every metric key that occurs, sorted."""
        return sorted({key for record in self for key in record.metrics})

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return one metric over the run.

        Args:
            key: A metric key, such as ``gradwatch/grad_norm``.

        Returns:
            ``(steps, values)``: int64 and float64 arrays of equal length; steps at
            which the metric was not measured are left out.

        Raises:
            KeyError: If no record holds the key; the message names close ones.
        """
        found = [(r.step, r.metrics[key]) for r in self if key in r.metrics]
        if not found:
            raise KeyError(f"no record holds {key!r}; {_near(key, self.keys())}")
        steps, values = zip(*found, strict=True)
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the metrics as a pandas.DataFrame, for scripts and notebooks.

        Returns:
            A row a record, indexed by ``step``; a column a metric key, sorted, float64,
            NaN where it was not measured; and before them ``time``, in seconds since
            the epoch. A metric that is itself NaN at a step cannot be told from one
            that was not measured: :meth:`series` can.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_pandas() needs pandas: pip install 'gradwatch[pandas]'."
            ) from error
        held = self._all()
        steps = np.array([r.step for r in held], dtype=np.int64)
        data = {"time": np.array([r.time for r in held], dtype=np.float64)}
        for key in sorted({key for record in held for key in record.metrics}):
            values = [record.metrics.get(key, np.nan) for record in held]
            data[key] = np.array(values, dtype=np.float64)
        return pandas.DataFrame(data, index=pandas.Index(steps, name="step"))

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...
    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        """Return one record, or a list for a slice."""
        return self._all()[index]

    def __iter__(self) -> Iterator[StepRecord]:
        """Iterate over what is held now: another thread may go on adding to it."""
        return iter(self._all())

    def __len__(self) -> int:
        """Return how many records are held."""
        return min(self._held, self._limit)

    def __repr__(self) -> str:
        """Say how many records there are and which steps they cover."""
        found = self._all()
        if not found:
            return "Records(empty)"
        first, last = found[0].step, found[-1].step
        return f"Records({len(found)} records, steps {first} to {last})"


def _size(part: StepRecord | Rows) -> int:
    return 1 if isinstance(part, StepRecord) else len(part)
