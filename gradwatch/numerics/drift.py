r"""How one update will have changed the spectral radius, to first order.

For a single eigenvalue with left and right eigenvectors y and x,
:math:`d|\lambda| = \mathrm{Re}\,[(\bar\lambda/|\lambda|)\, y^H dW x / y^H x]`. But
:math:`\rho` is a maximum, and eigenvalues overtake each other: the change of the whole
leading invariant subspace is taken, of which the single pair is the special case.

Axes: S matrices, H units, p probe columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gradwatch.numerics.matrices import chosen, product
from gradwatch.numerics.spectral import Launched, Radius, finish, launch
from gradwatch.numerics.subspace import Basis

_LEADING: Final = 1e-3
"""Residual of the leading Ritz pair, over rho, up to which the basis is trusted."""
_SMALL: Final = 0.1
"""Share of rho that an eigenvalue may move for the first order to hold."""
_CLEARANCE: Final = 2.0
"""Times the largest move in the basis that must separate rho from what it omits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """The predicted change of a spectral radius.

    Attributes:
        value: In the unit of the radius; NaN where the matrix has no usable basis.
        reliable: Whether the prediction can be trusted: the subspace has converged,
            the update is small, and no eigenvalue outside it can have overtaken.
    """

    value: float
    reliable: bool


def launch_change(
    launched: Launched, after: Tensor, rows: Sequence[int] | None = None
) -> Tensor:
    """Run the device's part of the drift: matrix products, no waiting.

    Args:
        launched: What :func:`gradwatch.numerics.spectral.launch` returned for the
            matrices before the update, its blocks still on their device.
        after: The same matrices after it, shape ``(S, H, H)``, on the same device.
        rows: Which of the launched matrices these are; None for all.

    Returns:
        The change as :func:`finish_change` wants it: of the matrices themselves where
        they are small, shape ``(S, H, H)``, else between the probes, ``(S, p, p)``.
    """
    before, blocks = launched.matrix, launched.blocks
    if rows is not None and len(rows) < len(before):
        before = chosen(before, rows)
        blocks = {key: chosen(block, rows) for key, block in blocks.items()}
    scale = blocks["scale"][:, None, None].to(before.dtype)
    change = after.to(before.dtype) / scale - before
    if "right" not in blocks:
        return change
    with torch.autocast(after.device.type, enabled=False):
        moved = product(change.float(), blocks["right"])
        return product(blocks["left"].mT, moved)


def finish_change(
    radii: Sequence[Radius], scale: np.ndarray, moved: np.ndarray
) -> list[Drift]:
    """Finish on the host what :func:`launch_change` began.

    Args:
        radii: Of the matrices before the update, with their bases.
        scale: The block of that name that ``launch`` returned, shape ``(S,)``.
        moved: What :func:`launch_change` returned.
    """
    found = []
    for s, radius in enumerate(radii):
        change = np.asarray(moved[s], dtype=np.float64)
        if radius.basis is None or not np.isfinite(change).all():
            found.append(Drift(value=math.nan, reliable=False))
        else:
            found.append(_drift(radius, radius.basis, change, float(scale[s])))
    return found


def predicted_drift(before: Tensor, after: Tensor) -> list[Drift]:
    r"""Return the first-order change of each spectral radius from one W to the next.

    With bases L, R of the leading invariant subspace (8 dimensions, more where a
    conjugate pair would be cut, fewer where fewer have converged):
    :math:`\max|\mathrm{eig}(L^H W R + L^H dW R)| - \max|\mathrm{eig}(L^H W R)|`.

    Args:
        before: One square matrix or a batch, shape ``(H, H)`` or ``(S, H, H)``.
        after: The same after the update, of the same shape.

    Returns:
        One :class:`Drift` a matrix.

    Raises:
        ValueError: If the shapes differ or the matrices are not square.

    Example:
        >>> before = torch.diag(torch.tensor([0.9, 0.5, 0.1]))
        >>> [drift] = predicted_drift(before, before + 0.01)
        >>> round(drift.value, 3), drift.reliable
        (0.01, True)

    References:
        Stewart & Sun (1990), Matrix Perturbation Theory, chapters IV and V.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"the weights have shape {tuple(before.shape)} before and "
            f"{tuple(after.shape)} after the update; expected the same."
        )
    launched = launch(before)
    after = after.detach() if after.dim() == 3 else after.detach()[None]
    moved = launch_change(launched, after).cpu().numpy()
    blocks = {key: block.cpu().numpy() for key, block in launched.blocks.items()}
    return finish_change(finish(launched, blocks), blocks["scale"], moved)


def _drift(radius: Radius, basis: Basis, moved: np.ndarray, scale: float) -> Drift:
    change = basis.left.conj().T @ moved @ basis.right
    rho = float(np.abs(np.linalg.eigvals(basis.small)).max())
    value = float(np.abs(np.linalg.eigvals(basis.small + change)).max()) - rho
    own = basis.small.diagonal()
    largest = float(np.abs(np.abs(own + change.diagonal()) - np.abs(own)).max())
    gap = rho - basis.beyond
    clear = gap >= largest and gap + max(value, 0.0) >= _CLEARANCE * largest
    small = largest <= _SMALL * rho
    sharp = radius.certified and basis.residual <= _LEADING
    return Drift(value=value * scale, reliable=bool(clear and small and sharp))
