"""The spectral radius of a linear map that is only known by what it does to vectors.

Axes: B sequences, S entries of a vector, N matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

_TINY: Final = 1e-30
_EXHAUSTED: Final = 1e-6
"""Share of a vector below which what is left of it is rounding, in float32."""
_CONVERGED: Final = 1e-3
"""Largest residual of a Ritz value, relative to it, that can be believed."""


def arnoldi(apply: Callable[[Tensor], Tensor], start: Tensor, most: int) -> Tensor:
    r"""Return the Hessenberg matrices of Arnoldi's method, one a sequence.

    Args:
        apply: A linear map of vectors of shape ``(B, S)`` that mixes no sequences.
        start: Where to start, shape ``(B, S)``, nowhere 0 as a whole.
        most: The largest dimension m of the Krylov spaces; S is enough for all of it.

    Returns:
        Shape ``(B, m + 1, m)``: the map in an orthonormal basis, the last row what is
        left outside. Source: Saad, Numerical Methods for Large Eigenvalue Problems,
        algorithm 6.2, each vector orthogonalised twice.
    """
    count, size = start.shape
    most = min(most, size)
    basis = [start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)]
    found = start.new_zeros(count, most + 1, most)
    for k in range(most):
        new = apply(basis[k])
        whole = torch.linalg.vector_norm(new, dim=-1)
        known = torch.stack(basis, 1)
        for _ in range(2):
            shares = torch.einsum("bks,bs->bk", known, new)
            new = new - torch.einsum("bks,bk->bs", known, shares)
            found[:, : k + 1, k] += shares
        left = torch.linalg.vector_norm(new, dim=-1)
        exhausted = left <= _EXHAUSTED * whole.clamp_min(_TINY)
        left = torch.where(exhausted, 0, left)
        found[:, k + 1, k] = left
        unit = new / left.clamp_min(_TINY)[:, None]
        basis.append(torch.where(exhausted[:, None], 0, unit))
    return found


def ritz_radius(hessenberg: np.ndarray) -> float | None:
    """Return the median of the largest moduli of eigenvalues.

    Args:
        hessenberg: What :func:`arnoldi` returned, on the host, shape ``(N, m + 1, m)``.

    Returns:
        Of those that have converged: whose residual is at most 1e-3 of them. None where
        fewer than half have.
    """
    radii = []
    for matrix in hessenberg:
        if not np.isfinite(matrix).all():
            continue
        values, vectors = np.linalg.eig(matrix[:-1])
        first = int(np.abs(values).argmax())
        radius = float(np.abs(values[first]))
        residual = abs(matrix[-1, -1] * vectors[-1, first])
        if residual <= _CONVERGED * radius or radius == 0:
            radii.append(radius)
    if not radii or 2 * len(radii) < len(hessenberg):
        return None
    return float(np.median(radii))
