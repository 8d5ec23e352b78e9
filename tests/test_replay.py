"""What a run leaves behind: its alerts again from its file, its incidents, W&B's."""

import json

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.rules import replay
from gradwatch.sinks import Wandb
from testbed.weights import orthogonal, recurrent
from tests.causes import exploding, loop, vanishing
from tests.causes.run import adam, net, symbols, trained
from tests.test_sinks_wandb import FakeRun


def growing(steps=130, factor=1.006, **more):
    """A ReLU net whose radius rises; of two layers and directions, if asked for."""
    model = exploding.relu(**more)

    def before(step):
        recurrent(model.layer, lambda w: factor * w)

    return exploding.clipped(model, 1e-4, steps=steps, before=before)


def to_nan():
    """The same, faster and with no clip, until nothing is finite."""
    run = growing(90, 1.05)
    run.clip = None
    return run


RUNS = {
    "an early notice, and an explosion": growing,
    "an explosion to NaN": to_nan,
    "a vanishing net": lambda: vanishing.CASES["an LSTM that forgets"].build(True),
    "a truncated net": lambda: vanishing.CASES["a sequence in pieces"].build(True),
    "NaN": lambda: loop.CASES["an input that is NaN"].build(True),
    "a spike": lambda: loop.CASES[
        "a batch of targets a thousand times too large"
    ].build(True),
}
SAID = {
    "an early notice, and an explosion": {
        ("exploding", "info"),
        ("exploding", "error"),
    },
    "an explosion to NaN": {("exploding", "error")},
    "a vanishing net": {("vanishing", "info"), ("vanishing", "warning")},
    "a truncated net": {("truncated", "info"), ("vanishing", "warning")},
    "NaN": {("nonfinite", "error")},
    "a spike": {("spike", "warning")},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_read_back_is_judged_alike(name, tmp_path):
    torch.manual_seed(0)
    watch = trained(RUNS[name](), tmp_path)
    run = gradwatch.load(watch.dir)
    assert run.closed and not run.skipped
    again = replay(run.records, run.streams)
    assert again == watch.alerts == run.alerts
    assert {(a.kind, a.severity) for a in again} >= SAID[name]
    kinds = {a.kind for a in again}
    left = replay(run.records, run.streams, mute=kinds)
    assert kinds.isdisjoint(a.kind for a in left)


# ---- incidents


def test_a_net_that_blows_up_makes_one_incident_and_one_alarm():
    torch.manual_seed(0)
    watch = trained(to_nan())
    [alarm] = [a for a in watch.alerts if a.severity != "info"]
    [incident] = [i for i in watch.incidents if i.severity != "info"]
    assert incident.alerts[-1] == alarm and incident.until is None
    assert alarm.kind == incident.kind == "exploding"
    broken = [r for r in watch.records if r.metrics.get("gradwatch/nonfinite")]
    assert broken and broken[0].step > alarm.step


def test_a_fault_that_comes_back_is_another_incident(tmp_path):
    torch.manual_seed(0)
    model = net(nn.GRU)
    optimizer = adam(model)

    def before(step):
        if not (5 <= step < 20 or 30 <= step < 45):
            optimizer.zero_grad()

    run = loop.plain(model, 50, optimizer, clears=False, before=before)
    watch = trained(run, tmp_path)
    first, second = watch.incidents
    assert first.kind == second.kind == "not_cleared"
    assert (first.since, second.since) == (5, 30)
    assert first.until == 22 and second.until == 47
    assert [a.since for a in watch.alerts] == [5, 30]
    assert gradwatch.load(watch.dir).incidents == [first, second]


# ---- an error's file


def seldom_nan(folder, steps=110, bad=(70,)):
    """Leave out the steps whose loss is not finite, as users do.

    Yields:
        The watch, after each such step and at the end.
    """
    torch.manual_seed(0)
    model = net(nn.LSTM, num_layers=2, bidirectional=True)
    optimizer, batches = adam(model), symbols(8, 2)
    with gradwatch.watch(model, dir=folder, wandb=None, budget=None) as watch:
        for step in range(steps):
            x, y = next(batches)
            x = x * torch.nan if step in bad else x
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            watch.log(loss=loss)
            loss.backward()
            if loss.isfinite():
                optimizer.step()
            if step in bad:
                watch.flush()
                yield watch
        watch.flush()
    yield watch


def read(watch):
    [path] = (watch.dir / "incidents").glob("*-nonfinite.json")
    return path, json.loads(path.read_text())


def test_the_file_of_an_error_holds_what_led_to_it(tmp_path):
    at_once, at_the_end = (read(w)[1] for w in seldom_nan(tmp_path))
    ends = {"until": (None, 95)}
    for name in at_once:
        pair = at_once[name], at_the_end[name]
        assert pair == ends[name] if name in ends else pair[0] == pair[1], name
    run = gradwatch.load(next(tmp_path.glob("*/meta.json")).parent)
    wanted = [json.loads(gradwatch.record.dump_line(r)) for r in run.records[7:71]]
    assert at_the_end["records"] == wanted
    assert [r["step"] for r in wanted] == list(range(7, 71))


def test_the_file_of_an_error_tells_where_it_happened(tmp_path):
    [*_, watch] = seldom_nan(tmp_path)
    path, content = read(watch)
    assert path.stat().st_size < 400_000
    streams = [s["name"] for s in content["environment"]["streams"]]
    assert streams == [s.name for s in watch.streams] and len(streams) == 4
    assert {"torch", "gradwatch"} <= set(content["environment"]["versions"])
    assert content["environment"]["settings"]["start_step"] == 0
    latest = content["latest"]
    assert latest["gradwatch/grad_norm"] == latest["gradwatch/loss"] == "nan"
    assert latest["gradwatch/rnn/l1_reverse/rho"] > 0
    assert content["profiles"]["step"] == 64
    assert len(content["profiles"]["gradwatch/rnn/l0/adjoint"]) == 8
    first = content["first_nonfinite"]
    assert first["step"] == 70 and first["module"] in ("head", "rnn")
    weights = dict(net(nn.LSTM, num_layers=2, bidirectional=True).named_parameters())
    assert first["tensors"] and set(first["tensors"]) <= set(weights)


# ---- W&B


def test_an_incident_of_many_steps_and_streams_is_one_alert_of_wandb():
    torch.manual_seed(0)
    run = FakeRun()
    model = exploding.relu(num_layers=2, bidirectional=True)
    orthogonal(model.layer)
    recurrent(model.layer, lambda w: 3.5 * w)
    optimizer, batches = adam(model, 1e-4), symbols(25, 2)
    with gradwatch.watch(model, dir=None, wandb=Wandb(run), budget=None) as watch:
        for _ in range(70):
            optimizer.zero_grad()
            x, y = next(batches)
            nn.functional.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        watch.flush()
        [incident] = [i for i in watch.incidents if i.severity != "info"]
    assert len(incident.streams) == 4 and incident.until is None
    [(title, text, level)] = run.alerts
    assert title == "gradwatch: exploding gradients" and level == "ERROR"
    assert "exploding at step 0: " in text and "streams: rnn.l" in text
