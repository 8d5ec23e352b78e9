"""The forward of recurrent layers, replayed on plain tensors: gates and states.

A fused module exposes neither its gates, nor the inputs of its upper layers, nor c.
They are found again from what it was given: each layer's output by the fused kernel,
its gates by one matrix product over all steps. The way back through the same layers is
in :mod:`gradwatch.numerics.adjoint`.

Axes: T time, B sequences, I input, H units, P output of a layer (H, or the size of the
projection), G sigmoid gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from gradwatch._torch import without_cudnn

SIGMOID_GATES: Final[Mapping[str, tuple[str, ...]]] = {
    "RNN_TANH": (),
    "RNN_RELU": (),
    "LSTM": ("i", "f", "o"),
    "GRU": ("r", "z"),
}
"""In the order of :attr:`Layer.sigmoid`; the second one is the gate that keeps."""


class Weights(NamedTuple):
    """The weights of one layer and direction, as PyTorch stacks them.

    Attributes:
        ih: Shape ``(gates * H, I)``.
        hh: Shape ``(gates * H, P)``.
        bias_ih: Shape ``(gates * H,)``, or None.
        bias_hh: The same.
        hr: The projection of an LSTM, shape ``(P, H)``, or None.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


class Layer(NamedTuple):
    """One layer and direction along its trajectory, in its own direction of time.

    Attributes:
        h: The states, shape ``(T, B, P)``.
        c: The cell states of an LSTM, shape ``(T, B, H)``, or None.
        tanh: Values of the gate with the tanh, g or n; of a vanilla net h itself,
            whatever its nonlinearity. Shape ``(T, B, H)``.
        sigmoid: Values of the other gates, shape ``(T, B, G, H)``; None without gates.
        keep_log: ln of the gate that keeps (f, or z), shape ``(T, B, H)``, or None.
    """

    h: Tensor
    c: Tensor | None
    tanh: Tensor
    sigmoid: Tensor | None
    keep_log: Tensor | None


def replay_layer(
    kind: str, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights
) -> Layer:
    """Return one layer's states and gates, from its input.

    Args:
        kind: ``RNN_TANH``, ``RNN_RELU``, ``LSTM`` or ``GRU``.
        x: What the layer reads, shape ``(T, B, I)``; dtype and device of ``weights``.
        h0: The first state, shape ``(B, P)``.
        c0: The first cell state of an LSTM, shape ``(B, H)``; None for other kinds.
        weights: The layer's weights.

    Returns:
        The layer's trajectory. Steps behind the end of a shorter sequence hold what
        its padding made of them.
    """
    h = _fused(kind, x, h0, c0, weights)
    if kind not in ("LSTM", "GRU"):
        return Layer(h, None, h, None, None)
    before = torch.cat((h0[None], h[:-1]))
    given = linear(x, weights.ih, weights.bias_ih)
    if kind == "GRU":
        carried = linear(before, weights.hh, weights.bias_hh)
        width = given.shape[-1] // 3
        pre = given[..., : 2 * width] + carried[..., : 2 * width]
        pre = pre.unflatten(-1, (2, width))
        sigmoid = pre.sigmoid()
        reset = sigmoid[:, :, 0] * carried[..., 2 * width :]
        n = (given[..., 2 * width :] + reset).tanh()
        return Layer(h, None, n, sigmoid, logsigmoid(pre[:, :, 1]))
    # In place: of long sequences these are the largest tensors.
    pre = given.flatten(0, 1).addmm_(before.flatten(0, 1), weights.hh.t())
    if weights.bias_hh is not None:
        pre += weights.bias_hh
    i, f, g, o = pre.view_as(given).chunk(4, -1)
    sigmoid = torch.stack((i, f, o), 2).sigmoid_()
    tanh = g.tanh()
    c = torch.empty_like(tanh)
    assert c0 is not None
    state, added = c0, sigmoid[:, :, 0] * tanh
    for keep, new, out in zip(sigmoid[:, :, 1], added, c, strict=True):
        state = torch.addcmul(new, keep, state, out=out)
    return Layer(h, c, tanh, sigmoid, logsigmoid(f))


def _fused(
    kind: str, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights
) -> Tensor:
    flat = [w for w in weights if w is not None]
    options = (weights.bias_ih is not None, 1, 0.0, False, False, False)
    with without_cudnn(x.device):
        if kind == "LSTM":
            assert c0 is not None
            h: Tensor = torch.lstm(x, (h0[None], c0[None]), flat, *options)[0]
            return h
        run = {"GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}
        h = run[kind](x, h0[None], flat, *options)[0]
        return h


def replay(
    kind: str,
    x: Tensor,
    first: Sequence[tuple[Tensor, Tensor | None]],
    weights: Sequence[Sequence[Weights]],
    lengths: Tensor | None = None,
    masks: Sequence[Tensor] = (),
) -> tuple[list[list[Layer]], Tensor]:
    """Replay a stack of layers from the bottom up.

    Args:
        kind: As for :func:`replay_layer`.
        x: What the lowest layer reads, shape ``(T, B, I)``.
        first: The first states (h, c) of each layer and direction, in PyTorch's order:
            layer by layer, forward before reverse.
        weights: Of each layer, of each of its directions.
        lengths: Of each sequence, shape ``(B,)``, on the device of ``x``; None where
            all have T steps.
        masks: What dropout multiplied each layer's output by, but the last one's;
            empty without dropout.

    Returns:
        ``layers[layer][direction]``, and the output of the uppermost layer, shape
        ``(T, B, directions * P)``, its reverse part turned back.
    """
    layers: list[list[Layer]] = []
    for number, directions in enumerate(weights):
        row = []
        for way, own in enumerate(directions):
            h0, c0 = first[number * len(directions) + way]
            row.append(
                replay_layer(kind, turned(x, lengths) if way else x, h0, c0, own)
            )
        outputs = [turned(a.h, lengths) if way else a.h for way, a in enumerate(row)]
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if masks and number < len(weights) - 1:
            x = x * masks[number]
        layers.append(row)
    return layers, x


def turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse each sequence within its own length; padding stays where it is.

    Args:
        x: Shape ``(T, B, ...)``.
        lengths: Shape ``(B,)``, on the same device; None where all have T steps.
    """
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, index[..., None].expand_as(x))
