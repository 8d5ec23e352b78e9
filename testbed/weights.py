"""Recurrent weights and biases, set as a run needs them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

I, F, O, Z = 0, 1, 3, 1  # noqa: E741 - the gates' letters, by their block


@torch.no_grad()
def recurrent(rnn: nn.Module, new: Callable[[Tensor], Tensor], suffix: str = "") -> Any:
    """Make each gate's recurrent matrix a function of itself; return the module."""
    for name, weight in rnn.named_parameters():
        if name.startswith("weight_hh") and name.endswith(suffix):
            for block in weight.split(weight.shape[1]):
                block.copy_(new(block))
    return rnn


def orthogonal(rnn: nn.Module) -> Any:
    """Make recurrent matrices orthogonal, and biases zero."""
    for name, value in rnn.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(value)
    return recurrent(rnn, lambda w: nn.init.orthogonal_(torch.empty_like(w)))


def of_radius(rho: float) -> Callable[[Tensor], Tensor]:
    """Return what scales a matrix to a spectral radius."""
    return lambda w: w * (rho / torch.linalg.eigvals(w).abs().max())


@torch.no_grad()
def bias(rnn: nn.Module, value: float | Tensor, gate: int = 0) -> Any:
    """Set the bias of a gate, or of a vanilla net; return the module."""
    hidden: Any = rnn.hidden_size
    block = slice(gate * hidden, (gate + 1) * hidden)
    for name, given in rnn.named_parameters():
        if name.startswith("bias"):
            given[block] = value if name.startswith("bias_ih") else 0.0
    return rnn


def remembering(rnn: nn.Module, length: int) -> Any:
    """Spread the memories of a gated net up to the length."""
    hidden: Any = rnn.hidden_size
    spread = torch.empty(hidden).uniform_(length / 2, 2 * length).log()
    if isinstance(rnn, nn.LSTM | nn.LSTMCell):
        bias(rnn, -spread, I)
        return bias(rnn, spread, F)
    return bias(rnn, spread, Z)


@torch.no_grad()
def bias_of(rnn: nn.RNNBase, suffix: str, value: float, gate: int = 0) -> None:
    """Set the bias of a gate, or of a vanilla net, in one layer alone."""
    hidden = rnn.hidden_size
    block = slice(gate * hidden, (gate + 1) * hidden)
    rnn.get_parameter(f"bias_ih_{suffix}")[block] = value
    rnn.get_parameter(f"bias_hh_{suffix}")[block] = 0.0
