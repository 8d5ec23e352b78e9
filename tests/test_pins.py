"""Nothing changes by the way: runs, alarms and what a user meets are as stored."""

import pytest
import torch

from tests.pins.families import reported
from tests.pins.runs import QUICK, RUNS, run
from tests.pins.stored import differences, read
from tests.pins.surface import calls, surface
from tests.support.seldom import seldom


@pytest.fixture(scope="module")
def stored_runs():
    return read("runs")


@pytest.mark.parametrize("name", seldom(RUNS, set(RUNS) - set(QUICK)))
def test_a_run_is_as_it_was(name, stored_runs, tmp_path):
    assert list(differences(stored_runs[name], run(name, tmp_path))) == []


def test_what_a_user_meets_is_as_it_was():
    assert list(differences(read("surface"), surface())) == []


@pytest.mark.slow
@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch makes calls of its own inside ours"
)
def test_a_step_makes_no_more_calls_than_it_did():
    was, now = read("calls"), calls()
    for name, counts in was.items():
        for kind, count in counts.items():
            assert now[name][kind] <= 1.02 * count, (name, kind)


@pytest.mark.slow
def test_what_is_reported_of_every_family_is_as_it_was():
    assert list(differences(read("families"), reported())) == []


def test_a_difference_is_found_wherever_it_is():
    was = {"a": [1.0, 2], "b": {"c": "x"}, "d": "nan"}
    assert (
        list(differences(was, {"a": [1.000001, 2], "b": {"c": "x"}, "d": "nan"})) == []
    )
    now = {"a": [1.1, 3], "b": {"c": "y", "e": 1}}
    places = [line.split()[0] for line in differences(was, now)]
    assert places == ["/a[0]", "/a[1]", "/b/c", "/b/e", "/d"]
