"""What a loss is made of: read from the graph that backward is going through.

The graph says which function of torch made the loss, what it was given, and by which
weights that was made. What it has saved is gone by then, and nothing of it is kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from torch import Tensor

from gradwatch._torch import function_number, made_shapes, saved

_MOST: Final = 512
"""Nodes that are looked at."""
_WIDE: Final = 2000
"""The same, where views of states are looked for."""
_STACKED: Final = frozenset({"Stack", "Cat", "MkldnnRnnLayer", "CudnnRnn", "MiopenRnn"})
"""Functions that make states, or put them together."""
_FAR: Final = 24
"""Nodes between a loss and what it reads that are followed."""
_KINDS: Final = MappingProxyType(
    {
        "NllLoss": "nll",
        "NllLoss2D": "nll",
        "MseLoss": "mse",
        "BinaryCrossEntropy": "bce",
        "BinaryCrossEntropyWithLogits": "bce_with_logits",
        "SmoothL1Loss": "smooth_l1",
        "HuberLoss": "huber",
        "CtcLoss": "ctc",
    }
)
_PICKS: Final = ("Gather", "Index")
_VIEWS: Final = frozenset(
    {
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "AsStrided",
        "Transpose",
        "Permute",
        "T",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Select",
        "Slice",
        "Index",
        "IndexSelect",
        "Alias",
        "Clone",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "Cat",
        "Stack",
        "ToCopy",
        "Narrow",
    }
)
_LAYERS: Final = frozenset(
    {
        "Addmm",
        "Addbmm",
        "Baddbmm",
        "Mm",
        "Bmm",
        "Linear",
        "MkldnnLinear",
        "Convolution",
        "Embedding",
        "Add",
        "Mul",
        "NativeLayerNorm",
        "NativeBatchNorm",
        "CudnnBatchNorm",
    }
)
"""Functions that make a read-out of their weights and normalise nothing to a sum."""
_RESHAPES: Final = ("View", "UnsafeView", "ReshapeAlias")


Shape = tuple[int, ...]


class LossGraph(NamedTuple):
    """What one loss is made of.

    Attributes:
        kind: ``cross_entropy``, ``nll`` (of anything but a log-softmax), ``bce``,
            ``bce_with_logits``, ``mse``, ``l1``, ``smooth_l1``, ``huber`` or ``ctc``.
        terms: How many such functions there are, such as one a time step; of 512 nodes.
        others: Kinds of other losses that are added to it.
        alone: Whether nothing else is added to it.
        reads: The functions that were applied to the read-out before the loss, the last
            one first; views are left out.
        softmax: Of each softmax among them, and of cross entropy's own, the axis.
        classes: Of a softmax of one's own before an ``nll``: along how many entries it
            adds up to 1, and how many classes the loss takes them for. None else.
        broadcast: The shape of what was expanded to be compared with the targets, and
            that which it got; None where nothing was.
        views: Shapes before and after each view on the way, from the loss through the
            read-out and on, and of states, that mixes axes: :func:`mixes_axes`.
        weights: The parameters of the function that made the read-out; not kept.
        nodes: Numbers of the functions from all terms down to all their read-outs;
            empty where there are too many to be gone through.
        mean_of: Of how many errors it is the mean, or that over a number, where it is
            nothing else; 0 where that is not known.
    """

    kind: str
    terms: int
    others: tuple[str, ...]
    alone: bool
    reads: tuple[str, ...]
    softmax: tuple[int, ...]
    classes: tuple[int, int] | None
    broadcast: tuple[Shape, Shape] | None
    views: tuple[tuple[Shape, Shape], ...]
    weights: tuple[Tensor, ...]
    nodes: frozenset[int]
    mean_of: int = 0


def look(root: Tensor) -> LossGraph | None:
    """Return what a loss is made of; None where no known function is found in it.

    Args:
        root: What backward was called on.
    """
    found, alone = _losses(root.grad_fn)
    if not found:
        return None
    kind, node = found[0]
    path = list(_path(node))
    names = [_name(one) for one in path]
    own = names.index("LogSoftmax") if "LogSoftmax" in names else None
    if own is not None and set(names[:own]) <= _VIEWS and kind == "nll":
        kind = "cross_entropy"
    else:
        own = None
    applied = [i for i, n in enumerate(names) if n not in _VIEWS and i != own]
    last = len(path) - 1
    # What a function of any other name does with its weights is not known.
    ends = bool(path) and bool(weights := tuple(_parameters(path[-1])))
    ends = ends and names[-1] in _LAYERS
    return LossGraph(
        kind=kind,
        terms=len(found),
        others=tuple(sorted({other for other, _ in found} - {found[0][0]})),
        alone=alone,
        reads=tuple(names[i] for i in applied if not (ends and i == last)),
        softmax=tuple(
            _signed(saved(one, "dim", 0))
            for one, n in zip(path, names, strict=True)
            if n in ("Softmax", "LogSoftmax")
        ),
        classes=_classes(path, own),
        broadcast=_expanded(node, path, names),
        views=tuple(_mixing([*path, *(_onwards(path[-1]) if ends else ())])),
        weights=weights if ends else (),
        nodes=_numbers([node for _, node in found]),
        mean_of=_mean_of(root.grad_fn, path),
    )


def views_of_states(root: Tensor) -> Iterator[tuple[Shape, Shape]]:
    """Yield the shapes of views that mix the axes of states, wherever they are.

    What is stacked, as the states of a recurrent module and the outputs of its steps
    are, and then viewed in another order.
    """
    waiting, seen = deque([root.grad_fn]), {root.grad_fn}
    while waiting and len(seen) <= _WIDE:
        node = waiting.popleft()
        if _name(node) in _RESHAPES and _name(_through_views(node)) in _STACKED:
            yield from _mixing([node])
        for one in _below(node):
            if one not in seen:
                seen.add(one)
                waiting.append(one)


def _mean_of(node: Any, path: list[Any]) -> int:
    """Return of how many squared errors a loss is the mean; 0 for another one.

    One that is divided, as a step of several batches divides it, counts too.
    """
    while _name(node) == "Div" and len(_below(node)) == 1:
        node = _below(node)[0]
    if _name(node) != "MseLoss" or saved(node, "reduction", 0) != 1 or not path:
        return 0
    return math.prod(made_shapes(path[0])[0])


def _losses(root: Any) -> tuple[list[tuple[str, Any]], bool]:
    """Return the functions that compare with targets, each with its kind.

    And whether there is nothing else in the sum. A function that is given a parameter
    is of the model: nothing is looked for below it.
    """
    waiting, seen = deque([root] if root is not None else []), {root}
    found: list[tuple[str, Any]] = []
    alone = True
    while waiting and len(seen) <= _MOST:
        node = waiting.popleft()
        kind = _KINDS.get(_name(node), "")
        kind, start = (kind, node) if kind else _by_hand(node)
        if kind:
            found.append((kind, start))
            continue
        below = [] if _is_given_parameters(node) else _below(node)
        alone = alone and bool(below)  # else it ends in something else
        for one in below:
            if one not in seen:
                seen.add(one)
                waiting.append(one)
    return found, alone and not waiting


def _by_hand(node: Any) -> tuple[str, Any]:
    """Return what kind of loss a function is part of that is written in tensor terms.

    A difference counts if one of its sides alone has a gradient: the other is a target.

    Returns:
        The kind, empty for none, and the function that was given the read-out.
    """
    name, below = _name(node), _below(node)
    if not below:
        return "", node
    if name in _PICKS and _name(_through_views(below[0])) == "LogSoftmax":
        return "nll", node
    gap = below[0]
    if _name(gap) != "Sub" or len(_below(gap)) != 1:
        return "", node
    if name == "Abs":
        return "l1", gap
    squared = name == "Mul" and len(below) == 2 and gap is below[1]
    squared = squared or (name == "Pow" and saved(node, "exponent", 0) == 2)
    return ("mse", gap) if squared else ("", node)


def _path(node: Any) -> Iterator[Any]:
    """Yield the functions from a loss down to that which made the read-out."""
    for _ in range(_FAR):
        below = _below(node)
        if not below or _is_given_parameters(node):
            return
        if len(below) > 1 and _name(node) not in ("Cat", "Stack", "Mul"):
            return
        node = below[0]
        if _name(node) == "AccumulateGrad":
            return
        yield node


def _numbers(losses: list[Any]) -> frozenset[int]:
    """Return the numbers of the functions below some losses, down to the read-outs.

    Outputs that are stacked, as those of one call a time step, are followed each.
    """
    waiting, found = list(losses), set[Any]()
    while waiting:
        for one in _path(waiting.pop()):
            found.add(one)
            if _name(one) in ("Cat", "Stack"):
                others = set(_below(one)[1:]) - found
                found |= others
                waiting += others
        if len(found) > _WIDE:
            return frozenset()
    return frozenset(map(function_number, found))


def _onwards(node: Any) -> Iterator[Any]:
    """Yield the functions behind the read-out, as long as one leads to the next."""
    for _ in range(_FAR):
        own = {id(weight) for weight in _parameters(node)}
        below = [one for one in _below(node) if not _leads_to(one, own)]
        if len(below) != 1 or _name(below[0]) == "AccumulateGrad":
            return
        node = below[0]
        yield node


def _leads_to(node: Any, weights: set[int]) -> bool:
    """Tell whether a function is one of some parameters, transposed or not."""
    while _name(node) in ("T", "Transpose", "ToCopy") and _below(node):
        node = _below(node)[0]
    return _name(node) == "AccumulateGrad" and id(node.variable) in weights


def _mixing(path: list[Any]) -> Iterator[tuple[Shape, Shape]]:
    """Yield the shapes of views that mix axes."""
    for node in path:
        if _name(node) not in _RESHAPES:
            continue
        before = tuple(int(n) for n in saved(node, "self_sym_sizes", ()))
        for after in made_shapes(node):
            if mixes_axes(before, after):
                yield before, after


def mixes_axes(before: Shape, after: Shape) -> bool:
    """Tell whether a view tears an axis apart and joins the pieces to other axes.

    Axes may be joined and split, the last one, that of features, split and joined to
    the one before, as several heads are, and pieces of time joined to the batch, or to
    the features behind them.

    Example:
        >>> mixes_axes((20, 32, 8), (640, 8)), mixes_axes((640, 8), (20, 32, 8))
        (False, False)
        >>> mixes_axes((20, 32, 8), (20, 128, 2)), mixes_axes((32, 20, 8), (32, 10, 16))
        (False, False)
        >>> mixes_axes((20, 32, 8), (32, 20, 8)), mixes_axes((2, 32, 8), (32, 16))
        (True, True)
    """
    left = [n for n in before if n != 1]
    right = [n for n in after if n != 1]
    if math.prod(left) != math.prod(right):
        return False  # no view at all
    if sorted(left) == sorted(right):
        return left != right  # a transpose, to all appearance
    cuts = {math.prod(right[i:]) for i in range(len(right) + 1)}
    for i in range(len(left) - 1):
        inner, outer = math.prod(left[i + 1 :]), math.prod(left[i:])
        inside = [cut for cut in cuts if inner < cut < outer]
        if not inside:
            continue
        nested = all(outer % cut == 0 and cut % inner == 0 for cut in inside)
        joins_before, joins_behind = outer not in cuts, inner not in cuts
        if not nested or (joins_behind and (joins_before or i < len(left) - 2)):
            return True
    return False


def _through_views(node: Any) -> Any:
    while _name(node) in _VIEWS and len(_below(node)) == 1:
        node = _below(node)[0]
    return node


def _is_given_parameters(node: Any) -> bool:
    return next(_parameters(node), None) is not None


def _parameters(node: Any) -> Iterator[Tensor]:
    """Yield the parameters that a function is given, transposed or not."""
    for below in _below(node):
        while _name(below) in ("T", "Transpose", "ToCopy") and _below(below):
            below = _below(below)[0]
        if _name(below) == "AccumulateGrad":
            yield below.variable


def _expanded(
    node: Any, path: list[Any], names: list[str]
) -> tuple[Shape, Shape] | None:
    """Return the shapes of what was expanded before anything else was applied."""
    if _name(node) == "Sub" and path:  # it expands by itself
        for a, b in zip(made_shapes(path[0]), made_shapes(node), strict=False):
            if math.prod(a) != math.prod(b):
                return a, b
    for one, name in zip(path, names, strict=True):
        before = tuple(int(n) for n in saved(one, "self_sym_sizes", ()))
        made = made_shapes(one)
        if name == "Expand" and made and math.prod(before) != math.prod(made[0]):
            return before, made[0]
        if name not in _VIEWS:
            return None
    return None


def _classes(path: list[Any], own: int | None) -> tuple[int, int] | None:
    """Return the entries that a log-softmax adds up over, and the classes of the loss.

    Args:
        path: From an ``nll`` on.
        own: The place of the log-softmax in it; None for none.
    """
    if own is None:
        return None
    normalised, given = made_shapes(path[own])[:1], made_shapes(path[0])[:1]
    if not normalised or not given or not given[0]:
        return None
    axis = _signed(saved(path[own], "dim", 0))
    own_axis = 1 if len(given[0]) > 1 else 0
    return normalised[0][axis], given[0][own_axis]


def _below(node: Any) -> list[Any]:
    return [below for below, _ in node.next_functions if below is not None]


def _name(node: Any) -> str:
    """Return the name of a function: ``LogSoftmaxBackward0`` as ``LogSoftmax``."""
    name: str = node.name().rpartition("::")[2]
    return name.partition("Backward")[0]


def _signed(dim: int) -> int:
    """Return an axis that was counted from the end as it was given."""
    return dim - (1 << 64) if dim >= 1 << 63 else dim
