"""What a user meets: names, W&B rows, hooks on their objects, and calls a step."""

import inspect
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import gradwatch
from gradwatch import quiet
from gradwatch.sinks import Wandb
from testbed.models import Loop, Tagger, batches, lstm
from tests.support.wandb_run import FakeRun

STEPS = 320


def signatures() -> dict[str, str]:
    """Return every public name with its signature."""
    found: dict[str, str] = {}
    for name in gradwatch.__all__:
        _add(found, name, getattr(gradwatch, name))
    return found


def _add(found: dict[str, str], name: str, value: Any) -> None:
    if inspect.ismodule(value):
        for inner in getattr(value, "__all__", ()):
            _add(found, f"{name}.{inner}", getattr(value, inner))
    elif inspect.isclass(value):
        found[name] = _signature(value)
        for inner, member in vars(value).items():
            if not inner.startswith("_") and callable(member):
                found[f"{name}.{inner}"] = _signature(member)
            elif isinstance(member, property):
                found[f"{name}.{inner}"] = "property"
    else:
        found[name] = _signature(value)


def _signature(value: Any) -> str:
    return str(inspect.signature(value)) if callable(value) else type(value).__name__


def wandb_rows() -> dict[str, Any]:
    """Return what a W&B run is sent of 40 steps, a row a step."""
    run, model = FakeRun(), lstm()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with gradwatch.watch(
        model, dir=None, wandb=Wandb(run, media=False), budget=None
    ) as watch:
        for i, x in enumerate(batches(40)):
            optimizer.zero_grad()
            (model(x).square().mean() * (torch.nan if i == 31 else 1)).backward()
            if i != 31:
                optimizer.step()
            watch.flush()
            run.commit()
    for row in run.rows:
        row.pop("gradwatch/overhead", None)
    return {"rows": run.rows, "alerts": run.alerts}


def hooks() -> dict[str, Any]:
    """Return how many hooks there are on what, while watched and afterwards."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "deep": nn.LSTM(4, 8, num_layers=2, dropout=0.5),
            "cell": nn.GRUCell(4, 8),
            "head": nn.Linear(8, 2),
        }
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = gradwatch.watch(model, dir=None, wandb=None)
    while_watched = _hooks(model, optimizer)
    watch.close()
    return {"watched": while_watched, "closed": _hooks(model, optimizer)}


def _hooks(model: nn.Module, optimizer: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for path, module in model.named_modules():
        found[f"{path} forward"] = len(module._forward_hooks)
        found[f"{path} before forward"] = len(module._forward_pre_hooks)
        found[f"{path} in place of its call"] = "_compiled_call_impl" in vars(module)
    for name, p in model.named_parameters():
        found[f"{name} accumulated"] = len(p._post_accumulate_grad_hooks or {})
        found[f"{name} gradient"] = len(p._backward_hooks or {})
    found["optimizer"] = len(optimizer._optimizer_step_pre_hooks)
    found["all optimizers, before"] = len(torch_optimizer._global_optimizer_pre_hooks)
    found["all optimizers, after"] = len(torch_optimizer._global_optimizer_post_hooks)
    return {name: n for name, n in found.items() if n}


def calls() -> dict[str, dict[str, float]]:
    """Return the mean calls a step that a watch adds, at fixed cadences."""
    builds: dict[str, Callable[[], nn.Module]] = {
        "RNN 16->32": lambda: Tagger(nn.RNN(16, 32), 32, 10),
        "LSTM 16->32, two layers": lambda: Tagger(nn.LSTM(16, 32, 2), 32, 10),
        "a loop of GRU cells": lambda: Loop(nn.GRUCell(16, 32), 32, 10),
    }
    found = {name: _calls(build, budget=None) for name, build in builds.items()}
    rnn = builds["RNN 16->32"]
    with Clock() as clock, TemporaryDirectory() as folder:
        default = _calls(rnn, clock, after=130, steps=2 * STEPS, dir=folder)
    return found | {"RNN 16->32, at the defaults": default}


class Clock:
    """Time as it would pass on one machine, whatever the machine.

    A step of training takes 1.6 ms, and each call 1.2 us more.
    """

    def __init__(self) -> None:
        self.now, self._real = 0.0, time.perf_counter

    def __call__(self) -> float:
        """Return the seconds so far."""
        return self.now

    def __enter__(self) -> "Clock":
        """Put it in the place of the real one."""
        time.perf_counter = quiet.perf_counter = self
        return self

    def __exit__(self, *error: object) -> None:
        """Put the real one back."""
        time.perf_counter = quiet.perf_counter = self._real


def _calls(
    build: Callable[[], nn.Module],
    clock: Clock | None = None,
    *,
    after: int = 10,
    steps: int = STEPS,
    **options: Any,
) -> dict[str, float]:
    counts = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = build()
        if watched:
            watch = gradwatch.watch(model, **{"dir": None, "wandb": None, **options})
        counts.append(_counted(model, clock, after, steps))
        if watched:
            watch.close()
    bare, ours = counts
    return {kind: (ours[kind] - bare[kind]) / steps for kind in ("call", "c_call")}


def _counted(
    model: nn.Module, clock: Clock | None, after: int, steps: int
) -> Counter[str]:
    """Count the calls of all threads, once what is looked up once has been."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    found: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_filename != __file__:
            found[event] += 1
            if clock is not None:
                clock.now += 1.2e-6

    threading.setprofile(count)
    sys.setprofile(count)
    for step, x in enumerate(batches(steps + after, 30, 16, 16)):
        if step == after:
            found.clear()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if clock is not None:
            clock.now += 1.6e-3
    sys.setprofile(None)
    threading.setprofile(None)
    return found


def surface() -> dict[str, Any]:
    """Return all of it; the calls are compared apart, as a bound."""
    return {"signatures": signatures(), "wandb": wandb_rows(), "hooks": hooks()}
