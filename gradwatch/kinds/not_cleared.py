"""Gradients that pile up: zero_grad() was forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.of_steps import NORM, OfSteps, StepsState
from gradwatch.record import Alert, StepRecord, Stream

NOT_CLEARED = Kind(
    name="not_cleared",
    title="gradwatch: gradients are never cleared",
    severity="warning",
    meaning=(
        "Each backward adds to the gradients that the optimizer has used already: "
        "zero_grad() was forgotten."
    ),
    evidence={
        "steps": Evidence(
            "consecutive steps that began with used gradients",
            10,
            None,
            "exact: the same tensor, written once since the optimizer's step",
        )
    },
    warm_up="none",
    confirmed="by 10 consecutive steps: a few may be meant",
    over="after 3 steps that began with cleared gradients",
    causes={
        "zero_grad": Cause(
            "by structure",
            "the gradients of all steps so far pile up: nobody clears them",
            "optimizer.zero_grad()  # once a step, before its first backward",
        )
    },
    numbers={
        "back": Number(
            3,
            "consecutive steps with cleared gradients after which it is over",
            "one or two may be chance",
        ),
    },
)


class NotCleared(OfSteps[StepsState]):
    """Each backward adds to gradients that have been used already."""

    kind, _row = NOT_CLEARED.name, NOT_CLEARED

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__(StepsState(), streams)

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: none tells of gradients that were not cleared."""
        norms, state = block.whole(NORM), self._state
        if norms is None or not state.running.at_rest or state.run.cleared is False:
            return False
        state.running.rest(len(norms))
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self._note(record)
        if NORM not in record.metrics:
            return []
        there, hold = self._state.run.cleared is False, NOT_CLEARED.at("steps")
        if not self._state.running.take(record.step, there, hold, self._back):
            return []
        norm, running = record.metrics[NORM], self._state.running
        return [
            text.alert(
                NOT_CLEARED,
                record,
                since=self._state.running.since,
                what="gradients pile up from step to step",
                shown=(
                    f"{running.steps} consecutive steps began with gradients "
                    f"that an optimizer had already used; their norm is now {norm:.3g}"
                ),
                cause="zero_grad",
                evidence={NORM: (norm, None)},
            )
        ]
