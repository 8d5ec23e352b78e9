"""Where a loss that is not finite comes from: read from what its graph still holds.

Looked at as backward comes to the first weight: the functions between the loss and
that weight have run by then and hold nothing any more, all others do.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor

from gradwatch._torch import is_freed, kept_tensors, recomputes

_MOST: Final = 20_000
"""Functions that are looked at."""


def first(root: Tensor) -> str:
    """Return what is the first not to be finite, as the forward pass came to it.

    Args:
        root: The loss.

    Returns:
        ``data``, for a tensor that no weight has made; ``weights``; ``forward: `` with
        the function at which it was found, and ``nan`` or ``inf``; ``loss`` where all
        that is still held is finite; empty where nothing can be told.
    """
    if not root.is_cpu or root.grad_fn is None or recomputes():
        return ""
    weights, made, held, unseen = False, "", 0, False
    for function in _in_order(root.grad_fn):
        variable = getattr(function, "variable", None)
        kept = kept_tensors(function) if variable is None else [variable]
        for tensor in kept:
            if not tensor.is_floating_point() or not tensor.is_cpu:
                continue
            if is_freed(tensor):
                unseen = True
                continue
            held += 1
            if bool(tensor.detach().isfinite().all()):
                continue
            if not tensor.requires_grad and tensor.grad_fn is None:
                return "data"
            if tensor.is_leaf:
                weights = True
            elif not made:
                sort = "nan" if bool(tensor.detach().isnan().any()) else "inf"
                made = f"forward: {_name(function)} {sort}"
    if weights:
        return "weights"
    if unseen:  # what is not finite may have come from there
        return ""
    return made or ("loss" if held else "")


def _in_order(last: Any) -> list[Any]:
    """Return the functions behind one, each after those that it takes from."""
    order: list[Any] = []
    seen, stack = {last}, [(last, False)]
    while stack and len(seen) <= _MOST:
        function, done = stack.pop()
        if done:
            order.append(function)
            continue
        stack.append((function, True))
        for before, _ in function.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                stack.append((before, False))
    return order


def _name(function: Any) -> str:
    return str(function.name()).rstrip("0123456789").removesuffix("Backward")
