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
_GRAM_SQUARINGS: Final = 12
"""With a dense spectrum near the top, sigma is low by up to a quarter of 2^-12."""
_TOLERANCE: Final = 1e-3
_AMPLIFIED: Final = 150.0
"""Float32 rounding may grow by this; near-defective matrices were off 1e-3 at 700."""
_DOUBLE_EPS: Final = 2.2e-16
_UNDERFLOW: Final = 1e-7
_EXPONENT: Final = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""Of each dtype, an integer of its width and the bits that hold the exponent."""


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
        matrix, scale = _scaled(weight)
        if matrix.shape[-1] <= EXACT_UP_TO:
            return Launched(matrix, {"scale": scale, "matrix": matrix})
        return Launched(matrix, {"scale": scale, **_squarings(matrix.float())})


def _scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices over a power of two, largest entry in [1, 2), and that power.

    Dividing by a power of two rounds nothing: near a defective matrix the radius feels
    a change in the last bit. An unusable matrix becomes 0, its power 0, NaN or Inf.
    """
    if weight.dim() not in (2, 3) or not 0 < weight.shape[-1] == weight.shape[-2]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected square matrices, "
            "(H, H) or (S, H, H). A stacked W_hh is cut into its gates first."
        )
    if not weight.is_floating_point():
        raise TypeError(
            f"weight is {weight.dtype}; expected real floating-point numbers, such as "
            "torch.float32."
        )
    matrix = weight.detach() if weight.dim() == 3 else weight.detach()[None]
    if matrix.dtype not in _EXPONENT:
        matrix = matrix.float()
    largest = matrix.abs().amax(dim=(1, 2))
    usable = (largest > 0) & (largest < math.inf)
    whole, exponent = _EXPONENT[matrix.dtype]
    power = (largest.view(whole) & exponent).view(matrix.dtype)
    power = power.clamp_min(torch.finfo(matrix.dtype).tiny)  # subnormal: no exponent
    matrix = (matrix / power[:, None, None]).where(usable[:, None, None], 0.0)
    return matrix, power.where(usable, largest)


def _squarings(matrix: Tensor) -> dict[str, Tensor]:
    power, norms = matrix, []
    middle = matrix
    for level in range(SQUARINGS + 1):
        if level:
            power = _product(power, power)
        norm = torch.linalg.vector_norm(power, dim=(1, 2), keepdim=True)
        power = power / norm.clamp_min(1e-30)
        norms.append(norm[:, 0, 0])
        if level == _MIDDLE:
            middle = power
    size = matrix.shape[-1]
    fixed = torch.Generator().manual_seed(0)  # never the user's generator
    probe = torch.randn(
        size, _PROBES, generator=fixed, device="cpu", dtype=torch.float32
    ).to(matrix.device)
    probe = probe.expand(len(matrix), -1, -1)
    half = _PROBES // 2
    first, second = probe[..., :half], probe[..., half:]
    right = torch.cat([_product(power, first), _product(middle, second)], -1)
    left = torch.cat([_product(power.mT, first), _product(middle.mT, second)], -1)
    right, left = torch.linalg.qr(right)[0], torch.linalg.qr(left)[0]
    return {
        "norms": torch.stack(norms, 1),
        "trace": power.diagonal(dim1=1, dim2=2).sum(1),
        "right": right,
        "left": left,
        "right_image": _product(matrix, right),
        "left_image": _product(matrix.mT, left),
    }


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply to float32 precision, also where the user allows less for speed.

    TensorFloat-32 keeps 10 bits of the mantissa: certified radii were off by 1e-2.
    """
    if not _rounds_inputs(a.device):
        return torch.bmm(a, b)
    a_head, b_head = _head(a), _head(b)
    a_tail, b_tail = a - a_head, b - b_head
    return torch.bmm(a_head, b_tail) + torch.bmm(a_tail, b) + torch.bmm(a_head, b_head)


def _rounds_inputs(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by the flags of torch 2.9, which bar the question
        return True


def _head(x: Tensor) -> Tensor:
    """Round to the 10 bits of mantissa that survive TensorFloat-32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


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
    size, ritz, found = host["right"].shape[1], _ritz(host), []
    for s, factor in enumerate(scale):
        if not math.isfinite(factor) or factor == 0:
            found.append(_trivial(factor))
            continue
        norms, trace = host["norms"][s].tolist(), float(host["trace"][s])
        found.append(_judge(norms, trace, size, ritz[s], factor))
    left = [s for s, radius in enumerate(found) if radius.source == "open"]
    if left and size <= FALLBACK_UP_TO:
        exact = _exact(launched.matrix[left].cpu().double(), [scale[s] for s in left])
        for s, radius in zip(left, exact, strict=True):
            found[s] = radius
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
    right, left, each = host["right"], host["left"], np.arange(len(host["right"]))
    values, x = np.linalg.eig(right.transpose(0, 2, 1) @ host["right_image"])
    mirrored, y = np.linalg.eig(left.transpose(0, 2, 1) @ host["left_image"])
    modulus = np.abs(values)
    tied = modulus >= modulus.max(axis=1, keepdims=True) * (1 - 1e-9)
    lead = np.where(tied, values.imag, -np.inf).argmax(axis=1)
    value = values[each, lead]
    match = np.abs(mirrored - value.conj()[:, None]).argmin(axis=1)
    x, y = x[each, :, lead, None], y[each, :, match, None]
    r, r_image = (right @ x)[..., 0], (host["right_image"] @ x)[..., 0]
    l_, l_image = (left @ y)[..., 0], (host["left_image"] @ y)[..., 0]
    r_norm, l_norm = np.linalg.norm(r, axis=1), np.linalg.norm(l_, axis=1)
    r_gap = np.linalg.norm(r_image - value[:, None] * r, axis=1) / r_norm
    l_gap = np.linalg.norm(l_image - value.conj()[:, None] * l_, axis=1) / l_norm
    overlap = (l_.conj() * r).sum(axis=1)
    with np.errstate(all="ignore"):  # orthogonal to each other: no Ritz value
        value = (l_.conj() * r_image).sum(axis=1) / overlap
        condition = r_norm * l_norm / np.abs(overlap)
    columns = value.tolist(), np.maximum(r_gap, l_gap).tolist(), condition.tolist()
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
    # The left eigenvector over its product with the right one, which has norm 1.
    unit = torch.from_numpy(np.eye(values.shape[1], dtype=values.dtype)[lead])
    left, singular = torch.linalg.solve_ex(vectors.mT, unit)
    conditions = left.norm(dim=1).masked_fill(singular != 0, math.inf).tolist()
    sizes = torch.linalg.vector_norm(matrix, dim=(1, 2)).tolist()
    found = []
    for s, factor in enumerate(scale):
        if not math.isfinite(factor) or factor == 0:
            found.append(_trivial(factor))
            continue
        value, condition = complex(values[s, lead[s]]), conditions[s]
        found.append(
            Radius(
                rho=abs(value) * factor,
                lower=abs(value) * factor,
                upper=abs(value) * factor,
                certified=condition * _DOUBLE_EPS * sizes[s] <= 1e-6 * abs(value),
                source="exact",
                eigenvalue=complex(value.real, abs(value.imag)) * factor,
                condition=condition,
            )
        )
    return found


def launch_gram(weight: Tensor) -> dict[str, Tensor]:
    r"""Run the device's part of ``sigma_max`` and ``orthogonality``.

    :math:`\sigma_{max}^2` is the leading eigenvalue of :math:`W^\top W`, found by
    repeated squaring and a Rayleigh quotient, never too high and within 1e-4; the same
    product gives :math:`\|W^\top W - I\|_F / \sqrt H`.

    Args:
        weight: Shape ``(H, H)`` or ``(S, H, H)``, any floating dtype and device.

    Returns:
        ``sigma`` and ``orthogonality``, shape ``(S,)`` each, on the weights' device;
        NaN for a matrix that holds NaN or Inf.
    """
    with torch.autocast(weight.device.type, enabled=False):
        matrix, scale = _scaled(weight)
        matrix = matrix.float()
        gram = _product(matrix.mT, matrix)
        power = gram
        for _ in range(_GRAM_SQUARINGS):
            norm = torch.linalg.vector_norm(power, dim=(1, 2), keepdim=True)
            power = power / norm.clamp_min(1e-30)
            power = _product(power, power)
        # The longest column of a power of a symmetric matrix leads to its top vector.
        longest = power.norm(dim=1).argmax(dim=1)
        top = power.gather(2, longest[:, None, None].expand(-1, power.shape[1], 1))
        top = top / torch.linalg.vector_norm(top, dim=1, keepdim=True).clamp_min(1e-30)
        sigma = _product(matrix, top).norm(dim=(1, 2))
        if weight.device.type != "mps":  # which has no float64
            scale = scale.double()
        # Over the larger of the two terms, so that neither overflows float32.
        larger = scale.clamp_min(1.0)
        ours = (scale / larger).float()[:, None, None]
        eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        gap = gram * ours.square() - eye / larger.float()[:, None, None].square()
        distance = gap.norm(dim=(1, 2)) * larger.square() / math.sqrt(gram.shape[-1])
        return {"sigma": sigma * scale, "orthogonality": distance}
