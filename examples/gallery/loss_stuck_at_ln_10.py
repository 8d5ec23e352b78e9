"""The loss stays at 2.30, and that is ln 10.

A softmax stands before cross_entropy, which applies one itself. Of ten numbers between
0 and 1 the second one makes ten probabilities that hardly differ, and lets hardly any
gradient through. The loss stays at that of a net that gives each class a tenth.

Alarm: loss_mismatch, cause softmax_twice

Run: .venv/bin/python examples/gallery/loss_stuck_at_ln_10.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch


class Classifier(nn.Module):
    """Reads an image row by row."""

    def __init__(self, sick: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)
        self.last = nn.Softmax(-1) if sick else nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``(B, 8, 8)`` images to ``(B, 10)`` scores."""
        return self.last(self.head(self.rnn(rows)[0][:, -1]))


def train(sick: bool) -> float:
    """Train on handwritten digits; return the loss of the last 50 steps."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    model = Classifier(sick)
    name = f"loss-stuck-at-ln-10-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(300):
        batch = torch.randint(len(labels), (32,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "a softmax before cross_entropy"), (False, "no softmax")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.2f}")


if __name__ == "__main__":
    main()
