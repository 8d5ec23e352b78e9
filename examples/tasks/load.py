"""A forecast: tomorrow's load of a power grid from the last week.

The series is generated, hour by hour: a daily and a weekly cycle, weather that drifts
from day to day, and noise. Two stacked LSTM layers read 168 hours; a linear layer
forecasts the 24 hours after them.

Run: .venv/bin/python examples/tasks/load.py
"""

import math

import torch
from torch import Tensor, nn

import gradwatch

HISTORY, AHEAD, BATCH, STEPS = 168, 24, 32, 300


class Forecast(nn.Module):
    """Forecasts a day from the week before it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, 48, num_layers=2, batch_first=True)
        self.head = nn.Linear(48, AHEAD)

    def forward(self, history: Tensor) -> Tensor:
        """Map ``(B, HISTORY)`` loads to ``(B, AHEAD)``."""
        out, _ = self.rnn(history.unsqueeze(-1))
        return self.head(out[:, -1])


def series(hours: int) -> Tensor:
    """Return a load with mean 0 and a deviation of about 1."""
    hour = torch.arange(hours, dtype=torch.float32)
    day = torch.sin(2 * math.pi * (hour - 7) / 24) + 0.4 * torch.sin(
        4 * math.pi * hour / 24
    )
    weekend = ((hour // 24) % 7 >= 5).float()
    weather = torch.randn(hours // 24 + 1).cumsum(0)
    weather = weather - weather.cumsum(0) / (torch.arange(len(weather)) + 1)
    drift = 0.1 * weather.repeat_interleave(24)[:hours]
    load = day * (1 - 0.5 * weekend) - 0.6 * weekend + drift + 0.1 * torch.randn(hours)
    return (load - load.mean()) / load.std()


def main() -> None:
    """Train on the first years, and forecast days of the last one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    load = series(24 * 365 * 3)
    windows = load.unfold(0, HISTORY + AHEAD, 1)
    train, test = windows[: 24 * 365 * 2], windows[24 * 365 * 2 :: 97]
    model = Forecast()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    watch = gradwatch.watch(model, name="load", budget=None, report=True)
    for _ in range(STEPS):
        chosen = train[torch.randint(len(train), (BATCH,))]
        forecast = model(chosen[:, :HISTORY])
        loss = nn.functional.mse_loss(forecast, chosen[:, HISTORY:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    watch.close()
    with torch.no_grad():
        wrong = model(test[:, :HISTORY]) - test[:, HISTORY:]
        lazy = test[:, HISTORY - AHEAD : HISTORY] - test[:, HISTORY:]
    print(
        f"mean square error of unseen days: {wrong.square().mean():.3f}; "
        f"of saying 'as yesterday': {lazy.square().mean():.3f}"
    )


if __name__ == "__main__":
    main()
