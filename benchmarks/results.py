"""Tables of results: printed as they grow, and kept as JSON for the pages of the docs.

``docs/results/<name>.json`` holds the tables of one benchmark, each with the command,
the date, the machine and the versions; ``make docs`` puts them into the pages.
"""

import datetime
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"


class Results:
    """The tables of one run of a benchmark.

    Args:
        name: Of its module, such as ``flow``.
        keep: Whether they are kept; a quick run is only printed.
        used: Packages beside torch and numpy whose versions matter.
    """

    def __init__(self, name: str, *, keep: bool, used: Sequence[str] = ()) -> None:
        self._name, self._keep = name, keep
        self._used = ("torch", "numpy", *used)
        self._tables: dict[str, dict[str, Any]] = {}

    def table(
        self,
        key: str,
        head: Sequence[str],
        title: str = "",
        rows: Iterable[Sequence[object]] = (),
    ) -> None:
        """Begin a table.

        Args:
            key: By which a page names it.
            head: The names of its columns.
            title: What was measured, in a sentence; kept with it.
            rows: Of its rows those that are known by now, or become known one by one.
        """
        if self._tables or title:
            print(f"\n{title}\n" if title else "")
        print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
        self._tables[key] = {"title": title, "head": list(head), "rows": []}
        for cells in rows:
            self.row(*cells)

    def row(self, *cells: object) -> None:
        """Add a row to the last table."""
        shown = [str(cell) for cell in cells]
        *_, last = self._tables.values()
        if len(shown) != len(last["head"]):
            raise ValueError(f"{len(shown)} cells; expected {len(last['head'])}.")
        last["rows"].append(shown)
        print(f"| {' | '.join(shown)} |", flush=True)

    def save(self) -> None:
        """Keep the tables beside those of other runs, unless the run was quick."""
        if not self._keep:
            return
        run = {
            "command": shlex.join(
                ["python", "-m", f"benchmarks.{self._name}", *sys.argv[1:]]
            ),
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name).partition("+")[0] for name in self._used},
            },
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self._name}.json"
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        kept |= {key: run | table for key, table in self._tables.items()}
        text = json.dumps(kept, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def quartiles(values: Sequence[float]) -> str:
    """Return ``median (lower-upper quartile)``."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def spread(values: Iterable[float], form: str = ".3g") -> str:
    """Return ``median (min to max)``; NaN counts as the largest value of all."""
    ranked = _ranked(values)
    low, middle, high = (
        format(value, form) for value in (ranked[0], middle_of(ranked), ranked[-1])
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def middle_of(values: Iterable[float]) -> float:
    """Return the median, of two the higher; NaN counts as the largest value of all."""
    ranked = _ranked(values)
    return ranked[len(ranked) // 2]


def _ranked(values: Iterable[float]) -> list[float]:
    return sorted(values, key=lambda value: (math.isnan(value), value))


def machine() -> str:
    """Return the processor's name, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        named = [line for line in lines if line.startswith("model name")]
        name = named[0].partition(":")[2].strip() if named else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
