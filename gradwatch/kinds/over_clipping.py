"""A clip that leaves nothing of the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.of_steps import CLIP, NORM, OfSteps, StepsState
from gradwatch.numerics.streaming import median
from gradwatch.record import Alert, StepRecord, Stream

OVER_CLIPPING = Kind(
    name="over_clipping",
    title="gradwatch: the clip leaves nothing of the gradients",
    severity="warning",
    meaning="The clip is so tight that the weights hardly move.",
    evidence={
        "clip_ratio": Evidence(
            "`clip_ratio`, at most",
            0.01,
            0.1,
            "alone it decides nothing: Adam does not mind, and a net that explodes "
            "is clipped as much",
        ),
        "update": Evidence(
            "largest `update_ratio`, at most",
            1e-4,
            None,
            "healthy runs move by 1e-3; sick ones by 1e-5",
        ),
    },
    warm_up="none",
    confirmed="by 20 consecutive steps",
    over="after 3 steps with a `clip_ratio` above .1, or larger updates",
    excused="while gradients explode: the clip then does what it is for",
    causes={
        "scaled_gradients": Cause(
            "a loss scaler is at work",
            "the clip acts on gradients that the loss scaler has multiplied: it comes "
            "before they are unscaled",
            "scaler.unscale_(optimizer)  # before clip_grad_norm_",
        ),
        "clip": Cause(
            "else",
            "the clip is far below the usual norm of the gradients",
            "torch.nn.utils.clip_grad_norm_(model.parameters(), {usual:.2g})  # the "
            "usual norm",
        ),
    },
    numbers={
        "back": Number(
            3,
            "consecutive steps that are not clipped so after which it is over",
            "one or two may be chance",
        ),
        "hold": Number(20, "consecutive steps"),
    },
    explained_by=("nonfinite", "exploding", "cleared_early"),
)


@dataclass(slots=True)
class _State(StepsState):
    """What the rule remembers, beside what rules of whole steps do.

    Attributes:
        norms: Of the steps that show it.
    """

    norms: list[float] = field(default_factory=list)


class OverClipping(OfSteps[_State]):
    """The clip leaves a hundredth or less, and the weights hardly move."""

    kind, _row = OVER_CLIPPING.name, OVER_CLIPPING
    _hold: Final = OVER_CLIPPING.count("hold")

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__(_State(), streams)

    def update_block(self, block: Block) -> bool:
        """Take in plain rows that a clip leaves more of, if they are clipped at all."""
        state, ratios = self._state, block.read(CLIP)
        if ratios is None or block.whole(NORM) is None or not state.running.at_rest:
            return False
        if ratios and min(ratios) <= OVER_CLIPPING.at("clip_ratio"):
            return False
        if ratios:
            state.norms = []
            state.running.rest(len(ratios))
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self._note(record)
        ratio, norm = record.metrics.get(CLIP), record.metrics.get(NORM, math.nan)
        if ratio is None or not math.isfinite(norm):
            return []
        level = OVER_CLIPPING.clear if self.active else OVER_CLIPPING.at
        tight = 0 < ratio <= level("clip_ratio")
        moved = self._moved(record) if tight else None
        there = moved is not None and 0 < moved <= OVER_CLIPPING.at("update")
        self._state.norms = (
            [*self._state.norms[1 - self._hold :], norm] if there else []
        )
        if not self._state.running.take(record.step, there, self._hold, self._back):
            return []
        cause = "scaled_gradients" if self._state.run.scaled else "clip"
        usual, since = median(tuple(self._state.norms)), self._state.running.since
        line = OVER_CLIPPING.causes[cause].do
        return [
            text.alert(
                OVER_CLIPPING,
                record,
                since=since,
                what="clipping leaves almost nothing of the gradients",
                shown=(
                    f"clip_ratio {ratio:.2g} (alarm at "
                    f"{OVER_CLIPPING.at('clip_ratio')} or below) and largest "
                    f"update_ratio {moved:.2g} (at {OVER_CLIPPING.at('update'):.0e} or "
                    f"below), for {self._state.running.steps} steps"
                ),
                cause=cause,
                evidence={CLIP: (ratio, OVER_CLIPPING.at("clip_ratio"))},
                do=line.format(usual=usual),
            )
        ]
