"""Cadences from made times: no clock is read here."""

import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.schedule import DEPTHS, Schedule

LAWS = settings(deadline=None, derandomize=True, max_examples=200, database=None)
CADENCES = {"gradients": 1, "state": 50, "spectrum": 50, "flow": 100}
BUDGETED = ("state", "spectrum", "flow")
STEP = 0.010


def due(schedule, depth, steps):
    return [step for step in steps if schedule.due(depth, step)]


def stepped(schedule, seconds=STEP, steps=64):
    for _ in range(steps):
        schedule.stepped(seconds)
    return schedule


def test_default_cadences_and_early_steps():
    schedule = Schedule()
    assert due(schedule, "gradients", range(5)) == [0, 1, 2, 3, 4]
    for depth in ("state", "spectrum"):
        expected = [0, 1, 2, 4, 8, 50, 100, 150]
        assert due(schedule, depth, range(200)) == expected
    expected = [0, 1, 2, 4, 8, 16, 32, 64, 100, 200]
    assert due(schedule, "flow", range(201)) == expected
    assert {depth: schedule.cadence(depth) for depth in DEPTHS} == CADENCES


def test_one_number_counts_from_step_0_and_leaves_gradients_alone():
    schedule = Schedule(every=30)
    for depth in BUDGETED:
        assert due(schedule, depth, range(100)) == [0, 30, 60, 90]
    assert schedule.cadence("gradients") == 1


def test_an_explicit_depth_has_no_early_steps_and_the_others_keep_theirs():
    schedule = Schedule(every={"flow": 40, "gradients": 10})
    assert due(schedule, "flow", range(100)) == [0, 40, 80]
    assert due(schedule, "gradients", range(25)) == [0, 10, 20]
    assert due(schedule, "state", range(10)) == [0, 1, 2, 4, 8]


def test_asked_for_once_whatever_the_cadence():
    schedule = Schedule(every=1000)
    schedule.ask("flow", 7)
    assert due(schedule, "flow", range(1, 20)) == [7]
    assert due(schedule, "state", range(1, 20)) == []


def test_the_cadence_is_the_smallest_stretch_within_a_sixth_of_the_budget():
    # At 3 %, a depth that runs every 50 steps may cost a quarter of a step.
    limits = {0.25: 1, 0.5: 2, 1.25: 5, 2.5: 10, 5.0: 20, 40.0: 20}
    for limit, stretch in limits.items():
        schedule = stepped(Schedule(budget=0.03))
        cadence = 50 * stretch
        said = schedule.ran("spectrum", 0.99 * limit * STEP)
        assert said == (None if stretch == 1 else f"spectrum every {cadence} steps")
        assert schedule.cadence("spectrum") == cadence
        expected = list(range(cadence, 2001, cadence))
        assert due(schedule, "spectrum", range(9, 2001)) == expected
        assert schedule.cadence("state") == 50  # each depth has its own share


@LAWS
@given(
    st.sampled_from(BUDGETED),
    st.floats(1e-4, 1.0),
    st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=12),
    st.floats(0.001, 1.0),
    st.one_of(st.none(), st.integers(1, 300)),
)
def test_cadences_keep_the_budget(depth, step, costs, budget, every):
    schedule = stepped(Schedule(every, budget), step)
    for cost in costs:
        schedule.ran(depth, cost)
    base = every or CADENCES[depth]
    cost = statistics.median(costs[-5:])
    fits = [
        base * s for s in (1, 2, 5, 10, 20) if cost / step / (base * s) * 6 <= budget
    ]
    cadence = schedule.cadence(depth)
    near = [math.isclose(cost / step / (base * s) * 6, budget) for s in (1, 2, 5, 10)]
    assert cadence == (fits[0] if fits else base * 20) or any(near)


def test_a_cheaper_depth_comes_back_and_one_slow_run_changes_nothing():
    schedule = stepped(Schedule())
    for _ in range(5):
        schedule.ran("flow", 0.45 * STEP)
    assert schedule.ran("flow", 0.5) is None
    assert schedule.cadence("flow") == 100
    for _ in range(5):
        schedule.ran("flow", 0.5)
    assert schedule.cadence("flow") == 2000
    said = [schedule.ran("flow", 0.1 * STEP) for _ in range(5)]
    assert "flow every 100 steps" in said
    assert schedule.cadence("flow") == 100


def test_the_steps_of_now_count():
    schedule = stepped(Schedule(), STEP)
    schedule.ran("spectrum", STEP / 2)
    assert schedule.cadence("spectrum") == 100
    stepped(schedule, 10 * STEP)  # a longer sequence, say
    schedule.ran("spectrum", STEP / 2)
    assert schedule.cadence("spectrum") == 50


def test_nothing_is_decided_before_five_steps_are_known():
    schedule = stepped(Schedule(), steps=4)
    assert schedule.ran("flow", 0.9) is None
    assert schedule.cadence("flow") == 100
    stepped(schedule, steps=1)
    assert schedule.ran("flow", 0.9) == "flow every 2000 steps"


def test_early_steps_run_also_where_the_cadence_is_stretched():
    schedule = stepped(Schedule())
    schedule.ran("state", 0.9)
    assert due(schedule, "state", range(1100)) == [0, 1, 2, 4, 8, 1000]


def test_a_probe_of_over_a_second_is_left_out():
    schedule = stepped(Schedule(), seconds=10.0)
    assert schedule.ran("flow", 1.0) is None
    said = schedule.ran("flow", 1.2)
    assert said == "flow takes over 1 s a run and is left out"
    schedule.ask("flow", 7)
    assert due(schedule, "flow", range(300)) == []
    assert schedule.cadence("flow") == 0
    assert due(schedule, "state", range(60)) == [0, 1, 2, 4, 8, 50]


def test_without_a_budget_nothing_changes():
    schedule = stepped(Schedule(budget=None))
    for depth in BUDGETED:
        assert schedule.ran(depth, 5.0) is None
        assert schedule.cadence(depth) == CADENCES[depth]


def test_gradients_have_no_cadence_of_their_own():
    schedule = stepped(Schedule())
    assert schedule.ran("gradients", 5.0) is None
    assert schedule.cadence("gradients") == 1


def chosen(schedule, steps, *, full, part):
    """Let steps pass that cost so many seconds, read in full or not; return choices."""
    said = []
    for number in range(steps):
        in_full = number % schedule.in_full == 0
        schedule.stepped(STEP, full if in_full else part, full=in_full)
        said.append((number, schedule.choose()))
    return [(number, words) for number, words in said if words]


@pytest.mark.parametrize(
    ("share", "every"), [(0.003, 1), (0.005, 2), (0.01, 4), (0.012, 8), (0.5, 8)]
)
def test_gradients_are_read_in_full_as_often_as_their_share_allows(share, every):
    # At 3 %, they may take .375 % in our own timers.
    schedule = Schedule()
    said = chosen(schedule, 600, full=share * STEP, part=share / 10 * STEP)
    assert schedule.in_full == every
    words = f"gradients in full every {every} steps"
    assert (said[-1][1] == words) if every > 1 else said == []
    assert {number + 1 for number, _ in said} <= {64, 128, 256, 512}


def test_what_the_gradients_take_the_other_depths_do_not():
    cheap, dear = stepped(Schedule()), stepped(Schedule())
    chosen(cheap, 64, full=0.0, part=0.0)
    chosen(dear, 64, full=0.02 * STEP, part=0.005 * STEP)
    for schedule in (cheap, dear):
        schedule.ran("spectrum", 0.2 * STEP)
    assert cheap.cadence("spectrum") == 50 and dear.cadence("spectrum") == 100


def test_steps_at_which_more_is_due_tell_nothing_of_the_gradients():
    schedule = Schedule()
    for _ in range(70):
        schedule.stepped(STEP, None)
    assert schedule.choose() is None and schedule.in_full == 1


def test_the_same_times_give_the_same_cadences():
    first, second = stepped(Schedule()), stepped(Schedule())
    for cost in (0.001, 0.02, 0.3, 0.02, 0.9, 0.004):
        assert first.ran("flow", cost) == second.ran("flow", cost)
    assert first.state_dict() == second.state_dict()


def test_a_resumed_schedule_goes_on_where_it_was():
    schedule = stepped(Schedule(), steps=20)
    for cost in (0.02, 0.02, 0.02):
        schedule.ran("spectrum", cost)
    schedule.ran("flow", 2.0)
    state = json.loads(json.dumps(schedule.state_dict()))
    other = stepped(Schedule(), 7.0)  # its own times are forgotten
    other.ran("spectrum", 0.001)
    other.load_state_dict(state)
    assert other.state_dict() == schedule.state_dict()
    for depth in DEPTHS:
        assert other.cadence(depth) == schedule.cadence(depth)
        steps = range(64, 1000)
        assert due(other, depth, steps) == due(schedule, depth, steps)
    assert other.cadence("flow") == 0
    for cost in (0.004, 0.004, 0.004):
        assert other.ran("spectrum", cost) == schedule.ran("spectrum", cost)


def test_resuming_without_a_budget_fixes_the_cadences():
    schedule = stepped(Schedule())
    schedule.ran("spectrum", 0.5)
    schedule.ran("flow", 2.0)
    other = Schedule(budget=None)
    other.load_state_dict(schedule.state_dict())
    assert {depth: other.cadence(depth) for depth in DEPTHS} == CADENCES


def test_resuming_with_another_cadence_takes_the_new_one():
    schedule = stepped(Schedule())
    schedule.ran("spectrum", STEP / 2)
    other = Schedule(every=10)
    other.load_state_dict(schedule.state_dict())
    assert other.cadence("spectrum") == 20


@pytest.mark.parametrize(
    ("every", "error", "said"),
    [
        (0, ValueError, r"every=0 has state run every 0 steps; expected .* at least 1"),
        (-5, ValueError, r"every=-5 .* at least 1"),
        (True, ValueError, r"every=True .* whole number"),
        ({"flow": 0}, ValueError, r"\{'flow': 0\} has flow run every 0 steps"),
        ({"flow": 2.5}, ValueError, r"flow run every 2.5 steps; expected a\s+whole"),
        ({"flow": False}, ValueError, r"flow run every False steps"),
        ({"rho": 5}, ValueError, r"names 'rho'; the probe groups are gradients, state"),
        ({"rho": 5, 3: 4}, ValueError, r"names 'rho', 3; the probe groups are"),
        ("50", TypeError, r"every is '50'; expected an int, a mapping"),
        (2.5, TypeError, r"every is 2.5; expected an int"),
    ],
)
def test_a_useless_cadence_is_refused(every, error, said):
    with pytest.raises(error, match=said):
        Schedule(every=every)


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (0, ValueError),
        (-0.1, ValueError),
        (3, ValueError),
        (math.nan, ValueError),
        (True, TypeError),
        ("3%", TypeError),
    ],
)
def test_a_useless_budget_is_refused(budget, error):
    said = rf"budget is {budget!r}; expected a share .* budget=0.03 for 3 %, or None"
    with pytest.raises(error, match=said):
        Schedule(budget=budget)


def test_seeds_are_sent_back_at_the_first_flow_seldom_then_and_when_asked():
    schedule = Schedule()
    assert schedule.seeds_due(0)
    for step, again in ((0, 50), (64, 128), (800, 1600), (5000, 6000)):
        schedule.seeded(step)
        assert not schedule.seeds_due(again - 1) and schedule.seeds_due(again)
    schedule.want_seeds()
    assert schedule.seeds_due(7)
    schedule.seeded(7)
    schedule.probe(9)
    assert schedule.seeds_due(9)
    assert all(schedule.due(depth, 9) for depth in DEPTHS)
