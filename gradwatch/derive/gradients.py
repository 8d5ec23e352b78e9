"""The gradients depth on the host: norms, clipping, update ratios, who broke first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from gradwatch.derive.reading import Reading
from gradwatch.metrics import run_key
from gradwatch.observe.capture import Step

_NAMED: Final = 3
"""Most tensors that are named."""
_NORM, _CLIPPED, _RATIO = map(run_key, ("grad_norm", "grad_norm_clipped", "clip_ratio"))
_NONFINITE, _LOSS, _OVERHEAD = map(run_key, ("nonfinite", "loss", "overhead"))


def gradients(reading: Reading) -> dict[int, float]:
    """Return the gradient norms before clipping, unscaled, by parameter."""
    host, step = reading.host, reading.step
    if "pre" not in host:  # backward was not seen: what the optimizer saw stands in
        return dict(zip(step.post_live, _floats(host.get("post")), strict=True))
    values = _floats(host["pre"])
    if (scale := reading.scale) != 1.0:
        values = [value / scale for value in values]
    before = dict(zip(step.live, values, strict=True))
    if step.idle:  # they wait for an optimizer of their own
        own = {i: norm for i, norm in before.items() if i not in step.idle}
        return own or before
    return before


def _floats(values: Any) -> list[float]:
    if values is None:
        return []
    return values if isinstance(values, list) else values.tolist()


def gradient_metrics(reading: Reading, before: Mapping[int, float]) -> dict[str, float]:
    """Return the metrics of the gradients depth, from the norms before clipping."""
    metrics = {_OVERHEAD: reading.overhead}
    if reading.loss is not None:
        metrics[_LOSS] = reading.loss
    if before:
        norm = math.hypot(*before.values())
        metrics[_NORM] = norm
        broken = 0
        if not math.isfinite(norm):
            broken = sum(not math.isfinite(value) for value in before.values())
        metrics[_NONFINITE] = float(broken)
        if "post" in reading.host:
            clipped = norm
            if reading.host["post"] is not reading.host.get("pre"):
                post = _floats(reading.host["post"])
                after = dict(zip(reading.step.post_live, post, strict=True))
                clipped = math.hypot(*(after.get(i, n) for i, n in before.items()))
            metrics[_CLIPPED] = clipped
            if math.isfinite(norm) and math.isfinite(clipped):
                metrics[_RATIO] = min(clipped / norm, 1.0) if norm else 1.0
    for key, index in reading.layout.norms:
        found = [before[i] for i in index if i in before]
        if found:
            metrics[key] = math.hypot(*found)
    if "change" in reading.host:
        changes = _floats(reading.host["change"])
        weights = _floats(reading.host["weight"])
        moved = zip(reading.step.changed, changes, weights, strict=True)
        for name, change, weight in moved:
            metrics[reading.layout.ratios[name]] = change / (weight + 1e-12)
    return metrics


def naming(step: Step, before: Mapping[int, float], norm: float) -> dict[str, Any]:
    """Name the tensors that broke first, or those that carry a suspicious norm."""
    if not math.isfinite(norm):
        order = [i for i in step.order if i in before] or list(before)
        broken = [i for i in order if not math.isfinite(before[i])]
        return {"nonfinite": [step.names[i] for i in broken[:_NAMED]]}
    heavy = sorted(before, key=before.__getitem__, reverse=True)[:_NAMED]
    shares = {step.names[i]: (before[i] / norm) ** 2 for i in heavy}
    return {"carriers": {n: round(s, 4) for n, s in shares.items() if s >= 0.05}}
