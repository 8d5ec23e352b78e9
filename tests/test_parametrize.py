"""Orthogonal recurrent weights that stay so while they train."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import gradwatch
from gradwatch import init
from gradwatch.parametrize import orthogonal, remove
from gradwatch.recurrent import recurrences, stored_weights
from testbed import reference
from testbed.models import Loop, Tagger
from testbed.training import classifier, digit_batches, learn
from tests.support.seldom import seldom

MODELS = {
    "rnn": lambda: Tagger(nn.RNN(3, 12, 2, bidirectional=True), 24),
    "lstm": lambda: Tagger(nn.LSTM(3, 12, 2), 12),
    "gru": lambda: Tagger(nn.GRU(3, 12), 12),
    "projected": lambda: Tagger(nn.LSTM(3, 12, proj_size=5), 5),
    "cell": lambda: Loop(nn.LSTMCell(3, 12), 12),
}


def error(model):
    """The largest norm of W_g' W_g - I over all gates."""
    worst = 0.0
    for recurrence in recurrences(model):
        weight = stored_weights(recurrence)["weight_hh"]
        for block in weight.chunk(max(len(recurrence.stream.gates), 1)):
            eye = torch.eye(block.shape[1])
            worst = max(worst, torch.linalg.matrix_norm(block.mT @ block - eye).item())
    return worst


def train(model, steps, optimizer=None, seed=0):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(7, 4, 3, generator=generator)
        y = torch.randint(3, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", MODELS)
def test_every_gate_stays_orthogonal_and_moves(kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    held = orthogonal(model)
    assert len(held) == len(recurrences(model)) and error(model) <= 1e-5
    start = [stored_weights(r)["weight_hh"].clone() for r in recurrences(model)]
    train(model, 60)
    assert error(model) <= 1e-5
    for recurrence, old in zip(recurrences(model), start, strict=True):
        if recurrence.stream.name != "rnn.l1_reverse":  # Tagger reads its first step
            assert (stored_weights(recurrence)["weight_hh"] - old).norm() > 0.1


@pytest.mark.parametrize("kind", seldom([nn.RNN, nn.LSTM], [nn.RNN]))
def test_a_thousand_steps_on_digits(kind):
    model = classifier(kind, hidden=32)
    init.orthogonal_(model)
    orthogonal(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    learn(model, optimizer, digit_batches(1000, batch=16))
    assert error(model) <= 1e-4
    rho = [
        reference.spectral_radius(b)
        for b in model.rnn.weight_hh_l0.chunk(
            max(len(recurrences(model)[0].stream.gates), 1)
        )
    ]
    assert all(math.isclose(r, 1.0, abs_tol=1e-4) for r in rho)


def test_it_starts_from_what_is_orthogonal_already_and_from_the_nearest_else():
    rnn = nn.RNN(3, 20)
    init.orthogonal_(rnn)
    kept = rnn.weight_hh_l0.detach().clone()
    orthogonal(rnn)
    torch.testing.assert_close(rnn.weight_hh_l0.detach(), kept)

    other = nn.RNN(3, 20)
    u, _, vh = torch.linalg.svd(other.weight_hh_l0.detach().double())
    orthogonal(other)
    torch.testing.assert_close(other.weight_hh_l0.detach(), (u @ vh).float())


def test_the_parameter_and_the_optimizer_stay_and_moments_go():
    model = MODELS["gru"]()
    weight = model.rnn.weight_hh_l0
    optimizer = train(model, 3)
    orthogonal(model, optimizer=optimizer)
    assert model.rnn.parametrizations.weight_hh_l0.original is weight
    assert weight not in optimizer.state and len(optimizer.state) == 5
    train(model, 3, optimizer)
    assert optimizer.state[weight]["step"] == 3 and error(model) < 1e-5
    remove(model, optimizer=optimizer)
    assert model.rnn.weight_hh_l0 is weight and weight not in optimizer.state


@pytest.mark.parametrize("kind", MODELS)
def test_removed_it_is_a_plain_weight_of_the_same_value(kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    names = set(model.state_dict())
    orthogonal(model)
    train(model, 3)
    x = torch.randn(5, 2, 3)
    before = model(x)
    let_go = remove(model)
    assert len(let_go) == len(recurrences(model)) and set(model.state_dict()) == names
    assert torch.equal(model(x), before)
    assert "Parametrized" not in type(next(model.children())).__name__
    train(model, 3)
    assert error(model) > 1e-5  # free again
    with pytest.raises(ValueError, match="no recurrent weight of this model is held"):
        remove(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded_with_the_state_dict(kind, tmp_path):
    torch.manual_seed(0)
    model, other = MODELS[kind](), MODELS[kind]()
    orthogonal(model)
    train(model, 3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    orthogonal(other)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = torch.randn(5, 2, 3)
    assert torch.equal(model(x), other(x))
    for net in (model, other):
        train(net, 3, torch.optim.SGD(net.parameters(), 0.1))
    assert torch.equal(model(x), other(x)) and error(other) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_deep_copies_after_a_forward_and_in_mid_training(kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    orthogonal(model)
    train(model, 2)
    x = torch.randn(5, 2, 3)
    output = model(x)  # a graph is alive
    twin = copy.deepcopy(model)
    output.sum().backward()
    assert torch.equal(twin(x), output)
    train(twin, 3)
    assert torch.equal(model(x), output) and not torch.equal(twin(x), output)
    assert error(twin) < 1e-5
    copy.deepcopy(twin)


def test_autocast_leaves_them_orthogonal():
    model = MODELS["rnn"]()
    orthogonal(model)
    train(model, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = model.rnn.weight_hh_l0
    assert weight.dtype == torch.float32
    assert torch.linalg.matrix_norm(weight.mT @ weight - torch.eye(12)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_afterwards_goes_on(dtype):
    model = MODELS["lstm"]()
    orthogonal(model)
    model.to(dtype)
    weight = model.rnn.weight_hh_l0
    assert weight.dtype == dtype
    block = weight.detach().float()[:12]
    assert torch.linalg.matrix_norm(block.mT @ block - torch.eye(12)) < 0.05
    model(torch.randn(5, 2, 3, dtype=dtype)).sum().backward()
    remove(model)
    assert model.rnn.weight_hh_l0.dtype == dtype


def test_a_gradient_that_waits_is_dropped():
    model = MODELS["rnn"]()
    model(torch.randn(5, 2, 3)).sum().backward()
    orthogonal(model)
    assert model.rnn.parametrizations.weight_hh_l0.original.grad is None
    assert model.rnn.weight_ih_l0.grad is not None


def test_a_loop_over_a_cell_computes_its_weight_once_when_cached():
    model = MODELS["cell"]()
    orthogonal(model)
    gates = model.cell.parametrizations.weight_hh[0]
    calls = []
    gates.register_forward_hook(lambda *_: calls.append(0))
    with parametrize.cached():
        model(torch.randn(9, 2, 3))
    assert len(calls) == 1


def test_it_is_watched_like_any_other():
    torch.manual_seed(0)
    model = MODELS["lstm"]()
    orthogonal(model)
    with gradwatch.watch(model, dir=None, wandb=None, every=1, budget=None) as watch:
        train(model, 5)
        for key in ("gradwatch/rnn/l0/rho", "gradwatch/rnn/l1/rho/f"):
            assert math.isclose(watch.latest[key], 1.0, abs_tol=1e-4)
        assert "parametrised" in repr(watch) and not watch.health["failed"]


def test_initialisers_go_through_it():
    model = MODELS["lstm"]()
    orthogonal(model)
    old = model.rnn.weight_hh_l0.detach().clone()
    init.orthogonal_(model)
    assert error(model) < 1e-5 and (model.rnn.weight_hh_l0 - old).norm() > 1
    with pytest.raises(ValueError, match="OrthogonalGates, which cannot take on"):
        init.orthogonal_(model, 1.3)
    assert error(model) < 1e-5


def tied():
    model = nn.ModuleList([nn.RNN(4, 4), nn.RNN(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    return model


def tied_to_a_readout():
    model = nn.ModuleDict({"rnn": nn.RNN(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = model["rnn"].weight_hh_l0
    return model


def broken():
    rnn = nn.RNN(2, 4, 2)
    with torch.no_grad():
        rnn.weight_hh_l1[0, 0] = math.nan
    return rnn


def held():
    rnn = nn.RNN(2, 4)
    orthogonal(rnn)
    return rnn


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tied, "2 places use this parameter"),
        (tied_to_a_readout, "2 places use this parameter"),
        (broken, "weight_hh_l1 of rnn holds NaN or Inf"),
        (held, "parametrised already"),
        (lambda: nn.RNN(2, 4).half(), "torch.float16; expected float32"),
        (lambda: nn.Linear(2, 4), "contains no nn.RNN"),
    ],
)
def test_what_cannot_be_held_is_named_and_left_alone(make, words):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        orthogonal(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(
        torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in after.items()
    )
