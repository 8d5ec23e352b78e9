"""When a net that no gradient reaches is told from one that only starts slowly.

15 default nets never learn to remember for 60 steps; 28 others begin to learn, many of
them late and out of the gradient's reach until then. On the records of a watch alarms
after 100 to 700 steps at chance are emulated: which sick nets do they catch, which slow
starters do they page? Beside them: the watch's own. Sick is who ends at chance, slow
who begins below it; runs that are not as meant are left out. Half an hour or more.

Run: python -m benchmarks.slow_starts [--seeds 0 20 40] [--processes 2]
"""

import argparse
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn, rand, randint, randn
from torch.nn.functional import cross_entropy, one_hot, pad

import gradwatch
from benchmarks.results import Results
from gradwatch.record import StepRecord
from testbed.nets import Loss, Reader, classes, values
from testbed.tasks import Pair, adding, digits, recall

STEPS, BATCH, AFTER = 3000, 32, range(100, 701, 100)
LOW, HIGH, SIGNAL, LEARNT, CHANCE = -6.0, -4.5, 0.6, 0.5, 0.97
"""Reach: too short, enough; ``signal``: at least, over below; loss: at least."""


def real(source: Generator) -> Iterator[Pair]:
    """Yield one real number to be recalled from 60 steps of noise, ``(61, B, 1)``."""
    while True:
        number = rand(BATCH, 1, generator=source)
        x = 0.3 * randn(61, BATCH, 1, generator=source)
        x[0] = 2 * number - 1
        yield x, number[:, 0]


def copying(source: Generator, delay: int) -> Iterator[Pair]:
    """Yield 5 of 8 symbols, a delay and a mark; all five are asked for at the end."""
    while True:
        symbols = randint(8, (5, BATCH), generator=source)
        codes = torch.full((10 + delay, BATCH), 8)
        codes[:5], codes[4 + delay] = symbols, 9
        yield one_hot(codes, 10).float(), symbols


def copied(model: nn.Module, batch: Pair) -> Tensor:
    """Cross entropy of the last five steps."""
    return cross_entropy(model(batch[0])[-5:].flatten(0, 1), batch[1].flatten())


def parity(source: Generator, length: int, at: Sequence[int]) -> Iterator[Pair]:
    """Yield random bits, and the parity of some of them."""
    while True:
        bits = randint(2, (length, BATCH), generator=source)
        yield (2.0 * bits - 1)[..., None], bits[list(at)].sum(0) % 2


def tones(source: Generator) -> Iterator[Pair]:
    """Yield noisy sines ``(60, B, 1)``, each of one of four frequencies."""
    pitches = torch.tensor([0.07, 0.1, 0.13, 0.16])
    while True:
        which = randint(4, (BATCH,), generator=source)
        angles = 6.28 * pitches[which] * torch.arange(60)[:, None]
        clean = torch.sin(angles + 6.28 * rand(BATCH, generator=source))
        yield (clean + 0.5 * randn(60, BATCH, generator=source))[..., None], which


class Task(NamedTuple):
    """What is learnt. ``constant``: the loss of the best constant; 0: of any class."""

    batches: Callable[[Generator], Iterator[Pair]]
    inputs: int
    outputs: int
    loss: Loss = classes
    constant: float = 0.0


def symbol(lag: int, length: int, symbols: int = 4, noise: float = 0.3) -> Task:
    """Return the task to recall a symbol after some steps."""
    batches = partial(recall, length=length, batch=BATCH, lag=lag)
    return Task(partial(batches, symbols=symbols, noise=noise), symbols, symbols)


ZEROS = (0, 0, 0, 0, 55, 0)  # in front of the steps
TASKS = {
    **{f"recall {lag}": symbol(lag, lag + 1) for lag in (10, 15, 30, 60)},
    **{f"recall 60, {first}": symbol(60, 61) for first in ("chrono", "orthogonal")},
    **{f"recall {lag} of 60": symbol(lag, 60) for lag in (10, 12, 15)},
    "recall 60, blank": symbol(60, 61, symbols=8, noise=0.0),
    "recall 60, real": Task(real, 1, 1, values, 1 / 12),
    "recall 14, padded": Task(
        lambda s: ((pad(x, ZEROS), y) for x, y in recall(s, 15, BATCH)), 4, 4
    ),
    **{f"copy {n}": Task(partial(copying, delay=n), 10, 8, copied) for n in (10, 20)},
    **{
        f"adding {n}": Task(partial(adding, length=n, batch=BATCH), 2, 1, values, 1 / 6)
        for n in (20, 30, 40, 60)
    },
    "digits": Task(partial(digits, batch=BATCH), 1, 10),
    "parity 4": Task(partial(parity, length=4, at=range(4)), 1, 2),
    "xor 1, 4": Task(partial(parity, length=60, at=(-2, -5)), 1, 2),
    "tones": Task(tones, 1, 4),
}

SICK = """
LSTM 32 1e-3: recall 60 | LSTM 64 3e-3: recall 60 | LSTM 48 0.1: recall 60 | LSTM 64
1e-3: recall 60, blank | LSTM 32 3e-3: recall 60, real | GRU 32 1e-3: recall 60 | GRU
64 3e-3: recall 60 | GRU 48 0.1: recall 60 | GRU 64 1e-3: recall 60, blank | GRU 32
3e-3: recall 60, real | RNN 32 1e-3: recall 60 | RNN 48 1e-3: recall 60 | RNN 48 0.1:
recall 60 | RNN 64 1e-3: recall 60, blank | RNN 32 3e-3: recall 60, real
"""
SLOW = """
LSTM 32 1e-3: adding 20; digits; recall 10 of 60; recall 60, chrono | LSTM 32 3e-3:
xor 1, 4 | LSTM 48 3e-3: adding 30 | LSTM 64 3e-3: copy 10; adding 60; recall 10;
parity 4 | GRU 32 1e-3: recall 10 of 60 | GRU 48 1e-3: adding 40 | GRU 48 3e-3: recall
60, chrono | GRU 64 1e-3: recall 12 of 60 | GRU 64 3e-3: copy 20; recall 15 of 60;
recall 14, padded | GRU 64 0.1: digits | RNN 32 1e-3: recall 10 of 60; recall 60,
orthogonal | RNN 48 1e-3: copy 10 | RNN 64 1e-3: recall 15; digits | RNN 64 3e-3:
recall 30; recall 60 | RNN 48 3e-3: recall 60 | RNN 32 3e-3: recall 60 | RNN 48 0.1:
tones
"""

Job = tuple[bool, int, str, int, float, str]
"""Whether sick, seed, net, units, rate (0.1: of clipped SGD, or else of Adam), task."""


def jobs(seed: int) -> Iterator[Job]:
    """Yield the runs of a seed; that of the k-th sick one of a net is larger by k."""
    for sick, text in ((True, SICK), (False, SLOW)):
        for number, group in enumerate(text.split("|")):
            net, units, rate, tasks = group.replace(":", "").split(maxsplit=3)
            for task in " ".join(tasks.split()).split("; "):
                own = seed + number % 5 if sick else seed
                yield sick, own, net, int(units), float(rate), task


def alarm(records: list[StepRecord], losses: list[float], after: int) -> int | None:
    """Return when an alarm after so many steps at chance comes, if ever."""
    since, reached, learnt, calm, past, constant = None, False, False, 0, [], 0.0
    for record in records:
        step, metrics, of = record.step, record.metrics, "gradwatch/rnn/l0"
        constant = metrics.get("gradwatch/loss_constant", constant)
        if (reach := metrics.get(f"{of}/adjoint_log10")) is None:
            continue
        signal, demand = (metrics.get(f"{of}/{n}", 1.0) for n in ("signal", "demand"))
        past, back, over = [*past, reach][-5:], reach >= HIGH, signal < LEARNT
        stays = len(past) == 5 and max(past) <= HIGH
        if since is None:  # no notice is open
            reached, learnt = reached or back, learnt and not back
            wanted = demand < 0.5 and not learnt and not over
            if reach > LOW or not wanted or (reached and not stays):
                continue
            since, calm = step, 0
        else:
            calm = calm + 1 if back or over else 0
            if calm == 3:
                since, reached, learnt = None, reached or back, learnt or over
                continue
        out = stays and max(sorted(past)[2], reach) <= LOW
        mean = statistics.fmean(losses[max(0, step - 99) : step + 1])
        waited = reached or (step >= after and step - since >= 100)
        if out and waited and signal >= SIGNAL and mean >= CHANCE * constant:
            return step
    return None


def train(job: Job) -> tuple[bool, int | None, list[int | None]]:
    """Return whether a run is as meant, when it begins, and alarms, first the real."""
    torch.set_num_threads(1)
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    sick, seed, net, hidden, rate, name = job
    task, clipped, records, losses = TASKS[name], rate == 0.1, [], []
    torch.manual_seed(1000 + seed)
    rnn = getattr(nn, net)(task.inputs, hidden)
    model = Reader("rnn", rnn, task.outputs, every=task.loss is copied)
    if "chrono" in name:
        gradwatch.init.chrono_(model, 60)
    elif "orthogonal" in name:
        gradwatch.init.orthogonal_(model)
    algorithm = getattr(torch.optim, "SGD" if clipped else "Adam")
    optimizer = algorithm(model.parameters(), rate)
    batches = task.batches(Generator().manual_seed(7000 + 13 * seed))
    sink = SimpleNamespace(write=lambda r, *_: records.append(r), close=lambda: None)
    with gradwatch.watch(model, dir=None, wandb=None, budget=None, sinks=[sink]) as w:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = task.loss(model, next(batches))
            loss.backward()
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        w.flush()
        alerts = [a for a in w.alerts if a.kind == "vanishing"]
    means = torch.tensor(losses).unfold(0, 50, 1).mean(1)
    below = means < 0.9 * (task.constant or math.log(task.outputs))
    begins = int(below.nonzero()[0]) + 50 if below.any() else None
    holds = not below[-1] if sick else begins is not None
    own = next((a.step for a in alerts if a.severity != "info"), None)
    return bool(holds), begins, [own, *(alarm(records, losses, n) for n in AFTER)]


def main() -> None:
    """Train all, count and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 20, 40])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    runs = [job for seed in options.seeds for job in jobs(seed)]
    sick, slow = [], []
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for job, (holds, *told) in zip(runs, pool.map(train, runs), strict=True):
            print(*job, *told, "" if holds else "left out", flush=True)
            if holds:
                (sick if job[0] else slow).append(told)
    results = Results("slow_starts", keep=True)
    head = ["alarm", "sick caught", "at step: median, latest", "slow starters paged"]
    left_out = len(runs) - len(sick) - len(slow)
    title = f"{len(sick)} sick, {len(slow)} slow starters, {left_out} left out"
    results.table("alarms", [*head, "before they begin"], title)
    for place, name in enumerate(["the watch", *(f"after {n}" for n in AFTER)]):
        steps = [a[place] for _, a in sick if a[place] is not None]
        paged = [a[place] < begins for begins, a in slow if a[place] is not None]
        when = f"{statistics.median(steps):g}, {max(steps)}" if steps else "-"
        results.row(name, len(steps), when, len(paged), sum(paged))
    results.save()


if __name__ == "__main__":
    main()
