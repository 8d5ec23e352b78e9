"""Remedies by name: what the alerts propose, and what ``watch.apply`` does."""

import json
import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import remedies
from gradwatch.facts import NO_FACTS, Facts, ModuleFacts
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.kinds.dead_units import DeadUnits
from gradwatch.kinds.exploding import Exploding
from gradwatch.kinds.gate_stuck import GateStuck
from gradwatch.kinds.growth import Growth
from gradwatch.kinds.spike import Spike
from gradwatch.kinds.vanishing import Vanishing
from gradwatch.record import Remedy, StepRecord, Stream, dump_line, parse
from testbed.models import Tagger

LSTM = Stream(
    name="rnn.l0", module="rnn", kind="LSTM", layer=0, direction="forward",
    input_size=3, hidden_size=8, gates=("i", "f", "g", "o"),
)  # fmt: skip
RELU = Stream(
    name="rnn.l0", module="rnn", kind="RNN_RELU", layer=0, direction="forward",
    input_size=3, hidden_size=8,
)  # fmt: skip


def relu_net(gain=2.0):
    torch.manual_seed(0)
    model = Tagger(nn.RNN(3, 32, nonlinearity="relu"), 32)
    gradwatch.init.orthogonal_(model, gain)
    return model, torch.optim.Adam(model.parameters(), 1e-3)


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(30, 8, 3, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


# ---- the catalogue


@pytest.mark.parametrize("name", remedies.REMEDIES)
def test_every_remedy_is_what_users_type(name):
    room, function = name.split(".")
    assert callable(getattr(getattr(gradwatch, room), function))


MENDED = [
    (name, cause)
    for name, row in CATALOGUE.items()
    for cause in row.causes
    if row.causes[cause].remedy
]


@pytest.mark.parametrize(("kind", "cause"), MENDED)
@pytest.mark.parametrize("stream", [LSTM, RELU], ids=lambda s: s.kind)
def test_the_line_to_paste_does_what_apply_does(kind, cause, stream):
    remedy = CATALOGUE[kind].remedy(cause, stream, 20)
    assert stream.gates or "chrono" not in remedy.name

    def made():
        torch.manual_seed(0)
        rnn = nn.LSTM(3, 8) if stream.gates else nn.RNN(3, 8, nonlinearity="relu")
        model = nn.ModuleDict({"rnn": rnn})
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = made()
    torch.manual_seed(1)
    exec(
        remedies.line(remedy),
        {"gradwatch": gradwatch, "model": model, "optimizer": optimizer},
    )
    pasted = {k: v.clone() for k, v in model.state_dict().items()}
    model, optimizer = made()
    torch.manual_seed(1)
    done = remedies.apply(remedy, model, [optimizer])
    assert done.streams == ("rnn.l0",)
    assert all(torch.equal(v, pasted[k]) for k, v in model.state_dict().items())


def test_what_a_program_cannot_mend_has_no_remedy():
    assert CATALOGUE["vanishing"].remedy("truncation", LSTM) is None
    assert CATALOGUE["vanishing"].remedy("padding", LSTM) is None


def test_chrono_gets_the_length_of_the_sequence():
    remedy = CATALOGUE["vanishing"].remedy("forget_gate", LSTM, 40)
    assert remedy == Remedy(
        name="init.chrono_", args={"t_max": 40, "streams": ["rnn.l0"]}
    )
    assert remedies.line(remedy) == (
        "gradwatch.init.chrono_(model, t_max=40, streams=['rnn.l0'], "
        "optimizer=optimizer)"
    )
    assert CATALOGUE["vanishing"].remedy("forget_gate", LSTM, 0).args["t_max"] == 3


# ---- watch.apply


def test_an_alerts_remedy_cures_and_the_incident_ends():
    model, optimizer = relu_net()
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        train(model, optimizer, 6)
        [alert] = [a for a in watch.alerts if a.kind == "exploding"]
        assert alert.remedy == Remedy(
            name="init.orthogonal_", args={"streams": ["rnn.l0"]}
        )
        assert "gradwatch.init.orthogonal_(model, streams=['rnn.l0']" in alert.message
        assert watch.incidents[-1].until is None
        step = watch.records[-1].step
        [changed] = watch.apply(alert.remedy)
        assert changed.before[""] > 1.9 and math.isclose(
            changed.after[""], 1, abs_tol=1e-3
        )
        assert model.rnn.weight_hh_l0 not in optimizer.state
        assert model.head.weight in optimizer.state
        train(model, optimizer, 40, seed=1)
        marked = [r for r in watch.records if r.events]
        assert [r.step for r in marked if "reinit:rnn.l0" in r.events] == [step + 1]
        assert [i.until for i in watch.incidents if i.kind == "exploding"] == [step + 1]
        assert not [a for a in watch.alerts if a.step > step and a.severity != "info"]
        total = watch.latest["gradwatch/rnn/l0/rho_total_drift"]
        assert abs(total) < 0.2  # from the new start


def test_a_clipper_is_attached_by_name():
    model, optimizer = relu_net(1.0)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        train(model, optimizer, 2)
        [handle] = watch.apply(Remedy(name="clip.NormClip", args={"max_norm": 1e-3}))
        train(model, optimizer, 3)
        assert watch.latest["gradwatch/grad_norm_clipped"] < 1.001e-3
        handle.remove()
        assert not any("reinit" in str(r.events) for r in watch.records)


def test_apply_says_what_it_needs():
    model, optimizer = relu_net(1.0)
    remedy = Remedy(name="init.orthogonal_")
    watch = gradwatch.watch(model, dir=None, wandb=None)
    with pytest.raises(ValueError, match=r"watch\.apply\(remedy, optimizer="):
        watch.apply(remedy)
    assert watch.apply(remedy, optimizer=optimizer)
    train(model, optimizer, 2)
    with pytest.raises(TypeError, match="got NoneType; expected a Remedy"):
        watch.apply(None)
    with pytest.raises(
        ValueError, match=r"no remedy is called 'hope'; there are init\."
    ):
        watch.apply(Remedy(name="hope"))
    with pytest.raises(TypeError, match="t_max"):
        watch.apply(Remedy(name="init.orthogonal_", args={"t_max": 3}))
    watch.close()
    with pytest.raises(RuntimeError, match="closed or off"):
        watch.apply(remedy)


def test_apply_while_paused_is_told_afterwards():
    model, optimizer = relu_net(1.0)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        train(model, optimizer, 2)
        watch.pause()
        watch.apply(Remedy(name="init.orthogonal_"))
        train(model, optimizer, 2)
        watch.resume()
        train(model, optimizer, 2)
        marked = [r.step for r in watch.records if "reinit:rnn.l0" in r.events]
        assert marked == [4]


def test_apply_waits_for_the_step_and_can_follow_itself():
    model, optimizer = relu_net(1.0)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        train(model, optimizer, 2)
        model(torch.randn(5, 2, 3)).sum().backward()
        with pytest.raises(RuntimeError, match="no optimizer has used yet"):
            watch.apply(Remedy(name="init.orthogonal_"))
        optimizer.step()
        watch.apply(Remedy(name="parametrize.orthogonal"))
        watch.apply(Remedy(name="parametrize.remove"))
        watch.apply(Remedy(name="init.orthogonal_"))
        other = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
        with pytest.raises(ValueError, match="holds none of the weights"):
            watch.apply(Remedy(name="clip.NormClip"), optimizer=other)
        with pytest.raises(TypeError, match="got str"):
            watch.apply(Remedy(name="clip.NormClip"), optimizer=[optimizer, "x"])
        assert not optimizer._optimizer_step_pre_hooks


def test_held_weights_are_watched_on():
    model, optimizer = relu_net(1.0)
    with gradwatch.watch(model, dir=None, wandb=None, every=1, budget=None) as watch:
        train(model, optimizer, 3)
        watch.apply(Remedy(name="parametrize.orthogonal"))
        train(model, optimizer, 3)
        assert math.isclose(watch.latest["gradwatch/rnn/l0/rho"], 1.0, abs_tol=1e-4)
        assert watch.records[-1].metrics["gradwatch/grad_norm"] > 0
        assert "gradwatch/rnn/l0/update_ratio" not in watch.records[-1].metrics
        watch.apply(Remedy(name="parametrize.remove"))
        train(model, optimizer, 3)
        assert watch.records[-1].metrics["gradwatch/rnn/l0/update_ratio"] > 0
        assert not watch.health["failed"]


# ---- the rules begin anew


def record(step, events=(), facts=NO_FACTS, **metrics):
    return StepRecord(
        step=step,
        metrics={f"gradwatch/{k.replace('__', '/')}": v for k, v in metrics.items()},
        facts=facts,
        events=events,
    )


ANEW = ("reinit:rnn.l0",)


@pytest.mark.parametrize(
    ("rule", "stream", "sick"),
    [
        (Growth, RELU, {"rnn__l0__growth_log10": 5.0}),
        (DeadUnits, RELU, {"rnn__l0__dead": 1.0}),
        (GateStuck, LSTM, {"rnn__l0__shut__o": 1.0}),
        (
            Vanishing,
            LSTM,
            {"rnn__l0__adjoint_log10": -9.0, "rnn__l0__demand": 0.1},
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_rule_ends_its_incident_and_judges_anew(rule, stream, sick):
    judge = rule([stream])
    facts = Facts(modules={"rnn": ModuleFacts(T=40, B=8)})
    alerts = [a for n in range(3) for a in judge.update(record(n, facts=facts, **sick))]
    assert len(alerts) == 1 and judge.active
    assert not judge.update(record(3, events=ANEW)) and not judge.active
    again = [a for n in (4, 5) for a in judge.update(record(n, **sick))]
    assert len(again) == 1 and judge.active


@pytest.mark.parametrize("rule", [Exploding, Spike])
def test_norms_of_other_weights_are_no_measure(rule):
    def judged(events):
        judge, alerts = rule([LSTM]), []
        for n in range(60):
            alerts += judge.update(record(n, grad_norm=1.0))
        for n in range(60, 90):
            level = 1e6 if rule is Exploding or n == 60 else 1.0
            alerts += judge.update(
                record(n, events if n == 60 else (), grad_norm=level)
            )
        return alerts

    assert judged(()) and not judged(ANEW)


def test_a_remedy_survives_the_files():
    model, optimizer = relu_net()
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        train(model, optimizer, 6)
        [alert] = [a for a in watch.alerts if a.kind == "exploding"]
    assert parse(gradwatch.Alert, json.loads(dump_line(alert))).remedy == alert.remedy


def test_a_remedy_can_be_applied_from_the_callback():
    model, optimizer = relu_net()
    done = []

    def cure(alert):
        if alert.remedy is not None:
            done.append((alert.step, watch.apply(alert.remedy)))

    with gradwatch.watch(model, dir=None, wandb=None, on_alert=cure) as watch:
        train(model, optimizer, 60)
        assert len(done) == 1 and done[0][0] == 0
        marked = [r.step for r in watch.records if "reinit:rnn.l0" in r.events]
        assert marked == [1] and [r.step for r in watch.records] == list(range(60))
        assert not [i for i in watch.incidents if i.kind == "exploding" and not i.until]
        assert not watch.health["failed"]
