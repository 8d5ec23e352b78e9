"""The optimizers of the watched parameters: their steps, and who holds what."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from gradwatch import _torch
from gradwatch.health import Guard
from gradwatch.hooks import every_step
from gradwatch.hooks.listener import Listener, Quick, nobody
from gradwatch.hooks.parameters import ParameterHooks


class Held(NamedTuple):
    """What an optimizer holds of the watched parameters.

    Attributes:
        number: By which it is told apart; never given to another one.
        size: How many parameters it had when this was looked up.
        optimizer: The optimizer, not kept alive.
        params: Places of the watched parameters that it holds.
        frozen: Parameters that it holds and that cannot learn, not kept alive.
    """

    number: int
    size: int
    optimizer: weakref.ref[Optimizer]
    params: list[int]
    frozen: list[weakref.ref[Tensor]]

    def has_thawed(self) -> bool:
        """Tell whether one of those that could not learn can by now."""
        return any((p := ref()) is not None and p.requires_grad for ref in self.frozen)


class Training(NamedTuple):
    """How the watched parameters are trained.

    Attributes:
        rates: Id of a parameter that an optimizer holds -> its learning rate; NaN where
            reading it would wait.
        groups: The options of each group of parameters, by the optimizer's class.
        unheld: Names of parameters that have a gradient, and that none of them holds.
    """

    rates: Mapping[int, float]
    groups: Mapping[str, Mapping[str, Any]]
    unheld: tuple[str, ...]


_JUMP: Final = 3.0
"""Factor by which a learning rate has to change between two steps to be told of."""


class OptimizerHooks:
    """Hears of every optimizer's step, and knows those that hold watched parameters.

    Args:
        parameters: The watched parameters.
        listener: Whom steps are reported to; not kept alive.
        guard: Absorbs and reports what fails in the hooks' own work.
    """

    def __init__(
        self, parameters: ParameterHooks, listener: Listener, guard: Guard
    ) -> None:
        self._parameters, self._guard = parameters, guard
        self._known: dict[int, Held] = {}
        self._idle: dict[frozenset[int], frozenset[int]] = {}
        self._rates: weakref.WeakKeyDictionary[Optimizer, list[float]]
        self._rates = weakref.WeakKeyDictionary()
        self._next = 0
        self._alone: dict[int, int] = {}
        self.replaced: list[int] = []
        """Numbers of those that were freed, or whose place another one has taken."""
        self._quick: Callable[[], Quick | None] = nobody
        self._again: dict[int, Any] = {}
        self._last = _last(listener)
        self._listener = weakref.ref(listener)
        every_step.add(self)

    def close(self) -> None:
        """Hear of no more steps. Safe to call twice."""
        every_step.remove(self)
        self._quick = nobody
        for hook in self._again.values():
            hook.remove()
        self._again.clear()

    def connect(self, quick: Quick) -> None:
        """Have somebody take what need not be reported; not kept alive."""
        self._quick = weakref.ref(quick)

    # ---- what every optimizer's step reports

    def begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer steps; its own hooks, such as a clipper's, come after this."""
        quick = self._quick()
        plain = quick is not None and len(args) == 1 and not kwargs
        if plain and quick is not None and quick.uses(optimizer, quickly=True):
            return
        others = self._again or _torch.has_pre_hooks(optimizer)
        if others and self._come_again(optimizer):
            return
        self._last(optimizer, args, kwargs)

    def _come_again(self, optimizer: Optimizer) -> bool:
        """Put a hook behind an optimizer's own, if it has some."""
        with self._guard:
            self._come_no_more(optimizer)
            if _torch.has_pre_hooks(optimizer):
                again = optimizer.register_step_pre_hook(self._last)
                self._again[id(optimizer)] = again
                return True
        return False

    def _come_no_more(self, optimizer: Optimizer) -> None:
        """Take that hook off."""
        again = self._again.pop(id(optimizer), None)
        if again is not None:
            again.remove()

    def ended(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer has stepped."""
        quick = self._quick()
        if quick is not None and quick.stepped(optimizer, quickly=True):
            return
        if self._again:
            with self._guard:
                self._come_no_more(optimizer)
        told = self._listener()
        if told is not None:
            more = len(args) > 1 or kwargs
            told.after_optimizer(optimizer, bool(more) and _closure(args, kwargs))

    # ---- who holds what

    def known(self, optimizer: Optimizer) -> Held | None:
        """Return what was looked up, unless it is plainly something else by now."""
        size = 0
        for group in optimizer.param_groups:
            size += len(group["params"])
        held = self._known.get(id(optimizer))
        if held is None or held.size != size or held.optimizer() is not optimizer:
            return None
        return None if held.frozen and held.has_thawed() else held

    def look_up(self, optimizer: Optimizer) -> tuple[Held, bool]:
        """Look up what an optimizer holds; note those whose place it takes.

        Returns:
            What it holds, and whether it trains parameters that are not watched.
        """
        params = [p for group in optimizer.param_groups for p in group["params"]]
        index = self._parameters.among(params)
        before, number = self._known.get(id(optimizer)), self._next
        is_new = before is None or before.optimizer() is not optimizer
        if before is not None and is_new:
            self.replaced.append(before.number)
        elif before is not None:
            number = before.number
        frozen = [weakref.ref(p) for p in params if not p.requires_grad]
        held = Held(number, len(params), weakref.ref(optimizer), index, frozen)
        self._known[id(optimizer)] = held
        if is_new:
            self._next += 1
            self._note_replaced(held)
        self._idle.clear()
        place = self._parameters.index
        return held, any(p.requires_grad and place(p) < 0 for p in params)

    def look_up_again(self) -> None:
        """Look all of them up again: the watched parameters have changed."""
        for held in list(self._known.values()):
            optimizer = held.optimizer()
            if optimizer is not None:
                self.look_up(optimizer)

    def _note_replaced(self, new: Held) -> None:
        """Note those that were freed, or hold nothing that a new one does not."""
        params = set(new.params)
        for place, held in list(self._known.items()):
            if held.optimizer() is None:
                del self._known[place]
                self.replaced.append(held.number)
            elif held.number != new.number and params.issuperset(held.params):
                self.replaced.append(held.number)

    def take_replaced(self) -> list[int]:
        """Return the numbers of those that others have replaced, once."""
        found, self.replaced = self.replaced, []
        return found

    def idle(self, stepped: Collection[int]) -> frozenset[int]:
        """Return the parameters that only optimizers hold which have not stepped.

        Args:
            stepped: Numbers of the optimizers that have.

        Returns:
            Their places; what an earlier backward left there is no part of the step.
        """
        if len(self._known) < 2 or not stepped:
            return frozenset()
        key = frozenset(stepped)
        if key not in self._idle:
            held = {h.number: set(h.params) for h in self._known.values()}
            used = set().union(*(held.get(number, ()) for number in key))
            self._idle[key] = frozenset(set().union(*held.values()) - used)
        return self._idle[key]

    def alive(self) -> list[Optimizer]:
        """Return the optimizers that hold a watched parameter."""
        known = [held.optimizer() for held in self._known.values() if held.params]
        return [optimizer for optimizer in known if optimizer is not None]

    def is_foreign(self, optimizer: Optimizer, *, at_sight: bool = False) -> bool:
        """Tell whether an optimizer is known to hold nothing that is watched.

        Args:
            optimizer: The optimizer.
            at_sight: Whether one that is not known is judged by what it holds now.
        """
        held = self.known(optimizer)
        if held is None and at_sight:
            params = (p for group in optimizer.param_groups for p in group["params"])
            return not self._parameters.among(list(params))
        return held is not None and not held.params

    def holds_not(self, param: Tensor) -> bool:
        """Tell whether a parameter had a gradient and no optimizer when last seen."""
        return id(param) in self._alone

    def hold_others_alike(self) -> bool:
        """Tell whether one holds no watched parameter, and as many of their shapes."""
        shapes = Counter(p.shape for p in self._parameters.params if p.requires_grad)
        for held in self._known.values():
            optimizer = held.optimizer()
            if optimizer is None or held.params:
                continue
            groups = optimizer.param_groups
            others = Counter(p.shape for group in groups for p in group["params"])
            if shapes <= others:
                return True
        return False

    def only_one(self, number: int) -> Held | None:
        """Return what an optimizer holds, if none other does and all can learn."""
        found = [held for held in self._known.values() if held.params]
        if len(found) != 1 or self.replaced or found[0].frozen:
            return None
        return found[0] if found[0].number == number else None

    def jumps(self, optimizer: Optimizer) -> list[str]:
        """Return how learning rates have jumped since the last time, as events."""
        now = list(map(_rate, optimizer.param_groups))
        before, self._rates[optimizer] = self._rates.get(optimizer), now
        if before is None or before == now or len(before) != len(now):
            return []
        each = "" if len(now) == 1 else " of group {}"
        return [
            f"lr: {old:.3g} -> {new:.3g}{each.format(i)}"
            for i, (old, new) in enumerate(zip(before, now, strict=True))
            if old > 0 and not old < _JUMP * new < _JUMP * _JUMP * old
        ]

    def holding(self, param: Tensor) -> list[tuple[Optimizer, dict[str, Any]]]:
        """Return the optimizers that hold a parameter, each with its group."""
        return [
            (optimizer, group)
            for optimizer in self.alive()
            for group in optimizer.param_groups
            if any(one is param for one in group["params"])
        ]

    def training(self) -> Training:
        """Return how the parameters are trained, as far as that is known."""
        rates: dict[int, float] = {}
        groups: dict[str, dict[str, Any]] = {}
        for optimizer in self.alive():
            for i, group in enumerate(optimizer.param_groups):
                rates |= dict.fromkeys(map(id, group["params"]), _rate(group))
                name = type(optimizer).__name__
                name += f", group {i}" if len(optimizer.param_groups) > 1 else ""
                while name in groups:
                    name += "'"
                groups[name] = _options(group)
        names, params = self._parameters.names, self._parameters.params
        alone = [
            (name, p)
            for name, p in zip(names, params, strict=True)
            if p.grad is not None and id(p) not in rates
        ]
        before, self._alone = self._alone, {id(p): p._version for _, p in alone}
        unheld = [
            name  # and who is written otherwise, such as by hand, is none of them
            for name, p in alone
            if before.get(id(p), p._version) == p._version
        ]
        return Training(rates, groups, tuple(unheld))


_PLAIN: Final = frozenset({bool, int, float})
_OPTIONS: Final = (
    "weight_decay",
    "momentum",
    "nesterov",
    "betas",
    "alpha",
    "eps",
    "amsgrad",
    "maximize",
)
"""What is told of a group of parameters beside its rate, where it has it."""


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of how a group of parameters is trained, as plain values."""
    rate = _rate(group)
    found: dict[str, Any] = {"lr": rate} if rate else {}
    for name in _OPTIONS:
        if name not in group:
            continue
        value = group[name]
        if type(value) in _PLAIN:
            if value:
                found[name] = value
        elif isinstance(value, tuple | list) and set(map(type, value)) <= _PLAIN:
            found[name] = list(value)
    return found


def _rate(group: dict[str, Any]) -> float:
    rate = group.get("lr")
    if isinstance(rate, Tensor) and rate.device.type == "cpu" and rate.numel() == 1:
        return float(rate)
    return float(rate) if isinstance(rate, int | float) else math.nan


_Hook = Callable[[Optimizer, Any, Any], None]


def _closure(args: Any, kwargs: Any) -> bool:
    """Tell whether ``step`` was given a closure; args[0] is the optimizer itself."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


def _last(listener: Listener) -> _Hook:
    """Return the hook that reports an optimizer that is about to step."""
    ref = weakref.ref(listener)

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        told = ref()
        if told is not None:
            more = len(args) > 1 or kwargs
            told.before_optimizer(optimizer, bool(more) and _closure(args, kwargs))

    return hook
