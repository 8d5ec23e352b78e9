"""Whatever the input, the prediction is the mean of all targets.

The outputs have the shape (64, 1), the targets (64,), and PyTorch makes (64, 64) of
their difference. Each output is compared with all targets, and what is best for all of
them at once is their mean. The loss ends at their variance.

Alarm: target_broadcast, cause shape

Run: .venv/bin/python examples/gallery/every_prediction_is_the_mean.py
"""

import torch
from torch import Tensor, nn

import gradwatch


class Meter(nn.Module):
    """Adds up what a meter has counted, hour by hour."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, 24, batch_first=True)
        self.head = nn.Linear(24, 1)

    def forward(self, hours: Tensor) -> Tensor:
        """Map ``(B, T, 1)`` counts to ``(B, 1)`` sums."""
        return self.head(self.rnn(hours)[0][:, -1])


def train(sick: bool) -> float:
    """Train on fresh days; return the loss of the last 50 steps."""
    torch.manual_seed(0)
    model = Meter()
    name = f"every-prediction-is-the-mean-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(300):
        hours = torch.rand(64, 1, 1) * torch.rand(64, 12, 1)
        used = hours.sum((1, 2))
        output = model(hours) if sick else model(hours).squeeze(-1)
        loss = (output - used).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    low, high = output.min().item(), output.max().item()
    print(f"  the last predictions lie between {low:.2f} and {high:.2f}")
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "(64, 1) against (64,)"), (False, "(64,) against (64,)")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.3f}")


if __name__ == "__main__":
    main()
