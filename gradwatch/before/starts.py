"""How far back gradients arrive from each way to start a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from gradwatch import init
from gradwatch.before.trial import LossFn, Seen, same_randomness, subject, tried
from gradwatch.record import Stream


class Start(NamedTuple):
    """A way to start a model, and what arrives then.

    Attributes:
        name: As it is shown.
        line: The line of Python that does it; empty for the model as it is.
        horizon: Time steps back that gradients arrive, in the stream where it is most.
        length: Time steps of the sequences.
        adjoint: log10 of the gradient at the first time step beside the largest one.
    """

    name: str
    line: str
    horizon: float
    length: int
    adjoint: float


def reached(seen: Seen) -> tuple[float, int, float]:
    """Return the longest horizon, the length of its sequences, and its adjoint."""
    found = []
    for stream in seen.streams:
        horizons = seen.metric(stream, "horizon")
        adjoints = seen.metric(stream, "adjoint_log10")
        facts = seen.facts.modules.get(stream.module)
        length = facts.T if facts is not None and facts.T else 0
        if horizons:
            found.append((min(horizons), length, min(adjoints, default=-math.inf)))
    nothing = (0.0, 0, -math.inf)
    return max(found, key=lambda one: (one[0], one[2]), default=nothing)


def candidates(
    streams: Sequence[Stream], lag: int
) -> Iterator[tuple[str, str, Callable[[nn.Module], Any]]]:
    """Yield the name of each way to start, its line of Python, and what does it."""
    if any(stream.gates for stream in streams):
        long = max(lag, 3)
        bias = round(math.log(long), 1)
        for value in dict.fromkeys((1.0, bias)):
            yield (
                f"forget_bias_({value:g})",
                f"gradwatch.init.forget_bias_(model, {value:g})",
                partial(_forget_bias, value=value),
            )
        yield (
            f"chrono_({long})",
            f"gradwatch.init.chrono_(model, t_max={long})",
            lambda model: init.chrono_(model, t_max=long),
        )
    if any(not stream.gates for stream in streams):
        vanilla = [stream.name for stream in streams if not stream.gates]
        yield (
            "orthogonal_()",
            "gradwatch.init.orthogonal_(model)",
            lambda model: init.orthogonal_(model, streams=vanilla),
        )
        if all(stream.kind == "RNN_RELU" for stream in streams):
            yield (
                "identity_()",
                "gradwatch.init.identity_(model)",
                lambda model: init.identity_(model, streams=vanilla),
            )


def _forget_bias(model: nn.Module, value: float) -> None:
    init.forget_bias_(model, value)


def starts(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Sequence[Any],
    loss_fn: LossFn,
    *,
    lag: int,
    seen: Seen,
) -> list[Start]:
    """Return the model as it is, and each other way to start it.

    Args:
        model: Is copied for each.
        optimizers: Those that train it.
        batches: The first one is used.
        loss_fn: Returns the loss of a model on a batch.
        lag: How many steps back are needed.
        seen: What a trial has seen of the model as it is.
    """
    found = [Start("as it is", "", *reached(seen))]
    for name, line, act in candidates(seen.streams, lag):
        with same_randomness(), subject(model, optimizers) as given:
            act(given.model)
            trial = tried(given, batches[:1], loss_fn, whole=False)
            found.append(Start(name, line, *reached(trial)))
    return found


def best(found: Sequence[Start], lag: int) -> Start:
    """Return the start with the longest horizon up to the lag; ties by the adjoint."""
    return max(found, key=lambda one: (min(one.horizon, lag), one.adjoint))
