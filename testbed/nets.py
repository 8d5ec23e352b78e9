"""Ordinary models around the recurrent modules, and their losses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import PackedSequence


class Reader(nn.Module):
    """A recurrent module under any name, and a linear readout.

    Args:
        name: Name of the recurrent module.
        rnn: An nn.RNN, nn.LSTM or nn.GRU, batch second.
        outputs: Of the readout.
        every: Whether every step is read out; else the last step alone.
        vocabulary: Size of an embedding in front of it; 0: none.
    """

    def __init__(
        self,
        name: str,
        rnn: nn.RNNBase,
        outputs: int,
        *,
        every: bool = False,
        vocabulary: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.every = name, every
        if vocabulary:
            self.embed = nn.Embedding(vocabulary, rnn.input_size)
        self.add_module(name, rnn)
        width = rnn.proj_size or rnn.hidden_size
        self.head = nn.Linear(width * (2 if rnn.bidirectional else 1), outputs)

    @property
    def layer(self) -> Any:
        """The recurrent module."""
        return getattr(self, self.name)

    def forward(self, x: Any) -> Tensor:
        """Return the readout: of every step, packed where ``x`` is, or of the last."""
        if hasattr(self, "embed"):
            x = self.embed(x)
        out, last = self.layer(x)
        if isinstance(out, PackedSequence):
            out = out.data
        if self.every:
            return self.head(out)
        h_n = last[0] if isinstance(last, tuple) else last
        directions = 2 if self.layer.bidirectional else 1
        return self.head(torch.cat([*h_n[-directions:]], -1))


class CellLoop(nn.Module):
    """A cell in a Python loop, under any name, and a readout of its last state."""

    def __init__(self, name: str, cell: nn.RNNCellBase, outputs: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, cell)
        self.head = nn.Linear(cell.hidden_size, outputs)

    @property
    def layer(self) -> Any:
        """The cell."""
        return getattr(self, self.name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the readout of the last step."""
        state = None
        for row in x:
            state = self.layer(row, state)
        h = state[0] if isinstance(state, tuple) else state
        scores: Tensor = self.head(h)
        return scores


Loss = Callable[[nn.Module, Any], Tensor]


def classes(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of one class a sequence, or of one a step."""
    x, y = batch
    scores = model(x)
    return cross_entropy(scores.flatten(0, -2), y.flatten())


def values(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error of one value a sequence."""
    x, y = batch
    return mse_loss(model(x)[..., 0], y)
