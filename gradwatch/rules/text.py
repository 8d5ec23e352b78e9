"""The words of alerts: titles, and the four lines what, evidence, why, do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from gradwatch.record import Stream

TITLES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nonfinite": "gradwatch: NaN or Inf in gradients",
        "exploding": "gradwatch: exploding gradients",
        "spike": "gradwatch: a spike in the gradient norm",
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


def orthogonal_line(stream: Stream, since: int, *, bare: bool) -> str:
    """Return the line that makes every gate's recurrent matrix orthogonal anew.

    Args:
        stream: The stream to cure.
        since: Step before which a checkpoint is still good.
        bare: Whether the watched model is itself the recurrent module.
    """
    layer = stream.name.removeprefix(stream.module)[1:]
    weight = "weight_hh" + (f"_{layer}" if layer else "")
    path = f"model.{weight}" if bare else f"model.{stream.module}.{weight}"
    parts = f"{path}.data.chunk({max(len(stream.gates), 1)})"
    return (
        f"for w in {parts}: torch.nn.init.orthogonal_(w)"
        f"  # from a checkpoint before step {since}"
    )


def lr_line(since: int) -> str:
    """Return the line that lowers the learning rate."""
    return (
        "for group in optimizer.param_groups: group['lr'] /= 10"
        f"  # from a checkpoint before step {since}"
    )


def clip_line(threshold: float, since: int) -> str:
    """Return the line that clips, with where to go back to."""
    return (
        f"torch.nn.utils.clip_grad_norm_(model.parameters(), {threshold:.2g})"
        f"  # before optimizer.step(), from a checkpoint before step {since}"
    )
