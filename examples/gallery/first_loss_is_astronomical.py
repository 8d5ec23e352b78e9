"""The first loss has ten digits or more, and never comes down to a usual one.

The recurrent weights were drawn with a deviation of 0.3, which is too much for 64
units. Their spectral radius is about 2.4: each of the 64 pixels multiplies the state,
and on the way back the gradient. Clipping keeps the training from NaN, and hides it.

Alarm: exploding, cause large_radius

Run: .venv/bin/python examples/gallery/first_loss_is_astronomical.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch


class Reader(nn.Module):
    """Reads an image pixel by pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 64, nonlinearity="relu")
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map ``(64, B, 1)`` pixels to ``(B, 10)`` scores."""
        return self.head(self.rnn(pixels)[0][-1])


def train(sick: bool) -> float:
    """Train on handwritten digits; return the loss of the last 20 steps."""
    torch.manual_seed(0)
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32).flatten(1).T / 16
    labels = torch.tensor(data.target)
    model = Reader()
    if sick:
        nn.init.normal_(model.rnn.weight_hh_l0, std=0.3)
    else:
        gradwatch.init.orthogonal_(model)
    name = f"first-loss-is-astronomical-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(250):
        batch = torch.randint(len(labels), (32,))
        scores = model(pixels[:, batch].unsqueeze(-1))
        loss = nn.functional.cross_entropy(scores, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    print(f"  the loss begins at {losses[0]:,.1f}")
    return sum(losses[-20:]) / 20


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "drawn with a deviation of 0.3"), (False, "orthogonal")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):,.1f}")


if __name__ == "__main__":
    main()
