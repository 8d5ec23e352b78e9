"""Puts the norms of whole tensors in place of those of this process's part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradwatch.depths.gradients import Gradients
from gradwatch.depths.update import Moved
from gradwatch.hooks.shards import Whole
from gradwatch.numerics.norms import Norms
from gradwatch.numerics.shards import is_sharded


def make_whole(
    gradients: Gradients,
    params: Sequence[Tensor],
    found: Sequence[Whole],
    name: Callable[[Tensor], str | None],
) -> None:
    """Correct what was read of a step that is over; drop what is not known whole.

    Args:
        gradients: What was read; changed.
        params: The watched parameters.
        found: What processes have exchanged in the step.
        name: Returns the stream of a recurrent weight.
    """
    places = {id(p): i for i, p in enumerate(params)}
    left, used = dict[int, Tensor](), dict[int, Tensor]()
    moved = dict[str, tuple[Tensor, Tensor]]()
    for one in found:
        for k, param in enumerate(one.params):
            place = places.get(id(param))
            if place is None:
                continue
            used[place] = one.used[k]
            if one.left is not None:
                left[place] = one.left[k]
            if (stream := name(param)) is not None:
                moved[stream] = one.moved[k], one.weight[k]
    same = [read is gradients.before for _, read in gradients.used]
    before = _whole(gradients.live, gradients.before, params, left)
    each = [_whole(index, read, params, used) for index, read in gradients.used]
    gradients.partial = before is None
    gradients.before = before
    pairs = zip(gradients.used, each, same, strict=True)
    known = [
        (index, before if alike and before is not None else read)
        for (index, _), read, alike in pairs
        if read is not None
    ]
    gradients.used = known if len(known) == len(each) else []
    gradients.moved = _moved(moved) if moved else gradients.moved


def _whole(
    index: Sequence[int],
    read: Norms | None,
    params: Sequence[Tensor],
    whole: dict[int, Tensor],
) -> Norms | None:
    """Return norms with those of sharded parameters replaced; None: not all known."""
    sharded = [k for k, i in enumerate(index) if is_sharded(params[i])]
    if read is None or not all(index[k] in whole for k in sharded):
        return None
    if not sharded:
        return read
    known = torch.stack([whole[index[k]] for k in sharded])
    if isinstance(read, list):
        values = list(read)
        for k, value in zip(sharded, known.tolist(), strict=True):
            values[k] = value
        return values
    mixed = read.clone()
    mixed[sharded] = known.to(mixed)
    return mixed


def _moved(found: dict[str, tuple[Tensor, Tensor]]) -> Moved:
    """Return how far recurrent weights have moved; on the host, if they are there."""
    change, weight = (
        torch.stack(column) for column in zip(*found.values(), strict=True)
    )
    if change.is_cpu:
        return Moved(list(found), change.tolist(), weight.tolist())
    return Moved(list(found), change, weight)
