"""What a flight recorder adds to a watch: time, in pairs, and memory.

Every arm trains under a watch; one has none of it, one is the control, the others keep
a state every 100 steps, and at every step. Blocks, rounds and intervals are those of
``benchmarks.overhead``.

Run: python -m benchmarks.recorder [--quick] [--keep]
"""

import argparse
import statistics
import tempfile

import torch

import gradwatch
from benchmarks.overhead import CASES, added, interval, make, run_rounds, undisturbed
from benchmarks.results import Results

EVERY = {"recorder=100": 100, "recorder=1": 1}


def main() -> None:
    """Measure three models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute")
    parser.add_argument("--keep", action="store_true", help="keep the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = Results("recorder", keep=given.keep)
    results.table(
        "cost",
        ["model", "recorder", "step, ms", "added, us", "added, %", "control, %", "MB"],
    )
    for name in ("rnn", "lstm", "large"):
        case = CASES[name]
        arms = make(case, "plain", "control", *EVERY)
        with tempfile.TemporaryDirectory() as folder:
            for arm, own in arms.items():
                own.watch = gradwatch.watch(
                    own.model, dir=folder, wandb=None, recorder=EVERY.get(arm)
                )
            run_rounds(arms, case, given.quick)
            plain, control = arms["plain"], arms["control"]
            rounds = undisturbed(plain, control)
            step = statistics.median(plain.times) / case.steps
            for arm in EVERY:
                share = added(arms[arm], plain, rounds)
                low, high = interval(arms[arm], plain, rounds)
                results.row(
                    case.title,
                    arm,
                    f"{1e3 * step:.2f}",
                    f"{1e6 * share * step:+.0f}",
                    f"{100 * share:+.2f} [{100 * low:.2f}, {100 * high:.2f}]",
                    f"{100 * added(control, plain, rounds):+.2f}",
                    f"{arms[arm].watch._recorder.size / 1e6:.3g}",
                )
            for own in arms.values():
                own.watch.close()
    results.save()


if __name__ == "__main__":
    main()
