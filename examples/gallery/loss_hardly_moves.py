"""The loss goes down by thousandths, and would need weeks.

The gradients are clipped at a norm of 0.001, where 1 was meant. Theirs is about 0.2, so
that each step is less than a hundredth of what the learning rate was chosen for.

Alarm: over_clipping, cause clip

Run: .venv/bin/python examples/gallery/loss_hardly_moves.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch


class Classifier(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 32, batch_first=True)
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
    name = f"loss-hardly-moves-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    max_norm = 0.001 if sick else 1.0
    losses = []
    for _ in range(300):
        batch = torch.randint(len(labels), (32,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "clipped at 0.001"), (False, "clipped at 1")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.3f}")


if __name__ == "__main__":
    main()
