"""Whether a start learns whose gradients arrive as far back as the task needs.

Two sets of twelve tasks whose lag is known, each fixed before any of it was run: the
rule by which a preflight tells was changed after the first, and judged by the second.
Of each task, and for each seed, every start that a preflight tries gets a verdict, and
is then trained, on the same fresh batches. It is learned when the mean of the last 20
losses is below half of the loss of the best constant. N is how many steps the
recommended start needs for that, at least 50, and the whole budget where it does not
get there. One thread.

Run: python -m benchmarks.reach [--tasks first|second] [--seeds 0 1 2] [--keep]
"""

import argparse
import copy
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.remedies.nets import Batch, Net, generator, squared_error
from benchmarks.remedies.recall import NOISE, SYMBOLS, sequences
from benchmarks.results import Results
from gradwatch.before.starts import Start, best, candidates, starts
from gradwatch.before.trial import same_randomness, subject, tried

BATCH, PROBES, BUDGET = 32, 4, 1200
WINDOW, LEARNED, LEAST = 20, 0.5, 50
RATES = {"LSTM": 3e-3, "LSTM x 2": 3e-3, "GRU": 3e-3, "tanh": 1e-3, "ReLU": 1e-3}
LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "LSTM x 2": partial(nn.LSTM, num_layers=2),
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "ReLU": partial(nn.RNN, nonlinearity="relu"),
}
CLIP = 1.0

EARLY = 5
"""Steps at the beginning: a symbol in each, one marked; the second cue is behind."""

Draw = Callable[[int, torch.Generator], Batch]


# ---- what the tasks ask for: each with ``lag + 1`` steps, answered at the last one


def first(lag: int, source: torch.Generator) -> Batch:
    """Return a symbol of four, then noise of all channels; which one was it?"""
    return sequences(lag + 1, BATCH, source)


def marked(lag: int, source: torch.Generator) -> Batch:
    """Return five symbols, one of them marked, then noise; which one was marked?"""
    symbols = torch.randint(SYMBOLS, (EARLY, BATCH), generator=source)
    at, each = torch.randint(EARLY, (BATCH,), generator=source), torch.arange(BATCH)
    x = NOISE * torch.randn(lag + 1, BATCH, SYMBOLS + 1, generator=source)
    x[:EARLY, :, :SYMBOLS] = nn.functional.one_hot(symbols, SYMBOLS).to(x)
    x[:, :, SYMBOLS] = 0.0
    x[at, each, SYMBOLS] = 1.0
    return x, symbols[at, each]


def two_cues(lag: int, source: torch.Generator) -> Batch:
    """Return a cue A or B, five steps later another, and noise; which two in order?"""
    cues = torch.randint(2, (2, BATCH), generator=source)
    x = NOISE * torch.randn(lag + 1, BATCH, 2, generator=source)
    x[0], x[EARLY] = nn.functional.one_hot(cues, 2).to(x)
    return x, 2 * cues[0] + cues[1]


def number(lag: int, source: torch.Generator) -> Batch:
    """Return a number from -1 to 1, then noise of three other channels; the number?"""
    values = 2 * torch.rand(BATCH, generator=source) - 1
    x = NOISE * torch.randn(lag + 1, BATCH, 4, generator=source)
    x[:, :, 0] = 0.0
    x[0, :, 0] = values
    return x, values


def either(lag: int, source: torch.Generator) -> Batch:
    """Return signs at the first and last step, noise between; do they differ?"""
    bits = torch.randint(2, (2, BATCH), generator=source)
    x = NOISE * torch.randn(lag + 1, BATCH, 2, generator=source)
    x[:, :, 1] = 0.0
    for step, bit in ((0, bits[0]), (lag, bits[1])):
        x[step, :, 0], x[step, :, 1] = 2.0 * bit - 1, 1.0
    return x, bits[0] ^ bits[1]


def one_of_eight(lag: int, source: torch.Generator) -> Batch:
    """Return a symbol of eight, then noise of all channels; which one was it?"""
    symbols = torch.randint(8, (BATCH,), generator=source)
    x = NOISE * torch.randn(lag + 1, BATCH, 8, generator=source)
    x[0] = nn.functional.one_hot(symbols, 8).to(x)
    return x, symbols


def _two_numbers(lag: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs with a number at step 0 and another five steps later, and both."""
    values = 2 * torch.rand(2, BATCH, generator=source) - 1
    x = NOISE * torch.randn(lag + 1, BATCH, 3, generator=source)
    x[:, :, 0] = 0.0
    x[0, :, 0], x[EARLY, :, 0] = values
    return x, values


def total(lag: int, source: torch.Generator) -> Batch:
    """Return two early numbers from -1 to 1, then noise; their sum?"""
    x, values = _two_numbers(lag, source)
    return x, values.sum(0)


def larger(lag: int, source: torch.Generator) -> Batch:
    """Return two early numbers from -1 to 1, then noise; is the first one larger?"""
    x, values = _two_numbers(lag, source)
    return x, (values[0] > values[1]).long()


def count(lag: int, source: torch.Generator) -> Batch:
    """Return five signs, then noise of two other channels; their mean?"""
    signs = 2.0 * torch.randint(2, (EARLY, BATCH), generator=source) - 1
    x = NOISE * torch.randn(lag + 1, BATCH, 3, generator=source)
    x[:, :, 0] = 0.0
    x[:EARLY, :, 0] = signs
    return x, signs.mean(0)


# ---- the tasks, fixed


@dataclass(frozen=True)
class Task:
    """A task and the net that is to learn it.

    Attributes:
        name: As it is shown.
        layer: ``LSTM``, ``GRU``, ``tanh`` or ``ReLU``; ``LSTM x 2`` has two layers.
        hidden: Units.
        lag: How many steps before the answer the first thing lies that it needs.
        draw: Returns a fresh batch.
        outputs: Classes; 1: a number.
        constant: The loss of the best constant.
    """

    name: str
    layer: str
    hidden: int
    lag: int
    draw: Draw
    outputs: int
    constant: float

    def net(self) -> Net:
        """Return a net as PyTorch makes it."""
        inputs = self.batch(generator(0))[0].shape[-1]
        return Net(LAYERS[self.layer](inputs, self.hidden), self.outputs)

    def batch(self, source: torch.Generator) -> Batch:
        """Return a fresh batch."""
        return self.draw(self.lag, source)

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a net on a batch."""
        scores: Tensor = net(batch[0])
        if self.outputs == 1:
            return squared_error(scores, batch[1])
        return nn.functional.cross_entropy(scores, batch[1])


def _classes(
    name: str, layer: str, hidden: int, lag: int, draw: Draw, classes: int = 4
) -> Task:
    return Task(name, layer, hidden, lag, draw, classes, math.log(classes))


def _number(
    layer: str,
    hidden: int,
    lag: int,
    name: str = "first number",
    draw: Draw = number,
    constant: float = 1 / 3,
) -> Task:
    return Task(name, layer, hidden, lag, draw, 1, constant)


FIRST = (
    _classes("first symbol", "LSTM", 32, 20, first),
    _classes("first symbol", "LSTM", 48, 60, first),
    _classes("first symbol", "LSTM", 48, 100, first),
    _classes("first symbol", "GRU", 32, 40, first),
    _classes("first symbol", "GRU", 32, 100, first),
    _classes("first symbol", "tanh", 48, 40, first),
    _classes("first symbol", "ReLU", 48, 60, first),
    _classes("marked symbol", "LSTM", 48, 40, marked),
    _classes("two cues in order", "GRU", 32, 50, two_cues),
    _number("tanh", 48, 30),
    _number("ReLU", 48, 50),
    _classes("XOR of first and last", "GRU", 32, 20, either, 2),
)

SECOND = (
    _classes("first of eight symbols", "LSTM", 48, 30, one_of_eight, 8),
    _classes("first of eight symbols", "GRU", 48, 60, one_of_eight, 8),
    _classes("first symbol", "LSTM x 2", 32, 40, first),
    _classes("first symbol", "tanh", 48, 70, first),
    _classes("marked symbol", "GRU", 48, 70, marked),
    _classes("larger of two", "LSTM", 32, 20, larger, 2),
    _classes("larger of two", "GRU", 32, 40, larger, 2),
    _number("LSTM", 48, 50, "sum of two", total, 2 / 3),
    _number("tanh", 48, 25, "sum of two", total, 2 / 3),
    _number("ReLU", 48, 30, "sum of two", total, 2 / 3),
    _number("GRU", 32, 30, "mean of five signs", count, 1 / EARLY),
    _number("LSTM", 32, 80, "mean of five signs", count, 1 / EARLY),
)

SETS = {"first": FIRST, "second": SECOND}


# ---- what is measured


class Trained(NamedTuple):
    """A start, and how many steps it needed; Inf: more than the budget."""

    start: Start
    steps: float


@dataclass(frozen=True)
class Run:
    """All starts of a task and a seed."""

    task: Task
    all: Sequence[Trained]

    @property
    def recommended(self) -> Trained:
        """The start that a preflight recommends."""
        chosen = best([one.start for one in self.all], self.task.lag)
        return next(one for one in self.all if one.start is chosen)

    @property
    def limit(self) -> float:
        """N: the steps within which a start has to be learned."""
        return max(min(self.recommended.steps, BUDGET), LEAST)


def run(task: Task, seed: int) -> Run:
    """Return the horizon of each start, and how long it is trained to be learned."""
    torch.manual_seed(seed)
    net, source = task.net(), generator(5000 + seed)
    probes = [task.batch(source) for _ in range(PROBES)]
    with same_randomness(), subject(net, ()) as given:
        seen = tried(given, probes, task.loss)
    torch.manual_seed(seed)
    found = starts(net, (), probes, task.loss, lag=task.lag, seen=seen)
    made = [copy.deepcopy(net)]
    for _, _, act in candidates(seen.streams, task.lag):
        torch.manual_seed(seed)  # as it was when the horizon of this start was measured
        made.append(copy.deepcopy(net))
        act(made[-1])
    pairs = zip(found, made, strict=True)
    return Run(task, [Trained(start, steps(task, one, seed)) for start, one in pairs])


def steps(task: Task, net: Net, seed: int) -> float:
    """Train a net on fresh batches; return the steps until it is learned, or Inf."""
    optimizer = torch.optim.Adam(net.parameters(), RATES[task.layer])
    source, losses = generator(1000 + seed), list[float]()
    for step in range(1, BUDGET + 1):
        optimizer.zero_grad()
        loss = task.loss(net, task.batch(source))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
        mean = statistics.fmean(losses[-WINDOW:])
        if step >= WINDOW and mean < LEARNED * task.constant:
            return step
    return math.inf


# ---- what is shown


def shown(values: Sequence[float]) -> str:
    """Return the steps of each seed."""
    return ", ".join("never" if math.isinf(v) else f"{v:.0f}" for v in values)


def share(some: int, of: int) -> str:
    """Return a share in percent."""
    return f"{some / of:.0%}" if of else "-"


def task_row(runs: Sequence[Run]) -> tuple[object, ...]:
    """Return what is shown of all seeds of a task."""
    task, chosen = runs[0].task, [one.recommended for one in runs]
    names = Counter(one.start.name for one in chosen)
    within = sum(one.all[0].steps <= one.limit for one in runs)
    return (
        task.name,
        f"{task.layer}, {task.hidden}",
        task.lag,
        f"{statistics.median(one.all[0].start.horizon for one in runs):.0f}",
        ", ".join(f"{n} ({c})" if len(names) > 1 else n for n, c in names.items()),
        f"{statistics.median(one.start.horizon for one in chosen):.0f}",
        shown([one.steps for one in chosen]),
        f"{within} of {len(runs)}",
    )


def start_rows(runs: Sequence[Run]) -> Iterator[tuple[object, ...]]:
    """Yield what is shown of each start of a task."""
    for at, one in enumerate(runs[0].all):
        seeds = [run.all[at] for run in runs]
        chosen = sum(run.recommended is run.all[at] for run in runs)
        yield (
            f"{runs[0].task.name}, {runs[0].task.layer}, {runs[0].task.lag}",
            one.start.name,
            ", ".join(f"{seed.start.horizon:.0f}" for seed in seeds),
            ", ".join(f"{seed.start.adjoint:.1f}" for seed in seeds),
            shown([seed.steps for seed in seeds]),
            chosen or "",
        )


TOO_FAR, TOO_SMALL, FAR_ENOUGH = "WARN: too far", "WARN: arrives too small", "ok"


def verdict(start: Start, lag: int) -> str:
    """Return what a preflight says of a start."""
    if start.arrives(lag):
        return FAR_ENOUGH
    return TOO_SMALL if start.is_faint(lag) else TOO_FAR


def confusion(runs: Sequence[Run], results: Results, kept: str) -> None:
    """Report the table of reach against learning, and the same more widely."""
    arms: dict[str, list[tuple[Run, Trained]]] = {
        word: [] for word in (TOO_FAR, TOO_SMALL, FAR_ENOUGH)
    }
    for one in runs:
        for trained in one.all:
            arms[verdict(trained.start, one.task.lag)].append((one, trained))
    head = ["preflight", "starts", "learned within N steps", "share"]
    title = f"Starts of {len(runs)} nets, by what a preflight says of their reach."
    results.table(f"confusion{kept}", head, title)
    for name, arm in arms.items():
        within = sum(trained.steps <= one.limit for one, trained in arm)
        results.row(name, len(arm), within, share(within, len(arm)))
    title = f"The same within 2 N and within all {BUDGET} steps."
    ends = ["within N", "within 2 N", f"within {BUDGET}"]
    results.table(f"wider{kept}", ["preflight", "starts", *ends], title)
    limits: list[Callable[[Run], float]] = [
        lambda run: run.limit,
        lambda run: 2 * run.limit,
        lambda run: BUDGET,
    ]
    for name, arm in arms.items():
        others = [pair for pair in arm if pair[1] is not pair[0].recommended]
        for which, some in ((name, arm), (f"{name}, not recommended", others)):
            counts = [
                sum(one.steps <= limit(run) for run, one in some) for limit in limits
            ]
            cells = (f"{n} ({share(n, len(some))})" for n in counts)
            results.row(which, len(some), *cells)


def main() -> None:
    """Train all starts of all tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", choices=SETS, default="second")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", action="store_true", help="keep the tables")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    results = Results("reach", keep=given.keep)
    title = (
        f"Batch {BATCH}, Adam {RATES['LSTM']:g} ({RATES['tanh']:g} without gates), "
        f"gradients clipped at {CLIP:g}, {BUDGET} steps at most; each seed its steps."
    )
    head = [
        "task",
        "net",
        "lag",
        "horizon as it is",
        "recommended start",
        "its horizon",
        "steps it needed",
        "as it is, learned within N",
    ]
    began = time.perf_counter()
    runs, rows = list[Run](), list[tuple[object, ...]]()
    kept = "" if given.tasks == "second" else f"_{given.tasks}"
    results.table(f"tasks{kept}", head, title)
    for task in SETS[given.tasks]:
        seeds = [run(task, seed) for seed in given.seeds]
        results.row(*task_row(seeds))
        rows += start_rows(seeds)
        runs += seeds
    head = ["task", "start", "horizon", "gradient there, log10", "steps it needed"]
    head.append("times recommended")
    results.table(f"starts{kept}", head, "Each start; each seed its own.", rows)
    confusion(runs, results, kept)
    print(f"\n{time.perf_counter() - began:.0f} s.")
    results.save()


if __name__ == "__main__":
    main()
