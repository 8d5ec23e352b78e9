"""What can be known before training: what is seen, and that no trace is left."""

import copy
import json
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import init
from gradwatch.before import inspected
from gradwatch.before.starts import reached
from gradwatch.before.trial import flushed, same_randomness, subject, tried
from gradwatch.cli import main
from tests.support.ranks import ROOT, on_ranks

T, B, F = 24, 6, 4
cross_entropy = nn.functional.cross_entropy


class Net(nn.Module):
    """Reads a sequence and classifies it by the last output."""

    def __init__(self, kind=nn.LSTM, units=12, classes=3, **options):
        super().__init__()
        self.rnn = kind(F, units, **options)
        both = 2 if options.get("bidirectional") else 1
        width = options.get("proj_size") or units
        self.head = nn.Linear(width * both, classes)
        self.first = options.get("batch_first", False)

    def forward(self, x):
        out = self.rnn(x)[0]
        return self.head(out[:, -1] if self.first else out[-1])


class States(Net):
    """Reads both directions where they end."""

    def forward(self, x):
        h = self.rnn(x)[1]
        h = h[0] if isinstance(h, tuple) else h
        return self.head(torch.cat([*h[-2:]], -1))


class Wrong(Net):
    """Takes the first axis for the batch, and its LSTM takes it for time."""

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self, kind=nn.GRUCell):
        super().__init__()
        self.cell, self.head = kind(F, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = None
        for step in x:
            h = self.cell(step, h)
        return self.head(h[0] if isinstance(h, tuple) else h)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(20, F), nn.LSTM(F, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(F, 12), nn.Linear(12, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.GRU(F, 12), nn.GRU(F, 12)
        self.head = nn.Linear(12, F)

    def forward(self, x):
        return self.head(self.decoder(x, self.encoder(x)[1])[0])


class NoForward(nn.Module):
    """Its loop never calls it."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(F, 12), nn.Linear(12, 3)


class Dropping(Net):
    def __init__(self):
        super().__init__(num_layers=2, dropout=0.5)


def of_classes(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def of_dict(model, batch):
    return cross_entropy(model(batch["x"]), batch["y"])


def labelled(*, batch_first=False, words=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (B, T) if batch_first else (T, B)
    if words:
        x = torch.randint(20, shape, generator=draw)
    else:
        x = torch.randn(*shape, F, generator=draw)
    return x, torch.randint(3, (B,), generator=draw)


def with_lengths(seed=0):
    x, y = labelled(seed=seed)
    return x, y, torch.tensor([T, T - 2, 9, 7, 7, 12])


def packed_loss(model, batch):
    return cross_entropy(model(batch[0], batch[2]), batch[1])


def translated(model, batch):
    return (model(batch[0]) - batch[0].flip(0)).square().mean()


def by_hand(model, batch):
    return cross_entropy(model.head(model.rnn(batch[0])[0][-1]), batch[1])


def scripted(model, batch):
    random.random(), np.random.rand(), torch.rand(1)
    return of_classes(model, batch)


MODELS = {
    "LSTM": (Net, of_classes, labelled()),
    "GRU": (lambda: Net(nn.GRU), of_classes, labelled()),
    "tanh RNN": (lambda: Net(nn.RNN), of_classes, labelled()),
    "ReLU RNN": (lambda: Net(nn.RNN, nonlinearity="relu"), of_classes, labelled()),
    "projection": (lambda: Net(proj_size=5), of_classes, labelled()),
    "layers": (lambda: Net(num_layers=3), of_classes, labelled()),
    "batch first": (
        lambda: Net(batch_first=True),
        of_classes,
        labelled(batch_first=True),
    ),
    "both directions": (lambda: States(bidirectional=True), of_classes, labelled()),
    "LSTM cell": (lambda: Cells(nn.LSTMCell), of_classes, labelled()),
    "GRU cell": (Cells, of_classes, labelled()),
    "RNN cell": (lambda: Cells(nn.RNNCell), of_classes, labelled()),
    "words": (Words, of_classes, labelled(batch_first=True, words=True)),
    "packed": (Packed, packed_loss, with_lengths()),
    "encoder and decoder": (Seq2Seq, translated, labelled()),
    "a dict": (Net, of_dict, dict(zip("xy", labelled(), strict=True))),
    "no forward": (NoForward, by_hand, labelled()),
    "dropout": (Dropping, of_classes, labelled()),
    "random numbers": (Net, scripted, labelled()),
    "compiled": (lambda: torch.compile(Net(), backend="eager"), of_classes, labelled()),
    "in parallel": (lambda: nn.DataParallel(Net()), of_classes, labelled()),
}


def state_of(model, optimizer):
    """Return all that may not change, as bytes and plain values."""
    return (
        {n: v.detach().numpy().tobytes() for n, v in model.state_dict().items()},
        {n: (id(p), p.grad) for n, p in model.named_parameters()},
        [module.training for module in model.modules()],
        [dict(module.__dict__).keys() for module in model.modules()],
        copy.deepcopy(optimizer.state_dict()),
        torch.get_rng_state().tolist(),
        random.getstate(),
        [str(part) for part in np.random.get_state()],
    )


def equal(one, two):
    """Tell whether two such states are the same, tensors among them bit for bit."""
    if isinstance(one, torch.Tensor):
        return one is two or torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def model_of(name):
    torch.manual_seed(0)
    make, loss_fn, batch = MODELS[name]
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss_fn(model, batch).backward()
    optimizer.step()  # so that there are gradients, and moments
    return model, optimizer, loss_fn, batch


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind(name):
    model, optimizer, loss_fn, batch = model_of(name)
    before, given = state_of(model, optimizer), copy.deepcopy(batch)
    found = inspected(
        model, [batch, batch], loss_fn, optimizers=optimizer, lag=20, steps=3
    )
    assert equal(before, state_of(model, optimizer)) and equal(given, batch)
    assert found.ok, str(found)
    assert {"reach", "growth", "units", "loss", "optimizers", "steps"} <= {
        check.name for check in found.checks
    }
    assert max(map(len, str(found).splitlines())) < 130


class Uncopied(Net):
    """Holds what no copy can be made of."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        return self.head(self.norm(self.rnn(x)[0][-1]))


def test_what_cannot_be_copied_is_put_back():
    torch.manual_seed(0)
    model = Uncopied().eval()
    model.norm.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    of_classes(model, labelled()).backward()
    before = state_of(model, optimizer)
    found = inspected(model, [labelled()], of_classes, optimizers=optimizer, lag=20)
    assert equal(before, state_of(model, optimizer))
    assert "cannot be copied" in str(found) and len(found.starts) > 2


def test_it_trains_as_it_would_have():
    """The next steps give the same losses, to the bit."""

    def losses(look):
        model, optimizer, loss_fn, batch = model_of("dropout")
        if look:
            inspected(model, batch, loss_fn, optimizers=optimizer, lag=20, steps=5)
        found = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)


def test_ranks_of_ddp(tmp_path):
    code = """
from torch.nn.parallel import DistributedDataParallel
from tests.test_preflight import Net, inspected, labelled, of_classes, state_of, equal
torch.manual_seed(0)
model = DistributedDataParallel(Net())
optimizer = torch.optim.Adam(model.parameters())
before = state_of(model, optimizer)
found = inspected(model, [labelled(seed=rank)], of_classes, optimizers=optimizer, lag=9)
assert found.ok and equal(before, state_of(model, optimizer))
print(len(found.starts), *[check.name for check in found.checks])
"""
    said = [out for out, _ in on_ranks(code, tmp_path)]
    assert said[0] == said[1] and "growth" in said[1]  # every rank measures


# ---- what is seen


def checks(model, loss_fn=of_classes, batches=None, **options):
    found = inspected(
        model, [labelled()] if batches is None else batches, loss_fn, **options
    )
    return {check.name: check for check in found.failed}, found


@pytest.mark.parametrize("act", ["as it is", "forget_bias_(1)", "chrono_(20)"])
def test_the_horizon_is_what_a_watch_measures(act):
    model, _, loss_fn, batch = model_of("LSTM")
    found = inspected(model, batch, loss_fn, lag=20)
    start = next(s for s in found.starts if s.name == act)
    if act != "as it is":
        exec(start.line, {"gradwatch": gradwatch, "model": model})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        watch.flush()
        latest = watch.latest["gradwatch/rnn/l0/horizon"]
    assert start.horizon == pytest.approx(latest, rel=1e-5) and start.length == T


def test_a_lag_that_is_not_reached_is_a_warning_with_what_reaches_it():
    torch.manual_seed(0)
    _, found = checks(Net(), lag=20)
    [warning] = found.warned
    assert warning.name == "reach" and found.ok
    assert "you need 20 steps back; gradients arrive" in str(found)
    assert "<- gradwatch.init." in str(found)
    reached = {s.name: s.horizon for s in found.starts}
    assert reached["chrono_(20)"] >= 20 > reached["as it is"]
    init.chrono_(model := Net(), t_max=20)
    _, found = checks(model, lag=20)
    assert (found.warned == [] and found.starts == ()) or found.starts == []
    _, found = checks(Net(), lag=99)
    assert "the sequences have 24" in str(found) and not found.starts


def test_a_gradient_that_arrives_too_small_is_a_warning():
    torch.manual_seed(0)
    init.forget_bias_(model := Net(), 0.7)  # 10^-2.3 is left after 20 steps
    _, found = checks(model, lag=20)
    assert [check.name for check in found.warned] == ["reach"]
    assert "gradients arrive 24, but only 10^-2.3 of the largest" in str(found)
    found = {start.name: start for start in found.starts}
    faint, chosen = found["as it is"], found["forget_bias_(3)"]
    assert faint.is_faint(20) and not faint.arrives(20) and faint.horizon >= 20
    assert chosen.arrives(20) and not chosen.is_faint(20)
    _, found = checks(model, lag=10)
    assert found.warned == []


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("back", [1, 5, T - 1])
def test_the_gradient_at_the_lag(kind, back):
    """Against autograd: what each state gets, of all sequences together."""
    torch.manual_seed(0)
    model, (x, y) = Net(kind), labelled()
    x, y = x[:, :4], y[:4]  # as many as are looked at
    with same_randomness(), subject(model, ()) as given:
        reached_there = reached(tried(given, [(x, y)], of_classes), back).adjoint
    cell = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}[kind](F, 12)
    own = {f"{name}_l0": p for name, p in cell.named_parameters()}
    cell.load_state_dict({n[:-3]: model.rnn.state_dict()[n] for n in own})
    state, states = None, []
    for step in x:
        state = cell(step, state)
        parts = state if isinstance(state, tuple) else (state,)
        states.append(parts)
        for part in parts:
            part.retain_grad()
    cross_entropy(model.head(states[-1][0]), y).backward()
    sizes = [sum(p.grad.square().sum() for p in parts).sqrt() for parts in states]
    expected = (sizes[-1 - back] / max(sizes)).log10()
    assert reached_there == pytest.approx(float(expected), abs=1e-3)


def large():
    return init.orthogonal_(model := Net(nn.RNN, nonlinearity="relu"), 3.0) and model


def shut():
    model = Net()
    with torch.no_grad():
        model.rnn.bias_hh_l0[:12] = -20.0
    return model


def dead():
    model = Net(nn.RNN, nonlinearity="relu")
    with torch.no_grad():
        model.rnn.bias_hh_l0.fill_(-20.0)
    return model


def softmax_twice(model, batch):
    return cross_entropy(model(batch[0]).softmax(-1), batch[1])


def broadcast(model, batch):
    return (model(batch[0])[:, :1] - batch[1].float()).square().mean()


def times(factor):
    x, y = labelled()
    return [(x * factor, y)]


SICK = {
    "growth": (large, of_classes, None),
    "gates": (shut, of_classes, None),
    "units": (dead, of_classes, None),
    "inputs": (Net, of_classes, times(1000.0)),
    "too small": (Net, of_classes, times(1e-5)),
    "not finite": (Net, of_classes, times(float("nan"))),
    "direction": (lambda: Net(bidirectional=True), of_classes, None),
    "loss": (Net, softmax_twice, None),
    "broadcast": (Net, broadcast, None),
    "axes": (Wrong, of_classes, [labelled(batch_first=True)]),
}
NAMES = {"too small": "inputs", "not finite": "finite", "broadcast": "loss"}


@pytest.mark.parametrize("fault", SICK)
def test_a_fault_fails_and_says_what_to_do(fault):
    torch.manual_seed(0)
    make, loss_fn, batches = SICK[fault]
    failed, _ = checks(make(), loss_fn, batches)
    assert NAMES.get(fault, fault) in failed
    assert failed[NAMES.get(fault, fault)].do


def test_what_no_optimizer_holds():
    model = Net()
    optimizer = torch.optim.Adam(model.rnn.parameters())
    failed, _ = checks(model, optimizers=optimizer)
    assert [*failed] == ["optimizers"] and "head.bias" in failed["optimizers"].text
    exec(failed["optimizers"].do, {"optimizer": optimizer, "model": model})
    assert checks(model, optimizers=optimizer)[0] == {}


class Turns(nn.Module):
    """Uses one of two recurrences, by the batch."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Net(), Net()

    def forward(self, x):
        return self.one(x) if x[0, 0, 0] > 0 else self.two(x)


def test_a_weight_without_gradient_in_every_batch():
    x, y = labelled()
    positive, negative = (x.abs(), y), (-x.abs(), y)
    failed, _ = checks(Turns(), batches=[positive])
    assert "two.rnn.l0" in failed["gradient"].text
    failed, _ = checks(Turns(), batches=[positive, negative])
    assert "gradient" not in failed
    model = Turns()
    one = torch.optim.SGD(model.one.parameters())
    failed, _ = checks(model, batches=[positive], optimizers=one)
    assert failed == {}  # nobody means to train the other


def padded():
    x, y = labelled()
    for sequence, length in enumerate((T, 9, 7, 12, 15, 20)):
        x[length:, sequence] = 0
    return [(x, y)]


def test_a_read_out_behind_padding_is_a_warning():
    _, found = checks(Net(), batches=padded())
    [warning] = found.warned
    assert warning.name == "padding" and "pack_padded_sequence" in warning.do
    assert "behind the padding in 5 of 6 sequences (50% of the" in warning.text
    _, found = checks(Net(), batches=2 * padded())
    assert "in 10 of 12 sequences" in str(found)
    _, found = checks(Net(), batches=[labelled()])
    assert found.warned == []

    def each(model, batch):  # reads every step, so that the end is one of many
        return model.head(model.rnn(batch[0])[0]).square().mean()

    assert checks(Net(), each, padded())[1].warned == []
    _, found = checks(Packed(), packed_loss, [with_lengths()])
    assert found.warned == []


def test_padding_is_counted_in_the_batches_that_call_a_module():
    [(x, y)] = padded()
    batches = [(sign * x.abs(), y) for sign in (1, -1, -1)]
    with same_randomness(), subject(Turns(), ()) as given:
        seen = tried(given, batches, of_classes)
    assert seen.padded == {"one.rnn": (5, 6), "two.rnn": (10, 12)}


class Ends(Net):
    """One number, and what the last layer is followed by."""

    def __init__(self, end, *, bare=False, **options):
        super().__init__(classes=1, **options)
        self.end, self.bare = end, bare

    def forward(self, x):
        out = self.rnn(x)[0][-1]
        return self.end(out[:, :1] if self.bare else self.head(out))


def squares(model, batch):
    return 3 * (model(batch[0]) - batch[1]).square().sum()


def absolute(model, batch):
    return (model(batch[0]) - batch[1]).abs().mean()


def numbers(low, high):
    return [(labelled()[0], torch.linspace(low, high, B)[:, None])]


def plain(out):
    return out


def times_five(out):
    return 5 * out.tanh()


UNREACHED = {
    "tanh": (torch.tanh, False, (-3, 3), "between -1 and 1", "67% of the targets"),
    "sigmoid": (torch.sigmoid, False, (-2, 3), "between 0 and 1", "67% of"),
    "one side": (torch.sigmoid, False, (0.5, 3), "below 1", "67% of"),
    "softplus": (nn.functional.softplus, False, (-2, 3), "above 0", "33% of"),
    "times five": (times_five, False, (0, 6), "below 5", "17% of"),
    "a state": (plain, True, (-3, 3), "between -1 and 1", "67% of"),
}


@pytest.mark.parametrize("end", UNREACHED)
def test_targets_that_no_output_can_be(end):
    torch.manual_seed(0)
    act, bare, span, stays, share = UNREACHED[end]
    failed, _ = checks(Ends(act, bare=bare, kind=nn.GRU), squares, numbers(*span))
    assert stays in failed["targets"].text and share in failed["targets"].text
    assert "linear" in failed["targets"].do
    _, found = checks(Ends(act, bare=bare, kind=nn.GRU), squares, numbers(0.2, 0.8))
    assert "targets of the first batch, 0.2 to 0.8, are what outputs can be" in str(
        found
    )


def test_targets_that_can_be_or_are_not_told():
    torch.manual_seed(0)
    _, found = checks(Ends(plain), squares, numbers(-300, 300))
    assert "batch, -300 to 300, are what outputs can be" in str(found)
    for end in (torch.tanh, plain):
        for span in ((-3, 3), (3, 9), (0.2, 0.8)):
            _, found = checks(Ends(end), absolute, numbers(*span))
            assert not [check for check in found.checks if check.name == "targets"]
    _, found = checks(Net())
    assert "targets" not in {check.name for check in found.checks}


def said_of_targets(model, loss_fn, targets):
    _, found = checks(model, loss_fn, [(labelled()[0], targets)])
    return [check.sign for check in found.checks if check.name == "targets"]


def penalised(model, batch):
    return squares(model, batch) + 1e-3 * sum(
        p.square().sum() for p in model.parameters()
    )


def weighted(model, batch):
    weights = torch.linspace(1, 1.01, B)[:, None]
    return (weights * (model(batch[0]) - batch[1]).square()).mean()


def steep(model, batch):
    return ((model(batch[0]) - batch[1]).square() + 100).sqrt().mean() - 10


@pytest.mark.parametrize("end", [torch.sigmoid, nn.functional.softplus, torch.relu])
@pytest.mark.parametrize("seed", range(3))
def test_of_targets_that_cannot_be_read_nothing_is_said(end, seed):
    torch.manual_seed(seed)
    model, few = Ends(end), torch.zeros(B, 1)
    assert said_of_targets(model, squares, few) == []  # they are rounding alone
    few[2] = 0.05
    for loss_fn in (penalised, weighted, steep):
        assert "FAIL" not in said_of_targets(model, loss_fn, few)
    nn.init.zeros_(model.head.weight), nn.init.zeros_(model.head.bias)
    assert said_of_targets(model, squares, 0 * few) == []


def test_what_outputs_can_be_is_not_told_where_the_looks_do_not_settle():
    torch.manual_seed(0)
    for end in (torch.exp, torch.square, torch.sin):
        assert said_of_targets(Ends(end), squares, numbers(-9, 9)[0][1]) == []


def test_a_bound_that_hardly_costs_anything_is_no_fault():
    torch.manual_seed(0)
    labels = torch.tensor([0.0, 1, 1, 0, 1, 0])[:, None]
    nearly = Ends(lambda out: out.sigmoid().clamp(0.02, 0.98))
    assert said_of_targets(nearly, squares, labels) == ["ok"]
    half = Ends(lambda out: out.sigmoid().clamp(0.2, 0.8))
    assert said_of_targets(half, squares, labels) == ["FAIL"]


@pytest.mark.parametrize("seed", [3, 11, 19])
def test_a_cell_that_adds_up_can_be_anything_from_its_start(seed):
    """Most weights far off bring c to 1, and h to .76."""
    torch.manual_seed(seed)
    model = Ends(plain, bare=True)
    assert "FAIL" not in said_of_targets(model, squares, numbers(-0.9, 0.9)[0][1])


class Halts(nn.Module):
    """Goes on until a gate has opened: with other weights for ever."""

    def __init__(self):
        super().__init__()
        self.cell, self.gate = nn.GRUCell(F, 12), nn.Linear(12, 1)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 12)
        for step in x:
            opened = 0.0
            while opened < 0.99:
                h = self.cell(step, h)
                opened += float(self.gate(h).sigmoid().mean())
        return h


def test_a_model_that_runs_on_and_on_with_other_weights_is_given_up():
    torch.manual_seed(0)
    said = said_of_targets(Halts(), squares, 3 * torch.randn(B, 12))
    assert said in ([], ["FAIL"])


def test_a_model_that_refuses_other_weights():
    torch.manual_seed(0)

    def refuses(out):
        if out.abs().amax() > 5:
            raise ValueError("out of range")
        return out.tanh()

    failed, found = checks(Ends(refuses), squares, numbers(-3, 3))
    assert failed == {} and "targets" not in {check.name for check in found.checks}


class Mixing(Net):
    def forward(self, x):
        out = super().forward(x)
        return out + out.mean(0)


def test_samples_that_mix_and_an_axis_that_is_declared():
    torch.manual_seed(0)
    failed, _ = checks(Mixing(), batch_axis=1)
    assert "axis 1 do not stay apart" in failed["axes"].text
    failed, found = checks(Net(), batch_axis=1)
    assert failed == {} and "samples are axis 1; they do not mix" in str(found)
    failed, _ = checks(Net(), batch_axis=0)  # that is time
    assert "axes" in failed


def test_of_packed_batches_no_axis_is_told():
    x, y, lengths = with_lengths()
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)

    class Reads(Net):
        def forward(self, sequences):
            return self.head(self.rnn(sequences)[1][0][-1])

    failed, found = checks(Reads(), batches=[(packed, y)])
    assert failed == {} and "samples" not in str(found)


def test_steps_that_do_not_move_the_loss():
    torch.manual_seed(0)
    model = Net()
    still = torch.optim.SGD(model.parameters(), 1e-9)
    _, found = checks(model, optimizers=still, steps=10)
    assert [check.name for check in found.warned] == ["steps"]
    moves = torch.optim.Adam(model.parameters(), 1e-2)
    _, found = checks(model, optimizers=moves, steps=60)
    assert found.warned == []


def test_steps_of_an_optimizer_that_calls_for_the_loss_again():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    before = state_of(model, optimizer)
    _, found = checks(model, optimizers=optimizer, steps=5)
    [moved] = [check for check in found.checks if check.name == "steps"]
    assert moved.sign == "ok" and equal(before, state_of(model, optimizer))


def test_steps_of_a_model_that_cannot_be_copied_leave_its_optimizer_alone():
    torch.manual_seed(0)
    model = Uncopied()
    for make in (torch.optim.Adam, torch.optim.LBFGS):
        optimizer = make(model.parameters(), 1e-2)
        fresh = state_of(model, optimizer)
        checks(model, optimizers=optimizer, steps=3)
        assert equal(fresh, state_of(model, optimizer))
    of_classes(model, labelled()).backward()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    optimizer.step()
    before = state_of(model, optimizer)
    checks(model, optimizers=optimizer, steps=3)
    assert equal(before, state_of(model, optimizer))


def test_small_numbers_are_told_of():
    torch.manual_seed(0)
    init.orthogonal_(model := Net(nn.RNN), 0.02)
    _, found = checks(model)
    assert "set_flush_denormal" in str(found)


@pytest.mark.parametrize("before", [False, True])
def test_whether_small_numbers_are_flushed_is_as_before(before):
    tiny = torch.tensor(1e-310, dtype=torch.float64)
    torch.set_flush_denormal(before)
    try:
        with flushed():
            assert tiny * 1.0 == 0
        assert bool(tiny * 1.0 == 0) == before
    finally:
        torch.set_flush_denormal(False)


# ---- what it is given


def test_batches_in_many_forms():
    batch = labelled()
    data = torch.utils.data.DataLoader([0, 1, 2, 3, 4, 5], batch_size=1)
    seen = []

    def loss_fn(model, given):
        seen.append(given)
        return of_classes(model, batch)

    for batches, count in (
        ([1, 2, 3], 3),
        ((1, 2), 1),
        ({"x": 1}, 1),
        (batch[0], 1),
        (data, 4),
        (iter([1] * 9), 4),
    ):
        seen.clear()
        inspected(Net(), batches, loss_fn)
        assert len(seen) >= count and len([*map(id, seen)]) <= count + 4


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"lag": 0}, ValueError, "lag is 0"),
        ({"lag": 1.5}, ValueError, "lag is 1.5"),
        ({"steps": -1}, ValueError, "steps is -1"),
        ({"steps": 5}, ValueError, "needs an optimizer"),
        ({"optimizers": [3]}, TypeError, "holds a int"),
    ],
)
def test_arguments_that_cannot_be_used(options, error, told):
    with pytest.raises(error, match=told):
        inspected(Net(), [labelled()], of_classes, **options)


@pytest.mark.parametrize(
    ("loss_fn", "error", "told"),
    [
        (lambda m, b: of_classes(m, b).item(), TypeError, "returned float"),
        (lambda m, b: m(b[0]), ValueError, r"shape \(6, 3\)"),
        (lambda m, b: of_classes(m, b).detach(), ValueError, "does not depend"),
    ],
)
def test_a_loss_that_is_none(loss_fn, error, told):
    model = Net()
    with pytest.raises(error, match=told):
        inspected(model, [labelled()], loss_fn)
    assert not model.rnn._forward_hooks and all(
        p.grad is None for p in model.parameters()
    )


def test_no_batch_and_no_recurrence():
    with pytest.raises(ValueError, match="batches is empty"):
        inspected(Net(), [], of_classes)
    with pytest.raises(ValueError, match="contains no"):
        inspected(nn.Linear(2, 2), [labelled()], of_classes)


def test_it_is_printed_once(caplog):
    with caplog.at_level("INFO", logger="gradwatch"):
        found = gradwatch.preflight(Net(), [labelled()], of_classes)
    assert [r.getMessage() for r in caplog.records] == [
        f"gradwatch: preflight\n{found}"
    ]


# ---- in the shell, and in pytest

TRAIN = """
from tests.test_preflight import Net, Wrong, labelled, of_classes
def ready():
    return Net(), [labelled()], of_classes
def sick():
    return {"model": Wrong(), "batches": [labelled(batch_first=True)],
            "loss_fn": of_classes, "lag": 9}
number = 3
def wrong():
    return 3
def breaks():
    return 1 / 0
def misnamed():
    return {"model": Net(), "batches": [labelled()], "loss_fn": of_classes, "lagg": 9}
"""


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("ready", 0, "samples are axis 1"),
        ("sick", 1, "FAIL"),
        ("nothing", 2, "has no function 'nothing'"),
        ("number", 2, "has no function 'number'"),
        ("wrong", 2, "returned int"),
        ("breaks", 2, "ZeroDivisionError"),
        ("misnamed", 2, "is called 'lagg'; they are model, batches"),
        ("", 2, "names no function"),
    ],
)
def test_in_the_shell(name, code, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "train_for_preflight.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("train_for_preflight", None)
    assert main(["preflight", f"train_for_preflight:{name}"]) == code
    out, err = capsys.readouterr()
    assert told in (err if code == 2 else out)
    if code < 2:
        assert main(["preflight", f"train_for_preflight:{name}", "--json"]) == code
        assert json.loads(capsys.readouterr().out)["ok"] == (code == 0)


PYTEST = """
import pytest
from tests.test_preflight import Net, Wrong, labelled, of_classes
def test_ready(gradwatch_preflight):
    assert gradwatch_preflight(Net(), [labelled()], of_classes).ok
def test_sick(gradwatch_preflight):
    gradwatch_preflight(Wrong(), [labelled(batch_first=True)], of_classes)
def test_warned(gradwatch_preflight):
    gradwatch_preflight(Net(), [labelled()], of_classes, lag=20)
@pytest.mark.gradwatch(fail_on="WARN")
def test_strict(gradwatch_preflight):
    gradwatch_preflight(Net(), [labelled()], of_classes, lag=20)
"""


def test_in_pytest(tmp_path):
    (tmp_path / "test_ready.py").write_text(PYTEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--strict-markers", "-v", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "2 passed" in done.stdout and "2 failed" in done.stdout, done.stdout
    assert "FAIL" in done.stdout and "you need 20 steps back" in done.stdout


def test_the_plugin_imports_no_torch():
    code = "import sys, gradwatch_pytest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
