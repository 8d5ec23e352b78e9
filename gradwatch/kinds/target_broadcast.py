"""Targets of another shape: every output is compared with every target."""

from __future__ import annotations

import math

from gradwatch.facts import RunFacts
from gradwatch.kinds.kind import Cause, Evidence, Kind
from gradwatch.kinds.of_loss import OfLoss

TARGET_BROADCAST = Kind(
    name="target_broadcast",
    title="gradwatch: each output is compared with all targets",
    severity="warning",
    meaning="Each output is compared with all targets, not with its own.",
    evidence={
        "steps": Evidence(
            "steps for which the loss's graph has said so",
            10,
            None,
            "the graph is exact",
        )
    },
    warm_up="none",
    confirmed="by the number of steps, at every look",
    over="with the first look at which shapes fit",
    excused=(
        "an output that is repeated along an axis that it does not have, such as one "
        "value for all time steps"
    ),
    causes={
        "shape": Cause(
            "`loss_broadcast`: n outputs were expanded to n times n",
            "outputs and targets differ by an axis of 1, and were expanded to each "
            "other; the best that can be learnt is the mean of all targets",
            "assert outputs.shape == targets.shape  # outputs.squeeze(-1), or "
            "targets.unsqueeze(-1)",
        )
    },
)


class TargetBroadcast(OfLoss):
    """The read-out's shape, and that to which the loss has expanded it."""

    kind, _row = TARGET_BROADCAST.name, TARGET_BROADCAST

    def _fault(self, run: RunFacts) -> str | None:
        before, _, after = (run.loss_broadcast or "").partition(" to ")
        if not after:
            return None
        shape, expanded = _sizes(before), _sizes(after)
        times = math.prod(expanded) / math.prod(shape)
        return "shape" if times in shape else None

    def _shown(self, run: RunFacts) -> str:
        before, _, after = (run.loss_broadcast or "").partition(" to ")
        return (
            f"{run.loss_kind} has outputs of shape {before} and targets of another: it "
            f"compares {after} pairs"
        )


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in shape.split("x") if size]
