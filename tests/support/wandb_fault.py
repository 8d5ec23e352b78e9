"""Trains under watch while wandb's own process is killed or stopped.

It ends a process, so the tests run it in one of its own:
``python -m tests.support.wandb_fault kill|stop FOLDER``. It prints one line of JSON.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import wandb
from torch import nn

import gradwatch
from testbed.models import batches, lstm

_STEPS = 120
_LIMIT_S = 40.0
_QUEUE = 50
"""Instead of 1000, so that few steps fill it."""


def service():
    """Return the id of the wandb process that this process started."""
    children = []
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            if "wandb" in Path(f"/proc/{child}/comm").read_text():
                children.append(int(child))
    (only,) = children
    return only


def train(model, optimizer, rows):
    """Return the seconds that each step took."""
    took = []
    for x in rows:
        began = time.perf_counter()
        nn.functional.cross_entropy(model(x), torch.zeros(x.shape[1]).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.perf_counter() - began)
    return took


def fill_the_socket(run):
    """Log until wandb takes no more, in a thread that then waits for ever."""
    logged = []
    row = {f"filling/{n}": float(n) for n in range(2000)}

    def fill():
        while True:
            run.log(row)
            logged.append(1)

    threading.Thread(target=fill, daemon=True).start()
    before = -1
    while len(logged) > before:
        before = len(logged)
        time.sleep(0.3)


def timed(call, took):
    """Return ``call``, the seconds of each call going to ``took``."""

    def measured(*args, **kwargs):
        began = time.perf_counter()
        call(*args, **kwargs)
        took.append(time.perf_counter() - began)

    return measured


def end(child, code):
    """End the stopped service and this process, whatever else still waits."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os._exit(code)  # wandb's own exit handler would wait for the process that is gone


def main(fault, folder):
    torch.set_num_threads(1)
    logging.basicConfig(stream=sys.stderr)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("gradwatch").addHandler(handler)
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    run = wandb.init(mode="offline", dir=folder, settings=settings)
    child = service()
    # Before the test loses patience: nothing may be left stopped behind it.
    guard = threading.Timer(_LIMIT_S, end, (child, 1))
    guard.daemon = True
    guard.start()

    model = lstm()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sink = gradwatch.sinks.Wandb()
    sink._queue = queue.Queue(_QUEUE)
    in_sink = []
    sink.write = timed(sink.write, in_sink)
    watch = gradwatch.watch(model, wandb=sink, dir=folder)
    before = train(model, optimizer, batches(30))
    watch.flush()
    in_sink.clear()
    if fault == "kill":
        os.kill(child, signal.SIGKILL)
    else:
        os.kill(child, signal.SIGSTOP)
        fill_the_socket(run)
    after = train(model, optimizer, batches(_STEPS))
    began = time.perf_counter()
    watch.close()
    closing = time.perf_counter() - began
    report = {
        "steps": len(gradwatch.load(watch.dir).records),
        "lines": lines,
        "dropped": sink.dropped,
        "failed": watch.health["failed"],
        "before_ms": 1e3 * sorted(before)[len(before) // 2],
        "after_ms": 1e3 * sorted(after)[len(after) // 2],
        "slowest_in_sink_ms": 1e3 * max(in_sink),
        "close_s": closing,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    end(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
