"""Which of the processes that train together this is, and how they share a model."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import torch
from torch import nn

from gradwatch import _torch

_FSDP: Final = "torch.distributed.fsdp"


def processes() -> int:
    """Return how many processes train together."""
    return int(torch.distributed.get_world_size()) if _initialised() else 1


def rank() -> int:
    """Return this process's rank, 0 where there is only one."""
    if _initialised():
        return int(torch.distributed.get_rank())
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdigit() else 0


def any_sharded(model: nn.Module) -> bool:
    """Tell whether a parameter of a model is spread over processes."""
    return bool(_sharded(model))


def _sharded(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the parameters that are spread over processes, with their names."""
    return [(n, p) for n, p in _torch.parameters(model) if _torch.is_sharded(p)]


def refuse_parts(
    model: object,
    *,
    recorder: bool = False,
    raising: bool = False,
    preflight: bool = False,
) -> None:
    """Refuse a model of which this process has a part that cannot be measured.

    What ``fully_shard`` shards can be: its weights are whole in each forward.

    Args:
        model: What is given as one.
        recorder: Whether its state is to be kept.
        raising: Whether an alarm is to end the training.
        preflight: Whether a copy of it is to be tried.

    Raises:
        ValueError: If the model is split in another way, by tensor or pipeline
            parallelism or by the older FullyShardedDataParallel; or if it is split, and
            something is asked for that one process alone cannot do.
    """
    if type(model).__module__.startswith("torch.distributed.pipelining"):
        raise ValueError(
            f"the model is a {type(model).__name__}: gradwatch does not measure a "
            "pipeline, as no process in it sees the whole of a step. Watch the model "
            "in a run that is not split."
        )
    if not isinstance(model, nn.Module):
        return
    fsdp: Any = sys.modules.get(_FSDP)
    sharded = _sharded(model)
    if fsdp is None and not sharded:
        return
    older = getattr(fsdp, "FullyShardedDataParallel", ())
    if any(isinstance(m, older) for m in model.modules()):
        raise ValueError(
            "the model is in a FullyShardedDataParallel, whose flat parameters "
            "gradwatch does not measure. Use torch.distributed.fsdp.fully_shard(model)."
        )
    if not sharded:
        return
    if recorder or preflight:
        asks = "recorder=" if recorder else "a preflight"
        raise ValueError(
            f"the model is sharded over processes, and {asks} needs the whole of it in "
            "one: use it in a run without fully_shard()."
        )
    if raising:
        raise ValueError(
            'the model is sharded over processes, and on_alert="raise" would raise in '
            "one of them and not in the others, which then wait for it. Give a "
            "function that notes the alarm, and end the training on all ranks together."
        )
    kind = getattr(fsdp, "FSDPModule", ())
    whole = any(isinstance(m, kind) for m in model.modules())
    for name, param in sharded:
        if not whole or sum(p.is_shard() for p in param.placements) > 1:
            raise ValueError(
                f"{name} is split over processes, and not by fully_shard alone: "
                "gradwatch does not measure tensor parallelism. Of a model that is "
                "sharded by fully_shard, watch the whole, not a part."
            )


def _initialised() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
