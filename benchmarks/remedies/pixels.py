"""Handwritten digits, pixel by pixel: the recommended recipe, and drift of rho."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.remedies.nets import Batch, Net, generator, train
from benchmarks.results import Results, spread
from gradwatch import init, parametrize
from gradwatch.clip import LogZClip
from gradwatch.numerics.spectral import spectral_radius

HIDDEN, BATCH, TRAINED_ON, CLASSES = 64, 64, 1400, 10


class Split(NamedTuple):
    """Images, one pixel a step, for training and for the test."""

    train: Batch
    test: Batch


def split() -> Split:
    """Return the 8x8 digits as ``(64, N, 1)``, always split alike."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator(0))
    x = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    x, y = x[order].T.unsqueeze(-1), torch.tensor(data.target)[order]
    n = TRAINED_ON
    return Split((x[:, :n], y[:n]), (x[:, n:], y[n:]))


def epoch(data: Batch, source: torch.Generator) -> Iterator[Batch]:
    """Yield all of the data once, shuffled, in full batches."""
    x, y = data
    order = torch.randperm(len(y), generator=source)
    for first in range(0, len(y) - BATCH + 1, BATCH):
        batch = order[first : first + BATCH]
        yield x[:, batch], y[batch]


def endless(data: Batch, source: torch.Generator) -> Iterator[Batch]:
    """Yield one epoch after another."""
    while True:
        yield from epoch(data, source)


@torch.no_grad()
def accuracy(net: Net, data: Batch) -> float:
    """Return the share of images that is classified rightly."""
    return (net(data[0]).argmax(1) == data[1]).double().mean().item()


@dataclass(frozen=True)
class Recipe:
    """How an LSTM is trained."""

    name: str
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    remedied: bool = False


RECIPES = (
    Recipe("default, SGD .1", lambda p: torch.optim.SGD(p, 0.1)),
    Recipe("default, Adam 1e-3", lambda p: torch.optim.Adam(p, 1e-3)),
    Recipe("default, Adam 3e-3", lambda p: torch.optim.Adam(p, 3e-3)),
    Recipe(
        "`orthogonal_()`, `forget_bias_(1)`, `LogZClip()`, Adam 3e-3",
        lambda p: torch.optim.Adam(p, 3e-3),
        remedied=True,
    ),
)


def accuracies(
    recipe: Recipe, seed: int, epochs: tuple[int, ...], data: Split
) -> list[float]:
    """Return the test accuracy after some numbers of epochs."""
    torch.manual_seed(seed)
    net = Net(nn.LSTM(1, HIDDEN), CLASSES)
    if recipe.remedied:
        init.orthogonal_(net)
        init.forget_bias_(net, 1.0)
    optimizer = recipe.optimizer(net.parameters())
    if recipe.remedied:
        LogZClip().attach(optimizer)
    source, found = generator(1000 + seed), []
    for done in range(1, max(epochs) + 1):
        for _ in train(net, optimizer, epoch(data.train, source)):
            pass
        if done in epochs:
            found.append(accuracy(net, data.test))
    return found


def digits(results: Results, seeds: int, quick: bool) -> None:
    """Report the table of the recipes."""
    epochs, data = (1, 2) if quick else (15, 60), split()

    def rows() -> Iterator[tuple[str, ...]]:
        for recipe in RECIPES:
            found = [accuracies(recipe, s, epochs, data) for s in range(seeds)]
            yield recipe.name, *map(spread, zip(*found, strict=True))

    title = (
        f"Handwritten digits, pixel by pixel: LSTM, H = {HIDDEN}, B = {BATCH}, T = 64, "
        f"{TRAINED_ON} images; accuracy on {len(data.test[1])} others. Chance is "
        f"{1 / CLASSES}."
    )
    columns = ("LSTM", *(f"{done} epochs" for done in epochs))
    results.table("digits", columns, title, rows())


# ---- drift


class Measured(NamedTuple):
    """What was measured along one run; seconds a step at the end."""

    rho: list[float]
    error: list[float]
    accuracy: float
    seconds: float


def follow(held: bool, seed: int, at: tuple[int, ...], data: Split) -> Measured:
    """Train a tanh net from orthogonal weights, held so or not."""
    torch.manual_seed(seed)
    net = Net(nn.RNN(1, HIDDEN), CLASSES)
    init.orthogonal_(net)
    if held:
        parametrize.orthogonal(net)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    batches = endless(data.train, generator(1000 + seed))
    rho, error = [], []
    seconds = 0.0
    for before, step in zip((0, *at), at, strict=False):
        began = time.perf_counter()
        for _ in train(net, optimizer, batches, steps=step - before):
            pass
        seconds += time.perf_counter() - began
        weight = net.rnn.weight_hh_l0.detach()
        rho.append(spectral_radius(weight)[0].rho)
        error.append(off_orthogonal(weight))
    return Measured(rho, error, accuracy(net, data.test), seconds / at[-1])


def off_orthogonal(weight: Tensor) -> float:
    r"""Return :math:`\|W^T W - I\|_F / \sqrt{H}`."""
    wide = weight.double()
    off = wide.mT @ wide - torch.eye(wide.shape[-1], dtype=wide.dtype)
    return off.norm().item() / wide.shape[-1] ** 0.5


def drift(results: Results, seeds: int, quick: bool) -> None:
    """Report the table of rho along training."""
    at, data = (0, 5, 10) if quick else (0, 100, 300, 1000), split()
    both = ("`orthogonal_()`", "`orthogonal_()`, then `parametrize.orthogonal()`")

    def rows() -> Iterator[tuple[str, ...]]:
        for name in both:
            runs = [follow(name != both[0], s, at, data) for s in range(seeds)]
            cost = spread([1000 * r.seconds for r in runs], ".1f")
            accurate = spread([r.accuracy for r in runs])
            for n, step in enumerate(at):
                last = (accurate, cost) if step == at[-1] else ("", "")
                rho = spread([r.rho[n] for r in runs], ".3f")
                yield name, f"{step}", rho, spread([r.error[n] for r in runs]), *last

    title = f"Drift of rho: tanh RNN, H = {HIDDEN}, digits, B = {BATCH}, Adam 1e-3."
    columns = ("W_hh", "step", "rho", "off orthogonal", "accuracy", "ms a step")
    results.table("drift", columns, title, rows())
