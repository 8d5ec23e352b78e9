"""Sick and healthy twins of the kinds that look inside the recurrence."""

import json
import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import saved
from gradwatch.facts import NO_FACTS, Facts, ModuleFacts
from gradwatch.kinds.catalogue import CATALOGUE, default_rules
from gradwatch.kinds.dead_units import DeadUnits
from gradwatch.kinds.drift import Drift
from gradwatch.kinds.gate_stuck import GateStuck
from gradwatch.kinds.incidents import Incidents
from gradwatch.kinds.latch import Hysteresis
from gradwatch.kinds.no_gradient import NoGradient
from gradwatch.kinds.not_updating import NotUpdating
from gradwatch.record import Alert, StepRecord, Stream
from testbed.models import Tagger
from testbed.training import classifier, digit_batches, learn


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr)


def watched(model, steps=40, optimizer=None, each=None, **setup):
    """Train on digits; return the watch and the alarms that it gave."""
    alarms = []
    optimizer = adam(model) if optimizer is None else optimizer
    # No budget: on a busy machine it would look more rarely.
    options = {"dir": None, "budget": None, "on_alert": alarms.append}
    with gradwatch.watch(model, **options) as watch:
        if each is None:
            learn(model, optimizer, digit_batches(steps), **setup)
        else:
            loss_fn = nn.CrossEntropyLoss()
            for step, (x, y) in enumerate(digit_batches(steps)):
                each(step)
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
    return watch, alarms


def others(watch):
    """The incidents, but for the notice that nets on 64 pixels begin with."""
    return [i for i in watch.incidents if i.kind != "vanishing"]


def only(alarms, kind, cause, stream):
    [alarm] = alarms
    assert (alarm.kind, alarm.cause, alarm.stream) == (kind, cause, stream)
    assert alarm.severity == "warning" and len(alarm.message.split("\n")) == 4
    return alarm


# ---- dead units


@pytest.mark.parametrize("seed", range(3))
def test_an_irnn_on_digits_dies(seed):
    model = classifier(nn.RNN, nonlinearity="relu", seed=seed)
    nn.init.eye_(model.rnn.weight_hh_l0)
    for bias in (model.rnn.bias_ih_l0, model.rnn.bias_hh_l0):
        nn.init.zeros_(bias)
    nn.init.normal_(model.rnn.weight_ih_l0, std=1e-3)
    _, alarms = watched(model)
    dead = [a for a in alarms if a.kind == "dead_units"]
    assert only(dead, "dead_units", "dead_relu", "rnn.l0").step <= 9


def test_biases_that_fall_in_mid_training_are_found_one_step_after_they_are_seen():
    model = classifier(nn.RNN, nonlinearity="relu", orthogonal=True)

    def sink():
        with torch.no_grad():
            model.rnn.bias_ih_l0.fill_(-9.0)

    watch, alarms = watched(model, 110, at=70, change=sink, clip=1.0)
    alarm = only(alarms, "dead_units", "dead_relu", "rnn.l0")
    assert (alarm.since, alarm.step) == (100, 101)
    assert others(watch)[0].until is None
    assert "gradwatch.init.orthogonal_(model" in alarm.message


# ---- stuck gates


@pytest.mark.parametrize(
    ("kind", "gate", "bias", "cause"),
    [
        (nn.LSTM, 0, -9.0, "input_gate"),
        (nn.LSTM, 3, -9.0, "output_gate"),
        (nn.GRU, 1, 9.0, "update_gate"),
    ],
)
def test_a_gate_that_is_held_shut_is_stuck(kind, gate, bias, cause):
    model = classifier(kind)
    with torch.no_grad():
        model.rnn.bias_ih_l0[gate * 48 : (gate + 1) * 48] = bias
    _, alarms = watched(model)
    alarm = only(alarms, "gate_stuck", cause, "rnn.l0")
    assert alarm.step == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("seed", range(3))
def test_gates_that_are_set_to_remember_are_not_stuck(kind, seed):
    """Chrono initialisation for 64 steps, Tallec & Ollivier (2018)."""
    model = classifier(kind, seed=seed)
    with torch.no_grad():
        memory = torch.empty(48).uniform_(1, 63).log()
        model.rnn.bias_hh_l0.zero_()
        model.rnn.bias_ih_l0[48:96] = memory
        if kind is nn.LSTM:
            model.rnn.bias_ih_l0[:48] = -memory
    watch, alarms = watched(model)
    assert alarms == [] and others(watch) == []


# ---- no gradient


class Reader(nn.Module):
    """A bidirectional net that is read in one of three ways."""

    def __init__(self, read, kind=nn.GRU):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(1, 16, bidirectional=True)
        self.spare = kind(1, 16)
        self.head = nn.Linear(32, 10)
        self.read = read

    def forward(self, x):
        out, last = self.rnn(x)
        if self.read == "last output":
            return self.head(out[-1])
        h_n = last[0] if isinstance(last, tuple) else last
        both = torch.cat([h_n[0], h_n[1]], 1)
        if self.read == "detached":
            both = both.detach()
        return self.head(both)


def one_module(read, kind=nn.GRU):
    model = Reader(read, kind)
    del model.spare
    return model


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_last_output_of_a_bidirectional_net_is_a_wrong_readout(kind):
    _, alarms = watched(one_module("last output", kind), 30)
    alarm = only(alarms, "no_gradient", "readout_index", "rnn.l0_reverse")
    assert "h_n" in alarm.message and alarm.since == 0


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_its_healthy_twin_reads_h_n(kind):
    watch, alarms = watched(one_module("h_n", kind), 30)
    assert alarms == [] and others(watch) == []


def test_a_detached_output_is_said_once_for_all_its_streams():
    watch, alarms = watched(one_module("detached"), 30)
    only(alarms, "no_gradient", "detached", "rnn.l0")
    assert others(watch)[0].streams == ("rnn.l0", "rnn.l0_reverse")


def test_a_module_that_is_never_called_is_unused():
    _, alarms = watched(Reader("h_n"), 30)
    only(alarms, "no_gradient", "unused", "spare.l0")


def test_a_spare_module_that_nobody_trains_is_no_fault():
    model = Reader("h_n")
    used = [p for n, p in model.named_parameters() if not n.startswith("spare")]
    watch, alarms = watched(model, 30, torch.optim.Adam(used, 1e-3))
    assert alarms == [] and others(watch) == []


def test_a_frozen_encoder_is_a_notice():
    model = one_module("h_n")
    model.rnn.requires_grad_(False)
    watch, alarms = watched(model, 30)
    assert alarms == []
    [incident] = others(watch)
    assert (incident.kind, incident.severity) == ("no_gradient", "info")
    assert incident.cause == "frozen"


def test_modules_that_take_turns_are_no_fault():
    """Two nets, as in an adversarial game: each rests for some steps."""
    model = Reader("h_n")
    optimizer = adam(model)
    loss_fn, alarms = nn.CrossEntropyLoss(), []
    with gradwatch.watch(model, dir=None, on_alert=alarms.append) as watch:
        for step, (x, y) in enumerate(digit_batches(60)):
            optimizer.zero_grad()
            if step % 12 < 6:
                loss_fn(model(x), y).backward()
            else:
                model.spare(x)[0].square().mean().backward()
            optimizer.step()
    assert alarms == [] and others(watch) == []


def test_a_sequence_of_one_step_has_no_recurrence_to_learn():
    torch.manual_seed(0)
    model = Tagger(nn.RNN(4, 8), 8, 3)
    optimizer, alarms = adam(model), []
    with gradwatch.watch(model, dir=None, on_alert=alarms.append):
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.randn(1, 5, 4)).square().mean().backward()
            optimizer.step()
    assert alarms == []


# ---- not updating


def test_a_weight_that_no_optimizer_holds():
    model = classifier(nn.GRU, hidden=16)
    others = [p for n, p in model.named_parameters() if "weight_hh" not in n]
    _, alarms = watched(model, 40, torch.optim.Adam(others, 1e-3))
    alarm = only(alarms, "not_updating", "not_in_optimizer", "rnn.l0")
    line = "add_param_group({'params': [model.get_parameter('rnn.weight_hh_l0')]})"
    assert line in alarm.message
    assert alarm.since == 0 and alarm.step == 24


def test_updates_below_the_precision_of_the_weight_are_lost():
    model = classifier(nn.GRU, hidden=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.sign() * (1 + parameter.abs()))
    _, alarms = watched(model, 20, torch.optim.SGD(model.parameters(), 1e-11))
    alarm = only(alarms, "not_updating", None, "rnn.l0")
    assert "precision" in alarm.message and alarm.step == 9


def test_updates_that_round_to_nothing_are_no_fault_where_the_gradient_is_used_up():
    model = classifier(nn.GRU, hidden=16)
    optimizer, alarms = torch.optim.SGD(model.parameters(), 1e-3), []
    with gradwatch.watch(model, dir=None, on_alert=alarms.append) as watch:
        for step, (x, y) in enumerate(digit_batches(35)):
            share = 1.0 if step < 5 else 1e-12
            optimizer.zero_grad()
            (share * nn.functional.cross_entropy(model(x), y)).backward()
            optimizer.step()
        ratios = watch.records.series("gradwatch/rnn/l0/update_ratio")[1]
    assert (ratios == 0).sum() >= 30 and alarms == []


def test_a_learning_rate_of_zero_is_told_of_once_it_has_lasted():
    model = classifier(nn.GRU, hidden=16)
    groups = [
        {"params": model.rnn.parameters(), "lr": 0.0},
        {"params": model.head.parameters()},
    ]
    _, alarms = watched(model, 45, torch.optim.Adam(groups, 1e-3))
    assert alarms == []
    _, alarms = watched(model, 55, torch.optim.Adam(groups, 1e-3))
    assert [(a.kind, a.cause) for a in alarms] == [("not_updating", "frozen")]


def test_a_warm_up_from_zero_is_no_fault():
    model = classifier(nn.LSTM, hidden=16)
    optimizer = adam(model, 0.0)

    def warm(step):
        optimizer.param_groups[0]["lr"] = 1e-3 * max(step - 4, 0) / 20

    watch, alarms = watched(model, 40, optimizer, each=warm)
    assert alarms == [] and others(watch) == []


# ---- drift


def test_a_radius_that_wanders_off_is_a_notice():
    model = classifier(nn.RNN, hidden=16)

    def shrink(step):
        with torch.no_grad():
            model.rnn.weight_hh_l0.mul_(0.994)

    watch, alarms = watched(model, 160, each=shrink)
    assert [a.kind for a in alarms] == []
    [notice] = [a for a in watch.alerts if a.kind == "drift"]
    assert notice.severity == "info" and notice.stream == "rnn.l0"
    [key] = notice.evidence
    assert key.endswith("rho_total_drift") and abs(notice.evidence[key][0]) >= 0.5


# ---- the rules alone


def stream(kind="RNN_RELU", gates=(), name="rnn.l0"):
    return Stream(
        name=name,
        module="rnn",
        kind=kind,
        layer=0,
        direction="forward",
        input_size=4,
        hidden_size=8,
        gates=gates,
    )


def of_rnn(**facts):
    facts = {"T": 9, "B": 9, "reach": "reached"} | facts
    return Facts(modules={"rnn": ModuleFacts(**facts)})


def records(metric, values, **facts):
    for step, value in enumerate(values):
        metrics = {"gradwatch/grad_norm": 1.0, "gradwatch/rnn/l0/grad_norm_hh": 0.5}
        metrics |= {} if value is None else {f"gradwatch/rnn/l0/{metric}": value}
        yield StepRecord(
            step=step, metrics=metrics, facts=NO_FACTS if step else of_rnn(**facts)
        )


def test_a_level_is_confirmed_held_and_cleared():
    level = Hysteresis(raise_at=0.5, clear_at=0.3, running=2, calm=3)
    values = [0.6, 0.4, 0.5, 0.7, 0.4, 0.2, 0.31, 0.3, 0.2, 0.1, 0.9, 0.9]
    changes = [level.update("a", i, v) for i, v in enumerate(values)]
    assert changes[:4] == ["suspected", "", "suspected", "raised"]
    assert changes[4:10] == [""] * 6
    assert changes[10:] == ["suspected", "raised"] and level.since("a") == 10
    assert level.update("b", 0, math.nan) == "" and level.active


def test_a_level_survives_a_resumption():
    level, again = [Hysteresis(0.5, 0.3, running=2, calm=3) for _ in range(2)]
    level.update("a", 3, 0.6)
    saved.restore(again.state, saved.write(level.state), "a level")
    assert again.update("a", 4, 0.6) == "raised" and again.since("a") == 3


def test_a_suspicion_asks_for_the_next_step():
    rule = DeadUnits([stream()])
    first, second = records("dead", [0.6, 0.6])
    assert rule.update(first) == [] and rule.wants == "state"
    [alert] = rule.update(second)
    assert rule.wants is None and alert.since == 0 and rule.active


def test_a_healthy_share_of_dead_units_is_silent():
    rule = DeadUnits([stream()])
    assert [a for r in records("dead", [0.17, 0.49] * 20) for a in rule.update(r)] == []


def test_a_forget_gate_may_be_shut_or_open():
    rule = GateStuck([stream("LSTM", ("i", "f", "g", "o"))])
    for metric in ("shut/f", "open/f", "open/i", "shut/g"):
        assert [a for r in records(metric, [1.0] * 5) for a in rule.update(r)] == []


def test_drift_of_a_gated_net_is_left_alone():
    rule = Drift([stream("LSTM", ("i", "f", "g", "o"))])
    values = [1.8] * 40
    assert [a for r in records("rho_total_drift", values) for a in rule.update(r)] == []


def test_drift_waits_for_the_first_steps_and_starts_anew_after_a_remedy():
    rule = Drift([stream()])
    found = [a for r in records("rho_total_drift", [0.9] * 30) for a in rule.update(r)]
    assert [a.step for a in found] == [21]
    reset = StepRecord(step=30, events=("reinit:rnn.l0",))
    assert rule.update(reset) == [] and not rule.active


def test_a_weight_that_loses_its_gradient_late_is_given_time():
    rule = NoGradient([stream()])
    for record in records("grad_norm_ih", [1.0] * 10, T=5):
        assert rule.update(record) == []
    found = []
    for step in range(10, 100):
        facts = of_rnn(reach="detached", T=5) if step == 20 else NO_FACTS
        metrics = {"gradwatch/grad_norm": 1.0}
        found += rule.update(StepRecord(step=step, metrics=metrics, facts=facts))
    assert [(a.since, a.step, a.cause) for a in found] == [(10, 59, "detached")]
    for record in records("grad_norm_ih", [1.0] * 3):
        rule.update(record)
    assert not rule.active


def test_skipped_steps_and_broken_norms_are_not_judged():
    for rule in (NoGradient([stream()]), NotUpdating([stream()])):
        for step in range(100):
            bad = {
                "gradwatch/grad_norm": math.nan,
                "gradwatch/rnn/l0/update_ratio": 0.0,
            }
            assert rule.update(StepRecord(step=step, metrics=bad)) == []
            ok = {**bad, "gradwatch/grad_norm": 1.0}
            skipped = StepRecord(step=step, metrics=ok, events=("skipped_step",))
            assert rule.update(skipped) == []


def test_what_a_broken_net_shows_is_evidence_of_what_broke_it():
    def alert(kind, severity="warning"):
        return Alert(kind=kind, severity=severity, step=1, since=1, message="")

    incidents = Incidents(CATALOGUE)
    incidents.take(alert("exploding", "error"))
    for kind in ("dead_units", "gate_stuck", "no_gradient", "not_updating"):
        out, incident = incidents.take(alert(kind))
        assert out is None and incident.kind == "exploding"
    calm = Incidents(CATALOGUE)
    calm.take(alert("spike"))
    assert calm.take(alert("dead_units"))[1].kind == "dead_units"


def test_every_rule_replays_alike_from_a_saved_state():
    """Half the records, a state through JSON, the other half: the same alerts."""
    made = list(records("dead", [0.1] * 30 + [0.8] * 30, T=5))
    straight, first, second = (default_rules([stream()]) for _ in range(3))
    expected = [a for r in made for rule in straight for a in rule.update(r)]
    got = [a for r in made[:31] for rule in first for a in rule.update(r)]
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    got += [a for r in made[31:] for rule in second for a in rule.update(r)]
    assert got == expected and len(got) >= 1
