"""Tables of results: printed as they grow, and kept as JSON for the pages of the docs.

``docs/results/<name>.json`` holds the tables of one benchmark with the command, the
date, the machine and the versions; ``make docs`` puts them into the pages.
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"


class Results:
    """The tables of one run of a benchmark.

    Args:
        name: Of its module, such as ``flow``.
        keep: Whether they are kept; a quick run is only printed.
    """

    def __init__(self, name: str, *, keep: bool) -> None:
        self._name, self._keep = name, keep
        self._tables: dict[str, dict[str, Any]] = {}

    def table(self, key: str, head: Sequence[str], title: str = "") -> None:
        """Begin a table.

        Args:
            key: By which a page names it.
            head: The names of its columns.
            title: What was measured, in a sentence; kept with it.
        """
        if self._tables or title:
            print(f"\n{title}\n" if title else "")
        print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
        self._tables[key] = {"title": title, "head": list(head), "rows": []}

    def row(self, *cells: object) -> None:
        """Add a row to the last table."""
        shown = [str(cell) for cell in cells]
        *_, last = self._tables.values()
        if len(shown) != len(last["head"]):
            raise ValueError(f"{len(shown)} cells; expected {len(last['head'])}.")
        last["rows"].append(shown)
        print(f"| {' | '.join(shown)} |", flush=True)

    def save(self) -> None:
        """Keep the tables, unless the run was a quick one."""
        if not self._keep:
            return
        whole = {
            "command": f"python -m benchmarks.{self._name}",
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "versions": {
                "python": platform.python_version(),
                **{
                    name: version(name).partition("+")[0] for name in ("torch", "numpy")
                },
            },
            "tables": self._tables,
        }
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(whole, indent=1, ensure_ascii=False)
        (RESULTS / f"{self._name}.json").write_text(text + "\n", encoding="utf-8")


def machine() -> str:
    """Return the processor's name, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        named = [line for line in lines if line.startswith("model name")]
        name = named[0].partition(":")[2].strip() if named else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
