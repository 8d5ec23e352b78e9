"""Healthy runs whose loop is odd: scaled, accumulated, alternating, begun elsewhere.

What makes each odd is measured along with whether it learns; see ``healthy``.
"""

import math
from collections.abc import Iterator
from itertools import groupby, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LRScheduler,
    MultiStepLR,
)

from benchmarks.detection.case import Batch, Case, Draw, History, Measured, family
from benchmarks.detection.healthy import (
    CHARACTERS,
    by_row,
    digits,
    ends_below,
    final,
    learned_and,
    pixels,
    reader,
    run,
    speller,
    text,
)
from testbed import tasks
from testbed.nets import CellLoop, classes


def _at_half(case: Case, history: History) -> float:
    """Mean loss of 20 steps at half-way."""
    half = len(history.losses) // 2
    return sum(history.losses[half : half + 20]) / 20


def _decades(case: Case, history: History) -> float:
    """Log10 of the largest gradient norm by the smallest."""
    return math.log10(max(history.norms) / min(history.norms))


def _overflows(case: Case, history: History) -> float:
    """Steps that the scaler has skipped."""
    return sum(not math.isfinite(norm) for norm in history.norms)


def _in_a_row(case: Case, history: History) -> float:
    """The most that it has skipped one after the other."""
    skipped = (not math.isfinite(norm) for norm in history.norms)
    return max(len([*run]) for there, run in groupby(skipped) if there)


def _by_schedule(case: Case, schedule: LRScheduler) -> Case:
    """Return the case with a scheduler of PyTorch's that steps behind each step."""
    begun = case.before

    def before(number: int) -> None:
        if begun is not None:
            begun(number)
        if number:
            schedule.step()

    case.before = before
    return case


# ---- half precision


def _in_half(model: nn.Module, batch: Batch) -> Tensor:
    half = next(model.parameters()).dtype == torch.float32
    with torch.autocast("cpu", torch.float16, enabled=half):
        return classes(model, batch)


def _scaled(draw: Draw, kind: type[nn.RNNBase]) -> Case:
    scale = 2.0 ** draw.between(22, 24)
    truth = learned_and(overflows=(_overflows, 2, 25), in_a_row=(_in_a_row, 2, 10))
    return run(
        by_row(draw, kind),
        digits(draw, rows=True),
        loss=_in_half,
        lr=2e-3,
        truth=truth,
        clip=1.0,
        scaler=torch.amp.GradScaler("cpu", init_scale=scale),
    )


@family
def healthy_half_precision_gru(draw: Draw) -> Case:
    """Float16, GRU: the scale begins far too high, and a few steps overflow."""
    return _scaled(draw, nn.GRU)


@family
def healthy_half_precision_tanh(draw: Draw) -> Case:
    """Float16, tanh RNN: the scale begins far too high, and a few steps overflow."""
    return _scaled(draw, nn.RNN)


# ---- batches


@family
def healthy_accumulated(draw: Draw) -> Case:
    """An LSTM reads rows; four small batches make a step; Adam 5e-3."""
    batches = tasks.digits(draw.source(), draw.between(4, 8), rows=True)
    return run(by_row(draw, nn.LSTM), batches, lr=5e-3, accumulate=4)


@family
def healthy_one_batch(draw: Draw) -> Case:
    """The same batch at each step, until it is learnt by heart; Adam 5e-3."""
    batch = next(digits(draw, rows=True))
    truth = learned_and(end=(final, 0.0, 0.02))
    model = by_row(draw, draw.one_of(nn.LSTM, nn.GRU))
    return run(model, repeat(batch), lr=5e-3, steps=500, truth=truth)


@family
def healthy_lengths_5_to_60(draw: Draw) -> Case:
    """Text in pieces of 5 to 60 characters, another length each step; Adam 5e-3."""
    source, size = draw.source(), draw.between(12, 24)

    def batches() -> Iterator[Batch]:
        while True:
            length = int(torch.randint(5, 61, (), generator=source))
            yield next(tasks.characters(source, length, size))

    model = speller(draw, draw.one_of(nn.LSTM, nn.GRU))
    truth = ends_below(CHARACTERS)
    return run(model, batches(), lr=5e-3, clip=5.0, steps=400, truth=truth)


def _learns_by_weight(case: Case, history: History) -> Measured:
    """Finite; the loss without its weight falls as elsewhere, while norms jump.

    Of the last 200 norms the 97th percentile is 5 times the median or more.
    """
    weights, norms = case.notes["weights_of_loss"], sorted(history.norms[-200:])
    plain = [loss / w for loss, w in zip(history.losses, weights, strict=False)]
    found = {
        "begin": sum(plain[:20]) / 20,
        "end": sum(plain[-20:]) / 20,
        "jumps": norms[194] / norms[100],
    }
    learnt = found["end"] < min(CHARACTERS, 0.8 * found["begin"])
    return Measured(learnt and found["jumps"] >= 5 and not history.nonfinite, found)


@family
def healthy_hard_tenth(draw: Draw) -> Case:
    """A tenth of the batches weigh ten times as much, all the time; text, Adam 5e-3."""
    source, weights = draw.source(), list[float]()

    def batches() -> Iterator[Batch]:
        for pair in text(draw):
            hard = float(torch.rand((), generator=source)) < 0.1
            weights.append(10.0 if hard else 1.0)
            yield *pair, weights[-1]

    def weighted(model: nn.Module, batch: Batch) -> Tensor:
        x, y, weight = batch
        loss: Tensor = weight * classes(model, (x, y))
        return loss

    model, truth = speller(draw, draw.one_of(nn.LSTM, nn.GRU)), _learns_by_weight
    case = run(model, batches(), loss=weighted, lr=5e-3, steps=500, truth=truth)
    case.notes["weights_of_loss"] = weights
    return case


# ---- schedules


@family
def healthy_warm_restarts(draw: Draw) -> Case:
    """A GRU reads rows; Adam 1e-2, by a cosine that starts again every 80 steps or so.

    The truth compares last steps with first ones, so it may end anywhere in a cycle.
    """
    case = run(by_row(draw, nn.GRU), digits(draw, rows=True), lr=1e-2, steps=400)
    return _by_schedule(
        case, CosineAnnealingWarmRestarts(case.optimizer, draw.between(70, 110))
    )


@family
def healthy_pixels_rate_cut(draw: Draw) -> Case:
    """A tanh RNN reads digits pixel by pixel; Adam 1e-3, a tenth of it behind 700."""
    model = pixels(draw, nn.RNN, hidden=(40, 64))
    case = run(model, digits(draw), steps=1200)
    cut = MultiStepLR(case.optimizer, [draw.between(650, 750)], gamma=0.1)
    return _by_schedule(case, cut)


# ---- more than one task


class Exam(nn.Module):
    """A recurrent module under any name, and a head for each of two questions."""

    def __init__(self, name: str, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, rnn)
        self.which = nn.Linear(rnn.hidden_size, 10)
        self.large = nn.Linear(rnn.hidden_size, 2)

    def forward(self, x: Tensor, question: int) -> Tensor:
        """Return scores: which digit it is (0), or whether it is above 4 (1)."""
        h = getattr(self, self.name)(x)[0][-1]
        scores: Tensor = (self.large if question else self.which)(h)
        return scores


@family
def healthy_two_heads_in_turn(draw: Draw) -> Case:
    """Two heads on one net, each trained at every other step; rows, Adam 3e-3."""
    kind = draw.one_of(nn.LSTM, nn.GRU)
    model = Exam(draw.module_name(), kind(8, draw.between(24, 48)))

    def batches() -> Iterator[Batch]:
        for number, (x, y) in enumerate(digits(draw, rows=True)):
            yield x, (y > 4).long() if number % 2 else y, number % 2

    def asked(model: nn.Module, batch: Batch) -> Tensor:
        x, y, question = batch
        return cross_entropy(model(x, question), y)

    return run(model, batches(), loss=asked, lr=3e-3, steps=400)


@family
def healthy_fine_tuned(draw: Draw) -> Case:
    """A net that knows digits gets a new head and task, above 4 or not; Adam 5e-4."""
    model: Any = by_row(draw, draw.one_of(nn.LSTM, nn.GRU))
    pairs = digits(draw, rows=True)
    before = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        before.zero_grad()
        classes(model, next(pairs)).backward()
        before.step()
    before.zero_grad()
    model.head = nn.Linear(model.layer.hidden_size, 2)
    return run(model, ((x, (y > 4).long()) for x, y in pairs), lr=5e-4)


# ---- learnt, and going on


@family
def healthy_converged_packed(draw: Draw) -> Case:
    """A packed GRU has learnt to recall by half of its steps; Adam 1e-2."""
    source, size = draw.source(), draw.between(16, 32)
    longest = draw.between(5, 7)

    def batches() -> Iterator[Batch]:
        for x, y in tasks.recall(source, longest, size):
            sizes = torch.randint(3, longest + 1, (size,), generator=source)
            ends = sizes.sort(descending=True).values.tolist()
            rows = zip(x.unbind(1), ends, strict=True)
            yield pack_sequence([row[:end] for row, end in rows]), y

    return _converged(reader(draw, nn.GRU, 4, 4), batches())


@family
def healthy_converged_cell(draw: Draw) -> Case:
    """An LSTMCell in a loop has learnt to recall by half of its steps; Adam 1e-2."""
    cell = nn.LSTMCell(4, draw.between(20, 32))
    batches = tasks.recall(draw.source(), draw.between(4, 6), draw.between(16, 32))
    return _converged(CellLoop(draw.module_name(), cell, 4), batches)


def _converged(model: nn.Module, batches: Iterator[Batch]) -> Case:
    truth = learned_and(
        half=(_at_half, 0.0, 0.03),
        end=(final, 0.0, 0.03),
        decades=(_decades, 1.5, math.inf),
    )
    return run(model, batches, lr=1e-2, steps=800, truth=truth)
