"""Why a gradient does not reach the first steps, and what is remembered of that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gradwatch.kinds.kind import Kind
from gradwatch.kinds.seen import Losses, Seen, SeenState
from gradwatch.record import CELL, Stream


def cause_of(row: Kind, seen: Seen, stream: Stream, length: int) -> str:
    """Return the first cause that the evidence names.

    Args:
        row: Of ``vanishing``, whose numbers and causes these are.
        seen: What was last seen of every stream.
        stream: The one that shows it.
        length: Steps of its sequences, those that are cut off with them.
    """
    own, module = seen.of(stream), seen.module(stream)
    if module.cut or module.state_detached:
        return "truncation"
    if (module.padding or 0.0) >= row.number("padded"):
        return "padding"
    if stream.kind == CELL:
        return (
            "saturation"
            if own.get("saturated", 0.0) > row.number("flat")
            else "contraction"
        )
    slope = own.get("act_deriv", 1.0)
    if stream.kind != "RNN_RELU" and slope < row.number("saturated"):
        drive = seen.stream(stream).drive or ""
        by = {"input": "input_scale", "state": "large_weights"}
        return by.get(drive, "saturation")
    if own.get("shut/f", 0.0) > row.number("shut"):
        return "forget_gate"
    if own.get("shut/z", 0.0) > row.number("shut"):
        return "update_gate"
    fallen = own.get("rho_total_drift", 0.0) <= -row.number("fallen")
    if not stream.gates and fallen:
        return "drift"
    lasts = own.get("rho", 0.0) > row.number("lasts")
    if stream.gates or (length > row.count("long_sequence") and lasts):
        return "horizon_too_long"
    return "small_radius"


@dataclass(slots=True)
class Reached:
    """What the rule of ``vanishing`` remembers.

    Attributes:
        seen: What was last seen of every stream.
        losses: The losses so far.
        constant: What a constant output would have for a loss; 0 if unknown.
        open: Stream -> its open incident.
        past: Stream -> its last probes.
        reached: Stream -> whether a gradient had reached the first steps.
        learnt: Stream -> whether the task was learnt.
        probed: When any was last measured.
        doubts: Streams that may have fallen.
    """

    seen: SeenState = field(default_factory=SeenState)
    losses: Losses = field(default_factory=Losses)
    constant: float = 0.0
    open: dict[str, dict[str, Any]] = field(default_factory=dict)
    past: dict[str, list[float]] = field(default_factory=dict)
    reached: dict[str, bool] = field(default_factory=dict)
    learnt: dict[str, bool] = field(default_factory=dict)
    probed: int = 0
    doubts: dict[str, bool] = field(default_factory=dict)
