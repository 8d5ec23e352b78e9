"""What the loss reads: the output of a module, and the gradient that it gets."""

from __future__ import annotations

import weakref
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch import _torch
from gradwatch.health import Guard
from gradwatch.hooks import calls, graph
from gradwatch.hooks.graph import LossGraph
from gradwatch.numerics.through_graph import pulling
from gradwatch.recurrent import clean_path

_CALLS: Final = 256
"""Calls of the module in one step that are looked at, such as one a time step."""
_TIMES: Final = 3
"""Losses whose whole graph is gone through, for the views in it."""
_ENTRIES: Final = 1 << 18
"""Entries of one call's output that are looked at; of more, some rows along axis 0."""


class Look(NamedTuple):
    """One call's output and the gradient that reached it; rows of both, in float32.

    Attributes:
        output: Shape ``(..., F)``.
        grad: The same shape.
        share: Share of the output's rows that these are.
    """

    output: Tensor
    grad: Tensor
    share: float


class Taken(NamedTuple):
    """What was seen of the read-out in one backward pass.

    Attributes:
        loss: What backward was called on, a tensor of no axis.
        graph: What that is made of.
        path: The module whose output it reads; empty where that is not known.
        linear: Whether that has its features, such as classes, on its last axis.
        looks: Its calls that a gradient has reached.
    """

    loss: Tensor
    graph: LossGraph
    path: str
    linear: bool
    looks: tuple[Look, ...]


class Readout:
    """Sees what the loss reads, at sampled steps.

    The module is found by the loss's graph in one backward, and its calls are seen from
    the next sampled step on.

    Args:
        model: The watched model; not kept alive.
        guard: Absorbs and reports what fails.
    """

    def __init__(self, model: nn.Module, guard: Guard) -> None:
        self.sees = False
        """Whether the next call, and the next loss, are to be shown."""
        self._model, self._guard = weakref.ref(model), guard
        self._module: weakref.ref[nn.Module] | None = None
        self._path = ""
        self._calls = self._times = 0
        self._views: tuple[tuple[graph.Shape, graph.Shape], ...] = ()
        self._looks: list[tuple[int, int, Look]] = []
        self._seen: tuple[Tensor, LossGraph] | None = None
        self.on_grad = _torch.OutOfGraphs(self._reached)

    def expect(self, wanted: bool) -> None:
        """Have the calls and losses from now on shown, or not."""
        self.sees = wanted and not self._guard.off
        module = self._module() if self._module is not None else None
        if module is not None:
            with self._guard:
                (calls.attach if self.sees else calls.detach)(module, self)

    def forget(self, task: int = -1) -> None:
        """Let go of what was seen of a step that is over.

        Args:
            task: A backward pass of the next step, of which all is kept.
        """
        self._looks = [look for look in self._looks if look[0] == task != -1]
        self._calls, self._seen = 0, None

    def close(self) -> None:
        """See nothing any more. Safe to call twice."""
        self.sees = False
        self.forget()
        self._follow("", None)

    def take(self) -> Taken | None:
        """Return what was seen since the last time; None where no loss was read."""
        seen, looks, count = self._seen, self._looks, self._calls
        self.forget()
        if seen is None:
            return None
        loss, made = seen
        found = tuple(look for _, node, look in looks if node in made.nodes)
        if count > _CALLS:  # these are a part of them
            found = ()
        module = self._module() if self._module is not None else None
        return Taken(loss, made, self._path, isinstance(module, nn.Linear), found)

    # ---- the loss, while backward runs

    def on_loss(self, root: Tensor) -> None:
        """Look at what backward was called on."""
        with self._guard:
            made = graph.look(root)
            self._seen = None
            if made is not None and self._times < _TIMES:
                self._times += 1
                self._views = tuple(graph.views_of_states(root))
            if made is not None:
                views = tuple(dict.fromkeys((*made.views, *self._views)))
                self._seen = root.detach(), made._replace(weights=(), views=views)
                self._follow(*self._owner(made.weights))

    def _owner(self, weights: tuple[Tensor, ...]) -> tuple[str, nn.Module | None]:
        """Return the module that holds the weights by which the read-out was made."""
        known = self._module() if self._module is not None else None
        if known is not None and _holds(known, weights):
            return self._path, known
        model = self._model()
        for path, module in model.named_modules() if model is not None else ():
            if _holds(module, weights):
                return clean_path(path), module
        return "", None

    def _follow(self, path: str, module: nn.Module | None) -> None:
        before = self._module() if self._module is not None else None
        if module is not before:
            if before is not None:
                calls.detach(before, self)
            self._module = None if module is None else weakref.ref(module)
            if module is not None and self.sees:
                calls.attach(module, self)
        self._path = path

    # ---- the module's calls

    def before_forward(self, module: nn.Module) -> None:
        """Nothing is to be known before."""

    def on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        """Look at one call."""
        with self._guard:
            if not self.sees or not torch.is_grad_enabled():
                return
            if not isinstance(output, Tensor) or not _torch.holds_values(output):
                return
            if output.grad_fn is not None and output.dim() and output.numel():
                self._calls += 1
                if self._calls <= _CALLS:
                    output.register_hook(_OnGrad(self, output))

    def _reached(self, node: int, output: Tensor, version: int, grad: Tensor) -> None:
        with self._guard:
            if self.sees and output._version == version:
                every = max(1, -(-output.numel() // _ENTRIES))
                pair = torch.stack([t.float() for t in (output, grad.detach())])
                pair = pair[:, None] if pair.dim() == 2 else pair[:, ::every]
                share = 1.0 if output.dim() == 1 else pair.shape[1] / len(output)
                look = Look(pair[0], pair[1], share)
                self._looks.append((_torch.graph_task_id(), node, look))


class _OnGrad:
    """A tensor hook; the graph that holds it may outlive the watch."""

    __slots__ = ("node", "output", "readout", "version")
    __torch_unserializable__ = True
    """Saving a tensor leaves this hook out, and is not warned of."""

    def __init__(self, readout: Readout, output: Tensor) -> None:
        self.readout, self.output = readout, output.detach()
        self.node = _torch.function_number(output.grad_fn)
        self.version = output._version

    def __call__(self, grad: Tensor | None) -> None:
        if grad is not None and not pulling():
            self.readout.on_grad(self.node, self.output, self.version, grad)


def _holds(module: nn.Module, weights: tuple[Tensor, ...]) -> bool:
    own = {id(p) for p in module._parameters.values() if p is not None}
    return bool(weights) and all(id(weight) in own for weight in weights)
