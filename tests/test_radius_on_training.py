"""The certified radius along real training runs."""

from dataclasses import replace

import pytest

from gradwatch.numerics.spectral import spectral_radius
from testbed import reference
from testbed.trajectories import RUNS, trajectory


def follow(runs, steps, every):
    """Check every snapshot; return how many there were, and the share certified."""
    snapshots, certified = 0, []
    for run in runs:
        for weights in trajectory(run, steps, every):
            snapshots += 1
            radii = spectral_radius(weights)
            for matrix, radius in zip(weights, radii, strict=True):
                true = reference.spectral_radius(matrix)
                assert radius.rho == pytest.approx(true, rel=1e-4), run
                if radius.certified:
                    assert radius.lower * (1 - 1e-3) <= true
                    assert radius.upper * (1 + 1e-3) >= true
                certified.append(radius.certified)
    return snapshots, sum(certified) / len(certified)


def test_first_steps_of_every_kind_of_run():
    runs = [replace(run, hidden=40, rate=5 * run.rate) for run in RUNS]
    snapshots, certified = follow(runs, steps=12, every=3)
    assert snapshots == 4 * len(RUNS)
    assert certified >= 0.99


@pytest.mark.slow
def test_a_thousand_snapshots():
    assert {run.hidden for run in RUNS} == {32, 64, 128}
    snapshots, certified = follow(RUNS, steps=360, every=4)
    assert snapshots >= 1000
    assert certified >= 0.99
