"""A run in a cell of a notebook: static HTML with no script, under 20 kB.

It is drawn by hand, so that it needs none of what draws the page of a run; its lines
have the colour of the text around them, on a light page and on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Final

import numpy as np

from gradwatch.console import HEAD, cells, incident_line
from gradwatch.facts import ModuleFacts
from gradwatch.metrics import stream_key
from gradwatch.plot.columns import binned, counted, thinned
from gradwatch.record import Stream, printable
from gradwatch.records import Records
from gradwatch.runs import Run

_ROWS: Final = 10
"""Streams that have a row."""
_INCIDENTS: Final = 4
_POINTS: Final = 32
_LAGS: Final = 64
_DECADES: Final = 8.0
"""What the bars of the flow reach down to, below the largest."""
_NAME: Final = 60
_LINE: Final = 400
"""Characters of a name, and of a line, at most: names are hostile input."""
_LINES: Final = {"horizon": "horizon", "rho": "rho", "grad_hh": "grad_norm_hh"}
"""Column -> the metric that is drawn beside its number."""


def paragraph(text: str) -> str:
    """Return a text as a paragraph."""
    return f"<p>{_safe(text, _LINE)}</p>"


def of_run(
    run: Run, latest: Mapping[str, float], seen: Mapping[str, ModuleFacts]
) -> str:
    """Return a run as a table of streams, the last flow, and what is wrong.

    Args:
        run: The run, with its last records.
        latest: The last value of every key.
        seen: Path of a module -> its facts when last sampled.
    """
    parts = [f"<p><b>gradwatch</b>: {_head(run)}</p>"]
    if run.streams:
        parts.append(_table(run, latest, seen))
    parts += _flow(run)
    alarms = [i for i in run.incidents if i.severity != "info"]
    worst = sorted(alarms, key=lambda i: (i.until is not None, -i.since))
    rows = [f"<li>{_safe(incident_line(i), _LINE)}</li>" for i in worst[:_INCIDENTS]]
    if len(worst) > _INCIDENTS:
        rows.append(f"<li>{len(worst) - _INCIDENTS} more</li>")
    parts.append(f"<ul>{''.join(rows)}</ul>" if rows else "<p>no alarm</p>")
    return f"<div>{''.join(parts)}</div>"


def _head(run: Run) -> str:
    streams = counted(len(run.streams), "stream")
    rows = run.records
    return f"{streams}; " + (f"step {rows[-1].step:,}" if len(rows) else "no step yet")


def _table(
    run: Run, latest: Mapping[str, float], seen: Mapping[str, ModuleFacts]
) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    rows = [f"<tr>{head}</tr>"]
    for stream in run.streams[:_ROWS]:
        row = []
        for name, text in zip(HEAD, cells(stream, latest, seen), strict=True):
            drawn = _line(run.records, stream, _LINES[name]) if name in _LINES else ""
            row.append(f"<td>{_safe(text, _NAME)}{drawn}</td>")
        rows.append(f"<tr>{''.join(row)}</tr>")
    more = len(run.streams) - _ROWS
    note = f"<p>{more} more streams</p>" if more > 0 else ""
    return f"<table>{''.join(rows)}</table>{note}"


def _line(records: Records, stream: Stream, metric: str) -> str:
    """Return how a metric went over the last records, as a line."""
    key = stream_key(stream, metric)
    values = [row.metrics[key] for row in records if key in row.metrics]
    values = [v for v in values if math.isfinite(v)]
    values = [values[i] for i in thinned(len(values), _POINTS)]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = 12 / (high - low) if high > low else 0.0
    points = " ".join(
        f"{2 * i},{13 - (v - low) * scale:.0f}" for i, v in enumerate(values)
    )
    said = escape(f"{metric} from {values[0]:.3g} to {values[-1]:.3g}")
    return (
        f' <svg width="{2 * _POINTS}" height="14" role="img" aria-label="{said}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
    )


def _flow(run: Run) -> Iterator[str]:
    """Yield the last picture of a gradient on its way back through time."""
    for record in reversed(run.records):
        for stream in run.streams:
            profile = record.profiles.get(stream_key(stream, "adjoint"), ())
            largest = max((v for v in profile if math.isfinite(v)), default=0.0)
            if largest > 0:
                yield _bars(stream, record.step, profile, largest)
                return


def _bars(stream: Stream, step: int, profile: Sequence[float], largest: float) -> str:
    values = np.nan_to_num(np.array(binned(profile, _LAGS)) / largest, nan=0.0)
    tall = 1 + np.log10(np.maximum(values, 10.0**-_DECADES)) / _DECADES
    width, height = 6, 40
    path = "".join(
        f"M{i * width},{height}v{-height * t:.0f}h{width - 1}V{height}z"
        for i, t in enumerate(tall)
        if t > 0
    )
    said = (
        f"gradient of {stream.name[:_NAME]} at step {step:,}, from the first time step "
        f"(left) to the last (right); full height: the largest, nothing: 10^-"
        f"{_DECADES:.0f} of it or less"
    )
    return (
        f'<svg width="{len(tall) * width}" height="{height}" role="img" '
        f'aria-label="{_safe(said, _LINE)}"><path d="{path}" fill="#0072b2"/></svg>'
        f"<p><small>{_safe(said, _LINE)}</small></p>"
    )


def _safe(text: str, most: int) -> str:
    text = printable(text)
    return escape(text if len(text) <= most else f"{text[:most]}..")
