"""Gradients that are gone before the optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.of_steps import CLIPPED, NORM, OfSteps, StepsState
from gradwatch.record import Alert, StepRecord, Stream

CLEARED_EARLY = Kind(
    name="cleared_early",
    title="gradwatch: gradients are cleared before the step",
    severity="warning",
    meaning="backward() gives a gradient, and the optimizer finds none, or zeros.",
    evidence={
        "steps": Evidence(
            "consecutive steps with `grad_norm` above 0 and nothing left of it",
            10,
            None,
            "exact: clipping leaves something",
        )
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="after 3 steps in which something was left",
    excused="what a refusing clipper takes away: those gradients are not finite",
    causes={
        "zero_grad": Cause(
            "by measurement",
            "zero_grad() stands between backward() and step()",
            "optimizer.zero_grad(); loss.backward(); optimizer.step()  # in this order",
        )
    },
    numbers={
        "back": Number(
            3,
            "consecutive steps in which something was left after which it is over",
            "one or two may be chance",
        ),
    },
    explained_by=(
        "nonfinite",
        "exploding",
    ),  # a clip to a norm that overflows leaves zeros
)


class ClearedEarly(OfSteps[StepsState]):
    """A gradient at the end of backward, and none as the optimizer steps."""

    kind, _row = CLEARED_EARLY.name, CLEARED_EARLY

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__(StepsState(), streams)

    def update_block(self, block: Block) -> bool:
        """Take in plain rows in which something was left of every gradient."""
        norms, left = block.whole(NORM), block.read(CLIPPED)
        if norms is None or left is None or not self._state.running.at_rest:
            return False
        if min(norms) <= 0 or not all(left):
            return False
        if left:
            self._state.running.rest(len(left))
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        norm, running = record.metrics.get(NORM, 0.0), self._state.running
        if not norm > 0 or not math.isfinite(norm) or "skipped_step" in record.events:
            return []
        if record.partial:
            return []
        gone = record.metrics.get(CLIPPED, 0.0) == 0
        # A weight that was compared before and after: an optimizer has stepped.
        there = gone and self._moved(record) is not None
        if not self._state.running.take(
            record.step, there, CLEARED_EARLY.at("steps"), self._back
        ):
            return []
        return [
            text.alert(
                CLEARED_EARLY,
                record,
                since=self._state.running.since,
                what="the optimizer finds no gradients",
                shown=(
                    f"norm {norm:.3g} at the end of backward, and nothing left at the "
                    f"optimizer's step, in {running.steps} consecutive steps"
                ),
                cause="zero_grad",
                evidence={NORM: (norm, 0.0)},
            )
        ]
