"""What can be known before the first hour of training: a verdict in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from gradwatch import console
from gradwatch.before import checks
from gradwatch.before.axes import Apart, apart
from gradwatch.before.checks import FAIL, NOTE, OK, WARN, Check
from gradwatch.before.starts import Start, best, reached, starts
from gradwatch.before.targets import reachable
from gradwatch.before.trial import (
    LossFn,
    Seen,
    flushed,
    same_randomness,
    subject,
    trained,
    tried,
)
from gradwatch.processes import refuse_parts

_BATCHES: Final = 4
_WIDTH: Final = 88
_BAR: Final = 10
_MOVED: Final = 0.97
"""Share of the first loss that the last one is, at most, where steps have moved it."""
_TINY: Final = -38.0
"""log10 of the smallest normal float32."""


@dataclass(frozen=True)
class Preflight:
    """The verdict of :func:`preflight`; printed, a line a check.

    Attributes:
        checks: What was seen, in the order in which it is told.
        starts: Where a lag was given and not reached: the model as it is, and other
            ways to start it, with how far back gradients arrive from each.
        lag: The lag that was given.
    """

    checks: Sequence[Check]
    starts: Sequence[Start] = field(default=())
    lag: int | None = None

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.sign == FAIL]

    @property
    def warned(self) -> list[Check]:
        """The checks that warn."""
        return [check for check in self.checks if check.sign == WARN]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    def __str__(self) -> str:
        """Return the verdict, a line a check."""
        lines = []
        for check in self.checks:
            sign = "" if check.sign == NOTE else check.sign
            lines.append(f"{check.text:{_WIDTH - 6}}  {sign}".rstrip())
            if check.name == "reach":
                lines += self._starts()
            if check.do:
                lines.append(f"  do: {check.do}")
        return "\n".join(lines)

    def _starts(self) -> Iterator[str]:
        """Yield a line for each way to start."""
        if not self.starts or self.lag is None:
            return
        chosen = best(self.starts, self.lag)
        wide = max(len(start.name) for start in self.starts)
        for start in self.starts:
            full = min(round(_BAR * start.horizon / self.lag), _BAR)
            bar = "#" * full + "." * (_BAR - full)
            mark = f"   <- {start.line}" if start is chosen and start.line else ""
            if start.is_faint(self.lag):
                mark = f"   only 10^{start.adjoint:.1f} of the largest{mark}"
            share = f"{min(start.horizon, self.lag):.0f}/{self.lag}"
            yield f"  {start.name:{wide}}  {share:>9}  {bar}{mark}"


def preflight(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFn,
    *,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    lag: int | None = None,
    batch_axis: int | None = None,
    steps: int = 0,
) -> Preflight:
    """Look at a model before it is trained: forward and backward of a few batches.

    The model, its modes and gradients, the optimizers and all random number generators
    are, bit for bit, what they were: a copy of model and optimizers is tried. Where
    they cannot be copied the model itself is, and put back; the verdict then says so.

    Args:
        model: A model with recurrent modules; behind DDP, DataParallel and
            torch.compile the module itself is tried.
        batches: A list of batches, or what gives them one by one, such as a
            DataLoader; the first four are used. Anything else is one batch.
        loss_fn: ``loss_fn(model, batch)``: your own lines from the batch to the loss.
            It has to use the model that it is given.
        optimizers: One or several; with them, parameters that none holds are found.
        lag: How many time steps back the task needs. With it, the horizon is judged,
            and where it is shorter other initialisations are tried.
        batch_axis: The axis of the batch's tensors along which samples lie; None: 0
            and 1 are tried.
        steps: How many steps a copy is trained for, on the batches in turn; 0 for none.

    Returns:
        The verdict, which is also printed by the logger ``gradwatch``.

    Raises:
        TypeError: If ``loss_fn`` returns no tensor, or an argument is of another type.
        ValueError: If the model has no recurrent module, there is no batch, the loss is
            not one number that depends on the model, a number is out of range,
            ``steps`` are asked for without an optimizer, or the model is sharded.
    """
    verdict = inspected(
        model,
        batches,
        loss_fn,
        optimizers=optimizers,
        lag=lag,
        batch_axis=batch_axis,
        steps=steps,
    )
    console.say(f"preflight\n{verdict}")
    return verdict


def inspected(
    model: nn.Module,
    batches: Any,
    loss_fn: LossFn,
    *,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    lag: int | None = None,
    batch_axis: int | None = None,
    steps: int = 0,
) -> Preflight:
    """Return what :func:`preflight` does, and print nothing."""
    given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    _check(given, lag, steps)
    refuse_parts(model, preflight=True)
    found: list[Check] = []
    with same_randomness(), flushed():
        several = _several(batches)
        with same_randomness(), subject(model, given) as one:
            seen = tried(one, several, loss_fn)
            if not one.copied:
                found.append(
                    Check(
                        "copy",
                        NOTE,
                        f"the model cannot be copied ({one.why}): it was used itself, "
                        "and parameters, buffers, gradients, modes and the optimizers' "
                        "states were put back",
                    )
                )
        ways = _ways(model, given, several, loss_fn, lag, seen)
        found.insert(0, _reach(seen, lag))
        for check in checks.ALL:
            found += check(seen)
        said = {check.name for check in found if check.sign == FAIL}
        kind = seen.facts.run.loss_kind
        if kind in (None, "mse") and not {"loss", "finite"} & said:
            with same_randomness(), subject(model, given) as one:
                targets = reachable(one, several[0], loss_fn)
            found += [] if targets is None else [checks.targets(targets)]
        if "axes" not in said:
            with same_randomness(), subject(model, given) as one:
                found += _apart(apart(one, several[0], loss_fn, batch_axis), batch_axis)
        if steps:
            with same_randomness(), subject(model, given) as one:
                found.append(_moved(trained(one, several, loss_fn, steps), steps))
        found += _denormal(seen)
    return Preflight(found, ways, lag)


def _check(given: Sequence[Any], lag: int | None, steps: int) -> None:
    for one in given:
        if not isinstance(one, Optimizer):
            raise TypeError(
                f"optimizers holds a {type(one).__name__}; expected an optimizer of "
                "torch.optim."
            )
    if lag is not None and (not isinstance(lag, int) or lag < 1):
        raise ValueError(f"lag is {lag!r}; expected an int of at least 1, or None.")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps is {steps!r}; expected an int of at least 0.")
    if steps and not given:
        raise ValueError(
            f"steps={steps} needs an optimizer: optimizers=torch.optim.Adam(...)."
        )


def _several(batches: Any) -> list[Any]:
    """Return the first few batches."""
    one = isinstance(batches, (tuple, dict, str)) or hasattr(batches, "shape")
    if one or not hasattr(batches, "__iter__"):
        return [batches]
    several = list(itertools.islice(iter(batches), _BATCHES))
    if not several:
        raise ValueError("batches is empty; expected at least one batch.")
    return several


def _ways(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Sequence[Any],
    loss_fn: LossFn,
    lag: int | None,
    seen: Seen,
) -> list[Start]:
    if lag is None:
        return []
    found = reached(seen, lag)
    if found.arrives(lag) or found.length < lag:
        return []
    return starts(model, optimizers, batches, loss_fn, lag=lag, seen=seen)


def _reach(seen: Seen, lag: int | None) -> Check:
    found = reached(seen, lag)
    if not found.length:
        return Check("reach", NOTE, "how far back gradients arrive was not measured")
    if lag is None:
        text = f"gradients arrive {found.horizon:.0f} of {found.length} steps back"
        return Check("reach", NOTE, text)
    text = f"you need {lag} steps back; "
    if found.length < lag:
        return Check("reach", WARN, f"{text}the sequences have {found.length}")
    text += f"gradients arrive {found.horizon:.0f}"
    if found.is_faint(lag):
        text += f", but only 10^{found.adjoint:.1f} of the largest"
    return Check("reach", OK if found.arrives(lag) else WARN, text)


def _apart(found: Apart | None, declared: int | None) -> Iterator[Check]:
    if found is None:
        return
    if found.axis is not None:
        yield Check("axes", OK, f"samples are axis {found.axis}; they do not mix")
        return
    axes = f"axis {declared}" if declared is not None else "no axis of the batch"
    stay = "do not stay apart" if declared is not None else "stay apart"
    yield Check(
        "axes",
        FAIL,
        f"samples along {axes} {stay}: changing one changes the output of others",
        "gradwatch explain axes_mixed",
    )


def _moved(losses: tuple[float, float], steps: int) -> Check:
    first, last = losses
    text = f"{steps} steps on these batches: loss {first:.3g} to {last:.3g}"
    still = not last <= _MOVED * first if first > 0 else last >= first
    return Check("steps", WARN if still else OK, text)


def _denormal(seen: Seen) -> Iterator[Check]:
    if reached(seen).adjoint < _TINY:
        yield Check(
            "speed",
            NOTE,
            "the gradient falls below 10^-38 of its largest: numbers this small slow "
            "a CPU down",
            "torch.set_flush_denormal(True)  # before the training, on a CPU",
        )
