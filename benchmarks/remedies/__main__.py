"""What each remedy does to small recurrent nets that need it, before and after.

Each section has a table of its own; without a name all of them run. One thread.

Run: python -m benchmarks.remedies [adding ...] [--seeds N] [--quick]
"""

import argparse
import logging
import time
from collections.abc import Callable

import torch

from benchmarks.remedies.adding import adding
from benchmarks.remedies.cures import cures
from benchmarks.remedies.forgetting import vanishing
from benchmarks.remedies.pixels import digits, drift
from benchmarks.remedies.spikes import lives, nan
from benchmarks.results import Results

SECTIONS: dict[str, Callable[[Results, int, bool], None]] = {
    "adding": adding,
    "digits": digits,
    "lives": lives,
    "nan": nan,
    "drift": drift,
    "vanishing": vanishing,
    "cures": cures,
}


def main() -> None:
    """Run the sections that were named and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="toy size")
    asked = parser.parse_args()
    if unknown := set(asked.section) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there is {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    # Refused steps are part of what is shown.
    logging.getLogger("gradwatch").setLevel(logging.ERROR)
    results = Results("remedies", keep=not asked.quick, used=["scikit-learn"])
    for name in asked.section or SECTIONS:
        began = time.process_time()
        SECTIONS[name](results, 1 if asked.quick else asked.seeds, asked.quick)
        results.save()
        took = time.process_time() - began
        print(f"\n{name}: {took:.0f} s on one core.\n", flush=True)


if __name__ == "__main__":
    main()
