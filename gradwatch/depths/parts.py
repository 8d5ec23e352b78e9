"""Where an update of W_hh comes from: the gradient, weight decay, or earlier steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from gradwatch.depths.drain import Host, Numbers
from gradwatch.metrics import stream_key
from gradwatch.numerics.parts import parts, share_below_eps
from gradwatch.record import Stream

_NAMES: Final = ("update_gradient", "update_decay", "update_carried")
_DTYPES: Final = (torch.float32, torch.float64)
_OFF: Final = 1e-3
"""Share of an update that its parts may leave unexplained."""
_ROUNDED: Final = 1e-6
"""The same, as a share of the weight: what float32 rounds off."""


class Updated(NamedTuple):
    """A weight that an optimizer has just updated.

    Attributes:
        name: Of the stream.
        weight: W_hh as it is now.
        before: As it was.
        kind: Class of the optimizer.
        group: The options of the weight's group.
        state: What the optimizer keeps of it.
    """

    name: str
    weight: Tensor
    before: Tensor
    kind: str
    group: dict[str, Any]
    state: dict[str, Any]


@dataclass(slots=True)
class Update:
    """A split of updates whose numbers may still be on the device.

    Attributes:
        numbers: Of each stream, by its name: the norms of the parts, of what they leave
            over, of the update and of the weight; ``(name, "eps")`` the share of
            entries below eps.
    """

    numbers: Numbers = field(default_factory=dict)


def launch(updated: Iterable[Updated]) -> Update:
    """Split the updates of some weights."""
    run = Update()
    for name, weight, before, kind, group, state in updated:
        step, grad = state.get("step"), weight.grad
        if isinstance(step, Tensor) and not step.is_cpu:
            continue  # reading it would wait
        if grad is None or grad.is_sparse or weight.dtype not in _DTYPES:
            continue
        now, grad = weight.detach(), grad.detach()
        found = parts(kind, group, state, before, grad)
        if found is not None:
            change = now - before
            rest = change - found.gradient - found.decay - found.carried
            each = [*found, rest, change, before]
            run.numbers[name] = torch.stack(torch._foreach_norm(each))
        below = share_below_eps(kind, group, state)
        if below is not None:
            run.numbers[name, "eps"] = below
    return run


def finish(host: Host, streams: Sequence[Stream]) -> dict[str, float]:
    """Return the parts of the updates over the norms of the weights, by key."""
    metrics: dict[str, float] = {}
    for stream in streams:
        if (stream.name, "eps") in host:
            metrics[stream_key(stream, "below_eps")] = float(host[stream.name, "eps"])
        if stream.name not in host:
            continue
        *sizes, rest, change, weight = host[stream.name].tolist()
        known = rest <= _OFF * change + _ROUNDED * weight and weight > 0
        if known and math.isfinite(sum(sizes)):
            for name, size in zip(_NAMES, sizes, strict=True):
                metrics[stream_key(stream, name)] = size / weight
    return metrics
