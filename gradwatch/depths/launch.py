"""What is launched of a sampled step: the depths that are due, in their order."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch

from gradwatch.depths import parts, readout
from gradwatch.depths.flow import Flow
from gradwatch.depths.measured import Sampled
from gradwatch.depths.parts import Updated
from gradwatch.depths.sampled_facts import of_calls, of_cell, of_stream, reach_of
from gradwatch.depths.spectrum import Recurrent, Spectrum, gated, too_large
from gradwatch.depths.state import State
from gradwatch.depths.trajectory import Trajectory, trajectory
from gradwatch.facts import ModuleFacts, RunFacts, StreamFacts
from gradwatch.health import Health
from gradwatch.hooks.chain import Chain
from gradwatch.hooks.modules import Chains, ModuleHooks
from gradwatch.hooks.optimizers import Training
from gradwatch.hooks.probe import NOTHING, Wanted
from gradwatch.recurrent import plain_weight
from gradwatch.schedule import Schedule

SAMPLED: Final = ("spectrum", "state", "flow")
"""The depths that are not measured at every step, in the order of their launch."""


class Launcher:
    """Launches what is due; the numbers stay on the device.

    Args:
        modules: What shows the calls.
        schedule: When each depth is due.
        health: Where failures are noted.
    """

    def __init__(
        self, modules: ModuleHooks, schedule: Schedule, health: Health
    ) -> None:
        self.module_facts: dict[str, ModuleFacts] = {}
        """Facts of each module, by its path, when it was last sampled."""
        self._stream_facts: dict[str, StreamFacts] = {}
        self._modules, self._schedule, self._off = modules, schedule, health.off
        self._guards = {
            part: health.guard(part)
            for part in (*SAMPLED, "readout", "update", "probe")
        }
        self._spectra = 0

    # ---- what is due

    def due(self, depth: str, step: int) -> bool:
        """Tell whether a depth is due at a step, and has not failed."""
        needed = ("state", "flow") if depth == "flow" else (depth,)  # the same replay
        if self._off and not self._off.isdisjoint((*needed, "probe")):
            return False
        return self._schedule.due(depth, step)

    def flow_is_due(self, step: int, soonest: int) -> tuple[bool, bool]:
        """Tell whether the flow is due at a step, and at the one after it.

        Args:
            step: The step.
            soonest: At which anything is due first.
        """
        if soonest > step + 1:
            return False, False
        return self.due("flow", step), self.due("flow", step + 1)

    def wanted(self, steps: Sequence[int]) -> Wanted:
        """Return what a forward has to show that may belong to some steps."""
        grads = any(self.due("flow", n) for n in steps)
        sequences = grads or any(self.due("state", n) for n in steps)
        weights = sequences or any(self.due("spectrum", n) for n in steps)
        soon = grads or self.due("flow", steps[-1] + 1)
        return Wanted(weights, sequences, grads, soon) if weights or soon else NOTHING

    # ---- the end of backward

    def launch(
        self, step: int, sampled: Sampled | None, called: Collection[int]
    ) -> Sampled | None:
        """Launch what is due; the weights are those that the forward used.

        Args:
            step: The step that a backward pass belongs to.
            sampled: What earlier passes of the same step have launched; it stands.
            called: Ids of the modules that were called in this step.

        Returns:
            What was launched; None where nothing is due.
        """
        due = {depth for depth in SAMPLED if self.due(depth, step)}
        if not due:
            return sampled
        sampled = sampled or Sampled()
        known, found = sampled.chains, self._modules.take()
        new = {key: chain for key, chain in found.items() if key not in known}
        known.update(new)
        cells = self._modules.take_stepped()
        cells = {key: c for key, c in cells.items() if key not in sampled.stepped}
        sampled.stepped |= cells
        self._note_calls(sampled, called)
        if "spectrum" in due and (new or cells):
            with self._whole("spectrum", sampled):
                self._launch_spectrum(sampled, new, cells)
        replays: dict[int, Trajectory] = {}
        with torch.no_grad():
            if due & {"state", "flow"} and (new or cells):
                with self._whole("state", sampled):
                    measured = "state" in due
                    replays = self._launch_replays(sampled, new, measured=measured)
                    if measured:
                        self._launch_cells(sampled, cells, "state", State)
            if "flow" in due and replays:
                with self._whole("flow", sampled):
                    self._launch_flow(step, sampled, replays)
            if "flow" in due and cells:
                with self._whole("flow", sampled):
                    self._launch_cells(sampled, cells, "flow", Flow)
            if "state" in due and sampled.state is not None:
                with self._whole("state", sampled):
                    sampled.state.add_gates(self._modules.alive())
            if "state" in due and sampled.readout is None:
                with self._guards["readout"]:
                    self._launch_readout(sampled)
        return sampled

    @contextmanager
    def _whole(self, depth: str, sampled: Sampled) -> Iterator[None]:
        """Measure a depth whole, or leave it out: half of one is worth nothing."""
        guard = self._guards[depth]
        with guard:
            yield
        if guard.tripped:
            sampled.runs.pop(depth, None)
            if depth == "state":
                sampled.runs.pop("flow", None)  # it is of the same replay

    def _note_calls(self, sampled: Sampled, called: Collection[int]) -> None:
        """Note what is known of the calls, and whether gradients have reached them."""
        alive = self._modules.members()
        paths = {own[0].stream.module: key for key, own in alive.items()}
        for stream in self._modules.streams:
            key, known = paths.get(stream.module), self.module_facts.get(stream.module)
            chain = [] if key is None else sampled.chains.get(key, [])
            cell = None if key is None else sampled.stepped.get(key)
            told = of_calls(chain) if cell is None else of_cell(cell)
            self.module_facts[stream.module] = reach_of(
                told or known,
                reached=bool(chain) or cell is not None,
                called=key in called,
                alive=key is not None,
            )

    def _launch_spectrum(
        self, sampled: Sampled, chains: Chains, cells: Mapping[int, Chain]
    ) -> None:
        began = time.perf_counter()
        weights: list[Recurrent] = []
        for recurrence in self._modules.alive():
            stream, suffix = recurrence.stream, recurrence.suffix
            if (told := cells.get(id(recurrence.module))) is not None:
                weights += gated(stream, told.matrices)
            chain = chains.get(id(recurrence.module))
            copies = chain[0].weights if chain else {}
            weight = copies.get(f"weight_hh{suffix}")
            if weight is not None and weight.numel():
                weights.append((stream, weight, copies.get(f"weight_hr{suffix}")))
        if not weights:
            return
        sizes = [(s.hidden_size, max(len(s.gates), 1)) for s, *_ in weights]
        if too_large(sizes, weights[0][1].device):
            sampled.events.append(f"cadence: {self._schedule.leave_out('spectrum')}")
            return
        if sampled.spectrum is None:
            self._spectra += 1
        run = sampled.spectrum or Spectrum()
        run.add(weights, gram=self._spectra % 2 == 1)
        sampled.add("spectrum", run, began)

    def _launch_replays(
        self, sampled: Sampled, chains: Chains, *, measured: bool
    ) -> dict[int, Trajectory]:
        """Replay the forward of modules, and measure their states where due."""
        began = time.perf_counter()
        run, replays = sampled.state or State(), dict[int, Trajectory]()
        for module, own in self._modules.members().items():
            if chain := chains.get(module):
                replayed = trajectory(own, chain)
                if measured:
                    run.add(own[0].stream.module, own, replayed)
                else:
                    run.check(own[0].stream.module, replayed)
                if isinstance(replayed, Trajectory):
                    replays[module] = replayed
        sampled.add("state", run, began)
        return replays

    def _launch_cells(
        self,
        sampled: Sampled,
        cells: Mapping[int, Chain],
        depth: str,
        kind: type[State] | type[Flow],
    ) -> None:
        """Take what backward has shown of cells of the user's own."""
        began = time.perf_counter()
        known_run = sampled.runs.get(depth)
        run = known_run if isinstance(known_run, kind) else kind()
        for module, own in self._modules.members().items():
            if (chain := cells.get(module)) is not None:
                stream = own[0].stream
                run.add_stepped(stream, chain)
                known = self._stream_facts.get(stream.name) or StreamFacts()
                size = chain.shape[2] or None
                self._stream_facts[stream.name] = replace(known, state_size=size)
                began -= chain.seconds if depth == "flow" else 0.0
        sampled.add(depth, run, began)

    def _launch_flow(
        self, step: int, sampled: Sampled, replays: Mapping[int, Trajectory]
    ) -> None:
        """Run backpropagation through time over what was replayed."""
        began = time.perf_counter()
        run = sampled.flow or Flow(seeded=self._schedule.seeds_due(step))
        for module, own in self._modules.members().items():
            replayed, path = replays.get(module), own[0].stream.module
            if replayed is None:
                continue
            if len(replayed.x) > 1 or self.module_facts[path].cut:  # else no way back
                run.add(own[0].stream.module, own, replayed)
        if run.seeded:
            self._schedule.seeded(step)
        sampled.add("flow", run, began)

    def _launch_readout(self, sampled: Sampled) -> None:
        """Measure what the loss reads; it is due with the states, and costs little."""
        began = time.perf_counter()
        if (taken := self._modules.readout.take()) is not None:
            sampled.readout = readout.launch(taken)
            sampled.add("state", None, began)

    # ---- a step has closed

    def complete(
        self,
        sampled: Sampled,
        training: Training | None,
        updated: Sequence[Updated],
    ) -> None:
        """Add the update of the weights, and what is known of modules and streams.

        Args:
            sampled: What was launched of the step.
            training: How the parameters are trained; None while no optimizer was seen.
            updated: The recurrent weights that one has changed.
        """
        if sampled.state is not None and updated:
            began = time.perf_counter()
            with self._guards["update"], torch.no_grad():
                sampled.update = parts.launch(updated)
            sampled.add("state", None, began)
        if sampled.spectrum is not None:
            began = time.perf_counter()
            with self._whole("spectrum", sampled):
                sampled.spectrum.add_update(self._after(sampled))
            sampled.add("spectrum", None, began)
        for recurrence in self._modules.alive():
            name = recurrence.stream.name
            known = of_stream(self._stream_facts.get(name), recurrence, training)
            if known is not None:
                self._stream_facts[name] = known
        if training is not None:
            sampled.run = RunFacts(optimizers=training.groups, unheld=training.unheld)
        sampled.modules.update(self.module_facts)
        sampled.streams.update(self._stream_facts)

    def _after(self, sampled: Sampled) -> dict[str, Recurrent]:
        """Return the weights as they are now, by stream, where they are those used."""
        found: dict[str, Recurrent] = {}
        if self._modules.shards.any:  # a whole weight is not the one that is trained
            return found
        for recurrence in self._modules.alive():
            stream, suffix = recurrence.stream, recurrence.suffix
            weight = plain_weight(recurrence)
            chain = sampled.chains.get(id(recurrence.module))
            if weight is None or not chain:
                continue
            used = chain[0].used.get(f"weight_hh{suffix}")
            if used is None or used.data_ptr() != weight.data_ptr():
                continue  # the forward was called with other weights
            projection = recurrence.module._parameters.get(f"weight_hr{suffix}")
            if bool(stream.proj_size) == (projection is not None):
                found[stream.name] = (stream, weight, projection)
        return found
