"""After three hours the loss is NaN, and it stays NaN.

One reading of one recording is missing, and the export has written it as NaN. The
recordings are read in the order of their dates, so that all goes well until its turn
comes. Its gradient is NaN, and after that step so is every weight. (The three hours are
200 steps here.)

Alarm: nonfinite, cause nan_data

Run: .venv/bin/python examples/gallery/nan_after_three_hours.py
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch


class Wear(nn.Module):
    """Tells the wear of a machine from how it vibrates."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 24, batch_first=True)
        self.head = nn.Linear(24, 1)

    def forward(self, recording: Tensor) -> Tensor:
        """Map ``(B, T, 3)`` readings to ``(B,)`` numbers."""
        return self.head(self.rnn(recording)[0][:, -1]).squeeze(-1)


def recordings() -> tuple[Tensor, Tensor]:
    """Return 4,000 recordings of three sensors, and the wear of the machine."""
    wear = torch.rand(4000)
    readings = 0.1 + wear[:, None, None] * torch.randn(4000, 20, 3)
    readings[3205, 11, 2] = math.nan
    return readings, wear


def train(sick: bool) -> float:
    """Train once over all recordings; return the loss of the last 20 steps."""
    torch.manual_seed(0)
    readings, wear = recordings()
    if not sick:
        readings = readings.nan_to_num(nan=0.0)
    model = Wear()
    name = f"nan-after-three-hours-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for x, y in DataLoader(TensorDataset(readings, wear), batch_size=16):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    watch.close()
    print(f"  the loss at step 199 is {losses[199]:.4f}")
    return sum(losses[-20:]) / 20


def main() -> None:
    """Train twice; say what the loss alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "one reading is missing"), (False, "zero in its place")):
        print(f"{what}:")
        print(f"  the loss ends at {train(sick):.4f}")


if __name__ == "__main__":
    main()
