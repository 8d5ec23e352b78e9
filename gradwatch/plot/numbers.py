"""The numbers of the charts, apart from how they are drawn: plain values from records.

A chart of a long run shows bins: of each the smallest and the largest value, so that a
spike of one step survives.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from gradwatch.facts import ModuleFacts
from gradwatch.metrics import PREFIX
from gradwatch.plot.columns import (
    NOTHING,
    Columns,
    Row,
    Series,
    as_columns,
    base,
    binned,
    counted,
    label,
    not_finite,
    number,
    span,
    thinned,
)
from gradwatch.record import Incident, StepRecord

ROWS: Final = 40
"""Most training steps of a heat map."""
COLUMNS: Final = 50
"""Most bins of time of a heat map."""
FLOOR: Final = -12.0
"""Decades below a row's largest value at which the colours end."""

LANES: Final = 12
"""Most incidents that a timeline shows."""


def lanes(incidents: Sequence[Incident], last: int) -> list[Row]:
    """Return a bar for each incident, numbered as in the list; alarms before notices.

    Args:
        incidents: Of the run, in the order in which they are told.
        last: The last step, at which what is open ends.
    """
    return [
        {
            "lane": f"{n} {incident.kind}"[:24],
            "severity": WORDS[incident.severity],
            "since": incident.since,
            "until": max(last if incident.until is None else incident.until, 1),
            "text": f"{n} {incident.kind} from step {incident.since}, "
            + ("still open" if incident.until is None else f"to {incident.until}"),
        }
        for n, incident in enumerate(incidents[:LANES], 1)
    ]


WORDS: Final[Mapping[str, str]] = {
    "error": "error",
    "warning": "warning",
    "info": "notice",
}
"""What a severity is called."""


def ordered(incidents: Iterable[Incident]) -> list[Incident]:
    """Return incidents as they are told: errors first, then warnings, then notices."""
    order = list(WORDS)
    return sorted(incidents, key=lambda i: (order.index(i.severity), i.since, i.kind))


def timeline_title(found: Columns, incidents: Sequence[Incident]) -> str:
    """Return what a timeline shows, in a sentence."""
    alarms = [i for i in incidents if i.severity != "info"]
    loss = found.run("loss")
    said = f"loss {span(loss)}" if len(loss.steps) else "no loss was found"
    if odd := not_finite(loss):
        said += f", not finite {odd}"
    if not alarms:
        return f"{said}; no alarm in {counted(found.last - found.first + 1, 'step')}"
    first = min(alarms, key=lambda i: i.since)
    more = f" and {len(alarms) - 1} more" if len(alarms) > 1 else ""
    return f"{said}; {first.kind} from step {first.since} on{more}"


# ---- the flow

PROFILE: Final = "/adjoint"
SEED: Final = "/adjoint_from/"


def streams_of_flows(found: Columns) -> list[str]:
    """Return the streams whose flow was measured, as keys, sorted."""
    ends = {key for _, p in found.flows for key in p if key.endswith(PROFILE)}
    return sorted(key.removesuffix(PROFILE) for key in ends)


def stream_with(found: Columns, stream: str | None, what: str) -> str:
    """Return the first part of the keys of a stream, or of the first that is known.

    Raises:
        ValueError: If no record holds a profile of it.
    """
    known = streams_of_flows(found)
    if known and stream is None:
        return known[0]
    if stream is not None and base(stream) in known:
        return base(stream)
    names = ", ".join(map(name_of, known)) or "none"
    raise ValueError(
        f"no record holds the {what} of {stream or 'any stream'}; there are: {names}."
        " It is measured every 100 steps; watch.probe_now() asks for it at once."
    )


def name_of(key: str) -> str:
    """Return the name of a stream by what its keys begin with."""
    return key.removeprefix(f"{PREFIX}/").replace("/", ".")


def decades(profile: Sequence[float], largest: float) -> list[float]:
    """Return log10 of each value over the largest, at least :data:`FLOOR`."""
    found = []
    for value in profile:
        if value == math.inf:  # beyond what a float holds
            found.append(0.0)
            continue
        share = value / largest if largest > 0 else 0.0
        known = share > 0 and math.isfinite(share)
        found.append(round(max(math.log10(share), FLOOR), 3) if known else FLOOR)
    return found


def flow_points(
    records: Iterable[StepRecord] | Columns, stream: str | None = None
) -> tuple[list[Row], list[Row], str]:
    """Return the numbers of :func:`gradwatch.plot.flow`.

    Args:
        records: Of a run.
        stream: Name of the stream, or None for the first that has a profile.

    Returns:
        The cells of the heat map: ``step`` and ``until``, the training steps that they
        stand for, ``back`` and ``to``, how many time steps back from the end of the
        sequence, ``decades``; the marks of the horizon: ``step``, ``back``,
        ``horizon``; and what was found, in words.

    Raises:
        ValueError: If no record holds a profile of the stream.
    """
    found = as_columns(records)
    key = stream_with(found, stream, "flow")
    shown = [(s, p[key + PROFILE]) for s, p in found.flows if key + PROFILE in p]
    shown = [shown[i] for i in thinned(len(shown), ROWS)]
    steps = [step for step, _ in shown]
    ends = [*steps[1:], _end_of_last(steps, found.last)]
    horizon = dict(zip(*(c.tolist() for c in found.of(f"{key}/horizon")), strict=True))
    length = length_of(found, key, len(shown[-1][1]))
    cells, marks = [], []
    for (step, profile), until in zip(shown, ends, strict=True):
        own = binned(profile, COLUMNS)
        each = (length if len(profile) == len(shown[-1][1]) else len(profile)) / len(
            own
        )
        for i, value in enumerate(decades(own, max(own))):
            left = (len(own) - i) * each
            place = {"back": round(left, 2), "to": round(left - each, 2)}
            cells.append({"step": step, "until": until, **place, "decades": value})
        if step in horizon:
            reach = horizon[step]
            middle = (step + until) / 2
            marks.append({"step": step, "y": middle, "back": reach, "horizon": reach})
    name = stream or name_of(key)
    title = f"{name}: gradients through time"
    if marks:
        far = marks[-1]["horizon"]
        title = f"{name}: gradients reach {far:.0f} of {length} time steps back"
    if name.endswith("_reverse"):
        title += ", in its own direction"
    return cells, marks, title


def _end_of_last(steps: Sequence[int], last: int) -> int:
    """Return up to where the last look stands: at most twice the gap before it."""
    gap = steps[-1] - steps[-2] if len(steps) > 1 else last + 1
    return max(min(last, steps[-1] + 2 * gap) + 1, steps[-1] + 1)


def length_of(found: Columns, key: str, points: int) -> int:
    """Return how many time steps the sequences of a stream have, by its last look."""
    facts = _facts_of(found, key)
    known = None if facts is None else facts.T
    return known if known is not None and known >= points else points


def padded(found: Columns, key: str) -> float | None:
    """Return the share of a stream's input, at the end, that is padding; or None."""
    facts = _facts_of(found, key)
    return None if facts is None else facts.padding or None


def _facts_of(found: Columns, key: str) -> ModuleFacts | None:
    """Return the facts of the module that a stream is of, by what its keys begin with.

    The stream is the module itself, a cell, or one level below it.
    """
    for path, facts in found.facts.modules.items():
        if key == base(path) or key.rpartition("/")[0] == base(path):
            return facts
    return None


class Dependence(NamedTuple):
    """On which earlier time steps the states of one look depend.

    Attributes:
        stream: Its name.
        step: The training step.
        length: Time steps of the sequence.
        seeds: The time steps that a gradient was sent back from.
        norms: For each the norm of what arrives, by bins of time of equal size.
    """

    stream: str
    step: int
    length: int
    seeds: Sequence[int]
    norms: Sequence[Sequence[float]]

    @property
    def bin(self) -> float:
        """How many time steps one value stands for."""
        return self.length / len(self.norms[0])

    def reach(self, seed: int) -> int:
        """Return how many steps before its own one a seed still has a thousandth.

        Args:
            seed: Which of the seeds, counted from 0.
        """
        row = self.norms[seed]
        largest = max(row)
        read = [i for i, value in enumerate(row) if value >= largest * 1e-3 > 0]
        first = int(read[0] * self.bin) if read else self.seeds[seed]
        return max(self.seeds[seed] - first, 0)


def dependence_points(
    records: Iterable[StepRecord] | Columns, stream: str | None = None
) -> Dependence:
    """Return the numbers of :func:`gradwatch.plot.dependence`, of the last such look.

    Args:
        records: Of a run.
        stream: Name of the stream, or None for the first that has them.

    Raises:
        ValueError: If no record holds them.
    """
    found = as_columns(records)
    key = stream_with(found, stream, "flow")
    for step, profiles in reversed(found.flows):
        rows = {
            int(name.removeprefix(key + SEED)): row
            for name, row in profiles.items()
            if name.startswith(key + SEED)
        }
        if rows:
            seeds = sorted(rows)
            norms = [rows[seed] for seed in seeds]
            return Dependence(stream or name_of(key), step, seeds[-1] + 1, seeds, norms)
    raise ValueError(
        f"no record holds what the states of {name_of(key)} depend on; it is measured "
        "with the first flow, seldom later, after an alarm and by watch.probe_now()."
    )


def rho_title(found: Columns, stream: str) -> str:
    """Return what became of a stream's spectral radius, in words."""
    ends = found.stream(stream, "rho").ends()
    if ends is None:
        return f"{stream}: no spectral radius was measured"
    moved = f" ({ends[1] / ends[0] - 1:+.0%})" if ends[0] > 0 else ""
    return f"{stream}: spectral radius {span(found.stream(stream, 'rho'))}{moved}"


def shares(found: Columns, stream: str) -> dict[str, Series]:
    """Return the shares of a stream's units that are at an end of their range."""
    start = base(stream) + "/"
    lines: dict[str, Series] = {}
    for key in sorted(found.series):
        metric, _, gate = key.removeprefix(start).partition("/")
        if not key.startswith(start) or metric not in _SHARES:
            continue
        if metric in ("shut", "open") and not gate:
            continue
        if gate and metric == "saturated":
            continue
        lines[f"{gate} {metric}".strip()] = found.series[key]
    if (forget := found.stream(stream, "forget")) is not NOTHING:
        lines["forget gate, mean"] = forget
    return lines


_SHARES: Final = ("saturated", "dead", "shut", "open")


def gates_title(found: Columns, stream: str) -> str:
    """Return what became of a stream's gates, or of its units, in words."""
    keeps = found.stream(stream, "timescale")
    if len(keeps.finite().steps):
        forget = span(found.stream(stream, "forget"))
        return f"{stream}: forget gate {forget}; keeps for {span(keeps)} steps"
    for metric in ("saturated", "dead"):
        if len((known := found.stream(stream, metric)).finite().steps):
            return f"{stream}: {metric} share {span(known)}"
    return f"{stream}: no state was measured"


def updates_title(found: Columns, stream: str) -> str:
    """Return how far a stream's W_hh moves a step, in words."""
    known = found.stream(stream, "update_ratio").finite().values
    if not len(known):
        return f"{stream}: no update was measured"
    middle = statistics.median(known.tolist())
    return f"{stream}: W_hh changes by {number(middle)} of its norm a step (median)"


# ---- an incident

AROUND: Final = 200
"""Steps before and after an incident that its chart shows, at least."""


class Around(NamedTuple):
    """A metric around an incident.

    Attributes:
        key: The metric.
        series: Its values there.
        threshold: What it crossed, or None.
        title: What was found, in words.
    """

    key: str
    series: Series
    threshold: float | None
    title: str


def incident_points(
    records: Iterable[StepRecord] | Columns, incident: Incident
) -> Around:
    """Return the numbers of :func:`gradwatch.plot.incident`.

    Of the evidence, the first number that was recorded at two steps or more.

    Raises:
        ValueError: If none was.
    """
    found = as_columns(records)
    end = found.last if incident.until is None else incident.until
    margin = max(AROUND, (end - incident.since) // 2)
    for key, (value, threshold) in incident.evidence.items():
        whole = found.of(key)
        near = (whole.steps >= incident.since - margin) & (whole.steps <= end + margin)
        part = Series(whole.steps[near], whole.values[near])
        if len(part.finite().steps) < 2:
            continue
        where = f" in {', '.join(incident.streams[:2])}" if incident.streams else ""
        beside = "" if threshold is None else f" (threshold {number(threshold)})"
        metric = label(key)
        title = f"{incident.kind}{where}: {metric} {number(value)}{beside}"
        return Around(key, part, threshold, title)
    raise ValueError(
        f"no number of the evidence of {incident.kind} at step {incident.since} was "
        "recorded at two steps or more; pass the records of the whole run, such as "
        "those of gradwatch.load(folder)."
    )


def compare_title(runs: Mapping[str, Columns], key: str) -> str:
    """Return how two or more runs end, in words."""
    ends = [
        f"{number((run.of(key).ends() or (0, None))[1])} ({name})"
        for name, run in runs.items()
    ]
    return f"{label(key)} at the end: {', '.join(ends)}"
