"""Vanishing gradients: clipping does nothing, an initialiser does."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.remedies import recall
from benchmarks.remedies.nets import Net, generator, train
from benchmarks.remedies.unrolled import reach
from benchmarks.results import Results, spread
from gradwatch import init
from gradwatch.clip import AutoClip, Clipper, LogZClip, NormClip

HIDDEN, BATCH, TESTED = 64, 32, 400

Remedy = Callable[[nn.Module], object]
Row = tuple[str, str, type[nn.RNNBase], Remedy | None, type[Clipper] | None]
"""Net and remedy by name; the layer; what is done to it; what clips."""


def rows_of(length: int) -> tuple[Row, ...]:
    """Return what is compared."""

    def chrono(net: nn.Module) -> None:
        init.chrono_(net, t_max=length)

    clips = (
        ("nothing", None),
        ("`NormClip(1)`", NormClip),
        ("`LogZClip()`", LogZClip),
        ("`AutoClip()`", AutoClip),
    )
    return (
        *(("tanh RNN", name, nn.RNN, None, clip) for name, clip in clips),
        ("tanh RNN", "`orthogonal_()`", nn.RNN, init.orthogonal_, None),
        *(("LSTM", name, nn.LSTM, None, clip) for name, clip in clips),
        ("LSTM", "`forget_bias_(1)`", nn.LSTM, init.forget_bias_, None),
        ("LSTM", f"`chrono_({length})`", nn.LSTM, chrono, None),
    )


def run(row: Row, seed: int, length: int, steps: int) -> tuple[float, ...]:
    """Return the reach before and after, the accuracy, the share of steps clipped."""
    *_, kind, remedy, make = row
    torch.manual_seed(seed)
    net = Net(kind(recall.SYMBOLS, HIDDEN), recall.SYMBOLS)
    if remedy is not None:
        remedy(net)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    clipper = None if make is None else make()
    if clipper is not None:
        clipper.attach(optimizer)
    test = recall.sequences(length, TESTED, generator(10_000))
    probe = (test[0][:, :BATCH], test[1][:BATCH], nn.functional.cross_entropy)
    before = reach(net, *probe)
    batches = recall.endless(length, BATCH, generator(1000 + seed))
    for _ in train(net, optimizer, batches, steps=steps):
        pass
    clipped = math.nan if clipper is None else 100 * clipper.clipped / clipper.steps
    return before, reach(net, *probe), recall.accuracy(net, test), clipped


def vanishing(results: Results, seeds: int, quick: bool) -> None:
    """Report the table."""
    length, steps = (20, 20) if quick else (60, 500)

    def rows() -> Iterator[tuple[str, ...]]:
        for row in rows_of(length):
            found = [run(row, seed, length, steps) for seed in range(seeds)]
            before, after, accuracy, clipped = zip(*found, strict=True)
            yield (
                *row[:2],
                spread(before, ".1f"),
                spread(after, ".1f"),
                spread(accuracy),
                "" if row[-1] is None else spread(clipped, ".0f"),
            )

    title = (
        "Vanishing gradients: which of four symbols came first, "
        f"T = {length}, H = {HIDDEN}, B = {BATCH}, Adam 1e-3, {steps} steps. Reach: "
        "log10 of the gradient at the first state over the largest. Chance is "
        f"{1 / recall.SYMBOLS}, cross entropy {math.log(recall.SYMBOLS):.2f}."
    )
    columns = (
        "net",
        "remedy",
        "reach, step 0",
        f"reach, step {steps}",
        "accuracy",
        "% of steps clipped",
    )
    results.table("vanishing", columns, title, rows())
