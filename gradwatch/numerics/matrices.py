"""Square matrices on their way into float32: scaled exactly, multiplied faithfully."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_EXPONENT: Final = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""Of each dtype, an integer of its width and the bits that hold the exponent."""


def scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
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


def chosen(matrices: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some matrices of a batch; by a list as index a device is waited for."""
    return torch.stack([matrices[row] for row in rows])


def product(a: Tensor, b: Tensor) -> Tensor:
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
