"""W&B gets its rows and alerts, the user's rows stay as they are, training goes on."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import wandb
from torch import nn

import gradwatch
from gradwatch.block import Block
from gradwatch.facts import Facts, ModuleFacts
from gradwatch.kinds.catalogue import CATALOGUE, title
from gradwatch.metrics import STEP_KEY, headline_keys
from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.sinks import Wandb
from gradwatch.sinks.fold import Fold
from gradwatch.sinks.wandb_media import Media
from gradwatch.sinks.wandb_rows import Item, Rows
from testbed.models import batches, lstm
from testbed.wandb_log import read_log
from tests.support.seldom import seldom
from tests.support.wandb_run import FakeRun
from tests.support.wandb_server import WandbServer

NORM = "gradwatch/grad_norm"
RATIO = "gradwatch/clip_ratio"
MEDIA = "gradwatch/media/"
HINT = "W&B run has not moved"

WITHOUT_WANDB = {k: v for k, v in os.environ.items() if "WANDB" not in k}
"""For a child process; else it would share, and may end, this one's wandb process."""


def log_twice(run, i, values):
    run.log(values, step=i)
    run.log({"late": float(i)}, step=i)


STYLES = {
    "log(d)": lambda run, i, values: run.log(values),
    "step=i": lambda run, i, values: run.log(values, step=i),
    "step=3i": lambda run, i, values: run.log(values, step=3 * i),
    "two logs at step=i": log_twice,
    "never": lambda run, i, values: None,
}
styles = pytest.mark.parametrize("style", STYLES)


@pytest.fixture(scope="module", autouse=True)
def _service_ends():
    yield
    wandb.teardown()


@pytest.fixture
def begin(tmp_path, monkeypatch):
    # Starts runs, offline unless told otherwise; whatever still runs is finished.
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    begun = []

    def start(mode="offline", **settings):
        quiet = {"console": "off", "silent": True, "x_disable_stats": True}
        settings.setdefault("finish_timeout", 20)  # seconds; by default a week
        run = wandb.init(
            project="gradwatch",
            mode=mode,
            dir=tmp_path,
            settings=wandb.Settings(**quiet, x_disable_meta=True, **settings),
        )
        begun.append(run)
        return run

    yield start
    for run in begun:
        run.finish()


@pytest.fixture
def server(begin, monkeypatch):
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        begun = []

        def online():
            run = begin(
                "online",
                base_url=server.url,
                api_key=server.environment["WANDB_API_KEY"],
                x_file_stream_transmit_interval=1,  # whole seconds only
            )
            begun.append(run)
            return run

        server.begin = online
        yield server
        server.heal()
        for run in begun:  # while the server still answers
            run.finish()
        assert server.unknown == []


def finish(run):
    path = run.settings.sync_file
    run.finish()
    return read_log(path)


def train(model, rows, log=lambda i, values: None, start=0):
    """Train as users do; a batch that gives no finite loss is left out."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i, x in enumerate(rows, start):
        loss = nn.functional.cross_entropy(model(x), torch.zeros(x.shape[1]).long())
        loss.backward()
        if loss.isfinite():
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        optimizer.zero_grad()
        log(i, {"loss": loss.item()})


def settled(sink):
    """Wait until the worker has taken what is queued, as between two slow steps."""
    while sink.queued:
        time.sleep(0.0002)


def record(step, value=1.0, **more):
    return StepRecord(step=step, metrics={NORM: value, **more})


def alert(step, kind="spike", severity="warning"):
    return Alert(
        kind=kind,
        severity=severity,
        step=step,
        since=step,
        message=f"what happened at step {step}",
        streams=("rnn.l0",),
    )


def rows_of_the_user(log):
    ours_or_time = ("gradwatch/", "_timestamp", "_runtime")
    rows = [
        r for r in log.rows if any(not k.startswith(("gradwatch/", "_")) for k in r)
    ]
    return [
        {k: v for k, v in row.items() if not k.startswith(ours_or_time)} for row in rows
    ]


def our_rows(log):
    return [row for row in log.rows if STEP_KEY in row]


def said(lines):
    return [text for _, text in lines]


# ---- the user's rows, and ours


@styles
def test_the_users_rows_are_as_without_gradwatch(style, begin):
    logs = []
    for watched in (False, True):
        run, model = begin(), lstm()
        watch = gradwatch.watch(model) if watched else None
        train(model, batches(45), lambda i, v, run=run: STYLES[style](run, i, v))
        if watch is not None:
            watch.close()
            steps, norms = watch.records.series(NORM)
        logs.append(finish(run))
    bare, seen = logs
    assert rows_of_the_user(seen) == rows_of_the_user(bare)
    assert len(rows_of_the_user(seen)) == (0 if style == "never" else 45)
    assert not our_rows(bare)
    ours = our_rows(seen)
    assert len(ours) == 1 if style == "never" else len(ours) >= 4
    assert ours[-1][STEP_KEY] == steps[-1] == 44
    assert max(row[NORM] for row in ours) == norms.max()
    assert min(row[RATIO] for row in ours) == watch.records.series(RATIO)[1].min()


@pytest.mark.parametrize(
    ("style", "interval", "burst"),
    [
        ("log(d)", 1, 1),
        ("log(d)", 10, 1),
        ("log(d)", 1, 16),
        ("log(d)", 100, 16),
        ("step=3i", 1, 1),
        ("step=3i", 7, 16),
        ("step=3i", 100, 1),
    ],
)
def test_no_maximum_is_lost_and_hardly_one_shown_twice(style, interval, burst, begin):
    run, sink = begin(), Wandb()
    generator = torch.Generator().manual_seed(interval)
    values = torch.randperm(411, generator=generator).double().tolist()
    for i in range(411):
        if i % burst == 0:  # the watch may take in several steps at once
            for j in range(max(i - burst + 1, 0), i + 1):
                sink.write(record(j, values[j]))
            settled(sink)
            time.sleep(0.001 * burst)
        if i % interval == 0:
            STYLES[style](run, i, {"loss": 0.0})
    for j in range(i - i % burst + 1, i + 1):
        sink.write(record(j, values[j]))
    sink.close()
    ours = our_rows(finish(run))
    ends = [row[STEP_KEY] for row in ours]
    assert ends == sorted(set(ends))
    assert ends[-1] == 410
    largest = [max(values[a + 1 : b + 1]) for a, b in pairwise([-1, *ends])]
    shown = [row[NORM] for row in ours]
    assert all(s >= x for s, x in zip(shown, largest, strict=True))
    assert sum(s != x for s, x in zip(shown, largest, strict=True)) <= len(ours) / 5
    # A row for each of the user's that is at least ten steps after the one before.
    assert len(ours) >= 411 / max(interval, 10, burst) - 1


def test_a_commit_on_the_way_as_a_row_goes_out_costs_no_maximum():
    """The worst interleaving: the user's row goes first, its step rises afterwards."""
    run = FakeRun()
    sink = Wandb(run)
    run.before_log = lambda: run.commit(late=True)
    sink.write(record(0, 9.0))
    sink.flush()
    run.before_log = lambda: None
    run.arrive()
    sink.write(record(1))
    sink.write(record(2))
    sink.flush()  # replaces the row of step 0, which waits still
    run.commit()
    assert [row.get(NORM) for row in run.rows] == [None, 9.0]
    sink.close()


def test_a_run_without_a_step_of_its_own_gets_each_row_once():
    run = FakeRun()
    del run._local_step
    run.before_log = lambda: run.rows.append(run.waiting)
    sink = Wandb(run)
    for i in range(25):
        sink.write(record(i, 100.0 - i))
        sink.flush()
    sink.close()
    assert run.waiting[NORM] == 100.0 - run.waiting[STEP_KEY]


def test_what_is_sent_of_a_deep_lstm(server):
    run = server.begin()
    run.define_metric("*", step_metric="trainer/step")  # as Lightning does
    model = lstm(num_layers=2, bidirectional=True)
    with gradwatch.watch(model) as watch:
        train(model, batches(25), lambda i, values: run.log(values))
    headline = headline_keys(watch.streams)
    run.finish()
    got = server.runs[run.id]
    sent = {k for row in got.history for k in row if k.startswith("gradwatch/")}
    sent = {key for key in sent if MEDIA not in key}
    assert len(headline) == 33
    assert sent - {STEP_KEY} <= set(headline)
    assert not any("." in key for key in sent)
    for metric in ("grad_norm_hh", "update_ratio", "rho"):
        assert {f"gradwatch/{s.key}/{metric}" for s in watch.streams} <= sent
    assert all(got.metrics[key] == STEP_KEY for key in sent - {STEP_KEY})
    assert got.metrics["*"] == "trainer/step"
    for key in sent - {STEP_KEY}:
        values = [row[key] for row in got.history if key in row]
        spread = {"min": min(values), "max": max(values), "last": values[-1]}
        assert got.summary[key] == pytest.approx(spread)
    streams = got.config["gradwatch"]["value"]["streams"]
    assert [s["name"] for s in streams] == [s.name for s in watch.streams]


def test_all_keys_on_demand(begin):
    run, model = begin(), lstm()
    watch = gradwatch.watch(model, wandb=Wandb(keys="all", media=False))
    train(model, batches(12), lambda i, values: run.log(values))
    watch.close()
    log = finish(run)
    sent = {k for row in our_rows(log) for k in row if k.startswith("gradwatch/")}
    assert sent == {STEP_KEY, *watch.records.keys()}
    assert set(log.metrics) == sent


def test_above_eight_streams_the_first_eight_and_one_line(begin, lines):
    run, model = begin(), lstm(num_layers=5, bidirectional=True)
    watch = gradwatch.watch(model)
    train(model, batches(25), lambda i, values: run.log(values))
    watch.close()
    keys = {k for row in our_rows(finish(run)) for k in row}
    for n, stream in enumerate(watch.streams):
        assert (f"gradwatch/{stream.key}/grad_norm_hh" in keys) == (n < 8)
    (line,) = [text for text in said(lines) if "streams; for all" in text]
    assert "8 of the 10" in line


# ---- commit=True, and the hint


def test_with_commit_each_row_is_one_of_its_own(begin, lines):
    run, model = begin(), lstm()
    watch = gradwatch.watch(model, wandb=Wandb(commit=True, media=False))
    losses = []

    def log_seldom(i, values):
        if i % 100 == 0:
            run.log(values)
            losses.append(values["loss"])

    train(model, batches(231), log_seldom)
    watch.close()
    log = finish(run)
    steps, norms = watch.records.series(NORM)
    ends = [row[STEP_KEY] for row in our_rows(log)]
    assert len(ends) >= 231 / 16
    assert max(b - a for a, b in pairwise(ends)) <= 16
    for a, row in zip([-1, *ends[:-1]], our_rows(log), strict=True):
        inside = (steps > a) & (steps <= row[STEP_KEY])
        assert row[NORM] == norms[inside].max()
    assert [row["loss"] for row in rows_of_the_user(log)] == losses
    assert not any(HINT in text for text in said(lines))


@pytest.mark.parametrize(("steps", "told"), [(200, 0), (450, 1)])
def test_who_hardly_logs_is_told_of_commit_once(steps, told, begin):
    run, sink, heard = begin(), Wandb(), []
    sink.attach((), {}, heard.append)
    for i in range(steps):
        sink.write(record(i))
        settled(sink)
    sink.close()
    hints = [text for text in heard if HINT in text]
    assert len(hints) == told
    assert all("gradwatch.sinks.Wandb(commit=True)" in text for text in hints)
    assert len(our_rows(finish(run))) == 1


def test_who_logs_every_hundred_steps_is_told_nothing(begin):
    run, sink, heard = begin(), Wandb(), []
    sink.attach((), {}, heard.append)
    for i in range(420):
        sink.write(record(i))
        settled(sink)
        if i % 100 == 0:
            run.log({"loss": 0.0})
    sink.close()
    assert heard == []


# ---- alerts


def test_one_alert_an_incident_reaches_the_wire(server):
    run, model, now = server.begin(), lstm(), [0.0]
    sink = Wandb()
    sink._clock = lambda: now[0]
    watch = gradwatch.watch(model, wandb=sink)
    rows = batches(120)
    for bad in (20, 21, 22, 60, 100):
        rows[bad] = math.nan
    for start, later in ((0, 0.0), (40, 60.0), (80, 1801.0)):
        now[0] = later
        train(model, rows[start : start + 40], lambda i, v: run.log(v), start)
        watch.flush()
    watch.close()
    assert [i.since for i in watch.incidents if i.kind == "nonfinite"] == [20, 60, 100]
    assert server.wait_for(lambda: len(server.alerts) == 2)
    run.finish()
    first, second = server.alerts
    assert first["title"] == second["title"] == "gradwatch: NaN or Inf in gradients"
    assert first["severity"] == "ERROR"
    assert "step 20" in first["text"] and "held back" not in first["text"]
    assert "step 100" in second["text"]
    assert "(1 more of this kind were held back before)" in second["text"]
    assert second["text"].endswith(run.url)


def test_alerts_are_few(begin):
    run, sink, now = begin(), Wandb(), [0.0]
    sink._clock = lambda: now[0]
    for i in range(60):
        now[0] = 600.0 * i  # three of a kind in half an hour
        sink.write(record(i), [alert(i), alert(i, "vanishing", "info")])
        sink.write(record(i), [alert(i, "exploding", "error")] if i == 1 else [])
        sink.flush()
    sink.close()
    log = finish(run)
    assert len(log.alerts) == 20
    spikes = [a.text for a in log.alerts if a.title == title("spike")]
    steps = [int(text.split("step ")[1].split("\n")[0]) for text in spikes]
    assert steps == list(range(0, 55, 3))
    assert all("(2 more of this kind" in text for text in spikes[1:])
    assert all("streams: rnn.l0" in text for text in spikes)
    (error,) = [a for a in log.alerts if a.title == title("exploding")]
    assert error.level == "ERROR"
    assert {a.level for a in log.alerts} == {"WARN", "ERROR"}


def test_titles_are_constant_and_short():
    for kind in [*CATALOGUE, "no_gradient", "loss_divergence", "x" * 100]:
        assert title(kind) == title(kind)
        assert title(kind).startswith("gradwatch: ")
        assert len(title(kind)) <= 64


def test_an_alert_takes_its_row_along_at_once(begin):
    run, sink = begin(), Wandb()
    for i in range(5):
        sink.write(record(i, float(i)), [alert(i)] if i == 3 else [])
        settled(sink)
        if i == 3:
            time.sleep(0.05)
            run.log({"loss": 0.0})
    sink.close()
    assert 3.0 in [row[STEP_KEY] for row in our_rows(finish(run))]


def test_an_alert_that_fails_once_is_sent_again():
    run = FakeRun()
    sink, answers = Wandb(run), [ConnectionResetError]

    def fail_once():
        if answers:
            raise answers.pop()

    run.before_log = fail_once
    for i in range(3):
        sink.write(record(i), [alert(i)] if i == 0 else [])
        sink.flush()
    sink.close()
    assert [a[0] for a in run.alerts] == [title("spike")]
    assert run.waiting[STEP_KEY] == 2
    assert sink.dropped == 0


# ---- runs that come and go


def test_a_run_finished_before_close_is_no_failure(begin, lines):
    run, model = begin(), lstm()
    watch = gradwatch.watch(model)
    train(model, batches(30), lambda i, values: run.log(values))
    log = finish(run)
    train(model, batches(30))
    watch.close()
    assert len(rows_of_the_user(log)) == 30
    assert our_rows(log)
    assert len(watch.records) == 60
    assert watch.health["failed"] == {} and watch.health["dropped"] == {}
    assert len(lines) == 2  # hello and goodbye


def test_a_run_that_finishes_while_records_wait_is_no_failure():
    run, heard = FakeRun(), []

    def finished_meanwhile():
        run._is_finished = True
        raise wandb.errors.UsageError("Run is finished")

    run.before_log = finished_meanwhile
    sink = Wandb(run)
    sink.attach((), {}, heard.append)
    for i in range(40):
        sink.write(record(i), [alert(i)])
    sink.close()
    assert heard == [] and sink.dropped == 0


def test_two_runs_one_after_the_other(begin):
    model, logs = lstm(), []
    watch = gradwatch.watch(model)
    train(model, batches(15))  # before any run
    watch.flush()
    for start in (15, 40):
        run = begin()
        train(model, batches(25), lambda i, v, run=run: run.log(v), start)
        watch.flush()
        logs.append(finish(run))
    watch.close()
    for log, first, last in zip(logs, (15, 40), (39, 64), strict=True):
        steps = [row[STEP_KEY] for row in our_rows(log)]
        assert first <= steps[0] < steps[-1] == last
        assert log.metrics[NORM] == STEP_KEY
        assert "gradwatch" in log.config
        steps, norms = watch.records.series(NORM)
        inside = (steps >= first) & (steps <= last)
        assert max(row[NORM] for row in our_rows(log)) == norms[inside].max()


def test_another_run_takes_over_while_the_first_goes_on(begin):
    first = begin(reinit="create_new")
    sink = Wandb(first)
    for i in range(5):
        sink.write(record(i, 5.0 - i), [alert(i)] if i == 0 else [])
    second = sink._run = begin(reinit="create_new")
    for i in range(5, 10):
        sink.write(record(i), [alert(i)] if i == 5 else [])
    sink.close()
    for run, last in ((first, 4), (second, 9)):
        log = finish(run)
        assert our_rows(log)[-1][STEP_KEY] == last
        assert len(log.alerts) == 1  # each run has its own limits


def test_a_disabled_run_gets_nothing(begin, lines):
    run, model = begin("disabled"), lstm()
    watch = gradwatch.watch(model)
    train(model, batches(250), lambda i, values: run.log(values))
    watch.close()
    assert not any(k.startswith("gradwatch") for k in dict(run.summary))
    assert "gradwatch" not in dict(run.config)
    assert watch.health["failed"] == {} and watch.health["dropped"] == {}
    assert len(lines) == 2


def test_wandb_is_not_imported_unless_it_is_used():
    code = (
        "import sys, torch, gradwatch\n"
        "assert 'wandb' not in sys.modules, 'by import gradwatch'\n"
        "rnn = torch.nn.LSTM(2, 3)\n"
        "watch = gradwatch.watch(rnn, dir=None)\n"
        "rnn(torch.ones(4, 1, 2))[0].sum().backward()\n"
        "torch.optim.SGD(rnn.parameters(), 0.1).step()\n"
        "watch.close()\n"
        "assert len(watch.records) == 1\n"
        "assert 'wandb' not in sys.modules, 'by watch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_script_that_closes_nothing_ends_well(tmp_path):
    code = (
        "import sys, torch, wandb, gradwatch\n"
        "settings = wandb.Settings(console='off', silent=True, x_disable_stats=True)\n"
        "run = wandb.init(mode='offline', dir=sys.argv[1], settings=settings)\n"
        "sys.stdout.write(run.settings.sync_file)\n"
        "rnn = torch.nn.LSTM(2, 3)\n"
        "optimizer = torch.optim.SGD(rnn.parameters(), 0.1)\n"
        "gradwatch.watch(rnn, dir=None)\n"
        "for i in range(60):\n"
        "    optimizer.zero_grad()\n"
        "    rnn(torch.ones(4, 1, 2))[0].sum().backward()\n"
        "    optimizer.step()\n"
        "    run.log({'loss': float(i)})\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=WITHOUT_WANDB,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    said = [text for text in ran.stderr.splitlines() if "gradwatch" in text]
    assert len(said) == 2 and "60 steps, no alarm" in said[1], ran.stderr
    assert "did not reach" not in ran.stderr
    log = read_log(ran.stdout)
    assert [row["loss"] for row in rows_of_the_user(log)] == list(range(60))
    assert our_rows(log)[-1][STEP_KEY] >= 30


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"keys": "some"}, ValueError, "headline"),
        ({"run": "my-run"}, TypeError, r"wandb\.init\(\)"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments, error, names):
    with pytest.raises(error, match=names):
        Wandb(**arguments)


# ---- when wandb is in trouble


@pytest.mark.parametrize("fault", seldom(["refused", "hang", "500"], ["500"]))
def test_an_unreachable_server_costs_training_nothing(fault, server, lines):
    run, model = server.begin(), lstm()
    sink, took = Wandb(), []
    write = sink.write

    def timed(*args):
        began = time.perf_counter()
        write(*args)
        took.append(time.perf_counter() - began)

    sink.write = timed
    watch = gradwatch.watch(model, wandb=sink)
    rows = batches(160)
    rows[100] = math.nan
    train(model, rows[:60], lambda i, values: run.log(values))
    if fault == "refused":
        server.stop()
    else:
        server.fail(fault if fault == "hang" else 500)
    train(model, rows[60:], lambda i, values: run.log(values), start=60)
    began = time.perf_counter()
    watch.close()
    closing = time.perf_counter() - began
    server.heal()
    run.finish()
    assert len(watch.records) == 160
    assert max(took) < 0.1 and closing < 2.0
    assert watch.health["failed"] == {} and watch.health["dropped"] == {}
    assert not any("W&B failed" in text for text in said(lines))
    # wandb itself keeps what it could not send, and sends it once it can.
    history = server.runs[run.id].history
    assert len([row for row in history if "loss" in row]) == 160
    assert history[-1][STEP_KEY] == 159
    assert server.wait_for(lambda: len(server.alerts) == 1)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the child through /proc")
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        pytest.param("kill", "W&B failed 3 times", marks=pytest.mark.slow),
        ("stop", "W&B is not accepting"),
    ],
)
def test_training_outlives_the_process_of_wandb(fault, line, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.wandb_fault", fault, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env=WITHOUT_WANDB,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    got = json.loads(ran.stdout)
    assert got["steps"] == 150
    assert got["failed"] == {}
    assert got["dropped"] >= 100
    assert len([text for text in got["lines"] if line in text]) == 1
    assert len(got["lines"]) == 3  # hello, that line, and goodbye
    assert f"{got['dropped']} records did not reach W&B" in got["lines"][-1]
    assert got["slowest_in_sink_ms"] < 100
    assert got["close_s"] < 5


def test_a_dead_service_is_given_up_and_the_next_run_is_tried():
    dead, alive, heard = FakeRun(), FakeRun(), []

    def reset():
        raise ConnectionResetError("Connection lost")

    dead.before_log = reset
    runs = iter([dead] * 100 + [alive] * 20)
    sink = Wandb()
    sink.attach((), {}, heard.append)
    for i, run in enumerate(runs):
        sink._run = run
        sink.write(record(i))
        settled(sink)
    sink.close()
    assert sink.dropped == 100
    assert len(heard) == 1 and "ConnectionResetError: Connection lost" in heard[0]
    assert alive.waiting[STEP_KEY] == 119


def test_what_a_dead_service_still_owes_is_counted_at_close():
    run = FakeRun()
    sink = Wandb(run)

    def reset():
        raise ConnectionResetError("Connection lost")

    run.before_log = reset
    for i in range(5):
        sink.write(record(i))
    sink.close()
    assert sink.dropped == 5


def test_a_stuck_service_loses_the_oldest_and_recovers():
    run, heard, free = FakeRun(), [], threading.Event()
    run.before_log = free.wait
    sink = Wandb(run)
    sink.attach((), {}, heard.append)
    began = time.perf_counter()
    for i in range(1500):
        sink.write(record(i))
    assert time.perf_counter() - began < 1.0
    assert 495 <= sink.dropped <= 500
    assert len(heard) == 1 and "W&B is not accepting" in heard[0]
    free.set()
    sink.flush()
    assert run.waiting[STEP_KEY] == 1499
    sink.close()
    assert len([text for text in heard if HINT not in text]) == 1


def test_close_waits_for_a_stuck_service_once():
    run, heard, free = FakeRun(), [], threading.Event()
    run.before_log = free.wait
    sink = Wandb(run)
    sink.attach((), {}, heard.append)
    for i in range(20):
        sink.write(record(i))
    began = time.perf_counter()
    sink.close()
    sink.close()
    assert 1.0 < time.perf_counter() - began < 3.0
    assert sink.dropped == 19 and len(heard) == 1
    free.set()


def test_writing_takes_microseconds(begin):
    begin()
    sink, took = Wandb(), []
    values = record(0, **{f"gradwatch/rnn/l0/x{n}": 1.0 for n in range(40)}).metrics
    for i in range(600):
        one = StepRecord(step=i, metrics=values)
        began = time.perf_counter()
        sink.write(one)
        took.append(time.perf_counter() - began)
        time.sleep(0.001)
    sink.close()
    assert sorted(took)[300] < 5e-4  # about 3e-5 on an idle machine
    assert sink.dropped == 0


# ---- folding


def test_folding_in_two_parts_is_folding_in_one():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(12, 3, generator=generator).tolist()
    draws[7][0] = math.nan
    records = [
        StepRecord(
            step=i,
            time=float(i),
            metrics={NORM: a, RATIO: b, **({"gradwatch/l0/rho": c} if i % 4 else {})},
            facts=Facts(modules={"rnn": ModuleFacts(T=i)}),
            events=("skipped_step",) if i in {2, 9} else (),
        )
        for i, (a, b, c) in enumerate(draws)
    ]
    whole, first, second = Fold(), Fold(), Fold()
    for one in records:
        whole.add(one)
        (first if one.step < 5 else second).add(one)
    first.absorb(second)
    first.absorb(Fold())
    assert repr(first.row()) == repr(whole.row())  # NaN is not equal to itself
    assert repr(first.envelope()) == repr(whole.envelope())
    assert first.count == whole.count == 12


def test_a_folded_value_is_the_one_that_matters():
    fold = Fold()
    for i, (norm, ratio) in enumerate([(1.0, 0.9), (8.0, 0.2), (2.0, 0.7)]):
        fold.add(record(i, norm, **{RATIO: ratio, "gradwatch/l0/rho": 1.0 - 0.1 * i}))
    assert fold.envelope() == {NORM: 8.0, RATIO: 0.2, "gradwatch/l0/rho": 0.8}
    assert fold.step == 2
    fold.add(record(3, math.nan))
    fold.add(record(4, 1.0))
    assert math.isnan(fold.envelope()[NORM])


def test_streams_of_the_catalogue_are_named_without_dots():
    stream = Stream(
        name="encoder.rnn.l1_reverse",
        module="encoder.rnn",
        kind="GRU",
        layer=1,
        direction="reverse",
        input_size=2,
        hidden_size=3,
        gates=("r", "z", "n"),
    )
    keys = headline_keys([stream])
    assert any("encoder/rnn/l1_reverse/rho" in key for key in keys)
    assert not any("." in key for key in keys)


def test_rows_of_a_block_outlive_a_row_that_could_not_be_sent():
    class Failing(FakeRun):
        def log(self, *args, **kwargs):
            raise ConnectionError("lost")

    block = Block(("gradwatch/grad_norm",))
    for step in range(35):
        block.add(step, 0.0, [1.0 + step])
    item = Item(Failing(), 1, 0, block, ())
    rows = Rows(
        item, keys=None, config={}, commit=False, put=lambda: 1, clock=lambda: 0.0
    )
    with pytest.raises(ConnectionError):
        rows.take(item)
    assert rows.held == 35
    rows.run = FakeRun()
    rows.send()
    assert rows.run.waiting["gradwatch/grad_norm"] == 35.0


# ---- pictures, the alarms, the report


def test_a_run_gets_a_picture_the_alarms_and_where_asked_the_report(server, tmp_path):
    run, model = server.begin(), lstm()
    rows = batches(40)
    rows[30] = math.nan
    sink = Wandb(report=True)
    with gradwatch.watch(model, wandb=sink, dir=tmp_path / "runs", name="one"):
        train(model, rows, lambda i, values: run.log(values))
    run.finish()
    got = server.runs[run.id]
    media = {k: v for row in got.history for k, v in row.items() if MEDIA in k}
    assert set(media) == {f"{MEDIA}flow", f"{MEDIA}alarms", f"{MEDIA}report"}
    assert media[f"{MEDIA}flow"]["_type"] == "image-file"
    assert "rnn.l0: gradients reach" in media[f"{MEDIA}flow"]["caption"]
    files = {name: server.uploads[own["path"]] for name, own in media.items()}
    assert files[f"{MEDIA}flow"].startswith(b"\x89PNG")
    assert b"<td>nonfinite</td>" in files[f"{MEDIA}alarms"]
    assert b"1 alarm in 40 steps" in files[f"{MEDIA}report"]
    assert got.metrics[f"{MEDIA}flow"] == STEP_KEY


def test_a_hostile_message_is_text_in_the_table_of_alarms():
    run = FakeRun()
    media = Media(run, print, commit=False, whole=True)
    told = Alert(
        kind="spike", severity="error", step=1, since=1, message="<script>\x1b"
    )
    media.take(StepRecord(step=1), (told,))
    page = Path(run.waiting[f"{MEDIA}alarms"]._path).read_text()
    assert "&lt;script&gt;\\x1b" in page and "<script>" not in page


def test_without_what_draws_there_is_no_picture_and_nothing_is_said(monkeypatch, lines):
    monkeypatch.setattr("gradwatch.sinks.pictures.can_draw", lambda: False)
    run, model, rows = FakeRun(), lstm(), batches(31)
    rows[30] = math.nan
    with gradwatch.watch(model, wandb=run, dir=None):
        train(model, rows, lambda i, values: None)
    assert f"{MEDIA}flow" not in run.waiting and f"{MEDIA}alarms" in run.waiting
    assert not any("picture" in text for text in said(lines))
