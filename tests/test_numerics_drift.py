"""The predicted change of the spectral radius against exact differences."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.numerics import drift, spectral
from gradwatch.numerics.drift import predicted_drift
from testbed import reference


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def default(n, seed=0, dtype=torch.float32):
    bound = 1 / math.sqrt(n)
    fresh = torch.empty(n, n, dtype=dtype)
    return fresh.uniform_(-bound, bound, generator=seeded(seed))


def update(n, size, seed=1, rank=4, dtype=torch.float32):
    """A change of low rank, as a small batch makes."""
    left = torch.randn(n, rank, generator=seeded(seed), dtype=dtype)
    right = torch.randn(rank, n, generator=seeded(seed + 1), dtype=dtype)
    change = left @ right
    return size * change / change.norm()


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 32, 33, 64, 128])
def test_small_updates_are_predicted(n):
    for seed in range(6):
        before = default(n, seed)
        after = before + update(n, 1e-3, seed)
        [found] = predicted_drift(before, after)
        true = reference.radius_change(before, after)
        if found.reliable:
            assert found.value == pytest.approx(true, abs=2e-2 * 1e-3)


@pytest.mark.parametrize("n", [8, 32, 64])
def test_most_small_updates_are_reliable(n):
    befores = torch.stack([default(n, seed) for seed in range(40)])
    changes = torch.stack([update(n, 1e-3, seed) for seed in range(40)])
    found = predicted_drift(befores, befores + changes)
    assert sum(d.reliable for d in found) >= 36


@pytest.mark.parametrize("n", [16, 48])
def test_the_error_is_of_second_order(n):
    """A tenth of the update has a hundredth of the error."""
    before = default(n, 3, torch.float64)
    change = update(n, 1e-2, 3, dtype=torch.float64)
    errors = []
    for part in (1.0, 0.1):
        after = before + part * change
        [found] = predicted_drift(before, after)
        errors.append(abs(found.value - reference.radius_change(before, after)))
    assert errors[1] < errors[0] / 30


@pytest.mark.parametrize("n", [12, 32])
def test_the_single_pair_is_the_special_case(n, monkeypatch):
    monkeypatch.setattr("gradwatch.numerics.subspace.DIMENSIONS", 1)
    for seed in range(8):
        before = default(n, seed, torch.float64)
        after = before + update(n, 1e-7, seed, dtype=torch.float64)
        [found] = predicted_drift(before, after)
        formula = reference.single_pair_drift(before, after)
        assert found.value == pytest.approx(formula, rel=1e-4, abs=1e-12)
        true = reference.radius_change(before, after)
        assert formula == pytest.approx(true, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("n", [24, 64])
def test_eigenvalues_that_overtake_are_seen(n):
    """Two moduli close together: the second is first after the update."""
    values = torch.linspace(0.05, 0.7, n, dtype=torch.float64)
    values[-2:] = torch.tensor([0.9, -0.899])
    rotation = torch.linalg.qr(
        torch.randn(n, n, generator=seeded(), dtype=torch.float64)
    )[0]
    second = rotation[:, -1:]
    before = rotation @ values.diag() @ rotation.T
    after = before - 0.02 * second @ second.T
    assert reference.radius_change(before, after) == pytest.approx(0.019)
    [found] = predicted_drift(before, after)
    assert found.reliable and found.value == pytest.approx(0.019, rel=1e-3)
    assert reference.single_pair_drift(before, after) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [8, 16, 32, 64, 96])
@pytest.mark.parametrize("weights", ["orthogonal", "identity"])
def test_tied_moduli_are_right_or_flagged(n, weights):
    for seed in range(10):
        before = torch.eye(n)
        if weights == "orthogonal":
            nn.init.orthogonal_(before, generator=seeded(seed))
        for size in (1e-5, 1e-3, 1e-1):
            after = before + update(n, size, seed)
            [found] = predicted_drift(before, after)
            true = reference.radius_change(before, after)
            close = abs(found.value - true) <= 0.1 * abs(true) + 1e-7
            assert close or not found.reliable, (seed, size, found, true)


def test_large_updates_are_flagged():
    before = default(32)
    [found] = predicted_drift(before, before + update(32, 5.0))
    assert not found.reliable


@pytest.mark.parametrize("n", [8, 48])
def test_what_has_no_basis_has_no_drift(n):
    jordan = 0.9 * torch.eye(n) + torch.diag(torch.ones(n - 1), 1)
    broken = default(n)
    broken[0, 0] = math.nan
    before = torch.stack([torch.zeros(n, n), broken, jordan, default(n)])
    after = before + update(n, 1e-4)
    *unusable, sound = predicted_drift(before, after)
    assert not any(d.reliable for d in unusable)
    assert math.isnan(unusable[0].value) and math.isnan(unusable[1].value)
    assert sound.reliable and math.isfinite(sound.value)
    after[3, 1, 1] = math.inf
    assert math.isnan(predicted_drift(before, after)[3].value)


@pytest.mark.parametrize("n", [16, 48])
@pytest.mark.parametrize("factor", [1e-18, 1e18])
def test_homogeneous(n, factor):
    before, change = default(n), update(n, 1e-3)
    [plain] = predicted_drift(before, before + change)
    [scaled] = predicted_drift(before * factor, (before + change) * factor)
    assert scaled.value == pytest.approx(plain.value * factor, rel=1e-2)
    assert scaled.reliable == plain.reliable


def test_no_update_is_no_drift():
    for n in (8, 48):
        [found] = predicted_drift(default(n), default(n))
        assert found.value == 0 and found.reliable


@pytest.mark.parametrize("n", [16, 48])
def test_half_precision_weights(n):
    before = default(n).bfloat16()
    after = before + update(n, 5e-2).bfloat16()
    [found] = predicted_drift(before, after)
    true = reference.radius_change(before, after)
    assert not found.reliable or found.value == pytest.approx(true, rel=0.2)


def test_the_fallback_has_no_basis(monkeypatch):
    """Exact values that stand in for open bounds say nothing of the probes."""
    n = 48
    matrix = torch.diag(torch.ones(n - 1), 1)
    matrix[0, 0] = 0.5
    launched = spectral.launch(matrix)
    blocks = {k: v.numpy() for k, v in launched.blocks.items()}
    [radius] = spectral.finish(launched, blocks)
    assert radius.source == "exact" and radius.basis is None
    moved = drift.launch_change(launched, matrix[None]).numpy()
    [found] = drift.finish_change([radius], np.ones(1), moved)
    assert not found.reliable and math.isnan(found.value)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(4, 4\) before and \(5, 5\) after"):
        predicted_drift(torch.eye(4), torch.eye(5))
