"""From the hooks to readings: the story of one step, while the user trains.

The tap sees a backward, and what is due is launched; it sees the optimizer step and
closes the step; the numbers are drained to the host and go on as a reading.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from gradwatch.derive import Layout, Reading
from gradwatch.health import Health
from gradwatch.observe.capture import Step
from gradwatch.observe.depths import Depths, Sampled
from gradwatch.observe.flow import Flow
from gradwatch.observe.gradient_tap import GradientTap
from gradwatch.observe.measure import Drain
from gradwatch.observe.spectrum import Spectrum
from gradwatch.observe.state import State
from gradwatch.recurrent import (
    Recurrence,
    clean_path,
    parameter_names,
    plain_weight,
)
from gradwatch.schedule import Schedule

_RESCAN_STEPS: Final = 50
_BATCH: Final = 16
"""Most measured steps between two looks of the rules. Never a time: what they then ask
for has to follow from the steps alone."""

_NOT_SAMPLED: Final = Sampled(None, None, None, {})


class _Pending(NamedTuple):
    """A closed step whose numbers have not been taken in yet."""

    step: Step
    drain: Drain
    sampled: Sampled
    time: float
    loss: float | None
    overhead: float
    layout: Layout
    events: tuple[str, ...]


class Sampler:
    """Owns the probes and the tap of one watch, and drains what they saw.

    Args:
        model: The watched model; not kept alive.
        found: Its recurrences.
        owner: Whoever is to live as long as the model's hooks: the watch.
        schedule: When each depth runs.
        health: Where failures and our own time are noted.
        take: Given each reading, in the order of the steps.
        taken: Called when the readings that were due have been taken; returns the norm
            below which a step is unremarkable.
        on_return: Called as each optimizer hook returns; the only place to raise.
        measuring: Whether anything but the gradients is measured.
        samples: How many sequences are replayed; None for all.
        refuse: Whether gradients that are not finite are kept from the optimizer.
        scaler: The GradScaler, where the user passed it.
        start: Number of the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Recurrence],
        owner: object,
        *,
        schedule: Schedule,
        health: Health,
        take: Callable[[Reading], None],
        taken: Callable[[], float],
        on_return: Callable[[], None],
        measuring: bool,
        samples: int | None,
        refuse: bool,
        scaler: Any,
        start: int,
    ) -> None:
        self.paused = False
        self.loss: float | Tensor | None = None
        self.events: list[str] = []
        self._model = weakref.ref(model)
        self._schedule, self._health = schedule, health
        self._take, self._taken = take, taken
        self._measuring = measuring
        self._pending: deque[_Pending] = deque()
        self._layout = (list[str](), Layout((), {}))
        self._last = time.perf_counter()
        self._spent = self._ceiling = 0.0
        self._unseen = 0
        self.depths = Depths(
            found,
            owner,
            schedule=schedule,
            health=health,
            upcoming=self._upcoming,
            samples=samples,
        )
        try:
            self.tap = GradientTap(
                model,
                weights=self._plain_weights,
                on_backward=self._on_backward,
                on_step=self._on_step,
                on_return=on_return,
                due=lambda step: self._due("gradients", step),
                guard=health.guard("gradients"),
                refuse=refuse,
                scaler=scaler,
                start=start,
            )
        except BaseException:
            self.depths.close()
            raise

    # ---- asked by the hooks

    def _due(self, depth: str, step: int) -> bool:
        return not self.paused and self._schedule.due(depth, step)

    def _upcoming(self) -> Sequence[int]:
        """Return the steps that a forward now may belong to, if it is to be seen."""
        return self.tap.upcoming if self._measuring and not self.paused else ()

    def _plain_weights(self) -> dict[str, nn.Parameter]:
        weights = {}
        for recurrence in self.recurrences():
            weight = plain_weight(recurrence)
            if weight is not None and weight.requires_grad:
                weights[recurrence.stream.name] = weight
        return weights

    @property
    def model(self) -> nn.Module | None:
        """The watched model, while it lives."""
        return self._model()

    def recurrences(self) -> list[Recurrence]:
        """Return the recurrences whose modules still live."""
        return self.depths.recurrences()

    def _on_backward(self, step: int) -> None:
        """Launch what is due; the weights are those that the forward used."""
        if self._measuring and not self.paused:
            self.depths.on_backward(step)

    # ---- a step has closed

    def _on_step(self, step: Step) -> None:
        """Start the step's numbers on their way to the host."""
        now, own = time.perf_counter(), self._health.spent
        elapsed, used = now - self._last, own - self._spent
        self._last, self._spent = now, own
        self._schedule.stepped(elapsed - used)
        sampled = self.depths.on_step(self.tap.optimized) or _NOT_SAMPLED
        if step.number % _RESCAN_STEPS == 0:
            self.tap.rescan()
        numbers = step.numbers
        for depth, run in _runs(sampled).items():
            numbers |= {f"{depth}.{k}": t for k, t in run.numbers.items()}
        loss, self.loss = self.loss, None
        if isinstance(loss, Tensor):
            numbers["loss"], loss = loss, None
        if not self.paused:  # else what has happened is told once measuring goes on
            events = (*self.events, *self.depths.events)
            self.events, self.depths.events = [], []
            if numbers or step.events or events:
                self._add(step, sampled, loss, events, used, elapsed)

    def _add(
        self,
        step: Step,
        sampled: Sampled,
        loss: float | None,
        events: tuple[str, ...],
        used: float,
        elapsed: float,
    ) -> None:
        """Start the numbers of a step on their way; take them in where that is due."""
        self._health.overhead = min(max(used / elapsed, 0.0), 1.0) if elapsed else 0.0
        waiting = _Pending(
            step=step,
            drain=Drain(step.numbers),
            sampled=sampled,
            time=time.time(),
            loss=loss,
            overhead=self._health.overhead,
            layout=self._layout_of(step.names),
            events=events,
        )
        self._pending.append(waiting)
        self._unseen += 1
        if not waiting.drain.immediate:
            self.drain(keep=1)  # an accelerator's numbers come one sampled step late
            self._hand_on()
        elif not self._unremarkable(waiting):
            self.drain()
            self._hand_on()

    def _unremarkable(self, waiting: _Pending) -> bool:
        """Tell whether a step can wait a little, to be taken in with those after it.

        No rule of the catalogue decides on such a step in haste, and several at once
        cost half of what each costs alone. Anything unusual is taken in as it comes.
        """
        pre = waiting.step.numbers.get("pre")
        if waiting.sampled is not _NOT_SAMPLED or not isinstance(pre, list):
            return False
        if waiting.events or waiting.step.events or "scale" in waiting.step.numbers:
            return False
        if waiting.loss is not None and not math.isfinite(waiting.loss):
            return False
        if self._unseen >= _BATCH:
            return False
        return math.hypot(*pre) < self._ceiling

    def drain(self, keep: int = 0) -> None:
        """Take in the steps whose numbers are due on the host, all but ``keep``."""
        while len(self._pending) > keep:
            waiting = self._pending.popleft()
            began = time.perf_counter()
            host = waiting.drain.wait()
            reading = Reading(
                step=waiting.step,
                host=host,
                layout=waiting.layout,
                spectrum=waiting.sampled.spectrum,
                state=waiting.sampled.state,
                flow=waiting.sampled.flow,
                time=waiting.time,
                loss=float(host["loss"]) if "loss" in host else waiting.loss,
                overhead=waiting.overhead,
                facts=waiting.sampled.facts,
                events=waiting.events,
            )
            self._take(reading)
            self._note_costs(waiting.sampled, time.perf_counter() - began)

    def _hand_on(self) -> None:
        """Have what was taken in written, and learn what the rules ask for.

        Not where a user reads records early: reading is to change nothing.
        """
        self._ceiling, self._unseen = self._taken(), 0

    def _note_costs(self, sampled: Sampled, finish: float) -> None:
        """Tell the schedule what the depths of a step cost; the finish is shared."""
        ran = _runs(sampled)
        for depth, run in ran.items():
            changed = self._schedule.ran(depth, run.seconds + finish / len(ran))
            if changed is not None:
                self.events.append(f"cadence: {changed}")

    def bring_up_to_date(self) -> None:
        """Take in what waits on the host already; an accelerator is not waited for."""
        if self._pending and all(p.drain.immediate for p in self._pending):
            self.drain()

    def _layout_of(self, names: list[str]) -> Layout:
        """Return which parameters are behind which key, for the present parameters."""
        if self._layout[0] is not names:
            index = {name: i for i, name in enumerate(names)}
            model = self._model()
            paths: dict[int, str] = {}
            for path, module in model.named_modules() if model is not None else ():
                paths.setdefault(id(module), clean_path(path))
            groups = []
            for recurrence in self.recurrences():
                path = paths.get(id(recurrence.module), "")
                start = f"{path}." if path else ""
                parts = {
                    group: [index[start + n] for n in own if start + n in index]
                    for group, own in parameter_names(recurrence).items()
                }
                groups.append((recurrence.stream, parts))
            self._layout = (names, Layout.of(groups))
        return self._layout[1]

    def notes(
        self, seen: Mapping[str, Any], lost: Mapping[str, int], *, begun: bool
    ) -> dict[str, str]:
        """Say of which streams something is not measured, and why.

        Args:
            seen: The facts of modules and streams.
            lost: Module -> how many of its replays were left out.
            begun: Whether a step has been taken in.
        """
        found = {}
        for recurrence in self.recurrences():
            path, weight = recurrence.stream.module, plain_weight(recurrence)
            facts = seen.get(path, {})
            note = None
            if begun and "T" not in facts:
                note = (
                    "rho not measured: no gradient has reached a call of the module "
                    "(called by .forward?)"
                )
            elif "replay" in facts:
                times = f"left out ({lost.get(path)} times)"
                note = f"states {facts['replay'].replace('left out', times)}"
            elif facts.get("state_detached"):
                note = f"its state is detached every {facts['T']} steps"
            elif weight is None:
                note = "W_hh is parametrised: no update_ratio"
            elif not weight.requires_grad:
                note = "W_hh is frozen: no gradient norms"
            if note is not None:
                found[recurrence.stream.name] = note
        return found

    # ---- the end

    def settle(self) -> None:
        """Close the open step where that can be, and take in all that waits."""
        self.tap.settle()
        self.drain()

    def close(self) -> None:
        """Take every hook off and take in all that waits. Safe to call twice."""
        try:
            self.tap.close()
            self.drain()
        finally:
            self.depths.close()


def _runs(sampled: Sampled) -> dict[str, Spectrum | State | Flow]:
    """Return what was launched in a step, by depth."""
    runs = {"spectrum": sampled.spectrum, "state": sampled.state, "flow": sampled.flow}
    return {depth: run for depth, run in runs.items() if run is not None}
