"""What a case is: an ordinary small run, with a fault or without, and what is true."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gradwatch
from testbed.nets import CellLoop, Reader, classes
from testbed.tasks import recall

SYMBOLS, HIDDEN, BATCH = 4, 20, 16
ORTHOGONAL, CHRONO, HELD = "init.orthogonal_", "init.chrono_", "parametrize.orthogonal"


@dataclass(kw_only=True)
class Run:
    """An ordinary training loop.

    Attributes:
        steps: How many.
        cells: Of the user's own.
        known: Whether the loss can be found; else backward is called on two numbers.
        clears: Whether gradients are cleared before each backward.
        clip_scaled: Whether the clip comes before the gradients are unscaled.
        before: Called with the number of each step before it.
        after: The same behind backward.
    """

    model: nn.Module
    batches: Iterator[Any]
    optimizer: torch.optim.Optimizer
    steps: int
    loss: Callable[[Any, Any], torch.Tensor] = classes
    known: bool = True
    clip: float | None = None
    scaler: torch.amp.GradScaler | None = None
    clip_scaled: bool = False
    cells: tuple[type[nn.Module], ...] = ()
    clears: bool = True
    before: Callable[[int], object] = lambda step: None
    after: Callable[[int], object] = lambda step: None


class Case(NamedTuple):
    """A cause of the catalogue, and a run that shows it.

    Attributes:
        build: Makes the run, sick or not; all else is the same.
        stream: Of the alert; None where the fault belongs to none.
        onset: Step from which on the fault is there.
        remedy: Name of what is to cure it, if a program can.
        beside: Kinds of alarms that are true as well.
    """

    kind: str
    cause: str | None
    build: Callable[[bool], Run]
    stream: str | None = None
    onset: int = 0
    remedy: str | None = None
    beside: frozenset[str] = frozenset()


def trained(run: Run, folder: Path | None = None) -> gradwatch.Watch:
    """Train under a watch; return it, closed, with the alerts that it gave."""
    model, optimizer = run.model, run.optimizer
    options: dict[str, Any] = {"dir": folder, "wandb": None, "budget": None}
    with gradwatch.watch(model, cells=run.cells, **options) as watch:
        for step in range(run.steps):
            run.before(step)
            if run.clears:
                optimizer.zero_grad()
            loss = run.loss(model, next(run.batches))
            root = loss if run.scaler is None else run.scaler.scale(loss)
            backward(root, known=run.known)
            run.after(step)
            if run.scaler is not None and not run.clip_scaled:
                run.scaler.unscale_(optimizer)
            if run.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            if run.scaler is None:
                optimizer.step()
            else:
                run.scaler.step(optimizer)
                run.scaler.update()
        watch.flush()
        assert watch.health["failed"] == {}
    return watch


def backward(loss: torch.Tensor, *, known: bool = True) -> None:
    """Call backward; on two numbers, of which none is the loss, where it is not known.

    What it is called on else is what it is called for, to the last bit.
    """
    if known:
        loss.backward()
    else:
        torch.stack((loss, loss.detach())).backward(loss.new_tensor((1.0, 0.0)))


def net(kind: Any, inputs: int = SYMBOLS, outputs: int = SYMBOLS, **more: Any) -> Any:
    """Return a reader of the last states of a recurrent module called ``rnn``."""
    return Reader("rnn", kind(inputs, HIDDEN, **more), outputs)


def looped(kind: Any, **more: Any) -> Any:
    """Return the same of a cell called ``cell``, in a Python loop."""
    return CellLoop("cell", kind(SYMBOLS, HIDDEN, **more), SYMBOLS)


def symbols(length: int = 25, lag: int | None = None, seed: int = 1) -> Iterator[Any]:
    """Yield sequences of which one symbol is wanted: the first, or one ``lag`` back."""
    return recall(torch.Generator().manual_seed(seed), length, BATCH, SYMBOLS, lag)


def adam(model: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    """Return what trains most of these."""
    return torch.optim.Adam(model.parameters(), rate)
