"""The words of alerts: titles, and the four lines what, evidence, why, do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gradwatch import remedies
from gradwatch.record import Remedy, Stream

TITLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nonfinite": "gradwatch: NaN or Inf in gradients",
        "exploding": "gradwatch: exploding gradients",
        "spike": "gradwatch: a spike in the gradient norm",
        "dead_units": "gradwatch: dead ReLU units",
        "gate_stuck": "gradwatch: a gate is stuck",
        "no_gradient": "gradwatch: recurrent weights without a gradient",
        "not_updating": "gradwatch: recurrent weights do not change",
        "drift": "gradwatch: the spectral radius has drifted",
        "vanishing": "gradwatch: vanishing gradients",
        "truncated": "gradwatch: backpropagation is truncated",
    }
)
"""Constant per kind and at most 64 characters: W&B drops repeats by title."""

NONFINITE: Final[Mapping[str | None, tuple[str, str]]] = MappingProxyType(
    {
        "nan_data": (
            "the loss was already not finite: the input, the target or the forward",
            "assert torch.isfinite(batch).all(), 'NaN or Inf in the input'",
        ),
        "nan_backward": (
            "the loss was finite, so backward made it: sqrt, log or a division at 0",
            "torch.autograd.set_detect_anomaly(True)  # then run that step again",
        ),
        "fp16_overflow": (
            "float16 overflows at every step; halving the loss scale does not help",
            "scaler = torch.amp.GradScaler(enabled=False)  # or autocast to bfloat16",
        ),
        None: (
            "undecided without the loss: watch.log(loss=...) tells data from backward",
            "torch.autograd.set_detect_anomaly(True)  # then run that step again",
        ),
    }
)

STUCK: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "input_gate": (
            "i is below .05",
            "the cell takes in nothing new: the input gate's bias or input weights "
            "hold it shut",
        ),
        "output_gate": (
            "o is below .05",
            "the cell shows nothing of what it holds, and no gradient comes in: the "
            "output gate's bias or input weights hold it shut",
        ),
        "update_gate": (
            "z is above .95",
            "z keeps: the state is never renewed, whatever the input is",
        ),
    }
)
"""Cause of a stuck gate -> what was measured, and what it means."""

NO_GRADIENT: Final[Mapping[str | None, tuple[str, str]]] = MappingProxyType(
    {
        "frozen": (
            "requires_grad is False; if that is meant, nothing is wrong",
            "{weight}.requires_grad_(True)  # if it is to learn",
        ),
        "unused": (
            "no call of {module} was seen while gradients were on: it is registered "
            "but not used, or runs under torch.no_grad()",
            "print(model)  # then check that forward() calls {module}",
        ),
        "detached": (
            "{module} runs, but no gradient comes back to its output: a detach(), "
            ".data, .item() or numpy between it and the loss",
            "assert output.requires_grad  # right behind {module}, then further on",
        ),
        "readout_index": (
            "the loss reads only the first step that this direction takes, where no "
            "recurrent weight has acted yet",
            "_, h_n = {module}(x)  # h_n has the last step of both directions",
        ),
        None: (
            "undecided: a gradient arrives, but every entry of it is 0",
            "watch.probe_now()  # then look at shut, open, dead in print(watch)",
        ),
    }
)
"""Cause -> why, and what to do; ``{weight}`` and ``{module}`` are filled in."""

NOT_UPDATING: Final[Mapping[str | None, tuple[str, str]]] = MappingProxyType(
    {
        "not_in_optimizer": (
            "no optimizer that has stepped holds this weight",
            "optimizer.add_param_group({{'params': [{weight}]}})",
        ),
        "frozen": (
            "its learning rate is 0; if that is meant, nothing is wrong",
            "print([group['lr'] for group in optimizer.param_groups])",
        ),
        None: (
            "the optimizer holds it and its gradient is not 0: the update is lost, "
            "below the weight's precision or cut off",
            "print([group['lr'] for group in optimizer.param_groups])",
        ),
    }
)
"""Cause -> why, and what to do; ``{weight}`` is filled in."""


GROWTH: Final[Mapping[str, str]] = MappingProxyType(
    {
        "large_recurrent_weights": (
            "the recurrent weights are too large for the gates to hold back; clipping "
            "would hide that, not cure it"
        ),
        "drift": (
            "rho has grown by a tenth or more since the start; clipping would hide "
            "that, not cure it"
        ),
        "active_subnetwork": (
            "rho is below 1, but the part of the net that is active is not: only the "
            "units that fire count"
        ),
        "nonnormal": "rho is below 1, but powers of W_hh grow before they shrink",
        "large_radius": "rho is 1 or above, and a ReLU does not hold it back",
        "chaos": "rho is 1 or above and the activation does not hold it back: chaos",
    }
)
"""Cause of a growth through time -> why."""

_VANISHING: Final[Mapping[str, str]] = MappingProxyType(
    {
        "truncation": "the state is detached: no gradient passes to an earlier call",
        "saturation": "the activations are saturated: their slope is below .35",
        "forget_gate": "the forget gate is shut: the cell keeps nothing",
        "update_gate": "the update gate is shut: the state keeps nothing",
        "drift": "rho has fallen by a tenth or more since the start",
        "horizon_too_long": "the sequence is longer than what the cell remembers",
        "small_radius": "the recurrent weights shrink what goes through them",
    }
)


def vanishing(cause: str, remedy: Remedy | None) -> tuple[str, str]:
    """Return why gradients vanish in a stream, and the line that helps."""
    why = (
        f"{_VANISHING[cause]}; no gradient reaches the first steps, which is a fault "
        "where the task needs them"
    )
    if remedy is not None:
        return why, f"{remedies.line(remedy)}  # best from the start"
    if cause == "truncation":
        return why, "a longer piece of the sequence in each call"
    return why, "inputs = 0.1 * inputs  # or normalise them; then from the start"


def title(kind: str) -> str:
    """Return the constant title of a kind."""
    return TITLES.get(kind, f"gradwatch: {kind}"[:64])


def four_lines(
    kind: str, step: int, what: str, evidence: str, why: str, do: str
) -> str:
    """Return the text of an alert: what, evidence, why, and one line to paste."""
    name = kind.replace("_", " ")
    return (
        f"{name} at step {step}: {what}\n"
        f"  evidence: {evidence}\n"
        f"  why: {why} (docs/alerts.md#{kind})\n"
        f"  do: {do}"
    )


EXPLODING_UNDECIDED: Final = (
    "undecided: a changed input or growing weights; rho of the recurrent weights had "
    "not grown by a tenth when last measured"
)


def remedy_line(remedy: Remedy, since: int) -> str:
    """Return the line that applies a remedy, with where to go back to."""
    return f"{remedies.line(remedy)}  # from a checkpoint before step {since}"


def path_of(stream: Stream, weight: str) -> str:
    """Return the expression that names a weight of a stream, or its module for ``""``.

    Args:
        stream: The stream.
        weight: Such as ``weight_hh``; without a layer's suffix.
    """
    layer = stream.name.removeprefix(stream.module)[1:]
    module = f"model.{stream.module}"
    return module + (f".{weight}" + (f"_{layer}" if layer else "") if weight else "")


def bias_line(stream: Stream, since: int) -> str:
    """Return the line that sets a stream's biases to zero."""
    biases = [path_of(stream, name) for name in ("bias_ih", "bias_hh")]
    return (
        f"for b in ({', '.join(biases)}): torch.nn.init.zeros_(b)"
        f"  # from a checkpoint before step {since}"
    )


def lr_line(since: int) -> str:
    """Return the line that lowers the learning rate."""
    return (
        "for group in optimizer.param_groups: group['lr'] /= 10"
        f"  # from a checkpoint before step {since}"
    )
