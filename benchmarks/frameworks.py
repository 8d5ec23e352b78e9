"""What the one line costs in each framework, beside a step of the framework itself.

The trainings of ``testbed/frameworks.py``, short ones and three times as long, each
with and without a watch in turn; a row has medians over rounds. What is added to a step
is what the longer trainings take more; the rest is set-up, first steps, close, and the
last picture for TensorBoard. One thread.

Run: python -m benchmarks.frameworks
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.results import Results
from testbed.frameworks import FRAMEWORKS

PACKAGES = {"ignite": "pytorch-ignite", "sb3": "sb3-contrib"}
STEPS = {"sb3": 48}
"""Of the short training; 640 unless given here."""
ROUNDS = 3


def seconds(name: str, steps: int, *, watched: bool) -> float:
    """Return what one training takes."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADWATCH_DIR"] = str(Path(folder) / "runs")
        began = time.perf_counter()
        FRAMEWORKS[name](Path(folder), steps=steps, watched=watched)
        return time.perf_counter() - began


def main() -> None:
    """Measure all frameworks and report them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair each")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    used = [PACKAGES.get(name, name) for name in FRAMEWORKS]
    results = Results("frameworks", keep=not quick, used=used)
    head = ["framework", "a step without, ms", "added, us [all]", "added, %", "once, s"]
    results.table("cost", head, "An LSTM 8->16 that reads digits; sb3: RecurrentPPO")
    for name in FRAMEWORKS:
        short = STEPS.get(name, 640)
        for watched in (False, True):  # imports
            seconds(name, 16, watched=watched)
        bare, added, once = [], [], []
        for _ in range(1 if quick else ROUNDS):
            took = {
                (steps, watched): seconds(name, steps, watched=watched)
                for steps in (short, 3 * short)
                for watched in (False, True)
            }
            more = {n: took[n, True] - took[n, False] for n in (short, 3 * short)}
            bare.append((took[3 * short, False] - took[short, False]) / (2 * short))
            added.append((more[3 * short] - more[short]) / (2 * short))
            once.append(more[short] - short * added[-1])
        step, each = statistics.median(bare), statistics.median(added)
        spread = f"[{1e6 * min(added):.0f}, {1e6 * max(added):.0f}]"
        results.row(
            f"{name} {version(PACKAGES.get(name, name))}",
            f"{1e3 * step:.2f}",
            f"{1e6 * each:.0f} {spread}",
            f"{100 * each / step:.0f}",
            f"{statistics.median(once):.1f}",
        )
    results.save()


if __name__ == "__main__":
    main()
