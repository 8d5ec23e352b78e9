"""Closed steps on their way to rules and sinks: drained, finished, and in blocks.

A step that nothing is remarkable about waits for those after it, 16 at most; anything
remarkable goes on at once, with all that waits. Never for a time: what the rules then
ask for has to follow from the steps alone.
"""

from __future__ import annotations

import math
import time
from collections import deque

from gradwatch.block import ROWS, Block
from gradwatch.depths.finish import Memory, finish
from gradwatch.depths.measured import Measured
from gradwatch.pipeline import Pipeline
from gradwatch.record import Alert
from gradwatch.settings import Settings


class Intake:
    """Takes closed steps, and hands them on as blocks.

    Args:
        pipeline: Where blocks go.
        settings: The arguments of the watch; its schedule is told what depths cost,
            and what the rules ask for.
    """

    def __init__(self, pipeline: Pipeline, settings: Settings) -> None:
        self.memory = Memory()
        self._events: list[str] = []
        self.unseen_writes = False
        """Whether the loop was found to write gradients without a trace."""
        self._pipeline, self._schedule = pipeline, settings.schedule
        self._patient, self._raising = settings.patient, settings.raising
        self._waiting: deque[Measured] = deque()
        self._since = 0
        self._bound = 0.0
        self.alert: Alert | None = None
        """What is to stop the training; None for nothing."""

    # ---- a step has closed

    def take_events(self) -> tuple[str, ...]:
        """Return what has happened since the last record."""
        events, self._events = tuple(self._events), []
        return events

    def note(self, *events: str) -> None:
        """Note what has happened, for the next record to tell."""
        self._events += events

    def go_on_from(self, memory: Memory) -> None:
        """Go on with what an earlier run remembered."""
        self.memory = memory

    def take(self, step: Measured) -> bool:
        """Take a step; tell whether it, and all that waits, is to go on now."""
        self._waiting.append(step)
        self._since += 1
        return not step.drain.immediate or not self._can_wait(step)

    def go_on(self, upcoming: int) -> None:
        """Hand on what waits, and have measured what the rules ask for.

        Args:
            upcoming: The next step whose forward is still to come.
        """
        # An accelerator's numbers come one sampled step late.
        late = bool(self._waiting) and not self._waiting[-1].drain.immediate
        self.hand_on(keep=int(late))
        self._since = 0
        self._bound = self.memory.gradients.bound
        self._pipeline.write_out()
        for depth in self._pipeline.judge.wished():
            self._schedule.ask_within_budget(depth, upcoming)
        for depth in self._pipeline.judge.wanted():
            self._schedule.ask(depth, upcoming)

    def _can_wait(self, step: Measured) -> bool:
        """Tell whether nothing is remarkable about a step: no rule decides on it."""
        before = step.gradients.before
        if not self._patient or self._since >= ROWS or step.sampled is not None:
            return False
        if step.events or step.gradients.scale is not None:
            return False
        if step.loss is not None and not math.isfinite(step.loss):
            return False
        return isinstance(before, list) and math.hypot(*before) < self._bound

    def hand_on(self, keep: int = 0) -> None:
        """Finish the steps that wait, all but ``keep``, and hand them on."""
        block: Block | None = None
        while len(self._waiting) > keep:
            step = self._waiting.popleft()
            began = time.perf_counter()
            row, rest = finish(step, self.memory)
            self._note_costs(step, time.perf_counter() - began)
            if block is None or block.columns is not step.layout.columns:
                self._pass_on(block)
                block = Block(step.layout.columns)
            block.add(step.number, step.time, row, rest)
            if step.skipped_by == "refused":
                self._pass_on(block, refused=True)
                block = None
        self._pass_on(block)

    def _pass_on(self, block: Block | None, *, refused: bool = False) -> None:
        given = self._pipeline.take(block) if block is not None else []
        if not self._raising or block is None:
            return
        errors = [alert for alert in given if alert.severity == "error"]
        if not errors and refused:
            errors = self._pipeline.still_open()
        if errors:
            self.alert = errors[0]

    def _note_costs(self, step: Measured, finish: float) -> None:
        """Tell the schedule what the depths of a step cost; the finish is shared."""
        if step.sampled is None:
            return
        if step.gradients.written_unseen(step.drain.wait()["gradients"]):
            self.unseen_writes = True
        spent = step.sampled.seconds
        for depth in step.sampled.runs:
            cost = spent[depth] + finish / len(step.sampled.runs)
            changed = self._schedule.ran(depth, cost)
            if changed is not None:
                self.note(f"cadence: {changed}")

    # ---- asked for

    def bring_up_to_date(self) -> None:
        """Hand on what is on the host already; reading decides nothing."""
        if self._waiting and all(step.drain.immediate for step in self._waiting):
            self.hand_on()

    def take_alert(self) -> Alert:
        """Return, once, the alert that is to stop the training."""
        alert, self.alert = self.alert, None
        assert alert is not None
        return alert
