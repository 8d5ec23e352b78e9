"""Tensors of which each process holds a part: DTensors, as ``fully_shard`` leaves them.

Nothing here asks another process for anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gradwatch._torch import is_sharded


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one of some tensors is spread over processes."""
    return any(map(is_sharded, tensors))


def copies(tensor: Any) -> int:
    """Return how many processes hold the same part of a sharded tensor."""
    placed = enumerate(tensor.placements)
    return math.prod(tensor.device_mesh.size(d) for d, p in placed if p.is_replicate())
