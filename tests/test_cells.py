"""Cells of the user's own: measured along autograd's graph, without running them."""

import copy
import gc
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.numerics import krylov
from testbed.cells import CELLS, GRU, LSTM, RNN, Stepped, start

T, B, INPUTS, UNITS = 20, 6, 5, 12
OFF = {"dir": None, "wandb": None}


def batch(seed=1, dtype=torch.float64, steps=T):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, B, INPUTS, generator=source, dtype=dtype)
    return x, torch.randint(0, 4, (steps, B), generator=source)


READS = {
    "last": lambda s, y: cross_entropy(s[-1], y[-1]),
    "each": lambda s, y: cross_entropy(s.flatten(0, 1), y.flatten()),
    "third": lambda s, y: cross_entropy(s[:-1:3].flatten(0, 1), y[:-1:3].flatten()),
}


class Fused(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(UNITS, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def twins(fused, cell):
    """Return a net with a fused module, and one with a cell of the same weights."""
    torch.manual_seed(0)
    known = Fused(fused(INPUTS, UNITS)).double()
    own = Stepped(cell(INPUTS, UNITS), UNITS, 4).double()
    pairs = zip(
        (own.cell.w.weight, own.cell.u.weight, own.cell.w.bias, own.cell.u.bias),
        known.rnn.parameters(),
        strict=True,
    )
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)
    own.head = copy.deepcopy(known.head)
    return known, own


def train(model, reads, steps=3, dtype=torch.float64, lr=0.1, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr)
    options = {"every": 1, "budget": None, "flow_samples": None, **OFF, **options}
    with gradwatch.watch(model, **options) as watch:
        for step in range(steps):
            x, y = batch(step, dtype)
            loss = reads(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not watch.health["failed"]
    return watch


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize(
    ("fused", "cell"), [(nn.LSTM, LSTM), (nn.GRU, GRU), (nn.RNN, RNN)]
)
def test_it_is_what_a_fused_module_of_the_same_weights_is(fused, cell, reads):
    known, own = twins(fused, cell)
    one = train(known, READS[reads])
    two = train(own, READS[reads], cells=[cell])
    for a, b in zip(one.records, two.records, strict=True):
        for name in ("horizon", "growth_log10", "adjoint_log10", "demand", "signal"):
            theirs = a.metrics[f"gradwatch/rnn/l0/{name}"]
            mine = b.metrics[f"gradwatch/cell/{name}"]
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-9)
        adjoint = np.square(a.profiles["gradwatch/rnn/l0/adjoint"])
        cells = a.profiles.get("gradwatch/rnn/l0/adjoint_cell", np.zeros(T))
        theirs = np.sqrt(adjoint + np.square(cells))
        assert b.profiles["gradwatch/cell/adjoint"] == pytest.approx(theirs, rel=1e-5)
        theirs = a.profiles["gradwatch/rnn/l0/direct"]
        mine = b.profiles["gradwatch/cell/direct"]
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_the_radius_of_a_step_is_that_of_its_jacobian(name):
    torch.manual_seed(0)
    net = Stepped(CELLS[name](INPUTS, UNITS), UNITS, 4).double()
    radii = []
    x, _ = batch(0)
    state = start(net.cell, B, UNITS, x)
    for t in range(T):
        before, state = state, net.cell(x[t], state)
        if t not in (1, T // 2, T - 1):
            continue
        for i in range(B):
            row = tuple(part[i : i + 1].detach() for part in before)
            jacobian = torch.autograd.functional.jacobian(
                lambda *parts, t=t, i=i: net.cell(x[t, i : i + 1], parts), row
            )
            blocks = [torch.cat([p[0, :, 0] for p in line], 1) for line in jacobian]
            radii.append(torch.linalg.eigvals(torch.cat(blocks)).abs().max())
    watch = train(net, READS["last"], steps=1, cells=[CELLS[name]])
    rho = watch.latest["gradwatch/cell/rho_step"]
    assert rho == pytest.approx(torch.stack(radii).median().item(), rel=0.02)
    exact = np.median([radius.item() for radius in radii])
    assert rho == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("name", CELLS)
def test_training_is_bitwise_what_it_was(name):
    def run(watched):
        torch.manual_seed(3)
        net = Stepped(CELLS[name](INPUTS, UNITS), UNITS, 4)
        net.head = nn.Sequential(nn.Dropout(0.3), net.head)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        watch = None
        if watched:
            options = {"every": 2, "budget": None, **OFF}
            watch = gradwatch.watch(net, cells=[CELLS[name]], **options)
        losses = []
        for step in range(6):
            x, y = batch(step, torch.float32)
            loss = READS["each"](net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if watch is not None:
            watch.close()
            assert not watch.health["failed"]
            assert "gradwatch/cell/horizon" in watch.latest
        return losses, net.state_dict(), torch.get_rng_state()

    plain, watched = run(False), run(True)
    assert plain[0] == watched[0]
    assert all(torch.equal(watched[1][k], v) for k, v in plain[1].items())
    assert torch.equal(plain[2], watched[2])


@pytest.mark.parametrize("name", CELLS)
def test_a_healthy_cell_is_left_in_peace(name):
    torch.manual_seed(0)
    net = Stepped(CELLS[name](4, UNITS), UNITS, 4)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    source = torch.Generator().manual_seed(0)
    with gradwatch.watch(net, cells=[CELLS[name]], budget=None, **OFF) as watch:
        for _ in range(150):
            y = torch.randint(0, 4, (8, 16), generator=source)
            loss = READS["each"](net(one_hot(y, 4).float()), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert [a for a in watch.alerts if a.severity != "info"] == []
    assert loss.item() < 0.7


@pytest.mark.parametrize("name", ["cfc", "leaky"])
def test_a_cell_whose_steps_expand_is_named(name):
    torch.manual_seed(0)
    net = Stepped(CELLS[name](INPUTS, 32), 32, 4)
    with torch.no_grad():
        for weight in net.cell.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    options = {"steps": 8, "dtype": torch.float32, "lr": 1e-6}
    watch = train(net, READS["last"], cells=[CELLS[name]], **options)
    [alert] = [a for a in watch.alerts if a.kind == "exploding"]
    assert (alert.cause, alert.stream) == ("expansion", "cell")
    assert "nn.init.orthogonal_" in alert.message


def test_a_state_may_pass_through_other_modules():
    class Masked(nn.Module):
        """Masks the state between calls, and feeds the output back as input."""

        def __init__(self):
            super().__init__()
            self.cell, self.head = RNN(INPUTS, UNITS), nn.Linear(UNITS, INPUTS)

        def forward(self, steps):
            x, (h,) = torch.ones(B, INPUTS), (torch.zeros(B, UNITS),)
            for _ in range(steps):
                (h,) = self.cell(x, (0.5 * h,))
                x = self.head(h)
            return x

    torch.manual_seed(0)
    model = Masked()
    with gradwatch.watch(model, cells=[RNN], every=1, budget=None, **OFF) as watch:
        loss = model(7).square().mean()
        loss.backward()
        watch.flush()
    adjoint = watch.records[0].profiles["gradwatch/cell/adjoint"]

    states, x, h = [], torch.ones(B, INPUTS), torch.zeros(B, UNITS)
    for _ in range(7):
        (h,) = model.cell(x, (0.5 * h,))
        states.append(h)
        x = model.head(h)
    grads = torch.autograd.grad(x.square().mean(), states)
    assert adjoint == pytest.approx([g.norm().item() for g in grads], rel=1e-5)


def test_layers_that_share_a_cell_and_cut_states_are_chains_of_their_own():
    cell = RNN(UNITS, UNITS)
    model = nn.ModuleDict({"cell": cell})
    with gradwatch.watch(model, cells=[cell], every=1, budget=None, **OFF) as watch:
        x, low, high = (
            torch.randn(B, UNITS),
            torch.zeros(B, UNITS),
            torch.zeros(B, UNITS),
        )
        for t in range(6):
            if t == 2:
                low, high = low.detach(), high.detach()
            (low,) = cell(x, (low,))
            (high,) = cell(low, (high,))
        high.sum().backward()
        watch.flush()
    assert watch.records[0].facts.modules["cell"].T == 4
    assert len(watch.records[0].profiles["gradwatch/cell/adjoint"]) == 4


def test_the_graph_is_let_go_of():
    net = Stepped(LSTM(INPUTS, UNITS), UNITS, 4)
    seen = []
    handle = net.cell.register_forward_hook(
        lambda module, given, out: seen.append(weakref.ref(out[0]))
    )
    watch = gradwatch.watch(net, cells=[LSTM], every=1, budget=None, **OFF)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(2):
        x, y = batch(step, torch.float32)
        net(x)  # nobody trains on this one
        loss = READS["last"](net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del loss
    gc.collect()
    assert not [ref for ref in seen if ref() is not None]
    handle.remove()
    watch.close()


class Consumed(torch.autograd.Function):
    """Gives up what it has kept for its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.tanh()
        return ctx.kept

    @staticmethod
    def backward(ctx, grad):
        kept = ctx.kept
        del ctx.kept
        return grad * (1 - kept.square())


class Odd(RNN):
    """A tanh cell with something in it that must not be run twice."""

    def __init__(self, what):
        super().__init__(INPUTS, UNITS)
        self.what, self.seen = what, []
        if what == "module":
            self.u.register_full_backward_hook(lambda *given: self.seen.append(1))

    def forward(self, x, state):
        if self.what == "checkpoint":
            pre = checkpoint(self.u, state[0], use_reentrant=False)
        else:
            pre = self.u(state[0])
        pre = self.w(x) + pre
        new = Consumed.apply(pre) if self.what == "function" else pre.tanh()
        return (new + 0,)


def outside(h, what, seen):
    """What is done to a state between two calls."""
    if what == "hook":
        h.register_hook(lambda grad: seen.append(1))
    elif what == "retain":
        h.retain_grad()
    elif what == "in place":
        h.mul_(0.5)
    return h


OBSTACLES = {
    "function": "autograd.Function",
    "module": "autograd.Function or a backward hook",
    "checkpoint": "checkpointing",
    "hook": "hooks of your own",
    "retain": "hooks of your own",
    "in place": "changed in place",
    "round": "passes by the cell",
    "shape": "changes its shape",
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_would_notice_is_left_out_and_said(what):
    def run(watched):
        torch.manual_seed(0)
        cell, seen, kept = Odd(what), [], []
        model = nn.ModuleList([cell])
        watch = None
        if watched:
            options = {"every": 1, "budget": None, **OFF}
            watch = gradwatch.watch(model, cells=[Odd], **options)
        h = torch.zeros(B, UNITS)
        for _ in range(5):
            (new,) = cell(torch.ones(len(h), INPUTS), (h,))
            h = h + new if what == "round" else new
            h = outside(h[:-1] if what == "shape" else h, what, seen)
            kept.append(h)
        h.square().sum().backward()
        grads = [p.grad for p in cell.parameters()]
        if what == "retain":
            grads += [h.grad for h in kept]
        shown = None
        if watch is not None:
            watch.flush()
            shown = repr(watch), watch.records[0], watch.health["failed"]
            watch.close()
        return grads, len(seen) + len(cell.seen), shown

    plain, calls, _ = run(False)
    watched, more, (shown, record, failed) = run(True)
    assert all(map(torch.equal, plain, watched))
    assert more == calls
    assert OBSTACLES[what] in shown
    assert "gradwatch/0/horizon" not in record.metrics
    assert failed == {}


def test_what_lies_between_two_calls_is_not_run_either():
    cell, seen = RNN(INPUTS, UNITS), []
    model, options = nn.ModuleList([cell]), {"every": 1, "budget": None, **OFF}
    with gradwatch.watch(model, cells=[RNN], **options) as watch:
        h = torch.zeros(B, UNITS)
        for _ in range(4):
            (h,) = cell(torch.ones(B, INPUTS), (Consumed.apply(h) if h.grad_fn else h,))
            if h.grad_fn is not None:
                h.register_hook(lambda grad: seen.append(1))
        h.sum().backward()
        watch.flush()
        assert len(seen) == 4
        assert watch.records[0].facts.modules["0"].T == 4
        assert "left out" in watch.records[0].facts.modules["0"].replay
        assert watch.health["failed"] == {}


def test_one_cell_in_another_and_two_that_feed_each_other():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = RNN(INPUTS, UNITS)

        def forward(self, x, state):
            return self.inner(x, state)

    def adjoints(cells):
        torch.manual_seed(0)
        net = Stepped(Outer(), UNITS, 4)
        net.cell.parts = 1
        options = {"every": 1, "budget": None, **OFF}
        with gradwatch.watch(net, cells=cells, **options) as watch:
            READS["last"](net(batch(0, torch.float32)[0]), batch(0)[1]).backward()
            watch.flush()
            return watch.records[0].profiles

    alone, both = adjoints([RNN]), adjoints([RNN, Outer])
    assert both["gradwatch/cell/inner/adjoint"] == alone["gradwatch/cell/inner/adjoint"]
    assert both["gradwatch/cell/adjoint"] == alone["gradwatch/cell/inner/adjoint"]


def test_sequences_that_have_nothing_to_do_with_each_other_are_not_joined():
    torch.manual_seed(0)
    net, words = Stepped(RNN(INPUTS, UNITS), UNITS, 4), nn.Embedding(9, INPUTS)
    model = nn.ModuleDict({"net": net, "words": words})
    options = {"every": 1, "budget": None, **OFF}
    with gradwatch.watch(model, cells=[RNN], **options) as watch:
        tokens = torch.randint(0, 9, (2, 7, B))
        net(words(tokens[0]))  # as a validation might
        net(words(tokens[1]))[-1].square().sum().backward()
        watch.flush()
    assert watch.records[0].facts.modules["net.cell"].T == 7
    assert watch.records[0].metrics["gradwatch/net/cell/horizon"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_in_half_precision_are_measured_in_full(dtype):
    torch.manual_seed(0)
    net = Stepped(RNN(INPUTS, UNITS), UNITS, 4).to(dtype)
    watch = train(net, READS["last"], steps=1, dtype=dtype, lr=0.0, cells=[RNN])
    adjoint = watch.records[0].profiles["gradwatch/cell/adjoint"]
    assert all(0 < value < np.inf for value in adjoint[-5:])
    found = {f"gradwatch/cell/{name}" for name in ("horizon", "growth_log10", "h_norm")}
    assert found <= {*watch.latest}


def test_forwards_that_nobody_trains_on_are_let_go_of():
    net, seen = Stepped(RNN(INPUTS, UNITS), UNITS, 4), []
    net.cell.register_forward_hook(lambda m, x, out: seen.append(weakref.ref(out[0])))
    with gradwatch.watch(net, cells=[RNN], every=1, budget=None, **OFF):
        for _ in range(10):
            net(batch(0, torch.float32, steps=3)[0])
        gc.collect()
        assert sum(ref() is not None for ref in seen) <= 4 * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_steps_do_no_harm(reentrant):
    def run(watched):
        torch.manual_seed(0)
        cell, h = RNN(INPUTS, UNITS), torch.zeros(B, UNITS, requires_grad=True)
        model = nn.ModuleList([cell])

        def step(h):
            return cell(torch.ones(B, INPUTS), (h,))[0]

        watch = None
        if watched:
            options = {"every": 1, "budget": None, **OFF}
            watch = gradwatch.watch(model, cells=[RNN], **options)
        for _ in range(4):
            h = checkpoint(step, h, use_reentrant=reentrant)
        h.sum().backward()
        if watch is not None:
            watch.close()
        return [p.grad for p in cell.parameters()]

    plain, watched = run(False), run(True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_cell_beside_a_fused_module():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(INPUTS, UNITS)
            self.own = Stepped(LSTM(UNITS, UNITS), UNITS, 4)

        def forward(self, x):
            return self.own(self.rnn(x)[0])

    watch = train(Both().double(), READS["last"], cells=[LSTM])
    assert [s.kind for s in watch.streams] == ["GRU", "CELL"]
    assert {"gradwatch/rnn/l0/horizon", "gradwatch/own/cell/horizon"} <= {*watch.latest}
    facts = watch.records[0].facts
    assert facts.modules["own.cell"].T == T
    assert facts.streams["own.cell"].state_size == 2 * UNITS


def test_the_same_model_is_watched_once():
    net = Stepped(LSTM(INPUTS, UNITS), UNITS, 4)
    with gradwatch.watch(net, cells=[LSTM], **OFF) as watch:
        assert gradwatch.watch(net, cells=[LSTM], **OFF) is watch


def test_what_no_cell_is_is_refused():
    net = Stepped(LSTM(INPUTS, UNITS), UNITS, 4)
    with pytest.raises(TypeError, match=r"cells is .*LSTM; expected a list"):
        gradwatch.watch(net, cells=net.cell)
    with pytest.raises(TypeError, match=r"cells holds a str"):
        gradwatch.watch(net, cells=["LSTM"])
    with pytest.raises(ValueError, match="cells names GRU, which the model does not"):
        gradwatch.watch(net, cells=[GRU])
    with pytest.raises(ValueError, match=r"model\.cell takes a state.*cells=\[LSTM\]"):
        gradwatch.watch(net)
    with pytest.raises(ValueError, match=r"cells=\[ItsClass\]"):
        gradwatch.watch(nn.Linear(2, 2))


def test_arnoldi_is_exact_once_it_spans_the_space():
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 8, dtype=torch.float64)
    start_at = torch.randn(3, 8, dtype=torch.float64)
    found = krylov.arnoldi(
        lambda v: torch.einsum("bij,bj->bi", matrices, v), start_at, most=20
    )
    assert found.shape == (3, 9, 8)
    exact = torch.linalg.eigvals(matrices).abs().amax(1).median().item()
    assert krylov.ritz_radius(found.numpy()) == pytest.approx(exact, rel=1e-9)


def test_a_radius_that_has_not_converged_is_none():
    torch.manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0][None]
    found = krylov.arnoldi(
        lambda v: torch.einsum("bij,bj->bi", matrix, v), torch.randn(1, 200).double(), 6
    )
    assert krylov.ritz_radius(found.numpy()) is None
    assert krylov.ritz_radius(np.full((1, 3, 2), np.nan)) is None
    nothing = krylov.arnoldi(torch.zeros_like, torch.ones(1, 4), 3)
    assert krylov.ritz_radius(nothing.numpy()) == 0


# ---- what a cell tells of its gates


class ToldLSTM(LSTM):
    """Tells what nn.LSTM is known to have."""

    def gradwatch_gates(self, x, state):
        h, _ = state
        i, f, g, o = (self.w(x) + self.u(h)).chunk(4, -1)
        u = self.u.weight.chunk(4)
        return {
            "i": ("sigmoid", i.sigmoid(), u[0]),
            "f": ("sigmoid", f.sigmoid(), u[1]),
            "g": ("tanh", g.tanh(), u[2]),
            "o": ("sigmoid", o.sigmoid(), u[3]),
        }


class ToldGRU(GRU):
    def gradwatch_gates(self, x, state):
        [h] = state
        given, carried = self.w(x).chunk(3, -1), self.u(h).chunk(3, -1)
        r, z = (
            torch.sigmoid(a + b) for a, b in zip(given[:2], carried[:2], strict=True)
        )
        n = torch.tanh(given[2] + r * carried[2])
        u = self.u.weight.chunk(3)
        return {
            "r": ("sigmoid", r, u[0]),
            "z": ("sigmoid", z, u[1]),
            "n": ("tanh", n, u[2]),
        }


class ToldRelu(RNN):
    """Of one gate, without a name of its own in nn.RNN."""

    def forward(self, x, state):
        return (torch.relu(self.w(x) + self.u(state[0])),)

    def gradwatch_gates(self, x, state):
        return {"h": ("relu", self.forward(x, state)[0], self.u.weight)}


TOLD = ("rho", "sigma_max", "orthogonality", "rho_certified", "act_deriv")
MORE = ("act_deriv_rms", "shut", "open", "saturated")


def run(model, steps=6, **how):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    with gradwatch.watch(model, every=1, budget=None, **how, **OFF) as watch:
        for step in range(steps):
            x, y = batch(step)
            optimizer.zero_grad()
            READS["each"](model(x), y).backward()
            optimizer.step()
    assert watch.health["failed"] == {}
    return watch


@pytest.mark.parametrize(
    ("fused", "cell", "gates"),
    [(nn.LSTM, ToldLSTM, "ifgo"), (nn.GRU, ToldGRU, "rzn")],
)
def test_of_gates_that_are_told_all_is_known_that_is_of_pytorchs_own(
    fused, cell, gates
):
    known, own = twins(fused, cell)
    theirs, mine = run(known).records, run(own, cells=[cell]).records
    tanh = gates[2]
    keys = [f"{m}{g}" for m in TOLD for g in ("", *(f"/{gate}" for gate in gates))]
    keys += [f"{m}/{g}" for m in MORE[1:3] for g in gates if g != tanh]
    keys += [f"act_deriv_rms/{g}" for g in gates] + [f"saturated/{tanh}"]
    keys += ["shut", "open", "act_deriv_rms", "rho_total_drift", "rho_trend"]
    for key in keys:
        expected = theirs.series(f"gradwatch/rnn/l0/{key}")
        found = mine.series(f"gradwatch/cell/{key}")
        assert len(expected[0]) >= 1, key
        np.testing.assert_array_equal(found[0], expected[0], err_msg=key)
        np.testing.assert_allclose(
            found[1], expected[1], rtol=1e-5, atol=1e-9, err_msg=key
        )


def test_a_told_relu_has_a_slope_and_a_radius():
    torch.manual_seed(0)
    model = Stepped(ToldRelu(INPUTS, UNITS), UNITS, 4).double()
    radius = torch.linalg.eigvals(model.cell.u.weight).abs().max().item()
    watch = run(model, cells=[ToldRelu])
    assert watch.records[0].metrics["gradwatch/cell/rho/h"] == pytest.approx(radius)
    assert 0.2 < watch.records[0].metrics["gradwatch/cell/act_deriv/h"] < 0.8
    assert "gradwatch/cell/rho_eff" not in watch.latest
    assert not any(alert.kind == "drift" for alert in watch.alerts)


def test_to_be_told_of_gates_changes_nothing():
    class Draws(ToldLSTM):
        def gradwatch_gates(self, x, state):
            torch.rand(3)
            return super().gradwatch_gates(x, state)

    losses = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Stepped(Draws(INPUTS, UNITS), UNITS, 4).double()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        if watched:
            gradwatch.watch(model, cells=[Draws], every=1, budget=None, **OFF)
        run_losses = []
        for step in range(5):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = READS["each"](nn.functional.dropout(model(x), 0.1), y)
            loss.backward()
            optimizer.step()
            run_losses.append(loss.item())
        losses.append(run_losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([], "returned a list; expected a dict"),
        ({"f": 3.0}, "for 'f'; expected a dict"),
        ({"f/g": ("tanh", torch.ones(6, 2))}, "names a gate 'f/g'"),
        ({"f": ("sine", torch.ones(6, 2))}, "the nonlinearity 'sine' for 'f'"),
        ({"f": ("tanh", torch.ones(2))}, r"shape \(2,\) for 'f'"),
        ({"f": ("tanh", torch.ones(6, 2), torch.ones(2, 3))}, "the square one"),
    ],
)
def test_what_is_told_wrongly_is_named_and_the_flow_measured(
    told, words, monkeypatch, caplog
):
    monkeypatch.setenv("GRADWATCH_STRICT", "0")
    torch.manual_seed(0)
    model = Stepped(ToldLSTM(INPUTS, UNITS), UNITS, 4).double()
    model.cell.gradwatch_gates = lambda *_: told
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    with gradwatch.watch(model, cells=[LSTM], every=1, budget=None, **OFF) as watch:
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            READS["each"](model(x), y).backward()
            optimizer.step()
    assert re.search(words, watch.health["failed"]["gates"])
    assert "gradwatch/cell/horizon" in watch.latest
