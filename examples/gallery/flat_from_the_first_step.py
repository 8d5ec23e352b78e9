"""The loss is flat from the first step on, at 0.69, and that is ln 2.

The air pressure goes in as it is measured, around 1013, and nobody has normalised it.
Times any weight that is too much for a tanh: all units are at -1 or 1 whatever the
weather is, where they have no slope, and no gradient comes through.

Alarm: saturated, cause inputs

Run: .venv/bin/python examples/gallery/flat_from_the_first_step.py
"""

import torch
from torch import Tensor, nn

import gradwatch


class Forecast(nn.Module):
    """Tells from the air pressure of a day whether it rises or falls."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, pressure: Tensor) -> Tensor:
        """Map ``(B, 24, 1)`` readings to ``(B,)`` scores."""
        return self.head(self.rnn(pressure)[0][:, -1]).squeeze(-1)


def days() -> tuple[Tensor, Tensor]:
    """Return 64 days in hectopascals, hour by hour, and whether pressure rises."""
    steps = 0.5 * torch.randn(64, 24, 1) + 0.3 * torch.randn(64, 1, 1)
    pressure = 1013 + 8 * torch.randn(64, 1, 1) + steps.cumsum(1)
    return pressure, (pressure[:, -1, 0] > pressure[:, 0, 0]).float()


def train(sick: bool) -> float:
    """Train on fresh days; return the loss of the last 50 steps."""
    torch.manual_seed(0)
    model = Forecast()
    name = f"flat-from-the-first-step-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(300):
        pressure, rises = days()
        if not sick:
            pressure = (pressure - 1013) / 10
        scores = model(pressure)
        loss = nn.functional.binary_cross_entropy_with_logits(scores, rises)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "in hectopascals"), (False, "normalised")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.2f}")


if __name__ == "__main__":
    main()
