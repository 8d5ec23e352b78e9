"""The gradients that a clipper is given: their names, norms, and scaling in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.numerics.norms import norms

Name = str | int
"""Name of a parameter, or its position where it has none."""

Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


class Held(NamedTuple):
    """A parameter that has a gradient.

    Attributes:
        name: Its name, or its position among those given.
        param: The parameter.
        grad: Its gradient, as the optimizer will see it.
    """

    name: Name
    param: Tensor
    grad: Tensor


def with_gradient(parameters: Iterable[tuple[Name, Tensor]]) -> list[Held]:
    """Return the named parameters that have a gradient, each once."""
    found: list[Held] = []
    seen: set[int] = set()
    for name, param in parameters:
        grad = param.grad
        if grad is not None and id(param) not in seen:
            seen.add(id(param))
            found.append(Held(name, param, grad))
    return found


def named(parameters: Parameters) -> Iterator[tuple[Name, Tensor]]:
    """Name parameters: by their names where given, else by their positions.

    Yields:
        Pairs of name and parameter.

    Raises:
        TypeError: If it is neither parameters nor ``(name, parameter)`` pairs.
    """
    if isinstance(parameters, nn.Module):
        raise TypeError(
            f"got a {type(parameters).__name__}; expected its parameters: "
            "model.parameters() or model.named_parameters()."
        )
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(
            f"got a {type(parameters).__name__}; expected parameters, such as "
            "model.parameters()."
        )
    for position, item in enumerate(parameters):
        if isinstance(item, Tensor):
            yield position, item
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            yield str(item[0]), item[1]
        else:
            raise TypeError(
                f"got {type(item).__name__} at position {position}; expected "
                "parameters, or pairs of a name and a parameter."
            )


def of_optimizer(optimizer: Optimizer) -> list[tuple[Name, Tensor]]:
    """Return an optimizer's parameters, with their names where it knows them."""
    groups = optimizer.param_groups
    if groups and all("param_names" in group for group in groups):
        pairs = [
            zip(g["param_names"], g["params"], strict=True)  # since torch 2.6
            for g in groups
        ]
        return [pair for group in pairs for pair in group]
    return list(enumerate(p for group in groups for p in group["params"]))


def norms_on_host(grads: Sequence[Tensor]) -> list[float]:
    """Return the norm of each gradient; on an accelerator this waits once.

    No norm overflows: one that is not finite means a gradient that is not. Of a sharded
    gradient it is the norm of the whole, for which all processes must come here.
    """
    if not grads:
        return []
    read = norms(grads)
    values: list[float] = read if isinstance(read, list) else read.tolist()
    shards = [i for i, grad in enumerate(grads) if hasattr(grad, "placements")]
    return _over_processes(grads, values, shards) if shards else values


def _over_processes(
    grads: Sequence[Tensor], values: list[float], shards: Sequence[int]
) -> list[float]:
    """Join the norms of shards; one collective for all that are laid out alike."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    alike: dict[Any, list[int]] = {}
    for i in shards:
        grad: Any = grads[i]
        if any(placement.is_partial() for placement in grad.placements):
            values[i] = norms_on_host([grad.full_tensor()])[0]
        else:
            alike.setdefault((grad.device_mesh, grad.placements), []).append(i)
    for (mesh, placements), index in alike.items():
        device = mesh.device_type
        wide = torch.float32 if device == "mps" else torch.float64
        own = torch.tensor([values[i] for i in index], dtype=wide, device=device)
        summed = [Partial() if p.is_shard() else Replicate() for p in placements]
        whole = DTensor.from_local(own.square(), mesh, summed).full_tensor().sqrt()
        for i, value in zip(index, whole.tolist(), strict=True):
            values[i] = value
    return values


def scale_(grads: Sequence[Tensor], factor: float) -> None:
    """Multiply gradients in place, whatever their layout, dtype and device."""
    dense = []
    with torch.no_grad():
        for grad in grads:
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            if local.layout != torch.strided:
                local.mul_(factor)
            elif local.dtype in (torch.float16, torch.bfloat16):
                local.copy_(local.float().mul_(factor))  # which would round the factor
            else:
                dense.append(local)
        if dense and factor < _SMALL:  # below, float32 loses the factor
            torch._foreach_mul_(dense, factor**0.5)
            factor = factor**0.5
        if dense:
            torch._foreach_mul_(dense, factor)


_SMALL = 1e-30
