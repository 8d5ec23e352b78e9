r"""Backpropagation through time along a replayed layer: adjoints and tangent vectors.

With s = h (and c of an LSTM), e_t what the loss puts in at step t directly, and J_t the
Jacobian of one step, the adjoint is :math:`a_{t-1} = J_t^\top a_t + e_{t-1}`. One
formula a kind of cell, :meth:`Linear.back`, serves the adjoint and the pullback of any
other vector.

Axes: T time, B sequences, I input, H units, P output of a layer, V vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, linear

from gradwatch.numerics.through_time import Layer, Weights

State = tuple[Tensor, Tensor | None]
"""Of h, shape ``(..., B, P)``, and of c of an LSTM, ``(..., B, H)``."""
_NOTHING: Final = 1e-30
"""What is smaller is taken for 0 where single gradients are sent back."""


class Linear(NamedTuple):
    """A layer linearised along its trajectory.

    Attributes:
        weights: Its weights.
        slope: What takes a gradient of h (of c in an LSTM, but for the output gate) to
            those of the pre-activations that W_hh feeds, shape ``(T, B, gates * H)``.
        read: The same for those that W_ih feeds; another one in a GRU alone.
        keep: The gate that keeps, shape ``(T, B, H)``; None in a vanilla net.
        cell: In an LSTM, what takes a gradient of h to one of c, shape ``(T, B, H)``.
    """

    weights: Weights
    slope: Tensor
    read: Tensor
    keep: Tensor | None
    cell: Tensor | None

    def back(self, t: int, state: State) -> tuple[Tensor, Tensor | None, State]:
        """Pull a cotangent at step t back over it.

        Args:
            t: The step.
            state: Gradients of h_t, and of c_t but for the part through h_t.

        Returns:
            The gradient of step t's pre-activations that W_hh feeds; the whole gradient
            of c_t; and those of h and c at the step before.
        """
        h, c = state
        slope, hh = self.slope[t], self.weights.hh
        if self.cell is not None:
            assert c is not None
            assert self.keep is not None
            shown = h if self.weights.hr is None else h @ self.weights.hr
            whole = torch.addcmul(c, shown, self.cell[t])
            delta = torch.cat((whole, whole, whole, shown), -1) * slope
            return delta, whole, (delta @ hh, whole * self.keep[t])
        if self.keep is not None:
            delta = torch.cat((h, h, h), -1) * slope
            return delta, None, (torch.addcmul(delta @ hh, h, self.keep[t]), None)
        delta = h * slope
        return delta, None, (delta @ hh, None)


def linearised(
    kind: str, layer: Layer, first: tuple[Tensor, Tensor | None], weights: Weights
) -> Linear:
    """Return the linearisation of a layer along the trajectory that it has taken.

    Args:
        kind: ``RNN_TANH``, ``RNN_RELU``, ``LSTM`` or ``GRU``.
        layer: What :func:`gradwatch.numerics.through_time.replay_layer` returned.
        first: The first states that it was given.
        weights: Its weights.
    """
    h0, c0 = first
    if kind == "RNN_RELU":
        slope = (layer.h > 0).to(layer.h.dtype)
        return Linear(weights, slope, slope, None, None)
    if kind == "RNN_TANH":
        slope = 1 - layer.h.square()
        return Linear(weights, slope, slope, None, None)
    assert layer.sigmoid is not None
    if kind == "GRU":
        own = layer.sigmoid - layer.sigmoid.square()
        before = torch.cat((h0[None], layer.h[:-1]))
        reset, keep = layer.sigmoid.unbind(2)
        width = layer.h.shape[-1]
        bias = None if weights.bias_hh is None else weights.bias_hh[2 * width :]
        carried = linear(before, weights.hh[2 * width :], bias)
        new = (1 - keep) * (1 - layer.tanh.square())
        gates = (new * carried * own[:, :, 0], (before - layer.tanh) * own[:, :, 1])
        slope = torch.cat((*gates, new * reset), -1)
        return Linear(weights, slope, torch.cat((*gates, new), -1), keep, None)
    assert layer.c is not None
    assert c0 is not None
    before = torch.cat((c0[None], layer.c[:-1]))
    i, f, o = layer.sigmoid.unbind(2)
    shown = layer.c.tanh()
    slope = i.new_empty(*i.shape[:2], 4 * i.shape[2])  # the largest tensor here
    parts = slope.chunk(4, -1)
    torch.mul(layer.tanh, i - i.square(), out=parts[0])
    torch.mul(before, f - f.square(), out=parts[1])
    torch.mul(i, 1 - layer.tanh.square(), out=parts[2])
    torch.mul(shown, o - o.square(), out=parts[3])
    return Linear(weights, slope, slope, f, o * (1 - shown.square()))


class Adjoint(NamedTuple):
    """The gradient through time of one layer and direction, in its own time.

    Attributes:
        h: dL/dh_t, total, shape ``(T, B, P)``.
        c: dL/dc_t of an LSTM, total, shape ``(T, B, H)``, or None.
        direct_h: What of dL/dh_t does not come through a later step.
        direct_c: The same for c.
        x: dL/dx_t, shape ``(T, B, I)``; None where it was not asked for.
    """

    h: Tensor
    c: Tensor | None
    direct_h: Tensor
    direct_c: Tensor | None
    x: Tensor | None


def adjoint(
    layer: Linear,
    direct_h: Tensor,
    direct_c: Tensor | None = None,
    totals: Sequence[tuple[int, Tensor | None, Tensor | None]] = (),
    *,
    to_input: bool = True,
) -> Adjoint:
    """Run backpropagation through time over a linearised layer.

    Args:
        layer: The linearisation.
        direct_h: The gradients that reach each h_t directly, shape ``(T, B, P)``; 0
            where none does, behind the end of a sequence too.
        direct_c: Those that reach each c_t, shape ``(T, B, H)``; None for none.
        totals: For steps at which a call of the module ended and the next one took its
            state: the step, and what autograd saw there for h and c beside
            ``direct_h``, all later steps included. None where it saw nothing.
        to_input: Whether dL/dx is wanted: that of the lowest layer is nobody's direct
            gradient.

    Returns:
        The adjoint.
    """
    steps = len(direct_h)
    known = {t: (h, c) for t, h, c in totals}
    own_h, own_c = direct_h.clone(), direct_c
    carry: State = torch.zeros_like(direct_h[0]), None
    if layer.cell is not None:
        own_c = torch.zeros_like(layer.cell) if own_c is None else own_c.clone()
        carry = carry[0], torch.zeros_like(layer.cell[0])
    hs, cs, deltas = [], [], []
    for t in range(steps - 1, -1, -1):
        seen_h, seen_c = known.get(t, (None, None))
        carry_h, carry_c = carry
        if seen_h is not None:
            own_h[t] += seen_h - carry_h
        h, c = own_h[t] + carry_h, None
        if own_c is not None and carry_c is not None:
            if seen_c is not None:
                own_c[t] += seen_c - carry_c
            c = own_c[t] + carry_c
        delta, whole, carry = layer.back(t, (h, c))
        hs.append(h)
        if to_input:
            deltas.append(delta)
        if whole is not None:
            cs.append(whole)
    total = torch.stack(hs[::-1])
    cells = torch.stack(cs[::-1]) if cs else None
    if not to_input:
        return Adjoint(total, cells, own_h, own_c, None)
    if layer.read is not layer.slope:  # in a GRU, r stands between W_hh and n
        read = torch.cat((total, total, total), -1) * layer.read
    else:
        read = torch.stack(deltas[::-1])
    return Adjoint(total, cells, own_h, own_c, read @ layer.weights.ih)


def pulled_back(layer: Linear, seeds: State, starts: Tensor) -> Tensor:
    """Return how the norms of vectors change on their way back through the layer.

    Args:
        layer: The linearisation.
        seeds: Where they start from, shape ``(V, B, P)``; of an LSTM ``(V, B, H)`` too.
        starts: The step at which each starts, shape ``(V, B)``; below 0: nowhere.

    Returns:
        ln of the norm over that at the start, by lag, shape ``(T + 1, V, B)``: 0 at lag
        0, -Inf where nothing is left, NaN for lags that lie before the sequence.
    """
    steps = len(layer.slope)
    first = seeds[0] if seeds[1] is None else torch.cat((seeds[0], seeds[1]), -1)
    size = torch.linalg.vector_norm(first, dim=-1, keepdim=True)
    first = first / size.clamp_min(torch.finfo(first.dtype).tiny)
    width = seeds[0].shape[-1]
    moving = torch.zeros_like(first)
    norms = []
    begins = starts[..., None]
    tiny = torch.finfo(first.dtype).tiny
    for t in range(steps - 1, -1, -1):
        moving = torch.where(begins == t, first, moving)
        cell = None if seeds[1] is None else moving[..., width:]
        _, _, (h, c) = layer.back(t, (moving[..., :width], cell))
        moving = h if c is None else torch.cat((h, c), -1)
        norm = torch.linalg.vector_norm(moving, dim=-1, keepdim=True)
        moving = moving / norm.clamp_min(tiny)
        norms.append(norm)
    sizes = torch.stack(norms)[..., 0]  # from the last step to the first
    times = torch.arange(steps - 1, -1, -1, device=starts.device)[:, None, None]
    logs = sizes.log().where(times <= starts, 0).cumsum(0)
    by_time = torch.cat((torch.zeros_like(logs[:1]), logs)).flip(0)
    lags = torch.arange(steps + 1, device=starts.device)[:, None, None]
    time = starts + 1 - lags
    found = by_time.gather(0, time.clamp(0, steps))
    return found.where(time >= 0, float("nan"))


def adjoint_from(layer: Linear, seeds: Tensor, starts: Tensor) -> Tensor:
    """Return the adjoints that a gradient at one step alone brings about: their norms.

    Args:
        layer: The linearisation.
        seeds: The gradient of h at that step, shape ``(V, B, P)``.
        starts: The step of each, shape ``(V, B)``; below 0: nowhere.

    Returns:
        The norm of the gradient of s_t, s = h (and c), by step, shape ``(T, V, B)``; 0
        behind the step of the seed. What is below 1e-30 becomes 0: the numbers that
        floats have next to 0 are many times slower.
    """
    h = torch.zeros_like(seeds)
    c = None
    if layer.cell is not None:
        c = h.new_zeros(*starts.shape, layer.cell.shape[-1])
    squares = []
    begins = starts[..., None]
    for t in range(len(layer.slope) - 1, -1, -1):
        h = torch.where(begins == t, seeds, h)
        _, whole, before = layer.back(t, (h, c))
        square = h.square().sum(-1)
        squares.append(square if whole is None else square + whole.square().sum(-1))
        h = hardshrink(before[0], _NOTHING)
        c = None if before[1] is None else hardshrink(before[1], _NOTHING)
    return torch.stack(squares[::-1]).sqrt()
