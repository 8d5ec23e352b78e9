"""NaN and Inf, in a gradient or in the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.text import BEFORE, LOWER_RATE
from gradwatch.metrics import run_key
from gradwatch.record import Alert, StepRecord, Stream

_ANOMALY = "torch.autograd.set_detect_anomaly(True)" + BEFORE

NONFINITE = Kind(
    name="nonfinite",
    title="gradwatch: NaN or Inf in gradients",
    severity="error",
    meaning="A gradient, or the loss, holds NaN or Inf.",
    evidence={
        "tensors": Evidence(
            "`nonfinite`, gradient tensors with NaN or Inf", 1, 0, "exact"
        ),
        "skips": Evidence(
            "consecutive skipped steps that are excused, at most",
            10,
            None,
            "a loss scaler that begins too high halves itself this often",
        ),
    },
    warm_up="none",
    confirmed="at once",
    over="after 25 finite steps",
    excused="what a GradScaler or a refusing clipper skips, up to 10 consecutive steps",
    causes={
        "nan_data": Cause(
            "an input is not finite: of a recurrent module, or in the loss's graph",
            "the data of that step held NaN or Inf",
            "assert torch.isfinite(batch).all(), 'NaN or Inf in the input'",
        ),
        "weights": Cause(
            "weights were not finite before the step",
            "the weights held NaN or Inf already: an earlier step, or what was loaded, "
            "has put it there",
            "assert all(p.isfinite().all() for p in model.parameters())" + BEFORE,
        ),
        "overflow": Cause(
            "data and weights are finite, and a value of the forward pass is Inf",
            "a value of the forward pass has grown beyond what its type holds, from "
            "finite data and weights",
            LOWER_RATE + BEFORE,
        ),
        "forward": Cause(
            "data and weights are finite, and a value of the forward pass is NaN",
            "the forward pass has made NaN of finite data and weights: often log or "
            "sqrt of what is not positive, 0 / 0, or Inf - Inf",
            "torch.autograd.set_detect_anomaly(True)  # and look at {since} once more",
        ),
        "loss": Cause(
            "data, weights and the values up to the last layer are finite, the loss "
            "is not",
            "what the net was given is finite, and what it has made of it up to its "
            "last layer: it is the target, or what comes behind, such as a log of 0 or "
            "a division by 0",
            "assert torch.isfinite(target).all()  # and look at what the loss does",
        ),
        "nan_backward": Cause(
            "the loss is finite",
            "the loss was finite, so it arose in backward: often sqrt or log at 0, or "
            "a division by 0",
            _ANOMALY,
        ),
        "after_backward": Cause(
            "finite as backward left them, and not as the optimizer was given them",
            "the gradients were finite at the end of backward: what stands between it "
            "and the optimizer's step has made them so, such as a clip or added noise",
            "assert all(p.grad.isfinite().all() for p in model.parameters() "
            "if p.grad is not None)  # after each line between backward() and step()",
        ),
        "fp16_overflow": Cause(
            "the scaler has skipped more than 10 consecutive steps though the input is "
            "finite; or the net computes in float16 and the loss is finite",
            "values overflow in float16; if a loss scaler keeps halving its scale, the "
            "overflow is in the forward or backward pass, not in the scale",
            "scaler = torch.amp.GradScaler(enabled=False)  # and autocast to bfloat16",
        ),
        None: Cause(
            "the loss is not known; or it is not finite, and on an accelerator, or "
            "checkpointed",
            "undecided: the loss is not known, or nothing was held of the step",
            _ANOMALY,
        ),
    },
    numbers={
        "quiet": Number(25, "finite steps after which it is over"),
    },
    rank=1,
    explained_by=("lr_too_high",),  # and it raises that to an error
)

_SKIPS_ALLOWED: Final = int(NONFINITE.at("skips"))
_QUIET_STEPS: Final = NONFINITE.count("quiet")

_NORM = run_key("grad_norm")

_NONFINITE = run_key("nonfinite")

_LOSS = run_key("loss")


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        active: Whether the incident is open.
        skips: Consecutive steps that were skipped.
        quiet: Consecutive finite steps.
        finite: Of the last finite one: step, norm, loss.
        half: Whether the net computes in float16.
        input: Whether the input was finite when last sampled.
    """

    active: bool = False
    skips: int = 0
    quiet: int = 0
    finite: list[float] | None = None
    half: bool = False
    input: bool = True


class Nonfinite(Remembering[_State]):
    """A gradient or the loss holds NaN or Inf.

    What a loss scaler or a refusing clipper skips is expected, up to ten steps in a
    row; the incident ends after 25 finite steps.
    """

    kind = NONFINITE.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        super().__init__(_State())

    @property
    def active(self) -> bool:
        """Whether it still holds."""
        return self._state.active

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: all of them are finite."""
        state, norms, losses = self._state, block.whole(_NORM), block.column(_LOSS)
        broken = block.column(_NONFINITE)
        if norms is None or state.active or broken is None or any(broken):
            return False
        loss = None if losses is None else losses[-1]
        last = math.nan if loss is None else loss
        state.finite, state.skips = [block.steps[-1], norms[-1], last], 0
        state.quiet += len(norms)
        self.wants = None
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants = None
        sampled = record.facts.modules.values()
        if modules := [facts for facts in sampled if facts.dtype is not None]:
            used = {kind for facts in modules for kind in (facts.dtype, facts.autocast)}
            self._state.half = "float16" in used
            self._state.input = all(
                facts.input_finite is not False for facts in modules
            )
        norm = record.metrics.get(_NORM)
        loss = record.metrics.get(_LOSS)
        count = record.metrics.get(_NONFINITE, 0.0)
        bad_loss = loss is not None and not math.isfinite(loss)
        if not count and not bad_loss:
            self._state.skips = 0
            self._state.quiet += 1
            if norm is not None and math.isfinite(norm):
                self._state.finite = [
                    record.step,
                    norm,
                    math.nan if loss is None else loss,
                ]
            if self._state.quiet >= _QUIET_STEPS:
                self._state.active = False
            return []
        self._state.quiet = 0
        if "skipped_step" in record.events:
            self._state.skips += 1
            by = record.facts.step.skipped_by or "user"
            excused = by in ("scaler", "clipper", "unknown")
            if excused and self._state.skips <= _SKIPS_ALLOWED:
                self.wants = "state"  # it tells whether the input is finite
                return []
        self._state.active = True
        return [self._alert(record, count, loss)]

    def _alert(self, record: StepRecord, count: float, loss: float | None) -> Alert:
        cause = self._cause(record, count, loss)
        names, broken = record.facts.step.nonfinite or (), record.facts.step.broken
        if count:
            what = f"{count:.0f} gradient tensors hold NaN or Inf"
            shown = f"first in backward order: {', '.join(names) or 'unknown'}"
            evidence: dict[str, tuple[float, float | None]] = {_NONFINITE: (count, 1.0)}
        else:
            what, shown = "the loss is not finite", f"loss {loss}"
            evidence = {_LOSS: (float(loss or 0.0), None)}
        if self._state.finite is not None:
            step, norm, last = self._state.finite
            shown += f"; last finite at step {step:.0f}: gradient norm {norm:.3g}"
            if not math.isnan(last):
                shown += f" and loss {last:.3g}"
        else:
            shown += "; no gradient was finite before"
        if broken and broken.startswith("forward"):
            shown += f"; first in the forward pass: {broken.removeprefix('forward: ')}"
        if self._state.skips > _SKIPS_ALLOWED:
            what = (
                f"{self._state.skips} consecutive steps skipped because of NaN or Inf"
            )
        return text.alert(
            NONFINITE,
            record,
            since=record.step - max(self._state.skips - 1, 0),
            what=what,
            shown=shown,
            cause=cause,
            evidence=evidence,
        )

    def _cause(
        self, record: StepRecord, count: float, loss: float | None
    ) -> str | None:
        if not self._state.input:
            return "nan_data"
        scaler = record.facts.step.skipped_by == "scaler"
        finite = loss is None or math.isfinite(loss)
        norm = record.metrics.get(_NORM)
        if count and norm is not None and math.isfinite(norm):
            return "after_backward"
        if (
            scaler
            and self._state.skips > _SKIPS_ALLOWED
            and (finite or self._state.half)
        ):
            return "fp16_overflow"
        if not finite:
            return _of_forward(record.facts.step.broken or "")
        if record.facts.step.weights_finite is False:
            return "weights"
        if loss is not None:
            return "fp16_overflow" if self._state.half else "nan_backward"
        return None


def _of_forward(broken: str) -> str | None:
    """Return the cause by what was the first not to be finite; None for nothing."""
    if broken.startswith("forward"):
        return "overflow" if broken.endswith("inf") else "forward"
    return {"data": "nan_data", "weights": "weights", "loss": "loss"}.get(broken)
