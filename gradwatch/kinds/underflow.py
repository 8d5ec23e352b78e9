"""Gradients that are 0 because float16 holds nothing as small."""

from __future__ import annotations

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.missing import NORM, Keys, Missing
from gradwatch.record import Alert, StepRecord, Stream

UNDERFLOW = Kind(
    name="underflow",
    title="gradwatch: gradients underflow in float16",
    severity="warning",
    meaning="The recurrent weights' gradient is 0 in every entry, in float16.",
    evidence={
        "steps": Evidence(
            "consecutive steps with a gradient of exactly 0",
            10,
            None,
            "exact: float16 holds nothing below 6e-8",
        )
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="after 3 steps with a gradient",
    excused="dead units and stuck gates, which have alarms of their own",
    causes={
        "fp16_underflow": Cause(
            "by measurement",
            "what is below 6e-8 is 0 in float16, and the loss is not scaled up",
            "scaler = torch.amp.GradScaler()  # or autocast to bfloat16",
        )
    },
    numbers={
        "all_dead": Number(
            0.95,
            "share of dead units from which on their alarm says why there is no "
            "gradient",
            "no gradient passes where nearly all are dead",
        ),
        "back": Number(
            3,
            "steps with a gradient after which it is over",
            "one or two may be chance",
        ),
    },
    explained_by=("nonfinite", "exploding"),
)


class Underflow(Missing):
    """W_hh has a gradient of zeros, and the net computes in float16."""

    kind, _row = UNDERFLOW.name, UNDERFLOW

    def _always(self, block: Block, stream: Stream, keys: Keys) -> bool:
        read = block.read(keys.hh)
        return not self._half(stream) or (read is not None and all(read))

    def _hold(self, record: StepRecord, stream: Stream, keys: Keys) -> int | None:
        if not self._half(stream) or record.metrics.get(keys.hh) != 0:
            return None
        if self._seen.module(stream).T == 1:
            return None
        return int(UNDERFLOW.at("steps"))

    def _judged(self, record: StepRecord, stream: Stream, keys: Keys) -> list[Alert]:
        if record.metrics.get(keys.ih, 0.0) > 0 or self._all_dead(stream):
            return []
        steps = self._state.missing[stream.name]
        return [
            text.alert(
                UNDERFLOW,
                record,
                since=self._state.since[stream.name],
                what=f"gradients of {stream.name} are 0 in float16",
                shown=(
                    f"0 in every entry in {steps} consecutive steps; the total norm is "
                    f"{record.metrics[NORM]:.3g}"
                ),
                cause="fp16_underflow",
                evidence={keys.hh: (0.0, 0.0)},
                stream=stream,
            )
        ]
