"""Rules and incidents on made-up records: thresholds, hysteresis, precedence."""

import json
import math

import pytest
import torch

import gradwatch
from gradwatch.facts import NO_FACTS, Facts, StepFacts
from gradwatch.kinds.catalogue import CATALOGUE, default_rules
from gradwatch.kinds.exploding import Exploding
from gradwatch.kinds.incidents import Incidents
from gradwatch.kinds.lr_too_high import LrTooHigh
from gradwatch.kinds.nonfinite import Nonfinite
from gradwatch.kinds.spike import Spike
from gradwatch.metrics import run_key
from gradwatch.record import Alert, StepRecord, Stream
from testbed.models import batches, lstm

STREAM = Stream(
    name="rnn.l0",
    module="rnn",
    kind="LSTM",
    layer=0,
    direction="forward",
    input_size=4,
    hidden_size=8,
    gates=("i", "f", "g", "o"),
)
UPDATE = "gradwatch/rnn/l0/update_ratio"


def record(step, norm, events=(), facts=NO_FACTS, **more):
    broken = float(not math.isfinite(norm))
    metrics = {run_key("grad_norm"): norm, run_key("nonfinite"): broken, **more}
    return StepRecord(step=step, metrics=metrics, events=events, facts=facts)


def given(rule, norms, **more):
    return [
        (alert.kind, alert.step)
        for step, norm in enumerate(norms)
        for alert in rule.update(record(step, norm, **more))
    ]


def usual(count, level=1.0):
    return [level * (1 + 0.1 * (i % 3)) for i in range(count)]


def test_exploding_needs_three_steps_far_above_the_median():
    far = 2e4
    assert given(Exploding([STREAM]), [*usual(20), far, far, far]) == [
        ("exploding", 22)
    ]
    assert given(Exploding([STREAM]), [*usual(20), far, far, 1, far, far]) == []
    below = 5e3
    assert given(Exploding([STREAM]), [*usual(20), below, below, below, below]) == []
    assert given(Exploding([STREAM]), [*usual(20), *[below] * 25]) == [
        ("exploding", 44)
    ]
    assert given(Exploding([STREAM]), [*usual(11), far, far, far]) == []


def test_a_norm_that_was_usual_before_is_no_explosion():
    converged = [*usual(30, 1.0), *usual(300, 1e-6)]
    assert given(Exploding([STREAM]), [*converged, 0.1, 0.1, 0.1, 0.1]) == []
    assert given(Exploding([STREAM]), [*converged, 50, 50, 50]) == [("exploding", 332)]
    assert given(Spike([STREAM]), [*converged, 0.1, 1e-6]) == []


def test_an_update_larger_than_the_weights_decides_early():
    rule = LrTooHigh([STREAM])
    assert given(rule, usual(20), **{UPDATE: 0.01}) == []
    [alert] = rule.update(record(20, 15.0, **{UPDATE: 5.0}))
    assert alert.since == 20 and alert.evidence[UPDATE] == (5.0, 0.25)
    given(rule, usual(90), **{UPDATE: 0.0})
    assert rule.active
    rule = LrTooHigh([STREAM])
    given(rule, usual(20), **{UPDATE: 0.01})
    assert rule.update(record(20, 1.0, **{UPDATE: 2.0})) == []
    assert rule.update(record(21, 15.0, **{UPDATE: 0.1})) == []
    [alert] = rule.update(record(22, 1.0, **{UPDATE: 2.0}))
    assert "group['lr'] /= 10" in alert.message
    rule = LrTooHigh([STREAM])
    given(rule, usual(20), **{UPDATE: 0.01})
    for step, norm in enumerate((1000.0, 1.0, 1.0)):  # its gradient, then momentum
        assert rule.update(record(20 + step, norm, **{UPDATE: 5.0})) == []


def test_what_learns_at_large_steps_is_left_alone():
    def told(loss):
        rule, found = LrTooHigh([STREAM]), []
        for step in range(80):
            ratio, value = (0.01, 1.0) if step < 25 else (0.3, loss)
            logged = {run_key("loss"): value, UPDATE: ratio}
            found += rule.update(record(step, 1.0, **logged))
        return [alert.step for alert in found]

    assert told(0.5) == []
    assert told(1.0) == [30]


def test_an_explosion_ends_three_steps_after_it_has_calmed_down():
    rule = Exploding([STREAM])
    given(rule, [*usual(20), 2e4, 2e4, 2e4])
    assert rule.active
    for step, still in enumerate([True, True, False]):
        rule.update(record(30 + step, 1.0))
        assert rule.active is still


def test_nan_right_after_a_burst_is_an_explosion():
    assert given(Exploding([STREAM]), [*usual(20), 2e4, math.nan]) == [
        ("exploding", 21)
    ]
    assert given(Exploding([STREAM]), [*usual(20), 2.0, math.nan]) == []


def test_exploding_asks_for_what_could_explain_it_when_it_suspects():
    rule = Exploding([STREAM])
    given(rule, usual(20))
    rule.update(record(20, 20.0))
    assert rule.wants == ("spectrum", "flow")
    rule.update(record(21, 20.0))
    assert rule.wants == ("spectrum", "flow")
    rule.update(record(22, 20.0))
    assert rule.wants == ()


def test_a_spike_is_said_once_it_is_over():
    assert given(Spike([STREAM]), [*usual(60), 500.0, 1.0]) == [("spike", 61)]
    assert given(Spike([STREAM]), [*usual(60), 500.0, 500.0, 1.0]) == [("spike", 62)]
    assert given(Spike([STREAM]), [*usual(60), 20.0, 1.0]) == []
    assert given(Spike([STREAM]), [*usual(49), 500.0, 1.0]) == []
    assert given(Spike([STREAM]), [*usual(60), *[500.0] * 6, 1.0]) == []


def test_a_noisy_norm_needs_more_for_a_spike():
    noisy = [10.0 ** (i % 4) for i in range(30)]
    assert given(Spike([STREAM]), [*noisy, 2e3, 1.0]) == []


@pytest.mark.parametrize("by", ["scaler", "clipper", "unknown"])
def test_skipped_overflows_are_excused_ten_times_in_a_row(by):
    def skip(rule, step):
        facts = Facts(step=StepFacts(skipped_by=by))
        return rule.update(record(step, math.inf, ("skipped_step",), facts))

    rule = Nonfinite([STREAM])
    assert [len(skip(rule, step)) for step in range(11)] == [0] * 10 + [1]
    rule = Nonfinite([STREAM])
    for step in range(60):
        raised = skip(rule, step) if step % 3 else rule.update(record(step, 1.0))
        assert raised == []


def test_nonfinite_ends_after_twenty_five_finite_steps():
    rule = Nonfinite([STREAM])
    assert given(rule, [1.0, math.nan]) == [("nonfinite", 1)]
    given(rule, [1.0] * 24)
    assert rule.active
    given(rule, [1.0])
    assert not rule.active


@pytest.mark.parametrize(
    ("loss", "cause"), [(None, None), (1.0, "nan_backward"), (math.nan, None)]
)
def test_the_loss_decides_the_cause_of_nan(loss, cause):
    rule = Nonfinite([STREAM])
    given(rule, [1.0, 1.0])
    more = {} if loss is None else {run_key("loss"): loss}
    [alert] = rule.update(record(2, math.nan, **more))
    assert alert.cause == cause


def alert(kind, severity="error", step=5, stream=None, **more):
    return Alert(
        kind=kind,
        severity=severity,
        step=step,
        since=step,
        message="",
        stream=stream,
        **more,
    )


def test_lower_kinds_are_evidence_while_a_higher_one_is_open():
    incidents = Incidents(CATALOGUE)
    assert incidents.take(alert("nonfinite"))[0] is not None
    for kind in ("exploding", "lr_too_high", "loss_divergence", "spike"):
        assert incidents.take(alert(kind))[0] is None
    assert incidents.take(alert("underflow"))[0] is None
    assert incidents.take(alert("drift", "info"))[0] is not None
    assert [i.kind for i in incidents] == ["nonfinite", "drift"]


def test_an_explosion_explains_the_nan_it_ends_in():
    incidents = Incidents(CATALOGUE)
    incidents.take(alert("exploding"))
    out, incident = incidents.take(alert("nonfinite", evidence={"n": (3.0, 1.0)}))
    assert out is None
    assert incident.kind == "exploding" and incident.evidence == {"n": (3.0, 1.0)}
    incidents = Incidents(CATALOGUE)
    incidents.take(alert("spike", "warning"))
    assert incidents.take(alert("nonfinite"))[0] is not None


def test_an_incident_takes_in_streams_and_rises():
    incidents = Incidents(CATALOGUE)
    incidents.take(alert("vanishing", "info", stream="a", streams=("a",)))
    assert (
        incidents.take(alert("vanishing", "info", stream="b", streams=("b",)))[0]
        is None
    )
    out, incident = incidents.take(alert("vanishing", "warning", streams=("c",)))
    assert out is not None
    assert incident.streams == ("a", "b", "c")
    assert incident.severity == "warning" and len(incident.alerts) == 2


def test_muted_kinds_and_streams_are_silent():
    incidents = Incidents(CATALOGUE, ["spike", ("dead_units", "a")])
    assert incidents.take(alert("spike")) == (None, None)
    assert incidents.take(alert("dead_units", stream="a")) == (None, None)
    assert incidents.take(alert("dead_units", stream="b"))[0] is not None


def test_notices_are_at_most_three_a_stream():
    incidents, out = Incidents(CATALOGUE), []
    for step in range(6):
        out.append(incidents.take(alert("drift", "info", step, stream="a"))[0])
        incidents.end(step, {})
    assert [o is not None for o in out] == [True] * 3 + [False] * 3


def test_states_are_plain_and_go_on_where_they_were():
    rules = default_rules([STREAM])
    norms = [*usual(20), 2e4, 2e4]
    for step, norm in enumerate(norms):
        for rule in rules:
            rule.update(record(step, norm))
    saved = json.loads(json.dumps([rule.state_dict() for rule in rules]))
    fresh = default_rules([STREAM])
    for rule, state in zip(fresh, saved, strict=True):
        rule.load_state_dict(state)
    last = record(22, 2e4)
    assert [r.update(last) for r in fresh] == [r.update(last) for r in rules]
    incidents = Incidents(CATALOGUE)
    incidents.take(alert("nonfinite", evidence={"n": (math.nan, None)}))
    again = Incidents(CATALOGUE)
    again.load_state_dict(incidents.state_dict())
    assert again.take(alert("nonfinite", step=9))[0] is None
    assert again.all()[0].alerts[0].kind == "nonfinite"


# ---- what a rule of the user's own may get wrong


class Nothing:
    """Forgets its last return."""

    def update(self, record):
        return None


class Alone:
    def update(self, record):
        return gradwatch.Alert(kind="k", severity="info", step=0, since=0, message="m")


class Words:
    def update(self, record):
        return ["slow"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (Nothing, "Nothing.update returned NoneType; expected a list"),
        (Alone, "Alone.update returned Alert; expected a list"),
        (Words, "Words.update returned str in a list; expected a list"),
    ],
)
def test_a_rule_that_returns_no_alerts_is_off_alone(make, told, monkeypatch, caplog):
    monkeypatch.setenv("GRADWATCH_STRICT", "0")
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rules = [*gradwatch.rules.default_rules(model), make()]
    with gradwatch.watch(model, dir=None, wandb=None, rules=rules) as watch:
        for number, x in enumerate(batches(12)):
            optimizer.zero_grad()
            (model(x).sum() * (float("nan") if number == 9 else 1.0)).backward()
            optimizer.step()
        watch.flush()
        assert [a.kind for a in watch.alerts if a.severity == "error"] == ["nonfinite"]
        assert [*watch.health["failed"]] == [f"rule {make.__name__}"]
    assert told in caplog.text


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"severity": "critical"}, ValueError, "severity is 'critical'"),
        ({"evidence": {"k": 3.0}}, TypeError, "evidence of 'k' is 3.0"),
    ],
)
def test_an_alert_that_cannot_be_written_is_none(given, error, told):
    whole = {"kind": "k", "severity": "info", "step": 0, "since": 0, "message": "m"}
    with pytest.raises(error, match=told):
        gradwatch.Alert(**{**whole, **given})
    alert = gradwatch.Alert(**whole, evidence={"k": (torch.tensor(3.0), 2)})
    assert alert.evidence == {"k": (3.0, 2.0)}


def test_what_an_incident_has_taken_in_brings_no_remedy_of_its_own():
    incidents = Incidents(CATALOGUE)

    def alert(kind, remedy):
        return gradwatch.Alert(
            kind=kind, severity="warning", step=3, since=3, message=kind, remedy=remedy
        )

    incidents.take(alert("saturated", None))
    other = gradwatch.Remedy(name="init.chrono_", args={"t_max": 9})
    assert incidents.take(alert("vanishing", other))[0] is None
    [incident] = incidents.all()
    assert incident.kind == "saturated" and incident.remedy is None


def first_steps(rule, largest, losses, constant=2.3):
    """Feed a run whose second update is the largest; return its alerts."""
    found = []
    for step, loss in enumerate(losses):
        metrics = {UPDATE: largest if step == 1 else 0.02, run_key("loss"): loss}
        if step == 0 and constant is not None:
            metrics[run_key("loss_constant")] = constant
        found += rule.update(record(step, 1.0, **metrics))
    return found


@pytest.mark.parametrize("constant", [2.3, None])
def test_first_steps_that_leave_nothing_of_the_weights(constant):
    stuck = [2.3] + [7.0] * 79
    rule = LrTooHigh([STREAM])
    [alert] = first_steps(rule, 1.5, stuck, constant)
    assert (alert.cause, alert.since, alert.step) == ("lr", 1, 40)
    assert alert.evidence == {UPDATE: (1.5, 1.0)} and rule.active
    assert "the first steps were too large" in alert.message
    learnt = [2.3, *(7.0 * 0.9**n for n in range(79))]
    rule = LrTooHigh([STREAM])
    assert first_steps(rule, 1.5, learnt, constant) == [] and not rule.active
    assert first_steps(LrTooHigh([STREAM]), 0.9, stuck, constant) == []


def test_it_is_over_once_the_net_learns():
    rule = LrTooHigh([STREAM])
    first_steps(rule, 1.5, [2.3] + [7.0] * 49)
    assert rule.active
    for step in range(50, 60):
        rule.update(record(step, 1.0, **{UPDATE: 0.02, run_key("loss"): 0.5}))
    assert not rule.active
    again = LrTooHigh([STREAM])
    again.load_state_dict(rule.state_dict())
    assert not again.active


def test_a_constant_that_loses_nothing_is_no_measure():
    assert first_steps(LrTooHigh([STREAM]), 1.5, [0.0] * 60, 0.0) == []
