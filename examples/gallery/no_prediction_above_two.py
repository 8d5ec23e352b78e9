"""The net learns, and yet no prediction comes out above two.

The optimizer was given the parameters of the recurrent module alone. The states lie
between -1 and 1, and the layer that is to stretch them to the unit of the targets keeps
the small weights that it began with.

Alarm: not_updating, cause not_in_optimizer

Run: .venv/bin/python examples/gallery/no_prediction_above_two.py
"""

import torch
from torch import Tensor, nn

import gradwatch


class Meter(nn.Module):
    """Adds up what a meter has counted, hour by hour."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, hours: Tensor) -> Tensor:
        """Map ``(B, T, 1)`` counts to ``(B,)`` sums."""
        return self.head(self.rnn(hours)[0][:, -1]).squeeze(-1)


def train(sick: bool) -> float:
    """Train on fresh days; return the loss of the last 50 steps."""
    torch.manual_seed(0)
    model = Meter()
    name = f"no-prediction-above-two-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    trained = model.rnn if sick else model
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    losses = []
    for _ in range(300):
        hours = torch.rand(64, 1, 1) * torch.rand(64, 12, 1)
        output = model(hours)
        loss = nn.functional.mse_loss(output, hours.sum((1, 2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    print(f"  the highest of the last predictions is {output.max().item():.2f}")
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "without the head"), (False, "with all parameters")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.2f}")


if __name__ == "__main__":
    main()
