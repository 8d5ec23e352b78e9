"""Records as charts: Altair, imported when a chart is drawn.

A chart is returned, never shown: ``chart.save("flow.svg")`` or ``.html``, or the last
line of a notebook cell. Under each chart is a plain function that gives its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from gradwatch.metrics import PREFIX
from gradwatch.record import StepRecord

if TYPE_CHECKING:
    import altair

_ROWS: Final = 60
"""Most training steps that one chart shows, spread evenly."""
_FLOOR: Final = -12.0
"""Decades below a step's largest value at which the colours end."""


def flow(records: Iterable[StepRecord], stream: str | None = None) -> altair.LayerChart:
    """Draw how much gradient reaches each time step, over the training.

    Time goes to the right, training upwards; the colour is the norm of dL/dh_t over
    the largest of its training step, in decades; a mark shows how far back the last
    step that the loss reads still reaches (its horizon). The title is what was found.

    Args:
        records: Such as ``watch.records``, or those of ``gradwatch.load(folder)``.
        stream: Name of the stream, such as ``rnn.l0``; the first one that has a profile
            if left out.

    Returns:
        The chart.

    Raises:
        ModuleNotFoundError: If altair is not installed.
        ValueError: If no record holds a profile of the stream.

    Example:
        >>> import gradwatch
        >>> gradwatch.plot.flow(watch.records).save("flow.svg")  # doctest: +SKIP
    """
    try:
        import altair as alt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Charts need altair: pip install 'gradwatch[plot]'."
        ) from error
    cells, marks, title = flow_points(records, stream)
    time = alt.X("time:O", title="time step of the sequence", axis=_sparse(cells))
    step = alt.Y("step:O", title="training step", sort="descending")
    heat = (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=time,
            y=step,
            color=alt.Color(
                "decades:Q",
                title="log10 of its largest",
                scale=alt.Scale(scheme="viridis", domain=[_FLOOR, 0]),
            ),
            tooltip=["step:O", "time:O", "decades:Q"],
        )
    )
    reach = (
        alt.Chart(alt.Data(values=marks))
        .mark_point(shape="triangle-left", filled=True, size=40, color="#d55e00")
        .encode(x=time, y=step, tooltip=["step:O", "horizon:Q"])
    )
    chart = alt.LayerChart(layer=[heat, reach])
    return chart.properties(width=480, height=300, title=title)


def _sparse(cells: Sequence[dict[str, Any]]) -> Any:
    """Return an axis with at most about ten labels."""
    import altair as alt

    last = max(cell["time"] for cell in cells)
    every = max(1, math.ceil((last + 1) / 10))
    return alt.Axis(values=list(range(0, last + 1, every)), labelAngle=0)


def flow_points(
    records: Iterable[StepRecord], stream: str | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Return the numbers of :func:`flow`.

    Args:
        records: Of a run.
        stream: Name of the stream, or None for the first that has a profile.

    Returns:
        The cells of the heat map (``step``, ``time``, ``decades``), the marks of the
        horizon (``step``, ``time``, ``horizon``), and what was found, in words.

    Raises:
        ValueError: If no record holds a profile of the stream.
    """
    kept = [record for record in records if record.profiles]
    known = sorted(
        {k for r in kept for k in r.profiles if k.endswith("/adjoint")},
    )
    key = known[0] if known and stream is None else _key(stream)
    shown = [record for record in kept if key in record.profiles]
    if not shown:
        names = ", ".join(_name(k) for k in known) or "none"
        raise ValueError(
            f"no record holds the flow of {stream or 'any stream'}; there are: {names}."
            " It is measured every 100 steps; watch.probe_now() asks for it at once."
        )
    length = len(shown[-1].profiles[key])
    shown = [r for r in shown if len(r.profiles[key]) == length]
    every = math.ceil(len(shown) / _ROWS)
    shown = shown[::-1][::every][::-1]
    cells, marks = [], []
    base = key.removesuffix("adjoint")
    for record in shown:
        profile = record.profiles[key]
        largest = max(profile)
        for time, value in enumerate(profile):
            share = value / largest if largest > 0 else 0.0
            decades = max(math.log10(share), _FLOOR) if share > 0 else _FLOOR
            cells.append(
                {"step": record.step, "time": time, "decades": round(decades, 3)}
            )
        horizon = record.metrics.get(base + "horizon")
        if horizon is not None:
            at = max(round(length - 1 - horizon), 0)
            marks.append({"step": record.step, "time": at, "horizon": horizon})
    title = f"{_name(key)}: gradients through time"
    if marks:
        reached = marks[-1]["horizon"]
        title = (
            f"{_name(key)}: gradients reach {reached:.0f} of {length} time steps back"
        )
    return cells, marks, title


def _key(stream: str | None) -> str:
    return f"{PREFIX}/{(stream or '').replace('.', '/')}/adjoint"


def _name(key: str) -> str:
    return key.removeprefix(f"{PREFIX}/").removesuffix("/adjoint").replace("/", ".")
