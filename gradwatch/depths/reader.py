"""Reads the gradients of the open step: as backward leaves them, as they are used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import _torch
from gradwatch.depths.gradients import Gradients, Idleness, Layout
from gradwatch.depths.parts import Updated
from gradwatch.depths.shards import make_whole
from gradwatch.depths.update import Changes, Moved, Moving
from gradwatch.hooks.clearing import Clearing
from gradwatch.hooks.modules import ModuleHooks
from gradwatch.hooks.optimizers import Held, OptimizerHooks
from gradwatch.hooks.parameters import ParameterHooks
from gradwatch.hooks.shards import Left
from gradwatch.numerics.norms import Norms, all_finite, norms, scaled_down
from gradwatch.numerics.shards import any_sharded
from gradwatch.recurrent import clean_path, parameter_names, plain_weight

_RESCAN_STEPS: Final = 50
"""Steps between two looks for parameters that were replaced."""
_LOOK_AFTER: Final = 20
"""Backward passes between two looks at weights that no optimizer steps on."""


class _Weights(NamedTuple):
    """All weights as they were once.

    Attributes:
        marks: Of each: which it is, its version, and its norm.
        since: Backward passes before they last changed.
        looked: The same before this look.
    """

    marks: list[tuple[int, int, float]]
    since: int
    looked: int


class Reader:
    """Reads gradients and weights at the moments that the engine tells it.

    Args:
        parameters: The watched parameters.
        optimizers: Those that hold them.
        modules: The recurrent modules.
        scaler: The GradScaler, where the user passed it.
    """

    def __init__(
        self,
        parameters: ParameterHooks,
        optimizers: OptimizerHooks,
        modules: ModuleHooks,
        scaler: Any,
    ) -> None:
        self.gradients = Gradients()
        """What was read in the open step."""
        self.scaler = scaler
        self._parameters, self._optimizers = parameters, optimizers
        self._modules, self._clearing = modules, Clearing()
        self._changes, self._moving = Changes({}), dict[int, Moving]()
        self._scanned = -_RESCAN_STEPS
        self._weights: _Weights | None = None
        self._passes = 0
        self._left: tuple[int, Tensor, int] | None = None
        self._small: tuple[Held | None, int] = None, 0
        self._layout = (list[str](), Layout((), (), ()))
        self._begin_with_parameters()
        modules.shards.listen()

    def _begin_with_parameters(self) -> None:
        """Start again with the parameters as they are now."""
        self._small = None, 0
        self._sharded = any_sharded(self._parameters.params)
        weights = {}
        for recurrence in self._modules.alive():
            weight = plain_weight(recurrence)
            known = weight is not None and self._parameters.index(weight) >= 0
            if weight is not None and known and weight.requires_grad:
                weights[recurrence.stream.name] = weight
        self._changes = Changes(weights)
        self._moving.clear()

    def rescan_after(self, number: int) -> None:
        """Look for them where that is some time ago.

        Args:
            number: Of the step that is to come.
        """
        if number - self._scanned >= _RESCAN_STEPS:
            self._scanned = number
            self.rescan()

    def was_remade(self) -> None:
        """Note that weights were written by us, and may be others."""
        self.lost_sight()
        self.rescan()

    def lost_sight(self) -> None:
        """Note that weights are written by who is known, and that nobody looks."""
        self._changes.forget()

    def rescan(self) -> None:
        """Look for the model's parameters again; they may have been replaced."""
        if self._parameters.rescan():
            self._begin_with_parameters()
            self._optimizers.look_up_again()
            self.gradients.forget()

    def held(self, optimizer: Optimizer, *, look_up: bool = False) -> Held:
        """Return what an optimizer holds; look it up where that is not known.

        Args:
            optimizer: The optimizer.
            look_up: Whether it is looked up in any case, if it held any: where no
                backward was seen to bring gradients, its parameters may have changed.
        """
        held = self._optimizers.known(optimizer)
        if held is not None and not (look_up and held.params):
            return held
        held, more = self._optimizers.look_up(optimizer)
        if more:
            self.rescan()  # its parameters may be new to us
            held, _ = self._optimizers.look_up(optimizer)
        self._moving.pop(held.number, None)
        if held.params and self.scaler is None:
            self._find_scaler()
        return held

    def _find_scaler(self) -> None:
        """Find the loss scaler whose call led to an optimizer's first step."""
        self.scaler = _torch.calling_scaler()
        if self.scaler is not None:
            self.gradients.found_scale(_torch.loss_scale(self.scaler))

    # ---- backward

    def opened(self, param: Tensor) -> None:
        """Look at the first gradient of a step: had it been cleared, and how?"""
        self.gradients.cleared = self.cleared(param)
        self.gradients.written_late = self._is_written_late()

    def suspects(self, param: Tensor) -> bool:
        """Tell whether it seems not to have been."""
        return self._clearing.suspects(self._parameters.index(param), param.grad)

    def cleared(self, param: Tensor) -> bool | None:
        """Tell whether the first gradient of a step had been cleared, once a step.

        None where no optimizer holds it: none clears it then.
        """
        if self._optimizers.holds_not(param):
            return None
        return self._clearing.begins(self._parameters.index(param), param.grad)

    def ended(self, *, due: bool) -> bool:
        """Read what a backward pass leaves; tell whether there is any gradient."""
        parameters = self._parameters
        parameters.ended()
        self._passes += 1
        if self._passes == 1:
            self._idleness()
        live, grads = parameters.gradients()
        if not grads:
            return False
        parameters.note(live, grads)
        before = norms(grads) if due else None
        scale = _torch.loss_scale(self.scaler) if due else None
        # What is sharded arrives in the order in which it was sent.
        unknown = self._sharded or _known_finite(before)
        order = [] if unknown else parameters.arrivals()
        self.gradients.ended(parameters.names, live, before, scale, order)
        if isinstance(before, list) and not all_finite(before):
            weights = norms([p.detach() for p in parameters.params])
            if isinstance(weights, list) and not all_finite(weights):
                self.gradients.weights_finite = False
        return True

    # ---- optimizers

    def about_to_use(
        self, optimizer: Optimizer | None, held: Held, step: int
    ) -> list[str]:
        """Remember the weights that an optimizer is about to change.

        Args:
            optimizer: The optimizer; None where its rates were looked at.
            held: What it holds.
            step: The number of the step.

        Returns:
            What has happened since the last step, as events: to its learning rates, and
            to weights that no optimizer has written.
        """
        events = [] if optimizer is None else self._optimizers.jumps(optimizer)
        for name in self._changes.remember(self._moves(held), step):
            events.append(f"written:{name}")
        return events

    def _moves(self, held: Held) -> Moving:
        if held.number not in self._moving:
            params = self._parameters.params
            self._moving[held.number] = self._changes.among(
                params[i] for i in held.params
            )
        return self._moving[held.number]

    def read_used(
        self, optimizer: Optimizer, held: Held, *, alone: bool, verify: bool
    ) -> None:
        """Read the gradients that an optimizer is about to use, unless one has before.

        Args:
            optimizer: The optimizer.
            held: What it holds.
            alone: Whether no other optimizer is known: what none holds counts too.
            verify: Whether they are read even where they seem to be untouched.
        """
        gradients, parameters = self.gradients, self._parameters
        index: Iterable[int] = held.params
        untouched = False
        if alone and not gradients.used:
            before = gradients.before
            if before is not None and self.scaler is None:
                untouched = parameters.untouched()
                mended = isinstance(before, list) and not all_finite(before)
                if untouched and not verify and not mended:
                    gradients.about_to_be_used(gradients.live, before)
                    return
            index = range(len(parameters.params))
        live, grads = parameters.of(gradients.not_used(index))
        if not live:
            return
        read = norms(grads)
        if (factor := _torch.fused_scale(optimizer)) is not None:
            read = scaled_down(read, factor)
        refuses = _torch.refuses_inf(optimizer)
        gradients.guarded = refuses and (gradients.guarded or not gradients.used)
        gradients.about_to_be_used(live, read, untouched=untouched)

    def all_finite(self, held: Held) -> bool:
        """Tell whether the step's gradients are finite; an accelerator is waited for.

        Those of other optimizers too, so that none of several moves a weight; but for
        what a loss scaler keeps from its optimizer by itself.
        """
        if self._sharded:  # no process knows that of its own part
            return True
        if not self.gradients.used_finite:
            return self.gradients.guarded
        others = set(self._parameters.arrivals()).difference(held.params)
        if not others or self.scaler is not None:
            return True
        live, grads = self._parameters.of(self.gradients.not_used(others))
        if not grads or all_finite(read := norms(grads)):
            return True
        self.gradients.about_to_be_used(live, read)
        return False

    def compare(self, held: Held, step: int) -> None:
        """Compare the weights with what they were before the step's optimizers."""
        self._changes.compare(self._moves(held), step)
        if self._sharded:
            params, read = self._parameters.params, self.gradients
            left = None
            if read.before is not None:
                left = Left([params[i] for i in read.live], read.before, step)
            self._modules.shards.meet(held.optimizer(), left)

    def updated(self) -> list[Updated]:
        """Return the recurrent weights that an optimizer has changed in this step."""
        found: list[Updated] = []
        for name, weight, before in self._changes.compared():
            holders = self._optimizers.holding(weight)
            if len(holders) == 1:
                [(optimizer, group)] = holders
                kind, state = type(optimizer), optimizer.state.get(weight, {})
                if kind.__module__.startswith("torch.optim."):
                    given = (kind.__name__, group, state)
                    found.append(Updated(name, weight, before, *given))
        return found

    def moved(self) -> Moved | None:
        """Return what was compared in a step that is over."""
        return self._changes.take()

    def left_by_the_only_one(self) -> None:
        """Look at the gradients as the one optimizer leaves them."""
        self._clearing.used(self._parameters.params, frozenset())

    def has_used(self, held: Held, stepped: tuple[int, ...]) -> None:
        """Look at the gradients as an optimizer leaves them."""
        self._parameters.note_used(held.number, held.params)
        self._left = self._smallest(held)
        idle = self._optimizers.idle({*stepped, held.number})
        self._clearing.used(self._parameters.params, idle)

    def _smallest(self, held: Held) -> tuple[int, Tensor, int] | None:
        """Return the place of a small gradient, it, and its version; None for none.

        It is held until the next step opens, so that it can be told what was done to it
        before it was cleared.
        """
        params = self._parameters.params
        known, place = self._small
        if known is not held:
            live, _ = self._parameters.of(held.params)
            if not live:
                return None
            place = min(live, key=lambda i: params[i].numel())
            self._small = held, place
        grad = params[place].grad
        if type(grad) is not Tensor or not grad.is_cpu or grad.is_sparse:
            return None
        return place, grad, grad._version

    def _is_written_late(self) -> bool:
        """Tell whether gradients were written after the step that has used them.

        Where they are cleared in place, that cannot be told.
        """
        left, self._left = self._left, None
        if left is None:
            return False
        place, grad, version = left
        if grad._version == version or place >= len(self._parameters.params):
            return False
        return self._parameters.params[place].grad is not grad and bool(grad.any())

    @property
    def refused(self) -> bool:
        """Whether gradients that were not finite are gone before any was used."""
        gradients = self.gradients
        if gradients.before is None or gradients.used:
            return False
        return self._parameters.all_gone(gradients.live) and not gradients.finite

    # ---- the end of a step

    def read_now(self) -> None:
        """Read the gradients as they are, where no backward was seen."""
        if self.gradients.before is None:
            live, grads = self._parameters.gradients()
            if grads:
                self.gradients.ended(
                    self._parameters.names, live, norms(grads), None, []
                )

    def take(self, stepped: tuple[int, ...], number: int) -> Gradients:
        """Return what was read in a step that is over."""
        if not stepped:
            self._clearing.unused()
            self.gradients.idleness = self._idleness()
        return self.complete(self.set_aside(), stepped, number)

    def _idleness(self) -> Idleness | None:
        """Look at the weights of a step that no optimizer has used.

        On an accelerator nobody looks: their norms would have to be waited for.
        """
        seen, params = self._weights, self._parameters.params
        if seen is not None and self._passes - seen.looked < _LOOK_AFTER:
            return None
        if not all(p.is_cpu for p in params):
            return None
        read = norms([p.detach() for p in params])
        if not isinstance(read, list):
            return None
        marks = [
            (id(p), p._version, size) for p, size in zip(params, read, strict=True)
        ]
        since = self._passes if seen is None or seen.marks != marks else seen.since
        self._weights = _Weights(marks, since, self._passes)
        if seen is None:
            return None
        return Idleness(self._passes - since, self._optimizers.hold_others_alike())

    def complete(
        self, gradients: Gradients, stepped: tuple[int, ...], number: int
    ) -> Gradients:
        """Add what is known once a step is over."""
        gradients.closed(
            self._parameters.names,
            moved=self._changes.take(),
            idle=self._optimizers.idle(stepped),
            clearing_known=bool(stepped) and self._clearing.known,
        )
        if self._sharded:
            shards = self._modules.shards
            found = shards.take(number)
            make_whole(gradients, self._parameters.params, found, shards.name)
        return gradients

    def set_aside(self) -> Gradients:
        """Return what was read in a step that may turn out to be one."""
        gradients, self.gradients = self.gradients, Gradients()
        return gradients

    def drop(self) -> None:
        """Forget what was read in a step that was none."""
        self.gradients = Gradients()
        self._changes.take()

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        self._left = None
        self._clearing.close()
        self._changes = Changes({})
        self._moving.clear()

    @property
    def layout(self) -> Layout:
        """Which parameters are behind which key, for the present parameters."""
        names = self._parameters.names
        if self._layout[0] is not names:
            model = self._parameters.model
            self._layout = (names, _layout(model, self._modules, names))
        return self._layout[1]


def _known_finite(before: Norms | None) -> bool:
    """Tell whether norms are known to be finite without waiting for them."""
    return before is None or (isinstance(before, list) and all_finite(before))


def _layout(model: nn.Module | None, modules: ModuleHooks, names: list[str]) -> Layout:
    index = {name: i for i, name in enumerate(names)}
    paths: dict[int, str] = {}
    for path, module in model.named_modules() if model is not None else ():
        paths.setdefault(id(module), clean_path(path))
    groups = []
    for recurrence in modules.alive():
        path = paths.get(id(recurrence.module), "")
        start = f"{path}." if path else ""
        parts = {
            group: [index[start + n] for n in own if start + n in index]
            for group, own in parameter_names(recurrence).items()
        }
        groups.append((recurrence.stream, parts))
    return Layout.of(groups)
