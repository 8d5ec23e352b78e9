"""The loss falls sooner than usual, turns round and climbs far above its start.

No line clears the gradients. Each backward() adds to what is there, so that every step
is taken along the sum of all gradients so far: a momentum that nothing slows down. It
carries the weights to a good place, and past it.

Alarm: not_cleared, cause zero_grad

Run: .venv/bin/python examples/gallery/learns_fast_then_runs_away.py
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
    name = f"learns-fast-then-runs-away-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    losses = []
    for _ in range(400):
        batch = torch.randint(len(labels), (32,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        if not sick:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    print("  the loss every 40 steps:", *(f"{loss:.1f}" for loss in losses[::40]))
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "without zero_grad"), (False, "with zero_grad")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.2f}")


if __name__ == "__main__":
    main()
