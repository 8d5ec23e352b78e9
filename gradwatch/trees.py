"""Tensors in what a forward takes or gives, whatever that is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and mappings, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for part in value.values() for t in tensors_in(part)]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in tensors_in(part)]
    return []


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the same with each tensor changed; what was given stays as it is.

    Of a packed sequence the sizes stay where they are: they are never on a device.

    Args:
        value: Tensors in tuples, lists and mappings; anything else is left alone.
        change: What is done to a tensor.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        data, sizes, *order = value
        moved = [None if part is None else change(part) for part in order]
        return PackedSequence(change(data), sizes.clone(), *moved)
    if isinstance(value, Mapping):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(part, change) for part in value)
    return value
