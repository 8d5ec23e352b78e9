"""The hooks on parameters and optimizers: gradient norms, and the clock.

Gradients are read at the end of backward, before clipping, and as each optimizer is
about to use them, after clipping. A step opens at the first backward after the last
step and closes when the optimizers that stepped in the previous step have stepped, or
at the next backward. Which backward goes on with an open step, and which gradients
were thrown away, is told from the gradients' identity and version.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradwatch import _torch
from gradwatch.health import Guard
from gradwatch.observe.capture import Step
from gradwatch.observe.clearing import Clearing
from gradwatch.observe.measure import Norms, all_finite, joined, norms, over
from gradwatch.observe.optimizers import Held, Optimizers
from gradwatch.observe.weights import Changes
from gradwatch.recurrent import clean_path


class GradientTap:
    """Reads gradients and counts steps.

    Args:
        model: The watched model; not kept alive.
        weights: Name of a stream -> its plain W_hh, for the change of a step.
        on_backward: Called at the end of every backward with the step's number.
        on_step: Called when a step closes.
        on_return: Called as each optimizer hook returns; the only place to raise.
        refuse: Whether an optimizer is kept from using gradients that are not finite:
            its step then closes as skipped, and ``on_step`` is to raise. It costs one
            synchronisation a step on an accelerator.
        due: Tells whether the gradients of a step are read.
        guard: Absorbs and reports what fails in the tap's own work.
        scaler: The GradScaler, where the user passed it.
        start: Number of the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: Callable[[], dict[str, nn.Parameter]],
        on_backward: Callable[[int], None],
        on_step: Callable[[Step], None],
        on_return: Callable[[], None],
        refuse: bool = False,
        due: Callable[[int], bool],
        guard: Guard,
        scaler: Any = None,
        start: int = 0,
    ) -> None:
        self.number = start
        self.scaler = scaler
        self.names: list[str] = []
        self.closed = False
        self._model = weakref.ref(model)
        self._weights_of = weights
        self._on_backward, self._on_step = on_backward, on_step
        self._on_return = on_return
        self._refuse, self._due, self._guard = refuse, due, guard
        self._task = -1
        self._depth = self._outermost = 0
        self._any_optimizer = False
        self._any_step = False
        self._expected: set[int] = set()
        self._hooks: list[Any] = []
        self._params: list[nn.Parameter] = []
        self._optimizers = Optimizers((), Changes({}))
        self._clearing = Clearing()
        self._fresh()
        self.rescan()
        # The engine keeps the last callback until its next pass.
        self._ended = _weakly(self, "_end_of_backward")
        on_pre, on_post = _weakly(self, "_on_pre"), _weakly(self, "_on_post")
        self._on_last = _weakly(self, "_about_to_step")
        self._again: dict[int, Any] = {}
        self.global_hooks = [
            register_optimizer_step_pre_hook(on_pre),
            register_optimizer_step_post_hook(on_post),
        ]

    # ---- what is watched

    def rescan(self) -> None:
        """Look at the model's parameters anew; they may have been replaced."""
        model = self._model()
        if model is None:
            return
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        params, names = [p for _, p in named], [clean_path(n) for n, _ in named]
        if names == self.names and all(
            a is b for a, b in zip(params, self._params, strict=True)
        ):
            return
        for hook in self._hooks:
            hook.remove()
        self.names, self._params = names, params
        self._index = {id(p): i for i, p in enumerate(params)}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._changes = Changes(self._weights_of())
        known = self.optimizers()
        self._optimizers = Optimizers(params, self._changes)
        for optimizer in known:
            self._optimizers.look_up(optimizer)
        trigger = _trigger(self)
        self._hooks = [p.register_post_accumulate_grad_hook(trigger) for p in params]

    @property
    def open(self) -> bool:
        """Whether gradients wait for an optimizer."""
        return self._open

    def close(self) -> None:
        """Settle the open step and take every hook off. Safe to call twice."""
        if self.closed:
            return
        try:
            self.settle(final=True)
        finally:
            self.closed = True
            for hook in (*self._hooks, *self.global_hooks, *self._again.values()):
                hook.remove()
            self._hooks.clear()
            self._again.clear()
            self._clearing.close()
            self._params, self._seen = [], {}
            self._changes = Changes({})

    @property
    def upcoming(self) -> tuple[int, ...]:
        """The steps that a forward now may belong to."""
        return (self.number, self.number + 1) if self._open else (self.number,)

    def _fresh(self) -> None:
        """Forget the step that has closed."""
        self._open = False
        self._cleared: bool | None = None
        self._backwards = 0
        self._live: list[int] = []
        self._order: list[Tensor] = []
        self._pre: Norms | None = None
        self._scale: Tensor | None = None
        self._post: list[tuple[list[int], Norms]] = []
        self._moved: list[tuple[list[str], Norms, Norms]] = []
        self._stepped: set[int] = set()

    # ---- backward

    def _on_grad(self, task: int, param: Tensor) -> None:
        """The first gradient of a backward pass has been accumulated."""
        with self._guard:
            self._begin(task, param)

    def _begin(self, task: int, param: Tensor | None) -> None:
        """A backward pass has begun: go on with the open step, or open one."""
        # The task's number, not a flag: an exception in backward leaves it set.
        self._task = task
        if self._depth == 0 and self._open and self._goes_not_on(param):
            self.settle()
        if not self._open and param is not None:
            index = self._index.get(id(param), -1)
            self._cleared = self._clearing.begins(index, param.grad)
        self._open = True
        self._order = [] if param is None else [param]
        _torch.after_backward(self._ended)

    def _goes_not_on(self, param: Tensor | None) -> bool:
        """Tell whether a backward does not go on with the open step."""
        return bool(self._stepped) or (param is not None and self._thrown_away(param))

    def _thrown_away(self, param: Tensor) -> bool:
        seen = self._seen.get(self._index.get(id(param), -1))
        if seen is None:
            return False
        grad = param.grad
        return grad is None or seen[0]() is not grad or grad._version >= seen[1] + 2

    def _end_of_backward(self) -> None:
        if self.closed or self._guard.failed:
            return
        with self._guard:
            live, grads = self._gradients()
            if not grads:
                if self._post:  # the optimizers stepped inside backward
                    self._live = sorted(i for index, _ in self._post for i in index)
                    self._close(())
                return
            self._backwards += 1
            self._live = live
            self._seen = {
                i: (weakref.ref(g), g._version)
                for i, g in zip(live, grads, strict=True)
            }
            self._pre = None
            if self._due(self.number):
                self._pre = norms(grads)
                self._scale = _torch.loss_scale(self.scaler)
            self._on_backward(self.number)

    def _gradients(self) -> tuple[list[int], list[Tensor]]:
        """Return the parameters that have a gradient now, and the gradients."""
        live: list[int] = []
        grads: list[Tensor] = []
        for i, param in enumerate(self._params):
            grad = param.grad
            if grad is not None:
                live.append(i)
                grads.append(grad)
        return live, grads

    # ---- optimizers

    def _held(self, optimizer: Optimizer) -> Held:
        """Return what an optimizer holds of the watched parameters."""
        held = self._optimizers.known(optimizer)
        if held is None:
            held = self._optimizers.look_up(optimizer)
            if not held.params and held.size:
                self.rescan()  # its parameters may be new to us
                held = self._optimizers.look_up(optimizer)
            if held.params and self.scaler is None:
                self._find_scaler()
        return held

    def optimizers(self) -> list[Optimizer]:
        """Return the optimizers that have stepped and hold a watched parameter."""
        return self._optimizers.alive() if self._any_optimizer else []

    def optimized(self) -> dict[int, float] | None:
        """Return the learning rates of all parameters that known optimizers hold.

        An optimizer is known once it has stepped and holds a watched parameter.

        Returns:
            Id of a parameter -> its learning rate; None while no optimizer is known.
        """
        return self._optimizers.rates() if self._any_optimizer else None

    def _on_pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step; its own hooks, such as a clipper's, are next.

        Where it has some, we come again behind the last of them.
        """
        if self.closed or self._guard.failed:
            return
        with self._guard:
            self._come_no_more(optimizer)
            if _torch.has_pre_hooks(optimizer):
                again = optimizer.register_step_pre_hook(self._on_last)
                self._again[id(optimizer)] = again
                return
        self._about_to_step(optimizer, args, kwargs)

    def _come_no_more(self, optimizer: Optimizer) -> None:
        again = self._again.pop(id(optimizer), None)
        if again is not None:
            again.remove()

    def _about_to_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.closed or self._guard.failed:
            return
        with self._guard:
            held = self._held(optimizer)
            if not held.params:
                return
            self._any_optimizer = True
            if self._outermost == id(optimizer):
                self._depth = 0  # its last step did not return
            self._depth += 1
            if self._depth > 1:
                return  # ZeRO steps an optimizer inside: the outermost counts
            self._outermost = id(optimizer)
            task = _torch.graph_task_id()
            if task not in (-1, self._task):
                self._begin(task, None)  # it steps inside backward, before our hook
            if not self._open and id(optimizer) in self._expected:
                self._open = True  # it steps again, and we saw no backward
            closure = _closure(args, kwargs) is not None
            if not (self._open or closure) or not self._due(self.number):
                return
            self._changes.remember(held.moving)
            if closure:  # backward runs inside step()
                return
            if not self._backwards and task == -1:
                self._on_backward(self.number)  # its end was not called back
            self._read(optimizer, held.params)
            if self._refuse and not all(all_finite(read) for _, read in self._post):
                self._depth = 0
                self._close(("skipped_step",), by="refused")
        self._on_return()

    def _on_post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._come_no_more(optimizer)
        if self.closed or self._guard.failed:
            return
        with self._guard:
            held = self._held(optimizer)
            if not held.params:
                return
            self._depth = max(self._depth - 1, 0)
            if self._depth:
                return
            self._outermost = 0
            if not self._open:
                # Another optimizer after the close: the next step waits for it.
                self._expected.add(id(optimizer))
                return
            if self._due(self.number):
                if _closure(args, kwargs) is not None:
                    self._read(optimizer, held.params)
                if (moved := self._changes.compare()) is not None:
                    self._moved.append(moved)
            self._stepped.add(id(optimizer))
            if _torch.graph_task_id() == -1 and (
                self._expected <= self._stepped or id(optimizer) not in self._expected
            ):
                if self._refused():
                    self._close(("skipped_step",), by="clipper")
                else:
                    self._close(())
        self._on_return()

    def _refused(self) -> bool:
        """Tell whether a clipper took non-finite gradients away before the step."""
        if self._pre is None or self._post:
            return False
        gone = all(self._params[i].grad is None for i in self._live)
        return gone and not all_finite(self._pre)

    def _find_scaler(self) -> None:
        """Find the loss scaler whose call led to an optimizer's first step."""
        self.scaler = _torch.calling_scaler()
        if self.scaler is not None and self._pre is not None:
            self._scale = _torch.loss_scale(self.scaler)

    def _read(self, optimizer: Optimizer, held: list[int]) -> None:
        """Read the gradients that an optimizer is about to use."""
        index: Iterable[int] = held
        alone = not self._post and self._expected <= {id(optimizer)}
        if alone and _torch.graph_task_id() == -1:
            if self._pre is not None and self.scaler is None and self._untouched():
                self._post.append((self._live, self._pre))
                return
            index = range(len(self._params))  # parameters in no optimizer count too
        found = [(i, self._params[i].grad) for i in index]
        live = [(i, g) for i, g in found if g is not None]
        if not live:
            return
        read = norms([g for _, g in live])
        if (factor := getattr(optimizer, "grad_scale", None)) is not None:
            read = over(read, factor)  # a fused optimizer unscales by itself
        self._post.append(([i for i, _ in live], read))

    def _untouched(self) -> bool:
        """Tell whether the gradients are those that the end of backward read."""
        params = self._params
        for i, (ref, version) in self._seen.items():
            grad = params[i].grad
            if grad is None or grad._version != version or ref() is not grad:
                return False
        return True

    # ---- the end of a step

    def settle(self, final: bool = False) -> None:
        """Close the open step as the next backward would, or drop it.

        Args:
            final: Whether nothing more will come, so that what cannot be closed is
                dropped; else it stays open.
        """
        if not self._open:
            return
        if self._stepped:  # an optimizer that was expected never came
            self._close(())
        elif self._pre is not None and not all_finite(self._pre):
            by = "scaler" if self.scaler is not None else "user"
            if by == "user" and not self._any_step and not self._any_optimizer:
                by = "unknown"  # it may be a scaler's that nobody has named
            self._close(("skipped_step",), by=by)
        elif not self._any_optimizer and self._backwards:
            self._close(())  # hand-written updates: one backward, one step
        elif final or self._thrown_away_all():
            self._fresh()  # a finite gradient that was thrown away is not a step

    def _thrown_away_all(self) -> bool:
        return any(self._thrown_away(self._params[i]) for i in self._live)

    def finish_step(self) -> None:
        """Close the step by hand, or count one of which nothing was seen."""
        if not self._open or self._pre is None:
            self._live, grads = self._gradients()
            if grads:
                self._pre = norms(grads)
        self._close(())

    def _arrivals(self) -> list[int]:
        """Return the order in which backward came by, where someone may ask for it."""
        pre = self._pre
        if isinstance(pre, list) and math.isfinite(sum(pre)):
            return []
        return [self._index[id(p)] for p in self._order if id(p) in self._index]

    def _close(self, events: tuple[str, ...], by: str = "") -> None:
        idle = self._optimizers.idle(self._stepped)
        if not self._clearing.ends(self._params if self._stepped else (), idle):
            self._cleared = None
        step = Step(
            number=self.number,
            names=self.names,
            live=self._live,
            order=self._arrivals(),
            post_live=[i for index, _ in self._post for i in index],
            changed=[name for names, *_ in self._moved for name in names],
            events=events,
            idle=idle,
            cleared=self._cleared,
            skipped_by=by,
        )
        if self._pre is not None:
            step.numbers["pre"] = self._pre
        if self._scale is not None:
            step.numbers["scale"] = self._scale
        if self._post:
            step.numbers["post"] = joined([read for _, read in self._post])
        if self._moved:
            step.numbers["change"] = joined([change for _, change, _ in self._moved])
            step.numbers["weight"] = joined([weight for *_, weight in self._moved])
        if self._stepped:
            self._expected = self._stepped
        self._any_step = self._any_step or not by
        self.number += 1
        self._fresh()
        self._on_step(step)


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the closure given to ``step``; args[0] is the optimizer itself."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def _trigger(owner: GradientTap) -> Callable[[Tensor], None]:
    """Return the hook of a parameter; it runs once a parameter and backward pass."""
    ref, current = weakref.ref(owner), _torch.graph_task_id

    def hook(param: Tensor) -> None:
        tap = ref()
        if tap is None:
            return
        task = current()
        if task == tap._task and task != -1:
            tap._order.append(param)
        else:
            tap._on_grad(task, param)

    return hook


def _weakly(owner: GradientTap, name: str) -> Callable[..., None]:
    """Return a hook that does not keep the tap alive: torch's registries are global."""
    ref = weakref.ref(owner)

    def hook(*args: Any) -> None:
        tap = ref()
        if tap is not None:
            getattr(tap, name)(*args)

    return hook
