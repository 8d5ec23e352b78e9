"""Can the record of a run be trusted: what is missing in it, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gradwatch.console import losses
from gradwatch.plot.columns import counted
from gradwatch.report.content import OK, Note, Subject


def trust(subject: Subject) -> Iterator[Note]:
    """Yield what is missing in the record of a run, or that nothing is."""
    notes = [*_missing(subject)]
    if not subject.steps:
        yield Note("warning", "No step was recorded.")
    elif not any(note.sign != OK for note in notes):
        yield Note(OK, "Every step was recorded, and nothing was lost.")
    yield from notes


def _missing(subject: Subject) -> Iterator[Note]:
    run, found = subject.run, subject.found
    if not run.closed:
        yield Note(
            "warning",
            f"The run was not closed: what came after step {found.last} is lost.",
        )
    health = run.meta.get("health", {})
    if health.get("state") == "on":
        yield Note(OK, f"The run went on when this was written, at step {found.last}.")
    known = {"failed": health.get("failed", {}), "dropped": health.get("dropped", {})}
    if all(isinstance(part, dict) for part in known.values()):
        for line in losses(known):
            yield Note("warning", f"{line}.")
    if run.skipped:
        first = ", ".join(run.skipped[:3])
        yield Note(
            "warning",
            f"{counted(len(run.skipped), 'line')} could not be read (first: {first}).",
        )
    start = run.meta.get("settings", {}).get("start_step", 0)
    if subject.steps and isinstance(start, int) and found.first > start:
        yield Note("notice", f"The record begins at step {found.first:,}.")
    yield from _gaps(subject)
    yield from _thin(subject)
    if found.last >= found.first and not len(found.run("loss").steps):
        yield Note("notice", "No loss was found: watch.log(loss=...) tells it.")
    for path, facts in list(found.facts.modules.items())[:5]:
        if facts.replay:
            yield Note("notice", f"{path}: {facts.replay}.")
    unseen = [
        s for s in run.streams if not len(found.stream(s.name, "grad_norm_hh").steps)
    ]
    if unseen and found.last >= found.first:
        names = ", ".join(s.name for s in unseen[:4])
        more = f" and {len(unseen) - 4} more" if len(unseen) > 4 else ""
        yield Note("warning", f"No gradient was measured in {names}{more}.")
    yield from _cost(run.meta)


def _cost(meta: Mapping[str, Any]) -> Iterator[Note]:
    """Yield what the watch has cost, beside what it was allowed."""
    share = meta.get("health", {}).get("overhead")
    if not isinstance(share, float) or not share > 0:
        return
    budget = meta.get("settings", {}).get("budget")
    if not isinstance(budget, float):
        yield Note(OK, f"gradwatch used at least {share:.1%} of the time; no budget.")
        return
    sign = OK if share <= budget else "notice"
    said = (
        f"gradwatch used at least {share:.1%} of the time; its budget is {budget:.1%}"
    )
    more = ": the run, or its steps, are too short for it" if share > budget else ""
    yield Note(sign, f"{said}{more}.")


def _gaps(subject: Subject) -> Iterator[Note]:
    """Yield where steps have no row of their own."""
    steps = np.array([r.step for r in subject.run.records], np.int64)
    if len(steps) < 2:
        return
    wide = np.diff(steps) > 1
    missing = int((np.diff(steps) - 1).sum())
    if missing:
        first = int(steps[:-1][wide][0]) + 1
        yield Note(
            "notice",
            f"{missing:,} of {int(steps[-1] - steps[0]) + 1:,} steps have no row of "
            f"their own, from step {first} on: the file is folded where a run is long, "
            "and watch.pause() measures nothing.",
        )


def _thin(subject: Subject) -> Iterator[Note]:
    """Yield what was measured more seldom than by default, to keep to the budget."""
    said: dict[str, str] = {}
    for record in subject.run.records:
        for event in record.events:
            if event.startswith("cadence: "):
                words = event.removeprefix("cadence: ")
                said[words.partition(" ")[0]] = f"{words} from step {record.step} on"
    if said:
        yield Note("notice", f"To keep to the budget: {'; '.join(said.values())}.")
    partial = sum(record.partial for record in subject.run.records)
    if partial:
        yield Note(
            "notice",
            f"At {partial:,} short steps the total norm was read, and not the rest of "
            "the gradients.",
        )
