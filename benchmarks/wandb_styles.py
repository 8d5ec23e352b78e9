"""What becomes of a user's rows and of ours, for each way of logging to W&B.

Every style trains three times, in offline runs: without gradwatch, with it, and with
``commit=True``.

Run: python -m benchmarks.wandb_styles [--quick]
"""

import argparse
import logging
import tempfile
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import wandb
from torch import nn

import gradwatch
from benchmarks.results import Results
from gradwatch.metrics import STEP_KEY
from testbed.wandb_log import Log, read_log

STEPS = 1000
NORM = "gradwatch/grad_norm"
Values = dict[str, float]


def _twice(run: Any, i: int, values: Values) -> None:
    run.log(values, step=i)
    run.log({"late": float(i)}, step=i)


def _every(steps: int, offset: int = 0) -> Callable[[Any, int, Values], None]:
    def log(run: Any, i: int, values: Values) -> None:
        if i % steps == offset:
            run.log(values)

    return log


STYLES: dict[str, Callable[[Any, int, Values], None]] = {
    "`run.log(d)`": _every(1),
    "`run.log(d, step=i)`": lambda run, i, values: run.log(values, step=i),
    "`run.log(d, step=3 * i)`": lambda run, i, values: run.log(values, step=3 * i),
    "two logs at `step=i`": _twice,
    "never logs": lambda run, i, values: None,
    "`run.log(d)` every 10 steps": _every(10),
    "`run.log(d)` every 100 steps": _every(100),
    "`run.log(d)` after each epoch of 100": _every(100, 99),
}


def train(
    style: Callable[[Any, int, Values], None],
    sink: gradwatch.sinks.Wandb | None,
    steps: int,
) -> tuple[Log, np.ndarray]:
    """Train a small LSTM; return what its run holds, and our norm of every step."""
    torch.manual_seed(0)
    rnn = nn.LSTM(4, 8)
    optimizer = torch.optim.SGD(rnn.parameters(), 0.1)
    with tempfile.TemporaryDirectory() as folder:
        quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        run = wandb.init(mode="offline", dir=folder, settings=quiet)
        watch = gradwatch.watch(rnn, wandb=sink, dir=None) if sink else None
        for i in range(steps):
            loss = rnn(torch.randn(8, 16, 4))[0].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            style(run, i, {"loss": loss.item()})
        norms = np.zeros(0)
        if watch is not None:
            watch.close()
            _, norms = watch.records.series(NORM)
        path = run.settings.sync_file
        run.finish()
        return read_log(path), norms


def of_the_user(log: Log) -> list[Values]:
    """Return the user's part of each row that has one, with its step."""
    rows = [
        {k: v for k, v in row.items() if not k.startswith(("gradwatch/", "_"))}
        | {"_step": row["_step"]}
        for row in log.rows
    ]
    return [row for row in rows if len(row) > 1]


def compare(bare: Log, watched: Log, norms: np.ndarray) -> tuple[str, str, str, str]:
    """Return the user's rows kept, their steps, our rows, and our steps covered."""
    before, after = of_the_user(bare), of_the_user(watched)
    values = [{k: v for k, v in row.items() if k != "_step"} for row in after]
    kept = [{k: v for k, v in row.items() if k != "_step"} in values for row in before]
    unchanged = ("yes" if before == after else "no") if before else "-"
    ours = [row for row in watched.rows if STEP_KEY in row]
    ends = [row[STEP_KEY] for row in ours]
    covered = 0
    for row, (a, b) in zip(ours, pairwise([-1, *ends]), strict=True):
        covered += (b - a) * (row[NORM] >= norms[a + 1 : b + 1].max())
    return (
        f"{sum(kept)} / {len(before)}",
        unchanged,
        str(len(ours)),
        f"{covered} / {len(norms)}",
    )


def main() -> None:
    """Measure every style and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half a minute")
    quick = parser.parse_args().quick
    steps = 100 if quick else STEPS
    torch.set_num_threads(1)
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    results = Results("wandb_styles", keep=not quick, used=["wandb"])
    measured = ("user rows kept", "steps unchanged", "our rows", "our steps covered")
    title = f"{steps:,} steps, offline, one run of each."
    results.table("styles", ["the user", "commit", *measured], title)
    for name, style in STYLES.items():
        bare, _ = train(style, None, steps)
        for commit in (False, True):
            log, norms = train(style, gradwatch.sinks.Wandb(commit=commit), steps)
            results.row(name, commit, *compare(bare, log, norms))
    results.save()


if __name__ == "__main__":
    main()
