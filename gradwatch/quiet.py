"""The quiet path: steps at which all is as usual, followed at a fraction of the cost.

Usual is: one backward pass, then one optimizer, the same as ever, or one that runs the
backward itself, by a closure; gradients on the CPU whose total norm is below what was
usual; nothing else due soon. Whatever is otherwise ends the path in mid-step: the
engine then goes on as if it had followed the step from its start, with what was seen of
it so far (:meth:`Quiet.leave`).

Where a step is short, even so much is more than its share. Then the total norm alone is
read, and at every second, fourth or eighth step all the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from math import hypot, inf, isfinite
from operator import attrgetter, call, is_
from threading import get_ident
from time import perf_counter, time
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch import _torch, clock
from gradwatch.block import ROWS
from gradwatch.clock import BackwardBegins, BackwardEnds, ClockState, OptimizerBegins
from gradwatch.depths.gradients import Plain, Read
from gradwatch.depths.openstep import OpenStep
from gradwatch.depths.reader import Reader
from gradwatch.health import Health
from gradwatch.hooks.modules import ModuleHooks
from gradwatch.hooks.optimizers import Held, OptimizerHooks
from gradwatch.hooks.parameters import ParameterHooks
from gradwatch.hooks.roots import Roots
from gradwatch.intake import Intake
from gradwatch.usual import Usual, read

_GRAD: Final = attrgetter("grad")
_VERSION: Final = attrgetter("_version")
_ITEM: Final = Tensor.item
_FLATTEN: Final = 1 << 16
"""Up to this many entries copying them together costs less than a norm of each."""
_flattened, _norm = _torch.flattened, torch.linalg.vector_norm


OFF, BETWEEN, BEGUN, ENDED, USED = range(5)
"""How far a quiet step is: not on the path, between two steps, or in one."""


class Quiet:
    """Follows quiet steps. Each event is taken, or left to the engine as a whole.

    Args:
        intake: Where closed steps go.
        health: Where our own time is noted.
        after_backward: Has the end of the backward pass in progress reported.
        roots: Reads the loss from the call of backward.
    """

    def __init__(
        self,
        intake: Intake,
        health: Health,
        after_backward: Callable[[], object],
        roots: Roots,
    ) -> None:
        self.phase = OFF
        self.number = 0
        """Number of the open step, else of the next one."""
        self.error: Exception | None = None
        """What the path has failed with."""
        self.pauses = False
        """Whether something is due between two steps."""
        self._intake, self._health = intake, health
        self._after_backward, self._roots = after_backward, roots
        self._loss: float | None = None
        self._rate: Any = None
        self._odd = False  # something has happened that the open step is to tell
        self._usual: Usual | None = None
        self._rows: list[Plain] = []
        self._until = self._not_before = 0
        self._every, self._full, self._suspicious = 1, True, False
        self._within = False  # the open step's backward runs inside its optimizer's
        self._norm = 0.0
        self._bound = 0.0
        self._task, self._thread = -1, 0
        self._cleared: bool | None = None
        self._refs: list[weakref.ref[Tensor]] = []
        self._versions: list[int] = []
        self._before: list[float] = []
        self._used: list[float] = []
        self._left: tuple[weakref.ref[Tensor], int] | None = None

    def connect(
        self,
        parameters: ParameterHooks,
        optimizers: OptimizerHooks,
        modules: ModuleHooks,
        reader: Reader,
        step: OpenStep,
    ) -> None:
        """Learn about what was made after this; no step is followed before.

        Args:
            parameters: The watched parameters.
            optimizers: Those that hold them.
            modules: The recurrent modules.
            reader: What else reads gradients and weights.
            step: Takes the loss of the open step.
        """
        self._parameters, self._optimizers = parameters, optimizers
        self._modules, self._reader, self._step = modules, reader, step
        self._passing = parameters.passing
        parameters.connect(self)
        optimizers.connect(self)

    # ---- on the path and off it

    def consider(self, state: ClockState, soonest: int) -> None:
        """Take the path up, or go on with it, where nothing speaks against it.

        Args:
            state: Of the clock; a step that has just closed was its last one.
            soonest: The first step at which more than the gradients is due.
        """
        number, rows = state.number, self._intake.rows - self._intake.since
        until = min(number + rows, soonest - 2)
        if until <= number or number < self._not_before or not self._intake.quiet:
            return
        optimizer = clock.only_one(state)
        if optimizer is None or not self._modules.at_rest:
            return
        held = self._optimizers.only_one(optimizer)
        if held is None or self._reader.scaler is not None:
            return
        known, names = self._usual, self._parameters.names
        if known is None or known.held is not held or known.names is not names:
            self._usual = self._look(held)
        if self._usual is not None:
            self.number, self._until = state.number, until
            self._bound, self.pauses = self._intake.bound, False
            self._every = self._intake.full_every
            self._task, self.phase, self._within = state.task, BETWEEN, False

    def _look(self, held: Held) -> Usual | None:
        """Return what the steps are like, by the gradients that are there now."""
        parameters = self._parameters
        live, grads = parameters.gradients()
        first = next((i for i in held.params if i in live), None)
        if first is None or read(grads) is None:
            return None
        return Usual(
            held=held,
            names=parameters.names,
            layout=self._reader.layout,
            live=live,
            params=[parameters.params[i] for i in live],
            without=[p for i, p in enumerate(parameters.params) if i not in live],
            first=parameters.params[first],
            place=first,
            small=sum(grad.numel() for grad in grads) <= _FLATTEN,
        )

    def leave(self, state: ClockState) -> ClockState:
        """Leave the path, as if the steps had never been followed on it.

        Args:
            state: Of the clock, as the path was taken up.

        Returns:
            The state now.
        """
        phase, self.phase, self.pauses = self.phase, OFF, False
        if phase == OFF:
            return state
        usual = self._usual
        self.pass_on()
        assert usual is not None
        if self.number > state.number:
            state = clock.after_usual(state, self.number, self._task)
        if self._left is not None:
            left = (usual.place, *self._left)
            self._parameters.was_left(usual.held.number, left)
        if self._left is not None or phase >= ENDED:
            # The gradients of a step of which little was read are known to nobody.
            full = self._full and bool(self._refs)
            live = usual.live if full else []
            refs, versions = (self._refs, self._versions) if full else ([], [])
            self._parameters.noted(live, refs, versions)
        self._refs, self._versions, self._left, self._suspicious = [], [], None, True
        self._odd = False
        if phase > BETWEEN or self._within:
            if phase != BEGUN or self._norm < self._bound:
                # The steps may be of another sort by now: no large norm ended this.
                self._usual, self._not_before = None, self.number + ROWS
            state = self._open_again(state, usual, phase)
        self.number, self._within = 0, False
        return state

    def raise_error(self) -> None:
        """Raise what the path has failed with, once; that ends it."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _open_again(self, state: ClockState, usual: Usual, phase: int) -> ClockState:
        """Return the state in an open step, with what was read of it handed over."""
        gradients = self._reader.gradients
        if self._within:
            begins = OptimizerBegins(usual.held.number, closure=True)
            state, _ = clock.advance(state, begins)
        if phase == BETWEEN:
            return state
        state, _ = clock.advance(state, BackwardBegins(self._task))
        self._step.found(self._loss)
        if self._full:
            gradients.cleared = self._cleared
        if phase >= ENDED:
            self._step.has_ended = True
            if self._full:
                gradients.ended(usual.names, usual.live, self._before, None, [])
            state, _ = clock.advance(state, BackwardEnds(True))
        if phase >= USED:
            if self._full:
                gradients.about_to_be_used(usual.live, self._used)
            state, _ = clock.advance(state, OptimizerBegins(usual.held.number))
        return state

    def is_beside(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer of another thread steps while ours does.

        The path is not left for it then: what it has not read would be lost.
        """
        usual = self._usual
        steps = self.phase == USED or (self._within and self.phase != OFF)
        if not steps or usual is None or usual.held.optimizer() is optimizer:
            return False
        return self._optimizers.is_foreign(optimizer, at_sight=True)

    @property
    def thread(self) -> int:
        """In which the last optimizer of the path has begun."""
        return self._thread

    def pass_on(self) -> None:
        """Give the intake the steps that have closed so far."""
        rows, self._rows = self._rows, []
        self._intake.take_plain(rows)

    # ---- the events of a step

    def begins(self, task: int, param: Tensor) -> bool:
        """A backward pass has begun."""
        if self.phase != BETWEEN:
            return False
        try:
            with self._health.lock:
                began = perf_counter()
                if self.phase != BETWEEN:  # left by another thread, meanwhile
                    return False
                if self._suspicious and self._reader.suspects(param):
                    return False
                self._roots.find()
                loss = self._roots.loss
                if loss is None or (type(loss) is float and -inf < loss < inf):
                    self._loss = loss
                else:
                    return False
                if not self._after_backward():
                    return False
                if not self._within:
                    self._full = self.number % self._every == 0
                if self._full:
                    self._cleared = self._reader.cleared(param)
                self._task, self.phase = task, BEGUN
                self._health.spent += perf_counter() - began
                return True
        except Exception as error:
            self.error = error
            return False

    def ended(self) -> bool:
        """It has ended."""
        if self.phase != BEGUN:
            return False
        try:
            with self._health.lock:
                began, usual = perf_counter(), self._usual
                if usual is None or self.phase != BEGUN:  # left, meanwhile
                    return False
                grads = list(map(_GRAD, usual.params))
                if self._full:
                    if not self._read_before(grads):
                        return False
                elif usual.small:
                    self._norm = _norm(_flattened(grads)).item()
                else:
                    self._norm = hypot(*map(_ITEM, torch._foreach_norm(grads)))
                if not self._norm < self._bound:
                    return False
                for param in usual.without:
                    if param.grad is not None:
                        return False
                self.phase, self._passing.order = ENDED, []
                self._health.spent += perf_counter() - began
                return True
        except Exception as error:
            self.error = error
            return False

    def _read_before(self, grads: list[Tensor]) -> bool:
        """Read the gradients as backward leaves them, and note which they are."""
        found = read(grads)
        if found is None:
            return False
        self._before, self._norm = found, hypot(*found)
        self._refs = list(map(weakref.ref, grads))
        self._versions = list(map(_VERSION, grads))
        return True

    def uses(
        self, optimizer: Optimizer, closure: bool = False, *, quickly: bool = False
    ) -> bool:
        """An optimizer is about to use the gradients.

        Args:
            optimizer: The optimizer.
            closure: Whether it runs the backward itself.
            quickly: Whether hooks of its own may still be to come: only a step of which
                nothing more is read is taken then.
        """
        if self.phase == OFF or (quickly and self._full):
            return False
        try:
            with self._health.lock:
                usual = self._usual
                if usual is None or self.phase == OFF:  # left, meanwhile
                    return False
                if usual.held.optimizer() is not optimizer:
                    return self._optimizers.is_foreign(optimizer)
                ready = BETWEEN if closure else ENDED
                if self.phase != ready or self._odd or self._within:
                    return False
                group = optimizer.param_groups[0]
                if "lr" in group and group["lr"] is not self._rate:
                    self._rate = group["lr"]
                    if events := self._optimizers.jumps(optimizer):
                        self._intake.note(*events)
                        self._odd = True
                        return False
                began = perf_counter()
                if closure:
                    self._full = self.number % self._every == 0
                if self._full and not self._about_to_use(
                    optimizer, usual, closure=closure
                ):
                    return False
                if closure:
                    self._within, self._thread = True, get_ident()
                else:
                    self.phase = USED
                self._health.spent += perf_counter() - began
                return True
        except Exception as error:
            self.error = error
            return False

    def _about_to_use(
        self, optimizer: Optimizer, usual: Usual, *, closure: bool
    ) -> bool:
        """Remember the weights, and read what the optimizer is given if it is there."""
        size = 0
        for group in optimizer.param_groups:
            size += len(group["params"])
        if size != usual.held.size or _torch.graph_task_id() != -1:
            return False
        if not closure and not self._read_used(usual):
            return False
        more = optimizer if optimizer.param_groups[1:] else None
        events = self._reader.about_to_use(more, usual.held, self.number)
        if events:
            self._intake.note(*events)
            self._odd = True
            return False
        self._thread = get_ident()
        return True

    def _read_used(self, usual: Usual) -> bool:
        """Read the gradients that the optimizer uses; tell whether they are usual."""
        grads, self._used = list(map(_GRAD, usual.params)), self._before
        for grad in grads:
            if grad is None:
                return False
        same = all(map(is_, grads, map(call, self._refs)))
        if not same or list(map(_VERSION, grads)) != self._versions:
            found = read(grads)
            if found is None or not isfinite(hypot(*found)):
                return False
            for param in usual.without:
                if param.grad is not None:
                    return False
            self._used = found
        return True

    def stepped(self, optimizer: Optimizer, *, quickly: bool = False) -> bool:
        """It has stepped, which ends the step.

        Args:
            optimizer: The optimizer.
            quickly: The same; and only a step after which nothing is due.
        """
        if self.phase == OFF or (quickly and self._full):
            return False
        told = self._step.has_loss
        if quickly and (told or self.number + 1 >= self._until):
            return False
        try:
            with self._health.lock:
                began, usual = perf_counter(), self._usual
                if usual is None or self.phase == OFF:  # left, meanwhile
                    return False
                if usual.held.optimizer() is not optimizer:
                    return self._optimizers.is_foreign(optimizer)
                grad = usual.first.grad
                last = ENDED if self._within else USED
                if self.phase != last or grad is None:
                    return False
                known, loss, health = None, self._loss, self._health
                if self._full:
                    if self._within and not self._read_used(usual):
                        return False
                    known = self._compared(usual)
                    if known is None:
                        return False
                self._left, self._suspicious = (weakref.ref(grad), grad._version), False
                if self._full:
                    self._reader.left_by_the_only_one()
                    self._suspicious = True
                if told:
                    self._step.found(loss)
                    counts, _ = self._step.take_loss(used=True)
                    loss = None if counts is None else float(counts)
                health.spent += perf_counter() - began
                spent, elapsed = health.step()
                self._rows.append(
                    Plain(
                        self.number,
                        time(),
                        usual.layout,
                        self._norm,
                        loss,
                        health.overhead,
                        spent,
                        elapsed,
                        known,
                    )
                )
                self.number += 1
                self.phase, self._within = BETWEEN, False
                odd = loss is not None and not isfinite(loss)
                self.pauses = odd or self.number >= self._until
                return True
        except Exception as error:
            self.error = error
            return False

    def _compared(self, usual: Usual) -> Read | None:
        """Return what was read of the step; None where it is no usual one."""
        if _torch.graph_task_id() != -1:
            return None
        self._reader.compare(usual.held, self.number)
        moved = self._reader.moved()
        return Read(usual.names, usual.live, self._before, self._used, moved)
