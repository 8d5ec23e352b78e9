"""What the one line costs in each framework, beside a step of the framework itself.

The trainings of ``testbed/frameworks.py``, with and without a watch in turn, set-up and
checkpoint included; a row is the median over pairs. One thread.

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
STEPS = {"sb3": 128}
PAIRS = 5


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
    head = ["framework", "steps", "a step without, ms", "added, us [all]", "added, %"]
    results.table("cost", head, "An LSTM 8->16 that reads digits; sb3: RecurrentPPO")
    for name in FRAMEWORKS:
        steps = STEPS.get(name, 1920)
        for watched in (False, True):  # imports
            seconds(name, 16, watched=watched)
        bare, added = [], []
        for pair in range(1 if quick else PAIRS):
            found = {}
            for watched in (False, True) if pair % 2 else (True, False):
                found[watched] = seconds(name, steps, watched=watched)
            bare.append(found[False] / steps)
            added.append((found[True] - found[False]) / steps)
        step, more = statistics.median(bare), statistics.median(added)
        spread = f"[{1e6 * min(added):.0f}, {1e6 * max(added):.0f}]"
        results.row(
            f"{name} {version(PACKAGES.get(name, name))}",
            steps,
            f"{1e3 * step:.2f}",
            f"{1e6 * more:.0f} {spread}",
            f"{100 * more / step:.1f}",
        )
    results.save()


if __name__ == "__main__":
    main()
