"""What a preflight says of the labelled runs of ``benchmarks/detection``, at step 0.

Of each run it gets three batches, the loss and the optimizer, before any training.
Faults that begin later cannot be seen; the first table is of those kinds that can be.

And how long it takes for a net of 256 units, 200 steps and 32 sequences, on one thread:
with all initialisations tried, and where outputs are bounded, so that all looks are
taken at them.

Run: python -m benchmarks.preflight [--seeds 20 21 22] [--keep]
"""

import argparse
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.detection import families
from benchmarks.detection.case import FAMILIES, make
from benchmarks.results import Results

SEEN_LATER = frozenset(
    {
        "cleared_early",
        "loss_divergence",
        "lr_too_high",
        "nonfinite",
        "not_cleared",
        "not_learning",
        "over_clipping",
        "spike",
    }
)
"""Kinds of fault that need steps of training: none of them is looked for."""


def verdict_on(name: str, seed: int) -> tuple[str | None, gradwatch.Preflight, float]:
    """Return the kind of a run's fault, what a preflight says, and how long it took."""
    case = make(name, seed)
    batches = [next(case.batches) for _ in range(3)]
    optimizers = case.optimizer if case.once is None else ()  # else it may have several
    began = time.perf_counter()
    found = gradwatch.preflight(case.model, batches, case.loss, optimizers=optimizers)
    return case.label.kind, found, time.perf_counter() - began


class Large(nn.Module):
    """An LSTM of 256 units, and what its read-out is followed by."""

    def __init__(self, outputs: int, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rnn, self.head, self.end = nn.LSTM(64, 256), nn.Linear(256, outputs), end

    def forward(self, x: Tensor) -> Tensor:
        """Return what is read of the last step."""
        return self.end(self.head(self.rnn(x)[0][-1]))


def seconds(outputs: int, end: Callable[[Tensor], Tensor]) -> float:
    """Return how long a preflight of a large net takes, three batches and a lag."""
    torch.manual_seed(0)
    model, classes = Large(outputs, end), outputs > 1
    x = torch.randn(200, 32, 64)
    y = torch.randint(outputs, (32,)) if classes else 3 * torch.randn(32, 1)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy if classes else nn.functional.mse_loss
        return loss(model(batch[0]), batch[1])

    optimizer = torch.optim.Adam(model.parameters())
    began = time.perf_counter()
    gradwatch.preflight(model, [(x, y)] * 3, loss_fn, optimizers=optimizer, lag=150)
    return time.perf_counter() - began


def main() -> None:
    """Try all families."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22])
    parser.add_argument("--keep", action="store_true", help="keep the tables")
    given = parser.parse_args()
    assert families
    torch.set_num_threads(1)
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    runs, failed, warned = Counter(), Counter(), Counter()
    checks: defaultdict[str, Counter[str]] = defaultdict(Counter)
    times, refused, wrong = [], Counter(), []
    for seed in given.seeds:
        for name in sorted(FAMILIES):
            try:
                kind, found, took = verdict_on(name, seed)
            except (RuntimeError, ValueError) as error:
                refused[f"{name}: {str(error).splitlines()[0][:60]}"] += 1
                continue
            times.append(took)
            of = kind or "healthy"
            runs[of] += 1
            failed[of] += bool(found.failed)
            warned[of] += bool(found.warned)
            checks[of].update({check.name for check in found.failed})
            if kind is None and found.failed:
                wrong.append((name, seed, found.failed[0].text))
    results = Results("preflight", keep=given.keep)
    results.table("kinds", ["fault", "runs", "with a FAIL", "by which check"])
    for kind in sorted(runs, key=lambda k: (k != "healthy", k in SEEN_LATER, k)):
        named = ", ".join(f"{n} {c}" for n, c in checks[kind].most_common())
        later = " (begins later)" if kind in SEEN_LATER else ""
        results.row(f"{kind}{later}", runs[kind], failed[kind], named or "-")
    results.table("healthy", ["healthy family", "seed", "FAIL"], rows=wrong)
    large = [
        ("classes", seconds(10, nn.Identity())),
        ("a number", seconds(1, nn.Identity())),
        ("a number behind a tanh, targets beyond it", seconds(1, nn.Tanh())),
    ]
    rows = [(name, f"{took:.1f}") for name, took in large]
    results.table("time", ["LSTM 64->256, T=200, B=32", "s"], rows=rows)
    times.sort()
    print(f"\n{len(times)} runs: {times[len(times) // 2]:.2f} s the median, ", end="")
    print(f"{times[-1]:.2f} s the longest; refused: {dict(refused)}", file=sys.stdout)
    results.save()


if __name__ == "__main__":
    main()
