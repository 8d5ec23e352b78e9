"""Recurrent weights along small trainings."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}


@dataclass(frozen=True)
class Run:
    """One training run: what is learned, by what, and how."""

    task: str
    kind: type[nn.RNNBase]
    hidden: int
    optimizer: str
    rate: float
    orthogonal: bool = False


RUNS = (
    Run("digits", nn.LSTM, 64, "Adam", 3e-3),
    Run("digits", nn.LSTM, 128, "Adam", 1e-3),
    Run("digits", nn.LSTM, 32, "SGD", 1.0),
    Run("digits", nn.GRU, 64, "SGD", 0.3),
    Run("digits", nn.GRU, 128, "Adam", 1e-2),
    Run("digits", nn.RNN, 64, "SGD", 0.1),
    Run("digits", nn.RNN, 128, "Adam", 1e-3, orthogonal=True),
    Run("adding", nn.LSTM, 128, "SGD", 0.3),
    Run("adding", nn.LSTM, 64, "Adam", 1e-2, orthogonal=True),
    Run("adding", nn.GRU, 64, "Adam", 3e-3),
    Run("adding", nn.RNN, 128, "SGD", 0.03),
    Run("adding", nn.RNN, 64, "Adam", 1e-3),
)


def trajectory(run: Run, steps: int, every: int) -> Iterator[Tensor]:
    """Train, and yield copies of the recurrent weights on the way.

    Yields:
        Shape ``(gates, H, H)``, after every ``every`` steps.
    """
    torch.manual_seed(0)
    batches, inputs, outputs = TASKS[run.task]
    recurrent, head = run.kind(inputs, run.hidden), nn.Linear(run.hidden, outputs)
    if run.orthogonal:
        for gate in gates(recurrent):
            nn.init.orthogonal_(gate)
    parameters = [*recurrent.parameters(), *head.parameters()]
    optimizer = OPTIMIZERS[run.optimizer](parameters, run.rate)
    for step, (x, y) in zip(range(steps), batches(), strict=False):
        scores = head(recurrent(x)[0][-1])
        if outputs > 1:
            loss = nn.functional.cross_entropy(scores, y)
        else:
            loss = nn.functional.mse_loss(scores[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % every == 0:
            yield gates(recurrent).clone()


def gates(recurrent: nn.RNNBase) -> Tensor:
    """Return the recurrent weights as ``(gates, H, H)``."""
    hidden = recurrent.hidden_size
    return recurrent.weight_hh_l0.detach().view(-1, hidden, hidden)


def digits() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of ``(64, 32, 1)`` pixels and what they show."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(data.target)
    while True:
        batch = torch.randint(len(labels), (32,))
        yield images[batch].T.unsqueeze(-1), labels[batch]


def adding() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield 50 numbers and two marks; the sum of the marked ones is asked for."""
    while True:
        numbers, marks = torch.rand(50, 32), torch.zeros(50, 32)
        marks[torch.randint(25, (32,)), torch.arange(32)] = 1
        marks[torch.randint(25, 50, (32,)), torch.arange(32)] = 1
        yield torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


TASKS = {"digits": (digits, 1, 10), "adding": (adding, 2, 1)}
