"""What a person reads on the console: the log, the table and the closing verdict."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.metrics import run_key, stream_key
from gradwatch.record import Incident, Stream

log: Final = logging.getLogger("gradwatch")

_ROWS: Final = 30
_COLUMNS: Final = ("rho", "grad_norm_hh", "update_ratio", "sigma_max", "orthogonality")


class _Handler(logging.StreamHandler[Any]):
    """Writes to stderr, above a progress bar where one is in use."""

    def emit(self, record: logging.LogRecord) -> None:
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


def shown(text: object) -> str:
    """Return a name with control characters escaped: names are hostile input."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in str(text)
    )


def say(text: str, level: int = logging.INFO) -> None:
    """Log a text, every line of it with control characters escaped."""
    log.log(level, "gradwatch: %s", "\n".join(shown(x) for x in text.split("\n")))


def number(value: float | None) -> str:
    """Return a number in at most eight characters; a dash where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}"


def table(
    streams: Sequence[Stream],
    latest: Mapping[str, float],
    notes: Mapping[str, str],
    seen: Mapping[str, Any],
) -> str:
    """Return the streams and their latest numbers, at most 100 columns wide.

    Args:
        streams: A row each.
        latest: The last value of every key.
        notes: Stream -> what is not measured and why.
        seen: Module -> its ``T``, ``B`` and ``dtype`` when last sampled.
    """
    head = ("stream", "kind", "size", "T", *_COLUMNS)
    rows: list[tuple[str, ...]] = [head]
    for stream in streams[:_ROWS]:
        size = f"{stream.input_size}->{stream.hidden_size}"
        length = seen.get(stream.module, {}).get("T")
        values = [number(latest.get(stream_key(stream, c))) for c in _COLUMNS]
        if latest.get(stream_key(stream, "rho_certified")) == 0.0 and values[0] != "-":
            values[0] += "?"
        name = shown(stream.name)
        name = name if len(name) <= 28 else f"..{name[-26:]}"
        steps = "-" if length is None else str(length)
        rows.append((name, stream.kind.lower(), size, steps, *values))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
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
        lines.append(f"{shown(name)}: {note}")
    run = [
        f"{name} {number(latest[run_key(name)])}"
        for name in ("grad_norm", "grad_norm_clipped", "clip_ratio", "skipped")
        if run_key(name) in latest
    ]
    return "\n".join([*lines, "; ".join(run)] if run else lines)


def verdict(
    steps: int,
    incidents: Sequence[Incident],
    notices: int,
    lost: Sequence[str],
    folder: object,
) -> str:
    """Return the closing line: nothing, or what was wrong, in at most 12 lines."""
    alarms = [i for i in incidents if i.severity != "info"]
    where = f"records in {folder}" if folder else "records in memory only"
    if steps == 0:
        head = (
            "closed without having seen a single step; was the model trained under "
            "this watch, with loss.backward()?"
        )
    elif not alarms:
        head = f"{steps} steps, no alarm; {where}"
    else:
        first = min(i.since for i in alarms)
        count = f"{len(alarms)} problem{'s' if len(alarms) > 1 else ''}"
        head = f"{count} in {steps} steps, first at step {first}; {where}"
    lines = [head]
    for incident in alarms[:6]:
        until = "open" if incident.until is None else f"until step {incident.until}"
        at = f" in {', '.join(incident.streams[:3])}" if incident.streams else ""
        cause = f", cause {incident.cause}" if incident.cause else ""
        lines.append(
            f"  {incident.kind} since step {incident.since}, {until}{at}{cause}"
        )
    if len(alarms) > 6:
        lines.append(f"  ... {len(alarms) - 6} more")
    if notices:
        lines.append(f"  {notices} notices, in watch.alerts")
    lines += [f"  {line}" for line in lost[:2]]
    if alarms and folder:
        lines.append(f"  next: gradwatch.load({str(folder)!r}).alerts")
    return "\n".join(lines)
