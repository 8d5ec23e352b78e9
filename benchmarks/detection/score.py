"""From what the tools said to how right they were."""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.detection.case import History, Label, loop, make, trained
from benchmarks.detection.tools import Alarm, Report, Tool

HELPED = 0.8
"""Share of the untreated loss that a remedy has to get below."""
NOTICE = 20
"""Steps between onset and NaN from which on there is time for a warning."""
NOTICES = frozenset({"not_learning", "state_carried", "graph_kept", "eval_mode"})
"""Kinds that a tool may name in a notice: nobody is paged for what may be meant."""
TREATED = 600
"""Steps behind the alarm that both runs have at least: to remember is slow to learn."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One tool on one run.

    Attributes:
        family: Name of the family.
        seed: Of the case.
        label: What is true.
        report: What the tool said.
        history: Of the run under the tool.
        seconds: What the run took with the tool.
        bare: What it took without.
        helped: Whether the remedy that the tool applied helped; None: not tried.
    """

    family: str
    seed: int
    label: Label
    report: Report
    history: History
    seconds: float
    bare: float
    helped: bool | None = None

    @property
    def sick(self) -> bool:
        """Whether something is wrong with the run."""
        return self.label.kind is not None

    @property
    def right(self) -> list[Alarm]:
        """What was said of the right kind, from the onset on."""
        named = self.label.same | {self.label.kind}
        said = [*self.report.alarms]
        if self.label.kind in NOTICES:
            said += self.report.notices
        return [a for a in said if a.kind in named and a.step >= self.label.onset]

    @property
    def false(self) -> list[Alarm]:
        """The alarms of a kind that is not true; before the onset, all of them."""
        true = self.label.others | self.label.same | {self.label.kind}
        if self.sick and self.history.diverged:
            true |= {"loss_divergence"}  # by exact count: it is true as well
        return [
            a
            for a in self.report.alarms
            if a.kind not in true or (self.sick and a.step < self.label.onset)
        ]

    @property
    def cause(self) -> bool | None:
        """Whether the cause is right; None where there is nothing to be right about."""
        if not self.right or not self.label.causes:
            return None
        return any(a.cause in self.label.causes for a in self.right)

    @property
    def stream(self) -> bool | None:
        """Whether a right stream was named; None where there is none, or none asked."""
        if not self.right or not self.label.streams:
            return None
        return any(a.streams & self.label.streams for a in self.right)

    @property
    def delay(self) -> int | None:
        """Steps from the onset to the first right alarm."""
        return min((a.step - self.label.onset for a in self.right), default=None)

    @property
    def lead(self) -> int | None:
        """Steps from the first alarm since the onset to the first NaN.

        None where there is no NaN, or fewer than 20 steps from the onset to it; 0 where
        there is no alarm by then.
        """
        first, onset = self.history.nonfinite, self.label.onset
        if first is None or first - onset < NOTICE:
            return None
        return max(
            (first - a.step for a in self.report.alarms if a.step >= onset), default=0
        )

    @property
    def ends_right(self) -> bool:
        """Whether what is open at the end is what is true, and nothing else."""
        if not self.sick:
            return not self.report.open - self.label.others
        if self.label.kind in NOTICES and self.right:
            return True
        return bool(self.report.open & (self.label.same | {self.label.kind}))


def judge(
    family: str, seed: int, tools: Mapping[str, Tool], remedies: Collection[str] = ()
) -> dict[str, Judged]:
    """Run every tool on one case, each on a run of its own.

    Args:
        family: Name of the family.
        seed: Of the case.
        tools: The tools by name.
        remedies: Names of tools that name a remedy: a curable run that such a tool is
            right about is run again, with the remedy applied at the alarm.
    """
    began = time.perf_counter()
    trained(make(family, seed))
    bare = time.perf_counter() - began
    found = {}
    for name, tool in tools.items():
        case, history = make(family, seed), History()
        began = time.perf_counter()
        report = tool(case, loop(case, history), False)
        one = Judged(
            family=family,
            seed=seed,
            label=case.label,
            report=report,
            history=history,
            seconds=time.perf_counter() - began,
            bare=bare,
        )
        if name in remedies and case.label.curable and one.right:
            one = replace(one, helped=_helps(family, seed, tool, one))
        found[name] = one
    return found


def _helps(family: str, seed: int, tool: Tool, told: Judged) -> bool:
    """Run again with the remedy and without, for at least as long as it may take."""
    case, history = make(family, seed), History()
    case.steps = max(case.steps, told.right[0].step + TREATED)
    report = tool(case, loop(case, history), True)
    if report.treated is None:
        return False
    untreated = make(family, seed)
    untreated.steps = case.steps
    late = [a for a in report.alarms if a.step > report.treated]
    final, before = history.final, trained(untreated).final
    better = math.isfinite(final) and not final > HELPED * before
    return better and not late


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One label that was measured.

    Attributes:
        family: Name of the family.
        seed: Of the case.
        problems: What does not hold, in words; empty where all does.
        values: The numbers that were measured.
    """

    family: str
    seed: int
    problems: tuple[str, ...]
    values: dict[str, float]


def verify(family: str, seed: int) -> Verified:
    """Measure whether a label is true: by its truth, and by its control run."""
    case = make(family, seed)
    history = trained(case)
    problems: list[str] = []
    goal = case.goal
    reached = history.final if goal is None else goal()
    values: dict[str, float] = {"final loss": history.final, "reached": reached}
    if case.truth is None:
        problems.append("nothing measures this label")
    else:
        holds, found = case.truth(case, history)
        values |= found
        if not holds:
            problems.append("what was measured is not what the label says")
    if case.control is not None:
        control = case.control()
        final = trained(control).final
        final = final if control.goal is None else control.goal()
        values["of the control"] = final
        if not (math.isfinite(final) and not final > HELPED * reached):
            problems.append("the control without the fault is no better")
    if case.label.kind is None and history.nonfinite is not None:
        problems.append(f"not finite at step {history.nonfinite}")
    return Verified(family=family, seed=seed, problems=tuple(problems), values=values)


def share(values: Iterable[bool | None]) -> tuple[int, int]:
    """Return how many are true, and how many there are that can be either."""
    known = [v for v in values if v is not None]
    return sum(known), len(known)


def by_kind(found: Iterable[Judged]) -> dict[str, tuple[int, int]]:
    """Return kind -> in how many runs its alarm was right, and in how many raised."""
    counts: dict[str, tuple[int, int]] = {}
    for one in found:
        wrong = {alarm.kind for alarm in one.false}
        for kind in sorted({alarm.kind for alarm in one.report.alarms}):
            right, raised = counts.get(kind, (0, 0))
            counts[kind] = right + (kind not in wrong), raised + 1
    return dict(sorted(counts.items()))


def median(values: Iterable[int | None]) -> float:
    """Return the median of what there is; NaN for nothing."""
    known = [float(v) for v in values if v is not None]
    return float(torch.tensor(known).median()) if known else math.nan


def rows(found: Iterable[Judged]) -> Iterator[str]:
    """Say one by one where a tool was wrong.

    Yields:
        A line of Markdown each.
    """
    for one in found:
        said = ", ".join(f"{a.kind} ({a.cause}) at {a.step}" for a in one.report.alarms)
        where = f"{one.family}, seed {one.seed}"
        if one.sick and not one.right:
            yield f"- {where}: {one.label.kind} not seen; said: {said or 'nothing'}"
        elif one.cause is False:
            causes = " or ".join(sorted(one.label.causes))
            yield f"- {where}: cause is {causes}; said: {said}"
        elif one.stream is False:
            yield f"- {where}: stream is {', '.join(one.label.streams)}; said: {said}"
        if one.false:
            kinds = ", ".join(f"{a.kind} at {a.step}" for a in one.false)
            yield f"- {where}: false alarm: {kinds}"
        if one.helped is False:
            yield f"- {where}: the remedy did not help"
