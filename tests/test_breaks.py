"""Where a NaN comes from, and weights that no optimizer moves."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import _torch
from gradwatch.hooks import breaks

NAN = float("nan")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.rnn = nn.Linear(3, 4), nn.LSTM(4, 5)
        self.head = nn.Linear(5, 1)

    def forward(self, x, change=lambda x: x):
        return self.head(self.rnn(change(self.gate(x)))[0][-1])


def looked_at(make):
    """What is found as backward comes to the first weight."""
    torch.manual_seed(0)
    net, found = Net(), []
    loss = make(net, torch.randn(6, 2, 3))

    def first(p):
        if not found:
            found.append(breaks.first(loss))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(first)
    loss.backward()
    return found[0]


def broken_data(net, x):
    x[2, 1, 0] = NAN
    return net(x).sum()


def broken_weight(net, x):
    with torch.no_grad():
        net.rnn.weight_hh_l0[0, 0] = NAN
    return net(x).sum()


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (broken_data, "data"),
        (broken_weight, "weights"),
        (lambda net, x: net(x, lambda x: x.log()).sum(), "forward: Linear nan"),
        (lambda net, x: net(x, lambda x: (1e4 * x).exp()).sum(), "forward: Exp inf"),
        (lambda net, x: mse_loss(net(x), torch.full((2, 1), NAN)), "loss"),
        (lambda net, x: net(x).sum(), "loss"),
        (lambda net, x: checkpoint(net, x, use_reentrant=False).sum(), ""),
    ],
)
def test_what_is_the_first_not_to_be_finite(make, found):
    told = looked_at(make)
    if found.startswith("forward: Linear"):
        assert told.startswith("forward: ") and told.endswith(" nan")
    else:
        assert told == found


def test_graphs_that_are_made_again_are_known_at_once(monkeypatch):
    """Objects are gone through only where there is one, or it is not yet known."""
    x = torch.randn(3, requires_grad=True)
    gc.collect()
    assert not _torch.recomputes()
    scans, all_objects = [], gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: scans.append(1) or all_objects())
    for count in (1, 3):
        assert not _torch.recomputes() and scans == []
        made = [checkpoint(torch.sin, x, use_reentrant=False) for _ in range(count)]
        assert _torch.recomputes() and scans == [1]
        sum(made).sum().backward()
        made.clear()
        gc.collect()
        assert not _torch.recomputes()
        scans.clear()
    monkeypatch.setattr(_torch, "_GIL", lambda: False)  # counts may not be exact there
    assert not _torch.recomputes() and scans == [1]


def test_a_checkpointed_training_goes_on_from_a_nan_as_it_would_without_a_watch():
    def losses(watched):
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        watch = gradwatch.watch(net, dir=None, wandb=None) if watched else None
        for step in range(8):
            x = torch.randn(6, 2, 3)
            x[0, 0, 0] = NAN if step == 3 else 0.0
            optimizer.zero_grad()
            loss = checkpoint(net, x, use_reentrant=False).square().mean()
            loss.backward()
            if step != 3:
                optimizer.step()
            yield loss.item()
        if watch is not None:
            watch.close()
            assert watch.health["failed"] == {}

    assert str([*losses(True)]) == str([*losses(False)])


def idle(steps, step, clears=True):
    torch.manual_seed(0)
    net = Net()
    with gradwatch.watch(net, dir=None, wandb=None, budget=None) as watch:
        for i in range(steps):
            if clears:
                net.zero_grad()
            net(torch.randn(6, 2, 3)).square().mean().backward()
            step(net, i)
    seen = [r.facts.run.unchanged for r in watch.records]
    return [a.cause for a in watch.alerts if a.kind == "not_updating"], seen


def by_hand(net, step):
    for p in net.parameters():
        p.data.sub_(0.1 * p.grad)


def test_weights_that_nobody_updates_are_told_apart_from_those_updated_by_hand():
    causes, seen = idle(130, lambda net, step: None)
    assert causes == ["no_step"] and max(n or 0 for n in seen) >= 100
    causes, seen = idle(130, by_hand)
    assert causes == [] and not any(seen)


def test_gradients_that_nobody_clears_or_uses_are_recorded_all_the_same():
    causes, seen = idle(210, lambda net, step: None, clears=False)
    assert causes == ["no_step"] and len(seen) == 2


def test_an_optimizer_that_comes_late_is_no_fault():
    made = []

    def step(net, i):
        if i % 40 == 39:
            made.append(torch.optim.SGD(net.parameters(), 0.1))
            made[-1].step()

    causes, _ = idle(130, step)
    assert causes == []
