"""What a clipper costs beside ``torch.nn.utils.clip_grad_norm_``.

All are called in turn on the same gradients, in an order that changes from round to
round; the ratio is taken within a round. The control is ``clip_grad_norm_`` a second
time. The statistics are warm, and the gradients are below the threshold of those that
learn theirs, as in nearly every step of a healthy run. One thread.

Run: python -m benchmarks.clipping [--quick]
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.results import Results, quartiles
from gradwatch.clip import AGC, AutoClip, Clipper, LogZClip, NormClip, ZClip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "RNN 16->32 (4 tensors)": lambda: nn.RNN(16, 32),
    "LSTM 64->128 (4)": lambda: nn.LSTM(64, 128),
    "LSTM 128->256, 3 layers, both directions (24)": lambda: nn.LSTM(
        128, 256, 3, bidirectional=True
    ),
    "40 x Linear 64->64 (80)": lambda: nn.Sequential(
        *(nn.Linear(64, 64) for _ in range(40))
    ),
}
CLIPPERS: dict[str, Callable[[], Clipper]] = {
    "NormClip": NormClip,
    "AutoClip": lambda: AutoClip(90),
    "ZClip": ZClip,
    "LogZClip": LogZClip,
    "AGC": AGC,
}
WARM = 1100


def calls(params: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name, with warm statistics."""

    def theirs() -> object:
        return nn.utils.clip_grad_norm_(params, 1.0)

    found: dict[str, Callable[[], object]] = {"theirs": theirs, "control": theirs}
    for name, make in CLIPPERS.items():
        clipper = make()
        small = [nn.Parameter(torch.zeros(1))]
        for step in range(WARM):
            small[0].grad = torch.tensor([0.9 + 0.2 * (step % 7) / 7])
            clipper.clip_(small)
        found[name] = lambda clipper=clipper: clipper.clip_(params)
    return found


def measure(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Return seconds of each call, round by round."""
    params = list(model.parameters())
    timed = calls(params)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(p.shape, generator=generator) for p in params]
    size = torch.sqrt(sum(g.square().sum() for g in grads))
    names, order = list(timed), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 5):
        order.shuffle(names)
        for name in names:
            for p, g in zip(params, grads, strict=True):
                p.grad = g / size  # norm 1
            began = time.perf_counter()
            timed[name]()
            if number >= 5:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Print a row a model: microseconds of torch's own, and ratios to it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    quick = parser.parse_args().quick
    rounds = 50 if quick else 1000
    torch.set_num_threads(1)
    columns = ["control", *CLIPPERS]
    results = Results("clipping", keep=not quick)
    results.table("cost", ["", "clip_grad_norm_", *columns])
    for title, make in MODELS.items():
        torch.manual_seed(0)
        seconds = measure(make(), rounds)
        theirs = seconds["theirs"]
        cells = []
        for name in columns:
            ratios = [a / b for a, b in zip(seconds[name], theirs, strict=True)]
            cells.append(quartiles(ratios))
        results.row(title, f"{1e6 * statistics.median(theirs):.0f} us", *cells)
    results.save()


if __name__ == "__main__":
    main()
