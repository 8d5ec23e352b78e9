"""One step as it was measured: first on the device, then on the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from torch import Tensor

from gradwatch.depths.drain import Drain, Numbers
from gradwatch.depths.flow import Flow
from gradwatch.depths.gradients import Gradients, Layout
from gradwatch.depths.parts import Update
from gradwatch.depths.readout import Readout
from gradwatch.depths.spectrum import Spectrum
from gradwatch.depths.state import State
from gradwatch.facts import RUN_SCOPE, ModuleFacts, RunFacts, StreamFacts
from gradwatch.hooks.chain import Chain
from gradwatch.hooks.modules import Chains
from gradwatch.hooks.roots import Loss

Run = Spectrum | State | Flow


@dataclass(slots=True, kw_only=True)
class Sampled:
    """What was launched of a step at which more than the gradients is due.

    Attributes:
        chains: The calls that gradients have reached, by module.
        stepped: The same of cells of the user's own.
        runs: What was launched, by depth, its numbers still on the device.
        seconds: What that cost on the host's clock, by depth.
        modules: Facts of the modules, by path.
        streams: Facts of the streams, by name.
        update: Where the updates of recurrent weights come from.
        run: Facts of the run.
        readout: What was seen of what the loss reads; of the first pass of the step.
        events: What has happened to the cadence of a depth.
        passes: Backward passes of the step whose call was seen.
    """

    chains: Chains = field(default_factory=dict)
    stepped: dict[int, Chain] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    modules: dict[str, ModuleFacts] = field(default_factory=dict)
    streams: dict[str, StreamFacts] = field(default_factory=dict)
    update: Update | None = None
    run: RunFacts = RUN_SCOPE
    readout: Readout | None = None
    events: list[str] = field(default_factory=list)
    passes: int = 0

    @property
    def spectrum(self) -> Spectrum | None:
        """The run of the spectrum, if there is one."""
        run = self.runs.get("spectrum")
        return run if isinstance(run, Spectrum) else None

    @property
    def state(self) -> State | None:
        """The run of the states, if there is one."""
        run = self.runs.get("state")
        return run if isinstance(run, State) else None

    @property
    def flow(self) -> Flow | None:
        """The run of the flow, if there is one."""
        run = self.runs.get("flow")
        return run if isinstance(run, Flow) else None

    def add(self, depth: str, run: Run | None, since: float) -> None:
        """Add a run of a depth, or more work of it.

        Args:
            depth: The depth.
            run: What was launched; None: nothing new.
            since: When that began, by ``time.perf_counter``.
        """
        if run is not None:
            self.runs[depth] = run
        spent = self.seconds.get(depth, 0.0) + time.perf_counter() - since
        self.seconds[depth] = spent


class Parts(NamedTuple):
    """What was measured of a step.

    Attributes:
        gradients: What was read of its gradients.
        layout: Which numbers are behind which key.
        sampled: What else was launched; None where nothing was due.
        loss: Its loss.
        found: Whether that was found, as a loss scaler has multiplied it; else it was
            logged.
    """

    gradients: Gradients
    layout: Layout
    sampled: Sampled | None
    loss: Loss
    found: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A closed step.

    Attributes:
        number: Its number.
        time: When it closed, in seconds since the epoch.
        parts: What was measured of it.
        overhead: Share of the time since the last step that gradwatch used.
        skipped_by: Who left its gradients unused; empty where an optimizer used them.
        events: What has happened in it.
        drain: All of its numbers on their way to the host, by depth; ``loss`` is a
            loss that was not on the host.
    """

    number: int
    time: float
    parts: Parts
    overhead: float
    skipped_by: str
    events: tuple[str, ...]
    drain: Drain

    @classmethod
    def of(
        cls,
        number: int,
        parts: Parts,
        *,
        skipped_by: str,
        events: Sequence[str],
        overhead: float,
    ) -> Self | None:
        """Send the numbers of a step on their way to the host.

        Returns:
            The step; None where there is nothing to record of it.
        """
        numbers: dict[str, Numbers] = {"gradients": parts.gradients.numbers()}
        if parts.sampled is not None:
            runs = parts.sampled.runs.items()
            numbers |= {depth: run.numbers for depth, run in runs}
            if parts.sampled.readout is not None:
                numbers["readout"] = parts.sampled.readout.numbers
            if parts.sampled.update is not None:
                numbers["update"] = parts.sampled.update.numbers
            events = [*events, *parts.sampled.events]
        if skipped_by:
            events = ["skipped_step", *events]
        loss_alone = parts.gradients.partial and parts.loss is not None
        if not events and not any(numbers.values()) and not loss_alone:
            return None
        loss: Numbers = {}
        if isinstance(parts.loss, Tensor):
            loss["loss"] = parts.loss
        return cls(
            number=number,
            time=time.time(),
            parts=parts,
            overhead=overhead,
            skipped_by=skipped_by,
            events=tuple(events),
            drain=Drain({**numbers, "loss": loss}),
        )
