"""The catalogue of kinds: one row each, from which all else is derived.

Its numbers are those that the rules use, its words those of the messages, and the pages
``docs/alerts/<kind>.md`` are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from gradwatch.kinds.axes_mixed import AXES_MIXED, AxesMixed
from gradwatch.kinds.cleared_early import CLEARED_EARLY, ClearedEarly
from gradwatch.kinds.dead_units import DEAD_UNITS, DeadUnits
from gradwatch.kinds.drift import DRIFT, Drift
from gradwatch.kinds.exploding import EXPLODING, Exploding
from gradwatch.kinds.gate_stuck import GATE_STUCK, GateStuck
from gradwatch.kinds.growth import Growth
from gradwatch.kinds.judge import Rule
from gradwatch.kinds.kind import Kind
from gradwatch.kinds.loss_divergence import LOSS_DIVERGENCE, LossDivergence
from gradwatch.kinds.loss_mismatch import LOSS_MISMATCH, LossMismatch
from gradwatch.kinds.lr_too_high import LR_TOO_HIGH, LrTooHigh
from gradwatch.kinds.no_gradient import NO_GRADIENT, NoGradient
from gradwatch.kinds.nonfinite import NONFINITE, Nonfinite
from gradwatch.kinds.not_cleared import NOT_CLEARED, NotCleared
from gradwatch.kinds.not_learning import NOT_LEARNING, NotLearning
from gradwatch.kinds.not_updating import NOT_UPDATING, NotUpdating
from gradwatch.kinds.of_calls import (
    EVAL_MODE,
    GRAPH_KEPT,
    STATE_CARRIED,
    EvalMode,
    GraphKept,
    StateCarried,
)
from gradwatch.kinds.over_clipping import OVER_CLIPPING, OverClipping
from gradwatch.kinds.repeated_batch import REPEATED_BATCH, RepeatedBatch
from gradwatch.kinds.saturated import SATURATED, Saturated
from gradwatch.kinds.spike import SPIKE, Spike
from gradwatch.kinds.target_broadcast import TARGET_BROADCAST, TargetBroadcast
from gradwatch.kinds.truncated import TRUNCATED, Truncated
from gradwatch.kinds.underflow import UNDERFLOW, Underflow
from gradwatch.kinds.unstepped import NoStep, Unheld
from gradwatch.kinds.vanishing import VANISHING, Vanishing
from gradwatch.record import Stream

_Make = Callable[[Sequence[Stream]], Rule]

_RULES: Final[Sequence[tuple[Kind, Sequence[_Make]]]] = (
    (EXPLODING, (Exploding, Growth)),
    (NONFINITE, (Nonfinite,)),
    (LR_TOO_HIGH, (LrTooHigh,)),
    (LOSS_DIVERGENCE, (LossDivergence,)),
    (SPIKE, (Spike,)),
    (DEAD_UNITS, (DeadUnits,)),
    (GATE_STUCK, (GateStuck,)),
    (CLEARED_EARLY, (ClearedEarly,)),
    (NOT_CLEARED, (NotCleared,)),
    (LOSS_MISMATCH, (LossMismatch,)),
    (TARGET_BROADCAST, (TargetBroadcast,)),
    (AXES_MIXED, (AxesMixed,)),
    (OVER_CLIPPING, (OverClipping,)),
    (NO_GRADIENT, (NoGradient,)),
    (NOT_UPDATING, (NotUpdating, NoStep, Unheld)),
    (UNDERFLOW, (Underflow,)),
    (DRIFT, (Drift,)),
    (SATURATED, (Saturated,)),
    (VANISHING, (Vanishing,)),
    (NOT_LEARNING, (NotLearning,)),
    (TRUNCATED, (Truncated,)),
    (STATE_CARRIED, (StateCarried,)),
    (GRAPH_KEPT, (GraphKept,)),
    (EVAL_MODE, (EvalMode,)),
    (REPEATED_BATCH, (RepeatedBatch,)),
)
"""Each kind with its rules; what explains comes before what it explains."""

_TITLE: Final = 64
"""Characters of a title: W&B takes no longer one."""

CATALOGUE: Final[Mapping[str, Kind]] = MappingProxyType(
    {kind.name: kind for kind, _ in _RULES}
)


def default_rules(streams: Sequence[Stream]) -> list[Rule]:
    """Return the catalogue's rules for the streams of one model."""
    return [rule(streams) for _, rules in _RULES for rule in rules]


def title(kind: str) -> str:
    """Return the constant title of a kind."""
    row = CATALOGUE.get(kind)
    return row.title if row is not None else f"gradwatch: {kind}"[:_TITLE]
