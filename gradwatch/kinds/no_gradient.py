"""Recurrent weights without a gradient."""

from __future__ import annotations

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.missing import NORM, Keys, Missing
from gradwatch.record import Alert, StepRecord, Stream

NO_GRADIENT = Kind(
    name="no_gradient",
    title="gradwatch: recurrent weights without a gradient",
    severity="warning",
    meaning=(
        "The recurrent weights of a stream have no gradient, or one that is 0 in every "
        "entry, while other weights have one."
    ),
    evidence={
        "never": Evidence(
            "steps without, from the first one on",
            20,
            None,
            "some nets take turns, some begin a few steps late",
        ),
        "lost": Evidence(
            "steps without, after there had been some",
            50,
            None,
            "phases of a training in which a part rests are shorter",
        ),
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="after 3 steps with a gradient",
    excused=(
        "weights that no optimizer holds, or one that has not stepped; sequences of "
        "one step, but for several calls of one; dead units, stuck gates and saturated "
        "ones, which have alarms of their own. Never a small gradient: 7e-10 was "
        "healthy"
    ),
    causes={
        "frozen": Cause(
            "`requires_grad` is False: a notice",
            "requires_grad is False; if that is meant, nothing is wrong",
            "{weight}.requires_grad_(True)  # if it is to learn",
        ),
        "unused": Cause(
            "no call of the module was seen with gradients on",
            "no call of {module} was seen while gradients were on: it is registered "
            "but not used, or runs under torch.no_grad()",
            "print(model)  # then check that forward() calls {module}",
        ),
        "detached": Cause(
            "it was called, and no gradient came back to its output",
            "{module} runs, but no gradient comes back to its output: a detach(), "
            ".data, .item() or numpy between it and the loss",
            "assert output.requires_grad  # after {module}, then after each operation "
            "up to the loss: the first that fails is the cut",
        ),
        "state": Cause(
            "`stateless_calls`: it is called several times a step, for one time step "
            "each, and given no state",
            "{module} is called one time step at a time, and never given the state "
            "that it returned: nothing recurs",
            "state = None before the loop, and in it: y, state = {module}(x, state)",
        ),
        "readout_index": Cause(
            "the gradient of W_hh is exactly 0, that of W_ih is not",
            "the loss reads only the first step that this direction takes, where no "
            "recurrent weight has acted yet",
            "_, h_n = {module}(x)  # h_n has the last step of both directions",
        ),
        None: Cause(
            "exactly 0 everywhere",
            "undecided: a gradient arrives, but every entry of it is 0",
            "watch.probe_now()  # a step later, in watch.latest: where a gate's share "
            "shut or open, or dead, is near 1, re-initialise {module}; else find what "
            "multiplies by 0 between it and the loss",
        ),
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
    explained_by=text.BREAKS,
    undecided_by=("dead_units", "gate_stuck", "underflow"),
)


class NoGradient(Missing):
    """W_hh has no gradient at all, or one that is 0 in every entry."""

    kind, _row = NO_GRADIENT.name, NO_GRADIENT

    def _always(self, block: Block, stream: Stream, keys: Keys) -> bool:
        read = block.read(keys.hh)
        return read is not None and all(read)

    def _hold(self, record: StepRecord, stream: Stream, keys: Keys) -> int | None:
        norm = record.metrics.get(keys.hh)
        if norm:
            return None
        if self._seen.stream(stream).requires_grad is not False:  # that is a notice
            held = self._seen.stream(stream).in_optimizer
            if held is False or (held and keys.ratio not in record.metrics):
                return None  # nobody trains it, or its optimizer has not stepped
            facts = self._seen.module(stream)
            if norm == 0 and facts.T == 1 and not facts.stateless_calls:
                return None  # nothing has recurred
            if norm == 0 and self._half(stream):
                return None  # an alarm of its own
        level = "lost" if self._state.ever.get(stream.name) else "never"
        return int(NO_GRADIENT.at(level))

    def _judged(self, record: StepRecord, stream: Stream, keys: Keys) -> list[Alert]:
        """Return the alert, if a cause can be seen or a gradient of zeros is there."""
        reach, norm = self._seen.module(stream).reach, record.metrics.get(keys.hh)
        cause: str | None = None
        if self._seen.stream(stream).requires_grad is False:
            cause = "frozen"
        elif norm is None:
            if reach not in ("unused", "detached"):
                return []  # reached, and its gradients were taken away since
            cause = reach
        elif self._seen.module(stream).stateless_calls:
            cause = "state"
        elif record.metrics.get(keys.ih, 0.0) > 0:
            cause = "readout_index"
        elif self._all_dead(stream) or self._is_saturated(stream):
            return []
        shown = "none at all" if norm is None else "0 in every entry"
        steps = self._state.missing[stream.name]
        return [
            text.alert(
                NO_GRADIENT,
                record,
                severity="info" if cause == "frozen" else None,
                since=self._state.since[stream.name],
                what=f"the recurrent weights of {stream.name} get no gradient",
                shown=(
                    f"{shown}, in {steps} consecutive steps; the "
                    f"total norm is {record.metrics[NORM]:.3g}"
                ),
                cause=cause,
                evidence={} if norm is None else {keys.hh: (norm, 0.0)},
                stream=stream,
            )
        ]
