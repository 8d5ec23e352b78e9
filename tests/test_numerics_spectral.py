"""The certified radius against all eigenvalues, and laws it must obey."""

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.numerics import matrices, spectral
from gradwatch.numerics.singular import launch_gram
from gradwatch.numerics.spectral import (
    EXACT_UP_TO,
    FALLBACK_UP_TO,
    finish,
    launch,
    spectral_radius,
)
from testbed import reference

LAWS = settings(deadline=None, derandomize=True, max_examples=30, database=None)
SEEDS = st.integers(0, 2**31)
SIZES = st.sampled_from([1, 2, 5, 16, EXACT_UP_TO, EXACT_UP_TO + 1, 48])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def gaussian(n, g):
    return randn(g, n, n) / math.sqrt(n)


def torch_default(n, g):
    uniform = torch.rand(n, n, generator=g, dtype=torch.float64)
    return (2 * uniform - 1) / math.sqrt(n)


def orthogonal(n, g):
    q, r = torch.linalg.qr(randn(g, n, n))
    return q * r.diagonal().sign()


def identity(n, g):
    return torch.eye(n, dtype=torch.float64)


def identity_and_noise(n, g):
    return torch.eye(n, dtype=torch.float64) + 0.01 * randn(g, n, n)


def symmetric(n, g):
    return gaussian(n, g) + gaussian(n, g).T if n == 1 else _symmetrised(gaussian(n, g))


def _symmetrised(matrix):
    return (matrix + matrix.T) / 2


def conditioned(cond):
    def similar_to_a_diagonal(n, g):
        """X D X^-1, the condition number of X as asked."""
        stretch = torch.logspace(0, -math.log10(cond), n, dtype=torch.float64)
        basis = (orthogonal(n, g) * stretch) @ orthogonal(n, g)
        return basis @ torch.diag(randn(g, n)) @ torch.linalg.inv(basis)

    return similar_to_a_diagonal


def rank_two(n, g):
    return randn(g, n, 2) @ randn(g, 2, n) / n


def bulk_and_outlier(n, g):
    return gaussian(n, g) + 2 * torch.outer(randn(g, n), randn(g, n)) / n


def rotated(matrix, g):
    turn = orthogonal(len(matrix), g)
    return turn @ matrix @ turn.T


def rotated_triangular(n, g):
    above = torch.triu(3 * gaussian(n, g), 1)
    return rotated(above + torch.diag(randn(g, n)), g)


def near_defective(n, g):
    """Two leading eigenvalues 1e-4 apart, their eigenvectors nearly parallel."""
    matrix = 0.1 * torch.triu(gaussian(n, g), 1)
    matrix += torch.diag(0.8 * torch.rand(n, generator=g, dtype=torch.float64))
    matrix[0, 0], matrix[1, 1], matrix[0, 1] = 1.0, 1 - 1e-4, 3.0
    return rotated(matrix, g)


def jordan(n, value=0.9):
    above = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    return value * torch.eye(n, dtype=torch.float64) + above


def rotated_jordan(n, g):
    return rotated(jordan(n), g)


TAME = {
    "gaussian": gaussian,
    "torch default": torch_default,
    "orthogonal": orthogonal,
    "identity and noise": identity_and_noise,
    "symmetric": symmetric,
    "cond 10": conditioned(10.0),
    "rank two": rank_two,
    "bulk and outlier": bulk_and_outlier,
}
NON_NORMAL = {
    "cond 1e3": conditioned(1e3),
    "cond 1e5": conditioned(1e5),
    "rotated triangular": rotated_triangular,
    "near-defective": near_defective,
    "rotated Jordan": rotated_jordan,
}
COUNTS = {4: 30, 8: 20, 16: 10, 33: 10, 64: 8, 128: 2}
INITS = {f.__name__: f for f in (torch_default, orthogonal, gaussian, identity)}
INIT_COUNTS = {1: 60, 2: 60, 48: 40, 128: 20, 256: 2, 512: 1}


@pytest.fixture(scope="module")
def zoo():
    """1,040 matrices of 13 families as float32 batches, with their true radii."""
    found = []
    for name, family in (TAME | NON_NORMAL).items():
        for n, count in COUNTS.items():
            g = seeded(n)
            batch = torch.stack([family(n, g) for _ in range(count)]).float()
            truth = [reference.spectral_radius(m) for m in batch]
            found.append((name, batch, truth))
    return found


@pytest.fixture
def squarings_only(monkeypatch):
    monkeypatch.setattr(spectral, "EXACT_UP_TO", 0)
    monkeypatch.setattr(spectral, "FALLBACK_UP_TO", 0)


@pytest.fixture
def exact_only(monkeypatch):
    monkeypatch.setattr(spectral, "EXACT_UP_TO", 10_000)


def check(zoo, tame_share, all_share, tolerance=1e-3):
    """No certified value is off; bounds hold; and enough is certified."""
    certified = dict.fromkeys(TAME | NON_NORMAL, 0)
    for name, batch, truth in zoo:
        for radius, true in zip(spectral_radius(batch), truth, strict=True):
            if radius.certified:
                certified[name] += 1
                assert radius.rho == pytest.approx(true, rel=tolerance), (name, radius)
                assert radius.lower * (1 - 1e-3) <= true <= radius.upper * (1 + 1e-3)
    each = sum(COUNTS.values())
    assert each * len(certified) >= 1000
    assert sum(certified[name] for name in TAME) >= tame_share * each * len(TAME)
    assert sum(certified.values()) >= all_share * each * len(certified)


def test_no_false_certificate_from_squarings(zoo, squarings_only):
    check(zoo, tame_share=0.99, all_share=0.65)


def test_no_false_certificate_from_exact_eigenvalues(zoo, exact_only):
    check(zoo, tame_share=1.0, all_share=0.99, tolerance=1e-6)


def test_no_false_certificate_as_shipped(zoo):
    check(zoo, tame_share=1.0, all_share=0.99)


@pytest.mark.parametrize("init", INITS)
def test_initialisations_are_certified_within_1e_4(init):
    certified = total = 0
    for n, count in INIT_COUNTS.items():
        g = seeded(n)
        batch = torch.stack([INITS[init](n, g) for _ in range(count)]).float()
        for matrix, radius in zip(batch, spectral_radius(batch), strict=True):
            true = reference.spectral_radius(matrix)
            assert radius.rho == pytest.approx(true, rel=1e-4)
            certified += radius.certified
            total += 1
    assert certified >= 0.99 * total


def test_a_leading_eigenvalue_comes_with_its_condition():
    for n in (12, 64):
        matrix = rotated_triangular(n, seeded(3)).float()
        [radius] = spectral_radius(matrix)
        values, right = torch.linalg.eig(matrix.double())
        lead = values.abs().argmax()
        left = torch.linalg.inv(right)[lead]
        true = complex(values[lead])
        assert radius.eigenvalue == pytest.approx(
            complex(true.real, abs(true.imag)), rel=1e-4
        )
        expected = (left.norm() * right[:, lead].norm()).item()
        assert radius.condition == pytest.approx(expected, rel=1e-3)


def test_defective_matrices_are_never_certified():
    blocks = {
        "Jordan": (lambda n: jordan(n), (8, 16, 32, 48, 96)),
        "nilpotent": (lambda n: jordan(n, 0.0), (2, 8, 32, 48, 96)),
    }
    for name, (block, sizes) in blocks.items():
        for n in sizes:
            [radius] = spectral_radius(block(n))
            assert not radius.certified, (name, n, radius)


def test_squarings_never_certify_a_defective_matrix_however_rotated(squarings_only):
    for n in (8, 16, 32, 48, 96):
        for value in (0.9, 0.0):
            turned = rotated(jordan(n, value), seeded(n)).float()
            batch = torch.stack([jordan(n, value).float(), turned])
            for radius in spectral_radius(batch):
                assert not radius.certified
                assert radius.source == "open"


def test_near_defective_matrices_keep_a_margin(squarings_only):
    # Float32 moves these most; with condition numbers up to 1700 let in, one in ten
    # was certified, by up to 1.1e-3.
    for n in (33, 64):
        g = seeded(n)
        batch = torch.stack([near_defective(n, g) for _ in range(100)]).float()
        for matrix, radius in zip(batch, spectral_radius(batch), strict=True):
            if radius.certified:
                true = reference.spectral_radius(matrix)
                assert radius.rho == pytest.approx(true, rel=3e-4)


def test_bounds_that_do_not_meet_certify_nothing(squarings_only):
    # No power of this shift has a trace, so that the lower bound says nothing.
    shift = torch.eye(48).roll(1, 0)
    [radius] = spectral_radius(shift)
    assert not radius.certified and radius.lower == 0
    assert radius.upper >= 1 - 1e-6


def test_each_doubt_prevents_a_certificate():
    def judge(growing_to=0.0, level=3, condition=1.0, residual=0.0, value=1.0):
        """Judge powers of the identity, H = 64, one of them larger than that."""
        logs = [math.log(8.0)] * (spectral.SQUARINGS + 1)
        logs[level] += growing_to
        norms = [math.exp(b - 2 * a) for a, b in pairwise([0.0, *logs])]
        ritz = spectral._Ritz(complex(value), residual, condition)
        return spectral._judge(norms, 8.0, 64, ritz, 1.0)

    assert judge().certified and judge().source == "ritz"
    assert judge().rho == 1.0
    assert not judge(growing_to=6.0).certified  # transient growth of 400
    assert not judge(condition=1e3).certified
    for other in (judge(residual=0.1), judge(value=0.9), judge(value=1.1)):
        assert other.certified and other.source == "power"
    assert not judge(residual=0.1, growing_to=3.0).certified
    lost = judge(growing_to=-20.0)  # a power that is rounding error bounds nothing
    assert not lost.certified and lost.lower == 0


def test_a_rotated_jordan_block_is_judged_as_it_is_stored():
    # It is a few bits from defective: rounding it once more moves the radius by 1e-2.
    for dtype in (torch.float32, torch.float64):
        for n in (8, 16, 32, 48):
            stored = rotated_jordan(n, seeded(n)).to(dtype)
            [radius] = spectral_radius(stored)
            assert radius.source == "exact"
            true = reference.spectral_radius(stored)
            assert radius.rho == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("n", [8, 64])
def test_a_broken_matrix_leaves_its_neighbours_exact(n):
    good = gaussian(n, seeded(1)).float()
    broken = {math.nan: good.clone(), math.inf: good.clone(), -math.inf: good.clone()}
    for value, matrix in broken.items():
        matrix[1, 2] = value
    batch = torch.stack([good, *broken.values(), torch.zeros_like(good), good.T])
    first, *bad, zero, last = spectral_radius(batch)
    true = reference.spectral_radius(good)
    for radius in (first, last):
        assert radius.certified and radius.rho == pytest.approx(true, rel=1e-6)
    for radius in bad:
        assert math.isnan(radius.rho) and not radius.certified
        assert radius.source == "nonfinite"
    assert (zero.rho, zero.certified, zero.source) == (0.0, True, "zero")
    gram = launch_gram(batch)
    for name, law in (
        ("sigma", reference.sigma_max),
        ("orthogonality", reference.orthogonality),
    ):
        values = gram[name].tolist()
        assert all(math.isnan(v) for v in values[1:4])
        for i in (0, 4, 5):
            assert values[i] == pytest.approx(law(batch[i]), rel=1e-5)


def test_a_nan_weight_does_not_end_the_process():
    code = (
        "import itertools, math, torch\n"
        "from gradwatch.numerics.singular import launch_gram\n"
        "from gradwatch.numerics.spectral import spectral_radius\n"
        "for n, dtype, bad in itertools.product((1, 2, 8, 64, 128),\n"
        "        (torch.float32, torch.float64), (math.nan, math.inf)):\n"
        "    weight = torch.eye(n, dtype=dtype).repeat(2, 1, 1)\n"
        "    weight[0, 0, 0] = bad\n"
        "    broken, whole = spectral_radius(weight)\n"
        "    assert math.isnan(broken.rho) and abs(whole.rho - 1) < 1e-6\n"
        "    assert launch_gram(weight)['sigma'].isnan().tolist() == [True, False]\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("n", [8, 64])
def test_scale_does_not_matter(n):
    matrix = gaussian(n, seeded(2)).float()
    [one] = spectral_radius(matrix)
    for factor in (1e-20, 3e-7, 1e10, 1e20):
        [radius] = spectral_radius(matrix * factor)
        assert radius.certified == one.certified
        for name in ("rho", "lower", "upper"):
            expected = getattr(one, name) * factor
            assert getattr(radius, name) == pytest.approx(expected, rel=1e-6)
        assert abs(radius.eigenvalue) == pytest.approx(radius.rho)


@pytest.mark.parametrize("n", [8, 64])
def test_ends_of_the_range(n):
    matrix = orthogonal(n, seeded(2))
    for dtype, factor in (
        (torch.float32, 1e-38),
        (torch.float32, 1e-40),  # subnormal, so a few bits are left
        (torch.float32, 3e38),
        (torch.float64, 1e-300),
        (torch.float64, 1e308),
    ):
        stored = (matrix * factor).to(dtype)
        [radius] = spectral_radius(stored)
        whole = reference.spectral_radius(stored.double() / factor)
        assert radius.certified
        assert radius.rho == pytest.approx(whole * factor, rel=1e-4)


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(n, dtype):
    batch = torch.stack([gaussian(n, seeded(i)) for i in range(4)]).to(dtype)
    gram = launch_gram(batch)
    for i, radius in enumerate(spectral_radius(batch)):
        assert radius.certified
        assert radius.rho == pytest.approx(
            reference.spectral_radius(batch[i]), rel=1e-5
        )
        sigma = gram["sigma"][i].item()
        assert sigma == pytest.approx(reference.sigma_max(batch[i]), rel=1e-5)


@pytest.mark.parametrize("n", [16, 64])
def test_launch_asks_nothing_of_its_surroundings(n):
    matrix = torch.nn.Parameter(gaussian(n, seeded(4)).float())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    plain, gram = launch(matrix).blocks, launch_gram(matrix)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with torch.autocast("cpu", torch.bfloat16):
            again, gram_again = launch(matrix).blocks, launch_gram(matrix)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(torch.get_rng_state(), state)
    for expected, got in ((plain, again), (gram, gram_again)):
        assert expected.keys() == got.keys()
        for name, block in expected.items():
            assert block.dtype == got[name].dtype and torch.equal(block, got[name])
            assert not got[name].requires_grad


def test_the_same_weights_give_the_same_numbers():
    matrix = gaussian(64, seeded(5)).float()
    assert spectral_radius(matrix) == spectral_radius(matrix)


def test_finish_takes_blocks_of_another_precision():
    # An accelerator's blocks come to the host packed in float64.
    for n in (8, 64):
        launched = launch(gaussian(n, seeded(6)).float())
        packed = {k: v.double().numpy() for k, v in launched.blocks.items()}
        plain = {k: v.numpy() for k, v in launched.blocks.items()}
        assert finish(launched, packed) == finish(launched, plain)


def test_a_large_matrix_that_does_not_close_stays_open(monkeypatch):
    monkeypatch.setattr(spectral, "FALLBACK_UP_TO", 47)
    [radius] = spectral_radius(jordan(48))
    assert radius.source == "open" and not radius.certified
    assert FALLBACK_UP_TO >= 48
    monkeypatch.undo()
    assert spectral_radius(jordan(48))[0].source == "exact"


def to_tensorfloat(x):
    """Round to 10 bits of mantissa, as an NVIDIA card does with the inputs."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_tensorfloat_products_do_not_spoil_the_certificate(zoo, monkeypatch):
    monkeypatch.setattr(spectral, "EXACT_UP_TO", 0)
    monkeypatch.setattr(spectral, "FALLBACK_UP_TO", 0)
    monkeypatch.setattr(matrices, "_rounds_inputs", lambda device: True)
    bmm = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda a, b: bmm(to_tensorfloat(a), to_tensorfloat(b))
    )
    part = [entry for entry in zoo if entry[1].shape[-1] in (33, 64)]
    for name, batch, truth in part:
        for radius, true in zip(spectral_radius(batch), truth, strict=True):
            if radius.certified:
                assert radius.rho == pytest.approx(true, rel=1e-3), name
        sigma = launch_gram(batch)["sigma"]
        expected = torch.tensor([reference.sigma_max(m) for m in batch]).double()
        torch.testing.assert_close(sigma, expected, rtol=1e-4, atol=0)


def test_reduced_precision_is_noticed():
    cuda, before = torch.device("cuda"), torch.get_float32_matmul_precision()
    assert not matrices._rounds_inputs(torch.device("cpu"))
    try:
        torch.set_float32_matmul_precision("highest")
        assert not matrices._rounds_inputs(cuda)
        torch.set_float32_matmul_precision("high")
        assert matrices._rounds_inputs(cuda)
        torch.set_float32_matmul_precision("highest")
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            assert matrices._rounds_inputs(cuda)
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            assert not matrices._rounds_inputs(cuda)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_on_a_card(zoo, precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        check([(name, b.cuda(), truth) for name, b, truth in zoo], 1.0, 0.99)
    finally:
        torch.set_float32_matmul_precision(before)


@LAWS
@given(SEEDS, SIZES)
def test_bounds(seed, n):
    matrix = gaussian(n, seeded(seed)).float()
    [radius] = spectral_radius(matrix)
    assert 0 <= radius.lower * (1 - 1e-6) <= radius.rho <= radius.upper * (1 + 1e-6)
    assert radius.rho <= reference.sigma_max(matrix) * (1 + 1e-6)
    assert radius.condition >= 1 - 1e-6
    assert radius.eigenvalue.imag >= 0


@LAWS
@given(SEEDS, SIZES)
def test_transposition_and_permutation_change_nothing(seed, n):
    g = seeded(seed)
    matrix = gaussian(n, g).float()
    order = torch.randperm(n, generator=g)
    one, turned, sorted_, negative = spectral_radius(
        torch.stack([matrix, matrix.T, matrix[order][:, order], -matrix])
    )
    for other in (turned, sorted_, negative):
        assert other.certified == one.certified
        assert other.rho == pytest.approx(one.rho, rel=1e-4)


@LAWS
@given(SEEDS, SIZES, st.floats(1e-20, 1e20))
def test_homogeneous(seed, n, factor):
    matrix = gaussian(n, seeded(seed))
    one, scaled = spectral_radius(torch.stack([matrix, matrix * factor]))
    assert scaled.rho == pytest.approx(one.rho * factor, rel=1e-5)


@LAWS
@given(SEEDS, SIZES)
def test_normal_matrices_have_their_norm_as_radius(seed, n):
    matrix = symmetric(n, seeded(seed)).float()
    [radius] = spectral_radius(matrix)
    assert radius.certified
    sigma = launch_gram(matrix)["sigma"].item()
    assert radius.rho == pytest.approx(sigma, rel=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_sigma_and_orthogonality_of_initialisations(init):
    for n, count in INIT_COUNTS.items():
        g = seeded(n)
        batch = torch.stack([INITS[init](n, g) for _ in range(min(count, 10))]).float()
        gram = launch_gram(batch)
        for i, matrix in enumerate(batch):
            sigma, distance = gram["sigma"][i].item(), gram["orthogonality"][i].item()
            assert sigma == pytest.approx(reference.sigma_max(matrix), rel=1e-4)
            true = reference.orthogonality(matrix)
            assert distance == pytest.approx(true, rel=1e-5, abs=1e-5)
            if init in ("orthogonal", "identity"):
                assert distance <= 1e-5


def test_sigma_of_a_dense_spectrum_near_the_top():
    # As in an orthogonal start that has moved a little: the slowest to separate.
    for n in (16, 64, 256):
        g = seeded(n)
        for spread in (3e-4, 1e-3, 3e-3, 1e-2):
            stretch = 1 + spread * torch.rand(n, generator=g, dtype=torch.float64)
            matrix = ((orthogonal(n, g) * stretch) @ orthogonal(n, g)).float()
            true, sigma = reference.sigma_max(matrix), launch_gram(matrix)["sigma"]
            assert true * (1 - 1e-4) <= sigma.item() <= true * (1 + 1e-6)


@pytest.mark.parametrize("n", [8, 64])
def test_sigma_and_orthogonality_at_extreme_scales(n):
    one = bulk_and_outlier(n, seeded(7)).float()
    for factor in (0.0, 1e-38, 1e-20, 1.0, 1e20, 1e37):
        gram = launch_gram(one * factor)
        sigma, distance = gram["sigma"].item(), gram["orthogonality"].item()
        assert sigma == pytest.approx(reference.sigma_max(one * factor), rel=1e-4)
        true = reference.orthogonality(one * factor)
        assert distance == pytest.approx(true, rel=1e-5)
    assert launch_gram(one.double() * 1e200)["orthogonality"].item() == math.inf


@pytest.mark.parametrize("function", [spectral_radius, launch, launch_gram])
def test_errors_say_what_was_expected(function):
    for shape in ((), (4,), (3, 4), (12, 3, 4), (2, 2, 3, 3), (0, 0)):
        with pytest.raises(ValueError, match=r"expected square .* cut into its gates"):
            function(torch.zeros(shape))
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="expected real floating-point"):
            function(torch.ones(2, 2, dtype=dtype))


def test_no_matrix_gives_no_radius():
    assert spectral_radius(torch.zeros(0, 8, 8)) == []
    assert spectral_radius(torch.zeros(0, 64, 64)) == []
