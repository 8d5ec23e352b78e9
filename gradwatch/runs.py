"""Reading a run folder back, in the types that the live watch has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradwatch.facts import from_format_1
from gradwatch.record import Alert, Incident, Records, StepRecord, Stream, parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run as its folder holds it.

    Attributes:
        dir: The folder.
        meta: What ``meta.json`` says: versions, settings, health at close.
        streams: The watched recurrences.
        records: Every row of ``records.jsonl``.
        alerts: Every alert that was given out.
        incidents: Every incident, open ones with ``until`` None.
        closed: Whether the run was closed; False after a kill or a crash.
        skipped: Lines that could not be read, as ``file: line``.
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
        The run. A truncated last line, as a kill leaves it, is skipped and counted.

    Raises:
        FileNotFoundError: If the folder holds no ``records.jsonl``; the message names
            the run folders inside it, where there are some.
    """
    folder = Path(dir)
    records = folder / "records.jsonl"
    if not records.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/records.jsonl"))
        hint = f"; it holds the runs {', '.join(inside[-5:])}" if inside else ""
        raise FileNotFoundError(
            f"{folder} is no run folder (no records.jsonl){hint}. "
            "Expected what watch.dir named."
        )
    skipped: list[str] = []
    meta = _meta(folder / "meta.json", skipped)
    incidents = []
    for path in sorted((folder / "incidents").glob("*.json")):
        incidents += [parse(Incident, raw) for raw in _lines(path, skipped)]
    return Run(
        dir=folder,
        meta=meta,
        streams=tuple(parse(Stream, raw) for raw in meta.get("streams", ())),
        records=Records(
            (parse(StepRecord, raw) for raw in _rows(records, meta, skipped)),
            limit=None,
        ),
        alerts=[parse(Alert, raw) for raw in _lines(folder / "alerts.jsonl", skipped)],
        incidents=sorted(incidents, key=lambda i: i.since),
        closed="health" in meta,
        skipped=skipped,
    )


def _rows(
    path: Path, meta: dict[str, Any], skipped: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run, those of an earlier format as they are now."""
    old = meta.get("format", 1) < 2
    for raw in _lines(path, skipped):
        if old and "facts" in raw:
            raw["facts"] = from_format_1(raw["facts"])
        yield raw


def _meta(path: Path, skipped: list[str]) -> dict[str, Any]:
    return next(_lines(path, skipped), {})


def _lines(path: Path, skipped: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file; note the lines that are none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
            except ValueError:
                raw = None
            if isinstance(raw, dict):
                yield raw
            else:
                skipped.append(f"{path.name}: line {number}")
