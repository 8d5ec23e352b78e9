"""More healthy runs that look odd: in rate, in decay, in how little past they need.

What makes each odd is measured along with whether it learns; see ``healthy``.
"""

import math

import torch
from torch import nn

from benchmarks.detection.case import Case, Draw, family
from benchmarks.detection.healthy import (
    by_row,
    digits,
    learned_and,
    reach_begin,
    reader,
    run,
)
from testbed import tasks

# ---- rates and decay


def _sgd(draw: Draw, kind: type[nn.RNNBase], rate: float) -> Case:
    model = by_row(draw, kind)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    batches = digits(draw, rows=True)
    return run(model, batches, optimizer=optimizer, steps=400)


@family
def healthy_large_sgd_gru(draw: Draw) -> Case:
    """A GRU reads rows; SGD with a rate of 0.7 to 1, no clip."""
    return _sgd(draw, nn.GRU, draw.one_of(0.7, 0.8, 1.0))


@family
def healthy_large_sgd_tanh(draw: Draw) -> Case:
    """A tanh RNN reads rows; SGD with a rate of 0.1 to 0.2, no clip."""
    return _sgd(draw, nn.RNN, draw.one_of(0.1, 0.15, 0.2))


@family
def healthy_strong_decay(draw: Draw) -> Case:
    """A gated net reads rows; AdamW 3e-3 with a weight decay of 1 to 2.

    Alone, it would bring the weights down to .3 and less of what they were.
    """
    model = by_row(draw, draw.one_of(nn.LSTM, nn.GRU))
    decay = draw.one_of(1.0, 1.5, 2.0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=decay)
    batches = digits(draw, rows=True)
    return run(model, batches, optimizer=optimizer, steps=400)


@family
def healthy_dropout_half(draw: Draw) -> Case:
    """Two or three layers of GRU, half of what passes dropped; rows, Adam 3e-3."""
    model = by_row(draw, nn.GRU, num_layers=draw.between(2, 3), dropout=0.5)
    return run(model, digits(draw, rows=True), lr=3e-3, steps=400)


# ---- needs no far memory


def _recent(
    draw: Draw, kind: type[nn.RNNBase], steps: int, lags: tuple[int, int]
) -> Case:
    length, size = draw.between(60, 80), draw.between(16, 24)
    batches = tasks.recall(draw.source(), length, size, lag=draw.between(*lags))
    truth = learned_and(begin=(reach_begin, -math.inf, -6.0))
    return run(reader(draw, kind, 4, 4), batches, lr=5e-4, steps=steps, truth=truth)


@family
def healthy_recent_slow_tanh(draw: Draw) -> Case:
    """A tanh RNN reads 60 to 80 steps of which the last count; Adam 5e-4."""
    return _recent(draw, nn.RNN, 900, (4, 6))


@family
def healthy_recent_slow_gru(draw: Draw) -> Case:
    """A GRU reads 60 to 80 steps of which the last count; Adam 5e-4."""
    return _recent(draw, nn.GRU, 800, (2, 4))


@family
def healthy_recent_slow_lstm(draw: Draw) -> Case:
    """An LSTM reads 60 to 80 steps of which the last count; Adam 5e-4."""
    return _recent(draw, nn.LSTM, 900, (3, 5))
