"""What the charts are put together of: axes, lines, thresholds, and their looks.

All in Vega-Lite's own words: plain dicts. Text comes from users: it is given as values,
never as an expression.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from gradwatch.plot.columns import Row, Series, broken, line, number, wide

Spec = dict[str, Any]

INK: Final = "#1b1f24"
FAINT: Final = "#667079"
GRID: Final = "#dfe3e7"
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, safe for the colour-blind; each line has a dash of its own, too."""
DASHES: Final = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4], [1, 3])
SEVERITIES: Final = ("error", "warning", "notice")
SEVERITY_COLOURS: Final = ("#d55e00", "#e69f00", "#0072b2")
SEVERITY_SHAPES: Final = ("cross", "triangle-up", "circle")
WIDTH: Final = 640

_CONFIG: Final[Spec] = {
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "labelColor": FAINT,
        "titleColor": FAINT,
        "titleFontWeight": "normal",
        "gridColor": GRID,
        "domainColor": GRID,
        "tickColor": GRID,
        "labelFlush": True,
    },
    "axisY": {"titleAngle": 0, "titleAlign": "left", "titleY": -7, "titleX": 0},
    "legend": {"labelColor": INK, "titleColor": FAINT, "titleFontWeight": "normal"},
    "title": {"color": INK, "anchor": "start", "fontSize": 13, "frame": "group"},
}


def whole(chart: Spec, title: str) -> Spec:
    """Return a chart that stands by itself: with its title and its looks."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {"text": title},
        "config": _CONFIG,
        **chart,
    }


def bare(spec: Spec) -> Spec:
    """Return a chart without the marks that are there to be pointed at."""
    kept = dict(spec)
    for part in ("layer", "vconcat"):
        if part in spec:
            kept[part] = [bare(one) for one in spec[part] if not _unseen(one)]
    return kept


def _unseen(layer: Spec) -> bool:
    mark = layer.get("mark")
    return isinstance(mark, dict) and mark.get("opacity") == 0


def data(rows: Iterable[Row]) -> Spec:
    """Return rows as the data of a layer."""
    return {"values": list(rows)}


def steps_axis(first: int, last: int, title: str | None = "training step") -> Spec:
    """Return the horizontal axis of training steps, from the first to the last."""
    return {
        "field": "step",
        "type": "quantitative",
        "title": title,
        "scale": {"domain": [first, max(last, first + 1)], "nice": False},
        "axis": {"format": "d", "tickCount": 8, "grid": False},
    }


def _value(
    title: str,
    values: Sequence[float],
    beside: Sequence[float],
    *,
    log: bool,
    fraction: bool,
) -> Spec:
    scale: Spec = {"zero": False}
    axis: Spec = {"tickCount": 4, "format": ".3~g"}
    if log:
        powers = _powers(values)
        scale = {"type": "log"}
        axis = {"values": powers, "format": ".0e"}
    elif fraction:
        scale = {"domain": [0, 1]}
    elif values and min(values) == max(values):  # one value: it stands in the middle
        top = values[0]
        ends = (0.0, 2 * top, *beside)
        scale = {"domain": [min(ends), max(ends)] if any(ends) else [-1, 1]}
        axis["values"] = [top]
    return {
        "field": "value",
        "type": "quantitative",
        "title": title,
        "scale": scale,
        "axis": axis,
    }


def _powers(values: Sequence[float]) -> list[float]:
    """Return at most five powers of ten among values, or next to them."""
    if not values:
        return []
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    every = max(math.ceil((high - low) / 4), 1)
    return [10.0**power for power in range(low, high + 1, every)]


def lines(
    named: Mapping[str, Series],
    title: str,
    *,
    steps: Spec,
    height: int = 110,
    width: int = WIDTH,
    stairs: bool = False,
    fraction: bool = False,
    log: bool | None = None,
    beside: Sequence[float] = (),
) -> Spec:
    """Return a panel of lines, told apart by colour and dash.

    Args:
        named: What each is called, and its values.
        title: Of the vertical axis.
        steps: The horizontal one.
        height: Of the panel, in pixels.
        width: The same.
        stairs: Whether a value holds until the next one.
        fraction: Whether the axis goes from 0 to 1.
        log: Whether it is logarithmic; None: where the values ask for it.
        beside: Other values that are shown, such as a threshold.
    """
    several = len(named) > 1
    rows = [row for name, series in named.items() for row in line(series, name)]
    logarithmic = wide(list(named.values())) if log is None else log
    if logarithmic:
        rows = [row for row in rows if row["value"] > 0]
    for row in rows:
        own = f"{row['line']} " if several else ""
        row["text"] = f"step {row['step']}: {own}{number(row['value'])}"
    names, values = list(named), [row["value"] for row in rows]
    encoding: Spec = {
        "x": steps,
        "y": _value(title, values, beside, log=logarithmic, fraction=fraction),
        "color": {"value": COLOURS[0]},
    }
    if several:
        encoding["color"] = {
            "field": "line",
            "type": "nominal",
            "scale": {"domain": names, "range": list(_cycled(COLOURS, len(names)))},
            "legend": {"title": None, "orient": "top", "symbolType": "stroke"},
        }
        encoding["strokeDash"] = {
            "field": "line",
            "type": "nominal",
            "scale": {"domain": names, "range": list(_cycled(DASHES, len(names)))},
            "legend": {"title": None, "orient": "top"},
        }
    hover: Spec = {**encoding, "description": {"field": "text"}}
    hover.pop("strokeDash", None)
    stroke: Spec = {"type": "line", "strokeWidth": 1.6, "clip": True, "aria": False}
    layers: list[Spec] = [
        {
            "data": data(rows),
            "mark": {**stroke, **({"interpolate": "step-after"} if stairs else {})},
            "encoding": encoding,
        },
        {
            "data": data(rows),
            "mark": {"type": "square", "opacity": 0, "size": 90},
            "encoding": hover,
        },
    ]
    odd = [row for series in named.values() for row in broken(series)]
    if odd:
        layers += _crosses(odd, steps)
    return {"width": width, "height": height, "layer": layers}


def _cycled(values: Sequence[Any], count: int) -> list[Any]:
    return [values[i % len(values)] for i in range(count)]


def _crosses(rows: list[Row], steps: Spec) -> list[Spec]:
    """Mark the steps at which a value is not finite, at the top."""
    said = [{**row, "text": f"step {row['step']}: not finite"} for row in rows]
    colour = {"color": SEVERITY_COLOURS[0]}
    mark: Spec = {"type": "point", "shape": "cross", "filled": True, "size": 70}
    where: Spec = {"x": steps, "y": {"value": 6}}
    label: Spec = {"type": "text", "align": "left", "baseline": "top", "dy": 6}
    return [
        {
            "data": data(said),
            "mark": {**mark, **colour},
            "encoding": {**where, "description": {"field": "text"}},
        },
        {
            "data": data([{**rows[0], "text": "not finite"}]),
            "mark": {**label, **colour},
            "encoding": {**where, "text": {"field": "text"}},
        },
    ]


def rule(at: float, text: str) -> list[Spec]:
    """Return a horizontal line, such as a threshold, with its name."""
    row = [{"value": at, "text": text}]
    height = {"field": "value", "type": "quantitative"}
    return [
        {
            "data": data(row),
            "mark": {"type": "rule", "color": FAINT, "strokeDash": [5, 3]},
            "encoding": {"y": height},
        },
        {
            "data": data(row),
            "mark": {
                "type": "text",
                "align": "right",
                "baseline": "bottom",
                "dy": -2,
                "color": FAINT,
            },
            "encoding": {
                "x": {"value": {"expr": "width"}},
                "y": height,
                "text": {"field": "text"},
            },
        },
    ]
