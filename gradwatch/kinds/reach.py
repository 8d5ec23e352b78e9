"""Why a gradient does not reach the first steps."""

from __future__ import annotations

from gradwatch.kinds.kind import Kind
from gradwatch.kinds.seen import Seen
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
        return "saturation" if own.get("saturated", 0.0) > 1 / 2 else "contraction"
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
