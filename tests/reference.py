"""Slow truths in float64 that the fast numerics are tested against."""

import math

import torch
from torch import Tensor

# ---- spectra


def spectral_radius(matrix: Tensor) -> float:
    """From all eigenvalues of the matrix as it is stored; NaN where it is not finite.

    Never from the formula it was made by: in float32 a rotated Jordan block is another
    matrix. Finiteness is asked first, because LAPACK on a NaN ends the process.
    """
    if not torch.isfinite(matrix).all():
        return math.nan
    return torch.linalg.eigvals(matrix.double()).abs().max().item()


def sigma_max(matrix: Tensor) -> float:
    """The largest singular value, from all of them."""
    return torch.linalg.svdvals(matrix.double())[0].item()


def orthogonality(matrix: Tensor) -> float:
    """The distance of W^T W from the identity, over sqrt(H)."""
    double = matrix.double()
    gap = double.T @ double - torch.eye(len(double), dtype=torch.float64)
    return gap.norm().item() / math.sqrt(len(double))


def norm(tensors) -> float:
    """The L2 norm over several tensors, exactly summed squares of float64 values."""
    values = [v for t in tensors for v in t.detach().double().flatten().tolist()]
    return math.sqrt(math.fsum(v * v for v in values))


# ---- running statistics


def median(values) -> float:
    """By sorting; NaN where there are none."""
    ranked = sorted(values)
    if not ranked:
        return math.nan
    return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


def robust_z(values, value, floor) -> float:
    """Distance from the median over 1.4826 MAD + floor; needs that to be above 0."""
    deviations = [abs(v - median(values)) for v in values]
    return (value - median(values)) / (1.4826 * median(deviations) + floor)
