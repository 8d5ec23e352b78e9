"""Gradients and weights of which each process holds a part: their norms of the whole.

This is the one place where gradwatch talks to other processes while they train, and
what may never happen is that one of them waits for good for another that does not come.
So:

- all processes agree in ``watch()``, where each is or is not; if one does not come,
  nothing is exchanged in this run;
- they then meet in a process group of their own, over the host, whose waiting has an
  end; whoever has waited in vain meets nobody again;
- when they meet is decided by counting the steps of an optimizer, by nothing else, and
  the counts are compared at each meeting;
- whoever has failed, or is closed, comes all the same, and says so.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import _torch
from gradwatch.health import Health
from gradwatch.hooks import every_step
from gradwatch.numerics.norms import Norms, norms
from gradwatch.numerics.shards import copies
from gradwatch.recurrent import Recurrence

_EACH_UNTIL: Final = 16
_THEN_EVERY: Final = 8
_PATIENCE: Final = timedelta(seconds=10)
"""How long processes wait for each other, in ``watch()`` and at a meeting."""


def meets(step: int) -> bool:
    """Tell whether processes meet after an optimizer's step, counted from 0."""
    return step < _EACH_UNTIL or step % _THEN_EVERY == 0


class Left(NamedTuple):
    """What this process's backward has left of gradients.

    Attributes:
        params: Those that have one.
        norms: Of each, over this process's part.
        step: The number of the open step.
    """

    params: Sequence[Tensor]
    norms: Norms
    step: int


class Whole(NamedTuple):
    """Norms of whole tensors at one step of an optimizer.

    Attributes:
        params: What the optimizer holds that is sharded.
        left: Of the gradient of each, as backward left it.
        used: As the optimizer was given it.
        moved: Of the change of a recurrent weight, 0 for others.
        weight: Of a recurrent weight before it, 0 for others.
        step: The number of the open step.
    """

    params: list[Any]
    left: list[float]
    used: list[float]
    moved: list[float]
    weight: list[float]
    step: int


class Shards:
    """Meets the other processes of a watch; knows nothing where nothing is sharded.

    Args:
        model: The watched model; not kept alive.
        recurrences: Of it.
        health: Where failures are noted.
    """

    def __init__(
        self, model: nn.Module, recurrences: Iterable[Recurrence], health: Health
    ) -> None:
        self._guard = health.guard("shards")
        sharded: dict[str, Any] = {
            name: p for name, p in _torch.parameters(model) if _torch.is_sharded(p)
        }
        # By reference: another model's may have the id of one that is gone.
        self._own = {id(p): weakref.ref(p) for p in sharded.values()}
        self._names: dict[int, str] = {}
        for path, module in model.named_modules():
            for one in recurrences:
                name = f"{path}.weight_hh{one.suffix}".lstrip(".")
                if one.module is module and name in sharded:
                    self._names[id(sharded[name])] = one.stream.name
        self._steps: weakref.WeakKeyDictionary[Optimizer, int]
        self._steps = weakref.WeakKeyDictionary()
        self._stepping: weakref.ref[Optimizer] | None = None
        self._params: list[Any] = []
        self._before: dict[int, Tensor] = {}
        self._found: list[Whole] = []
        self._groups: list[tuple[Any, Any]] = []
        self._closed = False
        self.why_not = "they were sharded after watch()"
        """Why processes do not meet; empty where they do."""
        if sharded:
            self.why_not = "not every process has called watch()"
            meshes = list(dict.fromkeys(p.device_mesh for p in sharded.values()))
            key = repr([(name, tuple(p.shape)) for name, p in sharded.items()])
            if all([_agree(mesh, key) for mesh in meshes]):  # each of them is asked
                self._groups = [(mesh, _group(mesh)) for mesh in meshes]
                self.why_not = ""

    def listen(self) -> None:
        """Hear of optimizers' steps; after all others who hear of them."""
        if not self.why_not:
            every_step.add(self)

    @property
    def any(self) -> bool:
        """Whether any parameter of the model was sharded when it was watched."""
        return bool(self._own)

    @property
    def note(self) -> str:
        """What is measured of sharded weights, and what is not."""
        if self.why_not:
            return f"weights are sharded: no gradient norms, as {self.why_not}"
        each = f"every {_THEN_EVERY}th step of an optimizer"
        return f"weights are sharded: gradient norms at {each}, no rho_drift"

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
        groups, self._groups = self._groups, []
        for _, group in groups:
            with self._guard:
                dist.destroy_process_group(group)

    # ---- the steps of optimizers, which every process counts alike

    def begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Remember recurrent weights, where processes meet after this step."""
        self._stepping = None
        params = [p for g in optimizer.param_groups for p in g["params"]]
        params = [p for p in params if id(p) in self._own and self._own[id(p)]() is p]
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
        before, self._before = self._before, {}
        count = self._steps[optimizer] if optimizer is not None else 0
        rows = [[0.0] * len(params)] * 4
        told = False
        if left is not None and not self._closed:
            with self._guard, torch.no_grad():
                rows = _rows(params, left, before)
                told = True
        whole: list[list[float]] = [[0.0] * len(params) for _ in rows]
        all_told = True
        for mesh, group in self._groups:
            index = [i for i, p in enumerate(params) if p.device_mesh == mesh]
            if not index:
                continue
            # Not by **, which raises where a square is too large for a float.
            own = [[row[i] * row[i] / copies(params[i]) for i in index] for row in rows]
            flags = [1.0, float(told), float(self._closed), count, count**2]
            sums: list[float] = []
            with self._guard:
                sent = torch.tensor([*chain(*own), *flags], dtype=torch.float64)
                dist.all_reduce(sent, group=group)
                sums = sent.tolist()
            if not sums:
                self._stop("another process did not come")
                return
            *found, there, told_by, gone, counts, squares = sums
            # What follows is the same on every process, as these numbers are.
            if gone:
                self._stop("the watch of a process is closed")
                return
            if there * squares != counts**2:
                self._stop("the processes do not step alike")
                return
            all_told = all_told and told_by == there
            for k, row in enumerate(whole):
                for i, value in zip(index, found[k * len(index) :], strict=False):
                    row[i] = value**0.5
        if all_told and left is not None:
            seen, used, moved, weight = whole
            self._found.append(Whole(params, seen, used, moved, weight, left.step))

    def take(self, step: int) -> list[Whole]:
        """Return what was exchanged in a step that is over; forget all else."""
        found, self._found = self._found, []
        return [one for one in found if one.step == step]

    def name(self, param: Tensor) -> str | None:
        """Return the stream whose recurrent weight this is; None for others."""
        return self._names.get(id(param))


_LEAVING: Final[set[Shards]] = set()
"""Closed ones, which the other processes will meet once more."""
_ASKED: Final[dict[str, int]] = {}
"""How often the processes of a mesh were asked whether they all watch a model."""


def _rows(
    params: Sequence[Any], left: Left, before: dict[int, Tensor]
) -> list[list[float]]:
    """Return the norms of this process's parts, as :class:`Whole` has them."""
    size = len(params)
    used = [(i, p.grad) for i, p in enumerate(params) if p.grad is not None]
    at = dict(zip(map(id, left.params), _floats(left.norms), strict=True))
    index = [i for i, p in enumerate(params) if id(p) in before]
    old = [before[id(params[i])] for i in index]
    now = [params[i].to_local() for i in index]
    change = [a - b for a, b in zip(now, old, strict=True)]
    return [
        [at.get(id(p), 0.0) for p in params],
        _spread([g for _, g in used], [i for i, _ in used], size),
        _spread(change, index, size),
        _spread(old, index, size),
    ]


def _spread(tensors: list[Tensor], index: Sequence[int], size: int) -> list[float]:
    """Return the norms of tensors in their places among zeros."""
    row = [0.0] * size
    if tensors:
        for i, value in zip(index, _floats(norms(tensors)), strict=True):
            row[i] = value
    return row


def _floats(read: Norms) -> list[float]:
    values: list[float] = read if isinstance(read, list) else read.tolist()
    return values


def _agree(mesh: Any, model: str) -> bool:
    """Ask whether all processes of a mesh call ``watch()`` on this model now.

    The last one to come says yes for all; the first to lose patience says no for all.
    """
    store = _torch.store()
    if store is None:
        return False
    ranks = mesh.mesh.flatten().tolist()
    group = f"gradwatch/{zlib.crc32(repr((ranks, model)).encode()):x}-{len(ranks)}"
    number = _ASKED[group] = _ASKED.get(group, 0) + 1
    answer = f"{group}/{number}/answer"
    if store.add(f"{group}/{number}/came", 1) == len(ranks):
        store.compare_set(answer, "", "yes")
    try:
        store.wait([answer], _PATIENCE)
    except RuntimeError:  # torch.distributed.DistStoreError: nobody has answered
        store.compare_set(answer, "", "no")
    return bool(store.get(answer) == b"yes")


def _group(mesh: Any) -> Any:
    """Return a group of the processes of a mesh, which none of their own work uses."""
    return dist.new_group(
        sorted(mesh.mesh.flatten().tolist()),
        timeout=_PATIENCE,
        backend="gloo",
        use_local_synchronization=True,
    )
