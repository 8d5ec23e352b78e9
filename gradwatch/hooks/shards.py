"""Gradients and weights of which each process holds a part: their norms of the whole.

This is the one place where gradwatch talks to other processes while they train, and
what may never happen is that one of them waits for another that does not come. So:

- all processes agree in ``watch()``, where each is or is not; if one does not come,
  none of them ever waits for it again, and nothing is measured of what is sharded;
- when they meet is decided by counting the steps of an optimizer, by nothing else;
- whoever has failed, or is closed, comes all the same, and says so.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch import _torch
from gradwatch.health import Health
from gradwatch.hooks import every_step
from gradwatch.numerics.norms import Norms, norms
from gradwatch.numerics.shards import is_sharded, over_processes
from gradwatch.recurrent import Recurrence, own_weight

_EACH_UNTIL: Final = 16
_THEN_EVERY: Final = 8
_PATIENCE: Final = timedelta(seconds=10)
"""How long processes wait for each other in ``watch()``."""


def meets(step: int) -> bool:
    """Tell whether processes meet after an optimizer's step, counted from 0."""
    return step < _EACH_UNTIL or step % _THEN_EVERY == 0


class Left(NamedTuple):
    """What this process's backward has left of gradients.

    Attributes:
        params: Those that have one.
        norms: Of each, over this process's part.
    """

    params: Sequence[Tensor]
    norms: Norms


class Whole(NamedTuple):
    """Norms of whole tensors at one step of an optimizer.

    Attributes:
        params: What the optimizer holds that is sharded, in the order of the columns.
        left: Of the gradients as backward left them; None where a process had not seen
            that.
        used: As the optimizer was given them.
        moved: Of the change of recurrent weights, 0 for others.
        weight: Of recurrent weights before it, 0 for others.
    """

    params: list[Any]
    left: Tensor | None
    used: Tensor
    moved: Tensor
    weight: Tensor


class Shards:
    """Meets the other processes of a watch; knows nothing where nothing is sharded.

    Args:
        recurrences: Of the model; not kept alive.
        health: Where failures are noted.
    """

    def __init__(self, recurrences: Iterable[Recurrence], health: Health) -> None:
        self._guard = health.guard("shards")
        self._names: dict[int, str] = {}
        mesh: Any = None
        for recurrence in recurrences:
            weight: Any = own_weight(recurrence)
            if is_sharded(weight):
                self._names[id(weight)] = recurrence.stream.name
                mesh = mesh or weight.device_mesh
        self._steps: weakref.WeakKeyDictionary[Optimizer, int]
        self._steps = weakref.WeakKeyDictionary()
        self._stepping: weakref.ref[Optimizer] | None = None
        self._params: list[Any] = []
        self._before: dict[int, Tensor] = {}
        self._found: list[Whole] = []
        self._closed = False
        self.why_not = "not every process has called watch()"
        """Why processes do not meet; empty where they do."""
        if mesh is not None and _agree(mesh):
            self.why_not = ""
            every_step.add(self)

    @property
    def note(self) -> str:
        """What is measured of sharded weights, and what is not."""
        if self.why_not:
            return f"its weights are sharded: no gradient norms, as {self.why_not}"
        each = f"every {_THEN_EVERY}th step"
        return f"its weights are sharded: gradient norms at {each}, no rho_drift"

    def close(self) -> None:
        """Meet the others once more, to tell them; let go of all else."""
        self._found.clear()
        if not self._closed and not self.why_not:
            _LEAVING.add(self)
        self._closed = True

    def _stop(self, why: str) -> None:
        self.why_not = why
        self._found.clear()
        every_step.remove(self)
        _LEAVING.discard(self)

    # ---- the steps of optimizers, which every process counts alike

    def begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Remember recurrent weights, where processes meet after this step."""
        self._stepping = None
        params = [p for g in optimizer.param_groups for p in g["params"]]
        params = [p for p in params if is_sharded(p)]
        if not params:
            return
        step = self._steps.get(optimizer, 0)
        self._steps[optimizer] = step + 1
        if not meets(step):
            return
        self._stepping, self._params, self._before = weakref.ref(optimizer), params, {}
        if not self._closed:
            with self._guard, torch.no_grad():
                own = [p for p in params if id(p) in self._names]
                self._before = {id(p): p.to_local().clone() for p in own}

    def ended(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Meet the others, where nobody has done so in the meantime."""
        self.meet(optimizer, None)

    def meet(self, optimizer: Optimizer | None, left: Left | None) -> None:
        """Exchange what was measured of a step, if processes meet after it.

        Args:
            optimizer: Has just stepped.
            left: What backward left; None where this process has not seen it.
        """
        if self._stepping is None or self._stepping() is not optimizer:
            return
        params, self._params, self._stepping = self._params, [], None
        nothing = [0.0] * len(params)
        rows: list[Norms] = [nothing] * 4
        failed, before = not self._closed, self._before
        self._before = {}
        if not self._closed:
            with self._guard, torch.no_grad():
                rows = _rows(params, left, before)
                failed = False
        unseen, going, bad = (
            [float(flag)] * len(params) for flag in (left is None, self._closed, failed)
        )
        table: Tensor | None = None
        with self._guard, torch.no_grad():
            table = over_processes(params, [*rows, unseen, going, bad])
        if table is None:
            self._stop("another process did not answer")
            return
        *found, unseen_by, gone, failed_at = table
        # What follows is the same on every process, as these numbers are.
        if bool(gone[0] > 0):
            self._stop("the watch of a process is closed")
        elif not bool(failed_at[0] > 0):
            seen = not bool(unseen_by[0] > 0)
            self._found.append(Whole(params, found[0] if seen else None, *found[1:]))

    def take(self) -> list[Whole]:
        """Return what was exchanged since the last time."""
        found, self._found = self._found, []
        return found

    def name(self, param: Tensor) -> str | None:
        """Return the stream whose recurrent weight this is; None for others."""
        return self._names.get(id(param))


_LEAVING: Final[set[Shards]] = set()
"""Closed ones, which the other processes will meet once more."""
_AGREED: Final[dict[str, int]] = {}
"""How often processes of a mesh were asked whether they all watch, by its ranks."""


def _rows(
    params: Sequence[Any], left: Left | None, before: dict[int, Tensor]
) -> list[Norms]:
    """Return the norms of this process's parts, as :class:`Whole` has them."""
    grads = [(i, p.grad) for i, p in enumerate(params) if p.grad is not None]
    used = _spread(norms([g for _, g in grads]), [i for i, _ in grads], len(params))
    seen: Norms = [0.0] * len(params)
    if left is not None:
        at = {id(p): k for k, p in enumerate(left.params)}
        own = [(i, at[id(p)]) for i, p in enumerate(params) if id(p) in at]
        read = torch.as_tensor(left.norms)[[k for _, k in own]]
        seen = _spread(read, [i for i, _ in own], len(params))
    index = [i for i, p in enumerate(params) if id(p) in before]
    old = [before[id(params[i])] for i in index]
    new = [params[i].to_local() for i in index]
    change = norms([a - b for a, b in zip(new, old, strict=True)])
    moved = _spread(change, index, len(params))
    return [seen, used, moved, _spread(norms(old), index, len(params))]


def _spread(values: Norms, index: Sequence[int], size: int) -> Tensor:
    """Return values in their places among zeros."""
    read = torch.as_tensor(values)
    row = torch.zeros(size, dtype=torch.float64, device=read.device)
    row[list(index)] = read.to(row.dtype)
    return row


def _agree(mesh: Any) -> bool:
    """Ask whether all processes of a mesh call ``watch()`` now.

    The last one to come says yes for all; the first to lose patience says no for all.
    """
    store = _torch.store()
    if store is None:
        return False
    ranks = mesh.mesh.flatten().tolist()
    group = f"gradwatch/{len(ranks)}-{zlib.crc32(repr(ranks).encode()):x}"
    number = _AGREED[group] = _AGREED.get(group, 0) + 1
    answer = f"{group}/{number}/answer"
    if store.add(f"{group}/{number}/came", 1) == len(ranks):
        store.compare_set(answer, "", "yes")
    try:
        store.wait([answer], _PATIENCE)
    except RuntimeError:  # torch.distributed.DistStoreError: nobody has answered
        store.compare_set(answer, "", "no")
    return bool(store.get(answer) == b"yes")
