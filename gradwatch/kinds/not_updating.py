"""Weights that have a gradient and do not change: the recurrent ones, by stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.missing import Keys, Missing
from gradwatch.record import Alert, StepRecord, Stream

NOT_UPDATING = Kind(
    name="not_updating",
    title="gradwatch: weights do not change",
    severity="warning",
    meaning="Weights have a gradient and do not change.",
    evidence={
        "still": Evidence(
            "steps whose `update_ratio` is exactly 0, of a weight in an optimizer",
            10,
            None,
            "warm-ups begin with a step or two at a rate of 0",
        ),
        "unheld": Evidence(
            "steps in which no optimizer was seen that holds the weight",
            25,
            None,
            "some optimizers step rarely",
        ),
        "rate_zero": Evidence(
            "steps at a learning rate of 0",
            50,
            None,
            "a phase in which a group rests is meant; who freezes for good says "
            "requires_grad_(False), and pays no backward for it",
        ),
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="after 3 steps with a change",
    excused="a gradient that is used up: what it asks for rounds to nothing",
    causes={
        "no_step": Cause(
            "`unchanged`, and no optimizer has stepped on any weight",
            "backward is called and no optimizer steps: its step() is not reached, or "
            "what it holds is no part of this model",
            "optimizer.step()  # after each backward",
        ),
        "stale_parameters": Cause(
            "the same, and an optimizer steps that holds tensors of the same shapes",
            "the optimizer steps on the parameters of another model: the model was "
            "built, or copied, once more after the optimizer was made",
            "optimizer.param_groups.clear(); optimizer.state.clear(); "
            "optimizer.add_param_group({{'params': list(model.parameters())}})",
        ),
        "not_in_optimizer": Cause(
            "no optimizer that has stepped holds the weight",
            "no optimizer that has stepped holds it",
            "optimizer.add_param_group({{'params': [{weight}]}})",
        ),
        "schedule": Cause(
            "its learning rate has fallen to less than a thousandth of the first one",
            "the learning rate has been taken down to next to nothing: a schedule that "
            "counts epochs is stepped at every batch, it seems, or is over before the "
            "training is",
            "scheduler.step()  # once an epoch, behind the loop over the batches",
        ),
        "frozen": Cause(
            "its learning rate is 0, or so small that nothing is left of an update",
            "the weight's learning rate is 0, or next to it, yet its gradient is "
            "computed; if that is meant, requires_grad_(False) is cheaper",
            "print([group['lr'] for group in optimizer.param_groups])",
        ),
        None: Cause(
            "the optimizer holds it at a rate that is not 0",
            "its optimizer steps and its gradient is not 0: the updates round to "
            "nothing in the weight's precision, or something writes the weight back",
            "print({weight}.dtype, [group['lr'] for group in optimizer.param_groups])",
        ),
    },
    numbers={
        "passes": Number(
            100,
            "backward passes that leave every weight as it was, with no optimizer",
            "who accumulates gradients uses fewer",
        ),
        "named": Number(6, "parameters that are named one by one", "a line holds them"),
        "fallen": Number(
            1e-3, "share of the first learning rate that is as good as none", "chosen"
        ),
        "used_up": Number(
            1e-8,
            "share of the first gradient's norm at which an update may round to "
            "nothing, and no harm is done",
            "a policy that is always paid has gradients of 1e-14 for 2,000 steps",
        ),
        "tiny": Number(
            2.0**-40, "learning rate that is as good as 0", "float32 has 24 bits"
        ),
        "back": Number(
            3, "steps with a change after which it is over", "one or two may be chance"
        ),
    },
    explained_by=(*text.BREAKS, "cleared_early", "over_clipping"),
    undecided_by=("dead_units", "gate_stuck", "underflow"),
)


_NAMES: Final = NOT_UPDATING.count("named")


def listed(names: Sequence[str]) -> str:
    """Return names in a row, the first of many alone."""
    if len(names) <= _NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMES])} and {len(names) - _NAMES} more"


def line_of(names: Sequence[str]) -> str:
    """Return the line that gives parameters to an optimizer."""
    if len(names) <= _NAMES:
        each = ", ".join(f"model.get_parameter({name!r})" for name in names)
        return f"optimizer.add_param_group({{'params': [{each}]}})"
    held = "p is q for g in optimizer.param_groups for q in g['params']"
    rest = f"p for p in model.parameters() if not any({held})"
    return f"optimizer.add_param_group({{'params': [{rest}]}})"


class NotUpdating(Missing):
    """W_hh has a gradient and does not change."""

    kind, _row = NOT_UPDATING.name, NOT_UPDATING

    def _cause(self, record: StepRecord, stream: Stream, keys: Keys) -> str | None:
        if record.metrics.get(keys.ratio) is None:
            return "not_in_optimizer"
        rate, first = self._seen.stream(stream).lr, self._state.rates.get(stream.name)
        if rate is None:
            return None
        if rate < (first or 0.0) * NOT_UPDATING.number("fallen"):
            return "schedule"
        return "frozen" if rate <= NOT_UPDATING.number("tiny") else None

    def _rate(self, stream: Stream) -> str:
        """Say what the learning rate is, and what it was, as far as that is known."""
        rate, first = self._seen.stream(stream).lr, self._state.rates.get(stream.name)
        if rate is None:
            return ""
        before = f", at first {first:.2g}" if first and first != rate else ""
        return f"; its learning rate is about {rate:.2g}{before}"

    def _always(self, block: Block, stream: Stream, keys: Keys) -> bool:
        read = block.read(keys.ratio)
        return read is not None and all(read)

    def _hold(self, record: StepRecord, stream: Stream, keys: Keys) -> int | None:
        ratio, norm = record.metrics.get(keys.ratio), record.metrics.get(keys.hh)
        unheld = ratio is None and self._seen.stream(stream).in_optimizer is False
        if not norm:
            return None
        first = self._state.norms.setdefault(stream.name, norm)
        if ratio != 0 and not unheld:
            return None
        cause = self._cause(record, stream, keys)
        if cause is None and norm <= NOT_UPDATING.number("used_up") * first:
            return None
        level = {
            "not_in_optimizer": "unheld",
            "schedule": "rate_zero",
            "frozen": "rate_zero",
        }
        return int(NOT_UPDATING.at(level.get(cause or "", "still")))

    def _judged(self, record: StepRecord, stream: Stream, keys: Keys) -> list[Alert]:
        cause = self._cause(record, stream, keys)
        norm, steps = record.metrics[keys.hh], self._state.missing[stream.name]
        unheld = self._state.unheld if cause == "not_in_optimizer" else []
        return [
            text.alert(
                NOT_UPDATING,
                record,
                since=self._state.since[stream.name],
                what=f"the recurrent weights of {stream.name} do not change",
                shown=(
                    f"no change in {steps} consecutive steps, with a gradient of norm "
                    f"{norm:.3g}"
                )
                + self._rate(stream)
                + (f"; no optimizer holds {listed(unheld)}" if unheld else ""),
                do=line_of(unheld) if unheld else None,
                cause=cause,
                evidence={} if cause == "not_in_optimizer" else {keys.ratio: (0.0, 0)},
                stream=stream,
            )
        ]
