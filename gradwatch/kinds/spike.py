"""One batch unlike the others, by the total gradient norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch import saved
from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Losses
from gradwatch.metrics import run_key
from gradwatch.numerics.streaming import Window, median, push, robust_z
from gradwatch.record import Alert, Remedy, StepRecord, Stream, reinitialised

SPIKE = Kind(
    name="spike",
    title="gradwatch: a spike in the gradient norm",
    severity="warning",
    meaning="One gradient norm stood out, and is back within three steps.",
    evidence={
        "z": Evidence(
            "robust z-score of ln(`grad_norm`) in the last 25",
            10.0,
            None,
            "healthy nets that have learnt reach 32: alone it decides nothing",
        ),
        "ratio": Evidence(
            "`grad_norm` over the median of the last 25",
            25.0,
            None,
            "healthy nets that have learnt reach 565: alone it decides nothing",
        ),
        "record": Evidence(
            "`grad_norm` over the largest that was no spike itself",
            30.0,
            None,
            "nets that have learnt reach 14 when they meet a hard batch; a batch of "
            "broken targets 1,500",
        ),
        "record_with_loss": Evidence(
            "the same, where the loss has never been as large",
            3.0,
            None,
            "a loss that stands out too tells a bad batch from a hard one",
        ),
        "loss": Evidence(
            "loss over the largest so far, where it is known",
            2.0,
            None,
            "nets that have learnt reach 1.5",
        ),
    },
    warm_up="50 norms: a net that opens to its gradients jumps once",
    confirmed="once the norm is back: a longer one belongs to another kind",
    over="at once",
    causes={
        "bad_batch": Cause(
            "by measurement",
            "a batch unlike the others, most likely: a long sequence, a bad label, "
            "an outlier in the input",
        )
    },
    numbers={
        "warm_up": Number(
            50,
            "norms before any is judged",
            "a net that opens to its gradients jumps once",
        ),
        "window": Number(
            25,
            "logarithms of norms that a norm is compared with",
            "what was usual lately",
        ),
        "within": Number(
            3,
            "steps within which a norm has to be back",
            "a longer one belongs to another kind",
        ),
        "floor": Number(
            0.1,
            "least deviation of ln(`grad_norm`) in the z-score",
            "norms that hardly differ make no score infinite",
        ),
    },
    rank=5,
    explained_by=("not_cleared",),
)

_WARM_UP: Final = SPIKE.count("warm_up")
_WINDOW: Final = SPIKE.count("window")
_FAR: Final = math.log(SPIKE.at("ratio"))
_WITHIN: Final = SPIKE.count("within")
_FLOOR: Final = SPIKE.number("floor")

_NORM, _LOSS = map(run_key, ("grad_norm", "loss"))


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        logs: Logarithms of the last usual norms.
        taken: Norms so far.
        largest: The largest logarithm that was usual.
        losses: The losses so far.
        raised: Of a norm that stands out: step, norm, ratio, z, loss; empty where
            it has been too long.
    """

    logs: Window = ()
    taken: int = 0
    largest: float = -math.inf
    losses: Losses = field(default_factory=Losses)
    raised: list[float] | None = None


class Spike(Remembering[_State]):
    """One norm far above the recent ones, and above all so far, that is soon over.

    Said once the norm is back, because a longer one belongs to another kind.
    """

    kind = SPIKE.name
    active = False

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__(_State())

    def update_block(self, block: Block) -> bool:
        """Take in plain rows of which no norm stands out."""
        state, norms = self._state, block.whole(_NORM)
        if norms is None or min(norms) <= 0 or state.raised is not None:
            return False
        logs = tuple(map(math.log, norms))
        if max(logs) - min((*state.logs, *logs)) >= _FAR and self._any_far(logs):
            return False
        state.taken += len(logs)
        state.logs = (*state.logs, *logs)[-_WINDOW:]
        state.largest = max(state.largest, *logs)
        state.losses.take_block(block)
        return True

    def _any_far(self, logs: Sequence[float]) -> bool:
        """Tell whether one of the next norms stands out."""
        window, taken = self._state.logs, self._state.taken
        for i, log in enumerate(logs, 1):
            if taken + i > _WARM_UP and log - median(window) >= _FAR:
                return True
            window = push(window, log, _WINDOW)
        return False

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        if reinitialised(record.events):
            saved.reset(self._state)
        norm = record.metrics.get(_NORM)
        if norm is None or not math.isfinite(norm) or norm <= 0:
            self._state.raised = None
            return []
        log = math.log(norm)
        self._state.taken += 1
        warm = self._state.taken > _WARM_UP and log - min(self._state.logs) >= _FAR
        usual = median(self._state.logs) if warm else math.inf
        if log - usual < _FAR:
            raised, self._state.raised = self._state.raised, None
            found = self._judged(record, raised) if raised else []
            self._take_usual(record, log)
            return found
        if self._state.raised is None:
            z = robust_z(self._state.logs, log, floor=_FLOOR)
            if z >= SPIKE.at("z"):
                self._state.raised = [record.step, norm, math.exp(log - usual), z]
                loss = record.metrics.get(_LOSS, -math.inf)
                self._state.raised.append(loss)
            else:
                self._take_usual(record, log)
        elif not self._state.raised or record.step - self._state.raised[0] >= _WITHIN:
            self._state.raised = []  # too long for a spike
            self._take_usual(record, log)
        return []

    def _take_usual(self, record: StepRecord, log: float) -> None:
        self._state.logs = push(self._state.logs, log, _WINDOW)
        self._state.largest = max(self._state.largest, log)
        self._state.losses.take(record)

    def _judged(self, record: StepRecord, raised: Sequence[float]) -> list[Alert]:
        """Return the alert, if the norm was larger than any net that learns shows."""
        step, norm, ratio, z, loss = raised
        record_ratio = math.exp(math.log(norm) - self._state.largest)
        # A loss that was logged behind its step stands in the next record.
        loss = max(loss, record.metrics.get(_LOSS, loss))
        most = math.inf if self._state.losses.signed else self._state.losses.largest
        told = loss > SPIKE.at("loss") * max(most, 0.0)
        if record_ratio < SPIKE.at("record_with_loss" if told else "record"):
            return []
        clip = Remedy(name="clip.LogZClip")
        usual = norm / ratio
        shown = (
            f"norm {norm:.3g}, {ratio:.3g} times the median {usual:.3g} (robust z "
            f"{z:.1f}) and {record_ratio:.3g} times the largest so far"
        )
        if told:
            shown += (
                f"; loss {loss:.3g}, at most {self._state.losses.largest:.3g} before"
            )
        return [
            text.alert(
                SPIKE,
                record,
                since=int(step),
                what=f"one gradient norm stood out at step {step:.0f}; it is back",
                shown=shown,
                cause="bad_batch",
                evidence={_NORM: (norm, SPIKE.at("ratio") * usual)},
                remedy=clip,
            )
        ]
