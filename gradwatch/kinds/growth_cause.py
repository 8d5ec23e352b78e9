"""Why gradients grow through time, from what was last seen of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gradwatch.record import Stream

CONTEXT: Final = ("rho", "rho_total_drift", "act_deriv", "growth_log10")
"""Metrics that decide it."""

GROWN: Final = 0.1
"""Logarithm of rho over its start from which on it has grown or fallen."""

_ON: Final = 0.75
"""Share of active ReLU units from which on what they leave out decides nothing."""


def growth_cause(stream: Stream, seen: Mapping[str, float]) -> str:
    """Return the first cause that the evidence names.

    Args:
        stream: The stream that shows growth.
        seen: Metric -> its last value; of :data:`CONTEXT`, as far as it was measured.
    """
    if stream.gates:
        return "large_recurrent_weights"
    if seen.get("rho_total_drift", 0.0) > GROWN:
        return "drift"
    relu = stream.kind == "RNN_RELU"
    if seen.get("rho", 1.0) < 1:
        partly = relu and seen.get("act_deriv", 1.0) < _ON
        return "active_subnetwork" if partly else "nonnormal"
    return "large_radius" if relu else "chaos"
