"""When each depth runs: a pure function of the step and of measured times.

It has no clock of its own: times are given to it, so that it can be tested with made
ones and two runs with the same times have the same cadences.
"""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gradwatch import saved

DEPTHS: Final = ("gradients", "state", "spectrum", "flow")

NEVER: Final = sys.maxsize
"""A step that never comes."""

_CADENCE: Final = {"gradients": 1, "state": 50, "spectrum": 50, "flow": 100}
_EARLY: Final = {
    "gradients": frozenset[int](),
    "state": frozenset({0, 1, 2, 4, 8}),
    "spectrum": frozenset({0, 1, 2, 4, 8}),
    "flow": frozenset({0, 1, 2, 4, 8, 16, 32, 64}),
}
_STRETCH: Final = (1, 2, 5, 10, 20)
_TOO_LONG: Final = 1.0
"""Seconds that one probe may take; a longer one is left out."""
_RAREST: Final = 50
"""Steps after which what a rule asks for is let through, whatever it costs."""
_SEEDS_AFTER: Final = (50, 1000)
"""Steps after which the flow sends gradients back from single steps again: as many as
there have been, but at least and at most so many."""
_STEPS_KEPT: Final = 64
_RUNS_KEPT: Final = 5
_IN_FULL: Final = (1, 2, 4, 8)
"""Every how many steps the gradients may be read in full."""
_FIRST_CHOICE: Final = 64
"""Steps after which that is chosen; again whenever their number has doubled."""
_TIMED: Final = 1 / 2
"""Share of the budget that may show in our own timers: as much and more lies outside,
because what comes after us finds the caches cold. The next two are shares of it."""
_OF_GRADIENTS: Final = 1 / 4
"""What reading the gradients may take."""
_AT_LEAST: Final = 1 / 6
"""What each other depth has, whatever the gradients take."""


@dataclass(slots=True)
class _State:
    """What a resumed run needs of a schedule.

    Attributes:
        stretch: Depth -> by how much its cadence is stretched.
        left_out: Depths that take too long.
        costs: Depth -> what its last runs cost, in seconds.
        steps: What the last training steps took, in seconds.
    """

    stretch: dict[str, int]
    left_out: list[str]
    costs: dict[str, list[float]]
    steps: list[float]


class Schedule:
    """The cadence of each depth, kept within a budget.

    Args:
        every: One int for state, spectrum and flow, a mapping from depth to steps, or
            None for the defaults.
        budget: Share of the training time that all of it may take. Half of it may show
            in what is measured here; what reading the gradients leaves of that is for
            state, spectrum and flow, a third each, at least a sixth. None fixes the
            cadences.

    Raises:
        TypeError: If ``every`` is neither an int, a mapping nor None, or ``budget``
            neither a number nor None.
        ValueError: If a depth is unknown, a cadence is below 1, or the budget is not
            above 0 and at most 1.
    """

    def __init__(
        self,
        every: int | Mapping[str, int] | None = None,
        budget: float | None = 0.03,
    ) -> None:
        chosen = _explicit(every)
        self.budget = _share(budget)
        self._every = {**_CADENCE, **chosen}
        self._early = {d: frozenset() if d in chosen else _EARLY[d] for d in DEPTHS}
        self._stretch = dict.fromkeys(DEPTHS, 1)
        self._left_out: set[str] = set()
        self._cadence = dict(self._every)
        self._costs = {d: deque[float](maxlen=_RUNS_KEPT) for d in DEPTHS}
        self._steps = deque[float](maxlen=_STEPS_KEPT)
        self._asked: dict[str, int] = {}
        self._seeds_from = 0
        self._adapts = self.budget is not None and not chosen
        self._costs_in_full = deque[float](maxlen=_STEPS_KEPT)
        self._costs_in_part = deque[float](maxlen=_STEPS_KEPT)
        self._seen, self._choice = 0, _FIRST_CHOICE
        self._of_gradients = 0.0
        self.in_full = 1
        """Every how many steps the gradients are read in full; else the total norm."""
        self.changes = 0
        """How often an answer of :meth:`due` may have changed."""

    def due(self, depth: str, step: int) -> bool:
        """Tell whether a depth runs at a step."""
        cadence = self._cadence[depth]
        if cadence and step % cadence == 0:
            return True
        if step in self._early[depth] or self._asked.get(depth) == step:
            return depth not in self._left_out
        return False

    def soonest(self, step: int) -> int:
        """Return the first step, from ``step`` on, that is more than the gradients'."""
        found = []
        for depth in DEPTHS[1:]:
            if depth in self._left_out:
                continue
            cadence = self._cadence[depth]
            found.append(-(-step // cadence) * cadence)
            found += [n for n in self._early[depth] if n >= step]
            asked = self._asked.get(depth, -1)
            found += [asked] if asked >= step else []
        return min(found, default=NEVER)

    def cadence(self, depth: str) -> int:
        """Return every how many steps a depth runs now; 0 where it is left out."""
        return self._cadence[depth]

    def ask(self, depth: str, step: int) -> None:
        """Have a depth run at one coming step, whatever its cadence."""
        self._asked[depth] = step
        self.changes += 1

    def probe(self, step: int) -> None:
        """Have all there is measured at one coming step."""
        for depth in DEPTHS:
            self.ask(depth, step)
        self.want_seeds()

    def seeds_due(self, step: int) -> bool:
        """Tell whether the flow, where it runs, sends gradients back from each step."""
        return step >= self._seeds_from

    def want_seeds(self) -> None:
        """Have the next flow do so."""
        self._seeds_from = 0

    def seeded(self, step: int) -> None:
        """Note that it did."""
        least, most = _SEEDS_AFTER
        self._seeds_from = step + min(max(step, least), most)

    def ask_within_budget(self, depth: str, step: int) -> None:
        """Have a depth run at one coming step, unless it has run too often lately.

        A depth whose runs cost more than its third of the budget is let through when
        as many steps have passed since it was last let through as would pay for it,
        but for 50 at most.
        """
        costs, steps = self._costs[depth], self._steps
        needed = 1.0
        if self.budget is not None and costs and steps:
            share = statistics.median(costs) / max(statistics.median(steps), 1e-9)
            needed = min(share / self._allowed(self.budget), _RAREST)
        last = self._asked.get(depth)
        if last is None or step - last >= needed:
            self.ask(depth, step)

    def stepped(
        self, seconds: float, ours: float | None = None, *, full: bool = True
    ) -> None:
        """Note how long a training step took.

        Args:
            seconds: Without what was ours.
            ours: What was, in seconds; None where more than the gradients was due.
            full: Whether the gradients were read in full.
        """
        self._seen += 1
        self._steps.append(seconds)
        if ours is not None:
            (self._costs_in_full if full else self._costs_in_part).append(ours)

    def choose(self) -> str | None:
        """Choose every how many steps the gradients are read in full.

        By what that has cost, after 64 steps, 128, 256 and so on.

        Returns:
            The choice in words where it is another one, else None.
        """
        if not self._adapts or self.budget is None or self._seen < self._choice:
            return None
        while self._choice <= self._seen:
            self._choice *= 2
        if len(self._costs_in_full) < _RUNS_KEPT:
            return None
        step = max(statistics.fmean(self._steps), 1e-9)
        full = statistics.fmean(self._costs_in_full) / step
        known = self._costs_in_part
        part = statistics.fmean(known) / step if known else full / 2
        costs = {n: part + (full - part) / n for n in _IN_FULL}
        most = _OF_GRADIENTS * _TIMED * self.budget
        fits = [n for n in _IN_FULL if costs[n] <= most]
        before, self.in_full = self.in_full, fits[0] if fits else _IN_FULL[-1]
        self._of_gradients = costs[self.in_full]
        if self.in_full == before:
            return None
        return f"gradients in full every {self.in_full} steps"

    def _allowed(self, budget: float) -> float:
        """Return the share of the time that each of the other depths may take."""
        timed = _TIMED * budget
        return max((timed - self._of_gradients) / 3, _AT_LEAST * timed)

    def ran(self, depth: str, seconds: float) -> str | None:
        """Note what a run of a depth cost, and adapt its cadence.

        Args:
            depth: The depth that ran.
            seconds: What it cost, from the same clock as :meth:`stepped`.

        Returns:
            The new cadence in words where it changed, else None.
        """
        if self.budget is None or depth == "gradients":
            return None
        if seconds > _TOO_LONG:
            return self.leave_out(depth)
        self._costs[depth].append(seconds)
        if len(self._steps) < _RUNS_KEPT:
            return None
        share = statistics.median(self._costs[depth]) / max(
            statistics.median(self._steps), 1e-9
        )
        allowed = self._allowed(self.budget)
        fits = [s for s in _STRETCH if share / (self._every[depth] * s) <= allowed]
        stretch = fits[0] if fits else _STRETCH[-1]
        if stretch == self._stretch[depth]:
            return None
        self._stretch[depth] = stretch
        self._cadence[depth] = self._every[depth] * stretch
        self.changes += 1
        return f"{depth} every {self.cadence(depth)} steps"

    def leave_out(self, depth: str) -> str:
        """Run a depth no more, as one run takes over a second; return that in words."""
        self._left_out.add(depth)
        self.changes += 1
        self._cadence[depth] = 0
        return f"{depth} takes over {_TOO_LONG:g} s a run and is left out"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        return saved.write(
            _State(
                stretch=self._stretch,
                left_out=sorted(self._left_out),
                costs={depth: list(costs) for depth, costs in self._costs.items()},
                steps=list(self._steps),
            )
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; the early steps are not run again.

        Where ``budget`` is None now, the cadences stay fixed: what a budget of the
        earlier run stretched or left out is not taken over.

        Raises:
            ValueError: If ``state`` is not what :meth:`state_dict` returned.
        """
        read = saved.read(_State, state, "the schedule", saved.UNCHANGED)
        self.changes += 1
        if self.budget is not None:
            self._stretch.update(read.stretch)
            self._left_out = set(read.left_out)
        for depth, steps in self._every.items():
            left_out = depth in self._left_out
            self._cadence[depth] = 0 if left_out else steps * self._stretch[depth]
        for depth, costs in read.costs.items():
            self._costs[depth].clear()
            self._costs[depth].extend(costs)
        self._steps.clear()
        self._steps.extend(read.steps)


def _share(budget: float | None) -> float | None:
    if budget is None:
        return None
    wanted = (
        f"budget is {budget!r}; expected a share of the training time above 0 and at "
        "most 1, such as budget=0.03 for 3 %, or None for fixed cadences."
    )
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(wanted)
    if not 0 < budget <= 1:
        raise ValueError(wanted)
    return budget


def _explicit(every: int | Mapping[str, int] | None) -> dict[str, int]:
    if every is None:
        return {}
    if isinstance(every, Mapping):
        chosen = dict(every)
    elif isinstance(every, int):
        chosen = dict.fromkeys(("state", "spectrum", "flow"), every)
    else:
        raise TypeError(
            f"every is {every!r}; expected an int, a mapping such as "
            '{"spectrum": 100}, or None.'
        )
    if unknown := sorted(repr(depth) for depth in chosen if depth not in DEPTHS):
        raise ValueError(
            f"every names {', '.join(unknown)}; the probe groups are "
            f"{', '.join(DEPTHS)}."
        )
    for depth, steps in chosen.items():
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(
                f"every={every!r} has {depth} run every {steps!r} steps; expected a "
                "whole number of at least 1. To leave W&B or the files out, see "
                "sinks=, wandb=, dir=."
            )
    return chosen
