"""Initialisers: what they write, and everything that they must leave alone."""

import copy
import math

import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.utils import parametrizations

from gradwatch import init
from gradwatch.recurrent import gate_matrices, recurrences, stored_weights
from testbed import reference
from testbed.models import Loop, Tagger

MODULES = {
    "rnn": lambda: nn.RNN(3, 16, 2, bidirectional=True),
    "relu": lambda: nn.RNN(3, 40, nonlinearity="relu"),
    "lstm": lambda: nn.LSTM(3, 16, 2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(3, 33, 2),
    "no bias": lambda: nn.GRU(3, 8, bias=False),
    "RNNCell": lambda: nn.RNNCell(3, 16),
    "LSTMCell": lambda: nn.LSTMCell(3, 16),
    "GRUCell": lambda: nn.GRUCell(3, 16),
    "half": lambda: nn.LSTM(3, 16).double(),
}
EVERY = {
    "orthogonal_": init.orthogonal_,
    "spectral_cap_": init.spectral_cap_,
    "forget_bias_": init.forget_bias_,
    "chrono_": lambda model, **more: init.chrono_(model, 20, **more),
    "zero_bias_": init.zero_bias_,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gates_of(model):
    for recurrence in recurrences(model):
        weights = stored_weights(recurrence)
        yield from gate_matrices(recurrence.stream, weights["weight_hh"], None)


@pytest.mark.parametrize("kind", MODULES)
def test_every_gate_is_orthogonal(kind):
    model = MODULES[kind]()
    changed = init.orthogonal_(model)
    assert len(changed) == len(recurrences(model))
    for gate in gates_of(model):
        assert reference.orthogonality(gate) < 1e-5
        assert torch.linalg.matrix_norm(gate.mT @ gate - torch.eye(len(gate))) <= 1e-5
    assert all(
        math.isclose(v, 1.0, abs_tol=1e-4) for c in changed for v in c.after.values()
    )


def test_a_stacked_initialisation_is_not_what_it_says():
    """The number that docs/remedies.md gives: rho about 0.5 for every gate."""
    torch.manual_seed(0)
    lstm = nn.LSTM(32, 128)
    nn.init.orthogonal_(lstm.weight_hh_l0)
    radii = [reference.spectral_radius(gate) for gate in gates_of(lstm)]
    assert all(0.4 < rho < 0.6 for rho in radii), radii


def test_projections_are_semi_orthogonal():
    lstm = nn.LSTM(3, 16, 2, proj_size=5)
    init.orthogonal_(lstm, 1.0)
    for name, weight in lstm.named_parameters():
        if "weight_hh" in name:
            for block in weight.detach().chunk(4):
                torch.testing.assert_close(block.mT @ block, torch.eye(5))
        if "weight_hr" in name:
            torch.testing.assert_close(weight @ weight.mT, torch.eye(5))


def test_gain_scales_every_singular_value():
    rnn = nn.RNN(2, 20)
    init.orthogonal_(rnn, 1.3)
    sigma = torch.linalg.svdvals(rnn.weight_hh_l0.detach())
    torch.testing.assert_close(sigma, torch.full((20,), 1.3))


# ---- Haar


def angles(draw, count, size):
    found = []
    for i in range(count):
        found.append(torch.linalg.eigvals(draw(size, seeded(i))).angle())
    return torch.cat(found).numpy()


def without_the_sign_fix(size, generator):
    normal = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(normal)[0]


def ours(size, generator):
    rnn = nn.RNN(1, size).double()
    init.orthogonal_(rnn, generator=generator)
    return rnn.weight_hh_l0.detach()


def test_eigenvalues_are_spread_evenly_over_the_circle():
    uniform = scipy.stats.uniform(-math.pi, 2 * math.pi).cdf
    assert scipy.stats.kstest(angles(ours, 200, 128), uniform).pvalue > 0.01


def test_the_mean_trace_is_nought_and_not_without_the_sign_fix():
    def mean_trace(draw):
        return sum(draw(8, seeded(i)).trace().item() for i in range(400)) / 400

    assert abs(mean_trace(ours)) < 0.25
    assert mean_trace(without_the_sign_fix) < -1.0


# ---- biases


def test_forget_bias_is_the_sum_of_both():
    lstm, gru = nn.LSTM(3, 8, 2, bidirectional=True), nn.GRU(3, 8)
    init.forget_bias_(lstm, 1.5)
    init.forget_bias_(gru, 2.0)
    for suffix in ("l0", "l1", "l0_reverse", "l1_reverse"):
        ih, hh = (getattr(lstm, f"bias_{x}_{suffix}").detach() for x in ("ih", "hh"))
        assert (ih + hh)[8:16].eq(1.5).all() and hh[8:16].eq(0).all()
        assert (ih + hh)[:8].ne(1.5).all() and hh[:8].ne(0).all()
    keep = (gru.bias_ih_l0 + gru.bias_hh_l0)[8:16]  # r z n: z keeps
    assert keep.eq(2.0).all()


def test_biases_are_zeroed_of_the_gates_that_are_named():
    lstm, vanilla = nn.LSTM(3, 8, 2), nn.RNN(3, 8)
    before = {name: p.detach().clone() for name, p in lstm.named_parameters()}
    changed = init.zero_bias_(lstm, gates=["o"], streams=["lstm.l1"])
    assert [c.stream for c in changed] == ["lstm.l1"]
    for name, p in lstm.named_parameters():
        zeroed = name in ("bias_ih_l1", "bias_hh_l1")
        torch.testing.assert_close(p[:24], before[name][:24], rtol=0, atol=0)
        assert p[24:].eq(0).all() == zeroed
    init.zero_bias_(lstm)
    init.zero_bias_(vanilla)
    for module in (lstm, vanilla):
        for name, p in module.named_parameters():
            assert p.eq(0).all() == name.startswith("bias")


def test_a_gru_with_a_large_update_bias_keeps_its_state():
    """z keeps in PyTorch; Cho et al. write the opposite."""
    gru = nn.GRUCell(1, 4)
    init.forget_bias_(gru, 20.0)
    start = torch.randn(1, 4)
    torch.testing.assert_close(gru(torch.zeros(1, 1), start), start)


def test_chrono_spreads_memories_up_to_the_longest_lag():
    lstm = nn.LSTM(3, 500)
    init.chrono_(lstm, 100, generator=seeded())
    i, f, *_ = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().chunk(4)
    torch.testing.assert_close(i, -f)
    memory = 1 + f.exp()
    assert memory.min() >= 2 and memory.max() <= 100
    assert abs(memory.median().item() - 51) < 6
    assert lstm.bias_hh_l0[:1000].eq(0).all() and lstm.bias_hh_l0[1000:].ne(0).all()


def test_vanilla_biases_are_zeroed_unless_told_not_to():
    rnn, kept, lstm = nn.RNN(2, 8), nn.RNN(2, 8), nn.LSTM(2, 8)
    old, gated = kept.bias_ih_l0.clone(), lstm.bias_ih_l0.clone()
    init.orthogonal_(rnn)
    init.orthogonal_(kept, zero_bias=False)
    init.orthogonal_(lstm)
    assert rnn.bias_ih_l0.eq(0).all() and rnn.bias_hh_l0.eq(0).all()
    assert torch.equal(kept.bias_ih_l0, old) and torch.equal(lstm.bias_ih_l0, gated)


# ---- identity and cap


def test_identity_is_the_irnn():
    rnn = nn.RNN(50, 60, nonlinearity="relu")
    init.identity_(rnn, 0.9, input_std=0.001, generator=seeded())
    assert torch.equal(rnn.weight_hh_l0, 0.9 * torch.eye(60))
    assert rnn.bias_ih_l0.eq(0).all() and rnn.bias_hh_l0.eq(0).all()
    assert abs(rnn.weight_ih_l0.std().item() - 0.001) < 5e-5


def test_identity_is_refused_on_gates_and_warned_of_on_tanh():
    lstm = nn.LSTM(2, 3)
    before = copy.deepcopy(lstm.state_dict())
    with pytest.raises(ValueError, match=r"lstm\.l0 is gated"):
        init.identity_(lstm)
    assert all(torch.equal(v, before[k]) for k, v in lstm.state_dict().items())
    with pytest.warns(UserWarning, match=r"rnn\.l0 is tanh"):
        init.identity_(nn.RNN(2, 3))


@pytest.mark.parametrize("proj", [0, 6])
def test_cap_shrinks_what_is_too_large_and_nothing_else(proj):
    lstm = nn.LSTM(3, 12, proj_size=proj)
    with torch.no_grad():
        lstm.weight_hh_l0[:12] *= 20
        lstm.weight_hh_l0[12:24] *= 0.1
    small = lstm.weight_hh_l0[12:24].clone()
    init.spectral_cap_(lstm, 0.95)
    assert torch.equal(lstm.weight_hh_l0[12:24], small)
    [recurrence] = recurrences(lstm)
    weights = stored_weights(recurrence)
    gates = gate_matrices(
        recurrence.stream, weights["weight_hh"], weights.get("weight_hr")
    )
    sigma = [reference.sigma_max(gate) for gate in gates]
    assert max(sigma) < 0.95 + 1e-6 and math.isclose(sigma[0], 0.95, rel_tol=1e-5)


def test_cap_refuses_nan_and_leaves_it_to_a_checkpoint():
    rnn = nn.RNN(2, 40)
    with torch.no_grad():
        rnn.weight_hh_l0[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"rnn\.l0 holds NaN or Inf"):
        init.spectral_cap_(rnn)
    [changed] = init.orthogonal_(rnn)
    assert math.isnan(changed.before[""]) and math.isclose(
        changed.after[""], 1.0, abs_tol=1e-4
    )


# ---- what stays


@pytest.mark.parametrize("what", EVERY)
def test_parameters_groups_and_flat_weights_stay_the_same_objects(what):
    model = Tagger(nn.LSTM(3, 8, 2), 8)
    optimizer = torch.optim.Adam(model.parameters())
    ids = [id(p) for p in model.parameters()]
    flat = [id(w) for w in model.rnn._flat_weights]
    EVERY[what](model, optimizer=optimizer)
    assert [id(p) for p in model.parameters()] == ids
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == ids
    assert [id(w) for w in model.rnn._flat_weights] == flat
    assert all(p.grad_fn is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("what", ["orthogonal_", "chrono_"])
def test_the_generator_alone_decides(what):
    one, two = nn.LSTM(3, 8, 2), nn.LSTM(3, 8, 2)
    state = torch.get_rng_state()
    for model in (one, two):
        EVERY[what](model, generator=seeded(7))
    assert torch.equal(torch.get_rng_state(), state)
    names = [
        n
        for n in one.state_dict()
        if "hh" in n and ("weight" in n or what == "chrono_")
    ]
    for name in names:
        if what == "orthogonal_":
            assert torch.equal(one.state_dict()[name], two.state_dict()[name])
    for name in ("bias_ih_l0",) if what == "chrono_" else ():
        assert torch.equal(one.state_dict()[name][:16], two.state_dict()[name][:16])


def test_a_checkpoint_written_before_loads_after():
    model = nn.GRU(3, 8)
    saved = copy.deepcopy(model.state_dict())
    init.orthogonal_(model)
    init.chrono_(model, 10)
    model.load_state_dict(saved)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


def test_streams_name_what_is_meant():
    model = nn.ModuleDict({"a": nn.LSTM(2, 8, 2), "b": nn.RNN(2, 8)})
    old = copy.deepcopy(model.state_dict())
    changed = init.orthogonal_(model, streams="a.l1")
    assert [c.stream for c in changed] == ["a.l1"]
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
    assert moved == {"a.weight_hh_l1"}
    assert [c.stream for c in init.orthogonal_(model, streams=["a"])] == [
        "a.l0",
        "a.l1",
    ]
    assert [c.stream for c in init.forget_bias_(model)] == ["a.l0", "a.l1"]
    with pytest.raises(ValueError, match=r"'c'; this model has a\.l0, a\.l1, b\.l0"):
        init.orthogonal_(model, streams=["a", "c"])
    with pytest.raises(ValueError, match=r"b\.l0 is vanilla"):
        init.forget_bias_(model, streams=["a", "b"])


def test_shared_weights_are_written_once():
    model = nn.ModuleDict({"a": nn.RNN(8, 8), "b": nn.RNN(8, 8)})
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    alone = nn.RNN(8, 8)
    init.orthogonal_(model, generator=seeded())
    init.orthogonal_(alone, generator=seeded())
    assert model["b"].weight_hh_l0 is model["a"].weight_hh_l0
    assert torch.equal(model["a"].weight_hh_l0, alone.weight_hh_l0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    lstm = nn.LSTM(3, 40).to(dtype)
    [changed] = init.orthogonal_(lstm)
    assert lstm.weight_hh_l0.dtype == dtype
    assert all(abs(rho - 1) < 1e-2 for rho in changed.after.values())


# ---- parametrised weights


@pytest.mark.parametrize(
    "apply", [parametrizations.orthogonal, parametrizations.weight_norm]
)
def test_parametrised_weights_go_through_right_inverse(apply):
    rnn = nn.RNN(2, 12)
    apply(rnn, "weight_hh_l0")
    ids = [id(p) for p in rnn.parameters()]
    init.orthogonal_(rnn)
    assert reference.orthogonality(rnn.weight_hh_l0.detach()) < 1e-5
    assert [id(p) for p in rnn.parameters()] == ids
    rnn(torch.randn(4, 1, 2))[0].sum().backward()


def test_a_parametrisation_that_cannot_take_the_value_is_refused_and_put_back():
    model = nn.ModuleDict({"a": nn.RNN(2, 12), "b": nn.RNN(2, 12)})
    parametrizations.spectral_norm(model["b"], "weight_hh_l0")
    old = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="_SpectralNorm, which cannot take on"):
        init.orthogonal_(model, 2.0)
    assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())


class NoInverse(nn.Module):
    def forward(self, x):
        return x * 1.0


def test_no_right_inverse_is_refused():
    rnn = nn.RNN(2, 5)
    nn.utils.parametrize.register_parametrization(rnn, "weight_hh_l0", NoInverse())
    with pytest.raises(ValueError, match="for want of a right_inverse"):
        init.orthogonal_(rnn)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_old_weight_norm_is_refused():
    rnn = nn.utils.weight_norm(nn.RNN(2, 5), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 of rnn is no parameter"):
        init.orthogonal_(rnn)


# ---- optimizers

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW": torch.optim.AdamW,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
    "LBFGS": torch.optim.LBFGS,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_an_optimizer_remembers_is_gone_and_only_that(kind):
    torch.manual_seed(0)
    model = Loop(nn.RNNCell(3, 6), 6)
    optimizer = OPTIMIZERS[kind](model.parameters())
    x = torch.randn(4, 2, 3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    other = copy.deepcopy(dict(optimizer.state[model.head.weight]))
    init.orthogonal_(model, optimizer=optimizer)
    ours = optimizer.state.get(model.cell.weight_hh, {})
    if kind == "Adagrad":
        assert ours["step"] == 0 and ours["sum"].eq(0.1).all()
    else:
        assert not ours
    if kind != "LBFGS":
        assert dict(optimizer.state[model.head.weight]).keys() == other.keys()
    optimizer.step(closure)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_layer_moves_again_when_its_moments_are_gone():
    """An explosion in the past holds it still: 10 times less in 10 steps."""

    def moved(given):
        torch.manual_seed(1)
        model = Tagger(nn.RNN(3, 32), 32)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        x, y = torch.randn(20, 8, 3), torch.randint(3, (8,))

        def train(steps, factor=1.0):
            for _ in range(steps):
                optimizer.zero_grad()
                (factor * nn.functional.cross_entropy(model(x), y)).backward()
                optimizer.step()

        train(3, factor=1e6)
        train(40)
        init.orthogonal_(model, optimizer=optimizer if given else None)
        start = model.rnn.weight_hh_l0.detach().clone()
        train(10)
        return (model.rnn.weight_hh_l0.detach() - start).norm().item()

    with_deletion, without = moved(True), moved(False)
    assert with_deletion > 10 * without, (with_deletion, without)


def test_a_foreign_optimizer_is_refused_and_nothing_changed():
    rnn = nn.RNN(2, 5)
    old = copy.deepcopy(rnn.state_dict())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match="holds none of the weights"):
        init.orthogonal_(rnn, optimizer=other)
    with pytest.raises(TypeError, match="got str; expected a"):
        init.orthogonal_(rnn, optimizer=["adam"])
    assert all(torch.equal(v, old[k]) for k, v in rnn.state_dict().items())


# ---- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: init.orthogonal_(nn.RNN(2, 3), 0),
            "gain is 0; expected a number above",
        ),
        (lambda: init.orthogonal_(nn.RNN(2, 3), math.nan), "gain is nan"),
        (lambda: init.chrono_(nn.LSTM(2, 3), 2), "t_max is 2; expected 3 steps"),
        (lambda: init.chrono_(nn.RNN(2, 3), 9), "rnn.l0 is vanilla"),
        (lambda: init.forget_bias_(nn.LSTM(2, 3, bias=False)), "bias=True"),
        (lambda: init.zero_bias_(nn.GRU(2, 3), gates=["o"]), "no gate 'o'"),
        (lambda: init.zero_bias_(nn.RNN(2, 3), gates=["f"]), "none, as it is no LSTM"),
        (lambda: init.orthogonal_(nn.Linear(2, 3)), "contains no nn.RNN"),
        (lambda: init.orthogonal_(nn.RNN(2, 3).half(), 1e6), "does not fit into"),
        (lambda: init.orthogonal_(nn.RNN(2, 3, device="meta")), "device 'meta'"),
        (lambda: init.orthogonal_(nn.RNN(2, 3), streams=[]), "an empty list"),
        (lambda: init.orthogonal_(nn.RNN(2, 3), optimizer=[]), "got no optimizer"),
        (lambda: init.forget_bias_(nn.LSTM(2, 3), 1e39), "does not fit into"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: init.orthogonal_(nn.RNN(2, 3), "1"),
            "gain is a str; expected a number",
        ),
        (lambda: init.orthogonal_(nn.RNN(2, 3), streams=3), "streams= got a int"),
        (
            lambda: init.orthogonal_(nn.RNN(2, 3), streams=["a", 1]),
            "streams= got a int",
        ),
    ],
)
def test_bad_types_are_named(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_an_optimizer_that_has_not_stepped_has_nothing_to_forget():
    rnn = nn.RNN(2, 5)
    optimizer = torch.optim.Adagrad(nn.Linear(2, 2).parameters())
    optimizer.add_param_group({"params": list(rnn.parameters())})
    init.orthogonal_(rnn, optimizer=optimizer)
    assert rnn.weight_hh_l0 not in optimizer.state


def test_inference_weights_are_refused():
    with torch.inference_mode():
        rnn = nn.RNN(2, 5)
    with pytest.raises(ValueError, match="inference_mode"):
        init.orthogonal_(rnn)


def test_the_answer_is_a_line_to_read():
    [changed] = init.orthogonal_(nn.LSTM(2, 8))
    text = str(changed)
    assert text.startswith("lstm.l0: weight_hh_l0; rho i 0.") and " -> 1" in text
