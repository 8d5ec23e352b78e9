"""The clock: which backward goes on with a step, and when the step is over.

A step is one or more backward passes whose gradients are used together, and what one
or several optimizers do with them, once or several times. :func:`advance` is pure: it
knows no tensor and no optimizer, only what was seen of them.

A step opens with the first backward after the previous step has closed. It closes once
every optimizer that stepped in the last 16 steps has stepped; the first step, with the
first optimizer. If one of them steps several times, late, or not at all, it closes at
the next backward. Gradients that are thrown away before any optimizer has used them
make no step, unless they were not finite. Where 200 backward passes have added to
gradients that nobody ever uses, the step closes too: no optimizer may ever come.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MEMORY: Final = 16
"""Steps for which an optimizer is waited for, and a late one is remembered."""

PATIENCE: Final = 200
"""Backward passes that the first optimizer is waited for: who accumulates, uses few."""


class BackwardBegins(NamedTuple):
    """The first gradient of a backward pass has been accumulated.

    Attributes:
        task: A number that tells passes apart; -1 where there is none.
        kept: Whether the waiting gradient that it was added to is the one that the last
            backward left; None where there was none.
        finite: Whether the waiting gradients are; asked for where they were thrown
            away and :attr:`ClockState.doubts`.
        running: How many optimizer steps are in progress; if ``ClockState.inside``
            lists more, the innermost have raised. None where that is not known.
    """

    task: int
    kept: bool | None = None
    finite: bool = True
    running: int | None = None


class BackwardEnds(NamedTuple):
    """A backward pass has ended.

    Attributes:
        waiting: Whether any parameter has a gradient.
    """

    waiting: bool


class OptimizerBegins(NamedTuple):
    """An optimizer is about to use its gradients.

    Attributes:
        optimizer: Its number.
        closure: Whether it runs the backward itself.
        task: The backward pass in progress; -1 outside one.
        running: How many optimizer steps are in progress, with this one; if
            ``ClockState.inside`` lists more, the innermost have raised.
        new: Whether it holds gradients that no optimizer has had, and no backward was
            seen to bring; asked for unless gradients wait that none has used.
    """

    optimizer: int
    closure: bool = False
    task: int = -1
    running: int = 1
    new: bool = False


class OptimizerEnds(NamedTuple):
    """An optimizer has stepped.

    Attributes:
        optimizer: Its number.
        task: The backward pass in progress; -1 outside one.
        refused: Whether a clipper has taken away gradients that were not finite, and
            no optimizer was given any.
    """

    optimizer: int
    task: int = -1
    refused: bool = False


class OptimizerGone(NamedTuple):
    """An optimizer was freed, or another one has taken its place.

    Attributes:
        optimizer: Its number.
    """

    optimizer: int


class Refusal(NamedTuple):
    """The gradients are not finite, and are to be kept from the optimizers."""


class Settling(NamedTuple):
    """All that was seen is needed now: close the step as the next backward would.

    Attributes:
        kept: Whether no gradient of the open step has been thrown away.
        finite: Whether the waiting gradients are; asked for where
            :attr:`ClockState.doubts`.
        final: Whether nothing more will come.
    """

    kept: bool = True
    finite: bool = True
    final: bool = False


class CountByHand(NamedTuple):
    """The user counts a step by hand."""


Event = (
    BackwardBegins
    | BackwardEnds
    | OptimizerBegins
    | OptimizerEnds
    | OptimizerGone
    | Refusal
    | Settling
    | CountByHand
)


class Regular(NamedTuple):
    """An optimizer that has stepped recently.

    Attributes:
        optimizer: Its number.
        step: The last step in which it did.
        repeats: Whether it has done so several times in one step.
    """

    optimizer: int
    step: int
    repeats: bool = False


class ClockState(NamedTuple):
    """What the clock knows.

    Attributes:
        number: Of the open step, else of the next one.
        open: Whether a step is open.
        task: The backward pass that began last.
        backwards: Passes of the open step that have ended.
        stepped: Optimizers that have stepped in the open step, once for each time.
        refused: Whether a clipper has refused the gradients of the open step.
        inside: Optimizers whose step is in progress, the outermost first.
        regulars: Those that have stepped recently.
        late: The last step whose optimizer stepped after it had closed.
        optimizers: Whether any optimizer has used gradients.
        by_hand: Whether updates are hand-written: one backward, one step.
        aside: Whether a step was set aside: its gradients were thrown away before it
            is known whether updates are hand-written. If they are, it is a step.
        taken: Whether a step has been taken that was not skipped.
    """

    number: int = 0
    open: bool = False
    task: int = -1
    backwards: int = 0
    stepped: tuple[int, ...] = ()
    refused: bool = False
    inside: tuple[int, ...] = ()
    regulars: tuple[Regular, ...] = ()
    late: int = -MEMORY
    optimizers: bool = False
    by_hand: bool = False
    aside: bool = False
    taken: bool = False

    @property
    def doubts(self) -> bool:
        """Whether gradients wait that no optimizer has used."""
        return self.open and not self.stepped and not self.inside

    @property
    def used(self) -> bool:
        """Whether the open step's gradients have been used."""
        return self.open and bool(self.stepped)

    @property
    def upcoming(self) -> tuple[int, ...]:
        """The steps that a forward now may belong to."""
        return (self.number, self.number + 1) if self.open else (self.number,)

    def knows_no_other(self, optimizer: int) -> bool:
        """Tell whether no other optimizer has stepped recently."""
        known = self.regulars
        return not known or (len(known) == 1 and known[0].optimizer == optimizer)


class Closed(NamedTuple):
    """A step that is over.

    Attributes:
        number: Its number.
        stepped: The optimizers that have stepped, or were refused the gradients.
        skipped: Why none was given its gradients: ``unused``, ``clipper`` or
            ``refused``; empty for a step that was not skipped.
        early: Whether no step had been taken, and no optimizer seen, before it.
        aside: Whether it is the one that was set aside.
    """

    number: int
    stepped: tuple[int, ...] = ()
    skipped: str = ""
    early: bool = False
    aside: bool = False


class Done(NamedTuple):
    """What an event has brought about.

    Attributes:
        closed: Steps that are over, in their order: two if the first was set aside.
        dropped: Whether what was open was no step.
        set_aside: Whether what was open is set aside now.
        opened: Whether a step has opened; after what was closed.
        uses: Whether an optimizer is about to use the open step's gradients, itself
            or by the closure that it runs; not one inside another's step.
    """

    closed: tuple[Closed, ...] = ()
    dropped: bool = False
    set_aside: bool = False
    opened: bool = False
    uses: bool = False


NOTHING: Final = Done()
_OPENED: Final = Done(opened=True)
_USES: Final = Done(uses=True)


def advance(state: ClockState, event: Event) -> tuple[ClockState, Done]:
    """Return the state after an event, and what it has brought about."""
    match event:
        case BackwardBegins():
            return _backward_begins(state, event)
        case BackwardEnds():
            return _backward_ends(state, event)
        case OptimizerBegins():
            return _optimizer_begins(state, event)
        case OptimizerEnds():
            return _optimizer_ends(state, event)
        case OptimizerGone():
            left = tuple(r for r in state.regulars if r.optimizer != event.optimizer)
            return state._replace(regulars=left), NOTHING
        case Settling():
            return _settled(state, event)
        case Refusal():
            given = (*state.stepped, *state.inside[:1])
            return _close(state._replace(stepped=given), "refused")
        case CountByHand():
            return _close(state)


def only_one(state: ClockState) -> int | None:
    """Return the one optimizer whose step will close the next step, for all is known.

    None where a step is open, where there are others, or where that is not sure.
    """
    if state.open or state.inside or state.aside or state.by_hand:
        return None
    if not state.optimizers or not state.taken or len(state.regulars) != 1:
        return None
    [known] = state.regulars
    waits = known.repeats or state.number - state.late < MEMORY
    return None if waits else known.optimizer


def after_usual(state: ClockState, number: int, task: int) -> ClockState:
    """Return the state after steps of one backward each and of :func:`only_one`.

    The same as :func:`advance` returns after their events, but for the work.

    Args:
        state: Before the first of them.
        number: Of the step after the last one.
        task: The backward pass of the last one.
    """
    [known] = state.regulars
    last = Regular(known.optimizer, number - 1)
    return state._replace(number=number, task=task, regulars=(last,))


def _backward_begins(
    state: ClockState, event: BackwardBegins
) -> tuple[ClockState, Done]:
    done = NOTHING
    if event.running is not None and event.running < len(state.inside):
        state = state._replace(inside=state.inside[: event.running])
    if state.open and state.stepped and not state.inside:
        state, done = _close(state)
    elif state.doubts and event.kept is False:
        state, done = _thrown_away(state, event.finite)
    elif state.backwards >= PATIENCE and not state.optimizers:
        state, done = _close(state, "unused")
    if not state.open:
        done = _OPENED if done is NOTHING else done._replace(opened=True)
    return state._replace(open=True, task=event.task), done


def _thrown_away(state: ClockState, finite: bool) -> tuple[ClockState, Done]:
    """Close, drop or set aside a step whose gradients no optimizer has used."""
    if not finite:
        return _close(state, "unused")
    if state.optimizers or not state.backwards:
        return state._replace(open=False, backwards=0), Done(dropped=True)
    if state.by_hand or state.aside:
        return _close(state._replace(by_hand=True))
    return state._replace(open=False, backwards=0, aside=True), Done(set_aside=True)


def _backward_ends(state: ClockState, event: BackwardEnds) -> tuple[ClockState, Done]:
    if not state.open:
        return state, NOTHING
    state = state._replace(backwards=state.backwards + event.waiting)
    if state.stepped and not state.inside and _satisfied(state):
        return _close(state)  # the optimizers step inside backward
    return state, NOTHING


def _optimizer_begins(
    state: ClockState, event: OptimizerBegins
) -> tuple[ClockState, Done]:
    outer = state.inside[: event.running - 1]
    if outer:  # an optimizer inside another's step: the outermost counts
        return state._replace(inside=(*outer, event.optimizer)), NOTHING
    if state.inside or state.aside or not state.optimizers:
        state = state._replace(inside=(), optimizers=True, aside=False)
    done = NOTHING
    if event.task not in (-1, state.task):  # it steps inside backward, before our hook
        state, done = _backward_begins(state, BackwardBegins(event.task))
    brings_new = event.closure or (event.new and event.task == -1)
    if brings_new and state.open and state.stepped:
        state, done = _close(state)
    if not state.open and event.new:
        state, done = state._replace(open=True), done._replace(opened=True)
    if state.open or event.closure:
        done = _USES if done is NOTHING else done._replace(uses=True)
    return state._replace(inside=(event.optimizer,)), done


def _optimizer_ends(state: ClockState, event: OptimizerEnds) -> tuple[ClockState, Done]:
    if event.optimizer not in state.inside:  # it had begun before the watch did
        if state.inside or not state.open:
            return state, NOTHING
        state = state._replace(optimizers=True, aside=False)
    else:
        last = len(state.inside) - 1 - state.inside[::-1].index(event.optimizer)
        if last:
            return state._replace(inside=state.inside[:last]), NOTHING
    if not state.open:
        return _came_late(state._replace(inside=()), event.optimizer), NOTHING
    stepped = (*state.stepped, event.optimizer)
    state = state._replace(inside=(), stepped=stepped, refused=event.refused)
    if event.task == -1 and _satisfied(state):
        return _close(state)
    return state, NOTHING


def _satisfied(state: ClockState) -> bool:
    """Tell whether nothing more can be expected of the open step."""
    if state.number - state.late < MEMORY:
        return False
    for known in state.regulars:
        if known.repeats or known.optimizer not in state.stepped:
            return False
    return True


def _came_late(state: ClockState, optimizer: int) -> ClockState:
    """Remember an optimizer that has stepped after its step was closed."""
    if not state.taken:
        return state  # there is no such step
    step = state.number - 1
    found = {r.optimizer: r for r in state.regulars}
    before = found.get(optimizer)
    again = before is not None and (before.repeats or before.step == step)
    found[optimizer] = Regular(optimizer, step, again)
    return state._replace(regulars=tuple(found.values()), late=step)


def _settled(state: ClockState, event: Settling) -> tuple[ClockState, Done]:
    if not state.open:
        return state, NOTHING
    if state.stepped:  # one that was waited for never came
        return _close(state)
    if not event.finite:
        return _close(state, "unused")
    if state.backwards and not state.optimizers:
        return _close(state._replace(by_hand=True))
    state, closed = _with_aside(state)
    dropped = event.final or not event.kept
    if dropped:
        state = state._replace(open=False, backwards=0)
    return state, Done(closed=closed, dropped=dropped)


def _with_aside(state: ClockState) -> tuple[ClockState, tuple[Closed, ...]]:
    """Count the step that was set aside, if there is one."""
    if not state.aside:
        return state, ()
    closed = Closed(state.number, early=not state.taken, aside=True)
    number = state.number + 1
    state = state._replace(number=number, aside=False, by_hand=True, taken=True)
    return state, (closed,)


def _close(state: ClockState, skipped: str = "") -> tuple[ClockState, Done]:
    """Close the open step; one that was set aside turns out to be one, before it."""
    early = not state.taken and not state.optimizers
    state, closed = _with_aside(state)
    if state.refused and not skipped:
        skipped = "clipper"
    after = ClockState(
        number=state.number + 1,
        task=state.task,
        regulars=_remembered(state),
        late=state.late,
        optimizers=state.optimizers,
        by_hand=state.by_hand,
        taken=state.taken or not skipped,
    )
    own = Closed(state.number, state.stepped, skipped, early)
    return after, Done(closed=(*closed, own))


def _remembered(state: ClockState) -> tuple[Regular, ...]:
    """Return the recent optimizers, with those of the step that closes."""
    number, stepped = state.number, state.stepped
    found = {r.optimizer: r for r in state.regulars if number - r.step < MEMORY}
    for optimizer in stepped:
        again = optimizer in found and found[optimizer].repeats
        again = again or stepped.count(optimizer) > 1
        found[optimizer] = Regular(optimizer, number, again)
    return tuple(found.values())
