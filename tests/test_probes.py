"""Odd ways to call a recurrent module: measured rightly, or left out with a reason."""

import gc
import math

import pytest
import torch
from torch import nn

import gradwatch
from testbed.models import Loop, Tagger, batches, lstm


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def watched(model, **options):
    return gradwatch.watch(
        model, **({"every": 1, "budget": None, "dir": None} | options)
    )


def alive(watch):
    """Captures that still hold copies."""
    gc.collect()
    found = [c for p in watch._engine._modules.probes for c in p._captures]
    return [c for c in found if c.weights or c.sequences is not None]


def test_an_optimizer_inside_backward_leaves_nothing_behind():
    model = lstm()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def now(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(now)
    with watched(model) as watch:
        for x in batches(6):
            model(x).square().mean().backward()
        assert alive(watch) == []


def test_gradients_that_nobody_accumulates_leave_nothing_behind():
    """autograd.grad, and gradients of the input alone."""
    model = lstm()
    with watched(model) as watch:
        for x in batches(6):
            loss = model(x).square().mean()
            torch.autograd.grad(loss, list(model.parameters()))
        del loss
        assert len(alive(watch)) <= 1
    model.requires_grad_(False)
    with watched(model) as watch:
        for x in batches(6):
            model(x.clone().requires_grad_()).square().mean().backward()
        assert len(alive(watch)) <= 1


def test_evaluation_with_gradients_on_leaves_nothing_behind():
    model = lstm()
    with watched(model) as watch:
        for x in batches(8):
            model(x)
        assert alive(watch) == []


@pytest.mark.parametrize("setting", ["cudnn.rnn", "cudnn.conv", "cudnn"])
def test_precision_settings_of_newer_torch_do_no_harm(setting):
    target = torch.backends
    for name in setting.split("."):
        target = getattr(target, name, None)
    if not hasattr(target, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    before = target.fp32_precision
    target.fp32_precision = "ieee"
    try:
        model = lstm()
        with watched(model) as watch:
            step(model, torch.optim.SGD(model.parameters(), 0.1), batches(1)[0])
            assert "gradwatch/rnn/l0/act_deriv" in watch.latest
    finally:
        target.fp32_precision = before


class WithLengths(nn.GRU):
    """Takes something else as its second argument."""

    def forward(self, x, lengths):
        return super().forward(x)


class Narrow(nn.GRU):
    """Returns a packed sequence of another width."""

    def forward(self, x, hx=None):
        out, last = super().forward(x, hx)
        return nn.utils.rnn.PackedSequence(out.data[:, :3], out.batch_sizes), last


class Both(nn.Module):
    def __init__(self, odd, call):
        super().__init__()
        self.plain, self.odd, self.call = nn.GRU(4, 8), odd, call

    def forward(self, x):
        odd = self.call(self.odd, x)
        odd = odd.data if isinstance(odd, nn.utils.rnn.PackedSequence) else odd
        return self.plain(x)[0].mean() + odd.mean()


@pytest.mark.parametrize(
    ("odd", "call", "why"),
    [
        (WithLengths(4, 8), lambda m, x: m(x, torch.ones(5))[0], "its first states"),
        (
            Narrow(4, 8),
            lambda m, x: m(nn.utils.rnn.pack_padded_sequence(x, torch.full((5,), 6)))[
                0
            ],
            "its output is not that",
        ),
    ],
)
def test_a_module_that_is_called_otherwise_is_left_out_alone(odd, call, why):
    model = Both(odd, call)
    with watched(model) as watch:
        step(model, torch.optim.SGD(model.parameters(), 0.1), batches(1)[0])
        text = repr(watch)
        assert watch.health["failed"] == {}
        assert "gradwatch/plain/l0/act_deriv" in watch.latest
        assert "gradwatch/odd/l0/act_deriv" not in watch.latest
    assert f"odd.l0: states left out (1 times): {why}" in text


def test_an_online_relu_cell_is_not_called_dead():
    """One state is seen a step, and about half of its units are 0."""
    torch.manual_seed(0)
    cell, head, alarms = nn.RNNCell(4, 32, nonlinearity="relu"), nn.Linear(32, 1), []
    model = nn.ModuleDict({"cell": cell, "head": head})
    optimizer, state = torch.optim.SGD(model.parameters(), 0.01), None
    with watched(model, on_alert=alarms.append):
        for x in torch.randn(40, 1, 4):
            state = cell(x, state)
            optimizer.zero_grad()
            head(state).square().mean().backward()
            optimizer.step()
            state = state.detach()
    assert alarms == []


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("longest", [784, 2000])
def test_chrono_for_long_memories_is_no_stuck_gate(kind, longest):
    torch.manual_seed(0)
    model, alarms = Tagger(kind(4, 64), 64), []
    with torch.no_grad():
        memory = torch.empty(64).uniform_(1, longest - 1).log()
        model.rnn.bias_hh_l0.zero_()
        model.rnn.bias_ih_l0[64:128] = memory
        if kind is nn.LSTM:
            model.rnn.bias_ih_l0[:64] = -memory
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watched(model, on_alert=alarms.append):
        for x in batches(12, length=100):
            step(model, optimizer, x)
    assert alarms == []


def test_two_losses_with_an_optimizer_each_are_both_measured():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.GRU(4, 8), "b": nn.GRU(4, 8)})
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in model.values()]
    with watched(model) as watch:
        for x in batches(4):
            losses = [m(x)[0].square().mean() for m in model.values()]
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        watch.flush()
        for name in ("a", "b"):
            assert f"gradwatch/{name}/l0/act_deriv" in watch.latest


def test_weights_that_were_only_lent_have_no_drift():
    model = lstm()
    with watched(model) as watch:
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        lent = {n: (1.03 * p) for n, p in model.named_parameters()}
        out = torch.func.functional_call(model, lent, (batches(1)[0],))
        out.square().mean().backward()
        optimizer.step()
        watch.flush()
        assert "gradwatch/rnn/l0/rho" in watch.latest
        assert "gradwatch/rnn/l0/rho_drift" not in watch.latest


def test_a_module_that_was_replaced_is_not_missed():
    model, alarms = lstm(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watched(model, on_alert=alarms.append) as watch:
        for n, x in enumerate(batches(90)):
            if n == 10:
                model.rnn = nn.LSTM(4, 8)
                optimizer = torch.optim.SGD(model.parameters(), 0.1)
                gc.collect()
            step(model, optimizer, x)
        assert watch.health["failed"] == {}
    assert alarms == []


def test_a_learning_rate_of_zero_in_a_tensor_is_seen_too():
    model, alarms = lstm(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.0))
    with watched(model, on_alert=alarms.append) as watch:
        for x in batches(54):
            step(model, optimizer, x)
        assert [i.kind for i in watch.incidents] == ["not_updating"]
    assert [alarm.cause for alarm in alarms] == ["frozen"]


def test_a_learned_first_state_that_is_returned_gathers_no_hooks():
    class Returns(nn.GRU):
        def __init__(self):
            super().__init__(4, 8)
            self.start = nn.Parameter(torch.zeros(1, 5, 8))

        def forward(self, x, hx=None):
            out, last = super().forward(x, self.start)
            return out, last, self.start

    model = Tagger(Returns(), 8)
    with watched(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x in batches(3):
            step(model, optimizer, x)
        assert not model.rnn.start._backward_hooks


def test_a_detached_state_that_asks_for_a_gradient_begins_a_new_chain():
    torch.manual_seed(0)
    model = nn.GRU(4, 8)
    with watched(model) as watch:
        state, losses = None, []
        for x in torch.randn(3, 5, 2, 4):
            out, state = model(x, state)
            losses.append(out.square().mean())
            state = state.detach().requires_grad_()
        torch.stack(losses).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        watch.flush()
        assert watch.records[0].facts.modules["gru"].T == 5


def test_a_state_carried_from_step_to_step_is_a_truncation_notice():
    torch.manual_seed(0)
    model, alarms = nn.GRU(4, 8), []
    optimizer, state = torch.optim.SGD(model.parameters(), 0.01), None
    with watched(model, on_alert=alarms.append) as watch:
        for x in torch.randn(6, 20, 2, 4):
            out, state = model(x, state)
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            state = state.detach()
        assert "gru.l0: its state is detached every 20 steps" in repr(watch)
        kinds = [a.kind for a in watch.alerts]
        assert kinds.count("truncated") == 1 and alarms == []
        assert (
            "detached every 20 steps" in watch.alerts[kinds.index("truncated")].message
        )


def test_a_fresh_first_state_is_no_truncation():
    torch.manual_seed(0)
    model = nn.GRU(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watched(model) as watch:
        for x in torch.randn(6, 20, 2, 4):
            out, last = model(x, torch.zeros(1, 2, 8))
            del last
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            del out
        assert [a.kind for a in watch.alerts if a.kind == "truncated"] == []


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_the_flow_of_a_cell_in_a_loop(cell):
    torch.manual_seed(0)
    model = Loop(cell(4, 8), 8)
    with watched(model) as watch:
        step(model, torch.optim.SGD(model.parameters(), 0.1), batches(1)[0])
        watch.flush()
        profile = watch.records[0].profiles["gradwatch/cell/adjoint"]
        assert len(profile) == 6 and all(map(math.isfinite, profile))
        assert watch.latest["gradwatch/cell/demand"] == pytest.approx(1 / 6)


def test_where_the_end_of_backward_is_not_called_back_the_optimizer_stands_in(
    monkeypatch,
):
    """As under compiled autograd: states, spectrum and flow come a little later."""
    monkeypatch.setattr("gradwatch._torch.AfterBackward.__call__", lambda self: True)
    torch.manual_seed(0)
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watched(model) as watch:
        for x in batches(3):
            step(model, optimizer, x)
        watch.flush()
        assert len(watch.records) == 3 and watch.health["failed"] == {}
        for metric in ("grad_norm_hh", "act_deriv", "rho", "rho_drift", "horizon"):
            steps, _ = watch.records.series(f"gradwatch/rnn/l0/{metric}")
            assert steps.tolist() == [0, 1, 2], metric
