"""What a watch costs: shuffled, interleaved blocks of training steps in one process.

Every arm has its own copy of the model and optimizer. A block is some dozen steps. The
arms' blocks are shuffled, and of each arm the faster half counts: a machine is shared,
and what is slow was disturbed. A second bare model is the control; the spread is the
standard error of the faster half. One thread.

Run: python -m benchmarks.overhead [--quick]
"""

import argparse
import copy
import random
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn

import gradwatch
from benchmarks.results import Results


class Net(nn.Module):
    """A recurrent module and a linear head on its output, at every step or the last."""

    def __init__(self, recurrent: nn.Module, hidden: int, every: bool = True) -> None:
        super().__init__()
        self.rnn = recurrent
        self.head = nn.Linear(hidden, 10)
        self.every = every

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(T, B, F)`` to ``(T * B, 10)``, or ``(B, 10)``."""
        out = self.rnn(x)[0]
        return self.head(out.flatten(0, 1) if self.every else out[-1])


MODELS = {
    "lstm": ("LSTM 64->128, T=100, B=32", nn.LSTM, 64, 128, 100, 32, 20),
    "rnn": ("RNN 16->32, T=30, B=16", nn.RNN, 16, 32, 30, 16, 200),
}
WATCHED = {
    "gradwatch",
    "gradwatch, everything at every step",
    "gradwatch + W&B",
}
ROUNDS = 24
LOG_EVERY = 10
"""Steps between two of the user's own rows, in the arms with a W&B run."""


class Arm:
    """One way to train, with a model, an optimizer and perhaps a W&B run of its own."""

    def __init__(self, name: str, model: Net, run: Any = None) -> None:
        self.name, self.model, self.run = name, model, run
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        self.times: list[float] = []
        self.step = 0

    def block(self, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
        """Train for one block and note the time of a step."""
        loss_fn = nn.CrossEntropyLoss()
        began = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = loss_fn(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.step += 1
            if self.run is not None and self.step % LOG_EVERY == 0:
                self.run.log({"loss": loss.item()})
        self.times.append((time.perf_counter() - began) / steps)

    @property
    def faster_half(self) -> list[float]:
        """The times of the faster half of the blocks, warm-up left out."""
        kept = sorted(self.times[2:])
        return kept[: max(len(kept) // 2, 1)]


def arms(base: Net, folder: str, run: Any) -> list[Arm]:
    """Return every arm, watches attached; ``wandb.watch`` knows one run alone."""
    made = []

    def arm(name: str) -> Arm:
        ours = run if "W&B" in name else None
        made.append(Arm(name, copy.deepcopy(base), ours))
        return made[-1]

    arm("bare")
    arm("bare, control")
    gradwatch.watch(arm("gradwatch").model, dir=folder, wandb=None)
    gradwatch.watch(
        arm("gradwatch, everything at every step").model,
        dir=folder,
        wandb=None,
        every=1,
        budget=None,
    )
    arm("bare + W&B")
    gradwatch.watch(arm("gradwatch + W&B").model, dir=folder, wandb=run)
    for frequency in (100, 1):
        other = arm(f"wandb.watch(log_freq={frequency}) + W&B")
        run.watch(other.model, log="gradients", log_freq=frequency, idx=frequency)
    return made


def measure(results: Results, key: str, rounds: int, every_step: bool) -> None:
    """Time every arm on one model and report the table."""
    import wandb

    title, kind, features, hidden, length, batch, steps = MODELS[key]
    torch.manual_seed(0)
    base = Net(kind(features, hidden), hidden, every_step)
    x, y = torch.randn(length, batch, features), torch.randint(10, (batch,))
    y = y.repeat(length) if every_step else y
    read = "every" if every_step else "last"
    title += f", loss at {'the ' * (not every_step)}{read} step"
    with tempfile.TemporaryDirectory() as folder:
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)

        run = wandb.init(
            project="overhead", mode="offline", dir=folder, settings=settings
        )
        every = arms(base, folder, run)
        order = random.Random(0)
        for _ in range(rounds + 2):
            order.shuffle(every)
            for arm in every:
                arm.block(x, y, steps)
        title += f"; {rounds} blocks of {steps} steps an arm, faster half"
        report(results, f"{key}_{read}", title, every)
        watches = [gradwatch.watch(a.model) for a in every if a.name in WATCHED]
        for watch in watches:
            watch.close()
        run.finish()


def report(results: Results, key: str, title: str, every: list[Arm]) -> None:
    """Report the table: time a step, what is added, and its spread."""
    by_name = {arm.name: arm for arm in every}
    head = ["arm", "ms a step", "added, us", "added, %", "+- us"]
    results.table(key, head, title)

    def pace(name: str) -> tuple[bool, float]:
        return "W&B" in name, statistics.mean(by_name[name].faster_half)

    names = sorted(by_name, key=pace)
    for name in names:
        against = by_name["bare + W&B" if "W&B" in name else "bare"].faster_half
        mine, bare = by_name[name].faster_half, statistics.mean(against)
        added = statistics.mean(mine) - bare
        results.row(
            name,
            f"{1e3 * statistics.mean(mine):.3f}",
            f"{1e6 * added:+.0f}",
            f"{100 * added / bare:+.2f}",
            f"{1e6 * error(mine, against):.0f}",
        )


def error(one: list[float], two: list[float]) -> float:
    """Return the standard error of the difference of two means."""
    return (
        statistics.variance(one) / len(one) + statistics.variance(two) / len(two)
    ) ** 0.5


def main() -> None:
    """Measure both models, with a loss at every step and at the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two minutes")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    results = Results("overhead", keep=not quick, used=["wandb"])
    for every_step in (True, False):
        for key in MODELS:
            measure(results, key, 4 if quick else ROUNDS, every_step)
    results.save()


if __name__ == "__main__":
    main()
