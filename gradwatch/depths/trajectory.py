"""From the captures of one step to trajectories: what is replayed, and its self-check.

Calls that pass their state on, a decoder's or a cell's, are one trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gradwatch.hooks.capture import Capture
from gradwatch.hooks.sequences import Sequences
from gradwatch.numerics.through_time import Layer, Weights, replay
from gradwatch.recurrent import Recurrence

_TOLERANCE: Final = 1e-4
_ROUNDED_TOLERANCE: Final = 3e-2
"""Largest mismatch of a replay, relative; the second after half precision."""


@dataclass(slots=True, eq=False, kw_only=True)
class Trajectory:
    """The replay of one module's forward, for a few sequences of one step.

    Attributes:
        calls: What the calls were given and returned, in their order.
        x: Their inputs joined, shape ``(T, K, I)``, in the weights' type.
        kind: ``RNN_TANH``, ``RNN_RELU``, ``LSTM`` or ``GRU``.
        states: The first states of each layer and direction, in PyTorch's order.
        masks: What dropout multiplied each layer's output by; empty without dropout.
        layers: ``layers[layer][direction]``.
        weights: Of each, as they were used.
        lengths: Of each sequence, shape ``(K,)``, on the device; None where all have T
            steps.
        mismatch: Norm of the difference from the real output over its norm; one
            element, on the device. None where a mask of dropout had to be drawn again:
            the numbers are then approximate.
        tolerance: The largest mismatch of a replay that can be believed.
        largest: As in :class:`gradwatch.hooks.sequences.Sequences`, over all the calls.
    """

    calls: list[Sequences]
    x: Tensor
    kind: str
    states: list[tuple[Tensor, Tensor | None]]
    masks: list[Tensor]
    layers: list[list[Layer]]
    weights: list[list[Weights]]
    lengths: Tensor | None
    mismatch: Tensor | None
    tolerance: float
    largest: Tensor | None


def trajectory(
    members: Sequence[Recurrence], chain: Sequence[Capture]
) -> Trajectory | str:
    """Replay what a chain of calls of one module did.

    Args:
        members: The module's recurrences, layer by layer, forward before reverse.
        chain: The calls, in their order, with the sequences of each.

    Returns:
        The replay; or, in words, why there is none.
    """
    known = [c.sequences for c in chain if isinstance(c.sequences, Sequences)]
    if len(known) < len(chain):
        return next(
            (c.sequences for c in chain if isinstance(c.sequences, str)),
            "not looked at",
        )
    found, first = chain[0].weights, known[0]
    for member in members:
        if not {f"weight_{part}{member.suffix}" for part in ("ih", "hh")} <= set(found):
            return "its weights cannot be read without running something"
    stored = found[f"weight_hh{members[0].suffix}"].dtype
    exact = stored in (torch.float32, torch.float64)
    dtype = stored if exact else torch.float32
    used = [_weights(found, member.suffix, dtype) for member in members]
    each = 2 if any(m.stream.direction == "reverse" for m in members) else 1
    stacked = [used[i : i + each] for i in range(0, len(used), each)]
    x = torch.cat([call.x for call in known]).to(dtype)
    lengths = None
    if first.lengths is not None and len(set(first.lengths)) > 1:
        lengths = torch.tensor(first.lengths).to(x.device, non_blocking=True)
    masks, redrawn = _masks(known, len(stacked), x)
    kind, states = members[0].stream.kind, _first_states(first, members, x)
    with torch.autocast(x.device.type, enabled=False):
        layers, output = replay(kind, x, states, stacked, lengths, masks)
    y = torch.cat([call.y for call in known]).to(dtype)
    rounded = not exact or any(call.rounded for call in known)
    largest = [call.largest for call in known if call.largest is not None]
    return Trajectory(
        calls=known,
        x=x,
        kind=kind,
        states=states,
        masks=masks,
        layers=layers,
        weights=stacked,
        lengths=lengths,
        mismatch=None if redrawn else _mismatch(output, y, lengths),
        tolerance=_ROUNDED_TOLERANCE if rounded else _TOLERANCE,
        largest=torch.stack(largest).amax(0) if len(largest) == len(known) else None,
    )


def _weights(found: Mapping[str, Tensor], suffix: str, dtype: torch.dtype) -> Weights:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    parts = [found.get(name + suffix) for name in names]
    return Weights(*(None if w is None else w.to(dtype) for w in parts))  # type: ignore[arg-type]  # the first two are there


def _first_states(
    first: Sequences, members: Sequence[Recurrence], x: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    states = []
    for number, member in enumerate(members):
        stream, count = member.stream, x.shape[1]
        h = x.new_zeros(count, stream.proj_size or stream.hidden_size)
        c = x.new_zeros(count, stream.hidden_size) if stream.kind == "LSTM" else None
        if first.h0 is not None:
            h = first.h0[number].to(x.dtype)
        if first.c0 is not None:
            c = first.c0[number].to(x.dtype)
        states.append((h, c))
    return states


def _masks(
    calls: Sequence[Sequences], layers: int, x: Tensor
) -> tuple[list[Tensor], bool]:
    """Return the masks between layers, and whether they had to be drawn again."""
    p = calls[0].dropout
    if not p or layers < 2:
        return [], False
    drawn = [list(call.masks()) for call in calls if call.masks is not None]
    if len(drawn) == len(calls):
        return [torch.cat(m).to(x.dtype) for m in zip(*drawn, strict=True)], False
    shape = (*x.shape[:2], calls[0].y.shape[-1])
    generator = torch.Generator(x.device).manual_seed(0)  # never the user's
    fresh = [torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(layers)]
    masks = [m.bernoulli_(1 - p, generator=generator) / (1 - p) for m in fresh[1:]]
    return masks, True


def _mismatch(output: Tensor, real: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is not None:
        steps = torch.arange(len(output), device=output.device)[:, None, None]
        valid = steps < lengths[:, None]
        output, real = output.where(valid, 0), real.where(valid, 0)
    size: Tensor = torch.linalg.vector_norm(real)
    gap: Tensor = torch.linalg.vector_norm(output - real)
    return gap / size.clamp_min(1e-30)
