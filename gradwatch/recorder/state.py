"""A state of a training that can be put back, and what helps to keep one."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.trees import mapped, tensors_in


@dataclass(frozen=True)
class State:
    """A training as it was before one step.

    Attributes:
        step: Which one.
        model: Name -> value of each parameter and buffer.
        optimizers: The state of each optimizer.
        scaler: Of the GradScaler; None without one.
        randomness: Of the random number generators.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizers: Sequence[tuple[int, Mapping[str, Any]]]
    scaler: Mapping[str, Any] | None
    randomness: Mapping[str, Any]

    @classmethod
    def of(
        cls, step: int, model: nn.Module, optimizers: Sequence[Optimizer], scaler: Any
    ) -> State:
        """Return the state of now."""
        return cls(
            step=step,
            model={n: t.detach().clone() for n, t in _tensors_of(model)},
            optimizers=[(id(o), copy.deepcopy(o.state_dict())) for o in optimizers],
            scaler=None if scaler is None else copy.deepcopy(scaler.state_dict()),
            randomness=randomness(),
        )

    def put_back(
        self, model: nn.Module, optimizers: Sequence[Optimizer], scaler: Any
    ) -> None:
        """Make a training what it was; the objects stay the same."""
        with torch.no_grad():
            for name, value in _tensors_of(model):
                if name in self.model:
                    value.copy_(self.model[name])
        for parameter in model.parameters():
            parameter.grad = None
        known = dict(self.optimizers)
        for optimizer in optimizers:
            if id(optimizer) in known:
                optimizer.load_state_dict(copy.deepcopy(dict(known[id(optimizer)])))
        if scaler is not None and self.scaler is not None:
            scaler.load_state_dict(dict(self.scaler))
        set_randomness(self.randomness)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return size_of(tensors_in([self.model, [s for _, s in self.optimizers]]))


def _tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def randomness() -> dict[str, Any]:
    """Return the states of the random number generators that a forward may use."""
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def as_tensors(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return such states as a file holds them: with tensors in place of arrays."""
    kind, keys, *rest = known["numpy"]
    return {**known, "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest)}


def set_randomness(known: Mapping[str, Any]) -> None:
    """Put the random number generators back."""
    torch.set_rng_state(known["torch"])
    version, numbers, gauss = known["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = known["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    if "cuda" in known and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(known["cuda"])


def moved_to_cpu(value: Any) -> Any:
    """Return the same with every tensor copied to the CPU, without its graph."""
    return mapped(value, lambda tensor: tensor.detach().to("cpu", copy=True))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors)


def digest(tensor: Tensor) -> str:
    """Return what tells whether two tensors are the same, bit for bit."""
    flat = tensor.detach().to("cpu")
    flat = flat.to_dense() if flat.is_sparse else flat
    flat = flat.contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha256(raw).hexdigest()[:16]
