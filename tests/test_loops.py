"""Loops that look like a mistake and are none; and what explains what for how long."""

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.kinds.growth import Growth
from gradwatch.kinds.incidents import Incidents
from gradwatch.kinds.lr_too_high import LrTooHigh
from gradwatch.record import Alert, StepRecord, Stream

STREAM = Stream(
    name="rnn.l0",
    module="rnn",
    kind="GRU",
    layer=0,
    direction="forward",
    input_size=3,
    hidden_size=8,
    gates=("r", "z", "n"),
)


class Net(nn.Module):
    def __init__(self, inputs=3):
        super().__init__()
        self.rnn = nn.GRU(inputs, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


def by_data(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data.zero_()


def by_numpy(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.numpy()[...] = 0


def in_place(model):
    model.zero_grad(set_to_none=False)


def forgotten(model):
    """Clear nothing."""


def told(clear, steps=40):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
        for _ in range(steps):
            clear(model)
            model(torch.randn(6, 4, 3)).square().mean().backward()
            optimizer.step()
        hooks = [len(p._backward_hooks or ()) for p in model.parameters()]
        watch.flush()
    assert not any(hooks)
    return [a.kind for a in watch.alerts if a.severity != "info"]


@pytest.mark.parametrize("clear", [by_data, by_numpy, in_place, nn.Module.zero_grad])
def test_gradients_may_be_cleared_in_any_way(clear):
    assert told(clear) == []


def test_gradients_that_nobody_clears_are_told_of():
    assert told(forgotten) == ["not_cleared"]


@pytest.mark.parametrize("phase", [1, 12, 60])
def test_networks_that_take_turns_do_not_count_what_waits_for_the_other(phase):
    """As in a GAN: the generator's backward leaves gradients in the discriminator."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": Net(), "d": Net(1)})
    optimizers = {k: torch.optim.Adam(m.parameters(), 1e-3) for k, m in model.items()}
    with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
        for step in range(3 * phase if phase > 12 else 60):
            turn = "g" if (step // phase) % 2 else "d"
            optimizers[turn].zero_grad()
            made = model["g"](torch.randn(6, 4, 3)).expand(5, 4, 1)
            made = made if turn == "g" else made.detach()
            model["d"](made).square().mean().backward()
            optimizers[turn].step()
        watch.flush()
        norms = watch.records.series("gradwatch/grad_norm")[1]
    assert [a.kind for a in watch.alerts if a.severity != "info"] == []
    assert max(norms) < 50 * sorted(norms)[len(norms) // 2]


def test_one_hot_batches_are_told_apart_and_the_same_one_is_not():
    def notices(same):
        torch.manual_seed(0)
        model = Net(5)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        first = nn.functional.one_hot(torch.randint(5, (6, 4)), 5).float()
        with gradwatch.watch(model, dir=None, wandb=None, budget=None) as watch:
            for _ in range(60):
                fresh = nn.functional.one_hot(torch.randint(5, (6, 4)), 5).float()
                optimizer.zero_grad()
                model(first if same else fresh).square().mean().backward()
                optimizer.step()
            watch.flush()
        return [a.kind for a in watch.alerts if a.kind == "repeated_batch"]

    assert notices(True) == ["repeated_batch"] and notices(False) == []


# ---- incidents


def alert(kind, severity="warning", cause=None, step=0):
    return Alert(
        kind=kind, severity=severity, step=step, since=step, message="", cause=cause
    )


def test_what_was_explained_is_told_once_the_explanation_is_over():
    incidents = Incidents(CATALOGUE)
    assert incidents.take(alert("nonfinite", "error"))[0] is not None
    assert incidents.take(alert("exploding", "error", "chaos"))[0] is None
    assert incidents.left_behind({"exploding": True}) == []
    incidents.end(30, {"nonfinite": False, "exploding": True})
    [again] = incidents.left_behind({"exploding": True})
    assert incidents.take(again)[0] is not None
    assert incidents.left_behind({"exploding": True}) == []


def test_what_was_explained_and_is_over_stays_untold():
    incidents = Incidents(CATALOGUE)
    incidents.take(alert("nonfinite", "error"))
    incidents.take(alert("exploding", "error", "chaos"))
    incidents.end(30, {})
    assert incidents.left_behind({"exploding": False}) == []


def test_an_explanation_counts_also_where_a_notice_is_open():
    incidents = Incidents(CATALOGUE)
    incidents.take(alert("vanishing", "info", "small_radius"))
    incidents.take(alert("dead_units", "warning", "dead_relu"))
    assert incidents.take(alert("vanishing", "warning", "small_radius"))[0] is None
    incidents.end(9, {"vanishing": True})
    [again] = incidents.left_behind({"vanishing": True})
    assert incidents.take(again)[0].severity == "warning"


def test_a_stream_that_is_measured_no_more_holds_no_incident_open():
    grows = {"gradwatch/rnn/l0/growth_log10": 9.0}
    rule = Growth([STREAM])
    assert rule.update(StepRecord(step=0, metrics=grows)) and rule.active
    for step in range(1, 400):
        rule.update(StepRecord(step=step, metrics={}))
    assert not rule.active
    rule, ratio = LrTooHigh([STREAM]), {"gradwatch/rnn/l0/update_ratio": 0.5}
    for step in range(40):
        rule.update(
            StepRecord(step=step, metrics={"gradwatch/grad_norm": 1.0, **ratio})
        )
    assert rule.active
    for step in range(40, 100):  # frozen
        rule.update(StepRecord(step=step, metrics={"gradwatch/grad_norm": 1.0}))
    assert not rule.active
