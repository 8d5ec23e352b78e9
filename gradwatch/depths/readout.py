"""The read-out: which loss reads what, and what a constant would have in its place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from gradwatch.depths.drain import Host, Numbers
from gradwatch.facts import RunFacts
from gradwatch.hooks.readout import Taken
from gradwatch.metrics import run_key
from gradwatch.numerics.readout import (
    Targets,
    best_constant,
    binary_targets,
    cross_entropy_targets,
    negative_targets,
    squared_targets,
)

_FITS: Final = 1e-2
"""Share of the gradient that the targets may leave unexplained."""
_WHOLE: Final = 0.1
"""Share of the loss by which that of the positions looked at may differ from it."""
_FEATURES: Final = 1024
"""Features, such as classes, whose targets are remembered from look to look."""
_SUMMED: Final = ("cross_entropy", "bce_with_logits", "mse")
_NAMES: Final = ("weight", "share", "misfit", "rms", "negative", "explained")


@dataclass(slots=True)
class Readout:
    """A look at the read-out whose numbers may still be on the device.

    Attributes:
        facts: What the loss is made of.
        kind: By which its targets were found; empty where they were not.
        positions: How many were looked at.
        numbers: ``values``, those of :data:`_NAMES`, and ``sums``.
    """

    facts: RunFacts
    kind: str = ""
    positions: int = 0
    numbers: Numbers = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Memory:
    """What is remembered of targets between looks; plain values.

    Attributes:
        kind: Of the loss.
        positions: How many were seen.
        sums: By feature, over all of them; see :class:`Targets`.
    """

    kind: str = ""
    positions: int = 0
    sums: list[list[float]] = field(default_factory=list)


def launch(taken: Taken) -> Readout:
    """Measure what was seen of a read-out."""
    made = taken.graph
    run = Readout(
        RunFacts(
            readout=taken.path or None,
            loss_kind="+".join((made.kind, *made.others)),
            loss_terms=made.terms,
            loss_reads=", ".join(map(_plain, made.reads)),
            loss_axes=", ".join(map(str, made.softmax)),
            loss_classes=made.classes,
            loss_broadcast=" to ".join(map(_shape, made.broadcast or ())),
            loss_views=tuple(f"{_shape(a)} to {_shape(b)}" for a, b in made.views),
        )
    )
    if not taken.looks:
        return run
    outputs = torch.cat([look.output.flatten(0, -2) for look in taken.looks])
    grads = torch.cat([look.grad.flatten(0, -2) for look in taken.looks])
    rms = outputs.square().mean().sqrt()
    found = _targets(taken, outputs, grads)
    negative = nothing = torch.full_like(rms, math.nan)
    if found is None:
        share = (grads != 0).any(-1).float().mean()
        if made.kind == "mse" and made.reads == ("Relu",) and made.mean_of:
            negative = negative_targets(outputs, grads, made.mean_of)
        values = [nothing, share, nothing, rms, negative, nothing]
        run.numbers["values"] = torch.stack(values)
        return run
    kind, targets = found
    seen = taken.looks[0].share
    run.kind, run.positions = kind, len(outputs)
    explained = nothing
    if taken.loss.numel() == 1:
        explained = targets.loss.sum() / seen / taken.loss.reshape(()).to(rms.device)
    values = [targets.weight / seen, targets.share, targets.misfit, rms, nothing]
    values.append(explained)
    run.numbers["values"] = torch.stack([value.float() for value in values])
    run.numbers["sums"] = targets.sums
    return run


def _targets(
    taken: Taken, outputs: Tensor, grads: Tensor
) -> tuple[str, Targets] | None:
    """Return the targets, where the loss is of a kind that tells them."""
    made = taken.graph
    if made.others or made.broadcast or not taken.linear:
        return None
    if made.kind == "cross_entropy" and not made.reads:
        return made.kind, cross_entropy_targets(outputs, grads)
    logits = made.kind == "bce_with_logits" and not made.reads
    if logits or (made.kind == "bce" and made.reads == ("Sigmoid",)):
        return "bce_with_logits", binary_targets(outputs, grads)
    if made.kind == "mse" and not made.reads and made.alone:
        whole = all(look.share == 1 for look in taken.looks)
        return (
            (made.kind, squared_targets(outputs, grads, taken.loss)) if whole else None
        )
    return None


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _plain(name: str) -> str:
    """Return the name of a function of the graph as one writes it: ``log_softmax``."""
    parts = [("_" if c.isupper() and i else "") + c.lower() for i, c in enumerate(name)]
    return "".join(parts)


# ---- on the host


def facts(run: Readout, host: Host) -> RunFacts:
    """Return what a look says that is no number."""
    if "values" not in host:
        return run.facts
    read = dict(zip(_NAMES, host["values"].tolist(), strict=True))
    if not math.isfinite(read["negative"]):
        return run.facts
    return dataclasses.replace(run.facts, loss_negative=round(read["negative"], 1))


def finish(run: Readout, host: Host, scale: float, memory: Memory) -> dict[str, float]:
    """Return what a look came to, by key.

    Args:
        run: What was launched.
        host: Its numbers.
        scale: By how much a loss scaler has multiplied the loss.
        memory: Updated in place.
    """
    if "values" not in host:
        return {}
    read = dict(zip(_NAMES, host["values"].tolist(), strict=True))
    metrics = {"target_share": read["share"], "readout_rms": read["rms"]}
    if run.kind and read["misfit"] <= _FITS and read["weight"] > 0:
        metrics["loss_weight"] = read["weight"] / scale
        each = _remembered(run, np.asarray(host["sums"], np.float64), memory)
        if abs(read["explained"] - 1) <= _WHOLE:
            metrics["loss_constant"] = each * metrics["loss_weight"]
    return {run_key(k): v for k, v in metrics.items() if math.isfinite(v)}


def _remembered(run: Readout, sums: Any, memory: Memory) -> float:
    """Return the best constant's loss of one position, by all targets seen so far."""
    rows = np.atleast_2d(sums)
    known = np.asarray(memory.sums, np.float64)
    if rows.shape[-1] <= _FEATURES:
        if memory.kind == run.kind and known.shape == rows.shape:
            total = memory.positions + run.positions
            rows = (known * memory.positions + rows * run.positions) / total
        else:
            total = run.positions
        memory.kind, memory.positions, memory.sums = run.kind, total, rows.tolist()
    found = torch.from_numpy(rows[0] if sums.ndim == 1 else rows)
    return float(best_constant(run.kind, found))
