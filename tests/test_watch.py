"""The handle: what it leaves behind, what survives, and what bad input gets."""

import copy
import gc
import io
import logging
import math
import os
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import console
from gradwatch.health import Health
from gradwatch.metrics import run_key
from testbed.models import Loop, Tagger, batches, lstm

NORM = run_key("grad_norm")


def train(model, steps=5, start=0, spoil=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i, x in enumerate(batches(steps), start):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (loss * math.nan if i == spoil else loss).backward()
        optimizer.step()


def hooks_of(model):
    found = [h for m in model.modules() for h in m._forward_hooks.values()]
    found += [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    slots = [vars(m).get("_compiled_call_impl") for m in model.modules()]
    found += [slot for slot in slots if slot is not None]
    return found + [
        hook
        for p in model.parameters()
        for hook in (p._post_accumulate_grad_hooks or {}).values()
    ]


def attributes_of(model):
    return {name: set(vars(m)) for name, m in model.named_modules()}


def test_nothing_is_left_after_close():
    model = lstm(num_layers=2)
    before, threads = attributes_of(model), threading.active_count()
    watch = gradwatch.watch(model)
    train(model)
    watch.close()
    watch.close()
    assert hooks_of(model) == []
    assert attributes_of(model) == before
    assert threading.active_count() == threads


def test_twenty_rounds_leak_nothing():
    model = lstm()
    watches = []
    for _ in range(20):
        watch = gradwatch.watch(model)
        train(model, 2)
        watch.close()
        watches.append(weakref.ref(watch))
        del watch
    gc.collect()
    assert [w for w in watches if w() is not None] == []
    assert hooks_of(model) == []


def test_the_return_value_may_be_thrown_away(tmp_path):
    model = lstm()
    gradwatch.watch(model, dir=tmp_path, name="mine")
    gc.collect()
    train(model, 5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    run = gradwatch.load(tmp_path / "mine")
    assert [r.step for r in run.records] == [0, 1, 2, 3, 4]
    assert run.closed


def test_a_callback_that_knows_the_model_does_not_keep_it(tmp_path):
    model = lstm()
    held = []

    def knows(model):
        return lambda alert: held.append(model)

    watch = weakref.ref(
        gradwatch.watch(model, dir=tmp_path, name="x", on_alert=knows(model))
    )
    train(model, 2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert watch() is None


def test_a_copy_is_not_watched_and_the_original_is():
    model = lstm()
    with gradwatch.watch(model, dir=None) as watch:
        twin = copy.deepcopy(model)
        train(twin, 3)
        assert len(watch.records) == 0
        train(model, 3)
        assert len(watch.records) == 3
        with gradwatch.watch(twin, dir=None) as second:
            assert second is not watch
            train(twin, 2)
            assert len(second.records) == 2


def test_a_pickle_needs_no_gradwatch(tmp_path):
    model = lstm()
    with gradwatch.watch(model, dir=None):
        train(model, 2)
        torch.save(model, tmp_path / "model.pt")
        assert b"gradwatch" not in pickle.dumps(model.rnn)
    code = (
        "import sys, torch; sys.modules['gradwatch'] = None\n"
        "from testbed.models import lstm\n"
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "m(torch.zeros(6, 5, 4)).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_state_dicts_and_checkpoints_are_those_of_an_unwatched_model():
    bare, model = lstm(), lstm()
    with gradwatch.watch(model, dir=None):
        assert list(model.state_dict()) == list(bare.state_dict())
        one, two = io.BytesIO(), io.BytesIO()
        torch.save(model.state_dict(), one)
        torch.save(bare.state_dict(), two)
        assert one.getvalue() == two.getvalue()


def test_watching_twice_returns_the_same_watch_with_a_warning(lines):
    model = lstm()
    with gradwatch.watch(model, dir=None) as watch:
        assert gradwatch.watch(model, every=7) is watch
        [warning] = [text for level, text in lines if level == "WARNING"]
        assert warning.startswith("gradwatch: this model is watched already")
    with gradwatch.watch(model, dir=None) as second:
        assert second is not watch


def test_a_healthy_run_prints_two_lines(lines):
    model = lstm()
    with gradwatch.watch(model):
        train(model, 20)
    assert len(lines) == 2
    assert "1 stream in 1 module" in lines[0][1]
    assert "20 steps, no alarm" in lines[1][1]


def test_pause_and_resume_keep_counting():
    model = lstm()
    with gradwatch.watch(model, dir=None) as watch:
        train(model, 2)
        watch.pause()
        train(model, 3)
        watch.resume()
        train(model, 2)
        assert [r.step for r in watch.records] == [0, 1, 5, 6]


def test_probe_now_measures_at_the_next_step():
    model = lstm()
    with gradwatch.watch(model, dir=None, every={"spectrum": 1000}) as watch:
        train(model, 10)
        watch.probe_now()
        train(model, 2)
        steps, _ = watch.records.series("gradwatch/rnn/l0/rho")
        assert steps.tolist() == [0, 10]


def test_the_default_cadence_is_early_then_every_fifty():
    model = lstm()
    with gradwatch.watch(model, dir=None, budget=None) as watch:
        train(model, 120)
        steps, _ = watch.records.series("gradwatch/rnn/l0/rho")
        assert steps.tolist() == [0, 1, 2, 4, 8, 50, 100]
        steps, _ = watch.records.series("gradwatch/rnn/l0/sigma_max")
        assert steps.tolist() == [0, 2, 8, 100]


def test_the_loss_is_that_of_the_step(tmp_path):
    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None) as watch:
        for i, x in enumerate(batches(3)):
            model(x).sum().backward()
            watch.log(loss=torch.tensor(float(i)))
            optimizer.step()
        assert watch.records.series(run_key("loss"))[1].tolist() == [0.0, 1.0, 2.0]
        with pytest.raises(ValueError, match=r"shape \(2,\)"):
            watch.log(loss=torch.zeros(2))


def test_evaluation_has_no_records():
    model = lstm()
    with gradwatch.watch(model, dir=None) as watch:
        model.eval()
        with torch.no_grad():
            for x in batches(3):
                model(x)
        with torch.inference_mode():
            model(batches(1)[0])
        watch.flush()
        assert len(watch.records) == 0


def test_close_says_that_nothing_was_seen(lines):
    with gradwatch.watch(lstm(), dir=None):
        pass
    assert "without having seen a single step" in lines[-1][1]


def test_the_table_names_what_is_not_measured():
    model = lstm(num_layers=2)
    model.rnn.weight_hh_l1.requires_grad_(False)
    with gradwatch.watch(model, dir=None) as watch:
        train(model, 2)
        text = repr(watch)
    assert "rnn.l1: W_hh is frozen: no gradient norms" in text
    assert max(map(len, text.split("\n"))) <= 100
    long = nn.ModuleDict(
        {"a_very_long_name_of_a_module_that_holds_the_encoder": lstm()}
    )
    with gradwatch.watch(long, dir=None, every=1) as watch:
        optimizer = torch.optim.SGD(long.parameters(), 0.1)
        [model] = long.values()
        model(batches(1)[0]).sum().backward()
        optimizer.step()
        text = repr(watch)
    assert max(map(len, text.split("\n"))) <= 100
    wide = Tagger(nn.LSTM(4, 8, num_layers=70), 8)
    with gradwatch.watch(wide, dir=None) as watch:
        assert "... 40 more" in repr(watch)


def test_the_table_says_where_a_module_was_not_called_or_is_gone():
    model = lstm()
    with gradwatch.watch(model, dir=None) as watch:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.rnn.forward(batches(1)[0])[0].sum().backward()
        optimizer.step()
        assert "rnn.l0: rho is not measured" in repr(watch)
        model.rnn = nn.LSTM(4, 8)
        gc.collect()
        train(model, 2)
        assert "rnn.l0: its module is gone" in repr(watch)


def test_traces_exports_and_transforms_are_left_alone():
    model, x = lstm(), batches(1)[0]
    with gradwatch.watch(model, dir=None, every=1) as watch:
        torch.export.export(model, (x,))
        torch.jit.trace(model, (x,))
        parameters = dict(model.named_parameters())

        def loss(parameters):
            return torch.func.functional_call(model, parameters, (x,)).sum()

        torch.func.grad(loss)(parameters)
        train(model, 2)
        assert watch.health["failed"] == {}
        assert len(watch.records) == 2


class Failing:
    """A sink that fails, at once or later."""

    def __init__(self, after=0):
        self.after, self.got, self.closed, self.tries = after, [], False, 0

    def write(self, record, alerts=()):
        self.tries += 1
        if len(self.got) >= self.after:
            raise OSError("no space left")
        self.got.append(record)

    def close(self):
        self.closed = True


def test_a_sink_that_raises_is_tried_three_times_and_told_twice(lenient, lines):
    model, sink = lstm(), Failing(after=2)
    with gradwatch.watch(model, dir=None, sinks=[sink]) as watch:
        train(model, 8)
        assert len(watch.records) == 8
        assert watch.health["state"] == "degraded"
        assert list(watch.health["failed"]) == ["sink 0 (Failing)"]
        assert watch.health["off"] == ["sink 0 (Failing)"]
    assert len(sink.got) == 2 and sink.tries == 5 and sink.closed
    said = [text for _, text in lines if "no space left" in text]
    assert [("Traceback" in text, "is off from" in text) for text in said] == [
        (True, False),
        (False, True),
        (False, False),  # the closing lines
    ]


def test_failures_that_lie_far_apart_switch_nothing_off():
    health = Health(lambda text: None)
    error = RuntimeError("now and then")
    for _ in range(4):
        assert not health.fail("a part", error)
        for _ in range(1001):
            health.step()
    assert not health.fail("a part", error) and not health.fail("a part", error)
    assert health.fail("a part", error) and health.off == {"a part"}


def test_an_error_without_words_is_reported_too(lines):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    health = Health(console.report)
    with health.guard("a part"):
        health._strict = False
        raise Mute
    assert health.failed == {"a part": "Mute (its text fails: RuntimeError)"}
    assert len(lines) == 1 and "a part failed" in lines[0][1]


def test_a_user_sink_gets_every_step_or_every_so_many():
    model, sink = lstm(), Failing(after=100)
    rare = Failing(after=100)
    rare.every = 4
    with gradwatch.watch(model, dir=None, sinks=[sink, rare]) as watch:
        train(model, 10)
        assert [r.step for r in sink.got] == list(range(10))
        assert [r.step for r in rare.got] == [0, 4, 8]
        assert watch.records[3] == sink.got[3]


def test_a_callback_that_raises_is_said_once(lenient, lines):
    model = lstm()

    def callback(alert):
        raise KeyError("mine")

    with gradwatch.watch(model, dir=None, on_alert=callback) as watch:
        train(model, 8, spoil=5)
        assert len(watch.records) == 8
    assert sum("KeyError" in t for _, t in lines if "Traceback" in t) == 1


@pytest.mark.parametrize("part", ["norms", "weakref"])
def test_a_failure_inside_never_reaches_the_training(part, lenient, lines, monkeypatch):
    from gradwatch.depths import measured, reader

    bare, model = lstm(), lstm()
    train(bare, 8)
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) > 3:
            raise RuntimeError("inside")
        return [1.0] * len(args[0])

    if part == "norms":
        monkeypatch.setattr(reader, "norms", fail)
    else:
        monkeypatch.setattr(measured, "Drain", fail)
    watch = gradwatch.watch(model, dir=None)
    train(model, 8)
    for a, b in zip(bare.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "gradients" in watch.health["failed"]
    assert sum("Traceback" in text for _, text in lines) == 1
    watch.close()
    assert hooks_of(model) == []


def clip_an_inf(weight):
    weight.grad[0, 0] = math.inf
    nn.utils.clip_grad_norm_([weight], 1.0)


def assign(weight):
    weight.grad = weight.grad * math.nan


BETWEEN = {
    "in place": lambda weight: weight.grad.mul_(math.nan),
    "by .data": lambda weight: weight.grad.data.mul_(math.nan),
    "by numpy": lambda weight: weight.grad.numpy().fill(math.nan),
    "by assignment": assign,
    "by a clip of Inf": clip_an_inf,
}


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("how", BETWEEN)
def test_raise_keeps_weights_intact_from_nan_after_backward(how, optimizers):
    model = Tagger(nn.LSTM(4, 8), 8)
    own = [list(model.rnn.parameters()), list(model.head.parameters())]
    parts = [[*own[0], *own[1]]] if optimizers == 1 else own[::-1]
    steppers = [torch.optim.SGD(part, 0.1) for part in parts]
    with gradwatch.watch(model, dir=None, on_alert="raise") as watch:
        for step, x in enumerate(batches(8)):
            model.zero_grad()
            model(x).square().mean().backward()
            if step == 5:
                BETWEEN[how](model.rnn.weight_hh_l0)
                before = copy.deepcopy(model.state_dict())
                with pytest.raises(gradwatch.TrainingAlert) as caught:
                    steppers[0].step()
                break
            for stepper in steppers:
                stepper.step()
        alert = caught.value.alert
        assert (alert.step, alert.cause) == (5, "after_backward")
        assert "skipped_step" in watch.records[-1].events
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_raise_keeps_the_weights_intact():
    model = lstm()
    with gradwatch.watch(model, dir=None, on_alert="raise") as watch:
        train(model, 5)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(2):  # and again, while the incident is open
            (model(batches(1)[0]).sum() * math.nan).backward()
            with pytest.raises(gradwatch.TrainingAlert, match="nonfinite at step 5"):
                optimizer.step()
            optimizer.zero_grad()
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        train(model, 2)
        assert "skipped_step" in watch.records[5].events
        assert [r.step for r in watch.records] == list(range(9))
        error = watch.incidents[0]
        assert error.kind == "nonfinite" and len(error.alerts) == 1
    copied = pickle.loads(pickle.dumps(gradwatch.TrainingAlert(watch.alerts[0])))
    assert copied.alert == watch.alerts[0]


def test_disabled_is_a_watch_that_does_nothing(monkeypatch):
    monkeypatch.setenv("GRADWATCH_DISABLED", "1")
    model = lstm()
    with gradwatch.watch(model) as watch:
        train(model)
        watch.log(loss=1.0)
        watch.step()
        watch.flush()
        watch.probe_now()
        assert hooks_of(model) == []
        assert watch.streams == () and len(watch.records) == 0
        assert watch.dir is None and watch.health["state"] == "off"
        watch.load_state_dict(watch.state_dict())
        assert "disabled" in repr(watch)


def test_only_rank_zero_measures(monkeypatch, lines, tmp_path):
    monkeypatch.setenv("RANK", "1")
    model = lstm()
    with gradwatch.watch(model, dir=tmp_path) as watch:
        train(model)
        assert hooks_of(model) == [] and len(watch.records) == 0
    with (
        gradwatch.watch(model, dir=tmp_path, on_alert="raise"),
        pytest.raises(gradwatch.TrainingAlert),
    ):
        train(model, 8, spoil=5)
    assert lines == [] and list(tmp_path.iterdir()) == []


BAD = {
    "no module": (lambda: gradwatch.watch("model"), TypeError, "the model is a str"),
    "none": (lambda: gradwatch.watch(None), TypeError, "nn.Module"),
    "nothing recurrent": (
        lambda: gradwatch.watch(nn.Sequential(nn.Linear(1, 1), nn.ReLU())),
        ValueError,
        "it contains Linear, ReLU",
    ),
    "meta": (
        lambda: gradwatch.watch(nn.LSTM(2, 3, device="meta")),
        ValueError,
        "lstm.l0 are on the device 'meta'",
    ),
    "every 0": (lambda: gradwatch.watch(lstm(), every=0), ValueError, "at least 1"),
    "unknown depth": (
        lambda: gradwatch.watch(lstm(), every={"rho": 5}),
        ValueError,
        "the probe groups are gradients, state",
    ),
    "budget": (lambda: gradwatch.watch(lstm(), budget=-1), ValueError, "budget is -1"),
    "start": (lambda: gradwatch.watch(lstm(), start_step=-1), ValueError, "start_step"),
    "samples": (lambda: gradwatch.watch(lstm(), flow_samples=0), ValueError, "flow_sa"),
    "sink": (lambda: gradwatch.watch(lstm(), sinks=[3]), TypeError, "holds a int"),
    "W&B among the sinks": (
        lambda: gradwatch.watch(lstm(), sinks=[gradwatch.sinks.Wandb()]),
        TypeError,
        "pass it as wandb=",
    ),
    "wandb": (lambda: gradwatch.watch(lstm(), wandb="yes"), ValueError, '"auto"'),
    "run": (
        lambda: gradwatch.watch(lstm(), wandb=3),
        TypeError,
        "wandb is 3; expected",
    ),
    "alert": (lambda: gradwatch.watch(lstm(), on_alert=3), TypeError, "on_alert is 3"),
    "sinks": (lambda: gradwatch.watch(lstm(), sinks=3), TypeError, r"sinks=\[3\]"),
    "rules": (
        lambda: gradwatch.watch(lstm(), rules=[3]),
        TypeError,
        "rules holds a in",
    ),
    "scaler": (lambda: gradwatch.watch(lstm(), scaler=3), TypeError, "a GradScaler"),
    "loss": (
        lambda: gradwatch.watch(lstm()).log(loss="much"),
        TypeError,
        "loss is 'much'; expected a number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_clear_error(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=text):
        call()


def test_arguments_are_checked_on_a_model_that_is_watched_already():
    model = lstm()
    with gradwatch.watch(model, dir=None), pytest.raises(ValueError, match="budget"):
        gradwatch.watch(model, budget=3)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(1, 1)

    def forward(self, x):
        return self.rnn(x)[0][-1]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 1), (7, 1, 1), (6, 0, 1)], ids=str)
def test_the_smallest_shapes_train_on(shape):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None, every=1, budget=None) as watch:
        for _ in range(3):
            model(torch.ones(shape)).sum().backward()
            optimizer.step()
        assert len(watch.records) == 3
        assert watch.health["failed"] == {}
        assert math.isfinite(watch.latest["gradwatch/rnn/l0/rho"])


def test_frozen_weights_are_watched_without_gradients():
    model = lstm()
    for p in model.rnn.parameters():
        p.requires_grad_(False)
    with gradwatch.watch(model, dir=None, every=1) as watch:
        train(model, 3)
        assert len(watch.records) == 3
        assert "gradwatch/rnn/l0/grad_norm_hh" not in watch.latest


def test_a_weight_that_is_nan_from_the_start():
    model = lstm(hidden=40)
    with torch.no_grad():
        model.rnn.weight_hh_l0[0, 0] = math.nan
    with gradwatch.watch(model, dir=None, every=1) as watch:
        train(model, 3)
        assert math.isnan(watch.latest["gradwatch/rnn/l0/rho/i"])
        assert math.isfinite(watch.records[0].metrics["gradwatch/rnn/l0/rho/f"])
        assert watch.latest["gradwatch/rnn/l0/rho_certified"] == 0.0
        assert [(a.kind, a.step) for a in watch.alerts] == [("nonfinite", 0)]


def test_a_folder_that_cannot_be_written_falls_back_and_says_where(tmp_path, lines):
    (tmp_path / "file").write_text("")
    model = lstm()
    with gradwatch.watch(model, dir=tmp_path / "file" / "runs") as watch:
        train(model, 2)
        assert watch.dir is not None and watch.dir.is_dir()
        assert any(
            str(watch.dir) in text for level, text in lines if level == "WARNING"
        )
        assert len(watch.records) == 2
    assert len(gradwatch.load(watch.dir).records) == 2


def test_names_of_streams_are_those_of_pytorch():
    model = nn.ModuleDict(
        {
            "enc": nn.LSTM(4, 8, num_layers=2, bidirectional=True, proj_size=3),
            "dec": nn.GRUCell(4, 8),
            "old": nn.RNN(4, 8, nonlinearity="relu"),
        }
    )
    model["again"] = model["dec"]
    with gradwatch.watch(torch.compile(model), dir=None) as watch:
        assert [s.name for s in watch.streams] == [
            "enc.l0",
            "enc.l0_reverse",
            "enc.l1",
            "enc.l1_reverse",
            "dec",
            "old.l0",
        ]
        assert watch.streams[2].input_size == 6
        assert [s.kind for s in watch.streams[-2:]] == ["GRU", "RNN_RELU"]
        assert watch.streams[0].gates == ("i", "f", "g", "o")
    with gradwatch.watch(nn.LSTM(4, 8), dir=None) as watch:
        assert watch.streams[0].name == "lstm.l0"
        assert watch.streams[0].key == "lstm/l0"


def test_a_loop_of_cells_has_its_numbers():
    torch.manual_seed(0)
    model = Loop(nn.LSTMCell(4, 8), 8)
    with gradwatch.watch(model, dir=None) as watch:
        train(model, 3)
        assert watch.latest["gradwatch/cell/update_ratio"] > 0
        assert 0 < watch.latest["gradwatch/cell/rho"] < 2
        assert watch.latest["gradwatch/cell/grad_norm_bias"] > 0


def test_public_names_are_exactly_the_documented_ones():
    shown = {n for n, v in vars(gradwatch).items() if n in gradwatch.__all__}
    assert shown == set(gradwatch.__all__)
    others = {
        name
        for name, value in vars(gradwatch).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert others <= set(gradwatch.__all__)


def test_import_pulls_in_no_optional_dependency():
    code = (
        "import sys, gradwatch\n"
        "heavy = {'wandb', 'altair', 'lightning', 'transformers', 'tensorboard'}\n"
        "sys.exit(bool(heavy & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_alert_is_on_disk_before_the_next_statement(tmp_path):
    code = f"""
import math, os, torch, gradwatch
from testbed.models import batches, lstm
model = lstm()
watch = gradwatch.watch(model, dir={str(tmp_path)!r}, name="dies")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for i, x in enumerate(batches(30)):
    optimizer.zero_grad()
    (model(x).sum() * (math.nan if i == 25 else 1)).backward()
    optimizer.step()
    if i == 25:
        os._exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 7
    run = gradwatch.load(tmp_path / "dies")
    assert [(a.kind, a.step) for a in run.alerts] == [("nonfinite", 25)]
    assert [r.step for r in run.records] == list(range(26))
    assert not run.closed
    assert [i.until for i in run.incidents] == [None]


def test_a_run_ends_at_exit_with_its_verdict(tmp_path):
    code = f"""
import gradwatch
from tests.test_watch import train
from testbed.models import lstm
model = lstm()
gradwatch.watch(model, dir={str(tmp_path)!r}, name="exits")
train(model, 20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "20 steps, no alarm" in done.stderr
    run = gradwatch.load(tmp_path / "exits")
    assert run.closed and len(run.records) == 20


def test_a_forked_child_writes_nothing(tmp_path):
    model = lstm()
    with gradwatch.watch(model, dir=tmp_path, name="forks") as watch:
        train(model, 10)
        pid = os.fork()
        if pid == 0:
            watch.close()
            os._exit(0)
        os.waitpid(pid, 0)
        train(model, 3)
    run = gradwatch.load(tmp_path / "forks")
    assert [r.step for r in run.records] == list(range(13))


def test_the_logger_can_be_silenced(lines):
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    try:
        with gradwatch.watch(lstm(), dir=None):
            pass
        assert lines == []
    finally:
        logging.getLogger("gradwatch").setLevel(logging.INFO)
