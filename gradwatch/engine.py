"""The life of a step: what the hooks report, what is measured of it, what passes on.

The hooks report what the user's objects do. The clock tells what that means: a step
has opened, is over, or was none. At the end of a backward pass what is due is launched;
once the step has closed, its numbers start for the host, and the intake takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from threading import get_ident
from typing import Final

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import _torch, clock
from gradwatch.clock import (
    BackwardBegins,
    BackwardEnds,
    ClockState,
    Closed,
    CountByHand,
    Done,
    Event,
    OptimizerBegins,
    OptimizerEnds,
    OptimizerGone,
    Refusal,
    Settling,
)
from gradwatch.depths.finish import Memory
from gradwatch.depths.launch import Launcher
from gradwatch.depths.measured import Measured
from gradwatch.depths.openstep import OpenStep
from gradwatch.depths.reader import Reader
from gradwatch.depths.sampled_facts import notes_of
from gradwatch.facts import ModuleFacts
from gradwatch.health import Health
from gradwatch.hooks.listener import end_of_pass
from gradwatch.hooks.modules import ModuleHooks
from gradwatch.hooks.optimizers import Held, OptimizerHooks, Training
from gradwatch.hooks.parameters import ParameterHooks
from gradwatch.hooks.probe import NOTHING
from gradwatch.hooks.roots import Roots
from gradwatch.intake import Intake
from gradwatch.quiet import BETWEEN, ENDED, OFF, Quiet
from gradwatch.recurrent import Recurrence
from gradwatch.settings import Settings

_IN_PASSES: Final = (BackwardBegins, OptimizerBegins, OptimizerEnds)
"""Events that may come while gradients are computed."""


class Engine:
    """Owns the hooks of one watch, and what is known of the open step.

    Args:
        model: The watched model; not kept alive.
        found: Its recurrences.
        owner: Whoever is to live as long as the model's hooks: the watch.
        settings: The arguments of the watch.
        health: Where failures and our own time are noted.
        intake: Where closed steps go.
        measuring: Whether anything but the gradients is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Recurrence],
        owner: object,
        *,
        settings: Settings,
        health: Health,
        intake: Intake,
        measuring: bool,
    ) -> None:
        self.closed, self._intake = False, intake
        self._paused, self._measuring = False, measuring
        self._raising = settings.raising
        self._schedule, self._health = settings.schedule, health
        self._guard = health.guard("gradients", self._recover)
        self._clock = ClockState(number=settings.start_step)
        self._overdue = self._costly = False
        self._thread, self._roots = get_ident(), Roots()
        # Autograd keeps the last callback of a pass.
        self._after_backward = _torch.AfterBackward(end_of_pass(self))
        self._quiet = Quiet(intake, health, self._after_backward, self._roots)
        each = settings.schedule.cadence("gradients") == 1
        self._may_be_quiet = each and settings.patient and not settings.raising
        with ExitStack() as undo:  # a failure half-way undoes what came before
            self._modules = ModuleHooks(
                found, owner, model, samples=settings.flow_samples, health=health
            )
            self._roots.readout = self._modules.readout
            undo.callback(self._modules.close)
            self._parameters = ParameterHooks(model, self)
            undo.callback(self._parameters.close)
            self._optimizers = OptimizerHooks(self._parameters, self, self._guard)
            undo.callback(self._optimizers.close)
            self._launcher = Launcher(self._modules, self._schedule, health)
            self._reader = Reader(
                self._parameters, self._optimizers, self._modules, settings.scaler
            )
            self._step = OpenStep(self._reader, self._launcher)
            undo.callback(self._reader.close)
            parts = self._parameters, self._optimizers, self._modules
            self._quiet.connect(*parts, self._reader, self._step)
            self._changes = self._soonest = -1
            self._refresh()
            self._stack = undo.pop_all()

    def _refresh(self) -> None:
        """Ask the schedule what is due now, and when anything is due next."""
        number, schedule = self._clock.number, self._schedule
        self._due = not self._paused and schedule.due("gradients", number)
        if schedule.changes != self._changes or self._soonest < number:
            self._changes = schedule.changes
            self._soonest = schedule.soonest(number)
        if self._soonest <= number + 2 or self._modules.wanted is not NOTHING:
            self._expect()
        if self._may_be_quiet and self._due and not self._off and not self._overdue:
            self._quiet.consider(self._clock, self._soonest)

    # ---- the quiet path

    def _leave_quiet(self) -> None:
        """Go on as if the quiet path had not been taken."""
        if self._quiet.phase != OFF:
            with self._guard:
                self._clock = self._quiet.leave(self._clock)
                self._thread = self._quiet.thread or self._thread
                self._quiet.raise_error()

    def _pause_quiet(self) -> None:
        """Do what is due between two steps of the quiet path."""
        with self._guard:
            if self._quiet.pauses:  # no other thread has done it, meanwhile
                self._leave_quiet()
                self._reader.rescan_after(self._clock.number)
                if self._intake.overdue:
                    self._intake.release(self._clock.number)
                self._refresh()

    def _recover(self, off: bool) -> None:
        """Go on with the next step after a failure, or look no more."""
        if off:
            self._parameters.close()
            self._optimizers.close()
            self._reader.close()
            self._modules.let_go()
        else:
            self._step.drop()
            self._refresh()

    @property
    def _off(self) -> bool:
        return self.closed or self._guard.off

    # ---- forward: told to the modules ahead

    def _expect(self) -> None:
        """Have the forwards that come show what the steps want they may belong to.

        A cell is called at every time step: nothing is asked then.
        """
        steps, wanted = self._clock.upcoming, NOTHING
        if self._soonest <= steps[-1] + 1 and self._measuring and not self._paused:
            wanted = self._launcher.wanted(steps)
        self._modules.expect(wanted)

    # ---- backward, reported by the hooks

    def on_gradient(self, task: int, param: Tensor) -> None:
        """The first gradient of a backward pass has been accumulated."""
        if self._quiet.begins(task, param) or self._off:
            return
        with self._guard:
            self._leave_quiet()
            running = None
            if self._clock.inside and get_ident() == self._thread:
                running = _torch.running_steps()  # of another thread they are not seen
            kept, finite = None, True
            if self._clock.doubts or running == 0:
                kept = self._parameters.kept(param)
                finite = kept is not False or self._reader.gradients.finite
            begins = self._advance(BackwardBegins(task, kept, finite, running))
            if begins.opened:
                self._reader.opened(param)
            self._after_backward()
            if self._roots.find(elsewhere=not param.is_cpu) or begins.opened:
                if kept is None and self._step.has_found:  # a closure may clear them
                    kept = self._parameters.kept(param)
                self._step.found_by(self._roots, kept=kept is not False)

    def failed(self, error: Exception) -> None:
        """A hook has failed before it could report."""
        with self._guard:
            raise error

    def on_backward_end(self) -> None:
        """A backward pass has ended."""
        if self._quiet.ended() or self._off:
            return
        with self._guard:
            self._leave_quiet()
            if not self._clock.open:
                return
            waiting = True
            try:
                waiting = self._reader.ended(due=self._due)
                if waiting:
                    self._step.ended()
                    self._launch()
                self._modules.ended()
            finally:  # what fails to be measured is a step all the same
                self._advance(BackwardEnds(waiting))

    def _launch(self) -> None:
        """Launch what is due; the weights are those that the forward used."""
        number = self._clock.number
        if self._soonest > number or not self._measuring or self._paused:
            return
        self._step.launch(number, self._modules.called())

    # ---- optimizers, reported by the hooks

    def before_optimizer(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer is about to use its gradients, its own hooks behind it."""
        if self._quiet.uses(optimizer, closure) or self._off:
            return
        with self._guard:
            if self.closed or self._quiet.is_beside(optimizer):  # of another thread
                return
            self._leave_quiet()
            held = self._reader.held(optimizer, look_up=not self._clock.open)
            if not held.params:
                return
            self._before(optimizer, held, closure)
        self._intake.raise_if_due()

    def _before(self, optimizer: Optimizer, held: Held, closure: bool) -> None:
        state, task = self._clock, _torch.graph_task_id()
        begins = task not in (-1, state.task)
        if begins:  # it steps inside backward, before our hook
            self._parameters.begin(task)
            self._after_backward()
        waits = state.open and not state.used
        new = not waits and self._parameters.new(held.number, held.params)
        running = max(_torch.running_steps(), 1) if state.inside else 1
        self._thread = get_ident()
        if self._optimizers.replaced:
            for number in self._optimizers.take_replaced():
                self._parameters.forget_used(number)
                self._advance(OptimizerGone(number))
        done = self._advance(OptimizerBegins(held.number, closure, task, running, new))
        if done.opened and not begins:  # no backward was seen to bring them
            self._parameters.note(*self._parameters.gradients())
        state = self._clock
        if state.stepped:
            self._step.used_again()
        if not done.uses or not self._due:
            return
        self._intake.note(*self._reader.about_to_use(optimizer, held, state.number))
        if closure:  # backward runs inside step()
            return
        if not state.backwards and task == -1:
            self._launch()  # its end was not called back
        self._read_used(optimizer, held, task)
        if self._raising and self._intake.refuses and not self._reader.all_finite(held):
            self._modules.used()
            self._advance(Refusal())

    def _read_used(self, optimizer: Optimizer, held: Held, task: int) -> None:
        self._reader.read_used(
            optimizer,
            held,
            alone=task == -1 and self._clock.knows_no_other(held.number),
            verify=(
                self._step.sampled is not None
                or self._intake.unseen_writes
                or (self._raising and self._intake.refuses)
            ),
        )

    def after_optimizer(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer has stepped."""
        if self._quiet.stepped(optimizer):
            if self._quiet.pauses:
                self._pause_quiet()
            return
        if self._off:
            return
        with self._guard:
            if self.closed or self._quiet.is_beside(optimizer):  # of another thread
                return
            self._leave_quiet()
            held = self._reader.held(optimizer)
            if not held.params:
                return
            self._after(optimizer, held, closure)
        self._intake.raise_if_due()

    def _after(self, optimizer: Optimizer, held: Held, closure: bool) -> None:
        state, task, refused = self._clock, _torch.graph_task_id(), False
        try:
            if state.open and state.inside == (held.number,):
                self._modules.used()
                if self._due:
                    if closure:
                        self._read_used(optimizer, held, task)
                    self._reader.compare(held, state.number)
                self._reader.has_used(held, state.stepped)
            else:
                self._reader.lost_sight()
            refused = self._reader.refused
        finally:  # what fails to be measured is a step all the same
            self._advance(OptimizerEnds(held.number, task, refused))

    # ---- what the clock makes of it

    def _advance(self, event: Event) -> Done:
        self._clock, done = clock.advance(self._clock, event)
        task = event.task if isinstance(event, _IN_PASSES) else -1
        if done is clock.NOTHING and not self._overdue:
            return done
        if done.set_aside:
            self._step.set_aside(self._training())
        for closed in done.closed:
            self._close(closed)
        if done.dropped:
            self._step.drop()
        if done.closed or done.dropped:
            now = self._clock.number, self._soonest
            self._modules.forget(task, states=self._launcher.flow_is_due(*now))
        if done.opened and self._soonest <= self._clock.number + 2:
            self._expect()
        if self._overdue and task == -1:  # not while gradients are computed
            self._overdue = False
            self._intake.release(self._clock.upcoming[-1])
            self._refresh()
        return done

    def _training(self) -> Training | None:
        """Return how weights are trained, if the open step wants it and it is known."""
        if self._step.sampled is None or not self._clock.optimizers:
            return None
        return self._optimizers.training()

    def _close(self, closed: Closed) -> None:
        """Start the numbers of a step that is over on their way."""
        if not closed.aside:
            spent, elapsed = self._health.step()
            # What was sampled is finished in the time of the next step.
            before, self._costly = self._costly, self._step.sampled is not None
            ours = None if before or self._costly else spent
            self._schedule.stepped(elapsed, ours)
        try:
            self._pass_on(closed)
        finally:
            self._reader.rescan_after(self._clock.number)
            self._refresh()

    def _pass_on(self, closed: Closed) -> None:
        parts = self._step.close(closed, self._training())
        if not self._paused:  # else events are recorded once measuring resumes
            step = Measured.of(
                closed.number,
                parts,
                skipped_by=self._step.who_skipped(closed),
                events=self._intake.take_events(),
                overhead=self._health.overhead,
            )
            if step is not None:
                self._overdue = self._intake.take(step) or self._overdue

    # ---- asked for by the watch

    @property
    def model(self) -> nn.Module | None:
        """The watched model, while it lives."""
        return self._parameters.model

    @property
    def number(self) -> int:
        """Number of the open step, else of the next one."""
        return max(self._clock.number, self._quiet.number)

    @property
    def open(self) -> bool:
        """Whether gradients wait for an optimizer."""
        return self._clock.open or self._quiet.phase > BETWEEN

    def optimizers(self) -> list[Optimizer]:
        """Return the optimizers that have stepped and hold a watched parameter."""
        return self._optimizers.alive() if self._clock.optimizers else []

    def notes(self, *, begun: bool) -> tuple[Mapping[str, ModuleFacts], dict[str, str]]:
        """Return what is known of the modules, and what is not measured, and why.

        Args:
            begun: Whether a step has been measured.
        """
        memory = self.memory
        seen = {**self._launcher.module_facts, **memory.facts.modules}
        return seen, notes_of(self._modules, seen, memory.state.left_out, begun=begun)

    @property
    def memory(self) -> Memory:
        """What is remembered of the steps that were handed on."""
        return self._intake.memory

    def bring_up_to_date(self) -> None:
        """Hand on what is on the host already; reading decides nothing."""
        if not self._off:
            with self._guard:
                self._quiet.pass_on()
                self._intake.bring_up_to_date()

    def watches(self, modules: int) -> bool:
        """Tell whether so many modules have a probe."""
        return len(self._modules.probes) == modules

    def log(self, loss: float | Tensor) -> None:
        """Take the loss of the step; of the next one, where optimizers have stepped."""
        if not self._off:
            with self._guard:
                if self._quiet.phase >= ENDED:
                    self._step.has_ended = True
                if self._step.log(loss, used=self._clock.used):
                    self._leave_quiet()

    def pause(self) -> None:
        """Stop measuring; steps are still counted."""
        self._leave_quiet()
        self._paused = True
        self._refresh()

    def resume(self) -> None:
        """Measure again."""
        self._paused = False
        self._refresh()

    def probe_now(self) -> None:
        """Have every depth measured at the next step."""
        self._leave_quiet()
        self._schedule.probe(self._clock.upcoming[-1])
        self._refresh()

    def count(self) -> None:
        """Count a step by hand."""
        if self._off:
            return
        with self._guard:
            self._leave_quiet()
            self._reader.read_now()
            self._modules.used()
            self._advance(CountByHand())
        self._intake.raise_if_due()

    def was_remade(self, *events: str) -> None:
        """Note that weights were written for a reason, with the events that say why."""
        self._leave_quiet()
        self._intake.note(*events)
        self._reader.was_remade()

    def resume_from(self, number: int, memory: Memory) -> None:
        """Go on with the steps of an earlier run."""
        self._leave_quiet()
        self._clock = self._clock._replace(number=number)
        self._intake.resume_from(memory)
        self._intake.note("resume")
        self._refresh()

    def settle(self, *, final: bool = False) -> None:
        """Close the open step if that can be, and hand on every step that waits."""
        if self._off:
            return
        with self._guard:
            self._leave_quiet()
            kept, finite = True, True
            if self._clock.doubts:
                kept = self._parameters.all_kept()
                finite = self._reader.gradients.finite
            self._advance(Settling(kept, finite, final))
            self._intake.hand_on()

    def close(self) -> None:
        """Take every hook off and hand on all that waits. Safe to call twice."""
        if self.closed:
            return
        try:
            self.settle(final=True)
        finally:
            self.closed = True
            self._stack.close()
