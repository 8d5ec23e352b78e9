"""The charts of a run, in Vega-Lite's own words: plain dicts, made of its numbers.

``gradwatch.plot`` returns them as Altair charts, the report and W&B draw them without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gradwatch.plot.columns import Columns, Row, Series, label, number, wide
from gradwatch.plot.numbers import FLOOR, Around, Dependence, decades, lanes, padded
from gradwatch.plot.panels import (
    FAINT,
    SEVERITIES,
    SEVERITY_COLOURS,
    SEVERITY_SHAPES,
    WIDTH,
    Spec,
    data,
    lines,
    rule,
    steps_axis,
)
from gradwatch.record import Incident


def timeline(found: Columns, incidents: Sequence[Incident]) -> Spec:
    """Return loss, rate, gradient norms and incidents over a shared step axis."""
    axis = steps_axis(found.first, found.last, None)
    panels: list[tuple[str, dict[str, Series], int]] = []
    if len((loss := found.run("loss")).steps):
        shown = {"loss": loss}
        if len((constant := found.run("loss_constant")).steps):
            shown["the best constant"] = constant
        panels.append(("loss", shown, 110))
    norms = {
        "before clipping": found.run("grad_norm"),
        "after clipping": found.run("grad_norm_clipped"),
    }
    ratio = found.run("clip_ratio").finite().values
    if not (len(ratio) and ratio.min() < 1):
        norms.pop("after clipping")
    panels.append(("gradient norm", norms, 90))
    rates = {name: _held(rate, found.looked) for name, rate in found.rates.items()}
    if rates:
        panels.append(("rate", rates, 45))
    rows = [
        lines(named, title, steps=axis, height=height, stairs=named is rates)
        for title, named, height in panels
        if any(len(series.steps) for series in named.values())
    ]
    if incidents:
        rows.append(_lanes(found, incidents))
    rows = [*rows[:-1], _with_axis_title(rows[-1])] if rows else [_empty()]
    return {
        "vconcat": rows,
        "spacing": 22,
        "resolve": {
            "legend": dict.fromkeys(("color", "shape", "strokeDash"), "independent"),
            "scale": dict.fromkeys(("color", "shape", "strokeDash"), "independent"),
        },
    }


def _held(rate: Series, last: int) -> Series:
    """Return a rate that holds until the last look."""
    if not len(rate.steps) or rate.steps[-1] >= last:
        return rate
    return Series(np.append(rate.steps, last), np.append(rate.values, rate.values[-1]))


def _empty() -> Spec:
    """Return a panel that says that there is nothing to draw."""
    return {
        "width": WIDTH,
        "height": 30,
        "data": data([{"text": "nothing was measured"}]),
        "mark": {"type": "text", "color": FAINT},
        "encoding": {"text": {"field": "text"}},
    }


def _with_axis_title(panel: Spec) -> Spec:
    """Return the lowest panel, whose axis of steps has a title."""
    layers = []
    for layer in panel["layer"]:
        encoding = dict(layer["encoding"])
        if "x" in encoding and encoding["x"].get("field") in ("step", "since"):
            encoding["x"] = {**encoding["x"], "title": "training step"}
        layers.append({**layer, "encoding": encoding})
    return {**panel, "layer": layers}


def _lanes(found: Columns, incidents: Sequence[Incident]) -> Spec:
    """Return a bar for each incident, with the sign of its severity at its start."""
    rows = lanes(incidents, found.last)
    x = {**steps_axis(found.first, found.last, None), "field": "since"}
    y = {
        "field": "lane",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": 150, "domain": False, "ticks": False},
    }
    names = list(SEVERITIES)
    colour: Spec = {
        "field": "severity",
        "type": "nominal",
        "scale": {"domain": names, "range": list(SEVERITY_COLOURS)},
        "legend": {"title": None, "orient": "top"},
    }
    shape = {**colour, "scale": {"domain": names, "range": list(SEVERITY_SHAPES)}}
    shared: Spec = {"x": x, "y": y, "color": colour, "description": {"field": "text"}}
    silent = {**shared, "color": {**colour, "legend": None}, "x2": {"field": "until"}}
    return {
        "width": WIDTH,
        "height": {"step": 17},
        "data": data(rows),
        "layer": [
            {
                "mark": {"type": "bar", "height": 6, "opacity": 0.55, "clip": True},
                "encoding": silent,
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {**shared, "shape": shape},
            },
        ],
    }


def _decades(title: str) -> Spec:
    return {
        "field": "decades",
        "type": "quantitative",
        "scale": {"scheme": "viridis", "domain": [FLOOR, 0]},
        "legend": {
            "title": title,
            "titleLimit": 400,
            "orient": "top",
            "direction": "horizontal",
            "gradientLength": 160,
            "values": [-12, -9, -6, -3, 0],
        },
    }


def flow(
    cells: Sequence[Row], marks: Sequence[Row], padding: float | None = None
) -> Spec:
    """Return the heat map of the gradient by training step and time step.

    Args:
        cells: As :func:`gradwatch.plot.numbers.flow_points` returns them.
        marks: The same.
        padding: Share of the input, at its end, that is padding; None for none.
    """
    length = max(cell["back"] for cell in cells)
    said = [
        {
            **cell,
            "text": f"step {cell['step']}, {cell['to']:.0f} steps back: "
            f"10^{cell['decades']:.1f} of the largest",
        }
        for cell in cells
    ]
    x: Spec = {
        "field": "back",
        "type": "quantitative",
        "title": "time steps back from the end of the sequence",
        "scale": {"domain": [0, length], "reverse": True, "nice": False},
        "axis": {"grid": False, "tickCount": 10, "format": "d"},
    }
    bounds = [cells[0]["step"], cells[-1]["until"]]
    y: Spec = {
        "field": "step",
        "type": "quantitative",
        "title": "training step",
        "scale": {"domain": bounds, "nice": False},
        "axis": {"grid": False, "format": "d", "tickCount": 6},
    }
    layers: list[Spec] = [
        {
            "data": data(said),
            "mark": {"type": "rect", "clip": True},
            "encoding": {
                "x": x,
                "x2": {"field": "to"},
                "y": y,
                "y2": {"field": "until"},
                "color": _decades("decades below the largest"),
                "description": {"field": "text"},
            },
        },
        {
            "data": data(
                {**mark, "text": f"step {mark['step']}: horizon {mark['horizon']:.0f}"}
                for mark in marks
            ),
            "mark": {
                "type": "point",
                "shape": "triangle-left",
                "filled": True,
                "size": 45,
                "color": "#ffffff",
                "stroke": "#000000",
                "strokeWidth": 0.7,
                "opacity": 1,
            },
            "encoding": {
                "x": x,
                "y": {**y, "field": "y"},
                "description": {"field": "text"},
            },
        },
    ]
    if padding:
        layers += _padding(padding * length, padding)
    return {"width": WIDTH - 60, "height": 240, "layer": layers}


def _padding(back: float, share: float) -> list[Spec]:
    """Mark where padding begins: no gradient there is no vanishing."""
    text = f"padding from here on: the last {share:.0%} of the input, on average"
    rows = [{"back": back, "text": text}]
    x = {"field": "back", "type": "quantitative"}
    mark: Spec = {"color": "#ffffff", "clip": True}
    return [
        {
            "data": data(rows),
            "mark": {**mark, "type": "rule", "strokeDash": [4, 3]},
            "encoding": {"x": x},
        },
        {
            "data": data(rows),
            "mark": {**mark, "type": "text", "align": "right", "dx": -4},
            "encoding": {"x": x, "y": {"value": 10}, "text": {"field": "text"}},
        },
    ]


def flow_of(
    found: Columns, key: str, cells: Sequence[Row], marks: Sequence[Row]
) -> Spec:
    """Return the heat map of a stream, with where its padding begins."""
    return flow(cells, marks, padded(found, key))


def dependence(shown: Dependence) -> Spec:
    """Return the matrix: by how much each state depends on each earlier time step."""
    cells: list[Row] = []
    for i, (seed, norms) in enumerate(zip(shown.seeds, shown.norms, strict=True)):
        before = shown.seeds[i - 1] + 1 if i else 0
        for j, value in enumerate(decades(norms, max(norms))):
            begin = j * shown.bin
            if begin > seed:
                continue
            place = {"time": begin, "end": min(begin + shown.bin, shown.length)}
            text = f"state {seed} on step {begin:.0f}: 10^{value:.1f}"
            cells.append(
                {
                    **place,
                    "seed": before,
                    "until": seed + 1,
                    "decades": value,
                    "text": text,
                }
            )
    x: Spec = {
        "field": "time",
        "type": "quantitative",
        "title": "depends on time step",
        "scale": {"domain": [0, shown.length], "nice": False},
        "axis": {"grid": False, "format": "d", "tickCount": 10},
    }
    y = {
        **x,
        "field": "seed",
        "title": "the state at time step",
        "scale": {"domain": [0, shown.length], "reverse": True, "nice": False},
    }
    return {
        "width": WIDTH - 60,
        "height": 220,
        "data": data(cells),
        "mark": {"type": "rect", "clip": True},
        "encoding": {
            "x": x,
            "x2": {"field": "end"},
            "y": y,
            "y2": {"field": "until"},
            "color": _decades("decades below the largest"),
            "description": {"field": "text"},
        },
    }


def rho(found: Columns, stream: str, width: int = WIDTH) -> Spec:
    """Return the spectral radius, and below it what one update changes of it."""
    axis = steps_axis(found.first, found.last, None)
    shown = {"rho": found.stream(stream, "rho")}
    radius = lines(shown, "rho", steps=axis, width=width, log=False)
    drift = {"drift": found.stream(stream, "rho_drift")}
    below = lines(drift, "drift a step", steps=axis, width=width, height=60, log=False)
    return {"vconcat": [radius, _with_axis_title(below)], "spacing": 20}


def gates(found: Columns, named: Mapping[str, Series], width: int = WIDTH) -> Spec:
    """Return shares of gate values, or of units, at an end of their range."""
    axis = steps_axis(found.first, found.last)
    return lines(named, "share", steps=axis, width=width, fraction=True)


def updates(found: Columns, stream: str, width: int = WIDTH) -> Spec:
    """Return by how much of its norm W_hh changes a step."""
    axis = steps_axis(found.first, found.last)
    shown = {"update": found.stream(stream, "update_ratio")}
    return lines(shown, "relative change", steps=axis, width=width)


def horizon(found: Columns, stream: str, length: int | None, width: int) -> Spec:
    """Return how far back gradients reach, of how many time steps."""
    axis = steps_axis(found.first, found.last)
    shown = {"horizon": found.stream(stream, "horizon")}
    beside = [float(length)] if length else []
    panel = lines(
        shown, "steps back", steps=axis, width=width, log=False, beside=beside
    )
    if length:
        panel["layer"] += rule(float(length), f"all {length}")
    return panel


def incident(shown: Around, happened: Incident) -> Spec:
    """Return a number around an incident: its threshold, its start and its end."""
    first, last = int(shown.series.steps[0]), int(shown.series.steps[-1])
    axis = steps_axis(first, last)
    beside = [] if shown.threshold is None else [shown.threshold]
    panel = lines({"": shown.series}, label(shown.key), steps=axis, beside=beside)
    logarithmic = wide([shown.series])
    if shown.threshold is not None and not (logarithmic and shown.threshold <= 0):
        panel["layer"] += rule(shown.threshold, f"threshold {number(shown.threshold)}")
    ends = [{"step": happened.since, "text": f"since step {happened.since}"}]
    if happened.until is not None:
        ends.append({"step": happened.until, "text": f"over at {happened.until}"})
    x = {"field": "step", "type": "quantitative"}
    mark: Spec = {"color": SEVERITY_COLOURS[0], "clip": True}
    panel["layer"] += [
        {"data": data(ends), "mark": {**mark, "type": "rule"}, "encoding": {"x": x}},
        {
            "data": data(ends),
            "mark": {**mark, "type": "text", "align": "left", "dx": 4},
            "encoding": {"x": x, "y": {"value": 8}, "text": {"field": "text"}},
        },
    ]
    return panel


def compare(runs: Mapping[str, Columns], key: str) -> Spec:
    """Return one metric of several runs."""
    first = min((run.first for run in runs.values()), default=0)
    last = max((run.last for run in runs.values()), default=0)
    named = {name: run.of(key) for name, run in runs.items()}
    return lines(named, label(key), steps=steps_axis(first, last), height=130)
