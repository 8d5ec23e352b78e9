"""What a watch costs: short blocks of training steps, in pairs, in one process.

Each arm has its own copy of the model and optimizer, and all see the same 32 batches.
In every round each arm trains for one block, in shuffled order; what an arm adds is the
sum of its blocks over that of the bare ones, so that a step that costs much counts as
often as it comes. Of the rounds the sixth in which a bare arm took longest is left out:
the machine is shared, and what is left out does not depend on the arm. The interval is
a bootstrap's over rounds, 95 %. A second bare arm is the control. One thread.

Beside the times stand the calls of Python and C functions that a watch adds to a step.

Run: python -m benchmarks.overhead [--quick] [--only NAME] [--growth]
"""

import argparse
import copy
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.results import Results

POOL = 32
"""Batches: one that comes again and again is learnt by heart, and its norms vanish."""
WARM_UP = 130
"""Steps before anything is timed: what is measured at the start is over by then."""
LOG_EVERY = 10
"""Steps between two of the user's own rows, in the arms with a W&B run."""


class Net(nn.Module):
    """A recurrent module and a linear head on its output at every step."""

    def __init__(self, recurrent: nn.Module, hidden: int) -> None:
        super().__init__()
        self.rnn = recurrent
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(T, B, F)`` to ``(T * B, 10)``."""
        return self.head(self.rnn(x)[0].flatten(0, 1))


class Cells(nn.Module):
    """A cell in a loop, and a linear head at every step."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(features, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(T, B, F)`` to ``(T * B, 10)``."""
        state, states = None, []
        for step in x:
            state = self.cell(step, state)
            states.append(state)
        return self.head(torch.stack(states).flatten(0, 1))


class Transformer(nn.Module):
    """Ten transformer layers with an LSTM behind them: 126 parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 10, enable_nested_tensor=False)
        self.rnn = nn.LSTM(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(T, B, F)`` to ``(T * B, 10)``."""
        return self.head(self.rnn(self.body(x))[0].flatten(0, 1))


class Case(NamedTuple):
    """A model to be measured.

    Attributes:
        title: As it stands in the table.
        build: Makes it.
        shape: Of its input: time steps, sequences, features.
        steps: Of a block.
        rounds: How many.
    """

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    steps: int
    rounds: int


CASES = {
    "rnn": Case(
        "RNN 16->32, T=30, B=16", lambda: Net(nn.RNN(16, 32), 32), (30, 16, 16), 64, 220
    ),
    "lstm": Case(
        "LSTM 64->128, T=100, B=32",
        lambda: Net(nn.LSTM(64, 128), 128),
        (100, 32, 64),
        20,
        70,
    ),
    "gru": Case(
        "GRU 32->64, two layers, both directions, T=50, B=16",
        lambda: Net(nn.GRU(32, 64, 2, bidirectional=True), 128),
        (50, 16, 32),
        20,
        40,
    ),
    "large": Case(
        "LSTM 128->512, T=50, B=16",
        lambda: Net(nn.LSTM(128, 512), 512),
        (50, 16, 128),
        20,
        14,
    ),
    "cells": Case(
        "GRU cell 32->64 in a loop, T=30, B=16",
        lambda: Cells(32, 64),
        (30, 16, 32),
        20,
        80,
    ),
    "transformer": Case(
        "10 transformer layers and an LSTM, width 128, 126 parameters, T=50, B=8",
        lambda: Transformer(128),
        (50, 8, 128),
        20,
        14,
    ),
}


def grown(title: str, kind: type[nn.RNNBase], length: int, hidden: int, **more) -> Case:
    """Return a case of a series: inputs of 16, 16 sequences, some 80 ms a block."""
    return Case(
        title,
        lambda: Net(
            kind(16, hidden, **more), hidden * (1 + bool(more.get("bidirectional")))
        ),
        (length, 16, 16),
        max(4, 1200 // length),
        60,
    )


GROWTH = (
    grown("nn.RNN, T=15, H=32", nn.RNN, 15, 32),
    grown("nn.RNN, T=60, H=32", nn.RNN, 60, 32),
    grown("nn.RNN, T=240, H=32", nn.RNN, 240, 32),
    grown("nn.RNN, T=60, H=128", nn.RNN, 60, 128),
    grown("nn.RNN, T=60, H=512", nn.RNN, 60, 512),
    grown("nn.RNN, T=60, H=32, 4 layers", nn.RNN, 60, 32, num_layers=4),
    grown(
        "nn.RNN, T=60, H=32, 4 layers, both directions (8 streams)",
        nn.RNN,
        60,
        32,
        num_layers=4,
        bidirectional=True,
    ),
)
"""One thing grows at a time: time steps, units, layers and streams."""


class Arm:
    """One way to train, with a model, an optimizer and perhaps a W&B run of its own."""

    def __init__(self, model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
        self.model, self.data = model, data
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        self.loss = nn.CrossEntropyLoss()
        self.times: list[float] = []
        self.step = 0
        self.run: Any = None
        self.watch: gradwatch.Watch | None = None

    def block(self, steps: int) -> None:
        """Train for one block and note what it took, in seconds."""
        began = time.perf_counter()
        for _ in range(steps):
            x, y = self.data[self.step % POOL]
            self.optimizer.zero_grad()
            loss = self.loss(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.step += 1
            if self.run is not None and self.step % LOG_EVERY == 0:
                self.run.log({"loss": loss.item()})
        self.times.append(time.perf_counter() - began)

    def calls(self, steps: int) -> Counter[str]:
        """Train, and count the calls of Python and C functions."""
        found: Counter[str] = Counter()

        def count(frame: Any, event: str, argument: Any) -> None:
            found[event] += 1

        sys.setprofile(count)
        self.block(steps)
        sys.setprofile(None)
        self.times.pop()
        return found


def make(case: Case, *names: str) -> dict[str, Arm]:
    """Return arms with the same weights and the same batches."""
    torch.manual_seed(0)
    base = case.build()
    length, batch, _ = case.shape
    data = [
        (torch.randn(*case.shape), torch.randint(10, (length * batch,)))
        for _ in range(POOL)
    ]
    return {name: Arm(copy.deepcopy(base), data) for name in names}


def added(arm: Arm, bare: Arm, rounds: list[int]) -> float:
    """Return by how much an arm takes longer, as a share, in some rounds."""
    return sum(arm.times[i] for i in rounds) / sum(bare.times[i] for i in rounds) - 1


def undisturbed(one: Arm, other: Arm) -> list[int]:
    """Return the rounds but for the sixth in which a bare arm took longest."""
    longest = [max(pair) for pair in zip(one.times, other.times, strict=True)]
    limit = sorted(longest)[(5 * len(longest)) // 6]
    return [i for i, seconds in enumerate(longest) if seconds <= limit]


def interval(arm: Arm, bare: Arm, rounds: list[int]) -> tuple[float, float]:
    """Return the 95 % interval of what is added, by drawing rounds again."""
    rng = random.Random(0)
    draws = (rng.choices(rounds, k=len(rounds)) for _ in range(1000))
    found = sorted(added(arm, bare, drawn) for drawn in draws)
    return found[25], found[974]


def measure(results: Results, case: Case, folder: str, quick: bool) -> None:
    """Time every arm on one model and add its rows to the table."""
    arms = make(case, "bare", "control", "gradwatch")
    arms["gradwatch"].watch = gradwatch.watch(
        arms["gradwatch"].model, dir=folder, wandb=None
    )
    run_rounds(arms, case, quick)
    report(results, case, arms, "bare", "gradwatch")


def measure_with_run(results: Results, case: Case, folder: str, quick: bool) -> None:
    """The same with a W&B run, over bare training that logs to one."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(project="overhead", mode="offline", dir=folder, settings=settings)
    arms = make(case, "bare", "control", "gradwatch", "wandb.watch")
    for arm in arms.values():
        arm.run = run
    arms["gradwatch"].watch = gradwatch.watch(
        arms["gradwatch"].model, dir=folder, wandb=run
    )
    run.watch(arms["wandb.watch"].model, log="gradients", log_freq=100)
    run_rounds(arms, case, quick)
    report(results, case, arms, "bare", "gradwatch", "with a W&B run")
    report(results, case, arms, "bare", "wandb.watch", "with a W&B run", calls=False)
    run.finish()


def everything(results: Results, case: Case, folder: str, quick: bool) -> None:
    """All depths at every step."""
    arms = make(case, "bare", "control", "gradwatch")
    arms["gradwatch"].watch = gradwatch.watch(
        arms["gradwatch"].model, dir=folder, wandb=None, every=1, budget=None
    )
    short = case._replace(steps=4, rounds=30)
    run_rounds(arms, short, quick, warm_up=20)
    report(results, short, arms, "bare", "gradwatch", "all at every step")


def run_rounds(
    arms: dict[str, Arm], case: Case, quick: bool, warm_up: int = WARM_UP
) -> None:
    """Train all arms, block by block."""
    for arm in arms.values():
        arm.block(warm_up)
        arm.times.clear()
    order = list(arms.values())
    for _ in range(max(case.rounds // 10, 12) if quick else case.rounds):
        random.shuffle(order)
        for arm in order:
            arm.block(case.steps)


def report(
    results: Results,
    case: Case,
    arms: dict[str, Arm],
    bare: str,
    name: str,
    how: str = "",
    *,
    calls: bool = True,
) -> None:
    """Add a row: what is added, its interval, the control's, and the calls."""
    one, other, arm = arms[bare], arms["control"], arms[name]
    rounds = undisturbed(one, other)
    share, (low, high) = added(arm, one, rounds), interval(arm, one, rounds)
    control = added(other, one, rounds)
    step = statistics.median(one.times) / case.steps
    counts = "-"
    if calls:
        before, after = one.calls(160), arm.calls(160)
        counts = " + ".join(
            f"{max(after[kind] - before[kind], 0) / 160:.0f}"
            for kind in ("call", "c_call")
        )
    noisy = abs(control) > max(abs(share), 0.01)
    results.row(
        f"{case.title}{', ' if how else ''}{how}",
        name,
        f"{1e3 * step:.2f}",
        f"{1e6 * share * step:+.0f}",
        f"{100 * share:+.2f} [{100 * low:.2f}, {100 * high:.2f}]",
        f"{100 * control:+.2f}" + (": too noisy to tell" if noisy else ""),
        counts,
    )
    watch = arm.watch
    if watch is not None and calls:
        print(f"its own figure: {100 * watch.health['overhead']:.2f} %", flush=True)
        watch.close()


def main() -> None:
    """Measure every model, and the two that are trained with a W&B run as well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two minutes")
    parser.add_argument("--only", choices=CASES, help="one model")
    parser.add_argument("--growth", action="store_true", help="how it grows, alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep = not given.quick and given.only is None
    results = Results("overhead", keep=keep, used=["wandb"])
    head = ["model", "arm", "bare, ms", "added, us", "added, % [95 %]", "control, %"]
    head.append("calls a step, Python + C")
    if given.growth:
        results.table("growth", head, "How it grows")
        with tempfile.TemporaryDirectory() as folder:
            for case in GROWTH:
                measure(results, case, folder, given.quick)
        results.save()
        return
    results.table("models", head, "A watch by default")
    chosen = CASES if given.only is None else {given.only: CASES[given.only]}
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen.values():
            measure(results, case, folder, given.quick)
        for name in [n for n in ("rnn", "lstm") if n in chosen]:
            measure_with_run(results, CASES[name], folder, given.quick)
        if "lstm" in chosen:
            everything(results, CASES["lstm"], folder, given.quick)
    results.save()


if __name__ == "__main__":
    main()
