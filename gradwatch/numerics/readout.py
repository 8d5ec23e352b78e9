r"""What a loss's gradient at its scores tells: targets, weights and the best constant.

Of n positions with scores o and targets y, and w the weight of each in the loss (1/n
where it is their mean), the gradient is

.. math:: w\,(\mathrm{softmax}(o) - e_y), \quad w\,(\sigma(o) - y), \quad 2w\,(o - y)

for cross entropy, binary cross entropy with logits, and squared errors. Targets and
weights are found from o and g alone, and put back in as a check.

Axes: N positions, F features (classes, outputs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

_ROUNDING = 1e-5
"""Share of the largest target by which one of 0 may be missed."""
_SURE = 0.999
"""Probability above which a score's gradient tells no weight."""


class Targets(NamedTuple):
    """What was found, as tensors that may still be on a device.

    Attributes:
        weight: The sum of the positions' weights, each output counted on its own.
        share: Share of the positions that a gradient reaches.
        sums: By feature: of cross entropy how often it is the target, as shares that
            add up to 1; of the others the means of the targets and of their squares,
            shape ``(2, F)``, each position by its weight.
        misfit: Norm of the gradient that the targets do not explain, over its norm.
        loss: What these positions have of the loss.
    """

    weight: Tensor
    share: Tensor
    sums: Tensor
    misfit: Tensor
    loss: Tensor


def cross_entropy_targets(scores: Tensor, grad: Tensor) -> Targets:
    """Find the targets of a cross entropy.

    Args:
        scores: Shape ``(N, F)``, before the softmax.
        grad: Of the loss by these.
    """
    p = scores.softmax(-1)
    found = grad.argmin(-1, keepdim=True)
    left = 1 - p.gather(-1, found)
    reached = (grad != 0).any(-1, keepdim=True)
    tells = reached & (left > 1 - _SURE)
    weight = torch.where(tells, -grad.gather(-1, found) / left.clamp_min(1e-6), 0.0)
    usual = weight.sum() / tells.sum().clamp_min(1)
    weight = torch.where(reached & ~tells, usual, weight)
    total = weight.sum()
    onehot = torch.zeros_like(p).scatter(-1, found, 1.0)
    return Targets(
        weight=total,
        share=reached.float().mean(),
        sums=(weight * onehot).sum(0) / total,
        misfit=_misfit(grad, weight * (p - onehot)),
        loss=-(weight * scores.log_softmax(-1).gather(-1, found)).sum(),
    )


def binary_targets(scores: Tensor, grad: Tensor) -> Targets:
    """Find the targets, 0 or 1, of a binary cross entropy.

    Args:
        scores: Shape ``(N, F)``, before the sigmoid.
        grad: Of the loss by these.
    """
    p = scores.sigmoid()
    target = (grad < 0).to(p.dtype)
    left = (p - target).abs()
    reached = grad != 0
    tells = reached & (left > 1 - _SURE)
    weight = torch.where(tells, grad.abs() / left.clamp_min(1e-6), 0.0)
    # One weight for all: else any gradient can be explained.
    usual = weight.sum() / tells.sum().clamp_min(1)
    weight = torch.where(reached, usual, 0.0)
    mean = (weight * target).sum(0) / weight.sum(0)
    return Targets(
        weight=weight.sum(),
        share=reached.any(-1).float().mean(),
        sums=torch.stack((mean, mean)),
        misfit=_misfit(grad, weight * (p - target)),
        loss=(weight * (softplus(scores) - target * scores)).sum(),
    )


def squared_targets(outputs: Tensor, grad: Tensor, loss: Tensor) -> Targets:
    """Find the targets of a sum of squared errors, all of one weight.

    Args:
        outputs: Shape ``(N, F)``.
        grad: Of the loss by these.
        loss: The loss: it tells the weight.
    """
    weight = grad.square().sum() / (4 * loss).clamp_min(torch.finfo(grad.dtype).tiny)
    reached = (grad != 0).to(grad.dtype)
    count = reached.sum(0).clamp_min(1)
    targets = (outputs - grad / (2 * weight)) * reached
    means = torch.stack((targets.sum(0), targets.square().sum(0))) / count
    return Targets(
        weight=weight * reached.sum(),
        share=reached.any(-1).float().mean(),
        sums=means,
        misfit=torch.zeros_like(weight),
        loss=loss,
    )


def negative_targets(outputs: Tensor, grad: Tensor, count: int) -> Tensor:
    """Return the share of targets below 0, of those that a ReLU lets be seen.

    Args:
        outputs: Shape ``(N, F)``, before the ReLU.
        grad: Of the mean of squared errors behind the ReLU, by these; of that over a
            number above 1, fewer are found.
        count: How many errors the mean is of.

    Returns:
        One element; NaN where no output is above 0.
    """
    seen = (outputs > 0) & (grad != 0)
    targets = outputs - grad * count / 2
    size = targets.abs().amax()
    return ((targets < -_ROUNDING * size) & seen).sum() / seen.sum()


def _misfit(grad: Tensor, explained: Tensor) -> Tensor:
    gap: Tensor = torch.linalg.vector_norm(grad - explained)
    size: Tensor = torch.linalg.vector_norm(grad)
    return gap / size.clamp_min(torch.finfo(grad.dtype).tiny)


def best_constant(kind: str, sums: Tensor) -> Tensor:
    """Return the loss of the constant output that suits the targets best.

    Args:
        kind: ``cross_entropy``, ``bce_with_logits`` or ``mse``.
        sums: As of :class:`Targets`, over as many positions as there are.

    Returns:
        The loss of a position, in nats or in squared units, as its mean over outputs:
        an entropy or a variance.
    """
    if kind == "cross_entropy":
        return _entropies(sums).sum()
    mean, square = sums
    if kind == "mse":
        variance: Tensor = (square - mean.square()).clamp_min(0).mean()
        return variance
    return (_entropies(mean) + _entropies(1 - mean)).mean()


def _entropies(shares: Tensor) -> Tensor:
    found: Tensor = -torch.special.xlogy(shares, shares)
    return found
