"""The run folder: meta.json, records.jsonl, alerts.jsonl and incidents.

An alert is on disk, with every record up to its step, before it is sent anywhere; other
records when the watch says so, after at most 16 steps (64 that are very short).
``records.jsonl`` never outgrows the disk: one row a step for the first 64 MB, then rows
folded by 10 for the next, by 100, and so on.

What cannot be written waits in memory and is tried again; what is lost is counted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

from gradwatch.block import Block
from gradwatch.record import Alert, Incident, StepRecord, dump_line
from gradwatch.records import Records
from gradwatch.sinks.fold import Fold
from gradwatch.sinks.lines import Lines, SmallFiles

_SECTION: Final = 64 * 2**20
_AROUND_INCIDENT: Final = 64
_SEEDS: Final = "/adjoint_from/"


def safe_name(name: str) -> str:
    """Return a name for a file or folder: what could lead elsewhere is replaced."""
    kept = "".join(
        c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name
    )
    kept = kept.strip(".")[:100] or "run"
    return f"{kept}_" if kept.upper() in {"CON", "PRN", "AUX", "NUL"} else kept


@final
class Jsonl:
    """Writes one run's folder.

    Args:
        folder: An empty folder of its own.
        meta: What never changes; written at once, and again at close with the health.
        say: Told where something cannot be written, and where it can be again.
        section: Bytes after which rows are folded ten times coarser.
    """

    def __init__(
        self,
        folder: Path,
        meta: Mapping[str, Any],
        *,
        say: Callable[[str], None],
        section: int = _SECTION,
    ) -> None:
        self.folder = folder
        self._meta = dict(meta)
        self._section = section
        self._written = 0
        self._step_size = 1
        self._fold = Fold()
        self._recent = Records(limit=_AROUND_INCIDENT)
        self._profiled: tuple[int | None, Mapping[str, Any]] = (None, {})
        self._around: dict[Path, tuple[Any, str]] = {}
        self._waits: dict[Path, dict[str, Any]] = {}
        self._pid = os.getpid()
        self._closed = False
        self._waiting: list[StepRecord | Block] = []
        self._records = Lines(folder / "records.jsonl", say)
        self._alerts = Lines(folder / "alerts.jsonl", say)
        self._small = SmallFiles(folder, say)
        self._records.write()
        self._alerts.write()
        self._write_meta()

    @property
    def _ours(self) -> bool:
        return not self._closed and os.getpid() == self._pid  # not in a forked child

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Take one record; with alerts, write them and what waits, at once."""
        if not self._ours:
            return
        if alerts:
            self._alerts.write(map(dump_line, alerts))
        self._recent.append(record)
        if record.profiles:  # those of single seeds are many, and in records.jsonl
            few = {k: v for k, v in record.profiles.items() if _SEEDS not in k}
            self._profiled = (record.step, few)
        self._waiting.append(record)
        if alerts:
            self.flush()

    def write_block(self, block: Block) -> None:
        """Take a block of plain rows at which there was no alert."""
        if self._ours:
            self._recent.extend(block)
            self._waiting.append(block)

    def flush(self) -> None:
        """Write the records that wait."""
        if not self._ours:
            return
        waiting, self._waiting = self._waiting, []
        lines: list[str] = []
        for part in waiting:
            if self._step_size > 1:
                records = [part] if isinstance(part, StepRecord) else part.records()
                rows = map(self._folded, records)
                lines += [dump_line(row) for row in rows if row is not None]
            elif isinstance(part, StepRecord):
                lines.append(dump_line(part))
            else:
                lines += part.lines()
        self._append(lines)
        self._alerts.write()
        self._small.write()

    def _folded(self, record: StepRecord) -> StepRecord | None:
        self._fold.add(record)
        if self._fold.count < self._step_size:
            return None
        row = self._fold.row()
        self._fold.clear()
        return row

    def _append(self, lines: Sequence[str]) -> None:
        self._written += self._records.write(lines)
        if self._written >= self._section:
            self._written, self._step_size = 0, self._step_size * 10

    def write_incident(
        self, incident: Incident, latest: Mapping[str, float] | None = None
    ) -> None:
        """Write an incident's file, with what led to it and where it happened.

        What led to it is of when the incident opened, or became more severe.

        Args:
            incident: As it is now.
            latest: The last value of every key.
        """
        if not self._ours:
            return
        path = Path("incidents", f"{incident.since}-{safe_name(incident.kind)}.json")
        content = {
            f.name: getattr(incident, f.name) for f in dataclasses.fields(incident)
        }
        state = (incident.severity, incident.streams, incident.cause)
        known, around = self._around.get(path, (None, ""))
        self._waits.pop(path, None)
        if not incident.doubled or (known == state and incident.until is None):
            self._waits[path] = content  # more evidence of the same: at the end
            return
        if known is None or known[0] != incident.severity:
            around = self._surroundings(latest or {})
        self._around[path] = (state, around)
        if incident.until is not None and not incident.repeats:
            del self._around[path]
        self._small.write(path, dump_line(content)[:-1] + around + "}")

    def _surroundings(self, latest: Mapping[str, float]) -> str:
        """Return what an incident's file holds behind the incident, as it is there."""
        found: dict[str, Any] = {
            "latest": dict(latest),
            "profiles": {"step": self._profiled[0], **self._profiled[1]},
            "environment": {
                name: self._meta[name]
                for name in ("versions", "settings", "streams")
                if name in self._meta
            },
        }
        for record in self._recent:
            tensors = record.facts.step.nonfinite
            if tensors is not None:
                found["first_nonfinite"] = {
                    "step": record.step,
                    "module": tensors[0].rpartition(".")[0] if tensors else None,
                    "tensors": tensors,
                }
                break
        records = ",".join(map(dump_line, self._recent))
        return f',{dump_line(found)[1:-1]},"records":[{records}]'

    def _write_meta(self) -> None:
        self._small.write(Path("meta.json"), dump_line(self._meta))

    @property
    def lost(self) -> dict[str, int]:
        """What did not arrive, or has not yet: lines, and small files, by file."""
        return {
            name: file.lost + file.waiting
            for name, file in (
                ("records.jsonl", self._records),
                ("alerts.jsonl", self._alerts),
                ("incidents and meta.json", self._small),
            )
            if file.lost + file.waiting
        }

    def close(self, health: Mapping[str, Any] | None = None) -> None:
        """Write what is folded and the health, and close. Safe to call twice."""
        if not self._ours:
            return
        try:
            self.flush()
            if self._fold.count:
                self._append([dump_line(self._fold.row())])
            for path, content in self._waits.items():
                around = self._around[path][1] if path in self._around else ""
                self._small.write(path, dump_line(content)[:-1] + around + "}")
            if health is not None:
                dropped = {**health.get("dropped", {}), **self.lost}
                self._meta["health"] = {**health, "dropped": dropped}
            self._write_meta()
        finally:
            self._closed = True
            for file in (self._records, self._alerts):
                file.close()
