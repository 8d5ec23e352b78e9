"""The rules of what surrounds the recurrence, on records made for them."""

import random

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.facts import Facts, ModuleFacts, RunFacts
from gradwatch.kinds import not_updating, text
from gradwatch.kinds.axes_mixed import AxesMixed
from gradwatch.kinds.not_learning import NotLearning
from gradwatch.kinds.not_updating import NOT_UPDATING
from gradwatch.kinds.saturated import Saturated
from gradwatch.kinds.seen import Outside
from gradwatch.record import StepRecord, Stream
from gradwatch.rules import replay

RNN = Stream(
    name="rnn.l0",
    module="rnn",
    layer=0,
    direction="forward",
    kind="RNN_TANH",
    input_size=3,
    hidden_size=8,
    gates=(),
)


def losses(values, constant=1.386):
    for step, loss in enumerate(values):
        metrics = {"gradwatch/grad_norm": 1.0, "gradwatch/loss": loss}
        if step % 50 == 0 and constant is not None:
            metrics["gradwatch/loss_constant"] = constant
        yield StepRecord(step=step, metrics=metrics)


def noisy(count, mean=1.386, seed=0):
    drawn = random.Random(seed)
    return [mean * (1 + 0.02 * drawn.gauss(0, 1)) for _ in range(count)]


def told(records, rule):
    return [(a.step, a.severity) for a in replay(records, [RNN], rules=[rule([RNN])])]


def test_a_loss_at_chance_is_a_notice_first_and_an_alarm_in_the_end():
    assert told(losses(noisy(3100)), NotLearning) == [(200, "info"), (3000, "warning")]


def test_a_plateau_that_ends_is_no_alarm():
    values = noisy(900) + noisy(2500, 1.0)
    assert told(losses(values), NotLearning) == [(200, "info")]
    rule = NotLearning([RNN])
    replay(losses(values), [RNN], rules=[rule])
    assert not rule.active


def test_a_loss_of_no_known_targets_is_not_judged():
    assert told(losses(noisy(3100), None), NotLearning) == []


def looks(shares, **more):
    for look, share in enumerate(shares):
        metrics = {"gradwatch/rnn/l0/saturated": share, "gradwatch/loss": 1.0}
        yield StepRecord(step=25 * look, metrics=metrics | more)


@pytest.mark.parametrize(
    ("shares", "steps"),
    [
        ([0.95] * 6, [50]),
        ([0.95, 0.95, 0.7, 0.95, 0.95, 0.95, 0.95], [125]),
        ([0.85] * 8, []),
        ([0.1, 0.2, 0.95, 0.95, 0.95], [100]),
    ],
)
def test_saturation_is_told_once_it_has_lasted(shares, steps):
    assert [step for step, _ in told(looks(shares), Saturated)] == steps


def test_a_share_without_any_gradient_counts_for_more():
    zero = {"gradwatch/rnn/l0/grad_norm_hh": 0.0}
    assert [step for step, _ in told(looks([0.75] * 4, **zero), Saturated)] == [50]
    assert told(looks([0.75] * 4), Saturated) == []


def of_module(step, **facts):
    modules = {"rnn": ModuleFacts(T=20, B=16, **facts)}
    return StepRecord(step=step, facts=Facts(modules=modules))


def test_a_look_that_cannot_tell_does_not_end_an_incident_of_axes():
    rule = AxesMixed([RNN])
    records = [of_module(0, input_order="batch")]
    records += [StepRecord(step=step) for step in range(1, 15)]
    records += [of_module(15), *(StepRecord(step=step) for step in range(16, 20))]
    assert len(replay(records, [RNN], rules=[rule])) == 1 and rule.active
    replay([of_module(200)], [RNN], rules=[rule])
    assert not rule.active


def test_what_was_done_beside_the_steps_is_remembered():
    outside = Outside()
    outside.take(StepRecord(step=7, events=("lr: 0.003 -> 3 of group 1",)))
    outside.take(StepRecord(step=9, events=("lr: 3 -> 0.1", "written:rnn.l0")))
    assert outside.rise == "the learning rate went from 0.003 to 3 of group 1 at step 7"
    assert outside.was_raised(57) and not outside.was_raised(58)
    assert outside.was_written(59) and not outside.was_written(60)
    late = Facts(run=RunFacts(written_late=True))
    outside.take(StepRecord(step=10, facts=late))
    assert outside.late


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


def test_a_part_that_is_updated_by_hand_is_none_that_no_optimizer_holds():
    def alarms(by_hand):
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.SGD(net.rnn.parameters(), 0.1)
        with gradwatch.watch(net, dir=None, wandb=None, budget=None) as watch:
            for _ in range(70):
                net.zero_grad()
                net(torch.randn(5, 4, 3)).square().mean().backward()
                optimizer.step()
                if by_hand:
                    with torch.no_grad():
                        for p in net.head.parameters():
                            p -= 0.1 * p.grad
        return [a.message for a in watch.alerts if a.kind == "not_updating"]

    [message] = alarms(by_hand=False)
    assert "model.get_parameter('head.weight')" in message
    assert alarms(by_hand=True) == []


def test_cells_in_a_plain_list_are_told_of():
    class Stack(nn.Module):
        def __init__(self, hold):
            super().__init__()
            self.head = nn.Linear(3, 1)
            self.cells = hold(nn.GRUCell(3, 3) for _ in range(2))

    with pytest.raises(ValueError, match=r"model\.cells holds modules that PyTorch"):
        gradwatch.watch(Stack(list), dir=None, wandb=None)
    gradwatch.watch(Stack(nn.ModuleList), dir=None, wandb=None).close()


def test_what_a_constant_has_is_not_told_of_a_step_of_several_passes():
    def told(passes):
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with gradwatch.watch(net, dir=None, wandb=None, budget=None) as watch:
            for _ in range(4):
                optimizer.zero_grad()
                for _ in range(passes):
                    x, y = torch.randn(5, 8, 3), torch.randint(2, (8,))
                    (nn.functional.cross_entropy(net(x), y) / passes).backward()
                optimizer.step()
        key = "gradwatch/loss_constant"
        return [r.metrics[key] for r in watch.records if key in r.metrics]

    assert told(1) and all(0.4 < constant < 0.75 for constant in told(1))
    assert told(3) == []


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_lines_to_paste_give_an_optimizer_all_weights(kind):
    def changed(named, given):
        """Train with the line of an alert; return who has moved since."""
        torch.manual_seed(0)
        model = Net()
        optimizer = kind(given(model), 0.1)
        exec(line_of(named), {"model": model, "optimizer": optimizer})
        before = [p.clone() for p in model.parameters()]
        model(torch.randn(5, 4, 3)).square().mean().backward()
        optimizer.step()
        pairs = zip(before, model.parameters(), strict=True)
        return [bool((a != b).any()) for a, b in pairs]

    def line_of(named):
        if named is None:
            return text.filled(NOT_UPDATING.causes["stale_parameters"].do, since=0)
        return not_updating.line_of(named)

    head = ["head.weight", "head.bias"]
    assert all(changed(None, lambda model: Net().parameters()))
    assert all(changed(head, lambda model: model.rnn.parameters()))
    every = [f"name{i}" for i in range(9)]
    assert all(changed(every, lambda model: [model.rnn.weight_hh_l0]))
