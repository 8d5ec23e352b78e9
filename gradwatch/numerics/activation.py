"""What a recurrent layer's activations say: derivatives, saturation, memory, norms.

Axes: T time, B sequences, H units, G sigmoid gates. Padded steps enter no mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from gradwatch.numerics.through_time import SIGMOID_GATES, Layer

FLAT: Final = 0.05
"""A tanh is saturated where its derivative is below this, |h| above .975."""
SHUT: Final = 0.05
OPEN: Final = 0.95
LONGEST: Final = 1e6
"""Longest memory, in steps, that a timescale tells apart from for ever."""

Statistics = list[tuple[tuple[str, ...], Tensor]]
"""Names, such as ``act_deriv/f``, and as many values, still on their device."""


def statistics(kind: str, layer: Layer, lengths: Tensor | None = None) -> Statistics:
    r"""Return every metric of one layer's states and gates.

    ``act_deriv`` and ``act_deriv_rms``: mean and root mean square of :math:`\sigma'`
    at the activation: :math:`1 - h^2` for tanh, :math:`1[h > 0]` for ReLU,
    :math:`g(1 - g)` for a sigmoid gate. ``saturated``, ``shut``, ``open``: shares below
    .05, below .05 and above .95. ``forget``: geometric mean of the gate that keeps.
    ``timescale``: median over units of :math:`-1/\overline{\ln f}`, at most 1e6.
    ``h_norm``, ``c_norm``: mean of :math:`\|h_t\|/\sqrt H`. ``h_growth``: slope of
    :math:`\ln\|h_t\|` on t, the mean over sequences; NaN where no sequence has two
    states that are not 0. ``dead``: share of ReLU units that are 0 throughout.

    Args:
        kind: ``RNN_TANH``, ``RNN_RELU``, ``LSTM`` or ``GRU``.
        layer: What :func:`gradwatch.numerics.through_time.replay_layer` returned.
        lengths: Of each sequence, shape ``(B,)``, on the device of ``layer``; None
            where all have T steps.

    Returns:
        Names and values; a gate's name stands behind a slash.
    """
    mask = None
    if lengths is not None:
        steps = torch.arange(layer.h.shape[0], device=layer.h.device)
        mask = steps[:, None] < lengths
    found = _tanh(kind, layer, mask)
    if layer.sigmoid is not None:
        found += _sigmoids(kind, layer.sigmoid, mask)
    if layer.keep_log is not None:
        found += _memory(layer.keep_log, mask)
    if kind == "RNN_RELU":
        alive = layer.h if mask is None else layer.h.where(mask[..., None], 0)
        dead = (alive.amax(dim=(0, 1)) <= 0).to(layer.h.dtype).mean()
        found.append((("dead",), dead))
    return found + _norms(layer, mask)


def mean_field_gain(recurrent: Tensor, act_deriv_rms: Tensor) -> Tensor:
    r"""Return chi: how much a gradient's norm grows a step in a random net like this.

    :math:`\chi = \|W_{hh}\|_F / \sqrt H \cdot \mathrm{rms}\,\sigma'`. Exact for dense
    independent weights that do not depend on the states; an estimate elsewhere.

    Args:
        recurrent: W_hh of a vanilla net, shape ``(H, H)``.
        act_deriv_rms: Root mean square of :math:`\sigma'`, one element.

    Returns:
        The factor per step, of the shape of ``act_deriv_rms``.

    References:
        Poole et al. (2016), arXiv:1606.05340; Chen, Pennington & Schoenholz (2018),
        arXiv:1806.05394.
    """
    size = math.sqrt(recurrent.shape[-1])
    norm: Tensor = torch.linalg.vector_norm(recurrent)
    return norm.to(act_deriv_rms) / size * act_deriv_rms


def _tanh(kind: str, layer: Layer, mask: Tensor | None) -> Statistics:
    values = layer.tanh
    relu = kind == "RNN_RELU"
    slope = (values > 0).to(values.dtype) if relu else 1 - values.square()
    gate = {"LSTM": "/g", "GRU": "/n"}.get(kind, "")
    found: Statistics = [
        ((f"act_deriv{gate}",), _mean(slope, mask)),
        ((f"act_deriv_rms{gate}",), _mean(slope.square(), mask).sqrt()),
    ]
    if not relu:
        found.append(((f"saturated{gate}",), _share(slope < FLAT, slope, mask)))
    return found


def statistics_of_states(h: Tensor) -> Statistics:
    """Return what can be told of states whose cell is not known.

    ``h_norm`` and ``h_growth`` as of :func:`statistics`; ``saturated``: share of the
    values above .9747 in size, as those of a tanh whose slope is below .05; NaN where
    any exceeds 1, which no tanh has made.

    Args:
        h: Shape ``(T, B, S)``.
    """
    norms, size = torch.linalg.vector_norm(h, dim=2), h.abs()
    flat = (1 - size.square() < FLAT).to(h.dtype).mean()
    return [
        (("h_norm",), _mean(norms, None) / math.sqrt(h.shape[2])),
        (("h_growth",), _growth(norms, None)),
        (("saturated",), flat.where(size.amax() <= 1, math.nan)),
    ]


def statistics_of_gates(gates: Mapping[str, tuple[str, Tensor]]) -> Statistics:
    """Return what the gates of a cell say that is not one of PyTorch's.

    ``act_deriv``, ``act_deriv_rms``, ``saturated``, ``shut`` and ``open`` of each gate
    as of :func:`statistics`; ``act_deriv`` and ``act_deriv_rms`` of the cell where one
    gate alone is no sigmoid, ``shut`` and ``open`` the largest of its sigmoid gates.

    Args:
        gates: By name: ``sigmoid``, ``tanh`` or ``relu``, and the activations, shape
            ``(T, B, H)``.
    """
    found: Statistics = []
    shares: dict[str, list[Tensor]] = {"shut": [], "open": []}
    others: list[tuple[Tensor, Tensor]] = []
    for name, (kind, values) in gates.items():
        if kind == "sigmoid":
            slope = values - values.square()
            own = {"shut": values < SHUT, "open": values > OPEN}
            for key, which in own.items():
                shares[key].append(which.to(values.dtype).mean())
                found.append(((f"{key}/{name}",), shares[key][-1]))
        elif kind == "tanh":
            slope = 1 - values.square()
            flat = (slope < FLAT).to(values.dtype).mean()
            found.append(((f"saturated/{name}",), flat))
        else:
            slope = (values > 0).to(values.dtype)
        mean, rms = slope.mean(), slope.square().mean().sqrt()
        found += [((f"act_deriv/{name}",), mean), ((f"act_deriv_rms/{name}",), rms)]
        if kind != "sigmoid":
            others.append((mean, rms))
    if len(others) == 1:
        [(mean, rms)] = others
        found += [(("act_deriv",), mean), (("act_deriv_rms",), rms)]
    largest = {k: torch.stack(v).amax() for k, v in shares.items() if v}
    return found + [((name,), value) for name, value in largest.items()]


def _sigmoids(kind: str, values: Tensor, mask: Tensor | None) -> Statistics:
    slope = values - values.square()
    each = {
        "act_deriv": _mean(slope, mask, 2),
        "act_deriv_rms": _mean(slope.square(), mask, 2).sqrt(),
        "shut": _share(values < SHUT, values, mask, 2),
        "open": _share(values > OPEN, values, mask, 2),
    }
    gates = SIGMOID_GATES[kind]
    return [(tuple(f"{m}/{gate}" for gate in gates), v) for m, v in each.items()]


def _memory(keep_log: Tensor, mask: Tensor | None) -> Statistics:
    by_unit = _mean(keep_log, mask, 2)
    steps = 1 / (-by_unit).clamp_min(1 / LONGEST)
    # An even number of units has two in the middle; torch's median takes the lower.
    middle = torch.stack((steps.median(), -(-steps).median())).mean()
    return [(("forget",), by_unit.mean().exp()), (("timescale",), middle)]


def _norms(layer: Layer, mask: Tensor | None) -> Statistics:
    norms = torch.linalg.vector_norm(layer.h, dim=2)
    found: Statistics = [
        (("h_norm",), _mean(norms, mask) / math.sqrt(layer.h.shape[2])),
        (("h_growth",), _growth(norms, mask)),
    ]
    if layer.c is not None:
        cells = torch.linalg.vector_norm(layer.c, dim=2)
        found.append((("c_norm",), _mean(cells, mask) / math.sqrt(layer.c.shape[2])))
    return found


def _growth(norms: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over sequences of the least-squares slope of ln norm on t."""
    known = norms > 0 if mask is None else (norms > 0) & mask
    weight = known.to(norms.dtype)
    count = weight.sum(0).clamp_min(1)
    logs = norms.where(known, 1).log()
    steps = torch.arange(len(norms), device=norms.device, dtype=norms.dtype)[:, None]
    from_mean = weight * (steps - (weight * steps).sum(0) / count)
    spread = from_mean.square().sum(0)
    usable = spread > 0
    slopes = ((from_mean * logs).sum(0) / spread).where(usable, 0)
    return slopes.sum() / usable.sum()


def _share(
    which: Tensor, like: Tensor, mask: Tensor | None, kept: int | None = None
) -> Tensor:
    return _mean(which.to(like.dtype), mask, kept)


def _mean(values: Tensor, mask: Tensor | None, kept: int | None = None) -> Tensor:
    """Return the mean over all axes, padding left out; over all but one if ``kept``."""
    axes = [axis for axis in range(values.dim()) if axis != kept]
    if mask is None:
        return values.mean(axes)
    wide = mask.reshape(*mask.shape, *[1] * (values.dim() - 2))
    others = math.prod(values.shape[a] for a in axes if a > 1)
    return values.where(wide, 0).sum(axes) / (mask.sum() * others)
