"""The one transfer of a step's numbers from the device to the host.

Nothing before it waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradwatch.numerics.norms import Norms

Numbers = dict[Any, Norms]
"""Names -> numbers of any shape, on any device, or on the host already."""

Host = Mapping[Any, Any]
"""Names -> numpy arrays or lists of floats."""


def _stream(device: torch.device) -> Any | None:
    """Return the stream that a device works through; None where it has no events."""
    module = torch.get_device_module(device)
    current = getattr(module, "current_stream", None)
    return current(device) if current and hasattr(module, "Event") else None


class Drain:
    """The numbers of one step on their way to the host.

    On the CPU they are there at once. On an accelerator one packed copy into pinned
    memory is started, and :meth:`wait` is called one step later.

    Args:
        parts: The numbers of each part of the step, by the part's name.
    """

    def __init__(self, parts: Mapping[str, Numbers]) -> None:
        self._host: dict[str, dict[Any, Any]] = {}
        self._coming: list[tuple[str, Any, torch.Size]] = []
        self._event: Any = None
        self._flat = torch.empty(0)
        moving: list[Tensor] = []
        for part, numbers in parts.items():
            host = self._host[part] = {}
            for name, value in numbers.items():
                if isinstance(value, list):
                    host[name] = value
                elif value.device.type == "cpu":
                    host[name] = value.detach().numpy()
                else:
                    self._coming.append((part, name, value.shape))
                    moving.append(value.detach().reshape(-1))
        if moving:
            self._start(moving)

    def _start(self, moving: list[Tensor]) -> None:
        target = moving[0].device
        wide = torch.float32 if target.type == "mps" else torch.float64
        packed = torch.cat([t.to(target, wide, non_blocking=True) for t in moving])
        stream = _stream(target)
        # Torch takes pinned memory for a copy to the host that does not block.
        self._flat = packed.to("cpu", non_blocking=stream is not None)
        if stream is not None:
            self._event = torch.get_device_module(target).Event()
            self._event.record(stream)

    @property
    def immediate(self) -> bool:
        """Whether the numbers are on the host already."""
        return not self._coming

    def wait(self) -> Mapping[str, Host]:
        """Return the numbers by part, waiting where the transfer is not over."""
        if self._coming:
            if self._event is not None:
                self._event.synchronize()
            flat, start = self._flat.numpy(), 0
            for part, name, shape in self._coming:
                size = math.prod(shape)
                values = flat[start : start + size].reshape(tuple(shape))
                self._host[part][name] = values
                start += size
            self._coming = []
        return self._host
