"""The spectrum depth on the host: rho, its drift, and what it has come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.metrics import stream_key
from gradwatch.numerics import drift, spectral
from gradwatch.numerics.drift import Drift
from gradwatch.numerics.spectral import Radius
from gradwatch.numerics.streaming import theil_sen
from gradwatch.observe.spectrum import Group, Spectrum
from gradwatch.record import Stream

_TREND_OVER: Final = 8
_TREND_FROM: Final = 4
"""Most and fewest certified radii that a trend is taken over."""

History = Mapping[str, Any]
"""Of one gate: ``first``, the reference of its drift; its last certified radii,
``values``, at ``steps``."""
Histories = Mapping[str, Mapping[str, History]]
"""Name of a stream -> gate, empty for a vanilla net -> history; plain values."""


def spectrum_metrics(
    run: Spectrum, blocks: Mapping[str, Any], step: int, known: Histories
) -> tuple[dict[str, float], Histories]:
    """Return the metrics of a spectrum run, and every gate's history after it.

    Args:
        run: What was launched.
        blocks: Its numbers.
        step: The step that they belong to.
        known: The histories before it.
    """
    metrics: dict[str, float] = {}
    histories = dict(known)
    for number, group in enumerate(run.groups):
        start = f"{number}."
        own = {k[len(start) :]: v for k, v in blocks.items() if k.startswith(start)}
        launched = {key: own[key] for key in group.launched.blocks}
        radii = spectral.finish(group.launched, launched)
        for stream in group.streams:
            place = group.gates(stream)
            of_gates = radii[place.start : place.stop]
            lead = _lead(of_gates)
            metrics |= _radius_metrics(stream, of_gates)
            for name, block in (("sigma_max", "sigma"), ("orthogonality",) * 2):
                if block in own:
                    values = own[block][place.start : place.stop].tolist()
                    metrics |= _per_gate(stream, name, values, _largest(values))
            history = _extended(known.get(stream.name, {}), stream, of_gates, step)
            histories[stream.name] = history
            metrics |= _trend(stream, history, lead, of_gates)
        metrics |= _drift_metrics(group, radii, own)
    return metrics, histories


def _radius_metrics(stream: Stream, radii: Sequence[Radius]) -> dict[str, float]:
    flags = [float(r.certified) for r in radii]
    metrics = _per_gate(stream, "rho_certified", flags, min(flags))
    known = [r.rho for r in radii if r.source != "open"]
    if len(known) == len(radii):
        return metrics | _per_gate(stream, "rho", known, _largest(known))
    for gate, radius in zip(stream.gates, radii, strict=False):
        if radius.source != "open":
            metrics[stream_key(stream, "rho", gate)] = radius.rho
    return metrics


def _lead(radii: Sequence[Radius]) -> int:
    """Return the place of the gate with the largest rho."""
    return max(range(len(radii)), key=lambda i: _or_zero(radii[i].rho))


def _drift_metrics(
    group: Group, radii: Sequence[Radius], blocks: Mapping[str, Any]
) -> dict[str, float]:
    if "moved" not in blocks:
        return {}
    metrics: dict[str, float] = {}
    rows = [i for stream in group.updated for i in group.gates(stream)]
    found = drift.finish_change(
        [radii[i] for i in rows], blocks["scale"][rows], blocks["moved"]
    )
    first = 0
    for stream in group.updated:
        place = group.gates(stream)
        own = found[first : first + len(place)]
        first += len(place)
        lead = own[_lead([radii[i] for i in place])]
        metrics |= _one_drift(stream, "", lead)
        for gate, one in zip(stream.gates, own, strict=False):
            metrics |= _one_drift(stream, gate, one)
    return metrics


def _one_drift(stream: Stream, gate: str, found: Drift) -> dict[str, float]:
    flag = stream_key(stream, "rho_drift_reliable", gate)
    if math.isnan(found.value):
        return {flag: 0.0}
    value = stream_key(stream, "rho_drift", gate)
    return {value: found.value, flag: float(found.reliable)}


def _extended(
    known: Mapping[str, History], stream: Stream, radii: Sequence[Radius], step: int
) -> dict[str, History]:
    histories = dict(known)
    for gate, radius in zip(stream.gates or ("",), radii, strict=True):
        if not radius.certified or not radius.rho > 0:
            continue
        before = known.get(gate, {"first": radius.rho, "steps": [], "values": []})
        if step in before["steps"]:
            continue
        histories[gate] = {
            "first": before["first"],
            "steps": [*before["steps"], step][-_TREND_OVER:],
            "values": [*before["values"], radius.rho][-_TREND_OVER:],
        }
    return histories


def _trend(
    stream: Stream, history: Mapping[str, History], lead: int, radii: Sequence[Radius]
) -> dict[str, float]:
    found = history.get((stream.gates or ("",))[lead])
    if found is None or not radii[lead].certified:
        return {}
    total = math.log(found["values"][-1] / found["first"])
    metrics = {stream_key(stream, "rho_total_drift"): total}
    if len(found["steps"]) >= _TREND_FROM:
        slope = theil_sen(found["steps"], found["values"])
        metrics[stream_key(stream, "rho_trend")] = slope
    return metrics


def _per_gate(
    stream: Stream, metric: str, values: Sequence[float], whole: float
) -> dict[str, float]:
    keys = [stream_key(stream, metric, gate) for gate in stream.gates]
    return {stream_key(stream, metric): whole, **dict(zip(keys, values, strict=False))}


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
