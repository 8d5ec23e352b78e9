r"""One update of a weight, split by where it comes from.

With g the gradient that the optimizer used and :math:`\lambda W` its weight decay, an
update is a sum of three parts: what this step's gradient adds, what this step's decay
adds, and what is carried over from earlier steps by momentum. It is linear in them once
the denominator of an adaptive rate is given, which is taken as the optimizer left it.

Source of the formulas: the documentation of ``torch.optim``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Parts(NamedTuple):
    """An update in parts, each of the shape of the weight; their sum is W' - W.

    Attributes:
        gradient: What this step's gradient adds.
        decay: What this step's weight decay adds.
        carried: What momentum carries over from earlier steps.
    """

    gradient: Tensor
    decay: Tensor
    carried: Tensor


def parts(
    kind: str,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    before: Tensor,
    grad: Tensor,
) -> Parts | None:
    """Return an update in parts.

    Args:
        kind: ``SGD``, ``Adam``, ``AdamW``, ``RMSprop`` or ``Adagrad``.
        group: The options of the weight's group.
        state: What the optimizer keeps of the weight, after the step.
        before: The weight before it.
        grad: The gradient that it used.

    Returns:
        The parts; None for another optimizer, or where it lacks what is needed.
    """
    split = _SPLITS.get(kind)
    if split is None or not isinstance(group.get("lr"), float | int):
        return None
    sign = -1.0 if group.get("maximize") else 1.0
    return split(group, state, sign * grad, group["weight_decay"] * before)


def _sgd(
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    grad: Tensor,
    decay: Tensor,
) -> Parts | None:
    rate, keeps = group["lr"], group["momentum"]
    if not keeps:
        return Parts(-rate * grad, -rate * decay, 0 * grad)
    buffer = state.get("momentum_buffer")
    if buffer is None or group["dampening"]:
        return None
    carried = buffer - grad - decay
    ahead = 1.0
    if group["nesterov"]:
        ahead, carried = 1 + keeps, keeps * carried
    return Parts(-rate * ahead * grad, -rate * ahead * decay, -rate * carried)


def _adam(
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    grad: Tensor,
    decay: Tensor,
) -> Parts | None:
    first = state.get("exp_avg")
    second = state.get("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    if first is None or second is None:
        return None
    step, (keeps, keeps_square) = float(state["step"]), group["betas"]
    root = second.sqrt() / math.sqrt(1 - keeps_square**step) + group["eps"]
    rate = -group["lr"] / (1 - keeps**step)
    decoupled = group.get("decoupled_weight_decay", False)
    own = grad if decoupled else grad + decay
    carried = rate * (first - (1 - keeps) * own) / root
    new = rate * (1 - keeps) / root
    of_decay = -group["lr"] * decay if decoupled else new * decay
    return Parts(new * grad, of_decay, carried)


def _rmsprop(
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    grad: Tensor,
    decay: Tensor,
) -> Parts | None:
    square = state.get("square_avg")
    if square is None:
        return None
    if group["centered"]:
        square = square - state["grad_avg"].square()
    root, rate = square.sqrt() + group["eps"], -group["lr"]
    own, of_decay, carried = grad / root, decay / root, 0 * grad
    if group["momentum"]:
        carried = state["momentum_buffer"] - own - of_decay
    return Parts(rate * own, rate * of_decay, rate * carried)


def _adagrad(
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    grad: Tensor,
    decay: Tensor,
) -> Parts | None:
    total = state.get("sum")
    if total is None:
        return None
    rate = -group["lr"] / (1 + (float(state["step"]) - 1) * group["lr_decay"])
    root = total.sqrt() + group["eps"]
    return Parts(rate * grad / root, rate * decay / root, 0 * grad)


_SPLITS = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adam,
    "RMSprop": _rmsprop,
    "Adagrad": _adagrad,
}


def share_below_eps(
    kind: str, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor | None:
    """Return the share of entries whose denominator is mostly eps.

    There Adam, RMSprop and Adagrad take steps that are proportional to the gradient,
    and far smaller than the rate.

    Args:
        kind: Of the optimizer.
        group: The options of the weight's group.
        state: What the optimizer keeps of the weight.

    Returns:
        A tensor of no axis; None for an optimizer without eps.
    """
    names = {"RMSprop": "square_avg", "Adagrad": "sum"}
    square = state.get(names.get(kind, "exp_avg_sq"))
    if square is None or "eps" not in group:
        return None
    correction = 1.0
    if kind in ("Adam", "AdamW"):
        correction = 1 - group["betas"][1] ** float(state["step"])
    share: Tensor = (square / correction < group["eps"] ** 2).to(square.dtype).mean()
    return share
