"""Cells written by hand, as people write them, and a net that steps one in a loop.

Each is called as ``state = cell(x, state)``, its state a tuple; :func:`start` makes the
first one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

State = tuple[Tensor, ...]


class RNN(nn.Module):
    """tanh(W x + U h), Elman's."""

    parts = 1

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(inputs, units), nn.Linear(units, units)

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step."""
        return (torch.tanh(self.w(x) + self.u(state[0])),)


class LSTM(nn.Module):
    """Two linear maps and four gates, as in differentially private training."""

    parts = 2

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(inputs, 4 * units), nn.Linear(units, 4 * units)

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step."""
        h, c = state
        i, f, g, o = (self.w(x) + self.u(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class GRU(nn.Module):
    """PyTorch's GRU: z keeps."""

    parts = 1

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(inputs, 3 * units), nn.Linear(units, 3 * units)

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step."""
        [h] = state
        given, carried = self.w(x).chunk(3, -1), self.u(h).chunk(3, -1)
        r, z = (a + b for a, b in zip(given[:2], carried[:2], strict=True))
        n = torch.tanh(given[2] + r.sigmoid() * carried[2])
        return (n + z.sigmoid() * (h - n),)


class LayerNormLSTM(nn.Module):
    """Normalised gates and cell state: Ba, Kiros & Hinton (2016), arXiv:1607.06450."""

    parts = 2

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(inputs, 4 * units), nn.Linear(units, 4 * units)
        self.of_x, self.of_h = nn.LayerNorm(4 * units), nn.LayerNorm(4 * units)
        self.of_c = nn.LayerNorm(units)

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step."""
        h, c = state
        i, f, g, o = (self.of_x(self.w(x)) + self.of_h(self.u(h))).chunk(4, -1)
        c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.of_c(c).tanh(), c


class PeepholeLSTM(nn.Module):
    """Gates that see the cell state: Gers & Schmidhuber (2000)."""

    parts = 2

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(inputs, 4 * units), nn.Linear(units, 4 * units)
        self.peep = nn.Parameter(0.1 * torch.randn(3, units))

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step."""
        h, c = state
        i, f, g, o = (self.w(x) + self.u(h)).chunk(4, -1)
        keep = (f + self.peep[1] * c).sigmoid()
        c = keep * c + (i + self.peep[0] * c).sigmoid() * g.tanh()
        return (o + self.peep[2] * c).sigmoid() * c.tanh(), c


class MinGRU(nn.Module):
    """Gates that do not see the state: Feng et al. (2024), arXiv:2410.01201."""

    parts = 1

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.w = nn.Linear(inputs, 2 * units)

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step."""
        z, n = self.w(x).chunk(2, -1)
        z = z.sigmoid()
        return ((1 - z) * state[0] + z * n,)


class CfC(nn.Module):
    """Closed-form continuous time: Hasani et al. (2022), arXiv:2106.13898."""

    parts = 1

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs + units, 2 * units), nn.SiLU())
        self.f, self.g = nn.Linear(2 * units, units), nn.Linear(2 * units, units)
        self.a, self.b = nn.Linear(2 * units, units), nn.Linear(2 * units, units)

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step of length 1."""
        seen = self.body(torch.cat((x, state[0]), -1))
        gate = torch.sigmoid(self.a(seen) + self.b(seen))
        return (self.f(seen).tanh() * (1 - gate) + gate * self.g(seen).tanh(),)


class SLSTM(nn.Module):
    """Exponential gates, stabilised: Beck et al. (2024), arXiv:2405.04517."""

    parts = 4

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(inputs, 4 * units), nn.Linear(units, 4 * units)

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step: h, c, the normaliser and the stabiliser."""
        h, c, n, m = state
        i, f, g, o = (self.w(x) + self.u(h)).chunk(4, -1)
        kept = logsigmoid(f) + m
        top = torch.maximum(kept, i)
        new, keep = (i - top).exp(), (kept - top).exp()
        c, n = keep * c + new * g.tanh(), keep * n + new
        return o.sigmoid() * c / n.clamp_min(1e-6), c, n, top


class Leaky(nn.Module):
    """A leaky unit whose leak is learnt, without a bound on its state."""

    parts = 1

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(inputs, units), nn.Linear(units, units)
        self.leak = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor, state: State) -> State:
        """Take one step."""
        rate = self.leak.sigmoid()
        return ((1 - rate) * state[0] + rate * softplus(self.w(x) + self.u(state[0])),)


CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "layer_norm_lstm": LayerNormLSTM,
    "peephole_lstm": PeepholeLSTM,
    "min_gru": MinGRU,
    "cfc": CfC,
    "slstm": SLSTM,
    "leaky": Leaky,
}
"""Name -> the class."""


def start(cell: nn.Module, batch: int, units: int, like: Tensor) -> State:
    """Return a first state of zeros."""
    return (like.new_zeros(batch, units),) * int(cell.parts)  # type: ignore[arg-type]


class Stepped(nn.Module):
    """Steps a cell over ``(T, B, inputs)`` and reads its h out at every step."""

    def __init__(self, cell: nn.Module, units: int, outputs: int) -> None:
        super().__init__()
        self.cell, self.head, self.units = cell, nn.Linear(units, outputs), units

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, shape ``(T, B, outputs)``."""
        state = start(self.cell, x.shape[1], self.units, x)
        seen = []
        for step in x:
            state = self.cell(step, state)
            seen.append(state[0])
        scores: Tensor = self.head(torch.stack(seen))
        return scores
