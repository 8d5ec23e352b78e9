"""What alarms lose where few steps are read in full, on every family of detection.

Each family is trained twice at fixed cadences, seed 0: with all of its gradients read
at every step, and in full at every eighth at most, as where steps are very short. The
cost of a step, which makes that choice otherwise, has no part in it: two runs agree.

Run: python -m benchmarks.short_steps
"""

import functools
import statistics
from collections import defaultdict

from benchmarks.detection.alerts import alerts
from benchmarks.detection.case import FAMILIES
from benchmarks.detection.parallel import pool_of_two
from benchmarks.results import Results

EVERY = 8
"""Every how many steps gradients are read in full where steps are shortest."""


def alarms(name: str, every: int) -> dict[str, tuple[int, str]]:
    """Train a family; return the step and the cause of each kind's first alarm."""
    found: dict[str, tuple[int, str]] = {}
    for alert in alerts(name, in_full=every):
        if alert.severity != "info":
            found.setdefault(alert.kind, (alert.step, str(alert.cause)))
    return found


def main() -> None:
    """Compare, and report by kind."""
    results = Results("short_steps", keep=True)
    by_kind = defaultdict(list)
    with pool_of_two() as pool:
        each = [
            pool.map(functools.partial(alarms, every=every), FAMILIES)
            for every in (1, EVERY)
        ]
        for all_read, some in zip(*each, strict=True):
            for kind in all_read.keys() | some.keys():
                by_kind[kind].append((all_read.get(kind), some.get(kind)))
    head = ["kind", "alarms", "the same step", "later: median, most"]
    head += ["another cause", "lost", "more"]
    results.table("delays", head, f"In full at every {EVERY}th step at most")
    for kind, pairs in sorted(by_kind.items()):
        both = [(one, two) for one, two in pairs if one and two]
        late = [two[0] - one[0] for one, two in both if one[0] != two[0]]
        results.row(
            kind,
            sum(one is not None for one, _ in pairs),
            sum(one[0] == two[0] for one, two in both),
            f"{statistics.median(late):g}, {max(late)} steps" if late else "-",
            sum(one[1] != two[1] for one, two in both),
            sum(two is None for _, two in pairs),
            sum(one is None for one, _ in pairs),
        )
    results.save()


if __name__ == "__main__":
    main()
