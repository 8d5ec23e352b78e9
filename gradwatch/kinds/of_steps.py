"""Kinds that are decided on whole steps, and on how many run: their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradwatch.facts import RUN_SCOPE, Facts, RunFacts
from gradwatch.kinds.kind import Kind
from gradwatch.kinds.latch import Running
from gradwatch.metrics import run_key, stream_key
from gradwatch.record import StepRecord, Stream

NORM, CLIPPED = map(run_key, ("grad_norm", "grad_norm_clipped"))

CLIP = run_key("clip_ratio")


class OfSteps:
    """A kind that is decided on whole steps, and on how many run."""

    _row: Kind

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._streams = tuple(streams)
        self._ratios = [stream_key(s, "update_ratio") for s in streams]
        self._run = RunFacts()
        self._running = Running(self._row.count("back"))

    @property
    def active(self) -> bool:
        """Whether it is still so."""
        return self._running.raised

    def _note(self, record: StepRecord) -> None:
        known, now = self._run, record.facts.run
        if now is not RUN_SCOPE:
            self._run = RunFacts(
                cleared=known.cleared if now.cleared is None else now.cleared,
                scaled=known.scaled if now.scaled is None else now.scaled,
            )

    def _moved(self, record: StepRecord) -> float | None:
        """Return the largest update ratio of the step; None where none was measured."""
        found = [record.metrics[key] for key in self._ratios if key in record.metrics]
        return max(found, default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        facts = Facts(run=self._run).to_plain()
        return {"facts": facts, "running": self._running.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._run = Facts.from_plain(state["facts"]).run
        self._running.load_state_dict(state["running"])
