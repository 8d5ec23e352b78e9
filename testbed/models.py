"""Small models that the tests train."""

import torch
from torch import nn

CELLS = {nn.RNNCell: "RNN_TANH", nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}


class Tagger(nn.Module):
    """A fused recurrent module and a head that reads its last output."""

    def __init__(self, recurrent, width, classes=3):
        super().__init__()
        self.rnn = recurrent
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        """Return the read-out of the last step."""
        out = self.rnn(x)[0]
        if isinstance(out, nn.utils.rnn.PackedSequence):
            out = nn.utils.rnn.pad_packed_sequence(out)[0]
        return self.head(out[-1])


class Loop(nn.Module):
    """A cell in a Python loop."""

    def __init__(self, cell, hidden, classes=3):
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        """Return the read-out of the last step."""
        state = None
        for row in x:
            state = self.cell(row, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def lstm(hidden=8, features=4, **options):
    """Return a small LSTM with a head, always the same one."""
    torch.manual_seed(0)
    width = (options.get("proj_size") or hidden) * (1 + options.get("bidirectional", 0))
    return Tagger(nn.LSTM(features, hidden, **options), width)


def batches(steps, length=6, batch=5, features=4, seed=1):
    """Return random inputs, shape ``(steps, length, batch, features)``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, length, batch, features)
    return torch.randn(shape, generator=generator)
