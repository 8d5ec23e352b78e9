"""Which operation of a forward, or of its backward, is the first that is not finite."""

from __future__ import annotations

import math
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradwatch.trees import tensors_in

_HERE: Final = str(Path(__file__).parents[1])
_TORCH: Final = str(Path(torch.__file__).parent)
_LIBRARY: Final = sysconfig.get_paths()["stdlib"]
_HALF: Final = (torch.float16, torch.bfloat16)
_OWN: Final = ("__get__", "__set__", "register_hook", "requires_grad_", "isfinite")
"""Functions that compute nothing."""


@dataclass(frozen=True)
class Operation:
    """One call of a function of torch.

    Attributes:
        name: Of the function, such as ``sqrt``.
        place: File and line of the caller, such as ``model.py:41``.
        module: Path of the module whose forward calls it; empty for none.
        got: What it was given where that explains it, such as ``0``; else empty.
        became: ``nan`` or ``inf``.
        dtype: Type of its result.
    """

    name: str
    place: str
    module: str
    got: str = ""
    became: str = ""
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """Return it as a person says it: ``sqrt at model.py:41 got 0``."""
        where = f" in {self.module}" if self.module else ""
        got = f" got {self.got}" if self.got else ""
        if self.dtype in _HALF and self.became == "inf":
            kind = str(self.dtype).removeprefix("torch.")
            return f"overflow in {kind}{where}: {self.name} at {self.place}{got}"
        return f"{self.name} at {self.place}{where}{got}"


@dataclass
class Traced:
    """What was seen of a forward and its backward.

    Attributes:
        forward: The operation that made the first NaN, or the Inf that it came of.
        infinite: The first operation that made an Inf of what was finite.
        backward: The operation whose backward made the first gradient not finite.
        nodes: Node of the graph -> the operation that made it.
    """

    forward: Operation | None = None
    infinite: Operation | None = None
    backward: Operation | None = None
    nodes: dict[Any, tuple[Operation, Sequence[Any]]] = field(default_factory=dict)


class _Seeing(TorchFunctionMode):
    """Looks at each call of a function of torch."""

    def __init__(self, traced: Traced, stack: list[str]) -> None:
        super().__init__()
        self._traced, self._stack = traced, stack

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name in _OWN:
            return result
        outputs = [t for t in tensors_in(result) if t.is_floating_point()]
        if outputs:
            self._look(name, [args, kwargs or {}], outputs)
        return result

    def _look(self, name: str, given: Any, outputs: Sequence[Tensor]) -> None:
        traced = self._traced
        inputs = [t for t in tensors_in(given) if t.is_floating_point()]
        said = Operation(
            name=name.strip("_"),
            place=_caller(),
            module=self._stack[-1] if self._stack else "",
            dtype=outputs[0].dtype,
        )
        for output in outputs:
            if output.grad_fn is not None and output.grad_fn not in traced.nodes:
                traced.nodes[output.grad_fn] = (said, [t.detach() for t in inputs])
        if traced.forward is not None:
            return
        for output in outputs:
            bad = ~output.detach().isfinite()
            if not bool(bad.any()):
                continue
            nan = bool(output.detach().isnan().any())
            clean = all(bool(t.detach().isfinite().all()) for t in inputs)
            if any(_is_infinite(v) for v in _numbers(given)) or not (clean or nan):
                continue
            if not clean and any(bool(t.detach().isnan().any()) for t in inputs):
                continue
            found = _with(said, got=_got(bad, inputs), became="nan" if nan else "inf")
            if nan and traced.infinite is None:
                traced.forward = found
            elif nan:
                traced.forward = traced.infinite
            elif traced.infinite is None:
                traced.infinite = found


def _with(operation: Operation, *, got: str, became: str) -> Operation:
    return Operation(
        name=operation.name,
        place=operation.place,
        module=operation.module,
        got=got,
        became=became,
        dtype=operation.dtype,
    )


def _numbers(value: Any) -> Iterator[float]:
    """Yield the plain numbers among the arguments of a call."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)


def _is_infinite(value: float) -> bool:
    return math.isinf(value)


def _got(bad: Tensor, inputs: Sequence[Tensor]) -> str:
    """Return the values that made the first bad entry, of inputs of the same shape."""
    place = tuple(bad.nonzero()[0].tolist())
    same = [t for t in inputs if t.shape == bad.shape]
    values = [f"{float(t.detach()[place]):.4g}" for t in same[:2]]
    return " and ".join(values)


def _caller() -> str:
    """Return file and line of the innermost frame of the user's own code."""
    frame = sys._getframe(2)
    fallback = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE)) and "<frozen" not in file:
            said = f"{os.path.basename(file)}:{frame.f_lineno}"
            if not file.startswith(_LIBRARY):
                return said
            fallback = fallback or said
        if frame.f_back is None:
            break
        frame = frame.f_back
    return fallback or "?"


@contextmanager
def tracing(model: nn.Module) -> Iterator[Traced]:
    """See each operation inside; which module calls it is told by hooks of its own.

    Args:
        model: A copy: it has hooks for as long as this lasts.

    Yields:
        What was seen, and is still added to.
    """
    stack: list[str] = []
    traced = Traced()

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(enter(name)))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        with _Seeing(traced, stack):
            yield traced


def backward_of(
    roots: Sequence[Tensor], grads: Sequence[Tensor | None], traced: Traced
) -> None:
    """Run backward, and note the first operation whose gradient is not finite.

    Args:
        roots: Where it begins.
        grads: The gradient of each; None for the loss itself.
        traced: What was seen of the forward; is added to.
    """
    users: dict[Any, Any] = {}
    handles = []

    def look(node: Any) -> Callable[..., None]:
        def seen(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            if traced.backward is not None:
                return
            if _all_finite(outputs) and not _all_finite(inputs):
                traced.backward = _operation(node, users, traced, inputs)

        return seen

    for node in _nodes([r.grad_fn for r in roots if r.grad_fn is not None], users):
        if node.name() != "torch::autograd::AccumulateGrad":
            handles.append(node.register_hook(look(node)))
    try:
        torch.autograd.backward(list(roots), list(grads))
    finally:
        for handle in handles:
            handle.remove()


def _nodes(first: Sequence[Any], users: dict[Any, Any]) -> Iterator[Any]:
    """Yield every node of a graph; note for each one that uses it."""
    todo, seen = list(first), set(first)
    while todo:
        node = todo.pop()
        yield node
        for inner, _ in node.next_functions:
            if inner is not None and inner not in seen:
                users[inner] = node
                seen.add(inner)
                todo.append(inner)


def _all_finite(values: Sequence[Any]) -> bool:
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor))


def _operation(
    node: Any, users: dict[Any, Any], traced: Traced, grads: Sequence[Any]
) -> Operation:
    """Return the operation whose backward a node is: its own, or what it is part of."""
    at = node
    while at is not None and at not in traced.nodes:
        at = users.get(at)
    if at is None:
        return Operation(
            name=node.name().removesuffix("Backward0"), place="?", module=""
        )
    said, inputs = traced.nodes[at]
    got, became = "", "nan"
    for grad in grads:
        if isinstance(grad, Tensor) and not bool(grad.isfinite().all()):
            got = _got(~grad.isfinite(), inputs)
            became = "nan" if bool(grad.isnan().any()) else "inf"
            break
    return _with(said, got=got, became=became)
