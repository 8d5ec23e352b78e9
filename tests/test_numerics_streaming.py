"""Running statistics against sorting, and that a state survives JSON."""

import itertools
import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.numerics.streaming import (
    largest_median,
    median,
    push,
    robust_z,
    rolling_medians,
    smallest_median,
    theil_sen,
)
from testbed import reference

LAWS = settings(deadline=None, derandomize=True, max_examples=200, database=None)
VALUES = st.floats(-1e100, 1e100)
WINDOWS = st.lists(VALUES, min_size=1, max_size=30).map(tuple)


def test_push_keeps_the_last_values_oldest_first():
    window = ()
    for value in range(7):
        window = push(window, float(value), 3)
    assert window == (4.0, 5.0, 6.0)
    assert push(window, 9.0, 1) == (9.0,)
    assert push((), 1.0, 1) == (1.0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_push_leaves_a_non_finite_value_out(value):
    assert push((1.0, 2.0), value, 2) == (1.0, 2.0)
    assert push((), value, 2) == ()


@LAWS
@given(st.lists(st.floats(), max_size=40), st.integers(1, 12))
def test_push_is_the_tail_of_the_finite_values(values, size):
    window = ()
    for value in values:
        window = push(window, value, size)
    finite = [v for v in values if math.isfinite(v)]
    assert list(window) == finite[-size:]
    assert tuple(json.loads(json.dumps(window))) == window


@LAWS
@given(WINDOWS)
def test_median_matches_sorting(window):
    assert median(window) == pytest.approx(reference.median(window), rel=1e-15)
    assert min(window) <= median(window) <= max(window)
    assert median(tuple(-v for v in window)) == -median(window)


def test_median_of_nothing_is_unknown():
    assert math.isnan(median(()))
    assert median((3.0, 1.0, 2.0)) == 2.0
    assert median((4.0, 1.0, 2.0, 3.0)) == 2.5


@LAWS
@given(WINDOWS, VALUES, st.floats(1e-3, 1e3))
def test_robust_z_matches_sorting(window, value, floor):
    expected = reference.robust_z(window, value, floor)
    assert robust_z(window, value, floor) == pytest.approx(expected, rel=1e-12)


@LAWS
@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=15),
    st.integers(-50, 50),
    st.sampled_from([0.25, 2.0, 1024.0]),
    st.integers(-8, 8),
)
def test_robust_z_ignores_units_and_origin(numbers, number, unit, origin):
    window = tuple(float(n) for n in numbers)
    moved = tuple(unit * v + origin for v in window)
    expected = robust_z(window, float(number))
    assert robust_z(moved, unit * number + origin) == pytest.approx(expected)


def test_robust_z_where_the_window_does_not_vary():
    assert robust_z((2.0, 2.0, 2.0), 2.0) == 0.0
    assert robust_z((2.0, 2.0, 2.0), 2.1) == math.inf
    assert robust_z((2.0, 2.0, 2.0), 1.9) == -math.inf
    assert robust_z((2.0, 2.0, 2.0), 2.5, floor=0.1) == pytest.approx(5.0)


def test_robust_z_hides_no_unknown_value():
    for window in ((), (2.0, 2.0), (1.0, 2.0, 3.0)):
        assert math.isnan(robust_z(window, math.nan))
    assert math.isnan(robust_z((), 1.0, floor=0.1))
    for window in ((2.0, 2.0), (1.0, 2.0, 3.0)):
        assert robust_z(window, math.inf) == math.inf
        assert robust_z(window, -math.inf) == -math.inf


def test_one_outlier_does_not_move_the_scale():
    usual = tuple(1 + 0.01 * i for i in range(20))
    assert robust_z((*usual, 1e9), 1.3) == pytest.approx(robust_z(usual, 1.3), rel=0.3)


@LAWS
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.integers(1, 50))
def test_theil_sen_matches_two_loops(values, every):
    steps = [every * i + (i > 2) for i in range(len(values))]
    expected = reference.theil_sen(steps, values)
    assert theil_sen(steps, values) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_one_outlier_does_not_move_a_trend():
    values = [0.01 * i for i in range(8)]
    values[3] = 50.0
    assert theil_sen(range(8), values) == pytest.approx(0.01, rel=0.2)
    assert math.isnan(theil_sen((1,), (2.0,)))


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=9, max_size=12),
    st.sampled_from([3, 5, 7]),
)
def test_the_largest_median_is_that_of_the_largest_choice(values, size):
    choices = itertools.combinations(values, size)
    assert largest_median(values, size) == max(map(statistics.median, choices))
    choices = itertools.combinations(values, size)
    assert smallest_median(values, size) == min(map(statistics.median, choices))


@LAWS
@given(st.lists(VALUES, min_size=7, max_size=40), st.integers(1, 7))
def test_rolling_medians_are_those_of_each_window(values, size):
    expected = [
        median(tuple(values[i : i + size])) for i in range(len(values) - size + 1)
    ]
    assert rolling_medians(values, size) == expected
