"""Trying a model on a few batches without leaving a trace on it.

What is tried is a copy of model and optimizers. Where they cannot be copied the model
itself is used, and what it held is put back: parameters, buffers, gradients and modes.
The states of all random number generators are put back in either case.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from gradwatch.facts import NO_FACTS, Facts
from gradwatch.metrics import stream_key
from gradwatch.record import StepRecord, Stream
from gradwatch.recorder.state import randomness, set_randomness
from gradwatch.recurrent import Recurrence, recurrences
from gradwatch.settings import Settings
from gradwatch.watcher import Watch

LossFn = Callable[[nn.Module, Any], Tensor]
_WRAPPERS: Final = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass
class Subject:
    """A model that may be tried.

    Attributes:
        model: A copy, or the model itself.
        optimizers: Copies that hold its parameters, or the optimizers themselves.
        copied: Whether it is a copy.
        why: Why it is none.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    copied: bool = True
    why: str = ""


@dataclass
class Seen:
    """What a trial has seen.

    Attributes:
        streams: The recurrences of the model.
        records: One for each batch.
        losses: The loss of each.
        with_gradient: Names of the parameters that had a gradient in some batch.
        held: Names of the parameters that an optimizer holds; None without any.
        trainable: Names of the parameters that can learn.
        padded: Of each module: sequences whose last input is all zeros, and all.
    """

    streams: Sequence[Stream]
    records: list[StepRecord] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    with_gradient: set[str] = field(default_factory=set)
    held: set[str] | None = None
    trainable: set[str] = field(default_factory=set)
    padded: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def facts(self) -> Facts:
        """All facts as they are after the last batch."""
        found = NO_FACTS
        for record in self.records:
            found = found.with_later(record.facts)
        return found

    def metric(self, stream: Stream, name: str, gate: str = "") -> list[float]:
        """Return a metric of a stream in each batch in which it was measured."""
        key = stream_key(stream, name, gate)
        return [r.metrics[key] for r in self.records if key in r.metrics]

    def run(self, name: str) -> list[float]:
        """Return a metric of the run in each batch in which it was measured."""
        key = f"gradwatch/{name}"
        return [r.metrics[key] for r in self.records if key in r.metrics]


@contextmanager
def same_randomness() -> Iterator[None]:
    """Put the states of all random number generators back at the end."""
    known = randomness()
    try:
        yield
    finally:
        set_randomness(known)


@contextmanager
def flushed() -> Iterator[None]:
    """Take numbers below the smallest normal one as 0, as a slow CPU likes it."""
    before = bool(torch.tensor(1e-310, dtype=torch.float64) * 1.0 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model behind DataParallel, DDP and torch.compile."""
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def subject(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[Subject]:
    """Yield what may be tried in place of a model, and put back what it was.

    Args:
        model: The model.
        optimizers: Those that train it.
    """
    model = unwrapped(model)
    try:
        twin, theirs = copy.deepcopy((model, list(optimizers)))
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        with _put_back(model, optimizers):
            yield Subject(model, optimizers, copied=False, why=why)
        return
    for parameter in twin.parameters():
        parameter.grad = None
    for optimizer in theirs:
        if isinstance(optimizer, LBFGS):  # of which a copy lacks two attributes
            own: Any = optimizer
            own._params, own._numel_cache = own.param_groups[0]["params"], None
    yield Subject(twin, theirs)


@contextmanager
def _put_back(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Put all that a training changes back as it is, bit for bit.

    Parameters, buffers, gradients and modes, and what the optimizers remember.
    """
    remembered = [
        {p: copy.deepcopy(own) for p, own in o.state.items()} for o in optimizers
    ]
    values = [*model.parameters(), *model.buffers()]
    kept = [value.detach().clone() for value in values]
    grads = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _, _ in grads:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for value, was in zip(values, kept, strict=True):
                if not torch.equal(value, was):
                    value.copy_(was)
        for parameter, grad, can_learn in grads:
            parameter.requires_grad_(can_learn)
            parameter.grad = grad
        for module, training in modes:
            module.training = training
        for optimizer, known in zip(optimizers, remembered, strict=True):
            optimizer.state.clear()
            optimizer.state.update(known)


def tried(
    given: Subject,
    batches: Sequence[Any],
    loss_fn: LossFn,
    *,
    whole: bool = True,
) -> Seen:
    """Run forward and backward of some batches under a watch of their own.

    Args:
        given: The model.
        batches: Each is given to ``loss_fn``.
        loss_fn: Returns the loss of a model on a batch.
        whole: Whether everything is measured; False: states and the flow alone.

    Raises:
        ValueError: If ``loss_fn`` returns no loss that depends on the model.
    """
    model = given.model
    every = 1 if whole else {"spectrum": 10**9, "state": 1, "flow": 1}
    settings = Settings(every=every, budget=None, rules=[], wandb=None, silent=True)
    found = recurrences(model)
    seen = Seen([r.stream for r in found])
    parameters = dict(model.named_parameters())
    seen.trainable = {n for n, p in parameters.items() if p.requires_grad}
    if given.optimizers:
        ids = {
            id(p) for o in given.optimizers for g in o.param_groups for p in g["params"]
        }
        seen.held = {n for n, p in parameters.items() if id(p) in ids}
    watch = Watch(model, settings, found)
    with ExitStack() as stack:
        stack.callback(watch.close)
        counted = stack.enter_context(_counting_padded(found))
        for batch in batches:
            model.zero_grad()
            loss = checked(loss_fn(model, batch))
            loss.backward()
            watch.step()
            for path, (behind, of) in counted.items():
                before = seen.padded.get(path, (0, 0))
                seen.padded[path] = before[0] + behind, before[1] + of
            counted.clear()
            seen.losses.append(float(loss.detach()))
            seen.with_gradient |= {
                n for n, p in parameters.items() if p.grad is not None and p.grad.any()
            }
        watch.flush()
        seen.records = list(watch.records)
        model.zero_grad()
    return seen


def returned(
    model: nn.Module, batch: Any, loss_fn: LossFn
) -> tuple[Tensor, Tensor | None]:
    """Return the loss, and what the model returned; None where that is no one tensor.

    Of a tuple, such as an output and a state, the first is taken; the model has to be
    called once.
    """
    seen: list[Any] = []
    with model.register_forward_hook(lambda _module, _args, out: seen.append(out)):
        loss = loss_fn(model, batch)
    out = seen[-1] if len(seen) == 1 else None
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        out = out[0]
    return loss, out if isinstance(out, Tensor) else None


@contextmanager
def _counting_padded(
    found: Sequence[Recurrence],
) -> Iterator[dict[str, tuple[int, int]]]:
    """Count the sequences whose last input is all zeros, in each module's last call.

    Yields:
        Module -> how many these are, and all of its sequences; of those given tensors.
    """
    counted: dict[str, tuple[int, int]] = {}

    def look(module: nn.RNNBase, args: tuple[Any, ...], path: str) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.dim() == 3:
            last = x.detach()[:, -1] if module.batch_first else x.detach()[-1]
            counted[path] = int((last == 0).all(-1).sum()), len(last)

    with ExitStack() as stack:
        for path, module in {r.stream.module: r.module for r in found}.items():
            if isinstance(module, nn.RNNBase):
                hook = partial(look, path=path)
                stack.enter_context(module.register_forward_pre_hook(hook))
        yield counted


def checked(loss: Any) -> Tensor:
    """Return what a ``loss_fn`` gave, if it is a loss that backward can begin at."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn returned {type(loss).__name__}; expected the loss, a tensor of "
            "one element."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}; expected one "
            "number, such as loss.mean()."
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss that loss_fn returned does not depend on the model by a graph; "
            "expected loss_fn(model, batch) to use the model that it is given, without "
            "torch.no_grad() and .item()."
        )
    return loss.reshape(())


def trained(
    given: Subject, batches: Sequence[Any], loss_fn: LossFn, steps: int
) -> tuple[float, float]:
    """Train a subject for real; return the mean losses of the first and last pass.

    Args:
        given: A copy, with its optimizers.
        batches: Taken in turn.
        loss_fn: Returns the loss of a model on a batch.
        steps: How many.
    """
    losses = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        back: Any = partial(_back, given, batch, loss_fn)
        losses.append(float(back()))
        for optimizer in given.optimizers:
            if _needs_closure(optimizer):
                optimizer.step(back)
            else:
                optimizer.step()
    window = min(len(batches), steps)
    return float(np.mean(losses[:window])), float(np.mean(losses[-window:]))


def _needs_closure(optimizer: Optimizer) -> bool:
    """Tell whether a step asks for the loss again, as that of LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _back(given: Subject, batch: Any, loss_fn: LossFn) -> Tensor:
    """Take gradients of a batch; return its loss."""
    for optimizer in given.optimizers:
        optimizer.zero_grad()
    loss = checked(loss_fn(given.model, batch))
    loss.backward()
    return loss.detach()
