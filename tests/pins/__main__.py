"""Write or check the pinned values; see the package."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.pins.families import reported
from tests.pins.runs import RUNS, run
from tests.pins.stored import CLOSE, DIGITS, HERE, differences, read, write
from tests.pins.surface import calls, surface


def runs() -> dict[str, Any]:
    """Return every run."""
    found = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(name, Path(folder))
    return found


PARTS: dict[str, Callable[[], Any]] = {
    "runs": runs,
    "surface": surface,
    "calls": calls,
    "families": reported,
}


def main() -> int:
    """Write or check; return 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.pins")
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--digits", type=int, default=DIGITS)
    parser.add_argument("--close", type=float, default=CLOSE)
    parser.add_argument("--folder", type=Path, default=HERE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for part in given.parts or PARTS:
        now = PARTS[part]()
        if given.what == "write":
            write(part, now, given.digits, given.folder)
            continue
        for line in differences(read(part, given.folder), now, given.close, part):
            wrong += 1
            print(line)
    if given.what == "check":
        print(f"{wrong} places differ.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
