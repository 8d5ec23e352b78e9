"""What a preflight says of the labelled runs of ``benchmarks/detection``, at step 0.

Of each run it gets three batches, the loss and the optimizer, before any training.
Faults that begin later cannot be seen; the first table is of those kinds that can be.

Run: python -m benchmarks.preflight [--seeds 20 21 22] [--keep]
"""

import argparse
import logging
import sys
import time
from collections import Counter, defaultdict

import torch

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
    times.sort()
    print(f"\n{len(times)} runs: {times[len(times) // 2]:.2f} s the median, ", end="")
    print(f"{times[-1]:.2f} s the longest; refused: {dict(refused)}", file=sys.stdout)
    results.save()


if __name__ == "__main__":
    main()
