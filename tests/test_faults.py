"""What must not happen: a training that is harmed, an alert that is lost."""

import errno
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import console
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.kinds.incidents import Incidents
from gradwatch.kinds.judge import Judge
from gradwatch.record import Incident, StepRecord, TrainingAlert
from gradwatch.records import Records
from gradwatch.rules import default_rules
from gradwatch.sinks import lines as lines_module
from gradwatch.sinks.jsonl import Jsonl
from gradwatch.sinks.lines import Lines
from testbed.models import Tagger, batches, lstm
from tests.test_watch import train

NAN_AT = (31, 61)
ROOT = Path(__file__).parents[1]


def trained(model, during=lambda step: None, steps=80, **options):
    """Train with a NaN at two steps; call back before each step."""
    with gradwatch.watch(model, wandb=None, budget=None, **options) as watch:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step, x in enumerate(batches(steps)):
            during(step)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (loss * math.nan if step in NAN_AT else loss).backward()
            if step not in NAN_AT:
                optimizer.step()
    return watch


def told(lines):
    return [text for _, text in lines if "written" in text]


# ---- the folder


class Disk:
    """Stands in for ``os``; it is full for a while, after part of a line."""

    def __init__(self, *, partly=True):
        self.full, self.partly = False, partly

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, file, data):
        if not self.full:
            return os.write(file, data)
        if self.partly and len(data) > 10:
            return os.write(file, data[: len(data) // 3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_a_while_loses_nothing(lines, monkeypatch):
    disk = Disk()
    monkeypatch.setattr(lines_module, "os", disk)

    def during(step):
        disk.full = 30 <= step < 50

    watch = trained(lstm(), during)
    run = gradwatch.load(watch.dir)
    assert [r.step for r in run.records] == list(range(80)) and run.skipped == []
    assert [a.step for a in run.alerts] == list(NAN_AT)
    assert watch.health["dropped"] == {} and watch.health["failed"] == {}
    assert [("cannot" in t, "again" in t) for t in told(lines)] == [
        (True, True),
        (True, True),
        (False, True),
        (False, True),
    ]  # of records and of alerts, that it is full, and that it is not any more


def test_what_is_lost_on_a_full_disk_is_counted_and_told(lines, monkeypatch):
    disk = Disk()
    monkeypatch.setattr(lines_module, "os", disk)

    def during(step):
        disk.full = step >= 40

    watch = trained(lstm(), during)
    dropped = watch.health["dropped"]
    run = gradwatch.load(watch.dir)
    assert len(run.records) + dropped["records.jsonl"] == 80
    assert len(run.alerts) + dropped["alerts.jsonl"] == 2
    last = lines[-1][1]
    assert f"{dropped['records.jsonl']} records did not reach records.jsonl" in last
    assert "1 alerts did not reach alerts.jsonl" in last


def test_lines_that_wait_are_bounded(tmp_path, monkeypatch):
    disk = Disk(partly=False)
    disk.full = True
    monkeypatch.setattr(lines_module, "os", disk)
    said = []
    file = Lines(tmp_path / "x.jsonl", said.append, kept=100)
    for i in range(50):
        file.write([f"{i:09d}"])
    assert file.waiting == 10 and file.lost == 40
    disk.full = False
    file.write()
    file.close()
    kept = (tmp_path / "x.jsonl").read_text().split()
    assert kept == [f"{i:09d}" for i in range(40, 50)]
    assert "40 lines before that are lost" in said[-1] and len(said) == 2


def test_a_line_that_cannot_be_taken_back_is_ended(tmp_path, monkeypatch):
    disk = Disk()
    disk.ftruncate = lambda file, size: (_ for _ in ()).throw(OSError("no"))
    monkeypatch.setattr(lines_module, "os", disk)
    file = Lines(tmp_path / "x.jsonl", lambda text: None)
    file.write([json.dumps({"step": 0})])
    disk.full = True
    file.write([json.dumps({"step": 1, "long": "x" * 40})])
    disk.full = False
    file.write([json.dumps({"step": 2})])
    file.close()
    good = []
    for line in (tmp_path / "x.jsonl").read_text().splitlines():
        try:
            good.append(json.loads(line)["step"])
        except ValueError:
            assert line.startswith('{"step": 1')
    assert good == [0, 1, 2]


def test_a_file_where_incidents_should_be_costs_incidents_alone(lines):
    def during(step):
        if step == 20:
            [folder] = Path(os.environ["GRADWATCH_DIR"]).glob("*/")
            (folder / "incidents").write_text("mine", encoding="ascii")

    watch = trained(lstm(), during)
    run = gradwatch.load(watch.dir)
    assert len(run.records) == 80 and len(run.alerts) == 2
    assert (watch.dir / "incidents").read_text(encoding="ascii") == "mine"
    assert watch.health["dropped"] == {"incidents and meta.json": 2}
    assert len(told(lines)) == 1


def test_files_that_cannot_be_opened_for_a_while_come_later(lines, monkeypatch):
    real, failing = os.replace, [True]

    def replace(*args):
        if failing:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*args)

    monkeypatch.setattr(os, "replace", replace)

    def during(step):
        if step == 50:
            failing.clear()

    watch = trained(lstm(), during)
    run = gradwatch.load(watch.dir)
    assert [i.since for i in run.incidents] == list(NAN_AT) and run.closed
    assert watch.health["dropped"] == {}
    assert ["again" in text for text in told(lines)] == [True, True]


def test_a_real_limit_on_the_size_of_files():
    """By RLIMIT_FSIZE, which also makes the kernel write half a line."""
    code = """
import math, resource, signal, sys, torch, gradwatch
from testbed.models import lstm
from tests.test_faults import trained
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def during(step):
    if step == 30:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
    if step == 50:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
watch = trained(lstm(), during, dir=sys.argv[1])
run = gradwatch.load(watch.dir)
assert [r.step for r in run.records] == list(range(80)), len(run.records)
assert run.skipped == [] and len(run.alerts) == 2
assert watch.health["dropped"] == {}
"""
    done = run_python(code, os.environ["GRADWATCH_DIR"])
    assert done.returncode == 0, done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert "is written again" in done.stderr


def run_python(code, *args, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )


def test_an_alert_survives_being_killed(tmp_path):
    code = """
import os, signal, sys
from testbed.models import lstm
from tests.test_faults import trained
def on_alert(alert):
    print(alert.step, flush=True)
    if alert.step > 60:
        os.kill(os.getpid(), signal.SIGKILL)
trained(lstm(), dir=sys.argv[1], on_alert=on_alert)
"""
    done = run_python(code, str(tmp_path))
    assert done.returncode == -signal.SIGKILL
    [folder] = [p for p in tmp_path.iterdir() if p.is_dir()]
    run = gradwatch.load(folder)
    assert [a.step for a in run.alerts] == [int(x) for x in done.stdout.split()]
    assert [r.step for r in run.records] == list(range(62)) and not run.closed


# ---- the console


class Broken(logging.Handler):
    def emit(self, record):
        raise RuntimeError("the handler is broken")


def test_a_handler_that_raises_reaches_nobody(lenient):
    log, handler = logging.getLogger("gradwatch"), Broken()
    before = console.undelivered()
    log.addHandler(handler)
    try:
        watch = trained(lstm())
    finally:
        log.removeHandler(handler)
    assert [a.step for a in watch.alerts] == list(NAN_AT)
    assert watch.health["dropped"] == {"the console": 4}  # two lines, two alarms
    assert console.undelivered() == before + 4


def test_training_goes_on_without_stderr(tmp_path):
    code = """
import os, sys
from testbed.models import lstm
from tests.test_faults import trained
os.close(2)
watch = trained(lstm(), dir=sys.argv[1])
print(len(watch.records), [a.step for a in watch.alerts])
"""
    done = run_python(code, str(tmp_path))
    assert done.stdout == "80 [31, 61]\n" and done.returncode == 0


# ---- threads


def rounds(count, errors, train_only=False):
    """Train a model while others do, attaching and closing a watch each time."""
    try:
        model = Tagger(nn.RNN(4, 8), 8)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.randn(5, 3, 4)
        for _ in range(count):
            watch = None if train_only else gradwatch.watch(model, dir=None, wandb=None)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if watch is not None:
                watch.close()
    except BaseException as error:
        errors.append(error)


@pytest.mark.parametrize(
    ("count", "bare"), [(40, 4), pytest.param(1250, 0, marks=pytest.mark.slow)]
)
def test_watches_come_and_go_while_other_threads_train(count, bare):
    """Eight threads, of which some train without a watch: 10,000 rounds in the end."""
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    interval, errors = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=rounds, args=(count, errors, i < bare))
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        logging.getLogger("gradwatch").setLevel(logging.NOTSET)
    assert errors == []


def test_records_are_read_while_another_thread_trains():
    model, done, errors, reads = lstm(), threading.Event(), [], []

    def read():
        try:
            while not done.is_set():
                steps = [r.step for r in watch.records]
                assert steps == list(range(len(steps)))
                reads.append((watch.latest, watch.alerts, watch.incidents))
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with gradwatch.watch(model, dir=None, wandb=None) as watch:
            reader = threading.Thread(target=read)
            reader.start()
            train(model, 120)
            done.set()
            reader.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == [] and len(watch.records) == 120 and reads


def test_records_that_rotate_are_read_whole_and_in_order():
    """More are added than are held, while another thread goes through them."""
    records, done, errors = Records(limit=50), threading.Event(), []

    def read():
        try:
            while not done.is_set():
                steps = [r.step for r in records]
                assert steps == list(range(steps[0], steps[0] + len(steps)))
                steps = records.series("x")[0].tolist()
                assert steps == list(range(steps[0], steps[0] + len(steps)))
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        records.append(StepRecord(step=0, metrics={"x": 0.0}))
        reader = threading.Thread(target=read)
        reader.start()
        for step in range(1, 20_000):
            records.append(StepRecord(step=step, metrics={"x": 0.0}))
        done.set()
        reader.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_a_watch_is_closed_by_another_thread(lenient, lines):
    model = lstm()
    watch = gradwatch.watch(model, dir=None, wandb=None)
    closer = threading.Timer(0.05, watch.close)
    closer.start()
    bare = lstm()
    train(model, 150)
    train(bare, 150)
    closer.join()
    assert watch.health["failed"] == {}
    for a, b in zip(bare.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_forked_child_waits_for_no_lock_of_another_thread():
    watch = gradwatch.watch(lstm(), dir=None, wandb=None)
    held, free = threading.Event(), threading.Event()

    def hold():
        with watch._health.lock:
            held.set()
            free.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        watch.flush()
        watch.close()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    free.set()
    holder.join()
    watch.close()
    assert status == 0


# ---- interruptions


@pytest.mark.parametrize("nth", [1, 7, 30, 60, 200])
def test_a_watch_works_on_after_an_interruption_inside_it(nth, monkeypatch, lenient):
    """Ctrl-C at some call of ours, caught by the user, who trains on."""
    from gradwatch.depths import launch, reader
    from gradwatch.numerics import norms

    count, hit = [0], [0]

    def interrupting(real):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == nth:
                hit[0] += 1
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(reader, "norms", interrupting(norms.norms))
    monkeypatch.setattr(launch, "trajectory", interrupting(launch.trajectory))
    model, interrupted = lstm(), 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradwatch.watch(model, dir=None, wandb=None, every=2, budget=None) as watch:
        for x in batches(100):
            try:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            except KeyboardInterrupt:
                interrupted += 1
        assert interrupted == hit[0] <= 1
        steps = [r.step for r in watch.records]
        assert steps == sorted(set(steps)) and len(steps) >= 99
        assert watch.records[-1].metrics["gradwatch/grad_norm"] > 0
        assert "gradwatch/rnn/l0/horizon" in watch.latest
        assert watch.health["off"] == []


def test_out_of_memory_in_a_replay_is_tried_again(lenient, monkeypatch):
    from gradwatch.depths import launch

    real, calls = launch.trajectory, []

    def short_of_memory(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("for a moment")
        return real(*args)

    monkeypatch.setattr(launch, "trajectory", short_of_memory)
    model = lstm()
    with gradwatch.watch(model, dir=None, every=2, budget=None) as watch:
        train(model, 8)
    found = watch.records.series("gradwatch/rnn/l0/saturated")[0]
    assert found.tolist() == [0, 4, 6]
    assert "MemoryError" in watch.health["failed"]["state"]
    assert watch.health["off"] == []


class Wanting:
    """A rule that asks for the flow, and fails for good."""

    wants = "flow"

    def update(self, record):
        raise RuntimeError("a rule of the user's")


def test_a_rule_that_is_off_asks_for_nothing_any_more(lenient):
    model = lstm()
    with gradwatch.watch(
        model, dir=None, wandb=None, rules=[Wanting()], budget=None, every=1000
    ) as watch:
        train(model, 12)
        assert watch.health["off"] == ["rule Wanting"]
    steps = watch.records.series("gradwatch/rnn/l0/horizon")[0].tolist()
    assert max(steps) <= 3 and len(watch.records) == 12


def test_what_waits_when_gradients_are_off_is_recorded(lenient, monkeypatch):
    from gradwatch import quiet
    from gradwatch.depths import reader

    monkeypatch.setattr(quiet, "read", lambda grads: None)  # no step is quiet
    model, real, calls, failed_at = lstm(), reader.norms, [], []

    def fail(*args):
        calls.append(args)
        if len(calls) > 41:
            failed_at.append(watch._engine.number)
            raise RuntimeError("for good")
        return real(*args)

    monkeypatch.setattr(reader, "norms", fail)
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        train(model, 60)
        assert watch.health["off"] == ["gradients"]
    steps = [r.step for r in watch.records]
    assert set(range(failed_at[0])) <= set(steps) and failed_at[0] % 16


# ---- alarms that flap


def flapping(steps, folder):
    """Judge made-up steps of which every 30th is NaN; return the judge and alerts."""
    judge, sink = Judge(default_rules([]), Incidents(CATALOGUE)), None
    sink, given = Jsonl(folder, {}, say=print), []
    for step in range(steps):
        bad = step % 30 == 29
        norm = math.nan if bad else 1.0
        metrics = {"gradwatch/grad_norm": norm, "gradwatch/nonfinite": float(bad)}
        record = StepRecord(step=step, metrics=metrics)
        alerts, changed = judge.take(record)
        given += alerts
        sink.write(record, alerts)
        for incident in changed:
            sink.write_incident(incident, {})
    sink.close()
    return judge, given


def test_an_alarm_that_flaps_is_told_ever_more_seldom(tmp_path):
    judge, given = flapping(3000, tmp_path)
    assert [a.step for a in given] == [
        29 + 30 * n for n in (0, 1, 2, 3, 4, 6, 10, 18, 34, 66)
    ]
    assert "again: 67 times so far" in given[-1].message
    *_, last = judge.incidents.all()
    assert len(judge.incidents.all()) == 3 and last.repeats == 97
    files = sorted((tmp_path / "incidents").iterdir())
    assert len(files) == 3
    kept = [json.loads(path.read_text("ascii")) for path in files]
    assert max(k["repeats"] for k in kept) == 97
    assert len((tmp_path / "alerts.jsonl").read_text("ascii").splitlines()) == len(
        given
    )


def test_repeats_survive_a_resume(tmp_path):
    judge, _ = flapping(300, tmp_path)
    again = Incidents(CATALOGUE)
    again.load_state_dict(judge.incidents.state_dict())
    assert again.all() == judge.incidents.all()


def test_what_is_open_is_in_the_folder_of_a_resumed_run(tmp_path):
    model = lstm()
    with gradwatch.watch(model, dir=tmp_path, name="first", wandb=None) as watch:
        train(model, 8, spoil=7)
        state = watch.state_dict()
        assert [i.until for i in watch.incidents] == [None]
    with gradwatch.watch(model, dir=tmp_path, name="second", wandb=None) as watch:
        watch.load_state_dict(state)
    [incident] = gradwatch.load(tmp_path / "second").incidents
    assert isinstance(incident, Incident) and incident.kind == "nonfinite"
    assert incident.since == 7 and incident.until is None


# ---- hostile names


def test_names_cannot_write_to_the_terminal():
    model = nn.ModuleDict({"a\x1b[31m\nb": nn.GRU(2, 3)})
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        model["a\x1b[31m\nb"](torch.ones(3, 1, 2))[0].sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert "\x1b" not in repr(watch) and "\x1b" not in "".join(watch.latest)
    [alert] = [
        a for a in trained(lstm(), steps=35, dir=None).alerts if a.kind == "nonfinite"
    ]
    from dataclasses import replace

    said = str(TrainingAlert(replace(alert, message="a\x1b[31m\nb")))
    assert said == "a\\x1b[31m\nb"


# ---- every call that leaves gradwatch


def injected(*options):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.faults", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_sample_of_all_calls_may_fail():
    report = injected("--share", "0.007")
    assert report["harmed"] == {} and report["tried"] > 6


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--again",)], ids=["once", "its handler too"])
def test_every_call_may_fail(more):
    report = injected(*more)
    assert report["harmed"] == {} and report["sites"] > 400


@pytest.mark.slow
def test_memory_of_a_watch_that_is_off_is_flat(lenient, monkeypatch):
    from gradwatch.depths import reader

    def fail(*args):
        raise RuntimeError("for good")

    monkeypatch.setattr(reader, "norms", fail)
    model = lstm()
    with gradwatch.watch(model, dir=None, wandb=None) as watch:
        train(model, 500)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        train(model, 3000)
        assert watch.health["off"] == ["gradients"]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2000  # KiB
