"""The loss gets worse just when the learning rate is to be decayed.

The schedule multiplies the rate by 10, where it should multiply it by 0.1. At a rate of
0.02 Adam has learnt well for 200 steps; at 0.2 the weights are thrown out, and what
they had learnt is gone.

Alarm: loss_divergence, cause schedule

Run: .venv/bin/python examples/gallery/worse_after_the_rate_decay.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch


class Classifier(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``(B, 8, 8)`` images to ``(B, 10)`` scores."""
        return self.head(self.rnn(rows)[0][:, -1])


def train(sick: bool) -> float:
    """Train on handwritten digits; return the loss of the last 50 steps."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    model = Classifier()
    name = f"worse-after-the-rate-decay-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    gamma = 10 if sick else 0.1
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 200, gamma)
    losses = []
    for _ in range(300):
        batch = torch.randint(len(labels), (32,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    watch.close()
    print("  the loss every 40 steps:", *(f"{loss:.1f}" for loss in losses[::40]))
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "gamma 10"), (False, "gamma 0.1")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.2f}")


if __name__ == "__main__":
    main()
