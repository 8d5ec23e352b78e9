"""The parameters of the watched model: their hooks, and the gradients that they hold.

Which backward goes on with a step, and which gradients were thrown away, is told from
the gradients' identity and version: what is seen here is one gradient beside another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gradwatch import _torch
from gradwatch.hooks.listener import Listener, Quick, nobody
from gradwatch.recurrent import clean_path

Seen = tuple[weakref.ref[Tensor], int]
"""A gradient and its version, as they were when last looked at."""


@dataclass(slots=True)
class Passing:
    """The backward pass that began last, and where it has come by so far.

    Attributes:
        order: The parameters, until it has ended: its hooks hold them here.
        quick: Who may take it before it is reported; not kept alive.
    """

    task: int = -1
    order: list[Tensor] = field(default_factory=list)
    quick: Callable[[], Quick | None] = nobody


class ParameterHooks:
    """Owns the hooks of a model's parameters.

    Args:
        model: The watched model; not kept alive.
        listener: Whom the first gradient of a backward pass is reported to; not kept
            alive either.
    """

    def __init__(self, model: nn.Module, listener: Listener) -> None:
        self.names: list[str] = []
        self.params: list[nn.Parameter] = []
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self.passing = Passing()
        self._arrived: list[Tensor] = []
        self._trigger = self._hook(listener)
        self._hooks: list[Any] = []
        self._index: dict[int, int] = {}
        self._seen: dict[int, Seen] = {}
        self._used: dict[int, tuple[int, Callable[[], Tensor | None], int]] = {}
        self.rescan()

    @property
    def model(self) -> nn.Module | None:
        """The watched model, while it lives."""
        return self._model()

    def rescan(self) -> bool:
        """Look for the model's parameters again; tell whether they have changed."""
        model = self.model
        if model is None:
            return False
        named = [(n, p) for n, p in _torch.parameters(model) if p.requires_grad]
        params, names = [p for _, p in named], [clean_path(n) for n, _ in named]
        if names == self.names and all(
            a is b for a, b in zip(params, self.params, strict=True)
        ):
            return False
        self._remove_hooks()
        some_stay = any(id(p) in self._index for p in params)
        self.names, self.params = names, params
        self._index = {id(p): i for i, p in enumerate(params)}
        self._seen, self._used = {}, {}
        if some_stay:  # the last backward was seen: it brought the others theirs too
            self.note(*self.gradients())
        try:
            for param in params:
                hook = param.register_post_accumulate_grad_hook(self._trigger)
                self._hooks.append(hook)
        except BaseException:
            self._remove_hooks()
            raise
        return True

    def close(self) -> None:
        """Take the hooks off and let go of everything. Safe to call twice."""
        self._remove_hooks()
        self._model = _nothing  # no rescan, whoever still reports
        self.params, self._arrived = [], []
        self.passing.order, self.passing.quick = [], nobody
        self._seen, self._used = {}, {}

    def _remove_hooks(self) -> None:
        hooks, self._hooks = self._hooks, []
        with ExitStack() as each:
            for hook in hooks:
                each.callback(hook.remove)

    def _hook(self, listener: Listener) -> Callable[[Tensor], None]:
        """Return the hook of a parameter; it runs once a parameter and pass."""
        ref, passing = weakref.ref(listener), self.passing
        first = _torch.OutOfGraphs(type(listener).on_gradient)
        current = _torch.graph_task_id

        def hook(param: Tensor) -> None:
            try:
                task = current()
                # The task's number, not a flag: an exception in backward leaves it set.
                if task == passing.task and task != -1:
                    passing.order.append(param)
                    return
            except Exception as error:
                if (told := ref()) is not None:
                    told.failed(error)
                return
            passing.task, passing.order = task, [param]
            quick = passing.quick()
            usable = quick is not None and _torch.compiler() is None
            if usable and quick is not None and quick.begins(task, param):
                return
            if (told := ref()) is not None:
                first(told, task, param)

        return hook

    def connect(self, quick: Quick) -> None:
        """Have somebody take what need not be reported; not kept alive."""
        self.passing.quick = weakref.ref(quick)

    def begin(self, task: int) -> None:
        """Note that a backward pass has begun."""
        self.passing.task, self.passing.order = task, []

    def index(self, param: Tensor) -> int:
        """Return the place of a parameter; -1 where it is not watched."""
        return self._index.get(id(param), -1)

    def among(self, params: Iterable[Tensor]) -> list[int]:
        """Return the places of those parameters that are watched."""
        return [self._index[id(p)] for p in params if id(p) in self._index]

    # ---- gradients

    def gradients(self) -> tuple[list[int], list[Tensor]]:
        """Return the places of the parameters that have a gradient, and these."""
        live: list[int] = []
        grads: list[Tensor] = []
        for i, param in enumerate(self.params):
            grad = param.grad
            if grad is not None:
                live.append(i)
                grads.append(grad)
        return live, grads

    def of(self, index: Iterable[int]) -> tuple[list[int], list[Tensor]]:
        """Return the same for some of the places."""
        found = [(i, self.params[i].grad) for i in index]
        there = [(i, g) for i, g in found if g is not None]
        return [i for i, _ in there], [g for _, g in there]

    def note(self, live: list[int], grads: list[Tensor]) -> None:
        """Note the gradients as a backward pass leaves them."""
        self._seen = {
            i: (weakref.ref(g), g._version) for i, g in zip(live, grads, strict=True)
        }

    def noted(
        self,
        live: list[int],
        refs: list[weakref.ref[Tensor]],
        versions: list[int],
    ) -> None:
        """The same, where somebody else has noted them."""
        pairs = zip(refs, versions, strict=True)
        self._seen = dict(zip(live, pairs, strict=True))

    def kept(self, param: Tensor) -> bool | None:
        """Tell whether a gradient that was just added to is the one that was noted.

        Adding to it writes it once, zeroing it before that a second time; so does a
        clip, which is then taken for zeroing.

        Returns:
            False where it is another object, or was written twice or more since; None
            where none was noted.
        """
        seen = self._seen.get(self.index(param))
        if seen is None:
            return None
        grad = param.grad
        return grad is not None and seen[0]() is grad and grad._version < seen[1] + 2

    def all_kept(self) -> bool:
        """Tell whether no gradient that was noted has been thrown away since."""
        return all(self.kept(self.params[i]) is not False for i in self._seen)

    def all_gone(self, live: Iterable[int]) -> bool:
        """Tell whether these parameters have no gradient any more."""
        return all(self.params[i].grad is None for i in live)

    def untouched(self) -> bool:
        """Tell whether the gradients are exactly those that were noted."""
        seen = self._seen
        for i, param in enumerate(self.params):
            grad, noted = param.grad, seen.get(i)
            if grad is None or noted is None:
                if grad is not None or noted is not None:
                    return False
            elif grad._version != noted[1] or noted[0]() is not grad:
                return False
        return True

    def note_used(self, optimizer: int, held: Iterable[int]) -> None:
        """Note the first gradient that an optimizer holds as it leaves it."""
        for i in held:
            grad = self.params[i].grad
            if grad is not None:
                self._used[optimizer] = i, weakref.ref(grad), grad._version
                return

    def was_left(
        self, optimizer: int, left: tuple[int, weakref.ref[Tensor], int]
    ) -> None:
        """The same, where somebody else has noted it."""
        self._used[optimizer] = left

    def forget_used(self, optimizer: int) -> None:
        """Forget what an optimizer has used that is no more."""
        self._used.pop(optimizer, None)

    def new(self, optimizer: int, held: Iterable[int]) -> bool:
        """Tell whether an optimizer holds gradients that no step has had.

        They are new where they are other objects than those that were noted last, or
        where it has used them, and they were written but not noted since.
        """
        i, ref, version = self._used.get(optimizer, (-1, _nothing, 0))
        if i >= 0 and (grad := self.params[i].grad) is not None and ref() is grad:
            noted, at = self._seen.get(i, (_nothing, 0))
            was_noted = noted() is grad and at > version
            return bool(grad._version != version) and not was_noted
        live, grads = self.of(held)
        seen = [self._seen.get(i) for i in live]
        return any(
            was is None or was[0]() is not g for was, g in zip(seen, grads, strict=True)
        )

    def arrivals(self) -> list[int]:
        """Return the places of the parameters in the order backward came by them."""
        return self.among(self.passing.order or self._arrived)

    def ended(self) -> None:
        """Note that a pass has ended: its order is known to the hooks no more."""
        self._arrived, self.passing.order = self.passing.order, []


def _nothing() -> None:
    """Stand in for a reference to what was never there."""
