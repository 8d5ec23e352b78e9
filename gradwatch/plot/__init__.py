"""Records as charts: Altair, imported when a chart is drawn.

A chart is returned, never shown: ``chart.save("flow.svg")``, ``.png``, or ``.html``
with ``inline=True`` (else the page asks the network for Vega), or the last line of a
notebook cell. Its title is what was found. The numbers under a chart are plain values:
``flow_points``, ``dependence_points``, ``incident_points``, and :class:`Columns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from gradwatch.metrics import run_key
from gradwatch.plot import charts, panels
from gradwatch.plot.columns import Columns, as_columns, base, columns
from gradwatch.plot.numbers import (
    compare_title,
    dependence_points,
    flow_points,
    gates_title,
    incident_points,
    ordered,
    rho_title,
    shares,
    stream_with,
    timeline_title,
    updates_title,
)
from gradwatch.record import Incident, StepRecord

if TYPE_CHECKING:
    import altair

__all__ = [
    "Columns",
    "columns",
    "compare",
    "dependence",
    "dependence_points",
    "flow",
    "flow_points",
    "gates",
    "incident",
    "incident_points",
    "rho",
    "timeline",
    "updates",
]

Records = Iterable[StepRecord] | Columns
"""What a chart is drawn of: records, such as ``watch.records`` or those of
``gradwatch.load(folder)``, or the :func:`columns` of some."""


def flow(records: Records, stream: str | None = None) -> altair.LayerChart:
    """Draw how much gradient reaches each time step, over the training.

    Time goes to the right, up to the end of the sequence, training upwards; the colour
    is the norm of dL/dh_t over the largest of its training step, in decades; a mark
    shows how far back the last step that the loss reads still reaches (its horizon).
    Where the input ends in padding, a line marks where that begins: no gradient there
    is no vanishing.

    Args:
        records: Of a run.
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
    found = as_columns(records)
    _altair()
    cells, marks, title = flow_points(found, stream)
    key = stream_with(found, stream, "flow")
    return cast(
        "altair.LayerChart", _drawn(charts.flow_of(found, key, cells, marks), title)
    )


def dependence(records: Records, stream: str | None = None) -> altair.Chart:
    """Draw on which earlier time steps each state depends, at the last such look.

    A row is a state h_s, a column an earlier time step t; the colour is the norm of
    what a random unit gradient of h_s alone sends back to the state at t, in decades
    below its largest. Rows that are bright far to the left remember.

    Args:
        records: Of a run.
        stream: Name of the stream; the first one that has a profile if left out.

    Returns:
        The chart.

    Raises:
        ModuleNotFoundError: If altair is not installed.
        ValueError: If no record holds the numbers.
    """
    _altair()
    shown = dependence_points(records, stream)
    reach = shown.reach(len(shown.seeds) - 1)
    of = f"{reach + 1} of {shown.length} time steps"
    title = f"{shown.stream}: the last state depends on {of}"
    return cast("altair.Chart", _drawn(charts.dependence(shown), title))


def timeline(
    records: Records, incidents: Iterable[Incident] = ()
) -> altair.VConcatChart:
    """Draw loss, gradient norms, learning rate and incidents over one axis of steps.

    Args:
        records: Of a run.
        incidents: Of the same run, such as ``watch.incidents``.

    Returns:
        The chart.

    Raises:
        ModuleNotFoundError: If altair is not installed.
    """
    _altair()
    found, told = as_columns(records), ordered(incidents)
    title = timeline_title(found, told)
    return cast("altair.VConcatChart", _drawn(charts.timeline(found, told), title))


def rho(records: Records, stream: str) -> altair.VConcatChart:
    """Draw a stream's spectral radius, and what one update changes of it.

    Args:
        records: Of a run.
        stream: Name of the stream.

    Returns:
        The chart.

    Raises:
        ModuleNotFoundError: If altair is not installed.
        ValueError: If no record holds its spectral radius; the message names streams.
    """
    _altair()
    found = _having(records, stream, "rho")
    chart = _drawn(charts.rho(found, stream), rho_title(found, stream))
    return cast("altair.VConcatChart", chart)


def gates(records: Records, stream: str) -> altair.LayerChart:
    """Draw the shares of a stream's gates that are shut and open, or of flat units.

    Args:
        records: Of a run.
        stream: Name of the stream.

    Returns:
        The chart.

    Raises:
        ModuleNotFoundError: If altair is not installed.
        ValueError: If no record holds its states; the message names streams.
    """
    _altair()
    found = _having(records, stream, "act_deriv")
    chart = charts.gates(found, shares(found, stream))
    return cast("altair.LayerChart", _drawn(chart, gates_title(found, stream)))


def updates(records: Records, stream: str) -> altair.LayerChart:
    """Draw by how much of its norm a stream's W_hh changes a step.

    Args:
        records: Of a run.
        stream: Name of the stream.

    Returns:
        The chart.

    Raises:
        ModuleNotFoundError: If altair is not installed.
        ValueError: If no record holds an update of it; the message names streams.
    """
    _altair()
    found = _having(records, stream, "update_ratio")
    chart = _drawn(charts.updates(found, stream), updates_title(found, stream))
    return cast("altair.LayerChart", chart)


def incident(records: Records, happened: Incident) -> altair.LayerChart:
    """Draw the number that an incident was decided on, before and after it.

    Args:
        records: Of a run.
        happened: One of its incidents.

    Returns:
        The chart.

    Raises:
        ModuleNotFoundError: If altair is not installed.
        ValueError: If no number of its evidence was recorded at two steps or more.
    """
    _altair()
    shown = incident_points(records, happened)
    return cast(
        "altair.LayerChart", _drawn(charts.incident(shown, happened), shown.title)
    )


def compare(
    runs: Mapping[str, Records], key: str = run_key("loss")
) -> altair.LayerChart:
    """Draw one metric of several runs.

    Args:
        runs: What each run is called, and its records.
        key: The metric.

    Returns:
        The chart.

    Raises:
        ModuleNotFoundError: If altair is not installed.
        ValueError: If no run holds the metric; the message names those that there are.
    """
    _altair()
    found = {name: as_columns(records) for name, records in runs.items()}
    if not any(len(run.of(key).steps) for run in found.values()):
        known = sorted({k for run in found.values() for k in run.series})
        raise ValueError(f"no run holds {key!r}; there are {_listed(known)}.")
    chart = _drawn(charts.compare(found, key), compare_title(found, key))
    return cast("altair.LayerChart", chart)


def _having(records: Records, stream: str, metric: str) -> Columns:
    """Return the columns of a run that has a metric of a stream.

    Raises:
        ValueError: If it has not.
    """
    found = as_columns(records)
    if not len(found.stream(stream, metric).steps):
        end = f"/{metric}"
        known = sorted(key for key in found.series if key.endswith(end))
        names = [key.removesuffix(end).partition("/")[2] for key in known]
        raise ValueError(
            f"no record holds {base(stream)}{end}; streams that have it: "
            f"{_listed([name.replace('/', '.') for name in names])}."
        )
    return found


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _altair() -> Any:
    try:
        import altair
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Charts need altair: pip install 'gradwatch[plot]'."
        ) from error
    return altair


def _drawn(spec: panels.Spec, title: str) -> Any:
    """Return a chart in Altair's types; its data are put beside it, unchecked."""
    alt = _altair()
    data: dict[str, Any] = {}
    bare = _without_data(panels.whole(spec, title), data)
    chart = alt.Chart.from_dict(bare)
    chart.datasets = data
    return chart


def _without_data(spec: Any, data: dict[str, Any]) -> Any:
    """Return a chart whose values are named, and stand in ``data``."""
    if isinstance(spec, dict):
        if set(spec) == {"values"}:
            name = f"data-{len(data)}"
            data[name] = spec["values"]
            return {"name": name}
        return {key: _without_data(value, data) for key, value in spec.items()}
    if isinstance(spec, list):
        return [_without_data(part, data) for part in spec]
    return spec
