"""The verb live: a run while it goes on, on one screen or line by line."""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gradwatch.console import incident_line, number
from gradwatch.metrics import run_key, stream_key
from gradwatch.plot.columns import counted
from gradwatch.record import (
    Incident,
    StepRecord,
    Stream,
    dump_line,
    printable,
)
from gradwatch.records import KEPT_RECORDS
from gradwatch.runs import Run, Tail, outline
from gradwatch.shell.verb import (
    RUN,
    Answer,
    Verb,
    cut,
    plain_incident,
    run_folder,
    table,
    wrapped,
)

_ABOUT: Final = """\
Follow a run from its folder, until it ends: loss, gradient norm, and of each stream
the spectral radius, the horizon and the norm of its gradient, each with how it went
over the last rows; the open incidents. On a terminal one screen; in a pipe a line
every 10 s, and each alert as it is given. Ctrl-C leaves; the run does not notice.

example: gradwatch live latest
         gradwatch live latest --once
"""
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_PLAIN: Final = "_.-:=+*#"
"""The same where the terminal's encoding has no blocks."""
_POINTS: Final = 30
_FLAT: Final = 0.1
"""Share of the largest value that fills the height, at least; less looks flat."""
_STREAMS: Final = 6
_INCIDENTS: Final = 5
_QUIET: Final = 30.0
"""Seconds without a row from which on the screen says so."""
_METRICS: Final = (("rho", "rho"), ("horizon", "horizon"), ("grad_norm_hh", "norm"))


def sparkline(values: Sequence[float], marks: str = _BLOCKS) -> str:
    """Return values as marks of eight heights; ``x`` for one that is not finite.

    Args:
        values: In order; of more than 30 the largest of each part is shown.
        marks: From the lowest to the highest.
    """
    if len(values) > _POINTS:
        ends = [round(i * len(values) / _POINTS) for i in range(_POINTS + 1)]
        parts = [values[a:b] for a, b in itertools.pairwise(ends)]
        odd = [next((v for v in part if not math.isfinite(v)), None) for part in parts]
        values = [
            max(part) if bad is None else bad
            for part, bad in zip(parts, odd, strict=True)
        ]
    known = [v for v in values if math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = max(high - low, _FLAT * max(abs(high), abs(low)))
    step = span / (len(marks) - 1) or math.inf
    return "".join(
        marks[round((v - low) / step)] if math.isfinite(v) else "x" for v in values
    )


class Following:
    """What is known of a run that goes on.

    Args:
        folder: Its run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps = [*self._files()]
        self.run: Run = outline(folder)
        self.rows: deque[StepRecord] = deque(maxlen=KEPT_RECORDS)
        self.lengths: dict[str, int] = {}
        self._tail = Tail(folder / "records.jsonl")
        self._tail.to_the_end()
        self.written = 0.0

    def look(self) -> list[StepRecord]:
        """Read what is new; return the new rows."""
        stamps = [*self._files()]
        if stamps != self._stamps:
            self.run, self._stamps = outline(self.folder), stamps
        try:
            self.written = (self.folder / "records.jsonl").stat().st_mtime
        except OSError:
            self.written = 0.0
        new = self._tail.read()
        self.rows.extend(new)
        for row in (*self.run.records, *new):  # lengths are told once, at the start
            for path, facts in row.facts.modules.items():
                if facts.T is not None:
                    self.lengths[path] = facts.T
        return new

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """Yield what tells whether alerts, incidents or the state have changed."""
        some = (self.folder / "alerts.jsonl", self.folder / "meta.json")
        for path in (*some, *sorted((self.folder / "incidents").glob("*.json"))):
            try:
                known = path.stat()
            except OSError:
                continue
            yield path.name, known.st_mtime_ns, known.st_size

    @property
    def ended(self) -> bool:
        """Whether the run was closed."""
        return self.run.closed

    @property
    def open(self) -> list[Incident]:
        """What is wrong now; once the run has ended, all that was."""
        alarms = [i for i in self.run.incidents if i.severity != "info" or self.ended]
        return [i for i in alarms if i.until is None or self.ended]

    def series(self, key: str) -> list[float]:
        """Return the values of a metric over the last rows."""
        return [row.metrics[key] for row in self.rows if key in row.metrics]

    def plain(self) -> dict[str, Any]:
        """Return what is known now as plain values."""
        latest: dict[str, float] = {}
        for row in self.rows:
            latest.update(row.metrics)
        return {
            "run": str(self.folder),
            "step": self.rows[-1].step if self.rows else None,
            "written": self.written,
            "closed": self.ended,
            "latest": latest,
            "incidents": [plain_incident(i) for i in self.open],
        }


def screen(now: Following, marks: str = _BLOCKS, height: int = 24) -> list[str]:
    """Return a run as lines for one screen, at most 99 columns wide."""
    step = f"step {now.rows[-1].step:,}" if now.rows else "no step yet"
    head = [printable(now.folder.name), step, _state(now)]
    if len(now.rows) > 1 and not now.ended:
        first, last = now.rows[0], now.rows[-1]
        if (seconds := last.time - first.time) > 0:
            head.insert(2, f"{(last.step - first.step) / seconds:.3g} steps/s")
    lines = ["   ".join(head), ""]
    for name, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        values = now.series(run_key(key))
        if values:
            ends = f"{number(values[0])} to {number(values[-1])}"
            lines.append(f"{name:14} {sparkline(values, marks):{_POINTS}} {ends}")
    rows = [*_streams(now, marks, max(2, min(_STREAMS, height - 12)))]
    if rows:
        lines += ["", *table(rows)]
    more = len(now.run.streams) - (len(rows) - 1)
    if rows and more > 0:
        lines.append(f"... {more} more streams")
    lines.append("")
    for incident in now.open[:_INCIDENTS]:
        lines += wrapped(f"{incident.severity:7}  {incident_line(incident)}", 9)
    if len(now.open) > _INCIDENTS:
        lines.append(f"... {len(now.open) - _INCIDENTS} more")
    if not now.open:
        lines.append("no alarm" if now.ended else "no alarm is open")
    if now.run.skipped:
        count = counted(len(now.run.skipped), "line")
        lines.append(f"{count} cannot be read, first {now.run.skipped[0]}")
    if now.ended:
        folder = shlex.quote(str(now.folder))
        lines.append(f"to see all of it: gradwatch report {folder} --open")
    return [cut(line) for line in lines]


def _state(now: Following) -> str:
    if now.ended:
        return "ended"
    silent = time.time() - now.written
    return f"nothing written for {silent:.0f} s" if silent > _QUIET else "running"


def _streams(now: Following, marks: str, most: int) -> Iterator[tuple[str, ...]]:
    """Yield the table of streams: those of incidents first."""
    sick = {name for i in now.open for name in i.streams}
    chosen = sorted(now.run.streams, key=lambda s: s.name not in sick)[:most]
    if not any(row.metrics for row in now.rows):
        return
    yield ("stream", *(part for _, name in _METRICS for part in (name, "")))
    for stream in chosen:
        cells = [cut(stream.name, 24)]
        for metric, _ in _METRICS:
            values = now.series(stream_key(stream, metric))
            cells += [_value(metric, values, stream, now.lengths)]
            cells += [sparkline(values, marks)[-14:]]
        yield tuple(cells)


def _value(
    metric: str, values: Sequence[float], stream: Stream, lengths: Mapping[str, int]
) -> str:
    if not values:
        return "-"
    length = lengths.get(stream.module)
    if metric == "horizon" and length:
        return f"{values[-1]:.0f}/{length}"
    return number(values[-1])


def status(now: Following) -> str:
    """Return a run as one line."""
    if not now.rows:
        return "no step yet"
    kinds = ", ".join(i.kind for i in now.open if i.severity != "info")
    state = f"open: {kinds}" if kinds else "no alarm is open"
    if now.ended:
        state = f"ended; alarms: {kinds}" if kinds else "ended; no alarm"
    parts = [f"step {now.rows[-1].step}", state]
    for name, key in (("loss", "loss"), ("norm", "grad_norm")):
        if values := now.series(run_key(key)):
            parts.append(f"{name} {number(values[-1])}")
    for metric, name in _METRICS[:2]:
        last = {
            s: values[-1]
            for s in now.run.streams
            if (values := now.series(stream_key(s, metric)))
        }
        if last:
            worst = (min if metric == "horizon" else max)(last, key=lambda s: last[s])
            value = _value(metric, [last[worst]], worst, now.lengths)
            parts.append(f"{name} {value} ({worst.name})")
    return cut("  ".join(parts))


def _followed(given: argparse.Namespace) -> Answer:
    now = Following(run_folder(given.run))
    on_screen = sys.stdout.isatty() and not given.json
    marks = _marks(sys.stdout.encoding)
    if given.every is not None and not given.every > 0:
        raise ValueError(f"--every is {given.every}; expected seconds above 0.")
    every = given.every or (1.0 if on_screen else 10.0)
    told, shown, began = 0, 0.0, time.monotonic()
    first = True
    try:
        while True:
            new = now.look()
            alerts = now.run.alerts[told:] if not first else []
            told = len(now.run.alerts)
            if on_screen:
                _draw(now, marks, first=first)
            else:
                for alert in alerts:
                    if not given.json:
                        print(printable(alert.message, lines=True), flush=True)
                due = time.monotonic() - shown >= every or alerts or now.ended
                if first or (new and due) or now.ended:
                    line = dump_line(now.plain()) if given.json else status(now)
                    print(line, flush=True)
                    shown = time.monotonic()
            first = False
            if now.ended or given.once:
                break
            idle = min(time.time() - now.written, time.monotonic() - began)
            if given.idle is not None and idle > given.idle:
                break
            time.sleep(min(every, 1.0))
    except KeyboardInterrupt:
        pass
    if given.json or on_screen:
        return Answer("", {})
    left = [] if given.once and not now.ended else screen(now, marks)[2:]
    return Answer("\n".join(left), {})


def _draw(now: Following, marks: str, *, first: bool) -> None:
    """Draw the screen over the last one."""
    height = shutil.get_terminal_size().lines
    lines = screen(now, marks, height)[: height - 1]
    start = "\033[2J\033[H" if first else "\033[H"
    body = "\n".join(f"{line}\033[K" for line in lines)
    print(f"{start}{body}\n\033[J", end="", flush=True)


def _marks(encoding: str | None) -> str:
    try:
        _BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _PLAIN
    return _BLOCKS


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument("--once", action="store_true", help="show it once, and leave")
    parser.add_argument(
        "--every",
        type=float,
        metavar="SECONDS",
        help="how often (default 1 on a terminal, 10 in a pipe)",
    )
    parser.add_argument(
        "--idle",
        type=float,
        metavar="SECONDS",
        help="leave when nothing was written for so long (default: wait)",
    )


LIVE: Final = Verb(
    name="live",
    help="follow a run while it goes on",
    description=_ABOUT,
    arguments=_arguments,
    answer=_followed,
)
