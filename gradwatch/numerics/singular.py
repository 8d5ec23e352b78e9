"""The largest singular value of a matrix, and how far it is from orthogonal."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from gradwatch.numerics.matrices import product, scaled

_GRAM_SQUARINGS: Final = 12
"""With a dense spectrum near the top, sigma is low by up to a quarter of 2^-12."""


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
        matrix, scale = scaled(weight)
        matrix = matrix.float()
        gram = product(matrix.mT, matrix)
        power = gram
        for _ in range(_GRAM_SQUARINGS):
            norm = torch.linalg.vector_norm(power, dim=(1, 2), keepdim=True)
            power = power / norm.clamp_min(1e-30)
            power = product(power, power)
        # The longest column of a power of a symmetric matrix leads to its top vector.
        longest = power.norm(dim=1).argmax(dim=1)
        top = power.gather(2, longest[:, None, None].expand(-1, power.shape[1], 1))
        top = top / torch.linalg.vector_norm(top, dim=1, keepdim=True).clamp_min(1e-30)
        sigma = product(matrix, top).norm(dim=(1, 2))
        if weight.device.type != "mps":  # which has no float64
            scale = scale.double()
        # Over the larger of the two terms, so that neither overflows float32.
        larger = scale.clamp_min(1.0)
        ours = (scale / larger).float()[:, None, None]
        eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        gap = gram * ours.square() - eye / larger.float()[:, None, None].square()
        distance = gap.norm(dim=(1, 2)) * larger.square() / math.sqrt(gram.shape[-1])
        return {"sigma": sigma * scale, "orthogonality": distance}
