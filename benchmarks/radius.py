"""How far four ways to get the spectral radius are off along training, and their cost.

Small recurrent nets are trained on handwritten digits, pixel by pixel, and on the
adding problem. Every few steps each method is asked for the radius of every gate's
recurrent weights; the truth is float64 eigenvalues of the same weights. Costs are
measured in one process, one call of each method after each training step of an LSTM.
One thread.

Run: python benchmarks/radius.py [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.results import Results
from gradwatch.numerics.spectral import spectral_radius
from testbed.trajectories import RUNS, gates, trajectory

POWER_STEPS = 20
WARM_UP = 0.1
"""Share of each run that is left out, while the power iteration finds its vector."""


class Power:
    """Plain power iteration that goes on from the vectors of the last call."""

    def __init__(self) -> None:
        self.vectors: Tensor | None = None

    def __call__(self, weights: Tensor) -> list[float]:
        """Return the mean growth of the norm over the second half of the iterations."""
        if self.vectors is None or self.vectors.shape[:2] != weights.shape[:2]:
            self.vectors = torch.randn(*weights.shape[:2], 1)
        growth = []
        for _ in range(POWER_STEPS):
            image = weights @ self.vectors
            norm = image.norm(dim=1, keepdim=True).clamp_min(1e-30)
            self.vectors = image / norm
            growth.append(norm)
        half = torch.cat(growth[POWER_STEPS // 2 :], 2)
        return half.log().mean(dim=(1, 2)).exp().tolist()


def eigenvalues(dtype: torch.dtype) -> Callable[[Tensor], list[float]]:
    """Return the method that takes the largest of all eigenvalues."""
    return lambda w: torch.linalg.eigvals(w.to(dtype)).abs().amax(-1).tolist()


def methods() -> dict[str, Callable[[Tensor], list[float]]]:
    """Return every method by its name in the table, with no state yet."""
    return {
        "gradwatch, certified": lambda w: [r.rho for r in spectral_radius(w)],
        f"{POWER_STEPS} power iterations, warm": Power(),
        "`torch.linalg.eigvals`, float32": eigenvalues(torch.float32),
        "`torch.linalg.eigvals`, float64": eigenvalues(torch.float64),
    }


def errors(steps: int, every: int) -> tuple[dict[str, list[float]], float]:
    """Return each method's relative errors, and the share that gradwatch certified."""
    found: dict[str, list[float]] = {name: [] for name in methods()}
    certified = []
    for run in RUNS:
        fresh = methods()
        for number, weights in enumerate(trajectory(run, steps, every)):
            values = {name: method(weights) for name, method in fresh.items()}
            if number * every < WARM_UP * steps:
                continue
            truth = eigenvalues(torch.float64)(weights)
            certified += [radius.certified for radius in spectral_radius(weights)]
            for name, given in values.items():
                pairs = zip(given, truth, strict=True)
                found[name] += [abs(v - t) / t for v, t in pairs]
    return found, statistics.mean(certified)


def costs(hidden: int, rounds: int) -> dict[str, list[float]]:
    """Return each method's time over that of the training step just before it."""
    torch.manual_seed(0)
    lstm = nn.LSTM(64, hidden)
    optimizer = torch.optim.Adam(lstm.parameters(), 1e-3)
    x = torch.randn(100, 32, 64)
    ratios: dict[str, list[float]] = {name: [] for name in methods()}
    timed = methods()
    for number in range(rounds + 3):
        for name, method in timed.items():
            began = time.perf_counter()
            optimizer.zero_grad()
            lstm(x)[0].square().mean().backward()
            optimizer.step()
            between = time.perf_counter()
            method(gates(lstm))
            after = time.perf_counter()
            if number >= 3:
                ratios[name].append((after - between) / (between - began))
    return ratios


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    steps, every, rounds = (40, 4, 30) if quick else (400, 5, 200)
    cost = {hidden: costs(hidden, rounds) for hidden in (64, 128)}
    error, certified = errors(steps, every)
    values = len(next(iter(error.values())))
    results = Results("radius", keep=not quick)
    title = (
        f"Relative error of {values} radii along {len(RUNS)} runs of {steps} steps, "
        f"the first {WARM_UP:.0%} of each left out; cost of one refresh as a share of "
        f"a training step of LSTM(64->H), T=100, B=32: median of {rounds} pairs "
        "(quartiles)."
    )
    costs_of = [f"cost, H={hidden}" for hidden in cost]
    head = ["method", "median", "p95", "max", "certified", *costs_of]
    results.table("methods", head, title)
    for name, off in error.items():
        ranked = sorted(off)
        p95 = ranked[int(0.95 * len(ranked))]
        row = [f"{v:.1e}" for v in (statistics.median(ranked), p95, ranked[-1])]
        if name.endswith("float64"):
            row = ["the truth", "", ""]
        row.append(f"{100 * certified:.1f} %" if "certified" in name else "-")
        for ratios in cost.values():
            low, middle, high = statistics.quantiles(ratios[name], n=4)
            row.append(f"{100 * middle:.0f} % ({100 * low:.0f}-{100 * high:.0f})")
        results.row(name, *row)
    results.save()


if __name__ == "__main__":
    main()
