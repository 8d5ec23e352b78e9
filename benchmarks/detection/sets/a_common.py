"""What the families of set a share: series, forecasters, and how they are measured.

Axes: B batch, T time, I inputs; batches come first, as in most forecasting code.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.detection.case import Draw

Pair = tuple[Tensor, Tensor]


class Forecaster(nn.Module):
    """A recurrent module under any name, batch first, and a head on its last output."""

    def __init__(self, name: str, rnn: nn.RNNBase, head: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, rnn)
        self.head = head

    @property
    def layer(self) -> Any:
        """The recurrent module."""
        return getattr(self, self.name)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the head makes of the last output, ``(B, outputs)``."""
        out, _ = self.layer(x)
        made: Tensor = self.head(out[:, -1])
        return made


class Tracker(Forecaster):
    """The same, with the head on every output."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the head makes of each output, ``(B, T, outputs)``."""
        made: Tensor = self.head(self.layer(x)[0])
        return made


def forecaster(
    draw: Draw,
    kind: Callable[..., nn.RNNBase],
    inputs: int = 1,
    outputs: int = 1,
    *,
    build: type[Forecaster] = Forecaster,
    **options: Any,
) -> Forecaster:
    """Return a forecaster of a drawn size and name."""
    options.setdefault("batch_first", True)
    rnn = kind(inputs, draw.between(20, 40), **options)
    width = rnn.hidden_size * (2 if rnn.bidirectional else 1)
    return build(draw.module_name(), rnn, nn.Linear(width, outputs))


def waves(
    source: torch.Generator, batch: int, length: int, noise: float = 0.05
) -> Iterator[Tensor]:
    """Yield curves ``(B, T)``: a wave of any phase, pace and height, and noise."""
    time = torch.arange(length)
    while True:
        phase, pace, height = torch.rand(3, batch, 1, generator=source)
        curve = torch.sin(6.3 * phase + (0.4 + 0.5 * pace) * time)
        rough = torch.randn(batch, length, generator=source)
        yield (0.5 + height) * curve + noise * rough


def windows(draw: Draw, noise: float = 0.05) -> Iterator[Pair]:
    """Return windows ``(B, T, 1)`` of a wave, and the value behind each, ``(B, 1)``."""
    size, length = draw.between(16, 32), draw.between(12, 20)
    curves = waves(draw.source(), size, length + 1, noise)
    return ((curve[:, :-1, None], curve[:, -1:]) for curve in curves)


def squared(model: nn.Module, batch: Pair) -> Tensor:
    """Mean squared error."""
    x, y = batch
    return mse_loss(model(x), y)


def validated(
    model: nn.Module, batches: Iterator[Any], error: Callable[[nn.Module, Any], Tensor]
) -> Callable[[], float]:
    """Return what measures an error on 20 batches that nobody trains on."""
    kept = [next(batches) for _ in range(20)]

    def goal() -> float:
        with torch.no_grad():
            return sum(float(error(model, batch)) for batch in kept) / len(kept)

    return goal
