"""Faults at every call of gradwatch into something that is not its own.

The package is imported with each of its calls rewritten: ``f(x)`` becomes
``fault(site, f)(x)``. What leaves gradwatch (torch, files, W&B, the user's code; not
the builtins, which do not fail) is counted by its site, and raises where that is asked
for. So every site is known, and no fault is one that somebody had to think of.

Run: python -m tests.support.faults [--share 0.05] [--again] [--countdown FROM TO]
"""

import argparse
import ast
import builtins
import contextlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import random
import sys
import tempfile
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
STEPS = 12
QUIET_STEPS = 40
"""Enough for the quiet path, which begins once 12 norms are known."""


class Faults:
    """Which call fails, and which were seen.

    Attributes:
        seen: Site -> how often it was called.
        fired: Sites that have raised.
        calls: How many calls there were.
    """

    def __init__(self):
        self.sites = []
        self.reset()

    def reset(self, site=None, nth=0, error=OSError, *, at=None, again=False):
        """Begin a run.

        Args:
            site: The site that fails; None for none.
            nth: At which of its calls, from 1; -1 for every one.
            error: The type of what it raises.
            at: Which call fails of all that there are, in place of a site.
            again: Whether the next call after a fault fails as well.
        """
        self.seen, self.fired, self.calls = Counter(), [], 0
        self.site, self.nth, self.error, self.at = site, nth, error, at
        self.again, self.on = again, True

    def __call__(self, site, function):
        if not self.on or not _leaves(function):
            return function
        self.seen[site] += 1
        self.calls += 1
        due = site == self.site and self.nth in (self.seen[site], -1)
        due = due or self.calls == self.at
        if due or (self.again and self.fired and len(self.fired) < 2):
            self.fired.append(site)
            return self._raise
        return function

    def _raise(self, *args, **kwargs):
        raise self.error(f"injected at {self.sites[self.fired[-1]]}")


FAULTS = Faults()
_PLAIN = (
    type(os.environ),
    str,
    bytes,
    list,
    dict,
    set,
    frozenset,
    tuple,
    int,
    float,
    deque,
    Counter,
)
_SAFE = (
    "builtins",
    "time",
    "math",
    "_thread",
    "threading",
    "weakref",
    "_weakref",
    "contextlib",
    "torch.compiler",
    "sys",
)


_NAMES = ("_call_impl", "get_eval_frame_callback")
"""The user's own forward; a getter in C."""


def _leaves(function):
    """Tell whether a call leaves gradwatch, for something that can fail."""
    function = getattr(function, "__origin__", function)  # of deque[float]
    if function is os.getpid or getattr(function, "__name__", "") in _NAMES:
        return False
    if isinstance(function, type):
        module = function.__module__
        return module.startswith("torch") or issubclass(function, os.PathLike)
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, type(sys)):
        kind = owner if isinstance(owner, type) else type(owner)
        inside = kind.__module__.split(".")[0] == "gradwatch"
        safe = isinstance(owner, _PLAIN) or kind.__module__ in _SAFE
        return not inside and not safe
    module = getattr(function, "__module__", None) or type(function).__module__
    if module in _SAFE:
        return False
    return module.split(".")[0] not in ("gradwatch", *_SAFE, "dataclasses", "copy")


class _Rewrite(ast.NodeTransformer):
    def __init__(self, path):
        self.path = path

    def visit_Call(self, node):
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Name) and function.id in vars(builtins):
            return node
        site = len(FAULTS.sites)
        FAULTS.sites.append(f"{self.path}:{node.lineno}: {ast.unparse(function)[:60]}")
        wrapped = ast.Call(
            func=ast.Name(id="__fault__", ctx=ast.Load()),
            args=[ast.Constant(value=site), function],
            keywords=[],
        )
        return ast.copy_location(
            ast.Call(func=wrapped, args=node.args, keywords=node.keywords), node
        )

    def visit_FunctionDef(self, node):
        node.body = [self.visit(part) for part in node.body]  # decorators stay
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data, path, *, _optimize=-1):
        tree = ast.parse(data, path)
        inside = str(Path(path).relative_to(ROOT))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                _Rewrite(inside).visit(node)
        return compile(ast.fix_missing_locations(tree), path, "exec")

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module):
        module.__dict__["__fault__"] = FAULTS
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "gradwatch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path or [str(ROOT)])
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            spec.loader = _Loader(name, spec.origin)
        return spec


def golden(watched, folder):
    """Train for a few steps; return losses and weights, and what else is to be known.

    Every depth is measured at every step; there are two steps of NaN, so that alarms
    are given, and the state is saved and loaded in between. Then there are steps of
    another net at which nothing but the gradients is due.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "rnn": nn.LSTM(3, 4, num_layers=2, dropout=0.1),
            "cell": nn.GRUCell(4, 4),
            "head": nn.Linear(4, 2),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses, alarms, watch = [], [], None
    if watched:
        import gradwatch

        with contextlib.suppress(Exception):  # before training: its errors are told
            watch = gradwatch.watch(
                model, dir=folder, every=1, budget=None, on_alert=alarms.append
            )
    for step in range(STEPS):
        out, _ = model["rnn"](torch.randn(5, 3, 3))
        hidden = torch.zeros(3, 4)
        for row in out:
            hidden = model["cell"](row, hidden)
        loss = model["head"](hidden).square().mean()
        if watch is not None:
            watch.log(loss=loss)
        optimizer.zero_grad()
        loss.backward()
        if step in (5, 10):
            for param in model.parameters():
                param.grad.mul_(float("nan"))
            optimizer.zero_grad()  # what a careful loop does
            continue
        optimizer.step()
        losses.append(loss.item())
        if watch is not None and step == 7:
            with contextlib.suppress(Exception):  # asked for: its errors are told
                watch.load_state_dict(watch.state_dict())
    if watch is not None:
        with contextlib.suppress(Exception):
            repr(watch)
        watch.close()
    quiet = quiet_steps(watched, folder)
    losses += quiet.losses
    model["quiet"] = quiet.model
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    hooks = sum(
        len(m._forward_hooks)
        + len(m._forward_pre_hooks)
        + ("_compiled" in str(vars(m)))
        for m in model.modules()
    ) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    rng = torch.get_rng_state()
    return {"losses": losses, "weights": weights, "rng": rng}, hooks, watch, alarms


class Quiet(NamedTuple):
    """A net after steps at which all is as usual, and its losses."""

    model: Any
    losses: list[float]


def quiet_steps(watched, folder):
    """Train for steps of the quiet path; from the middle on few are read in full."""
    import torch
    from torch import nn

    model, losses, watch = nn.RNN(3, 4), [], None
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    if watched:
        import gradwatch

        with contextlib.suppress(Exception):
            watch = gradwatch.watch(model, dir=folder, every=1000, name="quiet")
    for step in range(QUIET_STEPS):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 3, 3))[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if watch is not None and step == QUIET_STEPS // 2:
            watch._settings.schedule.in_full = 4
    if watch is not None:
        watch.close()
    return Quiet(model, losses)


class Told(logging.Handler):
    """Counts what was said."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        """Keep a message."""
        self.texts.append(record.getMessage())


def attempt(bare, told, folder):
    """Train with the fault that is set; return what was harmed, in words."""
    import torch

    told.texts.clear()
    found = []
    try:
        run, hooks, _, _ = golden(True, folder)
    except Exception as error:
        return [f"{type(error).__name__} reached the training: {error}"]
    finally:
        FAULTS.on = False
    for name, value in run.items():
        same = (
            torch.equal(value, bare[name]) if name != "losses" else value == bare[name]
        )
        if not same:
            found.append(f"{name} differ")
    if hooks:
        found.append(f"{hooks} hooks are left")
    traces = sum("Traceback" in text for text in told.texts)
    if traces > max(len(FAULTS.fired), 1):
        found.append(f"told {traces} times")
    return found


def main():
    """Inject, and print what was harmed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the sites")
    parser.add_argument("--countdown", type=int, nargs=2, metavar=("FROM", "TO"))
    parser.add_argument("--again", action="store_true", help="the handler fails too")
    given = parser.parse_args()
    os.environ["GRADWATCH_STRICT"] = "0"
    sys.meta_path.insert(0, _Finder())
    import torch

    import gradwatch

    assert gradwatch.__file__.startswith(str(ROOT))
    torch.set_num_threads(1)
    log, told = logging.getLogger("gradwatch"), Told()
    log.addHandler(told)
    log.propagate = False
    bare, _, _, _ = golden(False, None)
    with tempfile.TemporaryDirectory() as place:
        folders = (Path(place) / str(i) for i in range(10**9))
        FAULTS.reset()
        FAULTS.on = True
        assert attempt(bare, told, next(folders)) == []
        seen, calls = FAULTS.seen, FAULTS.calls
        if given.countdown is not None:
            first, last = given.countdown
            plans = [{"at": n} for n in range(first, min(last, calls) + 1)]
        else:
            sites = sorted(seen)
            count = max(int(given.share * len(sites)), 1)
            sites = random.Random(0).sample(sites, count)
            plans = [
                {"site": site, "nth": nth}
                for site in sites
                for nth in sorted({1, min(2, seen[site]), seen[site], -1})
            ]
        harmed, untold = {}, []
        for i, plan in enumerate(plans):
            error = (OSError, RuntimeError, MemoryError, ValueError)[i % 4]
            FAULTS.reset(**plan, error=error, again=given.again)
            wrong = attempt(bare, told, next(folders))
            fired = bool(FAULTS.fired)
            where = FAULTS.sites[FAULTS.fired[0]] if fired else "none"
            if fired and not any("failed" in t or "cannot" in t for t in told.texts):
                untold.append(f"{where} {plan} {error.__name__}")
            if wrong:
                harmed[f"{where} {plan} {error.__name__}"] = wrong
    report = {
        "sites": len(seen),
        "calls": calls,
        "tried": len(plans),
        "harmed": harmed,
        "untold": untold,
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
