"""Puts the norms of whole tensors in place of those of this process's part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from gradwatch._torch import is_sharded
from gradwatch.depths.gradients import Gradients
from gradwatch.depths.update import Moved
from gradwatch.hooks.shards import Whole
from gradwatch.numerics.norms import Norms, joined


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
    left, used = dict[int, float](), dict[int, float]()
    moved = dict[str, tuple[float, float]]()
    for one in found:
        for k, param in enumerate(one.params):
            if (place := places.get(id(param))) is not None:
                left[place], used[place] = one.left[k], one.used[k]
            if (stream := name(param)) is not None:
                moved[stream] = one.moved[k], one.weight[k]
    before = _whole(gradients.live, gradients.before, params, left)
    known: list[tuple[list[int], Norms]] = []
    for index, read in gradients.used if before is not None else ():
        same = read is gradients.before
        whole = before if same else _whole(index, read, params, used)
        if whole is None:
            known = []
            break
        known.append((index, whole))
    gradients.partial = before is None
    gradients.before, gradients.used = before, known
    gradients.moved = _moved(moved, gradients.moved)


def _whole(
    index: Sequence[int],
    read: Norms | None,
    params: Sequence[Tensor],
    whole: Mapping[int, float],
) -> Norms | None:
    """Return norms with those of sharded parameters replaced; None: not all known."""
    sharded = [k for k, i in enumerate(index) if is_sharded(params[i])]
    if read is None or not all(index[k] in whole for k in sharded):
        return None
    values = read if isinstance(read, list) else read.tolist()
    return [whole.get(i, value) for i, value in zip(index, values, strict=True)]


def _moved(found: Mapping[str, tuple[float, float]], own: Moved | None) -> Moved | None:
    """Return how far recurrent weights have moved, those that are not sharded too."""
    if not found:
        return own
    change = [by for by, _ in found.values()]
    weight = [size for _, size in found.values()]
    if own is None:
        return Moved(list(found), change, weight)
    names = [*found, *own.names]
    return Moved(names, joined([change, own.change]), joined([weight, own.weight]))
