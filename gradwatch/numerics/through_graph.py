r"""Vectors pulled back over single steps of a recurrence, along autograd's own graph.

For a cell whose formulas nobody knows. A step's state is one tensor or several, such as
h and c; they count as independent, whichever of them the cell has made from another.
With J the Jacobian of a step at the state that was visited, :func:`back` returns
:math:`J^\top v`. It includes whatever else leads from one state to the next, such as an
output that is fed back through other modules. The graph is left as it is.

Axes: B sequences, S entries of a state (of all its tensors together), V vectors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

State = Sequence[Tensor]
"""The tensors of one state, in autograd's graph, each of shape ``(B, ...)``."""
_TINY: Final = 1e-30
_ROUND: Final = 1e-2
"""Share of a pulled vector above which a difference is no rounding."""
_OWN: Final = threading.local()


def pulling() -> bool:
    """Tell whether what a hook is shown now, in this thread, is a vector of ours."""
    return getattr(_OWN, "pulling", False)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the tensors of a state, or of its gradient, as one of shape ``(B, S)``.

    In float32 at least: norms of what is in half precision would overflow.
    """
    wide = [part.detach().flatten(1) for part in parts]
    dtype = torch.promote_types(wide[0].dtype, torch.float32)
    return torch.cat([part.to(dtype) for part in wide], 1)


def parted(vector: Tensor, like: State) -> list[Tensor]:
    """Return a vector of shape ``(B, S)`` as tensors shaped like those of a state."""
    sizes = [part[:1].numel() for part in like]
    pieces = vector.split(sizes, 1)
    pairs = zip(pieces, like, strict=True)
    return [piece.reshape(part.shape).to(part.dtype) for piece, part in pairs]


def pull(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return what a gradient of some tensors is for others that they were made from.

    Returns:
        One gradient an input, 0 where none leads there; None where none leads to any.
    """
    before, _OWN.pulling = pulling(), True
    try:
        found = torch.autograd.grad(
            outputs, inputs, grads, retain_graph=True, allow_unused=True
        )
    finally:
        _OWN.pulling = before
    if all(grad is None for grad in found):
        return None
    pairs = zip(found, inputs, strict=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in pairs]


def _behind(tensors: Sequence[Tensor], first: int) -> Iterator[tuple[Any, int]]:
    """Yield what tensors were made from: functions, with which of their outputs.

    Nothing is run for it.

    Args:
        tensors: In autograd's graph.
        first: The smallest number of a function that is looked at.
    """
    waiting = [tensor.grad_fn for tensor in tensors]
    seen = {(node, -1) for node in waiting}
    while waiting:
        for edge in getattr(waiting.pop(), "next_functions", ()):
            if edge in seen or _number(edge[0]) < first:
                continue
            if (edge[0], -1) not in seen:
                seen.add((edge[0], -1))
                waiting.append(edge[0])
            seen.add(edge)
            yield edge


def _number(node: Any) -> int:
    """Return by which number a function was made; -1 for a leaf's."""
    return -1 if node is None or hasattr(node, "variable") else int(node._sequence_nr())


def made_from(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the places of the inputs that any of the outputs was made from."""
    first = min(_number(tensor.grad_fn) for tensor in inputs)
    edges = set(_behind(outputs, first))
    own = ((tensor.grad_fn, tensor.output_nr) for tensor in inputs)
    return tuple(i for i, edge in enumerate(own) if edge in edges)


def runs_python(later: State, earlier: State) -> bool:
    """Tell whether the way back from one state to another runs functions of the user's.

    An autograd.Function may do in its backward what is not to be done twice; a module's
    full backward hooks, a reentrant checkpoint and compiled code are such functions.
    """
    first = min(_number(part.grad_fn) for part in earlier)
    nodes = [part.grad_fn for part in later] + [n for n, _ in _behind(later, first)]
    return any(isinstance(node, BackwardCFunction) for node in nodes)


def order_of(state: State) -> list[int]:
    """Return the places of a state's tensors, each before those it was made from."""
    sources = [len(made_from([part], state)) for part in state]
    return sorted(range(len(state)), key=lambda i: -sources[i])


def independent(
    state: State, order: Sequence[int], grads: list[Tensor]
) -> list[Tensor]:
    """Take from the gradient of each tensor what comes through the others.

    Args:
        state: The tensors.
        order: :func:`order_of` them.
        grads: Their total gradients, as autograd has them.

    Returns:
        What is left, as if each had been made on its own.
    """
    found = [*grads]
    for place, i in enumerate(order):
        rest = order[place + 1 :]
        if not rest:
            break
        through = pull([state[i]], [state[j] for j in rest], [found[i]])
        for j, part in zip(rest, through or (), strict=bool(through)):
            found[j] = found[j] - part
    return found


def goes_round(states: Sequence[State], order: Sequence[int], vector: Tensor) -> bool:
    """Tell whether a state reaches the one after the next by another way as well.

    Args:
        states: Three consecutive ones.
        order: :func:`order_of` each.
        vector: Shape ``(B, S)``, of the last.
    """
    first, middle, last = states
    through = back(last, middle, order, vector)
    through = None if through is None else back(middle, first, order, through)
    whole = back(last, first, order, vector)
    if whole is None or through is None:
        return False
    size = torch.linalg.vector_norm(whole)
    return bool(torch.linalg.vector_norm(whole - through) > _ROUND * size)


def back(
    later: State, earlier: State, order: Sequence[int], vector: Tensor
) -> Tensor | None:
    """Pull a vector back over one step.

    Args:
        later: The state behind the step.
        earlier: The one before.
        order: :func:`order_of` its tensors.
        vector: Shape ``(B, S)``, of the later state.

    Returns:
        Shape ``(B, S)``, of the earlier state; None where nothing leads there.
    """
    grads = pull(later, earlier, parted(vector, later))
    return None if grads is None else joined(independent(earlier, order, grads))


def pulled_back(
    states: Sequence[State],
    order: Sequence[int],
    vectors: Tensor,
    start: int,
) -> Tensor:
    """Return how the norms of vectors change on their way back.

    Args:
        states: The states of a chain of calls, in their order.
        order: :func:`order_of` each.
        vectors: Shape ``(V, B, S)``.
        start: The step at which they start.

    Returns:
        ln of the norm over that at the start, by lag, shape ``(T, V, B)``: 0 at lag 0,
        -Inf where nothing is left, NaN for lags that lie before the first state.
    """
    steps = len(states)
    logs = vectors.new_full((steps, *vectors.shape[:2]), float("nan"))
    for v, vector in enumerate(vectors):
        size = torch.linalg.vector_norm(vector, dim=-1)
        moving = vector / size.clamp_min(_TINY)[:, None]
        sizes = [torch.zeros_like(size)]
        for t in range(start, 0, -1):
            pulled = back(states[t], states[t - 1], order, moving)
            moving = torch.zeros_like(moving) if pulled is None else pulled
            size = torch.linalg.vector_norm(moving, dim=-1)
            moving = moving / size.clamp_min(_TINY)[:, None]
            sizes.append(size.log())
        logs[: len(sizes), v] = torch.stack(sizes).cumsum(0)
    return logs
