"""Real runs: sick ones raise one alarm of one kind in time, healthy ones raise none."""

import pytest
import torch
from torch import nn

import gradwatch
from testbed.models import Tagger
from testbed.training import (
    adding_batches,
    classifier,
    digit_batches,
    faster,
    inflated,
    learn,
)

BREAKS_AT = 40


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr, **options)


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr)


def squared(predicted, wanted):
    return (predicted[:, 0] - wanted).square().mean()


def too_fast(kind):
    def run(seed):
        model = classifier(kind, seed=seed)
        optimizer = sgd(model)
        return model, {
            "optimizer": optimizer,
            "data": digit_batches(60, seed=seed),
            "at": BREAKS_AT,
            "change": faster(optimizer, 1000),
        }

    return run


def regression_too_fast(seed):
    torch.manual_seed(seed)
    model = Tagger(nn.LSTM(2, 48), 48, 1)
    optimizer = sgd(model)
    return model, {
        "optimizer": optimizer,
        "data": adding_batches(60, seed=seed),
        "loss_fn": squared,
        "at": BREAKS_AT,
        "change": faster(optimizer, 1000),
    }


def unstable(clip):
    def run(seed):
        model = classifier(nn.RNN, nonlinearity="relu", orthogonal=True, seed=seed)
        return model, {
            "optimizer": sgd(model, 0.01),
            "data": digit_batches(60, seed=seed),
            "clip": clip,
            "at": BREAKS_AT,
            "change": inflated(model, 3.0),
        }

    return run


SICK = {
    "LSTM, learning rate x 1000": too_fast(nn.LSTM),
    "GRU, learning rate x 1000": too_fast(nn.GRU),
    "RNN, learning rate x 1000": too_fast(nn.RNN),
    "regression, learning rate x 1000": regression_too_fast,
    "orthogonal ReLU RNN, weights x 3": unstable(None),
    "orthogonal ReLU RNN, weights x 3, clipped": unstable(1.0),
}


def one_alarm_in_time(name, seed):
    model, setup = SICK[name](seed)
    alarms = []
    with gradwatch.watch(model, dir=None, on_alert=alarms.append) as watch:
        learn(model, **setup)
        incidents = [i for i in watch.incidents if i.severity != "info"]
        assert len(incidents) == 1
        alarm, *worse = alarms  # a NaN makes it an error
        assert [one.kind for one in worse] in ([], ["nonfinite"])
        assert alarm.kind in ("exploding", "nonfinite", "lr_too_high")
        assert BREAKS_AT <= alarm.since <= alarm.step <= BREAKS_AT + 10
        assert incidents[0].until is None
        assert len(alarm.message.split("\n")) == 4
    return alarm


@pytest.mark.parametrize("name", SICK)
def test_a_run_that_diverges_raises_one_alarm(name):
    alarm = one_alarm_in_time(name, seed=0)
    if "learning rate" in name:
        said = "learning rate is too high" in alarm.message
        assert said or alarm.kind in ("nonfinite", "lr_too_high")
    elif "clipped" in name:
        assert "rho has grown by a tenth or more" in alarm.message
        assert "gradwatch/rnn/l0/growth_log10" in alarm.evidence


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", SICK)
def test_a_run_that_diverges_raises_one_alarm_on_every_seed(name, seed):
    one_alarm_in_time(name, seed)


def gated(kind, batch=64, optimizer=adam):
    def run(seed, steps):
        model = classifier(kind, seed=seed)
        return model, {
            "optimizer": optimizer(model),
            "data": digit_batches(steps, batch, seed),
        }

    return run


def orthogonal(nonlinearity, optimizer=adam, clip=None):
    def run(seed, steps):
        model = classifier(
            nn.RNN, nonlinearity=nonlinearity, orthogonal=True, seed=seed
        )
        return model, {
            "optimizer": optimizer(model),
            "data": digit_batches(steps, seed=seed),
            "clip": clip,
        }

    return run


def adding(seed, steps):
    torch.manual_seed(seed)
    model = Tagger(nn.LSTM(2, 48), 48, 1)
    return model, {
        "optimizer": adam(model),
        "data": adding_batches(steps, seed=seed),
        "loss_fn": squared,
        "clip": 1.0,
    }


HEALTHY = {
    "LSTM on digits": gated(nn.LSTM),
    "GRU on digits": gated(nn.GRU),
    "LSTM, tiny noisy batches": gated(nn.LSTM, batch=2, optimizer=sgd),
    "GRU, tiny noisy batches": gated(nn.GRU, batch=2),
    "orthogonal tanh": orthogonal("tanh"),
    "orthogonal ReLU, clip 1": orthogonal("relu", clip=1.0),
    "orthogonal ReLU, clip 1, SGD": orthogonal(
        "relu", lambda m: sgd(m, 0.01, momentum=0.9), clip=1.0
    ),
    "LSTM on the adding problem": adding,
}


def silent(name, seed, steps, lines):
    model, setup = HEALTHY[name](seed, steps)
    with gradwatch.watch(model, dir=None) as watch:
        learn(model, **setup)
        alarms = [a for a in watch.alerts if a.severity != "info"]
        assert alarms == []
        assert len(watch.records) == min(steps, 1024)
    assert len(lines) <= 3


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_raises_no_alarm(name, lines):
    silent(name, 0, 150, lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"),
    [(n, s) for n in HEALTHY for s in range(6 if "ReLU" in n else 3)],
)
def test_a_healthy_run_raises_no_alarm_on_every_seed(name, seed, lines):
    silent(name, seed, 500, lines)


def test_nan_at_step_five_is_said_once(lines):
    model = classifier(nn.LSTM)
    alarms = []

    def poisoned():
        for step, (x, y) in enumerate(digit_batches(20)):
            yield (x * torch.nan if step == 5 else x), y

    with gradwatch.watch(model, dir=None, on_alert=alarms.append) as watch:
        learn(model, adam(model), poisoned())
        assert [(a.kind, a.step, a.severity) for a in alarms] == [
            ("nonfinite", 5, "error")
        ]
        assert [a for a in watch.alerts if a.severity != "info"] == alarms
        assert "last finite at step 4: gradient norm" in alarms[0].message
        assert "at step 4" in alarms[0].message
    assert sum(level == "ERROR" for level, _ in lines) == 1


def test_rules_replayed_on_the_file_give_the_alerts_of_the_run(tmp_path):
    model, setup = unstable(1.0)(0)
    with gradwatch.watch(model, dir=tmp_path, name="run") as watch:
        learn(model, **setup)
        alerts = watch.alerts
    run = gradwatch.load(tmp_path / "run")
    from gradwatch.kinds.catalogue import CATALOGUE, default_rules
    from gradwatch.kinds.incidents import Incidents

    rules, incidents, replayed = default_rules(run.streams), Incidents(CATALOGUE), []
    for record in run.records:
        for rule in rules:
            for alert in rule.update(record):
                out, _ = incidents.take(alert)
                replayed += [out] if out is not None else []
    assert replayed == alerts == run.alerts

    def by_kind(incident):
        return incident.kind

    assert sorted(run.incidents, key=by_kind) == sorted(watch.incidents, key=by_kind)
