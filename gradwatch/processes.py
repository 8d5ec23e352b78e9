"""Which of the processes that train together this is."""

from __future__ import annotations

import os

import torch


def processes() -> int:
    """Return how many processes train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    return 1


def rank() -> int:
    """Return this process's rank, 0 where there is only one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdigit() else 0
