"""How far back gradients arrive from each way to start a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from torch import nn
from torch.optim import Optimizer

from gradwatch import init
from gradwatch.before.trial import LossFn, Seen, same_randomness, subject, tried
from gradwatch.metrics import stream_key
from gradwatch.record import Stream

FAINT: Final = -2.0
"""log10 of a gradient beside the largest one, below which it arrives and is too small.

Of 12 starts whose gradient was that small as far back as the task needed, 4 learned at
all, and all of the 125 whose gradient was larger; see ``docs/preflight.md``.
"""


class Start(NamedTuple):
    """A way to start a model, and what arrives then.

    Attributes:
        name: As it is shown.
        line: The line of Python that does it; empty for the model as it is.
        horizon: Time steps back that gradients arrive, in the stream where it is most.
        length: Time steps of the sequences.
        adjoint: log10 of the gradient as far back as is needed beside the largest one.
    """

    name: str
    line: str
    horizon: float
    length: int
    adjoint: float

    def arrives(self, lag: int) -> bool:
        """Tell whether a gradient arrives so many steps back that can be learned by."""
        return self.horizon >= lag and not self.is_faint(lag)

    def is_faint(self, lag: int) -> bool:
        """Tell whether a gradient arrives so many steps back that is too small."""
        return self.horizon >= lag and self.adjoint < FAINT


def reached(seen: Seen, lag: int | None = None) -> Start:
    """Return how far gradients arrive in the model as it is.

    Args:
        seen: What a trial has seen of it.
        lag: How many steps back are needed; None: the first time step is.
    """
    found = []
    for stream in seen.streams:
        horizons = seen.metric(stream, "horizon")
        facts = seen.facts.modules.get(stream.module)
        length = facts.T if facts is not None and facts.T else 0
        if horizons and length:
            back = length - 1 if lag is None else min(lag, length - 1)
            adjoint = min(_adjoints(seen, stream, length, back), default=-math.inf)
            found.append(Start("as it is", "", min(horizons), length, adjoint))
    nothing = Start("as it is", "", 0.0, 0, -math.inf)
    return max(found, key=lambda one: (one.horizon, one.adjoint), default=nothing)


def _adjoints(seen: Seen, stream: Stream, length: int, back: int) -> Iterator[float]:
    """Yield log10 of the gradient so many steps before the last, in each batch."""
    keys = [stream_key(stream, name) for name in ("adjoint", "adjoint_cell")]
    for record in seen.records:
        own = [record.profiles[key] for key in keys if key in record.profiles]
        profile = [math.hypot(*values) for values in zip(*own, strict=True)]
        if profile and max(profile) > 0:
            # Of a long sequence a profile has the largest value of each bin.
            at = ((length - back) * len(profile) - 1) // length
            share = profile[at] / max(profile)
            yield math.log10(share) if share > 0 else -math.inf


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
    found = [reached(seen, lag)]
    for name, line, act in candidates(seen.streams, lag):
        with same_randomness(), subject(model, optimizers) as given:
            act(given.model)
            trial = tried(given, batches[:1], loss_fn, whole=False)
            found.append(reached(trial, lag)._replace(name=name, line=line))
    return found


def best(found: Sequence[Start], lag: int) -> Start:
    """Return the start with the longest horizon up to the lag; ties by the adjoint."""
    return max(found, key=lambda one: (min(one.horizon, lag), one.adjoint))
