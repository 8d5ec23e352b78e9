"""A loss that is no better than that of a constant output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Losses, Seen, SeenState
from gradwatch.metrics import run_key
from gradwatch.record import Alert, StepRecord, Stream

NOT_LEARNING = Kind(
    name="not_learning",
    title="gradwatch: no better than a constant",
    severity="warning",
    meaning="The loss is no better than that of a constant output.",
    evidence={
        "loss": Evidence(
            "`loss`, the mean of 100, over `loss_constant`, at least",
            0.97,
            None,
            "a mean of 100 batches scatters by a hundredth or two around chance",
        ),
        "notice": Evidence(
            "steps for which that is so: a notice", 200, None, "chosen, not measured"
        ),
        "steps": Evidence(
            "steps for which that is so: an alarm",
            3000,
            None,
            "recall over many steps begins to be learnt after hundreds and thousands",
        ),
    },
    warm_up="100 losses",
    confirmed="by the number of steps",
    over="with a mean below it",
    excused="losses whose targets cannot be told, which have no `loss_constant`",
    causes={
        "eps": Cause(
            "`below_eps` of a stream, 9 tenths or more",
            "the gradients are below Adam's eps, which is there to keep it from a "
            "division by 0 and rules the size of the steps now: next to none",
            "for group in optimizer.param_groups: group['eps'] = 1e-8",
        ),
        None: Cause(
            "else: it says that nothing is learnt, and not why",
            "what the model has learnt so far is the mean of the targets. That is a "
            "plateau before something is learnt, or targets that the inputs do not "
            "tell, or a rate that is far too low or too high",
            "# train on one batch alone: a loss that does not fall to 0 there tells of "
            "a fault in the model or the loop",
        ),
    },
    explained_by=(
        *text.BREAKS,
        "loss_mismatch",
        "target_broadcast",
        "axes_mixed",
        "cleared_early",
        "not_cleared",
        "no_gradient",
        "not_updating",
        "over_clipping",
        "dead_units",
        "gate_stuck",
        "underflow",
        "saturated",
        "vanishing",
    ),
    numbers={
        "below_eps": Number(
            0.9, "share of the entries of W_hh from which on Adam's eps is the cause"
        ),
        "warm_up": Number(100, "losses before any is judged", "a mean of 100 is taken"),
    },
)

_CONSTANT: Final = run_key("loss_constant")
_LOSS: Final = run_key("loss")
_AT: Final = NOT_LEARNING.at("loss")


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        losses: The losses so far.
        seen: What was last seen of every stream.
        constant: What a constant would have; 0 while that is not known.
        begun: The first step of which the loss is known.
        said: What was said: nothing, a notice, an alarm.
        learns: Whether it was below that.
    """

    losses: Losses = field(default_factory=Losses)
    seen: SeenState = field(default_factory=SeenState)
    constant: float = 0.0
    begun: int = -1
    said: int = 0
    learns: bool = False


class NotLearning(Remembering[_State]):
    """The mean of the last losses beside what the best constant would have."""

    kind = NOT_LEARNING.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._streams = tuple(streams)
        self._seen = Seen(streams, ("horizon", "below_eps"))
        super().__init__(_State(seen=self._seen.state))

    @property
    def active(self) -> bool:
        """Whether it still holds."""
        return self._state.said > 0 and not self._state.learns

    def update_block(self, block: Block) -> bool:
        """Take in plain rows, none of which ends the wait."""
        state = self._state
        if state.learns:
            return True
        column = block.column(_LOSS)
        if column is None or column.count(None) == len(column):
            return True
        if state.begun < 0 or self._due(block.steps[-1]):
            return False
        state.losses.take_block(block)
        self._look()
        return True

    def _due(self, step: int) -> bool:
        """Tell whether something is to be said at a step."""
        waits = ("notice", "steps")
        if self._state.said == len(waits) or not self._state.constant:
            return False
        return step - self._state.begun >= NOT_LEARNING.at(waits[self._state.said])

    def _look(self) -> None:
        """See whether the loss has been below that of a constant."""
        state, losses = self._state, self._state.losses
        if losses.taken < NOT_LEARNING.count("warm_up") or not state.constant:
            return
        state.learns = losses.mean < _AT * state.constant

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        state = self._state
        if state.learns:
            return []
        self._seen.take(record)
        state.constant = record.metrics.get(_CONSTANT, state.constant)
        if state.losses.take(record) is None:
            return []
        state.begun = record.step if state.begun < 0 else state.begun
        self._look()
        if state.learns or not state.constant or not self._due(record.step):
            return []
        state.said += 1
        return [self._alert(record, state.said > 1)]

    def _alert(self, record: StepRecord, alarm: bool) -> Alert:
        state, steps = self._state, record.step - self._state.begun
        mean = state.losses.mean
        shown = (
            f"loss {mean:.4g} (mean of 100); a constant would have {state.constant:.4g}"
        )
        for stream in self._streams:
            own = self._seen.of(stream)
            if "horizon" in own:
                length = self._seen.module(stream).T or 0
                shown += f"; gradients of {stream.name} arrive {own['horizon']:.0f} of "
                shown += f"{length} steps back"
        least = NOT_LEARNING.number("below_eps")
        seen = [self._seen.of(stream).get("below_eps", 0.0) for stream in self._streams]
        return text.alert(
            NOT_LEARNING,
            record,
            severity="warning" if alarm else "info",
            since=state.begun,
            what=f"no better than a constant output for {steps} steps",
            shown=shown,
            cause="eps" if max(seen, default=0.0) >= least else None,
            evidence={_LOSS: (mean, _AT * state.constant)},
        )
