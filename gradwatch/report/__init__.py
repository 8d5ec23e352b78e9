"""A run as one page: a file of HTML that needs no network, and no other file.

``content`` says what is on it, ``drawing`` draws its charts, ``page.html`` lays it out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from gradwatch._version import __version__
from gradwatch.plot import charts, panels
from gradwatch.plot.columns import Series, base, counted, span
from gradwatch.plot.numbers import (
    Dependence,
    compare_title,
    decades,
    dependence_points,
    flow_points,
    gates_title,
    incident_points,
    name_of,
    rho_title,
    shares,
    stream_with,
    streams_of_flows,
    timeline_title,
    updates_title,
)
from gradwatch.record import Stream, printable
from gradwatch.report import content
from gradwatch.report.cards import Card, incident_cards
from gradwatch.report.content import Subject, name_of_folder
from gradwatch.report.drawing import renderer, safe, svg
from gradwatch.report.trust import trust
from gradwatch.runs import Run

FILE: Final = "report.html"
MARK: Final = b'<meta name="generator" content="gradwatch'
"""What every report has in its first lines: only such a file is replaced."""
_HEAD: Final = 1000
LIMIT: Final = 1_450_000
"""Bytes of a page, at most."""
_LONGEST: Final = 2000
"""Characters of one text, at most: the run folder has all of it."""
SMALL: Final = 250
"""Width of the chart of one metric of a stream, in pixels."""

Say = Callable[[str], None]


class Detail(NamedTuple):
    """How much is drawn.

    Attributes:
        streams: Streams whose metrics are drawn; the others are in the table.
        pointed: As many streams, at most, have numbers to point at in their charts.
        flows: Streams whose flow is drawn.
        cards: Incidents with a chart.
        texts: Whether any chart has numbers to point at.
    """

    streams: int
    pointed: int
    flows: int
    cards: int
    texts: bool = True


DETAILS: Final = (
    Detail(20, 4, 3, 12),
    Detail(12, 0, 2, 6),
    Detail(5, 0, 1, 3),
    Detail(5, 0, 1, 3, texts=False),
)
"""From the first on, the first one that keeps the page below its limit."""


@dataclass(frozen=True)
class Figure:
    """A drawn chart, and what it shows, in a sentence."""

    title: str
    svg: str


@dataclass(frozen=True)
class Memory:
    """What each state depends on: the matrix, and its numbers to point at."""

    figure: Figure
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """All that a page says of one run.

    Attributes:
        subject: The run.
        timeline: Its first figure.
        cards: Incidents, each with its figure or None.
        streams: Of each stream that is drawn: its name, and its figures.
        flows: The gradient by training step and time step.
        memories: What states depend on.
    """

    subject: Subject
    timeline: Figure
    cards: Sequence[tuple[Card, Figure | None]]
    streams: Sequence[tuple[str, Sequence[Figure]]]
    flows: Sequence[Figure]
    memories: Sequence[Memory]


@dataclass
class _Artist:
    """Draws charts, and numbers them."""

    say: Say
    drawn: int = field(default=0)
    texts: bool = True

    def draw(self, spec: panels.Spec, title: str, *, pointed: bool = True) -> Figure:
        """Return a chart as a figure.

        Args:
            spec: The chart.
            title: Its title.
            pointed: Whether it has numbers to point at, if any chart has.
        """
        self.drawn += 1
        self.say(f"drawing chart {self.drawn}")
        texts = self.texts and pointed
        shown = spec if texts else panels.bare(spec)
        return Figure(title, svg(shown, title, f"c{self.drawn}", texts=texts))


def report(runs: Sequence[Run], *, say: Say = lambda line: None) -> str:
    """Return one run, or two side by side, as a page.

    Args:
        runs: One or two.
        say: Told what is being done.

    Raises:
        ValueError: If there are no runs, or more than two.
        ModuleNotFoundError: If what draws the charts is not installed.
    """
    if len(runs) not in (1, 2):
        raise ValueError(f"a report is of one run or two; there are {len(runs)}.")
    renderer()
    artist = _Artist(say)
    called = _names([name_of_folder(run) for run in runs])
    say("sorting the records")
    subjects = [Subject.of(run, name) for run, name in zip(runs, called, strict=True)]
    for detail in DETAILS:
        artist.texts = detail.texts
        beside = _beside(subjects, artist) if len(subjects) == 2 else []
        sections = [_section(subject, artist, detail) for subject in subjects]
        say("laying out the page")
        page = _page(sections, beside)
        if len(page.encode()) <= LIMIT:
            break
    return page


def _names(names: Sequence[str]) -> list[str]:
    """Return names that differ."""
    if len(set(names)) == len(names):
        return list(names)
    return [f"{name} ({n})" for n, name in enumerate(names, 1)]


def save(
    runs: Sequence[Run],
    path: str | os.PathLike[str] | None = None,
    *,
    say: Say = lambda line: None,
) -> Path:
    """Write a report into a file.

    Args:
        runs: One or two.
        path: The file; None: ``report.html`` in the first run's folder. A report that
            is there is replaced, any other file is not.
        say: Told what is being done.

    Returns:
        The file.

    Raises:
        FileExistsError: If there is a file that is no report.
        ModuleNotFoundError: If what draws the charts is not installed.
        OSError: If the file cannot be written.
    """
    target = runs[0].dir / FILE if path is None else Path(path)
    if target.is_dir():
        raise FileExistsError(
            f"{target} is a folder; pass the file, such as {target / 'page.html'}."
        )
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{target} is no file; pass one, such as page.html.")
    if target.exists() and MARK not in _head(target):
        raise FileExistsError(
            f"{target} is there and is no report of gradwatch; pass another file."
        )
    text = report(runs, say=say)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:  # whole, or not at all: an old page outlives a disk that is full
        beside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


# ---- the figures


def _section(subject: Subject, artist: _Artist, detail: Detail) -> Section:
    found, told = subject.found, subject.incidents
    return Section(
        subject=subject,
        timeline=artist.draw(charts.timeline(found, told), timeline_title(found, told)),
        cards=[
            (card, _of_card(subject, card, artist) if n < detail.cards else None)
            for n, card in enumerate(incident_cards(subject))
        ],
        streams=list(_streams(subject, artist, detail)),
        flows=list(_flows(subject, artist, detail)),
        memories=list(_memories(subject, artist, detail)),
    )


def _of_card(subject: Subject, card: Card, artist: _Artist) -> Figure | None:
    try:
        shown = incident_points(subject.found, card.incident)
    except ValueError:  # nothing of its evidence is a line
        return None
    return artist.draw(charts.incident(shown, card.incident), shown.title)


def _streams(
    subject: Subject, artist: _Artist, detail: Detail
) -> Iterator[tuple[str, Sequence[Figure]]]:
    drawn = content.worst_first(subject)[: detail.streams]
    pointed = len(drawn) <= detail.pointed
    for stream in drawn:
        figures = [
            artist.draw(spec, title, pointed=pointed)
            for spec, title in _charts_of(subject, stream)
        ]
        if figures:
            yield stream.name, figures


def _charts_of(subject: Subject, stream: Stream) -> Iterator[tuple[panels.Spec, str]]:
    found, name = subject.found, stream.name
    if len((horizon := found.stream(name, "horizon")).finite().steps):
        length = content.length_of(found, stream)
        of = f" of {length} time steps back" if length else " time steps back"
        title = f"gradients reach {span(horizon)}{of}"
        yield charts.horizon(found, name, length, SMALL), title
    if len(found.stream(name, "rho").finite().steps):
        title = _without_name(rho_title(found, name), name)
        yield charts.rho(found, name, SMALL), title
    if named := _most(shares(found, name)):
        title = _without_name(gates_title(found, name), name)
        yield charts.gates(found, named, SMALL), title
    if len(found.stream(name, "update_ratio").finite().steps):
        title = _without_name(updates_title(found, name), name)
        yield charts.updates(found, name, SMALL), title


def _without_name(title: str, name: str) -> str:
    return title.removeprefix(f"{name}: ")


def _most(named: Mapping[str, Series], most: int = 4) -> dict[str, Series]:
    """Return the lines with the largest values, in their order."""
    tops = {
        n: s.finite().values.max() for n, s in named.items() if len(s.finite().steps)
    }
    kept = sorted(tops, key=lambda name: -tops[name])[:most]
    return {name: series for name, series in named.items() if name in kept}


def _with_flows(subject: Subject, detail: Detail) -> list[str]:
    """Return the streams whose flow is drawn, the worst first."""
    known = streams_of_flows(subject.found)
    names = [s.name for s in content.worst_first(subject) if base(s.name) in known]
    return (names or [*map(name_of, known)])[: detail.flows]


def _flows(subject: Subject, artist: _Artist, detail: Detail) -> Iterator[Figure]:
    for name in _with_flows(subject, detail):
        cells, marks, title = flow_points(subject.found, name)
        key = stream_with(subject.found, name, "flow")
        yield artist.draw(charts.flow_of(subject.found, key, cells, marks), title)


def _memories(subject: Subject, artist: _Artist, detail: Detail) -> Iterator[Memory]:
    for name in _with_flows(subject, detail):
        try:
            shown = dependence_points(subject.found, name)
        except ValueError:  # it is not measured at every look
            continue
        reach = shown.reach(len(shown.seeds) - 1)
        title = (
            f"{name}, training step {shown.step}: the last state depends on "
            f"{reach + 1} of {shown.length} time steps"
        )
        figure = artist.draw(charts.dependence(shown), title)
        yield Memory(figure, _pointed(shown))


def _pointed(shown: Dependence) -> dict[str, Any]:
    """Return the numbers that the page shows when a time step is pointed at."""
    rows = []
    for place, (seed, norms) in enumerate(zip(shown.seeds, shown.norms, strict=True)):
        largest = max(norms)
        values = [10**power for power in decades(norms, largest)]
        reach = shown.reach(place)
        text = f"The state at step {seed} depends on {_steps_up_to(reach, seed)}."
        shares = [float(f"{value:.2e}") for value in values]
        rows.append({"seed": seed, "values": shares, "text": text})
    return {"length": shown.length, "rows": rows}


def _steps_up_to(reach: int, seed: int) -> str:
    """Return on how many steps the state of a seed depends, in words."""
    if reach >= seed:
        return f"all {seed + 1} steps up to it" if seed else "its own step"
    less = "has less than a thousandth of the largest influence"
    before = f"what lies before step {seed - reach} {less}"
    return f"{counted(reach + 1, 'step')} up to it; {before}"


def _beside(subjects: Sequence[Subject], artist: _Artist) -> list[Figure]:
    runs = {subject.name: subject.found for subject in subjects}
    return [
        artist.draw(charts.compare(runs, key), compare_title(runs, key))
        for key in content.shared_keys(*subjects)
    ]


# ---- the page


def _page(sections: Sequence[Section], beside: Sequence[Figure]) -> str:
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    files = resources.files("gradwatch").joinpath("report")
    script = files.joinpath("page.js").read_text("utf-8")
    style = files.joinpath("style.css").read_text("utf-8")
    template = files.joinpath("page.html").read_text("utf-8")
    environment = Environment(
        loader=DictLoader({"page": template}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    digest = hashlib.sha256(script.encode()).digest()
    return environment.get_template("page").render(
        sections=sections,
        beside=beside,
        content=content,
        glossary=dict(row for one in sections for row in content.glossary(one.subject)),
        trust=trust,
        version=__version__,
        script=Markup(script),  # ours, from the package
        style=Markup(style),
        script_hash=base64.b64encode(digest).decode(),
        drawn=Markup,  # what drawing.svg returned: it has kept shapes and text alone
        data=lambda value: Markup(_json(value)),
    )


def _shown(value: Any) -> Any:
    """Return a value as the page may show it: printable, and not too long."""
    if type(value) is not str:
        return value
    text = printable(value, lines=True)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _json(value: Any) -> str:
    """Return plain values as JSON that cannot end the element that it stands in."""
    text = json.dumps(safe(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
