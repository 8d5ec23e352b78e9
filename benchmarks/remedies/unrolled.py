"""The truth about one batch: float64 autograd through a loop over the steps.

Nothing here is gradwatch's, so that a remedy is not judged by the one who sold it.

Axes: T time, B batch, S state (H, or h beside c for an LSTM), V random vectors.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.remedies.nets import Loss, Net

VECTORS = 4
SHUT = 0.05
ZERO = -math.inf


@dataclass(frozen=True)
class Unrolled:
    """One layer, step by step.

    Attributes:
        states: s_0 to s_T, each ``(B, S)``, part of the graph.
        outputs: h of every step, ``(T, B, H)``.
        gates: Gates by letter, each ``(T, B, H)``; empty for a vanilla net.
    """

    states: list[Tensor]
    outputs: Tensor
    gates: dict[str, Tensor]


def unroll(rnn: nn.RNNBase, x: Tensor, chunk: int | None = None) -> Unrolled:
    """Run one layer in float64; every ``chunk`` steps the state is detached."""
    w_hh, b_hh = rnn.weight_hh_l0.detach().double(), rnn.bias_hh_l0.detach().double()
    given = nn.functional.linear(
        x.double(), rnn.weight_ih_l0.detach().double(), rnn.bias_ih_l0.detach().double()
    )
    width = rnn.hidden_size * (2 if rnn.mode == "LSTM" else 1)
    states = [x.new_zeros(x.shape[1], width, dtype=torch.float64).requires_grad_()]
    gates: list[dict[str, Tensor]] = []
    for t, now in enumerate(given):
        before = states[-1]
        if chunk and t and t % chunk == 0:
            before = states[-1] = before.detach().requires_grad_()
        h = before[:, : rnn.hidden_size]
        carried = nn.functional.linear(h, w_hh, b_hh)
        state, opened = step(rnn.mode, now, carried, before)
        states.append(state)
        gates.append(opened)
    outputs = torch.stack(states[1:])[..., : rnn.hidden_size]
    by_letter = {g: torch.stack([one[g] for one in gates]) for g in gates[0]}
    return Unrolled(states, outputs, by_letter)


def step(
    mode: str, given: Tensor, carried: Tensor, before: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the next state and the gates; PyTorch's equations and order of gates."""
    if mode == "RNN_TANH":
        return (given + carried).tanh(), {}
    if mode == "RNN_RELU":
        return (given + carried).relu(), {}
    if mode == "GRU":
        (r, z, n), (hr, hz, hn) = given.chunk(3, 1), carried.chunk(3, 1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        n = (n + r * hn).tanh()
        return n + z * (before - n), {"r": r, "z": z}
    i, f, g, o = (given + carried).chunk(4, 1)
    i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
    c = f * before.chunk(2, 1)[1] + i * g.tanh()
    return torch.cat((o * c.tanh(), c), 1), {"i": i, "f": f, "o": o}


def reach(
    net: Net, x: Tensor, y: Tensor, loss: Loss, chunk: int | None = None
) -> float:
    """Return log10 of dL/ds_0 over the largest dL/ds_t, total; -Inf: exactly zero."""
    layer = unroll(net.rnn, x, chunk)
    weight, bias = net.head.weight.detach().double(), net.head.bias.detach().double()
    value = loss(nn.functional.linear(layer.outputs[-1], weight, bias), _wide(y))
    grads = torch.autograd.grad(
        value, layer.states, allow_unused=True, materialize_grads=True
    )
    norms = torch.stack(grads).flatten(1).norm(dim=1)
    first, largest = norms[0].item(), norms.max().item()
    return math.log10(first / largest) if first > 0 else ZERO


def growth(layer: Unrolled) -> float:
    """Return log10 of the largest growth of random adjoints put in at the end.

    The root mean square over four vectors, the largest over lags and sequences.
    """
    last = layer.states[-1]
    source = torch.Generator().manual_seed(0)
    squares = torch.zeros(len(layer.states), last.shape[0], dtype=last.dtype)
    for _ in range(VECTORS):
        vector = torch.randn(last.shape, generator=source, dtype=last.dtype)
        vector /= vector.norm(dim=1, keepdim=True)
        grads = torch.autograd.grad(
            last,
            layer.states,
            vector,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        squares += torch.stack(grads).square().sum(-1) / VECTORS
    return squares.max().log10().item() / 2


def dead_share(rnn: nn.RNNBase, layer: Unrolled) -> float:
    """Return the share of ReLU units that are off at every step of every sequence."""
    if rnn.mode != "RNN_RELU":
        return 0.0
    return (layer.outputs <= 0).all(0).all(0).double().mean().item()


def shut_share(layer: Unrolled) -> float:
    """Return the share of values of a gate that let nothing in, or nothing out."""
    shut = [layer.gates[g] < SHUT for g in "io" if g in layer.gates]
    if "z" in layer.gates:  # in PyTorch's GRU z keeps
        shut.append(layer.gates["z"] > 1 - SHUT)
    return max((one.double().mean().item() for one in shut), default=0.0)


def _wide(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values
