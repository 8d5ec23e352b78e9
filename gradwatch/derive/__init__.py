"""The host's finish: ``(memory, reading) -> (memory, StepRecord)``.

What needs small dense algebra or a memory of earlier steps is done here, in float64, on
numbers that the drain has brought. numpy only for blocks of a few columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from gradwatch.derive.flow import Signals, flow_metrics
from gradwatch.derive.gradients import gradient_metrics, gradients, naming
from gradwatch.derive.reading import Layout, Reading
from gradwatch.derive.spectrum import Histories, spectrum_metrics
from gradwatch.derive.state import Replayed, log10_times, state_metrics
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import Window, median, push
from gradwatch.observe.flow import Flow
from gradwatch.record import StepRecord, Stream, reinitialised

__all__ = ["Layout", "Memory", "Reading", "derive"]

_NORMS_KEPT: Final = 25
_SUSPICIOUS: Final = 10.0
"""Times the running median from which on the heaviest parameters are named."""
_FEW: Final = 5
_LOOKS: Final = 8
"""Looks at the same input that are counted; more of them tell nothing more."""
_KEPT: Final = ("drive", "padding")
"""Facts that not every replay measures, and that hold until one does."""
_NORM, _SKIPPED = map(run_key, ("grad_norm", "skipped"))


@dataclass(slots=True, kw_only=True)
class Memory:
    """What derive remembers between steps; plain values, saved by ``state_dict``.

    Attributes:
        skipped: Steps skipped so far.
        norms: The last usual gradient norms.
        facts: All facts as they are now.
        rho: The certified radii of every gate.
        signals: What the loss put into every stream, at the start and lately.
        left_out: Module -> how many replays were dropped.
        looks: Module -> two sums of its last input, and how many looks running found
            the same.
    """

    skipped: int = 0
    norms: Window = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    rho: Histories = field(default_factory=dict)
    signals: Signals = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    looks: Mapping[str, Sequence[float]] = field(default_factory=dict)


def derive(memory: Memory, reading: Reading) -> tuple[Memory, StepRecord]:
    """Return the record of a step and what is remembered for the next one."""
    step = reading.step
    skipped = memory.skipped + ("skipped_step" in step.events)
    before = gradients(reading)
    metrics = gradient_metrics(reading, before)
    metrics[_SKIPPED] = float(skipped)
    rho, left_out, facts = memory.rho, memory.left_out, dict(reading.facts)
    signals, profiles = memory.signals, dict[str, list[float]]()
    looks = memory.looks
    if anew := reinitialised(reading.events):
        rho = {k: v for k, v in rho.items() if k not in anew}
        signals = {k: v for k, v in signals.items() if k not in anew}
        memory = replace(memory, norms=())
    if reading.spectrum is not None:
        blocks = reading.part("spectrum")
        found, rho = spectrum_metrics(reading.spectrum, blocks, step.number, rho)
        metrics |= found
    if reading.state is not None:
        replayed = state_metrics(reading.state, reading.part("state"), reading.scale)
        metrics |= replayed.metrics
        left_out = _counted(left_out, replayed)
        looks = _looked(looks, replayed)
        facts = _with_replays(facts, replayed, memory.facts, looks)
        for stream, _ in reading.state.streams:
            metrics |= _over_time(stream, metrics, facts)
        if reading.flow is not None:
            blocks, lost = reading.part("flow"), replayed.left_out.keys()
            found, profiles, signals = flow_metrics(
                reading.flow, blocks, reading.scale, lost, signals
            )
            metrics |= found
            facts = _with_carried(facts, reading.flow, blocks)
        facts = {name: _if_carried(own) for name, own in facts.items()}
    norm = metrics.get(_NORM, math.nan)
    known, changed = _facts(memory, facts | _of_loop(memory, reading))
    if step.skipped_by:
        changed["skipped_by"] = step.skipped_by
    usual = math.isfinite(norm) and (
        len(memory.norms) < _FEW or norm <= _SUSPICIOUS * median(memory.norms)
    )
    if before and not usual:
        changed |= naming(step, before, norm)
    record = StepRecord(
        step=step.number,
        time=reading.time,
        metrics=metrics,
        profiles=profiles,
        facts=changed,
        events=step.events + reading.events,
    )
    norms = push(memory.norms, norm, _NORMS_KEPT) if usual else memory.norms
    after = Memory(
        skipped=skipped,
        norms=norms,
        facts=known,
        rho=rho,
        signals=signals,
        left_out=left_out,
        looks=looks,
    )
    return after, record


def _of_loop(memory: Memory, reading: Reading) -> dict[str, Any]:
    """Return what is known of the loop, where it is not what it is nearly always."""
    found: dict[str, Any] = {}
    cleared = reading.step.cleared
    if cleared is False or (cleared and memory.facts.get("cleared") is False):
        found["cleared"] = cleared
    if "scaled" in memory.facts or reading.scale != 1.0:
        found["scaled"] = reading.scale != 1.0
    return found


def _looked(
    looks: Mapping[str, Sequence[float]], replayed: Replayed
) -> Mapping[str, Sequence[float]]:
    """Count the looks running at which a module's input was the same."""
    found = dict(looks)
    for path, sums in replayed.sums.items():
        *known, times = looks.get(path, (math.nan, math.nan, 0))
        same = known == [*sums] and sums[0] > 0
        found[path] = (*sums, times + 1 if same else 1)
    return found


def _facts(
    memory: Memory, given: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return all facts as they are now, and those that have changed."""
    if not given:
        return memory.facts, {}
    known = memory.facts
    changed = {k: v for k, v in given.items() if known.get(k) != v}
    return ({**known, **changed} if changed else known), changed


def _counted(known: Mapping[str, int], replayed: Replayed) -> Mapping[str, int]:
    if not replayed.left_out:
        return known
    return {**known, **{p: known.get(p, 0) + 1 for p in replayed.left_out}}


def _with_replays(
    facts: Mapping[str, Any],
    replayed: Replayed,
    known: Mapping[str, Any],
    looks: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Add to the facts of modules and streams what their replay has told."""
    words = dict.fromkeys(replayed.approximate, "approximate: dropout drawn anew")
    words |= {path: f"left out: {why}" for path, why in replayed.left_out.items()}
    told = {path: dict(own) for path, own in replayed.facts.items()}
    for path in replayed.sums:
        same = min(int(looks[path][-1]), _LOOKS)
        told[path] = {**told.get(path, {}), "same_batch": same}
    for path, said in words.items():
        told[path] = {**told.get(path, {}), "replay": said}
    found = dict(facts)
    for name in [*facts, *(n for n in told if n not in facts)]:
        before = known.get(name)
        kept = (
            {k: v for k, v in before.items() if k in _KEPT}
            if isinstance(before, dict)
            else {}
        )
        own = facts.get(name, {})
        if isinstance(own, dict):
            found[name] = {**kept, **own, **told.get(name, {})}
    return found


def _with_carried(
    facts: dict[str, Any], run: Flow, blocks: Mapping[str, Any]
) -> dict[str, Any]:
    """Note the modules that go on from the detached states of an earlier call."""
    carried = {
        path for n, path in enumerate(run.carried) if float(blocks[f"carried.{n}"]) > 0
    }
    paths = {stream.module for stream in run.streams}
    said = {
        path: {**facts.get(path, {}), "state_detached": True}
        for path in paths & carried
    }
    return {**facts, **said}


def _if_carried(own: Any) -> Any:
    """Leave out the steps cut off where the states are not known to be a call's.

    Where they lie decides, and new zeros may lie where old states were.
    """
    if isinstance(own, dict) and "cut" in own and not own.get("state_detached"):
        return {name: value for name, value in own.items() if name != "cut"}
    return own


def _over_time(
    stream: Stream, metrics: Mapping[str, float], facts: Mapping[str, Any]
) -> dict[str, float]:
    """Return what the gain of one step comes to over the sequence, in a vanilla net."""
    length = facts.get(stream.module, {}).get("T")
    found: dict[str, float] = {}
    if stream.gates or length is None:
        return found
    chi = metrics.get(stream_key(stream, "chi"))
    if chi is not None:
        found[stream_key(stream, "gain_log10")] = log10_times(length, chi)
    rho = metrics.get(stream_key(stream, "rho"))
    slope = metrics.get(stream_key(stream, "act_deriv"))
    if rho is not None and slope is not None and math.isfinite(rho):
        found[stream_key(stream, "rho_eff")] = rho * slope
        found[stream_key(stream, "rho_gain_log10")] = log10_times(length, rho * slope)
    return found
