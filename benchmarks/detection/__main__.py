"""How right are the alarms? Labelled training runs, and the tools on them.

    python -m benchmarks.detection verify --seeds 0 1 2 3 4   # are the labels true?
    python -m benchmarks.detection run --seeds 0 --remedies   # the table of the tools
    python -m benchmarks.detection long                       # 10 runs, 20,000 steps
    python -m benchmarks.detection list

A third of the families, by a hash of the name, is held out: no threshold may be chosen
on it. Two processes of one thread each. ``--keep`` keeps the tables for the docs.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial

from benchmarks.detection.case import FAMILIES, HELD_OUT_SET, held_out
from benchmarks.detection.parallel import (
    LONG,
    LONG_STEPS,
    judged,
    long_run,
    pool_of_two,
    verified,
)
from benchmarks.detection.score import (
    Judged,
    Verified,
    by_kind,
    median,
    rows,
    share,
)
from benchmarks.detection.tools import TOOLS
from benchmarks.results import Results


def check(families: Sequence[str], seeds: Sequence[int]) -> int:
    """Print every label that does not hold; return how many."""
    jobs = [(family, seed) for family in families for seed in seeds]
    with pool_of_two() as pool:
        found = list(pool.map(verified, jobs))
    violated = [one for one in found if one.problems]
    for one in violated:
        print(_violation(one))
    print(f"\n{len(jobs)} labels measured, {len(violated)} violated.")
    return len(violated)


def _violation(one: Verified) -> str:
    numbers = ", ".join(f"{k} {v:.3g}" for k, v in one.values.items())
    return f"- {one.family}, seed {one.seed}: {'; '.join(one.problems)} ({numbers})"


def _left_out(wrong: Sequence[Verified], measured: int) -> None:
    """Say which runs were not judged, because their label does not hold."""
    print(f"{measured} labels measured, {len(wrong)} violated and left out.\n")
    for one in wrong:
        print(_violation(one))
    print()


def compare(
    results: Results,
    families: Sequence[str],
    seeds: Sequence[int],
    tools: Sequence[str],
    remedies: bool,
) -> None:
    """Report the table of the tools, and print where each was wrong."""
    jobs = [(family, seed) for family in families for seed in seeds]
    judge_one = partial(judged, tools=tools, remedies=remedies)
    with pool_of_two() as pool:
        found = list(pool.map(judge_one, jobs))
    done = [item for one in found if isinstance(one, dict) for item in one.items()]
    _left_out([one for one in found if isinstance(one, Verified)], len(jobs))
    for name in PARTS:
        part = [(t, j) for t, j in done if part_of(j.family) == name]
        if not part:
            continue
        key = name.replace("-", "_") + "_tools" * (len(tools) > 1)
        drawn = " ".join(map(str, seeds))
        results.table(key, HEAD, f"The {name} families; seeds: {drawn}.")
        for tool in tools:
            results.row(tool, *_cells([j for t, j in part if t == tool]))
    if "gradwatch" in tools:
        title = "gradwatch's alarms by kind, in all these runs."
        results.table("kinds", ("kind", "right", "raised in"), title)
        for kind, counts in by_kind(j for t, j in done if t == "gradwatch").items():
            results.row(kind, *counts)
    for tool in tools:
        print(f"\n### Where {tool} was wrong\n")
        wrong = list(rows(j for t, j in done if t == tool))
        print("\n".join(wrong) if wrong else "Nowhere.")


def long(results: Results, seeds: Sequence[int]) -> None:
    """Report what gradwatch says of long healthy runs: it should be nothing."""
    jobs = [(family, seed) for family in LONG for seed in seeds]
    with pool_of_two() as pool:
        found = list(pool.map(long_run, jobs))
    alarms = sum(len(report.alarms) for _, report in found)
    steps = len(jobs) * LONG_STEPS
    title = f"{steps:,} steps: {1e6 * alarms / steps:.1f} alarms in a million."
    results.table("long", ["run", "alarms", "notices"], title)
    for family, report in found:
        said = ", ".join(f"{a.kind} at {a.step}" for a in report.alarms) or "none"
        results.row(family, said, len(report.notices))


HELD_OUT, WHOLE_SET = "held-out", "held-out-set"
PARTS = ("tuning", HELD_OUT, WHOLE_SET)


def part_of(family: str) -> str:
    """Return which part of the benchmark a family belongs to."""
    if family.startswith(HELD_OUT_SET):
        return WHOLE_SET
    return HELD_OUT if held_out(family) else "tuning"


SLOW = "vanishing"
"""The kind that has a clock of its own."""
LEAD = 10
"""Steps before a NaN by which an alarm is of use."""

HEAD = (
    "tool", "right kind, sick runs", "healthy runs with an alarm", "cause", "stream",
    "open at the end is right", "delay", "delay of vanishing",
    "lead to NaN, 10 steps or more", "also said of sick runs", "remedy helped",
    "slow-down",
)  # fmt: skip


def _cells(runs: Sequence[Judged]) -> list[str]:
    """Return the row of one tool, but for its name."""
    sick = [r for r in runs if r.sick]
    well = [r for r in runs if not r.sick]
    shares = (
        share(bool(r.right) for r in sick),
        share(bool(r.false) for r in well),
        share(r.cause for r in sick),
        share(r.stream for r in sick),
        share(r.ends_right for r in runs),
    )
    slow = sum(r.seconds for r in runs) / max(sum(r.bare for r in runs), 1e-9)
    said = [alarm for run in runs for alarm in run.report.alarms]
    names = (True, True, any(a.cause for a in said), any(a.streams for a in said))
    return [
        *(
            _percent(found) if named else "-"  # it never names any
            for found, named in zip(shares, (*names, True), strict=True)
        ),
        _steps(median(r.delay for r in sick if r.label.kind != SLOW)),
        _steps(median(r.delay for r in sick if r.label.kind == SLOW)),
        f"{_steps(median(r.lead for r in sick))}, "
        + _percent(share(None if r.lead is None else r.lead >= LEAD for r in sick)),
        _percent(share(bool(r.false) for r in sick)),
        _percent(share(r.helped for r in sick)),
        f"x{slow:.2f}",
    ]


def _steps(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"


def _percent(found: tuple[int, int]) -> str:
    true, known = found
    return f"{100 * true / known:.0f} % ({true}/{known})" if known else "-"


def main() -> int:
    """Run a command; return 1 where a label is violated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("verify", "run", "long", "list"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--families", nargs="+", default=None)
    parser.add_argument("--part", choices=PARTS, default=None, help="of all families")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--remedies", action="store_true", help="apply them, run again")
    parser.add_argument("--keep", action="store_true", help="the tables, for the docs")
    asked = parser.parse_args()
    families = asked.families or sorted(FAMILIES)
    if asked.part is not None:
        families = [name for name in families if part_of(name) == asked.part]
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"no family {', '.join(sorted(unknown))}; see list")
    if asked.command == "list":
        for name in families:
            print(f"{name} ({part_of(name)}): {FAMILIES[name].__doc__}")
        return 0
    if asked.command == "verify":
        return int(check(families, asked.seeds) > 0)
    results = Results("detection", keep=asked.keep)
    if asked.command == "long":
        long(results, asked.seeds)
    else:
        compare(results, families, asked.seeds, asked.tools, asked.remedies)
    results.save()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
