"""Backpropagation through time on a replay, against autograd on an unrolled cell."""

import itertools
import math

import pytest
import torch
from torch import nn

from gradwatch.depths.flow import NAMES, Flow, backward, finish, seed_steps
from gradwatch.depths.flow import Memory as FlowMemory
from gradwatch.depths.trajectory import trajectory
from gradwatch.numerics.adjoint import adjoint_from, linearised, pulled_back
from gradwatch.numerics.through_time import Weights, replay_layer
from gradwatch.recurrent import recurrences
from testbed import reference
from testbed.adjoints import errors, reads
from testbed.looking import looking_at
from testbed.replays import cases
from tests.support.seldom import seldom

ALL = [(case, read) for case in cases() for read in reads(case)]
SOME = ALL[::41] + [(case, read) for case, read in ALL if case.chain][::3]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", seldom(TOLERANCE, [torch.float32]))
def test_adjoints_are_those_of_autograd(dtype):
    assert {read for _, read in SOME} == {"output", "last output", "h_n", "c_n", "all"}
    for case, read in SOME:
        assert errors(case, read, dtype) <= TOLERANCE[dtype], (case, read)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_whole_grid(dtype):
    for case, read in ALL:
        assert errors(case, read, dtype) <= TOLERANCE[dtype], (case, read)


def linear(kind, module, x):
    weights = Weights(*(w.detach() for w in module._flat_weights))
    zero = torch.zeros(x.shape[1], module.hidden_size, dtype=x.dtype)
    first = zero, (zero if kind == "LSTM" else None)
    layer = replay_layer(kind, x, *first, weights)
    return linearised(kind, layer, first, weights)


@pytest.mark.parametrize(
    ("kind", "make"), [("RNN_TANH", nn.RNN), ("LSTM", nn.LSTM), ("GRU", nn.GRU)]
)
def test_vectors_are_pulled_back_as_autograd_does(kind, make):
    torch.manual_seed(0)
    module = make(3, 5).double()
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    h = torch.zeros(1, 2, 5, dtype=torch.float64, requires_grad=True)
    states = (h, torch.zeros_like(h, requires_grad=True)) if kind == "LSTM" else (h,)
    given = states if kind == "LSTM" else h
    seeds = torch.randn(3, 2, 10 if kind == "LSTM" else 5, dtype=torch.float64)
    parts = (seeds[..., :5], seeds[..., 5:] if kind == "LSTM" else None)
    starts = torch.full((3, 2), 8)
    logs = pulled_back(linear(kind, module, x), parts, starts)
    for lag in (1, 4, 9):
        _, last = module(x[:9], given)
        # The state before the last `lag` steps is an input of those steps alone.
        _, at = module(x[: 9 - lag], given) if lag < 9 else (None, given)
        at = at if isinstance(at, tuple) else (at,)
        at = tuple(s.detach().requires_grad_() for s in at)
        _, last = module(x[9 - lag :], at if kind == "LSTM" else at[0])
        last = last if isinstance(last, tuple) else (last,)
        for v in range(3):
            given_back = [p[v][None] for p in parts if p is not None]
            found = torch.autograd.grad(last, at, given_back, retain_graph=True)
            norm = torch.cat([f[0] for f in found], -1).norm(dim=-1)
            true = (norm / seeds[v].norm(dim=-1)).log()
            torch.testing.assert_close(logs[lag, v], true)
    assert (logs[0] == 0).all()


def test_vectors_start_where_they_are_told_to():
    torch.manual_seed(0)
    module = nn.RNN(3, 5).double()
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    layer = linear("RNN_TANH", module, x)
    seeds = torch.randn(1, 3, 5, dtype=torch.float64)
    logs = pulled_back(layer, (seeds, None), torch.tensor([[5, 2, -1]]))
    assert logs[:7, 0, 0].isfinite().all()
    assert logs[:4, 0, 1].isfinite().all() and logs[4:, 0, 1].isnan().all()
    assert logs[1:, 0, 2].isnan().all()
    short = pulled_back(
        linear("RNN_TANH", module, x[:3]), (seeds, None), torch.tensor([[2, 2, 2]])
    )
    torch.testing.assert_close(logs[:4, 0, 1], short[:, 0, 1])


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # once, in float32
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("RNN_TANH", nn.RNN),
        ("RNN_RELU", lambda *sizes: nn.RNN(*sizes, nonlinearity="relu")),
        ("LSTM", nn.LSTM),
        ("LSTM", lambda *sizes: nn.LSTM(*sizes, proj_size=2)),
        ("GRU", nn.GRU),
    ],
)
def test_what_a_seed_sends_back_is_that_of_autograd(kind, make, dtype):
    torch.manual_seed(0)
    module = make(3, 5).double()
    width = getattr(module, "proj_size", 0) or 5
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    seeds = torch.randn(2, 2, width, dtype=torch.float64)
    starts = torch.tensor([[8, 8], [4, -1]])
    runs = unrolled(module, list(x.unbind(1)), width)
    weights = Weights(*(w.detach().to(dtype) for w in named_weights(module)))
    first = torch.zeros(2, width, dtype=dtype), None
    if kind == "LSTM":
        first = first[0], torch.zeros(2, 5, dtype=dtype)
    layer = replay_layer(kind, x.to(dtype), *first, weights)
    linear = linearised(kind, layer, first, weights)
    found = adjoint_from(linear, seeds.to(dtype), starts)
    for v, b in itertools.product(range(2), range(2)):
        start = int(starts[v, b])
        true = sent_back(runs[b], start, seeds[v, b]) if start >= 0 else [0.0] * 9
        expected = torch.tensor(true, dtype=dtype)
        close = 1e-6 * max(expected.max().item(), 1)
        torch.testing.assert_close(found[:, v, b], expected, rtol=0, atol=close)


def unrolled(module, sequences, width):
    """Run a module step by step; autograd follows its states."""
    options = {"dtype": torch.float64, "requires_grad": True}
    states = [
        torch.zeros(1, 2, size, **options) for size in (width, module.hidden_size)
    ]
    return reference.unrolled(module, sequences, states)[0, 0]


def named_weights(module):
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0")
    return [getattr(module, name) for name in names if hasattr(module, name)]


def sent_back(run, start, seed):
    """The norm of the gradient of each state, by autograd, of ``seed`` at h_start."""
    norms = []
    for step in run:
        states = [step[name] for name in ("h", "c") if name in step]
        grads = torch.autograd.grad(
            run[start]["h"] @ seed, states, retain_graph=True, allow_unused=True
        )
        squares = [g.square().sum() for g in grads if g is not None]
        norms.append(math.sqrt(sum(squares)))
    return norms


# ---- the numbers of the flow depth


def of(flow, name):
    return flow.numbers[flow.streams[0].name, name]


def measured(module, x, read=lambda out: out[-1].sum(), samples=None):
    probe = looking_at(module, samples=samples)
    out = module(x)
    read(out[0]).backward()
    members = recurrences(module)
    with torch.no_grad():
        replayed = trajectory(members, probe.take())
        flow = Flow()
        flow.add("rnn", members, replayed)
        back = backward(members, replayed)
    probe.close()
    values = flow.numbers[members[0].stream.name, "values"].tolist()
    return dict(zip(NAMES, values, strict=True)), flow, back


def orthogonal(hidden=16, gain=1.0):
    torch.manual_seed(0)
    module = nn.RNN(3, hidden).double()
    nn.init.orthogonal_(module.weight_hh_l0)
    with torch.no_grad():
        module.weight_hh_l0.mul_(gain)
        for bias in (module.bias_ih_l0, module.bias_hh_l0):
            bias.zero_()
    return module


def test_an_isometry_neither_grows_nor_shrinks():
    x = 1e-6 * torch.randn(60, 4, 3, dtype=torch.float64)
    found, _, _ = measured(orthogonal(), x)
    assert found["growth_log10"] == pytest.approx(0, abs=1e-6)
    assert found["lyapunov"] == pytest.approx(0, abs=1e-6)
    assert found["flow_gain"] == pytest.approx(1) and found["horizon"] == 60
    assert found["adjoint_log10"] == pytest.approx(0, abs=1e-6)


def test_a_contraction_has_its_rate():
    x = 1e-6 * torch.randn(40, 4, 3, dtype=torch.float64)
    found, _, _ = measured(orthogonal(gain=0.8), x)
    assert found["lyapunov"] == pytest.approx(math.log(0.8), abs=1e-6)
    assert found["flow_log10"] == pytest.approx(40 * math.log10(0.8), rel=1e-6)
    assert found["adjoint_log10"] == pytest.approx(39 * math.log10(0.8), rel=1e-6)
    assert found["horizon"] == int(3 / -math.log10(0.8))
    assert found["growth_log10"] == 0


def test_a_chaotic_net_has_a_positive_exponent_and_grows():
    torch.manual_seed(0)
    module = nn.RNN(3, 64).double()
    nn.init.normal_(module.weight_hh_l0, std=3 / 8)
    x = torch.randn(120, 4, 3, dtype=torch.float64)
    found, _, _ = measured(module, x)
    assert found["lyapunov"] > 0.05 and found["growth_log10"] > 2


@pytest.mark.parametrize("gain", [0.7, 1.0, 1.4])
def test_growth_is_the_root_mean_square_growth_of_the_jacobians(gain):
    torch.manual_seed(0)
    module = nn.RNN(3, 32, nonlinearity="relu").double()
    nn.init.orthogonal_(module.weight_hh_l0, gain)
    x = torch.randn(20, 8, 3, dtype=torch.float64)
    found, _, [(layer, _)] = measured(module, x)
    best = 0.0
    for row in range(8):
        product = torch.eye(32, dtype=torch.float64)
        for t in range(19, -1, -1):
            product = product @ (layer.slope[t, row][:, None] * module.weight_hh_l0)
            best = max(best, math.log10(product.norm().item() / math.sqrt(32)))
    assert found["growth_log10"] == pytest.approx(best, abs=0.15)


@pytest.mark.parametrize("steps", [0, 60])
@pytest.mark.parametrize("gain", [0.9, 1.5])
def test_lyapunov_is_that_of_a_qr_iteration(gain, steps):
    """With QR at every step over all dimensions, the same start, the same burn-in."""
    torch.manual_seed(0)
    module = nn.RNN(3, 12).double()
    nn.init.normal_(module.weight_hh_l0, std=gain / math.sqrt(12))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(9, 5, 3, dtype=torch.float64))[0].square().mean().backward()
        optimizer.step()
    x = torch.randn(400, 3, 3, dtype=torch.float64)
    found, _, [(layer, _)] = measured(module, x)
    drawn = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0)).double()
    weight, rates = module.weight_hh_l0.detach(), []
    for vector, row in itertools.product(range(4), range(3)):
        others = torch.randn(12, 11, dtype=torch.float64)
        start = torch.cat((drawn[vector, row][:, None], others), 1)
        basis, total = torch.linalg.qr(start)[0], torch.zeros(12, dtype=torch.float64)
        for n, t in enumerate(range(399, -1, -1)):
            jacobian = layer.slope[t, row][:, None] * weight
            basis, r = torch.linalg.qr(jacobian.T @ basis)
            if n >= 10:
                total += r.diagonal().abs().log()
        rates.append(total[0].item() / 390)  # Benettin: the first column leads
    assert found["lyapunov"] == pytest.approx(reference.median(rates), abs=1e-3)


def test_what_the_loss_reads_is_the_demand():
    module, x = orthogonal(gain=0.5), torch.randn(20, 4, 3, dtype=torch.float64)
    assert measured(module, x)[0]["demand"] == 1 / 20
    assert measured(module, x, lambda out: out.sum())[0]["demand"] == 1
    few = measured(module, x, lambda out: out[5].sum() + out[10].sum())[0]
    assert few["demand"] == 2 / 20
    assert few["horizon"] <= 11


def test_a_loss_that_reads_nothing_has_no_horizon():
    module, x = orthogonal(), torch.randn(20, 4, 3, dtype=torch.float64)
    found, _, _ = measured(module, x, lambda out: 0 * out.sum())
    assert math.isnan(found["horizon"]) and math.isnan(found["demand"])
    assert math.isnan(found["adjoint_log10"]) and found["signal"] == 0


def test_sequences_of_different_lengths_are_aligned_at_their_ends():
    module = orthogonal(gain=0.8)
    x = 1e-6 * torch.randn(30, 3, 3, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([30, 20, 10]))
    ends = torch.tensor([29, 19, 9])

    def read(out):
        padded = nn.utils.rnn.pad_packed_sequence(out)[0]
        return padded[ends, torch.arange(3)].sum()

    found, flow, _ = measured(module, packed, read)
    profile = of(flow, "adjoint")
    per_step = (profile[-1] / profile[-2]).item()
    assert per_step == pytest.approx(1.25)  # three sequences end here
    assert found["horizon"] == int(3 / -math.log10(0.8)) or found["horizon"] <= 20
    assert found["flow_gain"] == pytest.approx(0.8)
    assert found["demand"] == pytest.approx(1 / 20)


def test_profiles_of_a_sample_stand_for_the_batch():
    module = orthogonal()
    x = torch.randn(12, 32, 3, dtype=torch.float64)
    whole = measured(module, x)[1]
    few = measured(module, x, samples=4)[1]
    assert few.shares == [(4, 32)] and whole.shares == [(32, 32)]
    ratio = of(few, "adjoint") * math.sqrt(8) / of(whole, "adjoint")
    assert ratio.log().abs().max() < 0.3


@pytest.mark.parametrize("make", seldom([nn.RNN, nn.LSTM, nn.GRU], [nn.LSTM, nn.GRU]))
def test_seeds_are_sent_back_from_up_to_16_steps(make):
    torch.manual_seed(0)
    module, lengths = make(3, 6).double(), [100, 40]
    x = torch.randn(100, 2, 3, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths))
    probe = looking_at(module)
    module(packed)[0].data.sum().backward()
    members = recurrences(module)
    with torch.no_grad():
        replayed, flow = trajectory(members, probe.take()), Flow(seeded=True)
        flow.add("", members, replayed)
    probe.close()
    host = {key: value.numpy() for key, value in flow.numbers.items()}
    profiles = finish(flow, host, 1.0, (), FlowMemory()).profiles
    rows = {
        int(key.rpartition("/")[2]): row
        for key, row in profiles.items()
        if "/adjoint_from/" in key
    }
    assert list(rows) == seed_steps(100) and len(rows) == 16 and 99 in rows
    fixed = torch.Generator().manual_seed(0)
    drawn = nn.functional.normalize(torch.randn(2, 6, generator=fixed), dim=-1).double()
    sequences = [x[:length, b] for b, length in enumerate(lengths)]
    runs = unrolled(module, sequences, 6)
    for step, row in rows.items():
        own = []
        for b, length in enumerate(lengths):
            before = 100 - length
            if step >= before:
                norms = sent_back(runs[b], step - before, drawn[b])
                own.append([0.0] * before + norms)
        mean = (torch.tensor(own) ** 2).mean(0).sqrt()
        edges = [int(i * 100 / 64) for i in range(64)] + [100]
        bins = [mean[a:b].max().item() for a, b in itertools.pairwise(edges)]
        assert row == pytest.approx(bins, abs=1e-6)


def test_a_short_sequence_has_a_seed_at_each_step():
    assert seed_steps(1) == [0] and seed_steps(5) == [0, 1, 2, 3, 4]
    assert seed_steps(16) == list(range(16)) and seed_steps(17)[-1] == 16
    assert len(set(seed_steps(1000))) == 16
