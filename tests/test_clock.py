"""The clock against a slow model that sees the whole list of events, with hindsight."""

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.clock import (
    MEMORY,
    BackwardBegins,
    BackwardEnds,
    ClockState,
    CountByHand,
    OptimizerBegins,
    OptimizerEnds,
    OptimizerGone,
    Refusal,
    Settling,
    advance,
)

# ---- what a loop does, as a list


class Backward(NamedTuple):
    """A pass; ``anew``: what was there had been thrown away before."""

    anew: bool = True
    finite: bool = True
    raises: bool = False


class Step(NamedTuple):
    """An optimizer steps; with a closure, the passes of which run inside.

    One that steps ``inside`` it may raise alone: what runs it goes on.
    """

    optimizer: int
    closure: tuple[Backward, ...] | None = None
    inside: int | None = None
    inside_raises: bool = False
    raises: bool = False
    new: bool = False


class Inside(NamedTuple):
    """A pass during which optimizers step, and take all gradients."""

    optimizers: tuple[int, ...]


class Leaves(NamedTuple):
    """An optimizer is no more."""

    optimizer: int


class Counted(NamedTuple):
    """A step: the uses of its gradients in their order; why it was skipped."""

    uses: tuple[int, ...]
    skipped: bool


# ---- the slow model


class Group:
    """Passes, and what was done with their gradients before new ones came."""

    def __init__(self):
        self.uses, self.finite, self.passes = [], True, 0


def groups_of(events):
    groups, first_use = [], None
    for number, event in enumerate(events):
        last = groups[-1] if groups else None
        if isinstance(event, Backward | Inside):
            anew = isinstance(event, Inside) or event.anew
            if last is None or last.uses or anew:
                groups.append(Group())
            note_pass(groups[-1], event)
        elif isinstance(event, Step):
            if (event.closure or event.new) and (last is None or last.uses):
                groups.append(Group())
            for one in event.closure or ():
                note_pass(groups[-1], one)
            if groups and not event.raises:
                groups[-1].uses.append(event.optimizer)
        if isinstance(event, Step | Inside) and first_use is None:
            first_use = number, len(groups)
    return groups, first_use


def note_pass(group, event):
    if isinstance(event, Inside):
        group.uses += event.optimizers
        return
    if not event.raises:
        group.passes += 1
        group.finite = group.finite and event.finite


def slow(events):
    """Return the steps, seeing everything at once."""
    groups, first_use = groups_of(events)
    early = groups if first_use is None else groups[: first_use[1]]
    found = []
    for i, group in enumerate(groups):
        if group.uses:
            found.append(Counted(tuple(group.uses), False))
        elif not group.finite:
            found.append(Counted((), True))
        elif group.passes and is_by_hand(early, i, first_use):
            found.append(Counted((), False))
    return found


def is_by_hand(early, i, first_use):
    """Tell whether finite gradients that no optimizer has used were a step."""
    if i >= len(early):
        return False
    if first_use is None:
        return True
    unused = [j for j, g in enumerate(early) if not g.uses and g.passes]
    if i == len(early) - 1:
        return False  # it was there as the first optimizer came
    later = [j for j in unused if i < j < len(early) - 1]
    return bool(later) or any(j < i and early[j].finite for j in unused)


# ---- the clock, driven as the hooks drive it


class Driver:
    """Turns what a loop does into the events that the hooks report."""

    def __init__(self):
        self.state, self.task, self.steps = ClockState(), 0, []
        self.finite, self.running = True, []

    def tell(self, event):
        self.state, done = advance(self.state, event)
        assert self.state.number == len(self.steps) + len(done.closed)
        for closed in done.closed:
            assert closed.number == len(self.steps)
            self.steps.append(Counted(closed.stepped, bool(closed.skipped)))
        if done.opened:
            self.finite = True
        return done

    def backward(self, event):
        self.task += 1
        waiting = self.state.open
        self.tell(
            BackwardBegins(
                self.task,
                kept=not event.anew if waiting else None,
                finite=self.finite,
                running=len(self.running),
            )
        )
        if not event.raises:
            self.finite = self.finite and event.finite
            self.tell(BackwardEnds(waiting=True))

    def inside(self, event):
        self.task += 1
        kept = False if self.state.open else None
        running = len(self.running)
        self.tell(
            BackwardBegins(self.task, kept=kept, finite=self.finite, running=running)
        )
        for optimizer in event.optimizers:
            self.tell(OptimizerBegins(optimizer, task=self.task, new=True))
            self.tell(OptimizerEnds(optimizer, task=self.task))
        self.tell(BackwardEnds(waiting=False))

    def step(self, event):
        self.running = [event.optimizer]
        closure = bool(event.closure)
        waits = self.state.open and not self.state.stepped
        new = event.new and not waits  # else the gradients are those that wait
        done = self.tell(OptimizerBegins(event.optimizer, closure=closure, new=new))
        assert done.uses == (self.state.open or closure)
        for one in event.closure or ():
            self.backward(one)
        if event.inside is not None:
            assert not self.tell(OptimizerBegins(event.inside, running=2)).uses
            if not event.inside_raises:
                self.tell(OptimizerEnds(event.inside))
        self.running = []
        if not event.raises:
            self.tell(OptimizerEnds(event.optimizer))

    def play_one(self, event):
        if isinstance(event, Backward):
            self.backward(event)
        elif isinstance(event, Inside):
            self.inside(event)
        elif isinstance(event, Step):
            self.step(event)
        else:
            self.tell(OptimizerGone(event.optimizer))

    def play(self, events):
        for event in events:
            self.play_one(event)
        self.tell(Settling(finite=self.finite, final=True))
        assert not self.state.open
        return self.steps


# ---- both


optimizers = st.integers(0, 3)
passes = st.builds(
    Backward,
    anew=st.booleans(),
    finite=st.integers(0, 9).map(bool),
    raises=st.integers(0, 9).map(lambda n: n == 0),
)
complete = st.builds(Backward, anew=st.booleans(), finite=st.just(True))
steps = st.builds(
    Step,
    optimizers,
    closure=st.none() | st.lists(complete, min_size=1, max_size=3).map(tuple),
    inside=st.none() | st.integers(7, 9),
    inside_raises=st.booleans(),
    raises=st.integers(0, 9).map(lambda n: n == 0),
    new=st.integers(0, 9).map(lambda n: n == 0),
)
plain = optimizers.map(Step)
others = st.one_of(
    st.builds(Inside, st.lists(optimizers, min_size=1, max_size=3).map(tuple)),
    st.builds(Leaves, optimizers),
)
loops = st.lists(st.one_of(passes, passes, plain, plain, steps, others), max_size=40)


def agree(events):
    expected, got = slow(events), Driver().play(events)
    assert [s.skipped for s in got] == [s.skipped for s in expected]
    late = -MEMORY
    for number, (one, all_uses) in enumerate(zip(got, expected, strict=True)):
        assert one.uses == all_uses.uses[: len(one.uses)]
        if one.uses != all_uses.uses:  # something came too late; not soon again
            assert number - late >= MEMORY
            late = number


@settings(deadline=None, derandomize=True, max_examples=1000, database=None)
@given(loops)
def test_the_clock_agrees_with_hindsight(events):
    agree(events)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=10_000, database=None)
@given(loops)
def test_the_clock_agrees_with_hindsight_ten_thousand_times(events):
    agree(events)


# ---- when a step closes: as early as it can be known


def closings(events):
    """Return, after each event, the steps that are closed by then."""
    driver, found = Driver(), []
    for event in events:
        driver.play_one(event)
        found.append([s.uses for s in driver.steps])
    return found


def test_with_one_optimizer_a_step_closes_as_it_returns():
    after = closings([Backward(), Step(0)] * 20)
    assert [len(steps) for steps in after] == [n // 2 for n in range(1, 41)]


def test_a_second_optimizer_is_waited_for_once_it_is_known():
    after = closings([Backward(), Step(0), Step(1)] * 30)
    first, later = after[:3], after[-3:]
    assert first == [[], [(0,)], [(0,)]]  # the second came late
    assert [len(steps) for steps in later] == [29, 29, 30]
    assert later[-1][1:] == [(0, 1)] * 29


def test_an_optimizer_that_steps_now_and_then_belongs_to_the_step_it_came_in():
    events = [e for n in range(40) for e in (Backward(), Step(0), *[Step(1)][n % 3 :])]
    steps = closings([*events, Backward()])[-1]
    assert steps[1:] == [(0, 1) if n % 3 == 0 else (0,) for n in range(1, 40)]


def test_several_steps_of_one_optimizer_are_one():
    times = [1, 3, 2, 1, 1, 4, 2] * 5
    events = [e for n in times for e in (Backward(), *[Step(0)] * n)]
    steps = closings([*events, Backward()])[-1]
    late = [i for i, n in enumerate(times) if steps[i] != (0,) * n]
    assert late == [1]  # where it first did so


def test_an_optimizer_that_is_gone_is_not_waited_for():
    known = [Backward(), Step(0), Step(1)] * 20
    after = closings([*known, Leaves(1), Backward(), Step(0)])
    assert len(after[-1]) == 21


def test_an_optimizer_that_comes_no_more_is_waited_for_sixteen_steps():
    known = [Backward(), Step(0), Step(1)] * 20
    after = closings([*known, *[Backward(), Step(0)] * 20])
    ended = [len(steps) for steps in after[len(known) + 1 :: 2]]  # as Step(0) returns
    assert ended == [19 + n for n in range(1, 17)] + [20 + n for n in range(17, 21)]


def test_what_repeats_while_another_is_waited_for_is_known_to_repeat():
    known = [Backward(), Step(0), Step(1)] * 20
    again = [Backward(), Step(0), Step(0)]
    steps = closings([*known, *again, Step(1), Leaves(1), *again * 20, Backward()])[-1]
    assert steps[20:] == [(0, 0, 1), *[(0, 0)] * 20]


def test_an_optimizer_that_steps_before_there_is_a_gradient_is_not_late():
    after = closings([Step(0), *[Backward(), Step(0)] * 20])
    assert [len(steps) for steps in after[1:]] == [n // 2 for n in range(1, 41)]


@pytest.mark.parametrize("before", [(), (Backward(), Step(0))])
def test_what_nobody_used_is_early_until_a_step_is_taken(before):
    driver = Driver()
    for event in (*before, Backward(finite=False)):
        driver.play_one(event)
    [closed] = driver.tell(BackwardBegins(9, kept=False, finite=False)).closed
    assert closed.skipped == "unused" and closed.early == (not before)


def test_gradients_that_are_refused_close_the_step_as_skipped():
    state = advance(ClockState(number=5), BackwardBegins(1))[0]
    state = advance(advance(state, BackwardEnds(waiting=True))[0], OptimizerBegins(0))[
        0
    ]
    state, done = advance(state, Refusal())
    [closed] = done.closed
    assert (closed.number, closed.skipped) == (5, "refused")
    assert not state.open and state.inside == () and state.number == 6


def test_gradients_that_a_clipper_took_away_are_a_step_that_was_skipped():
    driver = Driver()
    driver.backward(Backward())
    driver.tell(OptimizerBegins(0))
    [closed] = driver.tell(OptimizerEnds(0, refused=True)).closed
    assert (closed.stepped, closed.skipped) == ((0,), "clipper")
    driver.play_one(Backward())
    driver.play_one(Step(0))
    assert [step.skipped for step in driver.steps] == [True, False]


def settled(events, **seen):
    driver = Driver()
    for event in events:
        driver.play_one(event)
    done = driver.tell(Settling(**seen))
    return driver, done


def test_settling_leaves_gradients_that_wait_for_an_optimizer():
    events = [Backward(), Step(0), Backward()]
    driver, done = settled(events)
    assert not done.closed and not done.dropped and driver.state.open
    driver.play_one(Step(0))
    assert driver.steps == [Counted((0,), False)] * 2


def test_settling_closes_what_a_second_optimizer_was_waited_for():
    known = [Backward(), Step(0), Step(1)] * 20
    driver, done = settled([*known, Backward(), Step(0)])
    assert [closed.stepped for closed in done.closed] == [(0,)]
    driver.play_one(Step(1))  # comes late; the next step has both again
    for event in (Backward(), Step(0), Step(1), Backward()):
        driver.play_one(event)
    assert driver.steps[-1].uses == (0, 1)


def test_settling_drops_what_was_thrown_away():
    driver, done = settled([Backward(), Step(0), Backward()], kept=False)
    assert done.dropped and not driver.state.open and len(driver.steps) == 1


def test_settling_counts_what_was_not_finite_and_what_was_written_by_hand():
    _, done = settled([Backward(), Step(0), Backward()], finite=False)
    assert [closed.skipped for closed in done.closed] == ["unused"]
    driver, done = settled([Backward()])
    assert [closed.skipped for closed in done.closed] == [""] and driver.state.by_hand


def test_an_optimizer_that_began_before_the_watch_counts():
    """The watch was attached in its closure: only its end is seen."""
    state = ClockState()
    for event in (BackwardBegins(1), BackwardEnds(waiting=True)):
        state, _ = advance(state, event)
    state, done = advance(state, OptimizerEnds(0))
    assert [closed.number for closed in done.closed] == [0]
    assert not state.open and state.number == 1
    _, done = advance(state, OptimizerEnds(0))  # but of nothing that was seen
    assert done.closed == ()


def test_a_step_may_be_counted_by_hand():
    state, done = advance(ClockState(), CountByHand())
    assert [c.number for c in done.closed] == [0] and state.number == 1
