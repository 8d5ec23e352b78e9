"""What a page about a run says: plain values, made of the run folder alone.

Each part is a function of a :class:`Subject`; nothing here draws. The words are those
of the console and of the alerts' pages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from gradwatch.metrics import CATALOGUE as METRICS
from gradwatch.plot.columns import (
    Columns,
    Series,
    base,
    columns,
    counted,
    label,
    not_finite,
    number,
    span,
)
from gradwatch.plot.numbers import WORDS, ordered
from gradwatch.record import Incident, Stream
from gradwatch.runs import Run

OK: Final = "ok"
"""Beside error, warning and notice: nothing is wrong there."""
NAMED: Final = 3
"""Most alarms that the verdict names."""


class Note(NamedTuple):
    """A sentence with a sign before it.

    Attributes:
        sign: ``ok``, ``notice``, ``warning`` or ``error``.
        text: The sentence.
    """

    sign: str
    text: str


class Fact(NamedTuple):
    """A number of the run, and what it says.

    Attributes:
        name: What it is.
        value: The number, in words.
        reading: What it says; empty for nothing.
        sign: As of a :class:`Note`.
    """

    name: str
    value: str
    reading: str = ""
    sign: str = OK


@dataclass(frozen=True)
class Subject:
    """A run, and what its page needs of it more than once.

    Attributes:
        run: As its folder holds it.
        name: What it is called.
        found: Its records by metric.
        incidents: In the order in which they are told.
    """

    run: Run
    name: str
    found: Columns
    incidents: Sequence[Incident]

    @classmethod
    def of(cls, run: Run, name: str = "") -> Subject:
        """Return a run with what is taken from its records in one pass."""
        return cls(
            run,
            name or name_of_folder(run),
            columns(run.records),
            ordered(run.incidents),
        )

    @property
    def alarms(self) -> list[Incident]:
        """The incidents that somebody was paged for."""
        return [i for i in self.incidents if i.severity != "info"]

    @property
    def steps(self) -> int:
        """How many steps the records reach over."""
        return self.found.last - self.found.first + 1


def name_of_folder(run: Run) -> str:
    """Return what a run is called where nobody gave it a name."""
    return run.dir.name or run.dir.resolve().name  # of "."


# ---- the verdict


def verdict(subject: Subject) -> Note:
    """Return in a sentence or two what is to be known first."""
    if not subject.steps:
        return Note("warning", "Nothing was measured: no step was seen.")
    steps, alarms = counted(subject.steps, "step"), subject.alarms
    if not alarms:
        return Note(*_without_alarm(subject, steps))
    first = min(alarms, key=lambda i: i.since)
    told = "; ".join(_in_short(i) for i in alarms[:NAMED])
    more = len(alarms) - NAMED
    several = f"{len(alarms)} alarms" if len(alarms) > 1 else "1 alarm"
    text = f"{several} in {steps}, the first from step {first.since} on: {told}"
    return Note(
        WORDS[alarms[0].severity], text + (f"; and {more} more." if more > 0 else ".")
    )


def _in_short(incident: Incident) -> str:
    where = f" in {', '.join(incident.streams[:2])}" if incident.streams else ""
    named = incident.cause and incident.cause != incident.kind
    cause = f" ({incident.cause})" if named else ""
    end = "still open" if incident.until is None else f"over at step {incident.until}"
    return f"{incident.kind}{cause}{where}, {end}"


def _without_alarm(subject: Subject, steps: str) -> tuple[str, str]:
    notices = len(subject.incidents)
    text = f"No alarm in {steps}"
    text += f", {counted(notices, 'notice')}." if notices else "."
    odd = [fact for fact in glance(subject) if fact.sign in ("warning", "error")]
    if odd:
        return "notice", f"{text} But look at {'; '.join(map(_unusual, odd))}."
    return "notice" if notices else OK, text


def _unusual(fact: Fact) -> str:
    more = f" ({fact.reading})" if fact.reading else ""
    return f"{fact.name} {fact.value}{more}"


# ---- at a glance

_ENOUGH: Final = 20
"""Steps from which on the start of a run is told from its end."""


def loss_fact(found: Columns) -> Fact:
    """Return how the loss went, beside that of the best constant output."""
    loss = found.run("loss")
    ends, odd = loss.ends(), not_finite(loss)
    if odd:
        return Fact("loss", span(loss), f"not finite {odd}", "error")
    if ends is None:
        return Fact("loss", "not found", "what it does cannot be told", "notice")
    first, last = ends
    value = f"{number(first)} to {number(last)}"
    constant = found.run("loss_constant").ends()
    if len(loss.values) < _ENOUGH:
        return Fact("loss", value, "too few steps to judge", "notice")
    if constant is not None and constant[1] > 0:
        share = last / constant[1]
        beside = f"the best constant output has {number(constant[1])}"
        if share > 0.97:
            return Fact(
                "loss", value, f"no better than a constant: {beside}", "warning"
            )
        return Fact("loss", value, beside)
    if last > first > 0:
        return Fact("loss", value, "higher at the end than at the start", "warning")
    if first > 0 and last > 0.97 * first:
        return Fact("loss", value, "where it began", "warning")
    return Fact("loss", value)


def glance(subject: Subject) -> Iterator[Fact]:
    """Yield the numbers that say most about a run, each with what it says."""
    found, streams = subject.found, subject.run.streams
    if found.last < found.first:
        return
    yield loss_fact(found)
    kind = found.facts.run.loss_kind
    if kind:
        yield Fact("kind of loss", kind.replace("_", " ").replace("+", " + "))
    elif len(found.run("loss").steps) >= _ENOUGH:
        said = "so there is no constant to compare it with"
        yield Fact("kind of loss", "not recognised", said, "notice")
    yield from _norms(found)
    if reach := _least_reach(found, streams):
        yield reach
    yield from _extremes(found, streams)
    for name, rate in found.rates.items():
        several = f" of {name}" if len(found.rates) > 1 else ""
        late = found.last - found.looked
        at = f"at step {found.looked}, the last look" if late else ""
        yield Fact(f"learning rate{several}", _rate(rate), at)


def _rate(rate: Series) -> str:
    """Return a learning rate, or the first and the last one."""
    first, last = number(float(rate.values[0])), number(float(rate.values[-1]))
    return first if first == last else f"{first} to {last}"


def _norms(found: Columns) -> Iterator[Fact]:
    norm = found.run("grad_norm")
    ends = norm.ends()
    bad = found.run("nonfinite")
    if odd := not_finite(Series(bad.steps, np.where(bad.values > 0, np.nan, 0.0))):
        yield Fact("gradients that are not finite", odd, "", "error")
    if ends is None:
        return
    finite = norm.finite()
    where = int(finite.steps[finite.values.argmax()])
    top, middle = float(finite.values.max()), float(np.median(finite.values))
    largest = f"largest {number(top)} at step {where}"
    sign = OK
    if middle > 0 and top > _FAR * middle:
        largest += f", {number(top / middle)} times the median"
        sign = "warning"
    yield Fact(
        "gradient norm", f"{number(ends[0])} to {number(ends[1])}", largest, sign
    )
    ratio = found.run("clip_ratio").finite().values
    if len(ratio) and (clipped := float((ratio < 0.999).mean())):
        half = number(float(np.median(ratio[ratio < 0.999])))
        said = f"to {half} of their norm (median)"
        sign = "warning" if clipped > 0.9 else OK
        yield Fact("gradients clipped", f"at {clipped:.0%} of the steps", said, sign)
    skipped = found.run("skipped").last()
    if skipped:
        yield Fact("steps skipped", f"{skipped:.0f}")


def _least_reach(found: Columns, streams: Sequence[Stream]) -> Fact | None:
    """Return how far back gradients reach in the stream where that is least."""
    reaches = []
    for stream in streams:
        horizon = found.stream(stream.name, "horizon").last()
        length = length_of(found, stream)
        if horizon is not None and length:
            reaches.append((horizon / length, horizon, length, stream.name))
    if not reaches:
        return None
    share, horizon, length, name = min(reaches)
    where = f"in {name}" + (", where it is least" if len(reaches) > 1 else "")
    sign = "notice" if share < 0.5 and length > 10 else OK
    said = f"{horizon:.0f} of {length} time steps back"
    return Fact("gradients reach", said, where, sign)


def length_of(found: Columns, stream: Stream) -> int | None:
    """Return how many time steps a stream's sequences have, at the last look."""
    facts = found.facts.modules.get(stream.module)
    return None if facts is None else facts.T


_FAR: Final = 100.0
"""Times the median at which a gradient norm stands out."""
_MOVED: Final = 3.0
"""Factor by which a spectral radius has moved far."""
_EXTREMES: Final = (
    ("rho", "spectral radius", 0.0, math.inf),
    ("growth_log10", "decades of growth on the way back", 1.0, 4.0),
    ("update_ratio", "relative change of W_hh a step", 0.0, math.inf),
    ("saturated", "share of flat activations", 0.3, 0.9),
    ("dead", "share of dead units", 0.3, 0.9),
)
"""Metrics of streams whose largest last value is told: from which value on, and from
which on as a warning."""


def _extremes(found: Columns, streams: Sequence[Stream]) -> Iterator[Fact]:
    for metric, name, least, much in _EXTREMES:
        series = {s.name: found.stream(s.name, metric) for s in streams}
        ends = {s: e for s, own in series.items() if (e := own.ends()) is not None}
        if not ends:
            continue
        stream = max(ends, key=lambda s: ends[s][1])
        first, last = ends[stream]
        if last < least:
            continue
        said = f"in {stream}, where it is largest" if len(ends) > 1 else ""
        sign = "warning" if last >= much else "notice" if least else OK
        if metric == "rho" and last > _MOVED * first > 0:
            grown = f"{last / first:.3g} times what it was"
            said, sign = f"{grown}; {said}".removesuffix("; "), "notice"
        yield Fact(name, f"{number(first)} to {number(last)}", said, sign)


# ---- the streams


class StreamRow(NamedTuple):
    """A stream in the table.

    Attributes:
        name: Its name.
        kind: Of its module, and its size.
        cells: The last values of :data:`COLUMNS`, in words.
        sick: Whether an alarm names it.
    """

    name: str
    kind: str
    cells: Sequence[str]
    sick: bool


ROWS: Final = 200
"""Most streams of the table."""
COLUMNS: Final = (
    ("horizon", "horizon"),
    ("rho", "rho"),
    ("rho_total_drift", "total drift"),
    ("act_deriv", "mean slope"),
    ("saturated", "saturated"),
    ("forget", "forget gate"),
    ("grad_norm_hh", "gradient of W_hh"),
    ("update_ratio", "update"),
)
"""Metrics of the table, and what their columns are called."""


def stream_rows(subject: Subject) -> list[StreamRow]:
    """Return all streams, those of alarms and those with the shortest reach first."""
    found, sick = subject.found, {n for i in subject.alarms for n in i.streams}
    rows = []
    for stream in worst_first(subject):
        cells = []
        for metric, _ in COLUMNS:
            own = (
                "dead"
                if metric == "saturated" and stream.kind == "RNN_RELU"
                else metric
            )
            value = found.stream(stream.name, own).last()
            text = "-" if value is None else number(value)
            if metric == "horizon" and value is not None:
                text = f"{value:.0f} of {length_of(found, stream) or '?'}"
            cells.append(text)
        size = f"{stream.kind.lower()} {stream.input_size} to {stream.hidden_size}"
        rows.append(StreamRow(stream.name, size, cells, stream.name in sick))
    return rows


def worst_first(subject: Subject) -> list[Stream]:
    """Return the streams: those of alarms, then by how little gradients reach back."""
    sick = [name for i in subject.alarms for name in i.streams]

    def order(stream: Stream) -> tuple[int, float]:
        place = sick.index(stream.name) if stream.name in sick else len(sick)
        horizon = subject.found.stream(stream.name, "horizon").last()
        length = length_of(subject.found, stream)
        share = math.inf if horizon is None or not length else horizon / length
        return place, share

    return sorted(subject.run.streams, key=order)


# ---- configuration


def configuration(subject: Subject) -> list[tuple[str, str]]:
    """Return the settings, the optimizer and the versions, a name and a value each."""
    meta, found = subject.run.meta, subject.found
    rows: list[tuple[str, str]] = []
    for name, options in (found.facts.run.optimizers or {}).items():
        given = {"lr": 0.0, **options}  # what is 0 is left out there
        said = ", ".join(f"{key} {_plain(value)}" for key, value in given.items())
        rows.append((f"optimizer, {name}", said))
    for path, facts in list(found.facts.modules.items())[:8]:
        if facts.T is not None:
            batch = "" if facts.B is None else f", {facts.B} sequences"
            dtype = f", {facts.dtype}" if facts.dtype else ""
            rows.append(
                (f"input of {path or 'the model'}", f"{facts.T} steps{batch}{dtype}")
            )
    rows += [
        (f"gradwatch, {k}", _plain(v)) for k, v in meta.get("settings", {}).items()
    ]
    rows += [(f"version, {k}", _plain(v)) for k, v in meta.get("versions", {}).items()]
    if isinstance(started := meta.get("started"), int | float):
        rows.append(("started", _date(started)))
    rows.append(("run folder", name_of_folder(subject.run)))
    return rows


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "at no time that can be told"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_plain, value)) + ")"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def glossary(subject: Subject) -> list[tuple[str, str]]:
    """Return what the metrics mean that the run has, a name and a meaning each."""
    names = {label(key).partition(" ")[0] for key in subject.found.series}
    return [(m.name, m.meaning) for m in METRICS.values() if m.name in names]


# ---- two runs


def differences(one: Subject, two: Subject) -> list[tuple[str, str, str]]:
    """Return what is set otherwise in two runs: a name and both values."""
    left, right = dict(configuration(one)), dict(configuration(two))
    names = [*left, *(name for name in right if name not in left)]
    return [
        (name, left.get(name, "-"), right.get(name, "-"))
        for name in names
        if left.get(name) != right.get(name) and name not in ("started", "run folder")
    ]


def shared_keys(one: Subject, two: Subject) -> list[str]:
    """Return the metrics that two runs are compared by."""
    wanted = [f"gradwatch/{metric}" for metric in ("loss", "grad_norm")]
    names = {s.name for s in two.run.streams}
    for stream in [s for s in worst_first(one) if s.name in names][:2]:
        wanted += [
            f"{base(stream.name)}/{m}" for m in ("horizon", "rho", "update_ratio")
        ]
    return [
        key
        for key in wanted
        if len(one.found.of(key).finite().steps)
        and len(two.found.of(key).finite().steps)
    ]
