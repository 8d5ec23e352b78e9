"""The host's finish: ``(memory, reading) -> (memory, StepRecord)``.

What needs small dense algebra or a memory of earlier steps is done here, in float64, on
numbers that the drain has brought. numpy only for blocks of a few columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics import spectral
from gradwatch.numerics.spectral import Radius
from gradwatch.numerics.streaming import Window, median, push
from gradwatch.observe.gradient_tap import Step
from gradwatch.observe.measure import HostNumbers, Spectrum
from gradwatch.record import StepRecord, Stream

_NORMS_KEPT: Final = 25
_SUSPICIOUS: Final = 10.0
"""Times the running median from which on the heaviest parameters are named."""
_NAMED: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What derive remembers between steps; plain values, saved by ``state_dict``."""

    skipped: int = 0
    norms: Window = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One step's numbers on the host, with what they belong to.

    Attributes:
        step: The step as the tap saw it.
        host: Its numbers.
        groups: Stream -> ``hh``, ``ih``, ``bias`` -> indices of the parameters.
        spectrum: The spectrum run of this step, its numbers under ``spectrum.``.
        time: Seconds since the epoch.
        loss: The last value given to ``watch.log``, or None.
        overhead: Share of the time since the last record that gradwatch used.
        facts: What is not a number, as it is now.
        events: What happened beside the tap's own events.
    """

    step: Step
    host: HostNumbers
    groups: Sequence[tuple[Stream, Mapping[str, Sequence[int]]]] = ()
    spectrum: Spectrum | None = None
    time: float = 0.0
    loss: float | None = None
    overhead: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[str, ...] = ()


def derive(memory: Memory, reading: Reading) -> tuple[Memory, StepRecord]:
    """Return the record of a step and what is remembered for the next one."""
    step = reading.step
    skipped = memory.skipped + ("skipped_step" in step.events)
    before = _gradients(reading)
    metrics = _run_metrics(reading, before)
    metrics[run_key("skipped")] = float(skipped)
    metrics |= _stream_metrics(reading, before)
    if reading.spectrum is not None:
        metrics |= _spectrum_metrics(reading.spectrum, reading.host)
    facts = dict(reading.facts)
    if step.skipped_by:
        facts["skipped_by"] = step.skipped_by
    norm = metrics.get(run_key("grad_norm"), math.nan)
    passing = _naming(step, before, norm, memory.norms)
    stale = [key for key in ("nonfinite", "carriers") if key in memory.facts]
    known = {k: v for k, v in memory.facts.items() if k not in stale}
    changed = {k: v for k, v in facts.items() if known.get(k) != v} | passing
    known |= {k: v for k, v in facts.items() if k != "skipped_by"}
    record = StepRecord(
        step=step.number,
        time=reading.time,
        metrics=metrics,
        facts=changed,
        events=(*step.events, *reading.events),
    )
    norms = memory.norms
    if math.isfinite(norm) and not _above(norm, norms):
        norms = push(norms, norm, _NORMS_KEPT)
    return replace(memory, skipped=skipped, norms=norms, facts=known), record


def _gradients(reading: Reading) -> dict[int, float]:
    """Return the gradient norms before clipping, unscaled, by parameter."""
    host, step = reading.host, reading.step
    if "pre" not in host:  # backward was not seen: what the optimizer saw stands in
        values = host["post"].tolist() if "post" in host else []
        return dict(zip(step.post_live, values, strict=True))
    values = host["pre"].tolist()
    if "scale" in host and (scale := float(host["scale"])) != 1.0:
        values = [value / scale for value in values]
    return dict(zip(step.live, values, strict=True))


def _run_metrics(reading: Reading, before: Mapping[int, float]) -> dict[str, float]:
    metrics = {run_key("overhead"): min(reading.overhead, 1.0)}
    if reading.loss is not None:
        metrics[run_key("loss")] = reading.loss
    if not before:
        return metrics
    norm = math.hypot(*before.values())
    metrics[run_key("grad_norm")] = norm
    broken = sum(not math.isfinite(value) for value in before.values())
    metrics[run_key("nonfinite")] = float(broken)
    if "post" not in reading.host:
        return metrics
    seen = dict(zip(reading.step.post_live, reading.host["post"].tolist(), strict=True))
    clipped = math.hypot(*(seen.get(i, value) for i, value in before.items()))
    metrics[run_key("grad_norm_clipped")] = clipped
    if math.isfinite(norm) and math.isfinite(clipped):
        metrics[run_key("clip_ratio")] = min(clipped / norm, 1.0) if norm else 1.0
    return metrics


def _stream_metrics(reading: Reading, before: Mapping[int, float]) -> dict[str, float]:
    metrics = {}
    change = reading.host.get("change")
    moved: dict[str, float] = {}
    if change is not None:
        pairs = change.reshape(-1, 2).tolist()
        names = reading.step.changed
        moved = {n: c / (w + 1e-12) for n, (c, w) in zip(names, pairs, strict=True)}
    for stream, groups in reading.groups:
        for group, index in groups.items():
            found = [before[i] for i in index if i in before]
            if found:
                key = stream_key(stream, f"grad_norm_{group}")
                metrics[key] = math.hypot(*found)
        if stream.name in moved:
            metrics[stream_key(stream, "update_ratio")] = moved[stream.name]
    return metrics


def _spectrum_metrics(run: Spectrum, host: HostNumbers) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for number, (streams, launched) in enumerate(run.groups):
        start = f"spectrum.{number}."
        blocks = {k[len(start) :]: v for k, v in host.items() if k.startswith(start)}
        radii = spectral.finish(launched, {k: blocks[k] for k in launched.blocks})
        first = 0
        for stream in streams:
            part = slice(first, first + max(len(stream.gates), 1))
            first = part.stop
            metrics |= _radius_metrics(stream, radii[part])
            for name, block in (("sigma_max", "sigma"), ("orthogonality",) * 2):
                if block in blocks:
                    values = blocks[block][part].tolist()
                    metrics |= _per_gate(stream, name, values, _largest(values))
    return metrics


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


def _per_gate(
    stream: Stream, metric: str, values: Sequence[float], whole: float
) -> dict[str, float]:
    keys = [stream_key(stream, metric, gate) for gate in stream.gates]
    return {stream_key(stream, metric): whole, **dict(zip(keys, values, strict=False))}


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _above(norm: float, norms: Window) -> bool:
    return len(norms) >= 5 and norm > _SUSPICIOUS * median(norms)


def _naming(
    step: Step, before: Mapping[int, float], norm: float, norms: Window
) -> dict[str, Any]:
    """Name the tensors that broke first, or those that carry a suspicious norm."""
    if not math.isfinite(norm) and before:
        order = [i for i in step.order if i in before] or list(before)
        broken = [i for i in order if not math.isfinite(before[i])]
        return {"nonfinite": [step.names[i] for i in broken[:_NAMED]]}
    if _above(norm, norms):
        heavy = sorted(before, key=before.__getitem__, reverse=True)[:_NAMED]
        shares = {step.names[i]: (before[i] / norm) ** 2 for i in heavy}
        return {"carriers": {n: round(s, 4) for n, s in shares.items() if s >= 0.05}}
    return {}
