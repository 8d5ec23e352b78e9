"""The clock: which backward goes on with a step, and when the step is over.

A step is one or more backward passes whose gradients are used together, and what one
or several optimizers do with them, once or several times. :func:`advance` is pure: it
knows no tensor and no optimizer, only what was seen of them.

A step opens at the first backward after the last one. It closes as soon as nothing
more can be expected: once every optimizer that was seen in the last steps has stepped,
the first time after the first one. Where one of them has stepped several times, or
later than expected, or stays away, it closes at the next backward. Gradients that are
thrown away before any optimizer has used them are no step, unless they were not finite.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MEMORY: Final = 16
"""Steps for which an optimizer is waited for, and a late one is remembered."""


class Begins(NamedTuple):
    """The first gradient of a backward pass has been accumulated.

    Attributes:
        task: A number that tells passes apart; -1 where there is none.
        kept: Whether the waiting gradient that it was added to is the one that the last
            backward left; None where there was none.
        finite: Whether the waiting gradients are; asked for where they were thrown away
            in a step of which ``State.doubts`` is true.
        running: How many optimizer steps are in progress: those of ``State.inside``
            that are not have raised; None where that is not known.
    """

    task: int
    kept: bool | None = None
    finite: bool = True
    running: int | None = None


class Ends(NamedTuple):
    """A backward pass has ended.

    Attributes:
        waiting: Whether any parameter has a gradient.
    """

    waiting: bool


class Uses(NamedTuple):
    """An optimizer is about to use its gradients.

    Attributes:
        optimizer: Its number.
        closure: Whether it runs the backward itself.
        task: The backward pass in progress; -1 outside one.
        running: How many optimizer steps are in progress, with this one: those that
            are not have raised.
        new: Whether it holds gradients that no optimizer has had, and no backward was
            seen to bring; told where no step is open, or the open one has been used.
    """

    optimizer: int
    closure: bool = False
    task: int = -1
    running: int = 1
    new: bool = False


class Used(NamedTuple):
    """An optimizer has stepped.

    Attributes:
        optimizer: Its number.
        task: The backward pass in progress; -1 outside one.
        refused: Whether a clipper took gradients that were not finite away before.
    """

    optimizer: int
    task: int = -1
    refused: bool = False


class Refuses(NamedTuple):
    """The gradients are not finite, and are to be kept from the optimizers."""


class Settles(NamedTuple):
    """Everything seen so far is wanted: close the step as the next backward would.

    Attributes:
        kept: Whether no gradient of the open step has been thrown away.
        finite: Whether the waiting gradients are; asked for where ``State.doubts``.
        final: Whether nothing more will come.
    """

    kept: bool = True
    finite: bool = True
    final: bool = False


class Counts(NamedTuple):
    """The user counts a step by hand."""


class Gone(NamedTuple):
    """An optimizer is no more, or another one has taken its place.

    Attributes:
        optimizer: Its number.
    """

    optimizer: int


Event = Begins | Ends | Uses | Used | Refuses | Settles | Counts | Gone


class Regular(NamedTuple):
    """An optimizer that has stepped of late.

    Attributes:
        optimizer: Its number.
        step: When it last did.
        repeats: Whether it has done so several times in one step.
    """

    optimizer: int
    step: int
    repeats: bool = False


class State(NamedTuple):
    """What the clock knows.

    Attributes:
        number: Of the open step, else of the next one.
        open: Whether a step is open.
        task: The backward pass that began last.
        backwards: Passes of the open step that have ended.
        stepped: Optimizers that have stepped in the open step, once for each time.
        inside: Optimizers whose step is in progress, the outermost first.
        regulars: Those that have stepped of late.
        late: The last step that something came too late for.
        optimizers: Whether any optimizer has used gradients.
        by_hand: Whether updates are hand-written: one backward, one step.
        candidate: Whether gradients were thrown away before that is known: of
            hand-written updates they are a step, else not.
        taken: Whether a step has been taken that was not skipped.
    """

    number: int = 0
    open: bool = False
    task: int = -1
    backwards: int = 0
    stepped: tuple[int, ...] = ()
    inside: tuple[int, ...] = ()
    regulars: tuple[Regular, ...] = ()
    late: int = -MEMORY
    optimizers: bool = False
    by_hand: bool = False
    candidate: bool = False
    taken: bool = False

    @property
    def doubts(self) -> bool:
        """Whether gradients wait that no optimizer has used."""
        return self.open and not self.stepped and not self.inside

    @property
    def upcoming(self) -> tuple[int, ...]:
        """The steps that a forward now may belong to."""
        return (self.number, self.number + 1) if self.open else (self.number,)

    def knows_no_other(self, optimizer: int) -> bool:
        """Tell whether no other optimizer has stepped of late."""
        known = self.regulars
        return not known or (len(known) == 1 and known[0].optimizer == optimizer)


class Closed(NamedTuple):
    """A step that is over.

    Attributes:
        number: Its number.
        stepped: The optimizers that have stepped.
        skipped: Why none used its gradients: ``unused``, ``clipper`` or ``refused``;
            empty where that is no matter.
        early: Whether no step had been taken, and no optimizer seen, before it.
        candidate: Whether it is the one that was set aside.
    """

    number: int
    stepped: tuple[int, ...] = ()
    skipped: str = ""
    early: bool = False
    candidate: bool = False


class Done(NamedTuple):
    """What an event has brought about.

    Attributes:
        closed: Steps that are over, in their order: two where the first was set aside.
        dropped: Whether what was open was no step.
        set_aside: Whether what was open is the candidate now.
        opened: Whether a step has opened; behind what was closed.
        counts: Whether an optimizer is about to use the open step's gradients, itself
            or by the closure that it runs; not one inside another's step.
    """

    closed: tuple[Closed, ...] = ()
    dropped: bool = False
    set_aside: bool = False
    opened: bool = False
    counts: bool = False


NOTHING: Final = Done()
_OPENED: Final = Done(opened=True)
_COUNTS: Final = Done(counts=True)


def advance(state: State, event: Event) -> tuple[State, Done]:
    """Return the state after an event, and what it has brought about."""
    if isinstance(event, Begins):
        return _begins(state, event)
    if isinstance(event, Ends):
        return _ends(state, event)
    if isinstance(event, Uses):
        return _uses(state, event)
    if isinstance(event, Used):
        return _used(state, event)
    if isinstance(event, Settles):
        return _settles(state, event)
    if isinstance(event, Gone):
        left = tuple(r for r in state.regulars if r.optimizer != event.optimizer)
        return state._replace(regulars=left), NOTHING
    return _close(state, "refused" if isinstance(event, Refuses) else "")


def _begins(state: State, event: Begins) -> tuple[State, Done]:
    done = NOTHING
    if event.running is not None and event.running < len(state.inside):
        state = state._replace(inside=state.inside[: event.running])
    if state.open and state.stepped and not state.inside:
        state, done = _close(state)
    elif state.doubts and event.kept is False:
        state, done = _thrown_away(state, event.finite)
    if not state.open:
        done = _OPENED if done is NOTHING else done._replace(opened=True)
    return state._replace(open=True, task=event.task), done


def _thrown_away(state: State, finite: bool) -> tuple[State, Done]:
    """Close, drop or set aside a step whose gradients no optimizer has used."""
    if not finite:
        return _close(state, "unused")
    if state.optimizers or not state.backwards:
        return _drop(state)
    if state.by_hand or state.candidate:
        return _close(state._replace(by_hand=True))
    return state._replace(open=False, backwards=0, candidate=True), Done(set_aside=True)


def _drop(state: State) -> tuple[State, Done]:
    return state._replace(open=False, backwards=0), Done(dropped=True)


def _ends(state: State, event: Ends) -> tuple[State, Done]:
    if not state.open:
        return state, NOTHING
    state = state._replace(backwards=state.backwards + event.waiting)
    if state.stepped and not state.inside and _satisfied(state):
        return _close(state)  # the optimizers step inside backward
    return state, NOTHING


def _uses(state: State, event: Uses) -> tuple[State, Done]:
    outer = state.inside[: event.running - 1]
    if outer:  # an optimizer inside another's step: the outermost counts
        return state._replace(inside=(*outer, event.optimizer)), NOTHING
    if state.inside or state.candidate or not state.optimizers:
        state = state._replace(inside=(), optimizers=True, candidate=False)
    done = NOTHING
    if event.task not in (-1, state.task):  # it steps inside backward, before our hook
        state, done = _begins(state, Begins(event.task))
    anew = event.closure or (event.new and event.task == -1)
    if anew and state.open and state.stepped:
        state, done = _close(state)
    if not state.open and event.new:
        state, done = state._replace(open=True), done._replace(opened=True)
    if state.open or event.closure:
        done = _COUNTS if done is NOTHING else done._replace(counts=True)
    return state._replace(inside=(event.optimizer,)), done


def _used(state: State, event: Used) -> tuple[State, Done]:
    if event.optimizer not in state.inside:
        return state, NOTHING  # it had begun before the watch did
    last = len(state.inside) - 1 - state.inside[::-1].index(event.optimizer)
    if last:
        return state._replace(inside=state.inside[:last]), NOTHING
    if not state.open:
        return _came_late(state._replace(inside=()), event.optimizer), NOTHING
    stepped = (*state.stepped, event.optimizer)
    state = state._replace(inside=(), stepped=stepped)
    if event.task == -1 and _satisfied(state):
        return _close(state, "clipper" if event.refused else "")
    return state, NOTHING


def _satisfied(state: State) -> bool:
    """Tell whether nothing more can be expected of the open step."""
    if state.number - state.late < MEMORY:
        return False
    for known in state.regulars:
        if known.repeats or known.optimizer not in state.stepped:
            return False
    return True


def _came_late(state: State, optimizer: int) -> State:
    """Remember an optimizer that has stepped after its step was closed."""
    if not state.taken:
        return state  # there is no such step
    step = state.number - 1
    found = {r.optimizer: r for r in state.regulars}
    before = found.get(optimizer)
    again = before is not None and (before.repeats or before.step == step)
    found[optimizer] = Regular(optimizer, step, again)
    return state._replace(regulars=tuple(found.values()), late=step)


def _settles(state: State, event: Settles) -> tuple[State, Done]:
    if not state.open:
        return state, NOTHING
    if state.stepped:  # one that was waited for never came
        return _close(state)
    if not event.finite:
        return _close(state, "unused")
    if state.backwards and not state.optimizers:
        return _close(state._replace(by_hand=True))
    closed = (_aside(state),) if state.candidate else ()
    state = state._replace(number=state.number + len(closed), candidate=False)
    if event.final or not event.kept:
        state = _drop(state)[0]
    return state, Done(closed=closed, dropped=not state.open)


def _close(state: State, skipped: str = "") -> tuple[State, Done]:
    """Close the open step; what was set aside turns out to be one, before it."""
    number, closed = state.number, tuple[Closed, ...]()
    if state.candidate:
        number, closed = number + 1, (_aside(state),)
    early = not state.taken and not state.optimizers
    after = State(
        number=number + 1,
        task=state.task,
        regulars=_remembered(state),
        late=state.late,
        optimizers=state.optimizers,
        by_hand=state.by_hand or state.candidate,
        taken=state.taken or not skipped or state.candidate,
    )
    return after, Done(closed=(*closed, Closed(number, state.stepped, skipped, early)))


def _aside(state: State) -> Closed:
    """Return the step that was set aside."""
    return Closed(state.number, early=not state.taken, candidate=True)


def _remembered(state: State) -> tuple[Regular, ...]:
    """Return the optimizers of late, with those of the step that closes."""
    number, stepped = state.number, state.stepped
    found = {r.optimizer: r for r in state.regulars if number - r.step < MEMORY}
    for optimizer in stepped:
        again = optimizer in found and found[optimizer].repeats
        again = again or stepped.count(optimizer) > 1
        found[optimizer] = Regular(optimizer, number, again)
    return tuple(found.values())
