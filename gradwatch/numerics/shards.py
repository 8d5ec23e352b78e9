"""Tensors of which each process holds a part: DTensors, as ``fully_shard`` leaves them.

Everything here but :func:`over_processes` looks at this process's own part alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwatch.numerics.norms import Norms


def is_sharded(tensor: Tensor | None) -> bool:
    """Tell whether a tensor is spread over processes."""
    return hasattr(tensor, "to_local")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one of some tensors is spread over processes."""
    return any(map(is_sharded, tensors))


def over_processes(like: Sequence[Tensor], rows: Sequence[Norms]) -> Tensor:
    """Return the norms of whole tensors; all processes of their mesh must come here.

    One collective for all tensors that are laid out alike.

    Args:
        like: Sharded tensors, none of them a sum that is still to be taken.
        rows: For each of several quantities its norm over this process's part of each
            tensor, as :func:`gradwatch.numerics.norms.norms` gives them.

    Returns:
        Shape ``(len(rows), len(like))``, in float64 (float32 on ``mps``), on the device
        of the mesh; the same on every process.
    """
    from torch.distributed.tensor import DTensor, Partial

    layouts: dict[Any, list[int]] = {}
    for i, tensor in enumerate(like):
        sharded: Any = tensor
        layouts.setdefault((sharded.device_mesh, sharded.placements), []).append(i)
    device = next(iter(layouts))[0].device_type
    wide = torch.float32 if device == "mps" else torch.float64
    own = torch.stack([torch.as_tensor(row).to(device, wide) for row in rows])
    whole = torch.empty_like(own)
    for (mesh, placements), index in layouts.items():
        copies = [mesh.size(d) for d, p in enumerate(placements) if p.is_replicate()]
        part = own[:, index].square() / math.prod(copies)
        summed = DTensor.from_local(part, mesh, [Partial()] * mesh.ndim)
        whole[:, index] = summed.full_tensor().sqrt()
    return whole
