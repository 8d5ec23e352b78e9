"""The catalogue of remedies: what there is, and how it is applied.

Which of them helps against which cause stands in the rows of the kinds; that it does
was measured: docs/remedies.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from torch import nn
from torch.optim import Optimizer

from gradwatch import clip, init, parametrize
from gradwatch.record import Remedy, Stream
from gradwatch.rewrite import holders

_ORTHOGONAL: Final = "init.orthogonal_"
_CHRONO: Final = "init.chrono_"
_ZERO_BIAS: Final = "init.zero_bias_"
_CLIPPED: Final = "clip.NormClip"
_SHORTEST: Final = 3
"""Least longest lag that chrono initialisation can spread memories up to."""


def fitted(name: str, stream: Stream, length: int = 0) -> Remedy:
    """Return a remedy with the arguments that fit one stream.

    Args:
        name: Name of the remedy, such as ``init.chrono_``.
        stream: The stream that shows what it helps against.
        length: Steps of the sequence, the longest lag there can be; 0 if unknown.
    """
    args: dict[str, Any] = {"streams": [stream.name]}
    if name == _CHRONO and not stream.gates:
        name = _ORTHOGONAL
    elif name == _CHRONO:
        args = {"t_max": max(length, _SHORTEST), **args}
    elif name == _ZERO_BIAS and stream.gates:
        args = {"gates": ["o"], **args}
    return Remedy(name=name, args=args)


def clipping(max_norm: float) -> Remedy:
    """Return the remedy that holds the norm of the gradients down."""
    return Remedy(name=_CLIPPED, args={"max_norm": float(f"{max_norm:.2g}")})


def line(remedy: Remedy) -> str:
    """Return the line of Python that does the same."""
    args = "".join(f", {name}={value!r}" for name, value in remedy.args.items())
    if remedy.name.startswith("clip."):
        return f"gradwatch.{remedy.name}({args[2:]}).attach(optimizer)"
    return f"gradwatch.{remedy.name}(model{args}, optimizer=optimizer)"


class Applied(NamedTuple):
    """What applying a remedy did.

    Attributes:
        answer: What the remedy itself returned.
        streams: The streams whose weights it changed.
    """

    answer: Any
    streams: tuple[str, ...]


_Act = Callable[..., Any]


def _clipper(make: Callable[..., clip.Clipper]) -> _Act:
    def attach(model: nn.Module, *, optimizer: Sequence[Optimizer], **args: Any) -> Any:
        given = holders(optimizer, list(model.parameters()))
        return [make(**args).attach(one) for one in given]

    return attach


REMEDIES: Final[Mapping[str, _Act]] = MappingProxyType(
    {
        "init.orthogonal_": init.orthogonal_,
        "init.identity_": init.identity_,
        "init.forget_bias_": init.forget_bias_,
        "init.chrono_": init.chrono_,
        "init.zero_bias_": init.zero_bias_,
        "init.spectral_cap_": init.spectral_cap_,
        "parametrize.orthogonal": parametrize.orthogonal,
        "parametrize.remove": parametrize.remove,
        "clip.NormClip": _clipper(clip.NormClip),
        "clip.AutoClip": _clipper(clip.AutoClip),
        "clip.ZClip": _clipper(clip.ZClip),
        "clip.LogZClip": _clipper(clip.LogZClip),
        "clip.AGC": _clipper(clip.AGC),
    }
)
"""Name of a remedy, as typed behind ``gradwatch.`` -> what it does to a model."""


def apply(remedy: Remedy, model: nn.Module, optimizers: Sequence[Optimizer]) -> Applied:
    """Carry a remedy out.

    Args:
        remedy: Its name and arguments.
        model: The model.
        optimizers: The optimizers that train it.

    Returns:
        What it did.

    Raises:
        TypeError: If it is no Remedy, or its arguments are not those of the remedy.
        ValueError: If its name is unknown, or the remedy cannot be applied.
    """
    if not isinstance(remedy, Remedy):
        raise TypeError(
            f"got {type(remedy).__name__}; expected a Remedy, such as alert.remedy. "
            "Where that is None, the alert's message says what to do by hand."
        )
    act = REMEDIES.get(remedy.name)
    if act is None:
        raise ValueError(
            f"no remedy is called {remedy.name!r}; there are {', '.join(REMEDIES)}."
        )
    answer = act(model, **remedy.args, optimizer=optimizers)
    changed = [one for one in answer if isinstance(one, init.Changed)]
    return Applied(answer, tuple(one.stream for one in changed))
