"""Delayed recall: which of four symbols came first, under noise since then."""

from collections.abc import Iterator

import torch

from benchmarks.remedies.nets import Batch, Net

SYMBOLS, NOISE = 4, 0.3


def sequences(length: int, batch: int, source: torch.Generator) -> Batch:
    """Return one-hot symbols, noise of all channels behind them, and the symbols."""
    symbols = torch.randint(SYMBOLS, (batch,), generator=source)
    x = NOISE * torch.randn(length, batch, SYMBOLS, generator=source)
    x[0] = torch.nn.functional.one_hot(symbols, SYMBOLS)
    return x, symbols


def endless(length: int, batch: int, source: torch.Generator) -> Iterator[Batch]:
    """Yield fresh batches for ever."""
    while True:
        yield sequences(length, batch, source)


@torch.no_grad()
def accuracy(net: Net, test: Batch) -> float:
    """Return the share of a test set that is classified rightly."""
    return (net(test[0]).argmax(1) == test[1]).double().mean().item()
