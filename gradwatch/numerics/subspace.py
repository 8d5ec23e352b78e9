"""Bases of a matrix's leading invariant subspace, from eigenvectors or Ritz vectors.

Axes: S matrices, H units, p probe columns, d dimensions of the subspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

DIMENSIONS: Final = 8
"""As many leading eigenvalues overtake each other in one step of training."""
_CONVERGED: Final = 1e-2
"""Residual, over rho, up to which a Ritz pair belongs to the subspace."""
_SAME: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Basis:
    r"""Biorthonormal left and right bases of a leading invariant subspace.

    :math:`L^H M R` is ``small`` for the matrix itself, and for a change of it the
    first-order change of ``small``.

    Attributes:
        small: The matrix in this basis, shape ``(d, d)``, largest modulus first; its
            diagonal holds the eigenvalues where they are exact.
        right: Shape ``(H, d)``; where the matrix is seen through probes, ``(p, d)``:
            coordinates on the right probes.
        left: The same for the left ones.
        beyond: Modulus of the largest eigenvalue that is left out; 0 for none.
        residual: Of the leading pair, over its modulus; 0 where it is exact.
    """

    small: np.ndarray
    right: np.ndarray
    left: np.ndarray
    beyond: float
    residual: float


class Pairs(NamedTuple):
    """All one-sided Ritz pairs of S matrices, as their probes give them.

    Attributes:
        values: Ritz values from the right probes, shape ``(S, p)``.
        mirrored: Conjugated Ritz values from the left probes, shape ``(S, p)``.
        x: Coordinates of the right Ritz vectors, unit columns, shape ``(S, p, p)``.
        y: Those of the left ones.
        right_gap: Norm of ``A r - value r`` for each, shape ``(S, p)``.
        left_gap: The same from the left.
        overlap: Products of the left with the right probes, shape ``(S, p, p)``.
        image: Products of the left probes with the right ones' images.
    """

    values: np.ndarray
    mirrored: np.ndarray
    x: np.ndarray
    y: np.ndarray
    right_gap: np.ndarray
    left_gap: np.ndarray
    overlap: np.ndarray
    image: np.ndarray


def ritz_pairs(probes: Mapping[str, np.ndarray]) -> Pairs:
    """Return the Ritz pairs of matrices from ``right``, ``left`` and their images.

    Args:
        probes: Orthonormal ``right`` and ``left``, shape ``(S, H, p)``, with
            ``right_image`` = A right and ``left_image`` = A^T left.
    """
    right, left = probes["right"], probes["left"]
    turned = left.transpose(0, 2, 1)
    values, x = np.linalg.eig(right.transpose(0, 2, 1) @ probes["right_image"])
    mirrored, y = np.linalg.eig(turned @ probes["left_image"])
    right_gap = probes["right_image"] @ x - (right @ x) * values[:, None]
    left_gap = probes["left_image"] @ y - (left @ y) * mirrored[:, None]
    return Pairs(
        values,
        mirrored.conj(),
        x,
        y,
        np.linalg.norm(right_gap, axis=1),
        np.linalg.norm(left_gap, axis=1),
        turned @ right,
        turned @ probes["right_image"],
    )


def basis_of_pairs(pairs: Pairs, s: int) -> Basis | None:
    """Return the basis that matrix s's converged leading Ritz pairs span, if any."""
    values = pairs.values[s]
    modulus = np.abs(values)
    order = np.argsort(-modulus, kind="stable").tolist()
    rho, free = modulus[order[0]], list(range(len(values)))
    if not rho > 0:
        return None
    rights: list[int] = []
    lefts: list[int] = []
    beyond, residual = 0.0, 0.0
    for i in order:
        j = min(free, key=lambda k: abs(pairs.mirrored[s, k] - values[i]))
        gap = max(pairs.right_gap[s, i], pairs.left_gap[s, j]) / rho
        full = len(rights) >= DIMENSIONS and not _partners(
            values[rights[-1]], values[i]
        )
        if full or not gap <= _CONVERGED:
            beyond = float(modulus[i])
            break
        residual = residual or float(gap)
        free.remove(j)
        rights.append(i)
        lefts.append(j)
    if not rights:
        return None
    x, turned = pairs.x[s][:, rights], pairs.y[s][:, lefts].conj().T
    try:
        left = np.linalg.solve(turned @ pairs.overlap[s] @ x, turned)
    except np.linalg.LinAlgError:  # a right vector that no left one belongs to
        return None
    return Basis(left @ pairs.image[s] @ x, x, left.conj().T, beyond, residual)


def bases_of_eigenvectors(
    values: np.ndarray, vectors: Tensor
) -> tuple[list[Basis | None], np.ndarray]:
    """Return the leading bases of matrices whose eigenvectors are all known.

    Args:
        values: All eigenvalues, shape ``(S, H)``.
        vectors: The right eigenvectors in its columns, shape ``(S, H, H)``, on the CPU.

    Returns:
        A basis for each matrix, None where it has no basis of eigenvectors; and the
        condition number of each leading eigenvalue, Inf there, shape ``(S,)``.
    """
    size = values.shape[1]
    order = np.argsort(-np.abs(values), axis=1, kind="stable")
    wanted = order[:, : min(DIMENSIONS + 1, size)]
    units = np.eye(size, dtype=values.dtype)[:, wanted].transpose(1, 0, 2)
    # Rows of the inverse: left eigenvectors, each over its product with the right one.
    solved, failed = torch.linalg.solve_ex(vectors.mT, torch.from_numpy(units.copy()))
    lefts, rights = solved.numpy(), vectors.numpy()
    with np.errstate(over="ignore"):  # near a defective matrix
        norms = np.linalg.norm(lefts[:, :, 0], axis=1)
    conditions = np.where(failed.numpy() != 0, np.inf, norms)
    bases: list[Basis | None] = []
    for s, ranked in enumerate(order):
        count = min(DIMENSIONS, size)
        if count < size and _partners(*values[s, ranked[count - 1 : count + 1]]):
            count += 1
        if not np.isfinite(conditions[s]) or not np.isfinite(lefts[s]).all():
            bases.append(None)
            continue
        beyond = abs(values[s, ranked[count]]) if count < size else 0.0
        small = np.diag(values[s, ranked[:count]])
        right, left = rights[s][:, ranked[:count]], lefts[s][:, :count].conj()
        bases.append(Basis(small, right, left, float(beyond), 0.0))
    return bases, conditions


def _partners(one: complex, other: complex) -> bool:
    """Tell whether two values are a conjugate pair, which no basis may cut."""
    return bool(one.imag) and abs(one - other.conjugate()) <= _SAME * abs(one)
