"""Which of the processes that train together this is."""

from __future__ import annotations

import os

import torch


def processes() -> int:
    """Return how many processes train together."""
    return int(torch.distributed.get_world_size()) if _initialised() else 1


def rank() -> int:
    """Return this process's rank, 0 where there is only one."""
    if _initialised():
        return int(torch.distributed.get_rank())
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdigit() else 0


def _initialised() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
