"""The sampled depths, state, spectrum and flow: when they run, and on what.

The probes show what a forward used; at the end of backward what is due is launched;
after the optimizer's step the update of the weights is added.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gradwatch.health import Health
from gradwatch.observe.capture import Capture
from gradwatch.observe.flow import Flow
from gradwatch.observe.probe import Probe, Wanted
from gradwatch.observe.sequence import Trajectory, trajectory
from gradwatch.observe.spectrum import (
    Recurrent,
    Spectrum,
    add_update,
    spectrum,
    too_large,
)
from gradwatch.observe.state import State, gate_gradients
from gradwatch.record import Stream
from gradwatch.recurrent import Recurrence, plain_weight
from gradwatch.schedule import Schedule


class Sampled(NamedTuple):
    """What was launched in one step, and what is no number."""

    spectrum: Spectrum | None
    state: State | None
    flow: Flow | None
    facts: Mapping[str, Any]


class Depths:
    """Owns the probes of one watch.

    Args:
        found: The recurrences of the model; their modules are not kept alive.
        owner: Whoever is to live as long as the model's hooks: the watch.
        schedule: When each depth runs.
        health: Where failures are noted.
        upcoming: Returns the steps that a forward now may belong to; none while
            nothing is to be measured.
        samples: How many sequences are looked at; None for all.
    """

    def __init__(
        self,
        found: Sequence[Recurrence],
        owner: object,
        *,
        schedule: Schedule,
        health: Health,
        upcoming: Callable[[], Sequence[int]],
        samples: int | None,
    ) -> None:
        self.probes: list[Probe] = []
        self.spectrum: Spectrum | None = None
        self.state: State | None = None
        self.flow: Flow | None = None
        self.events: list[str] = []
        self.facts: dict[str, Any] = {}
        self._found = [(r.stream, weakref.ref(r.module), r.suffix) for r in found]
        self._schedule, self._upcoming = schedule, upcoming
        self._guards = {
            "spectrum": health.guard("spectrum"),
            "state": health.guard("state"),
            "flow": health.guard("flow"),
        }
        self._spectrum_runs = 0
        self._sampled = False
        self._answer: tuple[object, Wanted] = (None, Wanted(False, False))
        self._chains: dict[int, list[Capture]] = {}
        self._replays: dict[int, Trajectory] = {}
        guard = health.guard("probe", self.close)
        try:  # a failure half-way undoes what came before
            for module in {id(r.module): r.module for r in found}.values():
                probe = Probe(
                    module, owner, wanted=self._wanted, samples=samples, guard=guard
                )
                self.probes.append(probe)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the probes off. Safe to call twice."""
        for probe in self.probes:
            probe.close()
        self.probes.clear()
        self._chains.clear()

    def recurrences(self) -> list[Recurrence]:
        """Return the recurrences whose modules still live."""
        found = [(stream, ref(), suffix) for stream, ref, suffix in self._found]
        return [Recurrence(s, m, suffix) for s, m, suffix in found if m is not None]

    def _due(self, depth: str, step: int) -> bool:
        needed = ("state", "flow") if depth == "flow" else (depth,)  # the same replay
        failed = any(self._guards[part].failed for part in needed)
        return not failed and self._schedule.due(depth, step)

    def _wanted(self) -> Wanted:
        """Tell what a forward now is to show; it may belong to a sampled step.

        A cell is called at every time step: the answer is kept for as long as it holds.
        """
        steps = self._upcoming()
        asked = (steps, self._schedule.changes)
        if self._answer[0] != asked:
            self._answer = (asked, self._wanted_at(steps))
        return self._answer[1]

    def _wanted_at(self, steps: Sequence[int]) -> Wanted:
        grads = any(self._due("flow", n) for n in steps)
        rows = grads or any(self._due("state", n) for n in steps)
        weights = rows or any(self._due("spectrum", n) for n in steps)
        soon = bool(steps) and self._due("flow", steps[-1] + 1)
        return Wanted(weights, rows, grads, address=grads or soon)

    # ---- the end of backward

    def on_backward(self, step: int) -> None:
        """Launch what is due; the weights are those that the forward used."""
        due = {d for d in ("spectrum", "state", "flow") if self._due(d, step)}
        if not due:
            return
        self._sampled = True
        if None in (self.spectrum, self.state, self.flow):
            self._take()
        if not self._chains:
            return
        if "spectrum" in due and self.spectrum is None:
            with self._guards["spectrum"]:
                self._launch_spectrum()
        with torch.no_grad():
            if self.state is None and due & {"state", "flow"}:
                with self._guards["state"]:
                    self._launch_replays(measured="state" in due)
            if "flow" in due and self.flow is None and self._replays:
                with self._guards["flow"]:
                    self._launch_flow()
            if "state" in due and self.state is not None:
                with self._guards["state"]:
                    gate_gradients(self.recurrences(), self.state)
        self._replays.clear()

    def _take(self) -> None:
        """Take the calls that gradients have reached; the first of a step stand."""
        for probe in self.probes:
            chain, key = probe.take(), id(probe.module())
            if chain and key not in self._chains:
                self._chains[key] = chain
        for stream, module, _ in self._found:
            chain = self._chains.get(id(module()), [])
            shapes = [c.shape for c in chain if c.shape is not None]
            if shapes:
                self.facts[stream.module] = {
                    "T": sum(length for length, _ in shapes),
                    "B": shapes[0][1],
                    "dtype": chain[0].dtype,
                }
                if autocast := chain[0].autocast:
                    self.facts[stream.module]["autocast"] = autocast
                if cut := _steps_cut_off(chain[0]):
                    self.facts[stream.module]["cut"] = cut

    def _launch_spectrum(self) -> None:
        began = time.perf_counter()
        weights: list[Recurrent] = []
        for stream, module, suffix in self._found:
            for capture in self._chains.get(id(module()), [])[:1]:
                weight = capture.weights.get(f"weight_hh{suffix}")
                if weight is not None and weight.numel():
                    projection = capture.weights.get(f"weight_hr{suffix}")
                    weights.append((stream, weight, projection))
        if not weights:
            return
        sizes = [(s.hidden_size, max(len(s.gates), 1)) for s, *_ in weights]
        if too_large(sizes, weights[0][1].device):
            self.events.append(f"cadence: {self._schedule.leave_out('spectrum')}")
            return
        run = spectrum(weights, gram=self._spectrum_runs % 2 == 0)
        run.seconds = time.perf_counter() - began
        self.spectrum, self._spectrum_runs = run, self._spectrum_runs + 1

    def _launch_replays(self, *, measured: bool) -> None:
        """Replay the forward of every module, and measure its states where due."""
        began = time.perf_counter()
        run = State()
        for module, own in self._members().items():
            if chain := self._chains.get(module):
                replayed = trajectory(own, chain)
                if measured:
                    run.add(own[0].stream.module, own, replayed)
                else:
                    run.check(own[0].stream.module, replayed)
                if isinstance(replayed, Trajectory):
                    self._replays[module] = replayed
        run.seconds = time.perf_counter() - began
        self.state = run

    def _launch_flow(self) -> None:
        """Run backpropagation through time over what was replayed."""
        began = time.perf_counter()
        run = Flow()
        for module, own in self._members().items():
            if (replayed := self._replays.get(module)) is not None:
                run.add(own[0].stream.module, own, replayed)
        run.seconds = time.perf_counter() - began
        self.flow = run

    def _members(self) -> dict[int, list[Recurrence]]:
        """Return the recurrences of each module that still lives, by its id."""
        members: dict[int, list[Recurrence]] = {}
        for recurrence in self.recurrences():
            members.setdefault(id(recurrence.module), []).append(recurrence)
        return members

    # ---- a step has closed

    def on_step(
        self, optimized: Callable[[], Mapping[int, float] | None]
    ) -> Sampled | None:
        """Return what was launched in the step that has closed, its update added.

        Args:
            optimized: Returns the learning rate of every parameter that an optimizer
                holds, by its id; None while no optimizer was seen.

        Returns:
            The runs and the facts of the step; None where no depth was due.
        """
        if not self._sampled:
            for probe in self.probes:
                if probe.calls:
                    probe.forget()
            return None
        run = self.spectrum
        if run is not None:
            began = time.perf_counter()
            with self._guards["spectrum"]:
                add_update(run, self._after())
            run.seconds += time.perf_counter() - began
        self._note_reach()
        self._note_parameters(optimized())
        sampled = Sampled(run, self.state, self.flow, dict(self.facts))
        for probe in self.probes:
            probe.forget()
        self._chains.clear()
        self._sampled = False
        self.spectrum = self.state = self.flow = None
        return sampled

    def _after(self) -> Callable[[Stream], Recurrent | None]:
        """Return what looks up a stream's weights as they are now."""
        now = {r.stream.name: r for r in self.recurrences()}
        used = {
            (module, name): weight.data_ptr()
            for module, chain in self._chains.items()
            for name, weight in chain[0].used.items()
        }

        def weights(stream: Stream) -> Recurrent | None:
            recurrence = now.get(stream.name)
            weight = None if recurrence is None else plain_weight(recurrence)
            if recurrence is None or weight is None:
                return None
            name = (id(recurrence.module), f"weight_hh{recurrence.suffix}")
            if used.get(name) != weight.data_ptr():
                return None  # the forward was called with other weights
            if not stream.proj_size:
                return stream, weight, None
            projection = recurrence.module._parameters.get(
                f"weight_hr{recurrence.suffix}"
            )
            return None if projection is None else (stream, weight, projection)

        return weights

    def _note_reach(self) -> None:
        """Note of each module whether gradients reached a call of it in this step."""
        for probe in self.probes:
            module = probe.module()
            if module is None:
                continue
            paths = {s.module for s, ref, _ in self._found if ref() is module}
            reach = "detached" if probe.calls else "unused"
            reach = "reached" if id(module) in self._chains else reach
            for path in paths:
                self.facts[path] = {**self.facts.get(path, {}), "reach": reach}
        for stream, ref, _ in self._found:
            if ref() is None:
                self.facts[stream.module] = {"reach": "gone"}

    def _note_parameters(self, optimized: Mapping[int, float] | None) -> None:
        """Note of each W_hh whether it can learn and whether anything trains it."""
        for recurrence in self.recurrences():
            weight, name = plain_weight(recurrence), recurrence.stream.name
            if weight is None:
                continue
            known = {k: v for k, v in self.facts.get(name, {}).items() if k != "lr"}
            known["requires_grad"] = weight.requires_grad
            known["in_optimizer"] = None
            if optimized is not None:
                known["in_optimizer"] = id(weight) in optimized
                if (rate := optimized.get(id(weight))) is not None:
                    known["lr"] = _roughly(rate)
            self.facts[name] = known


def _steps_cut_off(first: Capture) -> int:
    """Return the steps of earlier calls whose state was detached, and that get nothing.

    Where an earlier call has had a gradient of its own, through a loss of its own,
    nothing is lost.
    """
    steps, past = 0, first.cut_from
    while past is not None:
        call = past.call()
        if call is not None and call.reached:
            break
        steps, past = steps + past.steps, past.before
    return steps


def _roughly(rate: float) -> float:
    """Return a learning rate as a power of 2, or 0: a fact is not to change often."""
    return 2.0 ** round(math.log2(rate)) if rate > 0 and math.isfinite(rate) else 0.0
