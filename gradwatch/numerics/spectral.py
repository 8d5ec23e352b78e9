r"""Spectral radius of recurrent weights, certified, and what belongs beside it.

The radius is found by power iteration in its repeated-squaring form: after ``k``
squarings :math:`\|W^{2^k}\|^{1/2^k}` bounds it from above (Gelfand) and
:math:`(|\mathrm{tr}\,W^{2^k}|/H)^{1/2^k}` from below, and the columns of the power
span the leading eigenvectors, from which two-sided Ritz values are taken. There is no
warm-up, no state and no synchronisation: :func:`launch` runs on the device,
:func:`finish` on the host, later.

Axes: S matrices, H units, p probe columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradwatch.numerics.matrices import chosen, product, scaled
from gradwatch.numerics.subspace import (
    Basis,
    Pairs,
    bases_of_eigenvectors,
    basis_of_pairs,
    ritz_pairs,
)

SQUARINGS: Final = 14
EXACT_UP_TO: Final = 32
"""Up to this size the exact eigenvalues are as cheap as the squarings."""
FALLBACK_UP_TO: Final = 512
"""Up to this size exact eigenvalues stand in where the bounds do not close."""

_PROBES: Final = 16
_TOP: Final = 2
"""Probes for the highest power; the others get the middle one, which spans more."""
_MIDDLE: Final = 7
_TOLERANCE: Final = 1e-3
_AMPLIFIED: Final = 150.0
"""Float32 rounding may grow by this; near-defective matrices were off 1e-3 at 700."""
_DOUBLE_EPS: Final = 2.2e-16
_UNDERFLOW: Final = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Radius:
    """The spectral radius of one matrix and how far it can be trusted.

    Attributes:
        rho: Largest modulus of an eigenvalue; NaN for a matrix that holds NaN or Inf.
        lower: Lower bound; equal to ``rho`` where it is exact.
        upper: Upper bound; equal to ``rho`` where it is exact.
        certified: Whether ``rho`` is within 1e-3, relatively, for sure.
        source: ``ritz``, ``power``, ``exact``, ``zero``, ``nonfinite`` or ``open``
            (neither closed nor affordable exactly).
        eigenvalue: A leading eigenvalue, imaginary part >= 0; NaN where unknown.
        condition: Condition number of that eigenvalue; Inf where unknown.
        basis: Of the leading invariant subspace, for :mod:`gradwatch.numerics.drift`;
            None where there is none.
    """

    rho: float
    lower: float
    upper: float
    certified: bool
    source: str
    eigenvalue: complex = complex(math.nan, math.nan)
    condition: float = math.inf
    basis: Basis | None = field(default=None, repr=False, compare=False)


class Launched(NamedTuple):
    """What :func:`launch` left on the device.

    Attributes:
        matrix: The matrices over a power of two, exactly as stored, float32 or
            float64, shape ``(S, H, H)``; kept there, and moved only where exact
            eigenvalues are asked for.
        blocks: What the host needs, to be moved in one transfer.
    """

    matrix: Tensor
    blocks: dict[str, Tensor]


def spectral_radius(weight: Tensor) -> list[Radius]:
    r"""Return the spectral radius of each matrix, with its certificate.

    :math:`\rho(W) = \max_i |\lambda_i(W)|`. Certified means
    :math:`|\hat\rho - \rho| \le 10^{-3} \rho`; on trained and on default-initialised
    weights the error is below 1e-4.

    Args:
        weight: One square matrix or a batch, shape ``(H, H)`` or ``(S, H, H)``, any
            floating dtype and device.

    Returns:
        One :class:`Radius` a matrix.

    Raises:
        ValueError: If the matrices are not square.
        TypeError: If they are not real floating-point numbers.

    Example:
        >>> [radius] = spectral_radius(torch.eye(3).mul(0.5))
        >>> radius.rho, radius.certified
        (0.5, True)

    References:
        Gelfand (1941); Stewart & Sun (1990), Matrix Perturbation Theory.
    """
    launched = launch(weight)
    return finish(launched, {k: v.cpu().numpy() for k, v in launched.blocks.items()})


def launch(weight: Tensor) -> Launched:
    """Run the device's part of the spectral radius: matrix products, no waiting.

    Args:
        weight: Shape ``(H, H)`` or ``(S, H, H)``, any floating dtype and device. A
            matrix that holds NaN or Inf leaves the others exact.

    Returns:
        What :func:`finish` needs.

    Raises:
        ValueError: If the matrices are not square.
        TypeError: If they are not real floating-point numbers.
    """
    with torch.autocast(weight.device.type, enabled=False):
        matrix, scale = scaled(weight)
        if matrix.shape[-1] <= EXACT_UP_TO:
            return Launched(matrix, {"scale": scale, "matrix": matrix})
        return Launched(matrix, {"scale": scale, **_squarings(matrix.float())})


def _squarings(matrix: Tensor) -> dict[str, Tensor]:
    power, norms = matrix, []
    middle = matrix
    for level in range(SQUARINGS + 1):
        if level:
            power = product(power, power)
        norm = torch.linalg.vector_norm(power, dim=(1, 2), keepdim=True)
        power = power / norm.clamp_min(1e-30)
        norms.append(norm[:, 0, 0])
        if level == _MIDDLE:
            middle = power
    size = matrix.shape[-1]
    fixed = torch.Generator().manual_seed(0)  # never the user's generator
    probe = torch.randn(
        size, _PROBES, generator=fixed, device="cpu", dtype=torch.float32
    ).to(matrix.device, non_blocking=True)
    probe = probe.expand(len(matrix), -1, -1)
    first, second = probe[..., :_TOP], probe[..., _TOP:]
    right = torch.cat([product(power, first), product(middle, second)], -1)
    left = torch.cat([product(power.mT, first), product(middle.mT, second)], -1)
    right, left = torch.linalg.qr(right)[0], torch.linalg.qr(left)[0]
    return {
        "norms": torch.stack(norms, 1),
        "trace": power.diagonal(dim1=1, dim2=2).sum(1),
        "right": right,
        "left": left,
        "right_image": product(matrix, right),
        "left_image": product(matrix.mT, left),
    }


def finish(launched: Launched, blocks: Mapping[str, Any]) -> list[Radius]:
    """Finish on the host what :func:`launch` began.

    Args:
        launched: What :func:`launch` returned.
        blocks: Its ``blocks`` as numpy arrays on the host.

    Returns:
        One :class:`Radius` a matrix.
    """
    host = {key: np.asarray(v, dtype=np.float64) for key, v in blocks.items()}
    scale = host["scale"].tolist()
    if "matrix" in host:
        return _exact(torch.from_numpy(host["matrix"]), scale)
    size, pairs, found = host["right"].shape[1], ritz_pairs(host), []
    ritz = _lead(pairs)
    for s, factor in enumerate(scale):
        if not math.isfinite(factor) or factor == 0:
            found.append(_trivial(factor))
            continue
        norms, trace = host["norms"][s].tolist(), float(host["trace"][s])
        radius = _judge(norms, trace, size, ritz[s], factor)
        found.append(replace(radius, basis=basis_of_pairs(pairs, s)))
    left = [s for s, radius in enumerate(found) if radius.source == "open"]
    if left and size <= FALLBACK_UP_TO:
        matrices = chosen(launched.matrix, left).cpu().double()  # which is waited for
        exact = _exact(matrices, [scale[s] for s in left])
        for s, radius in zip(left, exact, strict=True):
            found[s] = replace(radius, basis=None)  # of the matrix, not of its probes
    return found


def _trivial(scale: float) -> Radius:
    if scale == 0:
        return Radius(
            rho=0.0,
            lower=0.0,
            upper=0.0,
            certified=True,
            source="zero",
            eigenvalue=0j,
            condition=1.0,
        )
    return Radius(
        rho=math.nan, lower=0.0, upper=math.inf, certified=False, source="nonfinite"
    )


class _Ritz(NamedTuple):
    value: complex
    residual: float
    condition: float


def _lead(pairs: Pairs) -> list[_Ritz]:
    """Return the leading two-sided Ritz value of each matrix, as it was scaled."""
    each = np.arange(len(pairs.values))
    modulus = np.abs(pairs.values)
    tied = modulus >= modulus.max(axis=1, keepdims=True) * (1 - 1e-9)
    lead = np.where(tied, pairs.values.imag, -np.inf).argmax(axis=1)
    value = pairs.values[each, lead]
    match = np.abs(pairs.mirrored - value[:, None]).argmin(axis=1)
    x = pairs.x[each, :, lead, None]
    turned = pairs.y[each, :, match, None].conj().transpose(0, 2, 1)
    gaps = np.maximum(pairs.right_gap[each, lead], pairs.left_gap[each, match])
    overlap = (turned @ pairs.overlap @ x)[:, 0, 0]
    with np.errstate(all="ignore"):  # orthogonal to each other: no Ritz value
        value = (turned @ pairs.image @ x)[:, 0, 0] / overlap
        condition = 1 / np.abs(overlap)
    columns = value.tolist(), gaps.tolist(), condition.tolist()
    return [_Ritz(complex(v), gap, c) for v, gap, c in zip(*columns, strict=True)]


def _judge(
    norms: list[float], trace: float, size: int, ritz: _Ritz, scale: float
) -> Radius:
    """Weigh the bounds against the Ritz value; both of the matrix as it was scaled."""
    logs, total = [], 0.0
    for level, norm in enumerate(norms):
        # Below this a power is rounding error: deeper levels would invent a radius.
        if not norm > (_UNDERFLOW if level else 1e-30):
            break
        total = 2 * total + math.log(norm)
        logs.append(total)
    last = len(logs) - 1
    complete = last == len(norms) - 1
    upper = min(math.exp(log / 2.0**j) for j, log in enumerate(logs))
    lower = 0.0
    if complete and trace:
        lower = math.exp((logs[-1] + math.log(abs(trace) / size)) / 2.0**last)
    ratio = math.exp((logs[-1] - logs[-2]) / 2.0 ** (last - 1)) if last else upper
    # Transient growth: how much larger a power was than the radius explains.
    excess = max(log - 2.0**j * math.log(ratio) for j, log in enumerate(logs))
    growth = math.exp(min(excess, 600.0)) / math.sqrt(size)
    power = min(max(ratio, lower), upper) if lower <= upper else ratio
    modulus = abs(ritz.value)
    inside = lower * (1 - 1e-4) <= modulus <= upper * (1 + 1e-4)
    agrees = inside and ritz.residual <= _TOLERANCE * modulus
    sharp = max(growth, ritz.condition) <= _AMPLIFIED if agrees else growth <= 10
    certified = sharp and abs(upper - lower) <= 0.9 * _TOLERANCE * upper
    value = complex(ritz.value.real, abs(ritz.value.imag))
    return Radius(
        rho=(modulus if agrees else power) * scale,
        lower=lower * scale,
        upper=upper * scale,
        certified=certified,
        source=("ritz" if agrees else "power") if certified else "open",
        eigenvalue=value * scale if agrees else complex(math.nan, math.nan),
        condition=ritz.condition if agrees else math.inf,
    )


def _exact(matrix: Tensor, scale: Sequence[float]) -> list[Radius]:
    """Return the radii from all eigenvalues, float64 on the host.

    Through torch, because numpy's BLAS ignores torch's number of threads. Finite by
    now, because LAPACK on a NaN ends the process.
    """
    eigen, vectors = torch.linalg.eig(matrix)
    values = eigen.numpy()
    lead = np.abs(values).argmax(axis=1)
    bases, conditions = bases_of_eigenvectors(values, vectors)
    sizes = torch.linalg.vector_norm(matrix, dim=(1, 2)).tolist()
    found = []
    for s, factor in enumerate(scale):
        if not math.isfinite(factor) or factor == 0:
            found.append(_trivial(factor))
            continue
        value, condition = complex(values[s, lead[s]]), float(conditions[s])
        found.append(
            Radius(
                rho=abs(value) * factor,
                lower=abs(value) * factor,
                upper=abs(value) * factor,
                certified=condition * _DOUBLE_EPS * sizes[s] <= 1e-6 * abs(value),
                source="exact",
                eigenvalue=complex(value.real, abs(value.imag)) * factor,
                condition=condition,
                basis=bases[s],
            )
        )
    return found
