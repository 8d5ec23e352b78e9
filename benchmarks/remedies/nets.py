"""The net that all sections train, and how it is trained.

Axes: T time, B batch, I inputs, H units, C outputs.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs ``(T, B, I)``; classes ``(B,)`` or values ``(B,)``."""
Loss = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """One recurrent layer and a linear readout of its last output."""

    def __init__(self, rnn: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the readout of the last step, ``(B, C)``."""
        scores: Tensor = self.head(self.rnn(x)[0][-1])
        return scores


def squared_error(scores: Tensor, values: Tensor) -> Tensor:
    """Return the mean squared error of the single output."""
    return nn.functional.mse_loss(scores[:, 0], values)


def generator(seed: int) -> torch.Generator:
    """Return a source of random numbers of its own."""
    return torch.Generator().manual_seed(seed)


def train(
    net: Net,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    loss: Loss = nn.functional.cross_entropy,
    steps: int | None = None,
) -> Iterator[float]:
    """Take optimizer steps; clippers are attached to the optimizer.

    Yields:
        The loss before each step, once that step has been made.
    """
    for x, y in islice(batches, steps):
        value = loss(net(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        yield value.item()
