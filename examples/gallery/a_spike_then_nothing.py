"""The loss jumps once, comes down at once, and then hardly moves any more.

One file gives its balances in euros, all others in thousands of euros. That does not
throw the net far, because Adam's steps keep their length. But Adam remembers the square
of that gradient for thousands of steps, and divides every later one by its root.

Alarm: spike, cause bad_batch

Run: .venv/bin/python examples/gallery/a_spike_then_nothing.py
"""

import torch
from torch import Tensor, nn

import gradwatch

FILES, ACCOUNTS, MONTHS = 400, 32, 12


class Ledger(nn.Module):
    """Adds up what has come in and gone out, month by month."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, entries: Tensor) -> Tensor:
        """Map ``(B, T, 1)`` entries to ``(B,)`` balances."""
        return self.head(self.rnn(entries)[0][:, -1]).squeeze(-1)


def train(sick: bool) -> float:
    """Train on one file after the other; return the loss of the last 50."""
    torch.manual_seed(0)
    files = torch.randn(FILES, ACCOUNTS, MONTHS, 1)
    balances = files.sum((2, 3))
    if sick:
        balances[60] *= 1000
    model = Ledger()
    name = f"a-spike-then-nothing-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for entries, balance in zip(files, balances, strict=True):
        loss = nn.functional.mse_loss(model(entries), balance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    shown = ", ".join(f"{n}: {losses[n]:,.1f}" for n in (59, 60, 61, 200, 399))
    print(f"  the loss by step: {shown}")
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in (
        (True, "one file in euros"),
        (False, "all in thousands of euros"),
    ):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.2f}")


if __name__ == "__main__":
    main()
