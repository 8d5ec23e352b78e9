"""What a person reads on the console: the log, the table and the closing verdict."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.facts import ModuleFacts
from gradwatch.metrics import PREFIX, run_key, stream_key
from gradwatch.record import CELL, Incident, Stream, printable

log: Final = logging.getLogger("gradwatch")

_ROWS: Final = 30
_SHOWN: Final = 6
_SHOWN_NOTICES: Final = 3
"""Incidents, and open notices, that the closing lines name."""
HEAD: Final = (
    "stream",
    "kind",
    "size",
    "horizon",
    "rho",
    "drift",
    "sigma'",
    "saturated",
    "grad_hh",
    "update",
)
"""The columns of the table of streams."""
_LOST: Final = {
    "alerts.jsonl": "alerts",
    "incidents and meta.json": "files",
    "the console": "messages",
}
"""What is lost where it is no record."""
_WIDTH: Final = 100
_SHORTEST: Final = 12
_LEGEND: Final = (
    "horizon: how many of T steps back gradients go; rho, drift: spectral radius of "
    "W_hh, its change by\none update (?: not sure); sigma': mean slope of the "
    "activation; saturated: its share below .05;\ngrad_hh: norm of W_hh's gradient; "
    "update: its relative change"
)


class _Handler(logging.StreamHandler[Any]):
    """Writes to stderr, above a progress bar where one is in use."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        bar = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if bar is None:
            self.stream = sys.stderr  # looked up late: tests and notebooks replace it
            super().emit(record)
        else:
            bar.write(self.format(record), file=sys.stderr)


def set_up() -> None:
    """Make the logger visible, unless the user has set up logging."""
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if not log.handlers and not logging.getLogger().handlers:
        handler = _Handler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False


_undelivered: Counter[str] = Counter()


def undelivered() -> int:
    """Return how many messages of this process a console, or a handler, has lost."""
    return _undelivered.total()


def say(text: str, level: int = logging.INFO) -> None:
    """Log a text, every line of it with control characters escaped.

    What a handler raises stays here, and is counted: it is no fault of the training.
    """
    try:
        set_up()
        log.log(level, "gradwatch: %s", printable(text, lines=True))
    except Exception as error:
        _undelivered[type(error).__name__] += 1


def report(line: str) -> None:
    """Say what went wrong, as a warning."""
    say(line, logging.WARNING)


def greet(streams: Sequence[Stream], folder: object, wandb: str | None) -> None:
    """Say what is watched and where its records go, in one line.

    Args:
        streams: What is watched.
        folder: Where the records go; None for memory alone.
        wandb: What becomes of them in W&B, in words; None for nothing.
    """
    modules = len({stream.module for stream in streams})
    parts = [
        f"watching {_count(len(streams), 'stream')} in {_count(modules, 'module')}",
        f"records in {folder}" if folder else "records in memory only",
    ]
    say("; ".join(parts if wandb is None else [*parts, f"W&B: {wandb}"]))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def number(value: float | None) -> str:
    """Return a number in at most eight characters; a dash where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}"


def derived(value: float | None, source: float | None) -> str:
    """Return a number as :func:`number` does; a dash for a NaN that another explains.

    Args:
        value: The number.
        source: What it was computed from, which is shown beside it.
    """
    if value is None or source is None or not math.isnan(value):
        return number(value)
    return number(value) if math.isfinite(source) else "-"


def table(
    streams: Sequence[Stream],
    latest: Mapping[str, float],
    notes: Mapping[str, str],
    seen: Mapping[str, ModuleFacts],
) -> str:
    """Return the streams and their latest numbers, at most 100 columns wide.

    Args:
        streams: A row each.
        latest: The last value of every key.
        notes: Stream -> what is not measured and why.
        seen: Path of a module -> its facts when last sampled.
    """
    rows = [HEAD] + [cells(stream, latest, seen) for stream in streams[:_ROWS]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    room = max(_WIDTH - sum(widths[1:]) - 2 * len(widths[1:]), _SHORTEST)
    rows = [(_short(row[0], room), *row[1:]) for row in rows]
    widths[0] = max(len(row[0]) for row in rows)
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if len(streams) > _ROWS:
        lines.append(f"... {len(streams) - _ROWS} more")
    for name, note in list(notes.items())[:5]:
        lines.append(f"{printable(name)}: {note}")
    norm = latest.get(run_key("grad_norm"))
    run = [f"grad_norm {number(norm)}"] if norm is not None else []
    run += [
        f"{name} {derived(latest[run_key(name)], norm)}"
        for name in ("grad_norm_clipped", "clip_ratio", "skipped")
        if run_key(name) in latest
    ]
    if run:
        lines.append("; ".join(run))
    if any(stream_key(stream, "rho") in latest for stream in streams):
        lines.append(_LEGEND)
    return "\n".join(lines)


def cells(
    stream: Stream, latest: Mapping[str, float], seen: Mapping[str, ModuleFacts]
) -> tuple[str, ...]:
    """Return a stream's row of the table, as :data:`HEAD` names its columns."""

    def of(metric: str) -> float | None:
        return latest.get(stream_key(stream, metric))

    radius = of("rho_step" if stream.kind == CELL else "rho")
    rho, drift = number(radius), derived(of("rho_drift"), of("rho"))
    rho += "?" * (of("rho_certified") == 0.0 and rho != "-")
    drift += "?" * (of("rho_drift_reliable") == 0.0 and drift != "-")
    slope = of("act_deriv")
    flat = derived(of("saturated"), slope)
    if stream.kind == "RNN_RELU":
        flat = f"dead {derived(of('dead'), slope)}"
    length, steps = seen.get(stream.module, ModuleFacts()).T, of("horizon")
    horizon = "-" if length is None else str(length)
    if length is not None and steps is not None:
        horizon = f"{steps:.0f}/{length}"
    return (
        printable(stream.name),
        stream.kind.lower(),
        f"{stream.input_size}->{stream.hidden_size}" if stream.hidden_size else "-",
        horizon,
        rho,
        drift,
        number(slope),
        flat,
        number(of("grad_norm_hh")),
        derived(of("update_ratio"), of("grad_norm_hh")),
    )


def _short(name: str, room: int) -> str:
    return name if len(name) <= room else f"..{name[2 - room :]}"


def incident_line(incident: Incident) -> str:
    """Return a line on an incident: since when, where, why, and by which numbers."""
    until = "still open" if incident.until is None else f"until step {incident.until}"
    at = f" in {', '.join(incident.streams[:3])}" if incident.streams else ""
    named = incident.cause and incident.cause != incident.kind
    cause = f", cause {incident.cause}" if named else ""
    shown_numbers = ", ".join(
        f"{_short_key(key)} {number(value)}"
        + ("" if threshold is None else f" (threshold {number(threshold)})")
        for key, (value, threshold) in list(incident.evidence.items())[:2]
    )
    numbers = f": {shown_numbers}" if shown_numbers else ""
    back = f", came back {_count(incident.repeats, 'time')}" if incident.repeats else ""
    since = f"{incident.kind} since step {incident.since}"
    return f"{since}, {until}{back}{at}{cause}{numbers}"


def _short_key(key: str) -> str:
    """Return the last part of a key of ours; any other is somebody's own name."""
    return key.rpartition("/")[2] if key.startswith(f"{PREFIX}/") else key


def losses(health: Mapping[str, Any]) -> list[str]:
    """Return what failed or did not arrive, in words, from ``watch.health``."""
    lost = [f"{part} failed: {why}" for part, why in health["failed"].items()]
    return lost + [
        f"{number} {_LOST.get(name, 'records')} did not reach {name}"
        for name, number in health["dropped"].items()
    ]


def _still(number: int) -> str:
    return f" ({number} still open)" if number else ""


def verdict(
    steps: int,
    incidents: Sequence[Incident],
    lost: Sequence[str],
    folder: object,
) -> str:
    """Return the closing lines: nothing, or what was wrong, and what still is.

    Args:
        steps: How many were measured.
        incidents: Past and open ones, those of notices too; a notice that is over asks
            for nothing, and is not named.
        lost: What failed or did not arrive, in words.
        folder: Where the records are; None for memory alone.

    Returns:
        At most 15 lines.
    """
    alarms = [i for i in incidents if i.severity != "info"]
    open_notices = [i for i in incidents if i.severity == "info" and i.until is None]
    where = f"records in {folder}" if folder else "records in memory only"
    if steps == 0:
        head = (
            "closed without having seen a single step; was the model trained under "
            "this watch, with loss.backward()?"
        )
    elif not alarms:
        head = f"{_count(steps, 'step')}, no alarm"
    else:
        first = min(i.since for i in alarms)
        left = sum(i.until is None for i in alarms)
        head = f"{_count(steps, 'step')}, {_count(len(alarms), 'alarm')}{_still(left)}"
        head += f", first at step {first}"
    if steps:
        if open_notices:
            head += f", {_count(len(open_notices), 'notice')}"
        head += f"; {where}"
    lines = [head, *(f"  {incident_line(i)}" for i in alarms[:_SHOWN])]
    if len(alarms) > _SHOWN:
        lines.append(f"  ... {len(alarms) - _SHOWN} more")
    lines += [f"  {incident_line(i)} (notice)" for i in open_notices[:_SHOWN_NOTICES]]
    lines += [f"  {line}" for line in lost[:2]]
    if alarms and folder:
        lines.append(
            f"  to see them: gradwatch report {shlex.quote(str(folder))} --open"
        )
    return "\n".join(lines)
