"""Norms of many tensors at once, on whatever device they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Norms = Tensor | list[float]
"""Norms on the device; where everything is on the CPU, floats at once."""


def norms(tensors: Sequence[Tensor]) -> Norms:
    """Return the L2 norm of each tensor, without waiting for the device.

    A norm that would overflow float32 does not: where the device has float64 it is
    accumulated there, on the CPU only for those that need it. A norm that is not finite
    therefore means a tensor that is not.

    Args:
        tensors: Gradients or weights: dense, sparse or sharded (then: of the local
            shard), of any dtype and on any devices. At least one.

    Returns:
        One norm a tensor: floats where all tensors are on the CPU, else a tensor of
        shape ``(len(tensors),)`` on the first tensor's device.
    """
    local, alike = [], True
    first = _local(tensors[0])
    device, dtype = first.device, first.dtype
    for tensor in tensors:  # no call for what is nearly always plain
        if type(tensor) is not Tensor or tensor.is_sparse or tensor.requires_grad:
            tensor = _local(tensor)
        local.append(tensor)
        alike = alike and tensor.device == device and tensor.dtype == dtype
    if alike:
        return _on_cpu(local) if device.type == "cpu" else _alike(local)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(local):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    if all(device.type == "cpu" for device, _ in groups):
        floats = [0.0] * len(local)
        for index in groups.values():
            for i, value in zip(index, _on_cpu([local[i] for i in index]), strict=True):
                floats[i] = value
        return floats
    wide = torch.float32 if device.type == "mps" else torch.float64
    result = torch.empty(len(local), dtype=wide, device=device)
    for index in groups.values():
        # No gather from the host: slots are filled one by one, on the device.
        for i, norm in zip(index, _alike([local[i] for i in index]), strict=True):
            result[i] = norm.to(device, wide, non_blocking=True)
    return result


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # a DTensor's own norm would be a collective
        tensor = tensor.to_local()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _alike(tensors: list[Tensor]) -> Tensor:
    if tensors[0].device.type == "mps":
        return torch.stack([n.float() for n in torch._foreach_norm(tensors)])
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float64))


def _on_cpu(tensors: list[Tensor]) -> list[float]:
    if tensors[0].dtype in (torch.float16, torch.bfloat16):
        tensors = [t.float() for t in tensors]
    read: list[float] = [norm.item() for norm in torch._foreach_norm(tensors)]
    for i, norm in enumerate(read):
        if norm == math.inf:  # overflow, or an Inf inside: float64 tells which
            read[i] = _in_float64(tensors[i])
    return read


def _in_float64(tensor: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if norm == math.inf and bool(torch.isfinite(tensor).all()):
        largest = tensor.abs().amax().double()
        scaled = torch.linalg.vector_norm(tensor / largest, dtype=torch.float64)
        return float(largest * scaled)
    return norm


def all_finite(read: Norms) -> bool:
    """Tell whether every norm is finite; on an accelerator this waits for it."""
    values = read if isinstance(read, list) else read.tolist()
    return all(map(math.isfinite, values))


def scaled_down(read: Norms, factor: Tensor) -> Norms:
    """Return norms over a factor of one element."""
    if isinstance(read, list):
        return [value / float(factor) for value in read]
    return read / factor.to(read.device)


def joined(reads: list[Norms]) -> Norms:
    """Return the norms of several reads in one; on the first device, if on any."""
    if len(reads) == 1:
        return reads[0]
    tensors = [r for r in reads if isinstance(r, Tensor)]
    if not tensors:
        return [value for read in reads if isinstance(read, list) for value in read]
    like = tensors[0]
    return torch.cat([torch.as_tensor(r).to(like) for r in reads])
