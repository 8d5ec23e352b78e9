"""Reading a run folder back, in the types that the live watch has."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from gradwatch.facts import from_format_1
from gradwatch.record import Alert, Incident, StepRecord, Stream, parse
from gradwatch.records import Records

DIR: Final = "gradwatch-runs"
"""Where run folders are, unless it is said otherwise."""
_LINE: Final = 16 * 2**20
"""Bytes of a line of records or alerts, at most; a longer one is not read."""
_SMALL_FILE: Final = 64 * 2**20
"""Bytes of an incident's file or of meta.json, at most."""
_BLOCK: Final = 2**20
"""Bytes that are read at once."""
_META: Final[Mapping[str, type]] = {
    "format": int,
    "health": dict,
    "settings": dict,
    "streams": list,
    "versions": dict,
}
"""What ``meta.json`` holds -> its type."""
_Row = TypeVar("_Row", StepRecord, Alert, Incident)
_Value = TypeVar("_Value", StepRecord, Alert, Incident, Stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run as its folder holds it.

    Attributes:
        dir: The folder.
        meta: What ``meta.json`` says: versions, settings, health at close.
        streams: The watched recurrences.
        records: Every row of ``records.jsonl``; steps ascend.
        alerts: Every alert that was given out.
        incidents: Every incident, open ones with ``until`` None.
        closed: Whether the run was closed; False after a kill or a crash.
        skipped: Lines that are not among these, as ``file: line N``: broken, of the
            wrong type, longer than 16 MiB, or of a step that was there before. A file
            that cannot be opened counts as its line 1.
    """

    dir: Path
    meta: dict[str, Any]
    streams: tuple[Stream, ...]
    records: Records
    alerts: list[Alert]
    incidents: list[Incident]
    closed: bool
    skipped: list[str] = field(default_factory=list)


def load(dir: str | os.PathLike[str]) -> Run:
    """Read a run folder.

    Args:
        dir: The folder that ``watch.dir`` named.

    Returns:
        The run. What cannot be read, such as a truncated last line as a kill leaves it,
        is skipped and noted in :attr:`Run.skipped`; all else is there.

    Raises:
        FileNotFoundError: If the folder holds no ``records.jsonl``; the message names
            the run folders inside it, where there are some.
    """
    return _loaded(_checked(dir), _ascending)


def outline(dir: str | os.PathLike[str]) -> Run:
    """Read all of a run folder but its records: of those the first and the last.

    Takes milliseconds however long the run is.

    Args:
        dir: The folder that ``watch.dir`` named.

    Raises:
        FileNotFoundError: As of :func:`load`.
    """
    return _loaded(_checked(dir), _ends)


def _checked(dir: str | os.PathLike[str]) -> Path:
    folder = Path(dir)
    if not os.path.lexists(folder / "records.jsonl"):
        inside = sorted(p.parent.name for p in folder.glob("*/records.jsonl"))
        hint = f"; it holds the runs {', '.join(inside[-5:])}" if inside else ""
        raise FileNotFoundError(
            f"{folder} is no run folder (no records.jsonl){hint}. "
            "Pass the folder that watch.dir names."
        )
    return folder


def _loaded(folder: Path, reader: Callable[..., list[StepRecord]]) -> Run:
    skipped: list[str] = []
    meta, streams, old = _meta(folder / "meta.json", skipped)
    rows = reader(folder / "records.jsonl", skipped, old=old)
    alerts = _rows(Alert, folder / "alerts.jsonl", skipped)
    incidents: list[Incident] = []
    for path in _incident_files(folder / "incidents", skipped):
        incidents += _rows(Incident, path, skipped, limit=_SMALL_FILE).values()
    return Run(
        dir=folder,
        meta=meta,
        streams=streams,
        records=Records(rows, limit=None),
        alerts=list(alerts.values()),
        incidents=sorted(incidents, key=lambda i: i.since),
        closed="health" in meta,
        skipped=skipped,
    )


def parent() -> Path:
    """Return where run folders are: ``GRADWATCH_DIR``, or ``gradwatch-runs``."""
    return Path(os.environ.get("GRADWATCH_DIR") or DIR)


def latest() -> Path:
    """Return the run folder that was written to last.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = parent()
    found = [p for p in folder.glob("*/records.jsonl") if p.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run; pass a run folder, such as the one that the last "
            "lines of a run name, or set GRADWATCH_DIR."
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def _meta(
    path: Path, skipped: list[str]
) -> tuple[dict[str, Any], tuple[Stream, ...], bool]:
    """Return what ``meta.json`` says, the streams, and whether facts are of format 1.

    What is of the wrong type is left out. Where the format is not known it is the
    present one, but for a file that has none, as the first ones had none.
    """
    for number, said in _lines(path, _SMALL_FILE):
        if said is None:
            skipped.append(f"{path.name}: line {number}")
            continue
        odd = {n for n, kind in _META.items() if type(said.get(n, kind())) is not kind}
        meta = {name: value for name, value in said.items() if name not in odd}
        listed = [_parsed(Stream, raw) for raw in meta.get("streams", [])]
        streams = {stream.name: stream for stream in listed if stream is not None}
        if odd or len(streams) < len(listed):
            skipped.append(f"{path.name}: line {number}")
        return meta, tuple(streams.values()), bool(said) and said.get("format", 1) == 1
    return {}, (), False


def _incident_files(folder: Path, skipped: list[str]) -> list[Path]:
    if os.path.lexists(folder) and not folder.is_dir():
        skipped.append(f"{folder.name}: line 1")
        return []
    return sorted(folder.glob("*.json"))


def _ascending(path: Path, skipped: list[str], *, old: bool) -> list[StepRecord]:
    """Return the rows of a run whose steps ascend: as many as there can be.

    A single step that is far too large does not cost those after it. Rows of an earlier
    format are returned as they are now.
    """
    odd: list[str] = []
    rows = _rows(StepRecord, path, odd, old=old)
    kept = _rising([(row.step, number) for number, row in rows.items()])
    odd += [f"{path.name}: line {number}" for number in rows.keys() - kept]
    skipped += sorted(odd, key=lambda line: int(line.rpartition(" ")[2]))
    return [row for number, row in rows.items() if number in kept]


def _ends(path: Path, skipped: list[str], *, old: bool) -> list[StepRecord]:
    """Return the first row that can be read, and the last one."""
    tail = Tail(path, old=old)
    rows = tail.read(_BLOCK)
    tail.to_the_end()
    rows += tail.read()
    return rows if len(rows) < 2 else [rows[0], rows[-1]]


class Tail:
    """Follows the records of a run that goes on.

    Args:
        path: The ``records.jsonl``; it need not be there yet.
        old: Whether its facts are those of format 1.
    """

    def __init__(self, path: Path, *, old: bool = False) -> None:
        self._path, self._old = path, old
        self._at = 0

    def to_the_end(self) -> None:
        """Leave out all but the last rows."""
        try:
            size = self._path.stat().st_size
        except OSError:
            return
        self._at = max(self._at, size - _BLOCK)

    def read(self, limit: int = -1) -> list[StepRecord]:
        """Return the whole rows that were added since the last call.

        Args:
            limit: Bytes to read, at most; -1 for all there are.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                raw = file.read(limit)
        except OSError:
            return []
        whole = raw.rpartition(b"\n")[0]
        self._at += len(whole) + 1 if whole else 0
        found = []
        for line in whole.splitlines():
            value = _object(line)
            if value is not None and self._old and isinstance(value.get("facts"), dict):
                value["facts"] = from_format_1(value["facts"])
            row = _parsed(StepRecord, value)
            if row is not None:
                found.append(row)
        return found


def _rising(steps: list[tuple[int, int]]) -> set[int]:
    """Return the lines of a longest rising series of steps, the earlier where equal.

    Args:
        steps: The step of each line, and the line.
    """
    ends: list[int] = []  # the smallest step that a series of each length ends with
    places: list[int] = []  # where in steps it is
    before: list[int | None] = []  # the place of the step before, for each step
    end: int | None = None
    for place, (step, _) in enumerate(steps):
        length = bisect.bisect_left(ends, step)
        before.append(places[length - 1] if length else None)
        if length == len(ends):
            ends.append(step)
            places.append(place)
            end = place
        elif step < ends[length]:
            ends[length], places[length] = step, place
    kept: set[int] = set()
    while end is not None:
        kept.add(steps[end][1])
        end = before[end]
    return kept


def _rows(
    kind: type[_Row],
    path: Path,
    skipped: list[str],
    *,
    limit: int = _LINE,
    old: bool = False,
) -> dict[int, _Row]:
    """Return line -> value of a file that has one a line; note the lines that are none.

    Args:
        kind: What a line holds.
        path: The file.
        skipped: Is added to.
        limit: Bytes of a line, at most.
        old: Whether facts are those of format 1.
    """
    found: dict[int, _Row] = {}
    for number, raw in _lines(path, limit):
        if raw is not None and old and isinstance(raw.get("facts"), dict):
            raw["facts"] = from_format_1(raw["facts"])
        value = _parsed(kind, raw)
        if value is None:
            skipped.append(f"{path.name}: line {number}")
        else:
            found[number] = value
    return found


def _parsed(kind: type[_Value], raw: Any) -> _Value | None:
    try:
        return parse(kind, raw)
    except (TypeError, ValueError):
        return None


def _lines(path: Path, limit: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield the lines of a file that are not blank, each with its number from 1.

    Args:
        path: The file; none is an empty one.
        limit: Bytes of a line, at most.

    Yields:
        ``(number, object)``: the line's JSON object, or None if it holds none.
    """
    if not path.is_file():
        if os.path.lexists(path):
            yield 1, None
        return
    number = 0
    try:
        with path.open("rb", buffering=_BLOCK) as file:
            while line := file.readline(limit):
                number += 1
                if len(line) == limit and not line.endswith(b"\n"):
                    _to_the_next_line(file)
                    yield number, None
                elif line.strip():
                    yield number, _object(line)
    except OSError:
        yield number + 1, None


def _to_the_next_line(file: BinaryIO) -> None:
    while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
        continue


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        raw = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None
