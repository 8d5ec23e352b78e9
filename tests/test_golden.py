"""With a watch attached, every loss and weight is bitwise what it would be without."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, rnn

import gradwatch
from testbed.models import Loop, Tagger, batches, lstm


def old_weight_norm(module, name):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module, name)


def _fused(kind, **options):
    def build():
        width = options.get("proj_size") or 8
        width *= 2 if options.get("bidirectional") else 1
        return Tagger(kind(4, 8, **options), width)

    return build


def _wrapped(change, kind=nn.LSTM):
    def build():
        model = Tagger(kind(4, 8), 8)
        change(model.rnn, "weight_hh_l0")
        return model

    return build


def _cell(kind, **options):
    return lambda: Loop(kind(4, 8, **options), 8)


def _parametrized_cell():
    model = Loop(nn.LSTMCell(4, 8), 8)
    parametrizations.spectral_norm(model.cell, "weight_hh")
    return model


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Tagger(nn.GRU(4, 8, bidirectional=True), 16)

    def forward(self, x):
        lengths = torch.tensor([6, 2, 5, 1, 3])
        return self.inner(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))


class Unbatched(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Tagger(nn.LSTM(4, 8, num_layers=2), 8)

    def forward(self, x):
        return self.inner(x[:, 0])


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Tagger(nn.LSTM(4, 8), 8)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


class EditsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.GRU(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        out, _ = self.inner(x)
        out.mul_(0.5)
        return self.head(out[-1])


MODELS = {
    "RNN tanh": _fused(nn.RNN),
    "RNN relu": _fused(nn.RNN, nonlinearity="relu"),
    "LSTM": _fused(nn.LSTM),
    "GRU": _fused(nn.GRU),
    "GRU 2 layers bidirectional": _fused(nn.GRU, num_layers=2, bidirectional=True),
    "LSTM 3 layers dropout": _fused(nn.LSTM, num_layers=3, dropout=0.4),
    "LSTM projection": _fused(nn.LSTM, proj_size=3, num_layers=2),
    "LSTM no bias": _fused(nn.LSTM, bias=False),
    "RNNCell": _cell(nn.RNNCell),
    "RNNCell relu": _cell(nn.RNNCell, nonlinearity="relu"),
    "LSTMCell": _cell(nn.LSTMCell),
    "GRUCell": _cell(nn.GRUCell),
    "LSTMCell spectral_norm": _parametrized_cell,
    "packed": Packs,
    "unbatched": Unbatched,
    "bfloat16 autocast": Autocast,
    "output edited in place": EditsInPlace,
    "spectral_norm": _wrapped(parametrizations.spectral_norm),
    "weight_norm": _wrapped(parametrizations.weight_norm, nn.GRU),
    "old weight_norm": _wrapped(old_weight_norm),
    "orthogonal": _wrapped(parametrizations.orthogonal, nn.RNN),
}


def train(model, steps=10, each=lambda: None):
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for x in batches(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
        each()
    return losses


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_watched_training_is_bitwise_the_same(name):
    torch.manual_seed(0)
    bare, watched = MODELS[name](), None
    torch.manual_seed(0)
    watched = MODELS[name]()
    losses = train(bare)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    watch = gradwatch.watch(watched, every=1, budget=None, dir=None)
    seen = train(watched)
    assert seen == losses
    for key, value in state(bare).items():
        assert torch.equal(value, watched.state_dict()[key]), key
    assert torch.equal(torch.get_rng_state(), after[0])
    assert np.random.get_state()[1].tolist() == after[1]
    assert random.getstate() == after[2]
    assert watch.health["failed"] == {}
    rho = [
        r.metrics.get(f"gradwatch/{watch.streams[0].key}/rho") for r in watch.records
    ]
    assert len(rho) == 10 and None not in rho
    watch.close()
    assert train(watched) == train(bare)


@pytest.mark.parametrize("name", ["LSTM", "spectral_norm", "LSTM projection"])
def test_rho_is_of_the_weights_that_the_forward_used(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    used = []

    def keep(module, args, output):
        flat = dict(zip(module._flat_weights_names, module._flat_weights, strict=True))
        gates = flat["weight_hh_l0"].detach().clone().chunk(4)
        projection = flat.get("weight_hr_l0")
        matrices = gates if projection is None else [g @ projection for g in gates]
        used.append(max(float(torch.linalg.eigvals(m).abs().max()) for m in matrices))

    model.rnn.register_forward_hook(keep)
    with gradwatch.watch(model, every=1, dir=None, budget=None) as watch:
        train(model)
        watch.flush()
        _, rho = watch.records.series("gradwatch/rnn/l0/rho")
    assert rho == pytest.approx(used, rel=1e-5)


def test_rho_of_a_parametrized_cell_is_that_of_its_forward():
    torch.manual_seed(0)
    model = _parametrized_cell()
    used = []
    model.cell.parametrizations["weight_hh"].register_forward_hook(
        lambda module, args, out: used.append(out.detach().clone())
    )
    with gradwatch.watch(model, every=1, dir=None, budget=None) as watch:
        train(model, 3)
        watch.flush()
        _, rho = watch.records.series("gradwatch/cell/rho")
    radii = [
        max(float(torch.linalg.eigvals(m).abs().max()) for m in weight.chunk(4))
        for weight in used
    ]
    # A cell in a loop computes its weight at each of the six time steps.
    assert all(min(abs(r - x) for x in radii) < 1e-5 for r in rho)


def test_a_compiled_parent_is_watched_and_unchanged():
    bare, watched = lstm(), lstm()
    losses = train(torch.compile(bare, backend="eager"))
    compiled = torch.compile(watched, backend="eager")
    with gradwatch.watch(compiled, every=1, dir=None, budget=None) as watch:
        assert train(compiled) == losses
        watch.flush()
        assert [s.name for s in watch.streams] == ["rnn.l0"]
        assert len(watch.records.series("gradwatch/rnn/l0/rho")[0]) == 10


def test_a_compiled_loop_of_cells_trains_the_same():
    torch.manual_seed(0)
    bare = Loop(nn.LSTMCell(4, 8), 8)
    watched = copy.deepcopy(bare)
    losses = train(torch.compile(bare, backend="eager"))
    with gradwatch.watch(watched, every=1, dir=None, budget=None) as watch:
        assert train(torch.compile(watched, backend="eager")) == losses
        assert watch.health["failed"] == {}
