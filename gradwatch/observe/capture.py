"""What the hooks saw of one forward call, detached."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Capture:
    """One forward call of a recurrent module.

    Attributes:
        weights: Copies of the recurrent weights that the call used, by suffix, as
            :func:`gradwatch.recurrent.recurrent_weights` names them. Copies, because
            an optimizer may step before the end of backward.
        shape: ``(T, B)``, or None where unknown.
        dtype: Type of the output, such as ``float32``.
        reached: Whether a gradient reached its output: evaluation has none.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, int] | None = None
    dtype: str = ""
    reached: bool = False
