"""From a step's numbers on the host to its row, and to what it has beside.

What needs small dense algebra or a memory of earlier steps is done here, in float64, on
numbers that the drain has brought.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Final

import numpy as np
from torch import Tensor

from gradwatch import saved
from gradwatch.block import Extras, Row
from gradwatch.depths import flow, gradients, readout, spectrum, state
from gradwatch.depths import parts as update
from gradwatch.depths.drain import Host
from gradwatch.depths.gradients import Idleness
from gradwatch.depths.measured import Measured, Parts, Sampled
from gradwatch.facts import (
    NO_FACTS,
    RUN_SCOPE,
    STEP_SCOPE,
    Facts,
    ModuleFacts,
    RunFacts,
    StreamFacts,
    joined,
)
from gradwatch.health import Guard
from gradwatch.metrics import run_key, stream_key
from gradwatch.record import CELL, Stream, reinitialised


@dataclass(slots=True, kw_only=True)
class Memory:
    """What is remembered between steps; each part has its own, in plain values.

    Attributes:
        facts: All facts as they are now.
    """

    VERSION: ClassVar = 2
    gradients: gradients.Memory = field(default_factory=gradients.Memory)
    spectrum: spectrum.Memory = field(default_factory=spectrum.Memory)
    state: state.Memory = field(default_factory=state.Memory)
    flow: flow.Memory = field(default_factory=flow.Memory)
    readout: readout.Memory = field(default_factory=readout.Memory)
    facts: Facts = NO_FACTS

    def learn(self, facts: Facts) -> None:
        """Take facts that have changed; those of a step alone are not kept."""
        ongoing = dataclasses.replace(facts, step=STEP_SCOPE)
        self.facts = self.facts.with_later(ongoing)

    def forget(self, streams: list[str]) -> None:
        """Forget what is of the old weights of streams that were re-initialised."""
        self.gradients = dataclasses.replace(self.gradients, norms=())
        for name in streams:
            self.spectrum.rho.pop(name, None)
            self.flow.signals.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain values."""
        return saved.write(self)

    @classmethod
    def from_state(cls, state_dict: Mapping[str, Any]) -> Memory:
        """Return the memory of :meth:`state_dict`.

        Raises:
            ValueError: If it is not one.
        """
        return saved.read(cls, state_dict, "the measurements", _OLDER)


def _by_depth(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layout of version 1 of what was saved in one dict of all depths."""
    state_of = {name: raw.get(name, {}) for name in ("left_out", "looks")}
    return {
        "gradients": {name: raw[name] for name in ("skipped", "norms")},
        "spectrum": {"rho": raw.get("rho", {})},
        "state": state_of,
        "flow": {"signals": raw.get("signals", {})},
        "facts": raw["facts"],
    }


_OLDER: Final[Mapping[int, saved.Upgrade]] = MappingProxyType({0: _by_depth, 1: dict})
"""What can be read beside the present layout: version 1 knew no read-out."""


def finish(
    step: Measured, memory: Memory, guards: Mapping[str, Guard]
) -> tuple[Row, Extras | None]:
    """Return the row of a step, and what it has beside; None for nothing.

    Args:
        step: The step; its numbers are waited for.
        memory: Updated in place.
        guards: That of each sampled depth: one that fails leaves the others.
    """
    host = step.drain.wait()
    if names := reinitialised(step.events):
        memory.forget(names)
    parts = step.parts
    if parts.gradients.guarded and not np.isfinite(host["gradients"]["used"]).all():
        events = ("skipped_step", *step.events)
        step = dataclasses.replace(step, skipped_by="scaler", events=events)
    scale = gradients.scale_of(host["gradients"])
    row, named = gradients.finish(
        parts.gradients,
        host["gradients"],
        parts.layout,
        memory.gradients,
        loss=_loss(parts, host["loss"], scale),
        overhead=step.overhead,
        skipped=bool(step.skipped_by),
    )
    if step.skipped_by:
        named = dataclasses.replace(named, skipped_by=step.skipped_by)
    run = _of_run(step, scale, memory.facts.run)
    plain = named is STEP_SCOPE and run is RUN_SCOPE and not step.events
    if plain and parts.sampled is None:
        return row, None
    now, extras = Facts(step=named, run=run), Extras(events=step.events)
    if parts.sampled is not None:
        now, extras = _sampled(step, parts.sampled, host, scale, memory, now, guards)
    facts = now.since(memory.facts)
    memory.learn(facts)
    return row, dataclasses.replace(extras, facts=facts if facts else NO_FACTS)


def _loss(parts: Parts, host: Host, scale: float) -> float | None:
    """Return the loss of a step as it was before scaling; None where it is not known.

    Where a scaled one is infinite, the factor may be what was too large.
    """
    loss = float(host["loss"]) if isinstance(parts.loss, Tensor) else parts.loss
    if loss is None or not parts.found or scale == 1:
        return loss
    return None if math.isinf(loss) else loss / scale


def _of_run(step: Measured, scale: float, known: RunFacts) -> RunFacts:
    """Return what is known of the loop, where it is not what it is nearly always."""
    cleared: bool | None = step.parts.gradients.cleared
    if cleared and known.cleared is not False:
        cleared = None
    scaled = scale != 1.0 if known.scaled is not None or scale != 1.0 else None
    late = step.parts.gradients.written_late or None
    idle = step.parts.gradients.idleness
    if idle is None and known.unchanged:  # an optimizer has stepped at last
        idle = Idleness(0, False) if step.parts.gradients.used else None
    nothing = cleared is None and scaled is None and idle is None
    if nothing and (late is None or known.written_late):
        return RUN_SCOPE
    return RunFacts(
        cleared=cleared,
        scaled=scaled,
        written_late=late,
        unchanged=None if idle is None else idle.passes,
        steps_elsewhere=None if idle is None else idle.elsewhere,
    )


def _sampled(
    step: Measured,
    sampled: Sampled,
    host: Mapping[str, Host],
    scale: float,
    memory: Memory,
    now: Facts,
    guards: Mapping[str, Guard],
) -> tuple[Facts, Extras]:
    """Return the facts of a sampled step, and all that its depths have measured."""
    metrics: dict[str, float] = {}
    profiles: dict[str, list[float]] = {}
    modules, streams = sampled.modules, sampled.streams
    replays: state.Replays | None = None
    if sampled.spectrum is not None:
        with guards["spectrum"]:
            metrics = spectrum.finish(
                sampled.spectrum, host["spectrum"], step.number, memory.spectrum
            )
    if sampled.state is not None:
        with guards["state"]:
            replays = state.finish(sampled.state, host["state"], scale, memory.state)
    if sampled.state is not None and replays is not None:
        metrics |= replays.metrics
        modules = _with_replays(modules, replays, memory.facts.modules)
        streams = _with_drives(streams, replays.drives, memory.facts.streams)
        carried: Collection[str] = ()
        if sampled.flow is not None:
            with guards["flow"]:
                found = flow.finish(
                    sampled.flow, host["flow"], scale, replays.left_out, memory.flow
                )
                metrics |= found.metrics
                profiles, carried = found.profiles, found.carried
                modules = {
                    p: dataclasses.replace(own, samples_mix=found.mixing.get(p))
                    for p, own in modules.items()
                }
        modules = {p: _as_carried(own, p in carried) for p, own in modules.items()}
        for stream, _ in sampled.state.streams:
            metrics |= _over_time(stream, metrics, modules[stream.module].T)
    if sampled.update is not None and sampled.state is not None:
        with guards["update"]:
            streams_seen = [stream for stream, _ in sampled.state.streams]
            metrics |= update.finish(host["update"], streams_seen)
    now = dataclasses.replace(now, run=joined(now.run, sampled.run))
    if sampled.readout is not None:
        with guards["readout"]:
            told = readout.facts(sampled.readout, host["readout"])
            now = dataclasses.replace(now, run=joined(now.run, told))
            seen = readout.finish(
                sampled.readout, host["readout"], scale, memory.readout
            )
            if sampled.passes > 1:  # the loss is of all of them, what was seen of one
                seen.pop(_CONSTANT, None)
            metrics |= seen
    facts = dataclasses.replace(now, modules=modules, streams=streams)
    return facts, Extras(metrics=metrics, profiles=profiles, events=step.events)


_CONSTANT: Final = run_key("loss_constant")
_OF_INPUT: Final = (
    "padding",
    "blank",
    "repeats",
    "input_scale",
    "input_offset",
    "input_spread",
    "sequences_read",
    "steps_read",
    "input_order",
)


def _with_replays(
    modules: Mapping[str, ModuleFacts],
    replays: state.Replays,
    known: Mapping[str, ModuleFacts],
) -> dict[str, ModuleFacts]:
    """Add what the replays have told; of the input until it is measured again."""
    found = dict(modules)
    for path in {**modules, **replays.modules}:
        told = replays.modules.get(path, ModuleFacts())
        lasting = {name: getattr(told, name) for name in _OF_INPUT}
        if path in known:
            for name, value in lasting.items():
                if value is None:
                    lasting[name] = getattr(known[path], name)
        found[path] = dataclasses.replace(
            modules.get(path, ModuleFacts()),
            replay=told.replay or modules.get(path, ModuleFacts()).replay,
            same_batch=told.same_batch,
            input_finite=told.input_finite,
            **lasting,
        )
    return found


def _with_drives(
    streams: Mapping[str, StreamFacts],
    drives: Mapping[str, str],
    known: Mapping[str, StreamFacts],
) -> dict[str, StreamFacts]:
    """Add what drives the units; it holds until it is measured again."""
    found = dict(streams)
    for name in {**streams, **drives}:
        drive = drives.get(name, known[name].drive if name in known else None)
        own = streams.get(name, StreamFacts())
        found[name] = dataclasses.replace(own, drive=drive)
    return found


def _as_carried(facts: ModuleFacts, carried: bool) -> ModuleFacts:
    """Note whether a module goes on from the detached states of an earlier call.

    Where it is not known to, no steps are cut off: where the states lie decides, and
    new zeros may lie where old states were.
    """
    if carried:
        return dataclasses.replace(facts, state_detached=True)
    return dataclasses.replace(facts, cut=None) if facts.cut else facts


def _over_time(
    stream: Stream, metrics: Mapping[str, float], length: int | None
) -> dict[str, float]:
    """Return what the gain of one step comes to over the sequence, in a vanilla net."""
    found: dict[str, float] = {}
    if stream.gates or stream.kind == CELL or length is None:
        return found
    chi = metrics.get(stream_key(stream, "chi"))
    if chi is not None:
        found[stream_key(stream, "gain_log10")] = _log10_times(length, chi)
    rho = metrics.get(stream_key(stream, "rho"))
    slope = metrics.get(stream_key(stream, "act_deriv"))
    if rho is not None and slope is not None and math.isfinite(rho):
        found[stream_key(stream, "rho_eff")] = rho * slope
        found[stream_key(stream, "rho_gain_log10")] = _log10_times(length, rho * slope)
    return found


def _log10_times(length: int, factor: float) -> float:
    """Return T log10 of a factor per step, in decades; -Inf for 0."""
    return length * math.log10(factor) if factor > 0 else -math.inf
