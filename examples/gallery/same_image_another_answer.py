"""The same image gets another answer when it is in another batch.

The images are (batch, rows, pixels), and nn.GRU takes the first axis for time unless it
is told batch_first=True. It goes from image to image as if they were the steps of one
sequence. Nothing is raised, as all shapes fit, and the loss even falls for a while:
the last row of each image does reach its answer.

Alarm: axes_mixed, cause batch_axis

Run: .venv/bin/python examples/gallery/same_image_another_answer.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch


class Classifier(nn.Module):
    """Reads an image row by row."""

    def __init__(self, sick: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 32, batch_first=not sick)
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
    model = Classifier(sick)
    name = f"same-image-another-answer-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(300):
        batch = torch.randint(len(labels), (32,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    with torch.no_grad():
        answers, reverse = (model(x).argmax(-1) for x in (images, images.flip(0)))
    other = (answers != reverse.flip(0)).float().mean().item()
    print(f"  in reverse order, {other:.0%} of the images have another answer")
    return sum(losses[-50:]) / 50


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "batch_first forgotten"), (False, "batch_first=True")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.2f}")


if __name__ == "__main__":
    main()
