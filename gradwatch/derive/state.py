"""The state depth on the host: the self-check of each replay, and its numbers' keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from gradwatch.metrics import run_key, stream_key
from gradwatch.observe.state import State
from gradwatch.record import Stream

_TANH_GATE: Final = ("act_deriv", "act_deriv_rms", "saturated")
_LARGEST: Final = ("shut", "open")
_MORE: Final = 2.0
"""Times by which one has to be larger than the other to be what drives a unit."""


class Replayed(NamedTuple):
    """What a state run came to.

    Attributes:
        metrics: By key.
        approximate: Modules whose masks of dropout had to be drawn anew.
        left_out: Module -> why its numbers were dropped.
        facts: Module or stream -> what is to be known of it beside numbers.
        sums: Module -> two sums by which its input is known again.
    """

    metrics: dict[str, float]
    approximate: list[str]
    left_out: dict[str, str]
    facts: dict[str, dict[str, Any]]
    sums: dict[str, tuple[float, float]]


def state_metrics(run: State, blocks: Mapping[str, Any], scale: float) -> Replayed:
    """Return the metrics of a state run.

    A replay whose output is not the real one is not believed: its numbers are dropped.

    Args:
        run: What was launched.
        blocks: Its numbers.
        scale: By how much a loss scaler has multiplied the gradients.
    """
    found = Replayed({}, [], dict(run.left_out), {}, {})
    mismatches = {}
    for number, (path, tolerance) in enumerate(run.modules):
        block = blocks.get(f"mismatch.{number}")
        if block is None:
            found.approximate.append(path)
            continue
        mismatch = mismatches[path] = float(block)
        if not math.isfinite(mismatch):
            found.left_out[path] = "its states hold NaN or Inf"
        elif mismatch > tolerance:
            found.left_out[path] = (
                f"the replay differs from its output by {mismatch:.2g} of its norm, "
                f"more than {tolerance:g}"
            )
    for number, (stream, names) in enumerate(run.streams):
        if stream.module in mismatches:
            key = stream_key(stream, "replay_mismatch")
            found.metrics[key] = mismatches[stream.module]
        if stream.module not in found.left_out:
            values = dict(zip(names, blocks[str(number)].tolist(), strict=True))
            found.metrics.update(_of_stream(stream, values))
            if f"drive.{number}" in blocks:
                drive = float(blocks[f"drive.{number}"])
                found.facts[stream.name] = {"drive": _driven_by(drive)}
    for number, path in enumerate(run.inputs):
        padding, *sums, whole = blocks[f"input.{number}"].tolist()
        found.sums[path] = tuple(sums)
        finite = bool(whole)
        found.facts[path] = {"padding": round(padding, 1)} if finite else {}
        if not finite:
            found.facts[path]["input_finite"] = False
    if "gates" in blocks:
        found.metrics.update(_gate_gradients(run.gates, blocks["gates"], scale))
    return found


def _driven_by(drive: float) -> str:
    """Return what drives the units of a stream: its input, its state, or both."""
    if drive >= _MORE:
        return "input"
    return "state" if drive <= 1 / _MORE else "both"


def _of_stream(stream: Stream, values: Mapping[str, float]) -> dict[str, float]:
    metrics = {run_key(f"{stream.key}/{name}"): v for name, v in values.items()}
    if math.isnan(values["h_growth"]):  # no two states to draw a line through
        del metrics[stream_key(stream, "h_growth")]
    if not stream.gates:
        return metrics
    for name in _TANH_GATE:
        gate = "g" if "g" in stream.gates else "n"
        metrics[stream_key(stream, name)] = values[f"{name}/{gate}"]
    for name in _LARGEST:
        own = [v for key, v in values.items() if key.startswith(f"{name}/")]
        metrics[stream_key(stream, name)] = max(own)
    return metrics


def _gate_gradients(
    streams: Sequence[Stream], norms: Any, scale: float
) -> dict[str, float]:
    each = iter(norms if isinstance(norms, list) else norms.tolist())
    return {
        stream_key(stream, "grad_norm_hh", gate): next(each) / scale
        for stream in streams
        for gate in stream.gates
    }


def log10_times(length: int, factor: float) -> float:
    """Return T log10 of a factor per step, in decades; -Inf for 0."""
    return length * math.log10(factor) if factor > 0 else -math.inf
