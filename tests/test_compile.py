"""What is compiled, scripted, traced or exported is what it is without a watch."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import gradwatch


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 8, num_layers=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.rnn(2 * x)[0][-1]))


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRUCell(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 8)
        for row in x:
            h = self.rnn(row, h)
        return self.head(h)


def attached(model):
    return gradwatch.watch(model, dir=None, wandb=None, every=2, budget=None)


def trained(kind, compiled, backend, when=None):
    """Train for eight steps; return losses and weights, the watch, and the model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, watch = kind(), None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if when == "before":
        watch = attached(model)

    def step(x):
        optimizer.zero_grad()
        loss = called(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    called, stepped = model, step
    if compiled == "the model":
        called = torch.compile(model, backend=backend)
    elif compiled == "in place":
        model.compile(backend=backend)
    elif compiled == "the module":
        model.rnn.compile(backend=backend)
    else:
        stepped = torch.compile(step, backend=backend)
    if when == "after":
        watch = attached(model)
    losses = []
    for i in range(8):
        if when == "later" and i == 3:
            watch = attached(model)
        torch.manual_seed(i)
        losses.append(stepped(torch.randn(5, 3, 4)).item())
    return [*losses, *(p.detach().clone() for p in model.parameters())], watch, model


WAYS = ("the model", "in place", "the module", "the step")
QUICK = [(Fused, "the model", "before"), (Cells, "the step", "after")]
ALL = [
    pytest.param(kind, way, when, backend, marks=pytest.mark.slow)
    for backend in ("aot_eager", "inductor")
    for kind in (Fused, Cells)
    for way in WAYS
    for when in ("before", "after", "later")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "way", "when", "backend"),
    [*((*quick, "aot_eager") for quick in QUICK), *ALL],
)
def test_a_compiled_model_trains_as_it_does_without(kind, way, when, backend):
    bare, *_ = trained(kind, way, backend)
    found, watch, _model = trained(kind, way, backend, when)
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(bare, found, strict=True)
    )
    assert len(watch.records) == (5 if when == "later" else 8)
    assert watch.health["failed"] == {}
    seen = "gradwatch/rnn/l0/horizon" in watch.latest
    if kind is Fused:
        assert seen
    elif way != "the module":
        assert not seen and "compiled code hides its calls" in repr(watch)
    watch.close()


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MADE = {
    "script": lambda model, x: torch.jit.script(model)(x),
    "trace": lambda model, x: torch.jit.trace(model, (x,))(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "strict export": lambda model, x: torch.export.export(
        model, (x,), strict=True
    ).module()(x),
    "a copy": lambda model, x: copy.deepcopy(model)(x),
    "a pickle": lambda model, x: pickle.loads(pickle.dumps(model))(x),
    "a file": lambda model, x: saved(model)(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", MADE)
def test_what_is_made_of_a_watched_model_is_what_it_would_be(how):
    torch.manual_seed(0)
    model, x = Fused(), torch.randn(5, 3, 4)
    with attached(model) as watch:
        watch.probe_now()
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        watch.probe_now()  # calls are wanted while it is made
        assert torch.equal(MADE[how](model, x), model(x))
        assert watch.health["failed"] == {}


def test_a_module_is_left_as_it_was():
    model = Fused()
    before = {name: list(vars(m)) for name, m in model.named_modules()}
    with attached(model):
        assert list(vars(model.rnn)) != before["rnn"]
    assert {name: list(vars(m)) for name, m in model.named_modules()} == before
    model.rnn.compile(backend="eager")
    slot = model.rnn._compiled_call_impl
    with attached(model):
        assert model.rnn._compiled_call_impl is not slot
    assert model.rnn._compiled_call_impl is slot


def test_inputs_are_those_behind_the_modules_own_hooks():
    model = Fused()
    model.rnn.register_forward_pre_hook(lambda module, args: (args[0] * 3, *args[1:]))
    with attached(model) as watch:
        model(torch.randn(5, 3, 4)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert "gradwatch/rnn/l0/horizon" in watch.latest
        assert "left out" not in repr(watch)
        assert not model.rnn._forward_hooks


def test_two_watches_see_the_same_module():
    model = Fused()
    with attached(model) as outer, attached(model.rnn) as inner:
        assert outer is not inner or outer.streams == inner.streams
        model(torch.randn(5, 3, 4)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        for watch in (outer, inner):
            assert any(key.endswith("l0/horizon") for key in watch.latest)


def test_the_slot_may_be_called_by_others():
    model, x = Fused(), torch.randn(5, 3, 4)
    with attached(model):
        called = model.rnn._compiled_call_impl
        assert torch.equal(called(x)[0], model.rnn(x)[0])


def test_a_replica_runs_with_its_own_weights():
    model, x = Fused(), torch.randn(5, 3, 4)
    with attached(model) as watch:
        watch.probe_now()
        replica = model.rnn._replicate_for_data_parallel()
        for name in [n for n, _ in model.rnn.named_parameters()]:
            setattr(replica, name, getattr(model.rnn, name).detach() * 0)
        assert not replica(x)[0].any() and model.rnn(x)[0].any()
