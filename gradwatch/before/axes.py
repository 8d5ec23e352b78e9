"""Whether samples stay apart: one is changed, and what else changes is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradwatch.before.trial import LossFn, Subject, returned
from gradwatch.trees import mapped, tensors_in


class Apart(NamedTuple):
    """What changing one sample has shown.

    Attributes:
        axis: The axis of the batch along which samples stay apart; None for none.
    """

    axis: int | None


def apart(
    given: Subject, batch: Any, loss_fn: LossFn, axis: int | None
) -> Apart | None:
    """Return along which axis of a batch samples stay apart.

    The net runs in evaluation mode, so that neither dropout nor the statistics of a
    batch look like a fault.

    Args:
        given: The model.
        batch: One batch.
        loss_fn: Returns the loss of a model on it.
        axis: The batch's axis of samples where it is known; None: 0 and 1 are tried.

    Returns:
        None where it cannot be told: the model has no output that is one tensor, or
        not the same one twice; or what was changed along one of the axes has changed
        no output, or its shape.
    """
    given.model.eval()
    with torch.no_grad():
        before = returned(given.model, batch, loss_fn)[1]
        again = returned(given.model, batch, loss_fn)[1]
        if before is None or again is None or not _same(before, again):
            return None
        candidates, mixed = (0, 1) if axis is None else (axis,), 0
        for candidate in candidates:
            changed = _changed(batch, candidate)
            after = None
            if changed is not None:
                after = returned(given.model, changed, loss_fn)[1]
            if after is None or after.shape != before.shape or _same(before, after):
                continue
            if _one_entry(before, after):
                return Apart(candidate)
            mixed += 1
    return Apart(None) if mixed == len(candidates) else None


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _changed(batch: Any, axis: int) -> Any:
    """Return a batch whose one sample is another one; None where that cannot be.

    Whole numbers in one row are left alone: they are lengths, or targets. In a packed
    sequence samples have no axis of their own.
    """
    if _packed(batch):
        return None
    sizes = {t.shape[axis] for t in tensors_in(batch) if _is_input(t, axis)}
    wide = [size for size in sizes if size > 1]
    if not wide:
        return None
    size = max(wide)
    place = size // 2

    def change(tensor: Tensor) -> Tensor:
        if not _is_input(tensor, axis) or tensor.shape[axis] != size:
            return tensor
        new = tensor.clone()
        part = new.select(axis, place)
        if tensor.is_floating_point():
            noise = torch.randn(part.shape, dtype=torch.float32).to(part)
            part.add_(noise * (part.abs().mean() + 0.1))
        else:
            part.copy_(tensor.select(axis, (place + 1) % size))
        return new

    return mapped(batch, change)


def _packed(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_packed, value.values()))
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        return any(map(_packed, value))
    return isinstance(value, PackedSequence)


def _is_input(tensor: Tensor, axis: int) -> bool:
    return tensor.dim() > max(axis, 0 if tensor.is_floating_point() else 1)


def _one_entry(before: Tensor, after: Tensor) -> bool:
    """Tell whether outputs differ in one entry of some axis, and nowhere else."""
    differs = (before != after) & ~(before.isnan() & after.isnan())
    return any(
        entries.sum() == 1 and len(entries) > 1 for entries in _along_each(differs)
    )


def _along_each(differs: Tensor) -> Iterator[Tensor]:
    """Yield for each axis which of its entries differ anywhere."""
    for axis in range(differs.dim()):
        others = [a for a in range(differs.dim()) if a != axis]
        yield differs.amax(others) if others else differs
