"""Mistakes of the loop: gradients that are clipped away, old, gone, or of one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.facts import RUN_SCOPE, Facts, RunFacts
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import median
from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.rules import text
from gradwatch.rules.catalogue.loop import (
    CLEARED_EARLY,
    NOT_CLEARED,
    OVER_CLIPPING,
    REPEATED_BATCH,
)
from gradwatch.rules.hysteresis import Running

_NORM, _CLIPPED = map(run_key, ("grad_norm", "grad_norm_clipped"))
_CLIP = run_key("clip_ratio")


class _OfSteps:
    """A kind that is decided on whole steps, and on how many run."""

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._streams = tuple(streams)
        self._ratios = [stream_key(s, "update_ratio") for s in streams]
        self._run = RunFacts()
        self._running = Running()

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


class OverClipping(_OfSteps):
    """The clip leaves a hundredth or less, and the weights hardly move."""

    kind = OVER_CLIPPING.name
    _hold: Final = 20

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__(streams)
        self._norms: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {**super().state_dict(), "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        super().load_state_dict(state)
        self._norms = list(state["norms"])

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self._note(record)
        ratio, norm = record.metrics.get(_CLIP), record.metrics.get(_NORM, math.nan)
        if ratio is None or not math.isfinite(norm):
            return []
        level = OVER_CLIPPING.clear if self.active else OVER_CLIPPING.at
        tight = 0 < ratio <= level("clip_ratio")
        moved = self._moved(record) if tight else None
        there = moved is not None and 0 < moved <= OVER_CLIPPING.at("update")
        self._norms = [*self._norms[1 - self._hold :], norm] if there else []
        if not self._running.take(record.step, there, self._hold):
            return []
        cause = "scaled_gradients" if self._run.scaled else "clip"
        usual, since = median(tuple(self._norms)), self._running.since
        line = OVER_CLIPPING.causes[cause].do
        return [
            text.alert(
                OVER_CLIPPING,
                record,
                since=since,
                what="the clip leaves nothing of the gradients",
                shown=(
                    f"clip_ratio {ratio:.2g} (alarm from "
                    f"{OVER_CLIPPING.at('clip_ratio')} down), largest update_ratio "
                    f"{moved:.2g} (from {OVER_CLIPPING.at('update'):.0e} down), for "
                    f"{self._running.steps} steps"
                ),
                cause=cause,
                evidence={_CLIP: (ratio, OVER_CLIPPING.at("clip_ratio"))},
                do=line.format(usual=usual),
            )
        ]


class NotCleared(_OfSteps):
    """Each backward adds to gradients that have been used already."""

    kind = NOT_CLEARED.name

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self._note(record)
        if _NORM not in record.metrics:
            return []
        there, hold = self._run.cleared is False, NOT_CLEARED.at("steps")
        if not self._running.take(record.step, there, hold):
            return []
        norm = record.metrics[_NORM]
        return [
            text.alert(
                NOT_CLEARED,
                record,
                since=self._running.since,
                what="gradients pile up from step to step",
                shown=(
                    f"{self._running.steps} steps running began with gradients that an "
                    f"optimizer had used; their norm is now {norm:.3g}"
                ),
                cause="zero_grad",
                evidence={_NORM: (norm, None)},
            )
        ]


class ClearedEarly(_OfSteps):
    """A gradient at the end of backward, and none as the optimizer steps."""

    kind = CLEARED_EARLY.name

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        norm = record.metrics.get(_NORM, 0.0)
        if not norm > 0 or not math.isfinite(norm) or "skipped_step" in record.events:
            return []
        gone = record.metrics.get(_CLIPPED, 0.0) == 0
        # A weight that was compared before and after: an optimizer has stepped.
        there = gone and self._moved(record) is not None
        if not self._running.take(record.step, there, CLEARED_EARLY.at("steps")):
            return []
        return [
            text.alert(
                CLEARED_EARLY,
                record,
                since=self._running.since,
                what="the optimizer finds no gradients",
                shown=(
                    f"norm {norm:.3g} at the end of backward, and nothing left at the "
                    f"optimizer's step, in {self._running.steps} steps running"
                ),
                cause="zero_grad",
                evidence={_NORM: (norm, 0.0)},
            )
        ]


class RepeatedBatch:
    """The sequences looked at are the same, bit for bit, at every look: a notice."""

    kind = REPEATED_BATCH.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._modules = tuple(dict.fromkeys(s.module for s in streams))
        self._same: dict[str, int] = {}

    @property
    def active(self) -> bool:
        """Whether they still are."""
        return any(n >= REPEATED_BATCH.at("looks") for n in self._same.values())

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        modules = record.facts.modules
        for module in self._modules if modules else ():
            looks = modules[module].same_batch if module in modules else None
            if looks is None:
                continue
            before, self._same[module] = self._same.get(module, 0), looks
            if before < REPEATED_BATCH.at("looks") <= looks:
                return [self._alert(record, module, looks)]
        return []

    def _alert(self, record: StepRecord, module: str, looks: int) -> Alert:
        return text.alert(
            REPEATED_BATCH,
            record,
            since=record.step,
            what=f"{module} is given the same batch at every step",
            shown=f"its input was the same, bit for bit, at {looks} looks running",
            cause="data",
            evidence={},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"same": dict(self._same)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._same = dict(state["same"])
