"""Closed steps on their way to rules and sinks: drained, finished, and in blocks.

An unremarkable step waits for those after it, at most 16; a remarkable one goes on at
once, with all that wait. Never by the clock: what rules ask for must follow from the
steps alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from gradwatch.block import LONGEST, ROWS, Block, Extras, Row
from gradwatch.depths import gradients
from gradwatch.depths.finish import Memory, finish
from gradwatch.depths.gradients import Plain
from gradwatch.depths.measured import Measured
from gradwatch.facts import NO_FACTS, STEP_SCOPE, Facts
from gradwatch.health import Health
from gradwatch.pipeline import Pipeline
from gradwatch.record import Alert, TrainingAlert
from gradwatch.schedule import DEPTHS
from gradwatch.settings import Settings

REFUSED = "refused"
"""What a step is skipped by whose gradients gradwatch kept from the optimizer."""


class Intake:
    """Takes closed steps, and hands them on as blocks.

    Args:
        pipeline: Where blocks go.
        settings: The arguments of the watch; its schedule is told what depths cost,
            and what the rules ask for.
        health: Where failures are noted.
    """

    def __init__(self, pipeline: Pipeline, settings: Settings, health: Health) -> None:
        self.memory = Memory()
        self.unseen_writes = False
        """Whether the loop was found to write gradients without a trace."""
        self._pipeline, self._schedule = pipeline, settings.schedule
        self._patient, self._raising = settings.patient, settings.raising
        parts = (*DEPTHS[1:], "readout", "update")
        self._guards = {part: health.guard(part) for part in parts}
        self._events: list[str] = []
        self._asks = False  # for the spectrum of weights that were written
        self._waiting: deque[Measured | Plain] = deque()
        self._since = 0
        self.bound = 0.0
        """A total norm below which a step is usual by now; 0 where it is not known."""
        self._earlier: Facts = NO_FACTS
        self._handing_on = False
        self._alert: Alert | None = None

    @property
    def refuses(self) -> bool:
        """Whether gradients that are not finite are kept from the optimizers."""
        return self._raising and self._pipeline.reports("nonfinite")

    # ---- what has happened

    def note(self, *events: str) -> None:
        """Note what has happened, for the next record to hold."""
        self._events += events
        self._asks = self._asks or any(e.startswith("written:") for e in events)

    def take_events(self) -> tuple[str, ...]:
        """Return what has happened since the last record."""
        events, self._events = tuple(self._events), []
        return events

    def raise_if_due(self) -> None:
        """Stop the training where that was asked for; only an optimizer's hook may.

        Raises:
            TrainingAlert: Once for an alert that is to stop it.
        """
        alert = self._alert
        if alert is not None:
            self._alert = None
            raise TrainingAlert(alert)

    def resume_from(self, memory: Memory) -> None:
        """Go on with what an earlier run remembered."""
        self.memory, self._earlier = memory, memory.facts

    # ---- a step has closed

    def take(self, step: Measured) -> bool:
        """Take a step; tell whether it, and all that wait, are to go on now."""
        self._waiting.append(step)
        self._since += 1
        return not step.drain.immediate or not self._can_wait(step)

    def _can_wait(self, step: Measured) -> bool:
        """Tell whether nothing is remarkable about a step: no rule decides on it.

        Its norm is compared with those that were usual before the steps that wait.
        """
        read, _, sampled, loss, _ = step.parts
        if not self._patient or self._since >= self.rows or sampled is not None:
            return False
        if step.events or read.scale is not None:
            return False
        if read.cleared is False and self.memory.facts.run.cleared is not False:
            return False  # the steps that come are to be looked at for it
        if (
            loss is not None
            and not isinstance(loss, Tensor)
            and not math.isfinite(loss)
        ):
            return False
        before = read.before
        return isinstance(before, list) and math.hypot(*before) < self.bound

    def take_plain(self, steps: Sequence[Plain]) -> None:
        """Take steps of the quiet path; see :meth:`take`."""
        self._waiting.extend(steps)
        self._since += len(steps)
        for step in steps:
            self._schedule.stepped(step.elapsed, step.spent, full=step.read is not None)

    @property
    def since(self) -> int:
        """How many steps have come since the last ones were handed on."""
        return self._since

    @property
    def overdue(self) -> bool:
        """Whether steps of the quiet path are to go on now."""
        last = self._waiting[-1] if self._waiting else None
        loss = last.loss if isinstance(last, Plain) else None
        told = loss is not None and not math.isfinite(loss)
        return self._since >= self.rows or told or bool(self._events)

    @property
    def rows(self) -> int:
        """How many steps may wait."""
        return min(ROWS * self.full_every, LONGEST)

    @property
    def full_every(self) -> int:
        """Every how many steps gradients are read in full: each, if anything is odd."""
        return 1 if self._pipeline.restless else self._schedule.in_full

    @property
    def quiet(self) -> bool:
        """Whether nothing has been found that every step has to be looked at for."""
        run = self.memory.facts.run
        known = run.cleared is not False and run.scaled is None
        return known and not self._events and not self.unseen_writes

    def release(self, upcoming: int) -> None:
        """Hand on what waits, and have measured what the rules ask for.

        Args:
            upcoming: The next step whose forward is still to come.
        """
        self.hand_on(keep=int(self._last_may_wait()))
        self._since = 0
        chosen = self._schedule.choose()
        if chosen is not None:
            self.note(f"cadence: {chosen}")
        self.bound = self.memory.gradients.bound
        self._pipeline.write_out()
        if self._asks:
            self._asks = False
            self._schedule.ask("spectrum", upcoming)
        for depth in self._pipeline.judge.wished():
            self._schedule.ask_within_budget(depth, upcoming)
        for depth in self._pipeline.judge.wanted():
            self._schedule.ask(depth, upcoming)

    def _last_may_wait(self) -> bool:
        """Tell whether the last step's numbers are on their way from an accelerator.

        They are waited for one step later, but for a step that is refused: what raises
        has to do so before the optimizer steps.
        """
        if not self._waiting:
            return False
        last = self._waiting[-1]
        if isinstance(last, Plain):
            return False
        return not last.drain.immediate and last.skipped_by != REFUSED

    def hand_on(self, keep: int = 0) -> None:
        """Finish the steps that wait, all but ``keep``, and hand them on.

        Whoever reads the watch while an alert is given out, sees what is there by then.
        """
        if self._handing_on:
            return
        self._handing_on = True
        try:
            self._hand_on(keep)
        finally:
            self._handing_on = False

    def _hand_on(self, keep: int) -> None:
        block: Block | None = None
        try:
            while len(self._waiting) > keep:
                step = self._waiting.popleft()
                if isinstance(step, Plain):
                    block = self._add_plain(block, step)
                    continue
                began = time.perf_counter()
                row, extras = finish(step, self.memory, self._guards)
                extras = self._announced(extras)
                self._note_costs(step, time.perf_counter() - began)
                columns = step.parts.layout.columns
                if block is None or block.columns is not columns:
                    done, block = block, Block(columns)
                    self._to_pipeline(done)
                block.add(step.number, step.time, row, extras)
                if step.skipped_by == REFUSED:
                    done, block = block, None
                    self._to_pipeline(done, refused=True)
        finally:  # a step that fails takes no other with it
            self._to_pipeline(block)

    def _announced(self, extras: Extras | None) -> Extras | None:
        """Add what an earlier run knew, once: this one's folder has none of it."""
        earlier, self._earlier = self._earlier, NO_FACTS
        if not earlier:
            return extras
        extras = extras or Extras()
        return dataclasses.replace(extras, facts=earlier.with_later(extras.facts))

    def _add_plain(self, block: Block | None, first: Plain) -> Block:
        """Finish a step of the quiet path, and those like it that wait behind it."""
        steps, columns = [first], first.layout.columns
        while self._waiting:
            step = self._waiting[0]
            if type(step) is not Plain or step.layout.columns is not columns:
                break
            self._waiting.popleft()
            steps.append(step)
        if block is None or block.columns is not columns:
            done, block = block, Block(columns)
            self._to_pipeline(done)
        memory = self.memory.gradients
        rows: list[Row] = []
        for row, named in gradients.finish_plain(steps, memory):
            if named is not STEP_SCOPE:
                facts = Facts(step=named).since(self.memory.facts)
                block.extras[len(block) + len(rows)] = Extras(facts=facts)
            rows.append(row)
        block.rows += rows
        block.steps += [step.number for step in steps]
        block.times += [step.time for step in steps]
        block.full += [step.read is not None for step in steps]
        return block

    def _to_pipeline(self, block: Block | None, *, refused: bool = False) -> None:
        if block is None:
            return
        given = self._pipeline.take(block)
        if any(alert.severity != "info" for alert in given):
            self._schedule.want_seeds()
        if not self._raising:
            return
        errors = [alert for alert in given if alert.severity == "error"]
        if not errors and refused:
            errors = self._pipeline.still_open()
        if errors:
            self._alert = errors[0]

    def _note_costs(self, step: Measured, seconds: float) -> None:
        """Tell the schedule what the depths of a step cost; the finish is shared."""
        read, sampled = step.parts.gradients, step.parts.sampled
        if sampled is None:
            return
        if read.written_unseen(step.drain.wait()["gradients"]):
            self.unseen_writes = True
        for depth in sampled.runs:
            cost = sampled.seconds[depth] + seconds / len(sampled.runs)
            changed = self._schedule.ran(depth, cost)
            if changed is not None:
                self.note(f"cadence: {changed}")

    def bring_up_to_date(self) -> None:
        """Hand on what is on the host already; reading decides nothing."""
        steps = self._waiting
        if all(isinstance(s, Plain) or s.drain.immediate for s in steps):
            self.hand_on()
