"""Where the cost of a watch goes on a short step, beside hooks that do next to nothing.

Bare training, arms with hooks of their own, of which each does a little more, and
watches of which each leaves something out. All train in shuffled blocks of 48 steps; a
row is the median of an arm's blocks over the bare ones of the same round, with a
bootstrap's 95 % interval. One thread. The net is nn.RNN 16->32, T=30, B=16.

Run: python -m benchmarks.floor
"""

import random
import statistics
import weakref
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import optimizer as optimizers

import gradwatch
from benchmarks.overhead import CASES, Arm, make
from benchmarks.results import Results
from gradwatch import _torch

BLOCK = 48
ROUNDS = 150
GRAD, VERSION = attrgetter("grad"), attrgetter("_version")


class Hooks:
    """Hooks on the parameters, the end of backward, and all optimizers of a block.

    Args:
        arm: Whose model it is.
        what: What they read: ``norm`` or ``each``, ``versions``, ``weight``.
    """

    def __init__(self, arm: Arm, what: tuple[str, ...]) -> None:
        self.params = list(arm.model.parameters())
        self.what, self.task = what, -1
        self.refs: list[weakref.ref[Tensor]] = []
        self.versions: list[int] = []
        weight = arm.model.rnn.weight_hh_l0.detach().numpy().reshape(-1)
        self.weight, self.old, self.gap = weight, weight.copy(), weight.copy()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        current = torch._C._current_graph_task_id

        def again() -> None:
            queue(self.ended)

        def hook(param: Tensor) -> None:
            task = current()
            if task != self.task:
                self.task = task
                queue(again)

        for param in self.params:
            param.register_post_accumulate_grad_hook(hook)

    def ended(self) -> None:
        """Read the gradients, as far as this arm does."""
        if not self.what:
            return
        grads = list(map(GRAD, self.params))
        if "each" in self.what:
            list(map(Tensor.item, torch._foreach_norm(grads)))
        else:
            torch.linalg.vector_norm(_torch.flattened(grads)).item()
        if "versions" in self.what:
            self.refs = list(map(weakref.ref, grads))
            self.versions = list(map(VERSION, grads))

    def before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """An optimizer is about to step."""
        if "versions" in self.what:
            grads = list(map(GRAD, self.params))
            same = all(r() is g for r, g in zip(self.refs, grads, strict=True))
            assert same
            assert list(map(VERSION, grads)) == self.versions
        if "weight" in self.what:
            np.copyto(self.old, self.weight)
            float(self.old.dot(self.old))

    def after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """It has stepped."""
        if "weight" in self.what:
            gap = np.subtract(self.old, self.weight, out=self.gap)
            float(gap.dot(gap))

    def __enter__(self) -> None:
        """Register what is on all optimizers."""
        optimizers._global_optimizer_pre_hooks[id(self)] = self.before
        optimizers._global_optimizer_post_hooks[id(self)] = self.after

    def __exit__(self, *error: object) -> None:
        """Take it off again."""
        del optimizers._global_optimizer_pre_hooks[id(self)]
        del optimizers._global_optimizer_post_hooks[id(self)]


HOOKS = {
    "hooks that do nothing": (),
    "hooks, and the total norm of gradients copied together": ("norm",),
    "hooks, and a norm each": ("each",),
    "the same, and versions": ("each", "versions"),
    "the same, and one recurrent weight compared": ("each", "versions", "weight"),
}
"""Arm -> what its hooks read."""
WATCHES = {
    "a watch: nothing but gradients is due": {},
    "a watch that hands nothing on": {"_until": 10**9},
    "the same, and reads no step in full": {"_until": 10**9, "_every": 10**9},
}
"""Arm -> what of its quiet path is set to something that never comes."""


def watched(arm: Arm, change: dict[str, int]) -> None:
    """Watch an arm's model at one full reading in eight, with a change to its path."""
    watch = gradwatch.watch(arm.model, dir=None, wandb=None, every=10**6)
    watch._settings.schedule.in_full = 8
    quiet = watch._engine._quiet
    consider = quiet.consider

    def considered(*args: Any) -> None:
        consider(*args)
        if quiet.phase:
            vars(quiet).update(change)

    arm.block(BLOCK)
    quiet.consider = considered
    arm.watch = watch


def main() -> None:
    """Measure all arms and report them."""
    torch.set_num_threads(1)
    names = ("bare", "bare, control", *HOOKS, *WATCHES)
    arms = make(CASES["rnn"], *names)
    hooks = {name: Hooks(arms[name], what) for name, what in HOOKS.items()}
    for name, change in WATCHES.items():
        watched(arms[name], change)
    order = list(arms.items())
    for _ in range(ROUNDS + 4):
        random.shuffle(order)
        for name, arm in order:
            if name in hooks:
                with hooks[name]:
                    arm.block(BLOCK)
            else:
                arm.block(BLOCK)
    results = Results("floor", keep=True)
    results.table("rnn", ["arm", "added, us [95 %]", "added, %"], "nn.RNN 16->32")
    bare = arms["bare"].times[-ROUNDS:]
    step = 1e6 * statistics.median(bare) / BLOCK
    rng = random.Random(0)
    for name in names[1:]:
        times = arms[name].times[-ROUNDS:]
        ratios = [one / two - 1 for one, two in zip(times, bare, strict=True)]
        draws = (rng.choices(ratios, k=len(ratios)) for _ in range(500))
        found = sorted(map(statistics.median, draws))
        middle = statistics.median(ratios)
        results.row(
            name,
            f"{step * middle:+.0f} [{step * found[12]:.0f}, {step * found[487]:.0f}]",
            f"{100 * middle:+.2f}",
        )
    results.save()


if __name__ == "__main__":
    main()
