"""What a cell of the user's own tells of its gates, where it has the method for it.

``gradwatch_gates`` is given what ``forward`` was given, and returns by gate the
nonlinearity, the activation and, where there is one, the recurrent matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

METHOD: Final = "gradwatch_gates"
NONLINEARITIES: Final = ("sigmoid", "tanh", "relu")
_WANTED: Final = (
    "expected a dict from the name of a gate to (nonlinearity, activation) or "
    "(nonlinearity, activation, matrix), such as {'f': ('sigmoid', f, self.u.weight)}"
)


class Gate(NamedTuple):
    """One gate at one call.

    Attributes:
        nonlinearity: One of :data:`NONLINEARITIES`.
        activation: What it came to, shape ``(B, H)``.
        weight: The matrix by which the state enters it, shape ``(H, H)``, or None.
    """

    nonlinearity: str
    activation: Tensor
    weight: Tensor | None

    def few(self, samples: int | None) -> Gate:
        """Return copies, of a few sequences."""
        batch = len(self.activation)
        few = batch if samples is None else min(samples, batch)
        kept = self.activation[slice(0, batch // few * few, batch // few)].clone()
        weight = None if self.weight is None else self.weight.detach().clone()
        return Gate(self.nonlinearity, kept.detach(), weight)


def asked(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Gate]:
    """Ask a cell for its gates at a call; nothing where it has no method.

    Random numbers that the method draws are put back, no graph is made of it.

    Raises:
        TypeError: If it returns anything else than gates.
        ValueError: If a nonlinearity is unknown, or a matrix is not square.
    """
    method = getattr(module, METHOD, None)
    if method is None:
        return {}
    drawn = torch.get_rng_state()
    try:
        with torch.no_grad():
            told = method(*args, **kwargs)
    finally:
        torch.set_rng_state(drawn)
    where = f"{type(module).__name__}.{METHOD}"
    if not isinstance(told, Mapping):
        raise TypeError(f"{where} returned a {type(told).__name__}; {_WANTED}.")
    return {_name(where, name): _gate(where, name, told[name]) for name in told}


def _name(where: str, name: object) -> str:
    if not isinstance(name, str) or not name or "/" in name or "." in name:
        raise TypeError(f"{where} names a gate {name!r}; expected a short word.")
    return name


def _gate(where: str, name: str, told: Any) -> Gate:
    parts = tuple(told) if isinstance(told, tuple | list) else ()
    kind, activation, weight = (
        (*parts, None, None)[:3] if len(parts) > 1 else [None] * 3
    )
    if not isinstance(activation, Tensor) or not isinstance(weight, Tensor | None):
        raise TypeError(f"{where} has {told!r:.80} for {name!r}; {_WANTED}.")
    if kind not in NONLINEARITIES:
        raise ValueError(
            f"{where} names the nonlinearity {kind!r} for {name!r}; expected one of "
            f"{', '.join(NONLINEARITIES)}."
        )
    if activation.dim() != 2:
        raise ValueError(
            f"{where} has an activation of shape {tuple(activation.shape)} for "
            f"{name!r}; expected (batch, units)."
        )
    if weight is not None and (weight.dim() != 2 or weight.shape[0] != weight.shape[1]):
        raise ValueError(
            f"{where} has a matrix of shape {tuple(weight.shape)} for {name!r}; "
            "expected the square one that maps the state to the gate."
        )
    return Gate(kind, activation, weight)
