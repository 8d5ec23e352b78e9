"""From a look before training, over an alarm, to its remedy; on handwritten digits.

Run: make demo, then .venv/bin/python examples/remedies.py
"""

import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch


class Reader(nn.Module):
    """Reads 64 pixels one by one and classifies them by the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 64, nonlinearity="relu")
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map ``(T, B, 1)`` pixels to ``(B, 10)`` scores."""
        return self.head(self.rnn(pixels)[1][-1])


def digits() -> tuple[Tensor, Tensor]:
    """Return all images as ``(64, N, 1)`` sequences, with their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    return images.T.unsqueeze(-1), torch.tensor(data.target)


def train(
    model: Reader, optimizer: torch.optim.Optimizer, steps: range, bad: int = -1
) -> None:
    """Train as anyone would; the input of step ``bad`` holds a NaN."""
    x, y = digits()
    shuffle = torch.Generator().manual_seed(steps.start)
    for step in steps:
        batch = torch.randint(1400, (64,), generator=shuffle)
        pixels = x[:, batch].clone()
        if step == bad:
            pixels[0, 0] = math.nan
        loss = nn.functional.cross_entropy(model(pixels), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (model(x[:, 1400:]).argmax(1) == y[1400:]).float().mean().item()
    print(f"  after step {steps.stop - 1}: accuracy {right:.2f}")


def main() -> None:
    """Play the three acts."""
    torch.set_num_threads(1)  # matrices this small only make threads wait
    torch.manual_seed(0)
    model = Reader()
    gradwatch.init.orthogonal_(model, gain=2.5)  # far too much

    print("\nBefore any training, gradwatch.inspect(model, steps=64) says:\n")
    print(gradwatch.inspect(model, steps=64))

    print("\nIt is trained all the same, with clipping, which hides it ...")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    clipper = gradwatch.clip.NormClip(1.0)
    clipper.attach(optimizer, parameters=model.named_parameters())
    watch = gradwatch.watch(model)
    train(model, optimizer, range(30))
    alert = next(a for a in watch.alerts if a.kind == "exploding")

    print(f"\n... and cured by the remedy that the alarm names: {alert.remedy}")
    for changed in watch.apply(alert.remedy):
        print(f"  {changed}")
    train(model, optimizer, range(30, 300))

    print("\nA batch with NaN: the clipper refuses the step, the weights are intact.")
    train(model, optimizer, range(300, 400), bad=350)
    print(f"\n{clipper}\n")
    watch.close()


if __name__ == "__main__":
    main()
