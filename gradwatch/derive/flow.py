"""The flow depth on the host: its values by key, its profiles, and its progress."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

import numpy as np

from gradwatch.metrics import stream_key
from gradwatch.numerics.streaming import median
from gradwatch.observe.flow import NAMES, Flow

_POINTS: Final = 128
_PROBES: Final = 5
"""How many probes the progress of a signal is taken over, at the start and now."""

Signals = Mapping[str, Mapping[str, Sequence[float]]]
"""Name of a stream -> ``first`` and ``last``, its signals as measured; plain values."""


def flow_metrics(
    run: Flow,
    blocks: Mapping[str, Any],
    scale: float,
    left_out: Set[str],
    known: Signals,
) -> tuple[dict[str, float], dict[str, list[float]], Signals]:
    """Return the metrics and profiles of a flow run, and the signals after it.

    Args:
        run: What was launched.
        blocks: Its numbers.
        scale: By how much a loss scaler has multiplied the gradients.
        left_out: Modules whose replay is not believed.
        known: The signals before it.
    """
    metrics: dict[str, float] = {}
    profiles: dict[str, list[float]] = {}
    signals = dict(known)
    for number, stream in enumerate(run.streams):
        if stream.module in left_out:
            continue
        values = dict(zip(NAMES, blocks[str(number)].tolist(), strict=True))
        raw = values.pop("signal") / scale
        for name, value in values.items():
            if not math.isnan(value):
                metrics[stream_key(stream, name)] = value
        before = known.get(stream.name, {"first": [], "last": []})
        after = _extended(before, raw)
        if after is not before:
            signals[stream.name] = after
            first = median(tuple(after["first"]))
            if first > 0:
                now = median(tuple(after["last"]))
                metrics[stream_key(stream, "signal")] = now / first
        few, batch = run.shares[number]
        factor = math.sqrt(batch / few) / scale
        for profile in ("adjoint", "adjoint_cell", "direct"):
            block = blocks.get(f"{number}.{profile}")
            if block is not None:
                key = stream_key(stream, profile)
                profiles[key] = _cut(np.asarray(block, np.float64) * factor)
    return metrics, profiles, signals


def _extended(
    known: Mapping[str, Sequence[float]], value: float
) -> Mapping[str, Sequence[float]]:
    if not math.isfinite(value):
        return known
    first = known["first"]
    return {
        "first": [*first, value] if len(first) < _PROBES else first,
        "last": [*known["last"], value][-_PROBES:],
    }


def _cut(profile: np.ndarray) -> list[float]:
    """Return at most 128 values: the largest of each bin."""
    if len(profile) <= _POINTS:
        return [float(v) for v in profile]
    edges = np.linspace(0, len(profile), _POINTS, endpoint=False).astype(int)
    return [float(v) for v in np.maximum.reduceat(profile, edges)]
