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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

SQUARINGS: Final = 14
EXACT_UP_TO: Final = 32
"""Up to this size the exact eigenvalues are as cheap as the squarings."""
FALLBACK_UP_TO: Final = 512
"""Up to this size exact eigenvalues stand in where the bounds do not close."""

_PROBES: Final = 8
_MIDDLE: Final = 6
_GRAM_SQUARINGS: Final = 10
_TOLERANCE: Final = 1e-3
_SINGLE_EPS: Final = 6e-8
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
    """

    rho: float
    lower: float
    upper: float
    certified: bool
    source: str
    eigenvalue: complex = complex(math.nan, math.nan)
    condition: float = math.inf


class Launched(NamedTuple):
    """What :func:`launch` left on the device.

    Attributes:
        matrix: The matrices over their largest entry, float32, shape ``(S, H, H)``;
            kept there, and moved only where exact eigenvalues are asked for.
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

    Example:
        >>> [radius] = spectral_radius(torch.eye(3).mul(0.5))
        >>> radius.rho, radius.certified
        (0.5, True)

    References:
        Gelfand (1941); Stewart & Sun (1990), Matrix Perturbation Theory.
    """
    launched = launch(weight if weight.dim() == 3 else weight[None])
    return finish(launched, {k: v.cpu().numpy() for k, v in launched.blocks.items()})


def launch(weight: Tensor) -> Launched:
    """Run the device's part of the spectral radius: matrix products, no waiting.

    Args:
        weight: Shape ``(S, H, H)``, any floating dtype and device. A matrix that holds
            NaN or Inf leaves the others exact.

    Returns:
        What :func:`finish` needs.

    Raises:
        ValueError: If the matrices are not square.
    """
    if weight.dim() != 3 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected square matrices, "
            "(H, H) or (S, H, H). A stacked W_hh is cut into its gates first."
        )
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        matrix, scale, usable = _over_largest(weight)
        if weight.shape[-1] <= EXACT_UP_TO:
            return Launched(matrix, {"scale": scale, "matrix": matrix})
        return Launched(matrix, {"scale": scale, **_squarings(matrix, usable)})


def _over_largest(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices over their largest entry, that entry, and who has one."""
    weight = weight.detach()
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    scale = weight.abs().amax(dim=(1, 2))
    usable = torch.isfinite(scale) & (scale > 0)
    divisor = torch.where(usable, scale, torch.ones_like(scale))[:, None, None]
    matrix = torch.where(usable[:, None, None], weight / divisor, 0.0).float()
    return matrix, scale, usable


def _squarings(matrix: Tensor, usable: Tensor) -> dict[str, Tensor]:
    power, norms = matrix, []
    middle = matrix
    for level in range(SQUARINGS + 1):
        if level:
            power = torch.bmm(power, power)
        norm = torch.linalg.vector_norm(power, dim=(1, 2), keepdim=True)
        power = power / norm.clamp_min(1e-30)
        norms.append(norm[:, 0, 0])
        if level == _MIDDLE:
            middle = power
    size = matrix.shape[-1]
    fixed = torch.Generator().manual_seed(0)  # never the user's generator
    probe = torch.randn(size, _PROBES, generator=fixed, device="cpu")
    probe = probe.to(matrix.device).expand(len(matrix), -1, -1)
    half = _PROBES // 2
    first, second = probe[..., :half], probe[..., half:]
    right = torch.cat([power @ first, middle @ second], -1)
    left = torch.cat([power.mT @ first, middle.mT @ second], -1)
    right, left = torch.linalg.qr(right)[0], torch.linalg.qr(left)[0]
    return {
        "norms": torch.stack(norms, 1),
        "trace": power.diagonal(dim1=1, dim2=2).sum(1),
        "right": right,
        "left": left,
        "right_image": torch.bmm(matrix, right),
        "left_image": torch.bmm(matrix.mT, left),
    }


def finish(launched: Launched, blocks: Mapping[str, Any]) -> list[Radius]:
    """Finish on the host what :func:`launch` began.

    Args:
        launched: What :func:`launch` returned.
        blocks: Its ``blocks`` as numpy arrays on the host.

    Returns:
        One :class:`Radius` a matrix.
    """
    scale = np.asarray(blocks["scale"], dtype=np.float64)
    if "matrix" in blocks:
        return [
            exact_radius(matrix, factor)
            for matrix, factor in zip(blocks["matrix"], scale.tolist(), strict=True)
        ]
    host = {key: np.asarray(v, dtype=np.float64) for key, v in blocks.items()}
    ritz = _ritz(host)
    found = []
    for s, factor in enumerate(scale.tolist()):
        if not math.isfinite(factor) or factor == 0:
            found.append(_trivial(factor))
            continue
        norms, size = host["norms"][s].tolist(), host["right"].shape[1]
        radius = _judge(norms, float(host["trace"][s]), size, ritz[s], factor)
        if not radius.certified and size <= FALLBACK_UP_TO:
            radius = exact_radius(launched.matrix[s].cpu().numpy(), factor)
        found.append(radius)
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


def _ritz(host: Mapping[str, np.ndarray]) -> list[_Ritz]:
    """Return the leading two-sided Ritz value of each matrix, as it was scaled."""
    right, image = host["right"], host["right_image"]
    left, left_image = host["left"], host["left_image"]
    with np.errstate(all="ignore"):
        theta, x = np.linalg.eig(right.transpose(0, 2, 1) @ image)
        theta_left, y = np.linalg.eig(left.transpose(0, 2, 1) @ left_image)
        found = []
        for s in range(len(right)):
            modulus = np.abs(theta[s])
            lead = np.flatnonzero(modulus >= modulus.max() * (1 - 1e-9))
            j = int(lead[np.argmax(theta[s][lead].imag)])
            i = int(np.argmin(np.abs(theta_left[s] - np.conj(theta[s][j]))))
            value, xs, ys = theta[s][j], x[s][:, j], y[s][:, i]
            r, l_ = right[s] @ xs, left[s] @ ys
            ar, al = image[s] @ xs, left_image[s] @ ys
            nr, nl = np.linalg.norm(r), np.linalg.norm(l_)
            overlap = np.vdot(l_, r)
            residual = max(
                np.linalg.norm(ar - value * r) / nr,
                np.linalg.norm(al - np.conj(value) * l_) / nl,
            )
            better = np.vdot(l_, ar) / overlap if overlap else value
            condition = float(nr * nl / max(abs(overlap), 1e-300))
            found.append(_Ritz(complex(better), float(residual), condition))
    return found


def _judge(
    norms: list[float], trace: float, size: int, ritz: _Ritz, scale: float
) -> Radius:
    """Weigh the bounds against the Ritz value; all of it over the largest entry."""
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
    agrees = (
        ritz.residual <= _TOLERANCE * modulus
        and lower * (1 - 1e-4) <= modulus <= upper * (1 + 1e-4)
        and abs(modulus - power) <= _TOLERANCE * power
    )
    sharp = ritz.condition * _SINGLE_EPS <= 1e-4 if agrees else growth <= 10
    certified = (
        complete
        and sharp
        and growth * _SINGLE_EPS <= 1e-4
        and (upper - lower) <= _TOLERANCE * upper
    )
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


def exact_radius(matrix: np.ndarray, scale: float = 1.0) -> Radius:
    """Return the radius from all eigenvalues, in float64, on the host.

    Args:
        matrix: One finite matrix over its largest entry, shape ``(H, H)``.
        scale: Its largest entry; NaN or Inf where the matrix was not finite.

    Returns:
        The radius, certified where the eigenvalue is well conditioned:
        ``condition * 2.2e-16 * sigma_max / rho <= 1e-6``.
    """
    if not math.isfinite(scale) or scale == 0:
        return _trivial(scale)
    # Through torch: numpy's BLAS ignores torch's number of threads. Finite by now, as
    # LAPACK on a NaN ends the process.
    double = torch.from_numpy(matrix).double()
    values, vectors = torch.linalg.eig(double)
    modulus = values.abs()
    lead = int(modulus.argmax())
    inverse, singular = torch.linalg.inv_ex(vectors)
    rows, columns = inverse.norm(dim=1), vectors.norm(dim=0)
    condition = math.inf if int(singular) else float(rows[lead] * columns[lead])
    rho, sigma = float(modulus[lead]), float(torch.linalg.matrix_norm(double, 2))
    certified = condition * _DOUBLE_EPS * sigma <= 1e-6 * rho
    value = complex(values[lead])
    return Radius(
        rho=rho * scale,
        lower=rho * scale,
        upper=rho * scale,
        certified=certified,
        source="exact",
        eigenvalue=complex(value.real, abs(value.imag)) * scale,
        condition=condition,
    )


def launch_gram(weight: Tensor) -> dict[str, Tensor]:
    r"""Run the device's part of ``sigma_max`` and ``orthogonality``.

    :math:`\sigma_{max}^2` is the leading eigenvalue of :math:`W^\top W`, found by
    repeated squaring and a Ritz value; the same product gives
    :math:`\|W^\top W - I\|_F / \sqrt H`.

    Args:
        weight: Shape ``(S, H, H)``, any floating dtype and device.

    Returns:
        ``sigma`` and ``orthogonality``, shape ``(S,)`` each, on the weights' device;
        NaN for a matrix that holds NaN or Inf.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        matrix, scale, usable = _over_largest(weight)
        gram = torch.bmm(matrix.mT, matrix)
        power = gram
        for _ in range(_GRAM_SQUARINGS):
            norm = torch.linalg.vector_norm(power, dim=(1, 2), keepdim=True)
            power = power / norm.clamp_min(1e-30)
            power = torch.bmm(power, power)
        # The longest column of a power of a symmetric matrix leads to its top vector.
        longest = power.norm(dim=1).argmax(dim=1)
        top = power.gather(2, longest[:, None, None].expand(-1, power.shape[1], 1))
        top = top / torch.linalg.vector_norm(top, dim=1, keepdim=True).clamp_min(1e-30)
        sigma = (matrix @ top).norm(dim=(1, 2))
        scale = scale.double() if weight.device.type != "mps" else scale
        size = gram.shape[-1]
        eye = torch.eye(size, device=gram.device)
        # Over the larger of the two terms, so that neither overflows float32.
        larger = scale.square().clamp_min(1.0)
        share = (scale.square() / larger).float()[:, None, None]
        gap = gram * share - eye / larger.float()[:, None, None]
        distance = gap.norm(dim=(1, 2)) * larger / math.sqrt(size)
        unknown = torch.full_like(scale, math.nan)
        known = usable | (scale == 0)
        return {
            "sigma": torch.where(known, sigma * scale, unknown),
            "orthogonality": torch.where(known, distance, unknown),
        }
