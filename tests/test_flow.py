"""Vanishing and exploding through time, on real runs: sick ones and their twins."""

import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.facts import NO_FACTS, Facts, ModuleFacts
from gradwatch.kinds.growth import Growth
from gradwatch.kinds.vanishing import Vanishing
from gradwatch.record import StepRecord
from testbed.training import classifier, digit_batches
from tests.test_kinds import stream


class Recall(nn.Module):
    """Reads a sequence of four inputs and has to tell the first one of some step."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 32, **options)
        self.head = nn.Linear(32, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


def forget(model, bias):
    with torch.no_grad():
        model.rnn.bias_ih_l0[32:64] = bias
        model.rnn.bias_hh_l0[32:64] = 0


def orthogonal(model):
    nn.init.orthogonal_(model.rnn.weight_hh_l0)


FAR = {
    "LSTM": (nn.LSTM, 60, lambda model: None),
    "GRU": (nn.GRU, 80, lambda model: None),
    "RNN": (nn.RNN, 60, lambda model: None),
    "LSTM, forget bias -6": (nn.LSTM, 40, lambda model: forget(model, -6.0)),
}
REACHED = {
    "LSTM, forget bias 4": (nn.LSTM, 60, lambda model: forget(model, 4.0)),
    "orthogonal RNN": (nn.RNN, 40, orthogonal),
    "LSTM, 8 steps": (nn.LSTM, 8, lambda model: None),
}


def recall(kind, length, change, *, steps, at, seed=0):
    torch.manual_seed(seed)
    model = Recall(kind)
    change(model)
    optimizer, alarms = torch.optim.Adam(model.parameters(), 1e-3), []
    with gradwatch.watch(model, dir=None, on_alert=alarms.append) as watch:
        for _ in range(steps):
            x = torch.randn(length, 16, 4)
            optimizer.zero_grad()
            (model(x) - x[at, :, :1]).square().mean().backward()
            optimizer.step()
        watch.flush()
        found = [i for i in watch.incidents if i.kind == "vanishing"]
    return found, alarms


@pytest.mark.parametrize("name", FAR)
def test_far_recall_is_a_notice_at_the_first_probe(name):
    found, alarms = recall(*FAR[name], steps=60, at=0)
    [incident] = found
    assert incident.severity == "info" and incident.until is None
    assert incident.since == 0 and incident.alerts[0].step == 0
    assert "steps back" in incident.alerts[0].message and alarms == []


@pytest.mark.parametrize("name", REACHED)
def test_gradients_that_reach_the_first_steps_are_silent(name):
    assert recall(*REACHED[name], steps=60, at=0) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAR)
def test_far_recall_is_an_alarm_once_the_weights_have_travelled(name, seed):
    found, alarms = recall(*FAR[name], steps=900, at=0, seed=seed)
    assert [a.kind for a in alarms] == ["vanishing"]
    # A shut gate does not open by itself, so that it waits for less.
    first, last = (95, 700) if "-6" in name else (595, 880)
    assert found[0].until is None and first <= alarms[0].step <= last


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*FAR, *REACHED])
def test_what_does_not_need_the_far_past_is_never_an_alarm(name, seed):
    at = -2 if name in FAR else 0
    found, alarms = recall(*(FAR | REACHED)[name], steps=560, at=at, seed=seed)
    assert alarms == [] and [i for i in found if i.until is None] == []


@pytest.mark.slow
@pytest.mark.parametrize("warm_up", [0, 500, 1000])
@pytest.mark.parametrize("rate", [1e-4, 1e-3, 3e-3])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_nets_that_open_by_themselves_are_never_an_alarm(kind, rate, warm_up):
    if warm_up and rate != 1e-3:
        pytest.skip("warm-up is tried at one rate")
    model, alarms = classifier(kind, hidden=64), []
    optimizer = torch.optim.Adam(model.parameters(), rate)
    loss_fn = nn.CrossEntropyLoss()
    with gradwatch.watch(model, dir=None, on_alert=alarms.append) as watch:
        for step, (x, y) in enumerate(digit_batches(1500, batch=32)):
            if warm_up:
                optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / warm_up)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        found = [i for i in watch.incidents if i.kind == "vanishing"]
    assert alarms == [] and [i for i in found if i.until is None] == []


# ---- growth


def exact_growth(model, x):
    """log10 of the largest root-mean-square growth of the Jacobian products."""
    weight = model.rnn.weight_hh_l0.detach().double()
    best = 0.0
    with torch.no_grad():
        active = (model.rnn(x)[0] > 0).double()
    for row in range(x.shape[1]):
        product, log = torch.eye(32, dtype=torch.float64), 0.0
        for t in range(len(x) - 1, -1, -1):
            product = product @ (active[t, row][:, None] * weight)
            size = product.norm().item()
            if size == 0:
                break
            best = max(best, log + math.log10(size / math.sqrt(32)))
            product, log = product / size, log + math.log10(size)
    return best


def relu(gain, scaled_at, scale, seed):
    """Train a ReLU RNN; return the alarms and the largest exact growth."""
    torch.manual_seed(seed)
    model = Recall(nn.RNN, nonlinearity="relu")
    nn.init.orthogonal_(model.rnn.weight_hh_l0, gain)
    optimizer, growth = torch.optim.Adam(model.parameters(), 1e-3), 0.0
    with gradwatch.watch(model, dir=None) as watch:
        for step in range(scaled_at + 12):
            if step == scaled_at:
                with torch.no_grad():
                    model.rnn.weight_hh_l0.mul_(scale)
            x = torch.randn(40, 16, 4)
            if scaled_at <= step < scaled_at + 6:
                growth = max(growth, exact_growth(model, x))
            optimizer.zero_grad()
            (model(x) - x[0, :, :1]).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        watch.flush()
        alarms = [a for a in watch.alerts if a.severity != "info"]
    return alarms, growth


def growth_is_found(gain, scaled_at, scale, seeds):
    judged = 0
    for seed in seeds:
        alarms, growth = relu(gain, scaled_at, scale, seed)
        if growth >= 3.5:
            judged += 1
            [alarm] = [a for a in alarms if a.kind == "exploding"][:1]
            assert alarm.step <= scaled_at + 5 and alarm.stream == "rnn.l0"
            assert "gradwatch/rnn/l0/growth_log10" in alarm.evidence
        elif growth < 2:
            assert alarms == []
    return judged


def test_growth_through_time_is_found_at_the_start_and_in_mid_run():
    assert growth_is_found(1.8, 0, 1.0, range(3)) >= 2
    assert growth_is_found(1.0, 60, 1.8, range(3)) >= 2


def test_a_gain_that_trains_is_silent():
    assert growth_is_found(1.1, 40, 1.0, range(2)) == 0


@pytest.mark.slow
def test_growth_through_time_on_thirty_seeds():
    assert growth_is_found(1.8, 0, 1.0, range(30)) >= 24
    assert growth_is_found(1.0, 60, 1.8, range(30)) >= 20
    assert growth_is_found(1.1, 40, 1.0, range(30)) == 0


# ---- the rules alone


def probes(values, *, every=10, ratio=0.0, signal=1.0, demand=0.02, length=60):
    for n, value in enumerate(values):
        key = "gradwatch/rnn/l0/"
        metrics = {
            f"{key}adjoint_log10": value,
            f"{key}demand": demand,
            f"{key}signal": signal,
            f"{key}update_ratio": ratio * every,
            f"{key}horizon": 12.0,
        }
        facts = NO_FACTS if n else Facts(modules={"rnn": ModuleFacts(T=length)})
        yield StepRecord(step=n * every, metrics=metrics, facts=facts)


def judge(rule, records):
    return [(a.severity, a.step) for r in records for a in rule.update(r)]


def test_vanishing_counts_how_far_the_weights_have_moved():
    moved = judge(Vanishing([stream()]), probes([-12.0] * 60, ratio=0.003))
    assert moved == [("info", 0), ("warning", 500)]
    still = judge(Vanishing([stream()]), probes([-12.0] * 60, ratio=0.0003))
    assert still == [("info", 0)]
    long = judge(Vanishing([stream()]), probes([-12.0] * 60, every=100))
    assert long == [("info", 0), ("warning", 3000)]


def test_a_net_that_forgets_what_it_had_reached_is_an_alarm_at_once():
    values = [-1.0] * 5 + [-8.0] * 8
    assert judge(Vanishing([stream()]), probes(values)) == [("warning", 90)]


@pytest.mark.parametrize("excuse", [{"signal": 0.3}, {"demand": 0.9}, {"length": 5}])
def test_what_excuses_a_gradient_that_does_not_reach_far(excuse):
    assert judge(Vanishing([stream()]), probes([-12.0] * 60, ratio=1, **excuse)) == []


def test_one_exact_zero_counts_as_vanished():
    rule = Vanishing([stream()])
    assert judge(rule, probes([-math.inf] * 3)) == [("info", 0)] and rule.active
    assert rule.wishes is None
    assert rule.update(StepRecord(step=35)) == [] and rule.wishes == "flow"


def test_growth_is_confirmed_unless_it_is_large():
    def rise(values):
        rule, found = Growth([stream()]), []
        for step, value in enumerate(values):
            metrics = {"gradwatch/rnn/l0/growth_log10": value}
            alerts = rule.update(StepRecord(step=step, metrics=metrics))
            found += [(a.kind, a.severity, a.step) for a in alerts]
        return rule, found

    assert rise([4.1])[1] == [("exploding", "error", 0)]
    assert rise([2.8, 2.8, 1.0, 2.8])[1] == []
    rule, found = rise([2.8, 2.8, 2.8, 1.0, 1.0])
    assert found == [("exploding", "error", 2)] and rule.active
    assert not rise([2.8, 2.8, 2.8, 1.0, 1.0, 1.0])[0].active
    assert rise([2.8])[0].wants == "flow"
    assert rise([2.8, 2.8])[0].wants is None
