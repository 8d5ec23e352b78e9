"""A loss that has left its best far behind, and stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch import saved
from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.lr_too_high import LR_TOO_HIGH
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import HALF, SPAN, Losses, Outside, Seen, SeenState
from gradwatch.kinds.text import BEFORE, LOWER_RATE
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import (
    largest_median,
    median,
    rolling_medians,
    smallest_median,
)
from gradwatch.record import Alert, StepRecord, Stream, reinitialised

LOSS_DIVERGENCE = Kind(
    name="loss_divergence",
    title="gradwatch: the loss has gone up and stays up",
    severity="warning",
    meaning="The loss has left its best far behind, and stays.",
    evidence={
        "best": Evidence(
            "median of 20 losses over the lowest such median",
            2.2,
            1.5,
            "near 0 a healthy loss multiplies by 8: the next two decide there",
        ),
        "start": Evidence(
            "the same over the median of the first 20",
            0.35,
            None,
            "a healthy net that has learnt does not come back to a third of its start",
        ),
        "spread": Evidence(
            "median deviations of the best 20 above their median",
            6.0,
            None,
            "a noisy loss is not judged by its luck",
        ),
    },
    warm_up="60 losses",
    confirmed=(
        "by 30 consecutive steps in which the loss does not fall by a tenth (healthy "
        "nets lose half of what they have learnt, and are on their way back by then), "
        "by 10 where the learning rate has been raised"
    ),
    over="after 3 steps at 1.5 times the best or below",
    excused="losses that are not positive throughout",
    causes={
        "loaded": Cause(
            "an event `written:` in the 50 steps before the loss rose, or since",
            "the recurrent weights were loaded, or written by hand",
            "# find what writes the weights between two steps: load_state_dict, "
            ".data, or a copy",
        ),
        "schedule": Cause(
            "an event `lr: a -> b` with b three times a or more, likewise",
            "the learning rate was raised",
            "print(optimizer.param_groups)  # at step {since}: look for what raised it",
        ),
        "weight_decay": Cause(
            "`update_decay` is twice `update_gradient` or more",
            "the weight decay takes more from the weights than the gradient gives them",
            "for group in optimizer.param_groups: group['weight_decay'] *= 0.01",
        ),
        "bad_batch": Cause(
            "it began with a spike of the gradient norm",
            "one batch, at step {since}, had a gradient norm far above all others, and "
            "the loss rose after it",
            "torch.save(batch, 'batch.pt')  # at step {since} of a repeated run: leave "
            "it out if it is bad, else clip",
        ),
        "lr": Cause(
            "the learning rate is three times what it was at the best, or updates are "
            "large beside the weights",
            "the learning rate, or the updates, are far larger than they were when the "
            "loss was at its best",
            LOWER_RATE + BEFORE,
        ),
        "data": Cause(
            "else",
            "the learning rate has not changed, so most likely the data have: other "
            "targets, another order, another source",
            "print(batch)  # at step {since} and at an earlier one, of a repeated run",
        ),
    },
    numbers={
        "warm_up": Number(
            60,
            "losses before any is judged",
            "three times the losses that a median is taken over",
        ),
        "hold": Number(
            30,
            "consecutive steps that it lasts",
            "healthy nets lose half of what they have learnt, and are on their way "
            "back by then",
        ),
        "hold_explained": Number(
            10, "the same where the learning rate has been raised", "the cause is known"
        ),
        "falls": Number(
            0.9,
            "share of the highest median below which the loss is on its way back: it "
            "waits again",
            "a loss that comes back by itself is none",
        ),
        "back": Number(
            3,
            "steps at the clear value or below after which it is over",
            "one may be a lucky batch",
        ),
        "raised": Number(
            3.0, "times the learning rate at the best from which on it is the cause"
        ),
        "burst": Number(
            100.0, "times the usual gradient norm from which on one batch is the cause"
        ),
        "decay": Number(
            2.0, "times the gradient's part of an update from which on decay rules it"
        ),
        "few": Number(
            5, "such batches at most", "where there are more, the data have changed"
        ),
        "after": Number(
            100, "steps behind such a batch in which what it has done can show"
        ),
        "keeps": Number(
            0.9,
            "share of the old value in the running means of update ratio and norm",
            "about the last 10 steps",
        ),
    },
    rank=4,
    explained_by=("not_cleared",),
)

_WARM_UP: Final = LOSS_DIVERGENCE.count("warm_up")
_HOLD: Final = LOSS_DIVERGENCE.count("hold")
_HOLD_EXPLAINED: Final = LOSS_DIVERGENCE.count("hold_explained")
_FALLS: Final = LOSS_DIVERGENCE.number("falls")
_BACK: Final = LOSS_DIVERGENCE.count("back")
_RAISED: Final = LOSS_DIVERGENCE.number("raised")
_BURST: Final = LOSS_DIVERGENCE.number("burst")
_FEW: Final = LOSS_DIVERGENCE.count("few")
_AFTER: Final = LOSS_DIVERGENCE.count("after")
_KEEPS: Final = LOSS_DIVERGENCE.number("keeps")
_NEW: Final = 1 - _KEEPS

_LOSS, _NORM = map(run_key, ("loss", "grad_norm"))


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        active: Whether the incident is open.
        losses: The losses so far.
        seen: What was last seen of every stream.
        taken: Losses so far.
        high: Consecutive steps that it has been high.
        calm: Consecutive ones that it has been calm.
        since: When it rose.
        best: The lowest median, and the deviation from it.
        peak: The highest median since it rose.
        usual: At the best: update ratio, norm, rate.
        now: Running means of the first two.
        rates: Rates along the losses that the median is of.
        bursts: The last steps of norms far above the usual one.
        outside: What was done beside the steps.
    """

    active: bool = False
    losses: Losses = field(default_factory=Losses)
    seen: SeenState = field(default_factory=SeenState)
    taken: int = 0
    high: int = 0
    calm: int = 0
    since: int = 0
    best: list[float] = field(default_factory=lambda: [math.inf, 0.0])
    peak: float = 0.0
    usual: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    now: list[float] = field(default_factory=lambda: [0.0, 0.0])
    rates: list[float] = field(default_factory=list)
    bursts: list[int] = field(default_factory=list)
    outside: Outside = field(default_factory=Outside)


class LossDivergence(Remembering[_State]):
    """The median of 20 losses far above the lowest such median, and not falling.

    Silent where losses are negative.
    """

    kind = LOSS_DIVERGENCE.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._streams = tuple(streams)
        self._ratios = [stream_key(s, "update_ratio") for s in streams]
        self._seen = Seen(streams, ("update_decay", "update_gradient"))
        super().__init__(_State(seen=self._seen.state))

    @property
    def active(self) -> bool:
        """Whether it still holds."""
        return self._state.active

    def update_block(self, block: Block) -> bool:
        """Take in plain rows whose losses are far from where they began, if any."""
        column, losses, state = block.column(_LOSS), block.whole(_LOSS), self._state
        if losses is None:
            if column is not None and column.count(None) < len(column):
                return False
            self.wants = None
            return True
        if state.active or state.high or not self._never_far(losses):
            return False
        ratios, norms = block.largest(self._ratios), block.whole(_NORM)
        if ratios is None or norms is None:
            return False
        read = iter(ratios)
        each = [next(read) if full else None for full in block.full]
        self.wants = None
        if state.losses.settled and min(losses) >= 0:
            self._follow_all(block.steps, losses, each, norms)
            return True
        for step, loss, ratio, norm in zip(
            block.steps, losses, each, norms, strict=True
        ):
            state.losses.take_one(step, loss)
            self._follow(step, ratio, norm)
        return True

    def _follow_all(
        self,
        steps: Sequence[int],
        losses: Sequence[float],
        ratios: Sequence[float | None],
        norms: Sequence[float],
    ) -> None:
        """Take in steps of which none is far, with their losses.

        What :meth:`_follow` would come to, one after the other.
        """
        state, rate = self._state, self._rate()
        every, best, at = [*state.losses.last, *losses], state.best[0], -1
        medians: Sequence[float] = ()
        if smallest_median(every, HALF) < best:
            medians = rolling_medians(every[1:], SPAN)
        rates, first = (
            [*state.rates, *[rate] * len(losses)],
            len(state.rates) + 1 - SPAN,
        )
        state.taken += len(losses)
        ratio_now, norm_now = state.now
        for i, (ratio, norm) in enumerate(zip(ratios, norms, strict=True)):
            if norm >= _BURST * state.usual[1] > 0:
                state.bursts = [*state.bursts[-_FEW:], steps[i]]
            new = ratio_now if ratio is None else ratio
            ratio_now = _KEEPS * ratio_now + _NEW * new
            norm_now = _KEEPS * norm_now + _NEW * norm
            if medians and medians[i] < best:
                best, at = medians[i], i
                state.usual = [ratio_now, norm_now, rates[max(first + i, 0)]]
        state.now = [ratio_now, norm_now]
        state.losses.take_all(steps, losses)
        state.rates = rates[-SPAN:]
        if at >= 0:
            window = every[at + 1 : at + 1 + SPAN]
            state.best = [best, median([abs(x - best) for x in window])]

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants = None
        self._seen.take(record)
        self._state.outside.take(record)
        if reinitialised(record.events):
            saved.reset(self._state, keep=("seen",))
        losses = self._state.losses
        if losses.take(record) is None:
            return []
        ratio = None
        if not record.partial:
            each = (record.metrics.get(key, 0.0) for key in self._ratios)
            ratio = max(each, default=0.0)
        loss = self._follow(record.step, ratio, record.metrics.get(_NORM, 0.0))
        if loss is None:
            return []
        if self._state.active:
            calm = loss <= LOSS_DIVERGENCE.clear("best") * self._state.best[0]
            self._state.calm = self._state.calm + 1 if calm else 0
            self._state.active = self._state.calm < _BACK
            return []
        if not self._far(loss):
            self._state.high, self._state.peak = 0, 0.0
            return []
        self._state.since = self._state.since if self._state.peak else record.step
        falls = loss < _FALLS * self._state.peak
        self._state.high = 1 if falls else self._state.high + 1
        self._state.peak = loss if falls else max(self._state.peak, loss)
        if self._state.high == 1:
            self.wants = "state"  # so that the learning rate is that of now
        if self._state.high < (_HOLD_EXPLAINED if self._rate_raised() else _HOLD):
            return []
        self._state.active, self._state.high, self._state.peak, self._state.calm = (
            True,
            0,
            0.0,
            0,
        )
        return [self._alert(record, loss)]

    def _follow(self, step: int, ratio: float | None, norm: float) -> float | None:
        """Take in what came with a loss; return the usual loss, None until it is known.

        Args:
            step: The step.
            ratio: The largest update ratio; None where it was not read.
            norm: The total norm.
        """
        losses, state = self._state.losses, self._state
        state.taken += 1
        state.rates = [*state.rates[1 - len(losses.last) :], self._rate()]
        self._note(step, state.now[0] if ratio is None else ratio, norm)
        if losses.start is None:
            state.active = state.active and not losses.signed
            return None
        loss = losses.usual
        if loss < state.best[0]:
            state.best = [loss, median(tuple(abs(x - loss) for x in losses.last))]
            state.usual = [*state.now, state.rates[0]]
        return loss

    def _never_far(self, losses: Sequence[float]) -> bool:
        """Tell whether no median of losses can be far, whichever come together."""
        state, known = self._state, self._state.losses
        if known.signed or state.taken + len(losses) < _WARM_UP:
            return True
        all_of_them = (*known.last, *losses)
        most = largest_median(all_of_them, HALF)
        if most < LOSS_DIVERGENCE.at("start") * (known.start or 0.0):
            return True
        least = smallest_median(all_of_them, HALF)
        return most < LOSS_DIVERGENCE.at("best") * min(least, state.best[0])

    def _far(self, loss: float) -> bool:
        best, spread = self._state.best
        return (
            self._state.taken >= _WARM_UP
            and loss >= LOSS_DIVERGENCE.at("best") * best
            and loss
            >= LOSS_DIVERGENCE.at("start") * (self._state.losses.start or math.inf)
            and loss >= best + LOSS_DIVERGENCE.at("spread") * spread
        )

    def _note(self, step: int, ratio: float, norm: float) -> None:
        """Keep running means of the update ratio and the norm, and the burst."""
        if not math.isfinite(ratio + norm):
            return
        if norm >= _BURST * self._state.usual[1] > 0:
            self._state.bursts = [*self._state.bursts[-_FEW:], step]
        old = _KEEPS if self._state.taken > 1 else 0.0
        self._state.now = [
            old * before + (1 - old) * value
            for before, value in zip(self._state.now, (ratio, norm), strict=True)
        ]

    def _alert(self, record: StepRecord, loss: float) -> Alert:
        state = self._state
        best, start, cause = (
            self._state.best[0],
            self._state.losses.start,
            self._cause(),
        )
        return text.alert(
            LOSS_DIVERGENCE,
            record,
            since=self._near()[0] if cause == "bad_batch" else self._state.since,
            what=f"the loss has gone up since step {self._state.since}, and stays up",
            shown=(
                f"median of the last 20 losses {loss:.3g}; at best {best:.3g}, at "
                f"first {start:.3g}; update_ratio {state.now[0]:.2g}, at the best "
                f"{state.usual[0]:.2g}; learning rate about {self._rate():.2g}, when "
                f"the loss was lowest {self._state.usual[-1]:.2g}"
            ),
            cause=cause,
            why=self._told(cause),
            do=self._back_to_usual() if self._rate_raised() else None,
            evidence={_LOSS: (loss, LOSS_DIVERGENCE.at("best") * best)},
        )

    def _rate(self) -> float:
        """Return the largest learning rate of a recurrent weight, as far as known."""
        rates = [self._seen.stream(s).lr or 0.0 for s in self._streams]
        return max(rates, default=0.0)

    def _back_to_usual(self) -> str:
        """Return the line that takes back a rise of the rate."""
        usual = f"group['lr'] = {self._state.usual[-1]:.2g}"
        line = f"for group in optimizer.param_groups: {usual}"
        since = self._state.since
        return text.filled(f"{line}{BEFORE}; then find what raised it", since=since)

    def _rate_raised(self) -> bool:
        return self._rate() >= _RAISED * self._state.usual[-1] > 0

    def _told(self, cause: str) -> str | None:
        """Return the line on a cause with what was seen of it, if more was."""
        outside = self._state.outside
        if cause == "schedule":
            return outside.rise
        if cause == "loaded":
            return (
                f"somebody has written the weights of {outside.written} between two "
                f"steps, at step {outside.written_at}"
            )
        return None

    def _decays(self) -> bool:
        """Tell whether weight decay rules the updates of a recurrent weight."""
        seen = [self._seen.of(stream) for stream in self._streams]
        times = LOSS_DIVERGENCE.number("decay")
        return any(
            own.get("update_decay", 0.0) > times * own.get("update_gradient", math.inf)
            for own in seen
        )

    def _cause(self) -> str:
        outside, since = self._state.outside, self._state.since
        if outside.was_written(since):
            return "loaded"
        if outside.was_raised(since):
            return "schedule"
        if self._decays():
            return "weight_decay"
        if self._rate_raised() or self._state.now[0] >= LR_TOO_HIGH.clear("ratio"):
            return "lr"
        return "bad_batch" if 0 < len(self._near()) <= _FEW else "data"

    def _near(self) -> list[int]:
        """Return the steps, shortly before the loss rose, whose norm stood out."""
        return [
            step for step in self._state.bursts if self._state.since - step <= _AFTER
        ]
