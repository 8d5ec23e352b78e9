"""The host's finish: ``(memory, reading) -> (memory, StepRecord)``.

What needs small dense algebra or a memory of earlier steps is done here, in float64, on
numbers that the drain has brought. numpy only for blocks of a few columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics import spectral
from gradwatch.numerics.spectral import Radius
from gradwatch.numerics.streaming import Window, median, push
from gradwatch.observe.capture import Step
from gradwatch.observe.measure import HostNumbers, Spectrum
from gradwatch.record import StepRecord, Stream

_NORMS_KEPT: Final = 25
_SUSPICIOUS: Final = 10.0
"""Times the running median from which on the heaviest parameters are named."""
_FEW: Final = 5
_NAMED: Final = 3

_NORM, _CLIPPED, _RATIO = map(run_key, ("grad_norm", "grad_norm_clipped", "clip_ratio"))
_NONFINITE, _LOSS = map(run_key, ("nonfinite", "loss"))
_SKIPPED, _OVERHEAD = map(run_key, ("skipped", "overhead"))


@dataclass(slots=True, kw_only=True)
class Memory:
    """What derive remembers between steps; plain values, saved by ``state_dict``."""

    skipped: int = 0
    norms: Window = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Layout(NamedTuple):
    """Which parameters are behind which key; made once for a set of parameters.

    Attributes:
        norms: Key -> indices of the parameters whose norms are joined under it.
        ratios: Name of a stream -> key of its update ratio.
    """

    norms: Sequence[tuple[str, Sequence[int]]]
    ratios: Mapping[str, str]

    @classmethod
    def of(cls, groups: Sequence[tuple[Stream, Mapping[str, Sequence[int]]]]) -> Layout:
        """Return the layout for streams and their ``hh``, ``ih``, ``bias`` groups."""
        norms = [
            (stream_key(stream, f"grad_norm_{group}"), tuple(index))
            for stream, parts in groups
            for group, index in parts.items()
            if index
        ]
        return cls(norms, {s.name: stream_key(s, "update_ratio") for s, _ in groups})


@dataclass(slots=True, kw_only=True)
class Reading:
    """One step's numbers on the host, with what they belong to.

    Attributes:
        step: The step as the tap saw it.
        host: Its numbers.
        layout: Which parameters are behind which key.
        spectrum: The spectrum run of this step, its numbers under ``spectrum.``.
        time: Seconds since the epoch.
        loss: The last value given to ``watch.log``, or None.
        overhead: Share of the time since the last record that gradwatch used.
        facts: What is not a number, as it is now.
        events: What happened beside the tap's own events.
    """

    step: Step
    host: HostNumbers
    layout: Layout = field(default_factory=lambda: Layout((), {}))
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
    metrics = _gradient_metrics(reading, before)
    metrics[_SKIPPED] = float(skipped)
    if reading.spectrum is not None:
        metrics |= _spectrum_metrics(reading.spectrum, reading.host)
    norm = metrics.get(_NORM, math.nan)
    known, changed = _facts(memory, reading)
    if step.skipped_by:
        changed["skipped_by"] = step.skipped_by
    usual = math.isfinite(norm) and (
        len(memory.norms) < _FEW or norm <= _SUSPICIOUS * median(memory.norms)
    )
    if before and not usual:
        changed |= _naming(step, before, norm)
    record = StepRecord(
        step=step.number,
        time=reading.time,
        metrics=metrics,
        facts=changed,
        events=step.events + reading.events,
    )
    norms = push(memory.norms, norm, _NORMS_KEPT) if usual else memory.norms
    return Memory(skipped=skipped, norms=norms, facts=known), record


def _gradients(reading: Reading) -> dict[int, float]:
    """Return the gradient norms before clipping, unscaled, by parameter."""
    host, step = reading.host, reading.step
    if "pre" not in host:  # backward was not seen: what the optimizer saw stands in
        return dict(zip(step.post_live, _floats(host.get("post")), strict=True))
    values = _floats(host["pre"])
    if "scale" in host and (scale := float(host["scale"])) != 1.0:
        values = [value / scale for value in values]
    return dict(zip(step.live, values, strict=True))


def _floats(values: Any) -> list[float]:
    if values is None:
        return []
    return values if isinstance(values, list) else values.tolist()


def _gradient_metrics(
    reading: Reading, before: Mapping[int, float]
) -> dict[str, float]:
    metrics = {_OVERHEAD: reading.overhead}
    if reading.loss is not None:
        metrics[_LOSS] = reading.loss
    if before:
        norm = math.hypot(*before.values())
        metrics[_NORM] = norm
        broken = 0
        if not math.isfinite(norm):
            broken = sum(not math.isfinite(value) for value in before.values())
        metrics[_NONFINITE] = float(broken)
        if "post" in reading.host:
            post = _floats(reading.host["post"])
            seen = dict(before) | dict(zip(reading.step.post_live, post, strict=True))
            clipped = math.hypot(*(seen[i] for i in before))
            metrics[_CLIPPED] = clipped
            if math.isfinite(norm) and math.isfinite(clipped):
                metrics[_RATIO] = min(clipped / norm, 1.0) if norm else 1.0
    for key, index in reading.layout.norms:
        found = [before[i] for i in index if i in before]
        if found:
            metrics[key] = math.hypot(*found)
    if "change" in reading.host:
        changes = _floats(reading.host["change"])
        weights = _floats(reading.host["weight"])
        moved = zip(reading.step.changed, changes, weights, strict=True)
        for name, change, weight in moved:
            metrics[reading.layout.ratios[name]] = change / (weight + 1e-12)
    return metrics


def _facts(
    memory: Memory, reading: Reading
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return all facts as they are now, and those that have changed."""
    if not reading.facts:
        return memory.facts, {}
    known = memory.facts
    changed = {k: v for k, v in reading.facts.items() if known.get(k) != v}
    return ({**known, **changed} if changed else known), changed


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


def _naming(step: Step, before: Mapping[int, float], norm: float) -> dict[str, Any]:
    """Name the tensors that broke first, or those that carry a suspicious norm."""
    if not math.isfinite(norm):
        order = [i for i in step.order if i in before] or list(before)
        broken = [i for i in order if not math.isfinite(before[i])]
        return {"nonfinite": [step.names[i] for i in broken[:_NAMED]]}
    heavy = sorted(before, key=before.__getitem__, reverse=True)[:_NAMED]
    shares = {step.names[i]: (before[i] / norm) ** 2 for i in heavy}
    return {"carriers": {n: round(s, 4) for n, s in shares.items() if s >= 0.05}}
