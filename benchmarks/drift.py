"""How well the change of rho by one update is predicted, along real training runs.

Small recurrent nets learn handwritten digits, pixel by pixel, and the adding problem.
At every step the prediction from the weights before and after the update is compared
with the exact difference of rho, from float64 eigenvalues. One thread.

Run: python -m benchmarks.drift [--quick]
"""

import argparse
import statistics
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.results import Results
from gradwatch.numerics.drift import predicted_drift
from testbed.trajectories import Run, trajectory

RUNS = (
    Run("digits", nn.RNN, 32, "SGD", 0.1),
    Run("digits", nn.RNN, 64, "Adam", 1e-3),
    Run("digits", nn.RNN, 64, "Adam", 1e-3, orthogonal=True),
    Run("adding", nn.RNN, 64, "SGD", 0.03),
    Run("adding", nn.RNN, 32, "Adam", 1e-2),
    Run("adding", nn.RNN, 64, "Adam", 1e-2),
    Run("digits", nn.LSTM, 64, "Adam", 1e-2),
    Run("digits", nn.LSTM, 32, "SGD", 0.3),
    Run("adding", nn.LSTM, 64, "Adam", 1e-3),
    Run("digits", nn.GRU, 64, "Adam", 1e-3),
    Run("digits", nn.GRU, 32, "Adam", 1e-2),
    Run("adding", nn.GRU, 64, "SGD", 0.3),
)
ABOVE = tuple(replace(run, hidden=128) for run in RUNS if run.hidden == 64)


def exact(before: Tensor, after: Tensor) -> list[float]:
    """Return the differences of rho, from all eigenvalues."""
    rho = [torch.linalg.eigvals(w.double()).abs().amax(-1) for w in (before, after)]
    return (rho[1] - rho[0]).tolist()


def single_pair(before: Tensor, after: Tensor) -> list[float]:
    """Return the first-order change of the leading eigenvalue's modulus alone."""
    change = after.double() - before.double()
    found = []
    values, vectors = torch.linalg.eig(before.double())
    for value, right, moved in zip(values, vectors, change, strict=True):
        lead = int(value.abs().argmax())
        left = torch.linalg.inv(right)[lead]
        step = left @ moved.to(right.dtype) @ right[:, lead]
        found.append((value[lead].conj() / value[lead].abs() * step).real.item())
    return found


def singular_pair(before: Tensor, after: Tensor) -> list[float]:
    """Return u^T dW v with the leading singular vectors."""
    left, _, right = torch.linalg.svd(before.double())
    change = after.double() - before.double()
    return torch.einsum("si,sij,sj->s", left[:, :, 0], change, right[:, 0]).tolist()


def follow(runs: tuple[Run, ...], steps: int) -> tuple[dict[str, list[float]], int]:
    """Return the predictions of every method beside the truth, and the steps taken."""
    names = ("exact", "drift", "reliable", "single", "singular")
    found: dict[str, list[float]] = {name: [] for name in names}
    taken = 0
    for run in runs:
        before = None
        for after in trajectory(run, steps + 1, 1):
            if before is not None:
                taken += 1
                predicted = predicted_drift(before, after)
                found["exact"] += exact(before, after)
                found["drift"] += [d.value for d in predicted]
                found["reliable"] += [d.reliable for d in predicted]
                found["single"] += single_pair(before, after)
                found["singular"] += singular_pair(before, after)
            before = after
    return found, taken


def cells(predicted: np.ndarray, true: np.ndarray, share: float) -> tuple[str, ...]:
    """Return one row of the table, but for its title."""
    error = np.abs(predicted - true) / np.maximum(np.abs(true), 1e-12)
    slope = np.polyfit(predicted, true, 1)[0]
    sign = (np.sign(predicted) == np.sign(true)).mean()
    return (
        f"{100 * share:.1f} %",
        f"{np.corrcoef(predicted, true)[0, 1]:.3f}",
        f"{slope:.2f}",
        f"{100 * statistics.median(error.tolist()):.1f} %",
        f"{100 * sign:.1f} %",
    )


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    results = Results("drift", keep=not quick)
    head = ["prediction", "of the updates", "correlation", "slope", "error", "sign"]
    for key, title, runs, steps in (
        ("small", "H = 32 and 64", RUNS, 15 if quick else 200),
        ("large", "H = 128", ABOVE, 4 if quick else 60),
    ):
        found, taken = follow(runs, steps)
        arrays = {name: np.array(values) for name, values in found.items()}
        reliable, true = arrays["reliable"] > 0, arrays["exact"]
        known = np.isfinite(arrays["drift"])
        title += f": {taken} steps of {len(runs)} runs, "
        results.table(key, head, f"{title}{len(true)} updates of single gates")
        for name, method, chosen in (
            ("`rho_drift`, flagged reliable", "drift", reliable),
            ("`rho_drift`, all", "drift", known),
            ("single pair, all", "single", true == true),
            ("single pair, where ours is reliable", "single", reliable),
            ("singular vectors, all", "singular", true == true),
        ):
            row = cells(arrays[method][chosen], true[chosen], chosen.mean())
            results.row(name, *row)
    results.save()


if __name__ == "__main__":
    main()
