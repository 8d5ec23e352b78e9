"""The adding problem: how long until it is solved, with and without a remedy."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.remedies.nets import Batch, Net, generator, squared_error, train
from benchmarks.results import Results, spread
from gradwatch import init
from gradwatch.clip import NormClip

HIDDEN, BATCH, SOLVED = 100, 32, 0.01
TESTED, EVERY, TEST_SEED = 500, 100, 10_000


@dataclass(frozen=True)
class Recipe:
    """A recurrent layer and what is done to it before the first step."""

    name: str
    make: Callable[[], nn.RNNBase]
    remedy: Callable[[nn.Module], object] | None = None
    patience: float = 1.0
    """Steps allowed, as a multiple of what the others get."""


def recipes(length: int) -> tuple[Recipe, ...]:
    """Return the nets that are compared, for sequences of some length."""

    def tanh() -> nn.RNNBase:
        return nn.RNN(2, HIDDEN)

    def lstm() -> nn.RNNBase:
        return nn.LSTM(2, HIDDEN)

    return (
        Recipe("GRU", lambda: nn.GRU(2, HIDDEN)),
        Recipe("LSTM", lstm),
        Recipe("LSTM, `forget_bias_(1)`", lstm, lambda m: init.forget_bias_(m, 1.0)),
        Recipe(
            f"LSTM, `chrono_({length})`", lstm, lambda m: init.chrono_(m, t_max=length)
        ),
        Recipe("tanh RNN", tanh),
        Recipe("tanh RNN, `orthogonal_()`", tanh, init.orthogonal_),
        Recipe(
            "ReLU RNN, `identity_(input_std=.001)` (IRNN)",
            lambda: nn.RNN(2, HIDDEN, nonlinearity="relu"),
            lambda m: init.identity_(m, input_std=0.001),
            patience=13 / 6,
        ),
    )


def sequences(length: int, batch: int, source: torch.Generator) -> Batch:
    """Return numbers and two marks; the sum of the marked numbers is asked for."""
    numbers = torch.rand(length, batch, generator=source)
    marks = torch.zeros(length, batch)
    half, each = length // 2, torch.arange(batch)
    marks[torch.randint(half, (batch,), generator=source), each] = 1
    marks[torch.randint(half, length, (batch,), generator=source), each] = 1
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def endless(length: int, source: torch.Generator) -> Iterator[Batch]:
    """Yield fresh batches for ever."""
    while True:
        yield sequences(length, BATCH, source)


def steps_to_solve(
    recipe: Recipe, seed: int, length: int, limit: int, test: Batch
) -> tuple[float, float]:
    """Return the steps until the test error is below .01 (Inf), and the last error."""
    torch.manual_seed(seed)
    net = Net(recipe.make(), 1)
    if recipe.remedy is not None:
        recipe.remedy(net)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    NormClip(1.0).attach(optimizer)
    batches = endless(length, generator(1000 + seed))
    error = math.nan
    for step, _ in enumerate(train(net, optimizer, batches, squared_error, limit), 1):
        if step % EVERY == 0:
            error = error_on(net, test)
            if error < SOLVED:
                return step, error
    return math.inf, error


@torch.no_grad()
def error_on(net: Net, test: Batch) -> float:
    """Return the mean squared error on a test set."""
    values: Tensor = squared_error(net(test[0]), test[1])
    return values.item()


def adding(results: Results, seeds: int, quick: bool) -> None:
    """Report the table."""
    length, limit = (20, 200) if quick else (100, 3000)
    test = sequences(length, TESTED, generator(TEST_SEED))

    def rows() -> Iterator[tuple[str, ...]]:
        for recipe in recipes(length):
            allowed = round(limit * recipe.patience / EVERY) * EVERY
            found = [
                steps_to_solve(recipe, seed, length, allowed, test)
                for seed in range(seeds)
            ]
            solved = [s for s, _ in found if math.isfinite(s)]
            steps = [
                f"{s:.0f}" if math.isfinite(s) else f"not by {allowed}"
                for s, _ in sorted(found)
            ]
            size = sum(p.numel() for p in Net(recipe.make(), 1).parameters())
            yield (
                recipe.name,
                f"{size:,}",
                f"{len(solved)}/{seeds}",
                steps[0] if len(set(steps)) == 1 else ", ".join(steps),
                spread([error for _, error in found], ".3f"),
            )

    title = (
        f"Adding problem: T = {length}, H = {HIDDEN}, B = {BATCH}, Adam 1e-3, "
        f"`NormClip(1)`; steps to a test error below {SOLVED} on {TESTED} sequences, "
        f"tested every {EVERY}. The constant predictor has {1 / 6:.3f}."
    )
    columns = ("net", "parameters", "solved", "steps, each seed", "last test error")
    results.table("adding", columns, title, rows())
