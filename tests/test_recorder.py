"""The flight recorder: what it writes, running it again, and the way back."""

import copy
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.recorder import MOST, Recorder
from gradwatch.recorder.state import State, digest, moved_to_cpu
from gradwatch.trees import mapped
from testbed.models import batches, lstm
from tests.support.ranks import ROOT

NAN = float("nan")


class Net(nn.Module):
    """An LSTM whose read-out is given to a function."""

    def __init__(self, act=lambda y: y):
        super().__init__()
        self.rnn, self.head, self.act = nn.LSTM(4, 8), nn.Linear(8, 5), act

    def forward(self, x):
        return self.act(self.head(self.rnn(x)[0][-1]))


def data(steps, bad=None, spoil=None):
    draw = torch.Generator().manual_seed(3)
    for step in range(steps):
        x = torch.randn(6, 3, 4, generator=draw)
        if step == bad:
            x = spoil(x)
        yield x


def trained(
    model, tmp_path, *, steps=12, loss_fn=None, feed=None, watched=None, **options
):
    """Train a model under a recorder; return the watch, closed, and the last loss."""
    loss_fn = loss_fn or (lambda out, x: out.square().mean())
    options.setdefault("recorder", 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    watch = gradwatch.watch(model, dir=tmp_path, name="run", wandb=None, **options)
    losses = []
    for x in feed or data(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(x), x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if watched is not None:
            watched(watch, len(losses) - 1)
    watch.close()
    return watch, losses


def recordings(tmp_path):
    return sorted(p.name for p in tmp_path.rglob("*.pt"))


# ---- twelve causes of NaN, and where each breaks


def nan_at(*place):
    def spoil(x):
        x[place] = NAN
        return x

    return spoil


def log_of_0(y):
    return torch.log(y.relu() * 0)


def root(y):
    return (y * 0).sqrt()


def ratio(y):
    zero = y - y
    return zero / zero


def power(y):
    return torch.exp(y * 1000 + 500)


def masked(y):
    shut = torch.full_like(y, float("-inf"))
    return (y + shut).softmax(-1)


def power_below_1(y):
    return (y * 0).pow(0.3)


def angle(y):
    return torch.acos(y * 0 + 1)


def half(y):
    return (y.half() * 0 + 300).square().float()


def log_loss(out, x):
    return (out.relu() * 0).log().mean()


CAUSES = {
    "a number in the data": ({}, nan_at(2, 1, 3), "input", "input[2, 1, 3] is NaN"),
    "a weight": ({"weight": True}, None, "weights", "head.weight[1, 0] is NaN"),
    "log": ({"act": log_of_0}, None, "forward", "log at test_recorder.py:{line} got 0"),
    "sqrt": ({"act": root}, None, "backward", "sqrt at test_recorder.py:{line} got"),
    "0/0": (
        {"act": ratio},
        None,
        "forward",
        "div at test_recorder.py:{line} got 0 and 0",
    ),
    "exp": ({"act": power}, None, "forward", "exp at test_recorder.py:{line} got"),
    "softmax": ({"act": masked}, None, "forward", "softmax at test_recorder.py:{line}"),
    "pow": ({"act": power_below_1}, None, "backward", "pow at test_recorder.py:{line}"),
    "acos": ({"act": angle}, None, "backward", "acos at test_recorder.py:{line} got 1"),
    "half": ({"act": half}, None, "forward", "overflow in float16"),
    "overflow": ({"scale": 3e38}, None, "forward", "square at test_recorder.py"),
    "the loss": (
        {"loss_fn": log_loss},
        None,
        "forward",
        "log at test_recorder.py:{line}",
    ),
}
LINES = {
    "log": (log_of_0, 1),
    "sqrt": (root, 1),
    "0/0": (ratio, 2),
    "exp": (power, 1),
    "softmax": (masked, 2),
    "pow": (power_below_1, 1),
    "acos": (angle, 1),
    "the loss": (log_loss, 1),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_where_it_breaks_is_found(cause, tmp_path):
    torch.manual_seed(0)
    options, spoil, place, what = CAUSES[cause]
    model, calm = Net(), Net()

    def spoiled(watch, step):
        if step == 6 and options.get("weight"):
            with torch.no_grad():
                model.head.weight[1, 0] = NAN
        if step == 6 and "scale" in options:
            with torch.no_grad():
                model.head.weight.fill_(options["scale"])
        if step == 6 and "act" in options:
            model.act = options["act"]

    given = options.get("loss_fn")
    calls = []

    def loss_fn(out, x):
        calls.append(0)
        return given(out, x) if given and len(calls) > 7 else out.square().mean()

    feed = list(data(9, 7, spoil)) if spoil else list(data(9))
    trained(model, tmp_path, loss_fn=loss_fn, feed=feed, watched=spoiled)
    assert recordings(tmp_path) == ["7-nonfinite.pt"]
    calm.act = options.get("act", calm.act)
    found = gradwatch.reproduce(
        tmp_path / "run",
        model=calm,
        loss_fn=given or (lambda out, x: out.square().mean()),
    )
    function, offset = LINES.get(cause, (None, 0))
    line = function.__code__.co_firstlineno + offset if function else 0
    assert found.step == 7 and found.place == place
    assert what.format(line=line) in found.what, found.what
    assert found.repeats and str(found) in str(found)
    if place == "backward":
        assert found.exact
    assert not calm.head._forward_hooks and not calm.rnn._forward_pre_hooks


def test_without_the_loss_the_gradient_at_the_output_stands_for_it(tmp_path):
    torch.manual_seed(0)
    target = torch.zeros(3, 5)

    def loss_fn(out, x):
        return (out - target).square().mean()

    def spoiled(watch, step):
        if step == 6:
            target[0, 0] = NAN

    trained(Net(), tmp_path, loss_fn=loss_fn, steps=8, watched=spoiled)
    found = gradwatch.reproduce(tmp_path / "run", model=Net())
    assert found.place == "loss" and "pass loss_fn" in found.what
    model = Net(root)
    (tmp_path / "b").mkdir()
    trained(model, tmp_path / "b", steps=1)
    found = gradwatch.reproduce(tmp_path / "b" / "run", model=Net(root))
    assert found.place == "backward" and found.exact and "sqrt" in found.what


def test_what_does_not_repeat_is_neither_data_nor_model(tmp_path):
    torch.manual_seed(0)
    chance = [False] * 3 + [True]

    def flaky(y):
        return y * NAN if chance and chance.pop(0) else y

    trained(Net(flaky), tmp_path, steps=4)
    assert recordings(tmp_path) == ["3-nonfinite.pt"]
    found = gradwatch.reproduce(
        tmp_path / "run", model=Net(flaky), loss_fn=lambda out, x: out.square().mean()
    )
    assert found.place == "nothing" and "finite this time" in str(found)
    again = [True]
    found = gradwatch.reproduce(
        tmp_path / "run",
        model=Net(lambda y: y.log() * NAN if again and again.pop() else y),
        loss_fn=lambda out, x: out.square().mean(),
    )
    assert not found.repeats and "no fault of data or model" in str(found)


KILLED = """
import os, signal, sys, torch, random, numpy
import gradwatch
from torch import nn
from tests.test_recorder import Dropped
torch.manual_seed(0); random.seed(1); numpy.random.seed(2)
model = Dropped().train()
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
watch = gradwatch.watch(model, dir=sys.argv[1], name="run", wandb=None, recorder=5,
                        on_alert=lambda alert: os.kill(os.getpid(), signal.SIGKILL))
for step in range(20):
    x = torch.randn(6, 3, 4)
    out = model(x)
    spread = ((out - out.detach()) * 1).square().sum(1).sqrt().mean()
    loss = out.square().mean() + (spread if step == 11 else 0.0)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    watch.flush()
"""


class Dropped(Net):
    """Uses every random number generator there is."""

    def forward(self, x):
        y = nn.functional.dropout(super().forward(x), 0.5)
        return y * (1 + random.random() + np.random.rand())


def test_a_run_that_is_killed_is_run_again_to_the_bit(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert recordings(tmp_path) == ["11-nonfinite.pt"]

    def loss_fn(out, x):
        return out.square().mean() + (out - out.detach()).square().sum(1).sqrt().mean()

    found = gradwatch.reproduce(tmp_path / "run", model=Dropped(), loss_fn=loss_fn)
    assert found.place == "backward" and "sqrt" in found.what and found.repeats
    assert found.exact  # each gradient of the killed process, bit for bit
    found = gradwatch.reproduce(tmp_path / "run", model=Dropped())
    assert found.place == "loss"  # the gradient that had arrived was not finite
    content = torch.load(tmp_path / "run/incidents/11-nonfinite.pt", weights_only=True)
    before = random.getstate()
    model = Dropped()
    model.load_state_dict(content["weights"])
    args, _ = content["arguments"]
    outs = []
    for _ in range(2):
        gradwatch.recorder.state.set_randomness(content["randomness"])
        outs.append(digest(model(*args)))
    random.setstate(before)
    assert outs[0] == outs[1]


# ---- what it may not do


def test_a_recorder_changes_no_bit(tmp_path):
    def run(**options):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        model = Dropped()
        trained(model, tmp_path, steps=20, **options)
        return [digest(p) for p in model.parameters()], torch.get_rng_state().tolist()

    assert run(recorder=3) == run(recorder=None)


def test_nothing_is_left_on_the_model(tmp_path):
    model = Net()
    before = set(model.__dict__)
    trained(model, tmp_path, steps=3)
    assert set(model.__dict__) == before and not model._forward_hooks
    assert all(not p._backward_hooks for p in model.parameters())


def test_it_is_said_what_it_costs(tmp_path, caplog):
    with caplog.at_level("INFO", logger="gradwatch"):
        trained(Net(), tmp_path, steps=2)
    assert "flight recorder: a state every 4 steps" in caplog.text
    assert "one synchronisation a step" in caplog.text


def test_an_evaluation_is_not_taken_for_the_step(tmp_path):
    model = Net()
    kept = []

    def evaluated(watch, step):
        with torch.no_grad():
            model(torch.full((2, 3, 4), 7.0))
        kept.append(watch._recorder._forward.args[0])

    feed = list(data(3))
    trained(model, tmp_path, feed=feed, watched=evaluated)
    assert all(a is b for a, b in zip(kept, feed, strict=True))


def test_one_of_several_processes_is_not_rolled_back(monkeypatch):
    model = lstm()
    with gradwatch.watch(model, dir=None, wandb=None, recorder=2) as watch:
        monkeypatch.setattr(gradwatch.acting, "processes", lambda: 2)
        with pytest.raises(RuntimeError, match="with several processes"):
            watch.rollback()


def test_what_is_kept_is_bounded(tmp_path):
    model = Net()
    seen = []
    trained(
        model, tmp_path, steps=30, watched=lambda w, n: seen.append(w._recorder.size)
    )
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert seen[0] == weights and max(seen) <= 2 * weights


def test_a_full_disk_is_said_and_the_training_goes_on(tmp_path, monkeypatch, caplog):
    def full(content, file):
        if not hasattr(file, "write"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(content, file)

    real = torch.save
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setenv("GRADWATCH_STRICT", "0")
    _, losses = trained(Net(), tmp_path, feed=data(9, 5, nan_at(0, 0, 0)))
    assert len(losses) == 9 and recordings(tmp_path) == []
    assert "step 5 cannot be recorded" in caplog.text and "No space left" in caplog.text


class Batch(dict):
    """Holds what cannot be pickled."""


class Odd(Net):
    def forward(self, batch):
        return super().forward(batch["x"])


def test_a_batch_that_cannot_be_pickled_is_said(tmp_path, caplog):
    torch.manual_seed(0)
    feed = [{"x": x, "lock": threading.Lock()} for x in data(6, 4, nan_at(0, 0, 0))]
    trained(Odd(), tmp_path, feed=feed)
    assert recordings(tmp_path) == ["4-nonfinite.pt"]
    assert "the batch of step 4 cannot be kept" in caplog.text
    with pytest.raises(ValueError, match="holds no arguments"):
        gradwatch.reproduce(tmp_path / "run", model=Odd())


def test_a_recorder_that_fails_is_off_and_the_training_goes_on(
    tmp_path, monkeypatch, caplog
):
    def fail(*args):
        raise RuntimeError("made up")

    monkeypatch.setattr(State, "of", fail)
    _, losses = trained(Net(), tmp_path, steps=9)
    assert len(losses) == 9
    assert caplog.text.count("the flight recorder failed") == MOST
    assert "it is off now" in caplog.text


def test_only_the_first_step_of_a_wreck_is_recorded(tmp_path):
    feed = list(data(12, 5, nan_at(0, 0, 0)))
    trained(Net(), tmp_path, feed=feed)  # the weights are NaN from there on
    assert recordings(tmp_path) == ["5-nonfinite.pt"]


# ---- the way back


def test_a_run_with_nan_ends_like_the_clean_one(tmp_path):
    torch.manual_seed(0)
    clean_model = Net()
    spoiled_model = copy.deepcopy(clean_model)

    def feed(bad):
        for step, x in enumerate(data(300)):
            yield nan_at(0, 0, 0)(x.clone()) if step in bad else x

    target = torch.linspace(-1, 1, 5)

    def loss_fn(out, x):
        return (out - target).square().mean()

    _, clean = trained(
        clean_model, tmp_path, feed=feed(()), loss_fn=loss_fn, recorder=1
    )
    watch, spoiled = trained(
        spoiled_model,
        tmp_path,
        feed=feed((20, 41)),
        loss_fn=loss_fn,
        recorder=1,
        on_alert="rollback",
    )
    assert spoiled[-1] == pytest.approx(clean[-1], rel=0.1)
    events = [e for r in watch.records for e in r.events if e.startswith("rollback")]
    assert events == ["rollback:19", "rollback:40"]
    assert [r.step for r in watch.records] == list(range(300))
    assert {a.kind for a in watch.alerts if a.severity != "info"} == {"nonfinite"}


@pytest.mark.parametrize("passed", [True, False])
def test_a_loss_scaler_is_put_back_whether_it_is_passed_or_found(passed):
    torch.manual_seed(0)
    model, scaler = Net(), torch.amp.GradScaler("cpu", 2.0**8, growth_interval=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    options = {"scaler": scaler} if passed else {}
    with gradwatch.watch(model, dir=None, wandb=None, recorder=100, **options) as watch:
        for x in data(8):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**12
        watch.rollback()
        assert scaler.get_scale() == 2.0**8


def test_an_overflow_that_a_loss_scaler_skips_is_no_incident(tmp_path):
    """A fused optimizer steps all the same, and moves nothing."""
    torch.manual_seed(0)
    model, scaler = Net(), torch.amp.GradScaler("cpu", 2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, fused=True)
    with gradwatch.watch(
        model, dir=tmp_path, wandb=None, recorder=1, on_alert="rollback"
    ) as watch:
        for step, x in enumerate(data(8)):
            optimizer.zero_grad()
            loss = model(x).square().mean() * (1e38 if step == 4 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**7
    events = [event for record in watch.records for event in record.events]
    assert not [event for event in events if event.startswith("rollback")]
    assert recordings(tmp_path) == [] and watch.alerts == []


def test_all_of_the_training_is_put_back_in_place():
    torch.manual_seed(0)
    model = lstm()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    parameters = [*map(id, model.parameters())]
    with gradwatch.watch(model, dir=None, wandb=None, recorder=100) as watch:

        def step(x):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        feed = list(batches(9))
        with pytest.raises(RuntimeError, match="no good state has been kept yet"):
            watch.rollback()
        step(feed[0])
        start = [digest(p) for p in model.parameters()]
        random_state = torch.get_rng_state()
        for x in feed[1:]:
            torch.rand(3)
            step(x)
        assert watch.rollback() == 0
        assert [digest(p) for p in model.parameters()] != start
        assert optimizer.state_dict()["state"] == {}  # as before the first step
        assert torch.equal(torch.get_rng_state(), random_state)
        assert [*map(id, model.parameters())] == parameters
        assert all(p.grad is None for p in model.parameters())
        step(feed[0])
        assert [digest(p) for p in model.parameters()] == start
        watch.rollback()
        watch.rollback()
        with pytest.raises(RuntimeError, match="rolled back 3 times already"):
            watch.rollback()
    with pytest.raises(RuntimeError, match="closed or off"):
        watch.rollback()


def test_after_three_times_it_is_left_alone(tmp_path):
    def every_third(x):
        return nan_at(0, 0, 0)(x)

    feed = [every_third(x) if n % 3 == 2 else x for n, x in enumerate(data(16))]
    watch, losses = trained(Net(), tmp_path, feed=feed, recorder=1, on_alert="rollback")
    events = [e for r in watch.records for e in r.events if e.startswith("rollback")]
    assert len(events) == MOST and len(losses) == 16
    assert not np.isfinite(losses[-1])  # what comes after is the run's own


def test_a_watch_without_a_recorder_has_no_way_back():
    model = lstm()
    watch = gradwatch.watch(model, dir=None, wandb=None)
    with pytest.raises(RuntimeError, match="keeps no state"):
        watch.rollback()
    watch.close()


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "often"])
def test_what_recorder_may_not_be(wrong):
    with pytest.raises(ValueError, match="recorder is"):
        gradwatch.watch(lstm(), dir=None, wandb=None, recorder=wrong)


# ---- reading recordings


def test_a_file_that_is_no_recording(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no recording"):
        gradwatch.reproduce(tmp_path, model=Net())
    torch.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is no recording"):
        gradwatch.reproduce(tmp_path / "a.pt", model=Net())
    (tmp_path / "b.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        gradwatch.reproduce(tmp_path / "b.pt", model=Net())


def test_a_recording_runs_no_code_unless_it_is_trusted(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"format": 1, "arguments": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="trusted=True"):
        gradwatch.reproduce(tmp_path / "a.pt", model=Net())
    assert not (tmp_path / "made").exists()


def test_a_model_of_another_make(tmp_path):
    trained(Net(), tmp_path, feed=data(5, 3, nan_at(0, 0, 0)))
    with pytest.raises(ValueError, match="does not take the weights"):
        gradwatch.reproduce(tmp_path / "run", model=lstm())
    [incident] = (tmp_path / "run" / "incidents").glob("*.json")
    assert json.loads(incident.read_text().splitlines()[0])["kind"] == "nonfinite"
    found = gradwatch.reproduce(incident, model=Net())
    assert found.place == "input"


def test_packed_sequences_are_kept(tmp_path):
    class Packed(Net):
        def forward(self, x):
            return self.head(self.rnn(x)[1][0][-1])

    def feed():
        for x in data(6, 4, nan_at(3, 1, 2)):
            yield nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 5, 2]))

    trained(Packed(), tmp_path, feed=feed())
    found = gradwatch.reproduce(tmp_path / "run", model=Packed())
    assert found.place == "input" and "is NaN" in found.what


def test_tensors_are_copied_wherever_they_are():
    x = torch.ones(2)
    given = {"a": [x, (x, 3)], "b": "c"}
    made = moved_to_cpu(given)
    x += 1
    sizes = torch.tensor([2, 1])
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(2, 2, 1), sizes)
    there = mapped(packed, lambda t: t.to("meta"))
    assert there.data.is_meta and not there.batch_sizes.is_meta
    assert made["a"][0].tolist() == [1, 1] and made["a"][1][1] == 3 and made["b"] == "c"


def test_a_recorder_of_a_loop_that_never_calls_forward(tmp_path, caplog):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=tmp_path, name="run", wandb=None, recorder=2):
        for x in data(5, 3, nan_at(0, 0, 0)):
            optimizer.zero_grad()
            model.head(model.rnn(x)[0][-1]).square().mean().backward()
            optimizer.step()
    with pytest.raises(ValueError, match="forward was never called"):
        gradwatch.reproduce(tmp_path / "run", model=Net())
    assert isinstance(Recorder, type)
