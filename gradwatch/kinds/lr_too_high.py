"""Steps that are too large beside the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.latch import Running
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Losses, Outside
from gradwatch.kinds.text import BEFORE, CLIP_FIRST, CLIPPED_LATE, LOWER_RATE
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import upper_median
from gradwatch.record import Alert, StepRecord, Stream, reinitialised

LR_TOO_HIGH = Kind(
    name="lr_too_high",
    title="gradwatch: the learning rate is too high",
    severity="warning",
    meaning="Updates are so large beside the recurrent weights that nothing settles.",
    evidence={
        "ratio": Evidence(
            "`update_ratio`, the median of 5 steps",
            0.25,
            0.15,
            "healthy runs reach .09, in their first steps",
        ),
        "jump": Evidence(
            "`update_ratio`, at 2 of 5 steps",
            1.0,
            None,
            "an update as large as the weights; the largest healthy one was .17",
        ),
        "leap": Evidence(
            "`update_ratio`, once",
            3.0,
            None,
            "nothing of the weights that were there is left",
        ),
        "late": Evidence(
            "`update_ratio`, the median of 5 steps, where gradients are clipped after "
            "the step",
            0.1,
            0.1,
            "the cause is known: the clip was to hold such steps back",
        ),
        "first": Evidence(
            "`update_ratio`, once in the first 10 steps, and nothing learnt by step 40",
            1.0,
            None,
            "the weights that there were are gone; of 198 families only those whose "
            "rate is too high reach .4 there",
        ),
        "gone": Evidence(
            "the same, and nothing learnt by step 10",
            10.0,
            None,
            "no family with a rate that is not too high comes near",
        ),
        "constant": Evidence(
            "beside either: median of 5 losses over `loss_constant` or, where that is "
            "not known, over the first loss",
            0.97,
            0.8,
            "no better than a constant output",
        ),
        "faster": Evidence(
            "beside a jump or a leap: times by which the update has grown more than "
            "the gradient",
            10.0,
            None,
            "an update that is large because its gradient is, is an explosion's",
        ),
        "loss": Evidence(
            "median of 5 losses over the loss at the start, where it is known, at "
            "least; not asked for a jump",
            0.8,
            None,
            "who learns at such a rate is left alone",
        ),
    },
    warm_up="10 steps, none where gradients are clipped after the step",
    confirmed=(
        "by 4 consecutive such medians, by 2 jumps, or by one leap; of the first steps "
        "at the 40th, or at the 10th"
    ),
    over=(
        "after 25 medians at .15 or below, after 100 where there was a jump; of the "
        "first steps once the loss is below .8 of the constant's"
    ),
    excused="a loss that has fallen by a fifth",
    causes={
        "schedule": Cause(
            "an event `lr: a -> b` with b three times a or more, within the 50 steps "
            "before it began, or since",
            "the learning rate was raised",
            "print(optimizer.param_groups)  # at step {since}: look for what raised it",
        ),
        "clip_order": Cause(
            "`written_late`: gradients are written after the step that has used them",
            CLIPPED_LATE,
            CLIP_FIRST,
        ),
        "lr": Cause(
            "neither",
            "each step moves the recurrent weights by a quarter of their norm or more",
            LOWER_RATE + BEFORE,
        ),
    },
    numbers={
        "least_back": Number(
            3,
            "consecutive steps after which what was not reported is forgotten",
            "one or two may be chance",
        ),
        "medians_of": Number(
            5, "update ratios that a median is taken over", "one large update is none"
        ),
        "warm_up": Number(
            10,
            "steps before any is judged",
            "the first updates of an adaptive optimizer are its largest",
        ),
        "settled": Number(
            40,
            "steps after which the first ones are judged",
            "who learns at such a rate has begun to by then",
        ),
        "hold": Number(4, "such medians, consecutive"),
        "jumps": Number(2, "jumps among the last updates", "one may be a batch's"),
        "back": Number(
            25, "medians at the clear value or below after which it is over"
        ),
        "back_from_jump": Number(100, "the same after a jump"),
        "keeps": Number(
            0.9,
            "share of the old value in running means, and of a large norm that fades",
            "momentum keeps the update of one large gradient up",
        ),
    },
    rank=3,
    explained_by=("not_cleared",),
)

_JUMPS: Final = LR_TOO_HIGH.count("jumps")
_BACK: Final = LR_TOO_HIGH.count("back")
_BACK_FROM_JUMP: Final = LR_TOO_HIGH.count("back_from_jump")
_CALM: Final = LR_TOO_HIGH.clear("ratio")
_LEAST_BACK: Final = LR_TOO_HIGH.count("least_back")
_KEEPS: Final = LR_TOO_HIGH.number("keeps")
_FIRST: Final = LR_TOO_HIGH.at("first")
_GONE: Final = LR_TOO_HIGH.at("gone")
_GONE_AT_ONCE: Final = (
    "a step as large as the weights themselves leaves nothing of what they were "
    "initialised to"
)
_NOTHING_LEARNT: Final = LR_TOO_HIGH.at("constant")
_SETTLED: Final = LR_TOO_HIGH.count("settled")
_LOSS: Final = run_key("loss")
_NORM: Final = run_key("grad_norm")
_CONSTANT: Final = run_key("loss_constant")


@dataclass(slots=True)
class _Early:
    """A large update in the first steps.

    Attributes:
        since: The step of the largest.
        ratio: Its size.
        raised: Whether it was reported.
    """

    since: int
    ratio: float
    raised: bool = False


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        ratios: Stream -> its last update ratios.
        usual: Stream -> means of the usual update ratio and of its norm.
        running: Stream -> how long it has shown.
        losses: The losses so far.
        taken: Steps so far.
        burst: The largest norm lately, fading.
        outside: What was done beside the steps.
        early: Stream -> its largest update in the first steps, where that is large.
        constant: What a constant output would have for a loss; until it is known, the
            first loss.
    """

    ratios: dict[str, list[float]] = field(default_factory=dict)
    usual: dict[str, tuple[float, float]] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    losses: Losses = field(default_factory=Losses)
    taken: int = 0
    burst: float = 0.0
    outside: Outside = field(default_factory=Outside)
    early: dict[str, _Early] = field(default_factory=dict)
    constant: float = math.nan


class LrTooHigh(Remembering[_State]):
    """Updates of a quarter of the recurrent weights and more, and nothing learnt."""

    kind = LR_TOO_HIGH.name
    _last: Final = LR_TOO_HIGH.count("medians_of")
    _warm_up: Final = LR_TOO_HIGH.count("warm_up")
    _hold: Final = LR_TOO_HIGH.count("hold")

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._watched = [(s, stream_key(s, "update_ratio")) for s in streams]
        super().__init__(_State())

    @property
    def active(self) -> bool:
        """Whether updates are still too large somewhere."""
        each = self._state.running  # of streams that are no more, too, where resumed
        if any(early.raised for early in self._state.early.values()):
            return True
        return any(s.name in each and each[s.name].raised for s, _ in self._watched)

    def update_block(self, block: Block) -> bool:
        """Take in plain rows with usual updates of every stream."""
        if self._state.early:
            return False
        state, norms = self._state, block.whole(_NORM)
        before = block.read(_NORM)
        if norms is None or before is None:
            return False
        for stream, key in self._watched:
            ratios, running = block.read(key), state.running.get(stream.name)
            if ratios is None or running is None or not running.at_rest:
                return False
            calm = LR_TOO_HIGH.at("late") if state.outside.late else _CALM
            if ratios and not (min(ratios) > 0 and max(ratios) < calm):
                return False
        for stream, key in self._watched:
            ratios = block.read(key) or ()
            for ratio, norm in zip(ratios, before, strict=True):
                self._take_usual(stream, ratio, norm)
            last = [*state.ratios.get(stream.name, ()), *ratios]
            if ratios:
                state.ratios[stream.name] = last[-self._last :]
        for norm in norms:
            state.burst = max(norm, _KEEPS * state.burst)
        state.taken += len(norms)
        state.losses.take_block(block)
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self._state.losses.take(record)
        self._state.outside.take(record)
        for name in reinitialised(record.events):
            self._state.ratios.pop(name, None)
        self._state.taken += 1
        found, norm = [], record.metrics.get(_NORM, math.nan)
        if self._state.early or self._state.taken <= self._warm_up:
            self._take_constant(record)
            found = self._of_the_start(record)
        each = self._state.running
        if math.isfinite(norm):  # momentum keeps the update of one large gradient up
            self._state.burst = max(norm, _KEEPS * self._state.burst)
        for stream, key in self._watched:
            ratio = record.metrics.get(key)
            if stream.name not in each:
                each[stream.name] = Running()
            running = each[stream.name]
            if ratio is None:
                if running.raised and not record.partial:
                    running.take(record.step, False, self._hold, _LEAST_BACK)
                continue
            if self._state.taken <= self._warm_up and ratio >= _FIRST:
                known_early = self._state.early.get(stream.name)
                if known_early is None or ratio > known_early.ratio:
                    self._state.early[stream.name] = _Early(record.step, ratio)
            if 0 < ratio < _CALM:
                self._take_usual(stream, ratio, norm)
            known = self._state.ratios.get(stream.name, [])
            last = self._state.ratios[stream.name] = [*known[1 - self._last :], ratio]
            level = "clear" if running.raised else "at"
            if ratio < _CALM and not running.steps and not self._state.outside.late:
                continue  # nearly always
            size = upper_median(last)
            name = "late" if self._state.outside.late else "ratio"
            there = size >= getattr(LR_TOO_HIGH, level)(name)
            there = there and (running.raised or self._can_be_judged(len(last)))
            jumps = self._jumps(stream, last)
            running.back = max(_BACK_FROM_JUMP if jumps else _BACK, running.back)
            hold = running.steps + 1 if jumps else self._hold
            if running.take(record.step, there or jumps, hold, _LEAST_BACK):
                size = max(last) if jumps else size
                if (early := self._state.early.get(stream.name)) is not None:
                    early.raised = True  # it stays open until the net learns
                found.append(self._alert(record, stream, key, size))
        return found

    def _take_constant(self, record: StepRecord) -> None:
        """Take in what a constant output would have; at first the first loss."""
        known = record.metrics.get(_CONSTANT)
        if known is None and math.isnan(self._state.constant):
            known = record.metrics.get(_LOSS)
        if known is not None and math.isfinite(known):
            self._state.constant = known

    def _of_the_start(self, record: StepRecord) -> list[Alert]:
        """Judge the largest updates of the first steps, once it is known what came."""
        state, found = self._state, []
        if (
            not state.early
            or state.taken <= self._warm_up
            or len(state.losses.last) < self._last
            or not state.constant > 0  # no share of it means anything
        ):
            return []
        share = upper_median(state.losses.last[-self._last :]) / state.constant
        for stream, key in self._watched:
            early = state.early.get(stream.name)
            if early is None:
                continue
            settled = state.taken > _SETTLED
            least = LR_TOO_HIGH.clear("constant") if early.raised else _NOTHING_LEARNT
            if not share >= least:
                if settled:
                    del state.early[stream.name]
            elif not early.raised and (settled or early.ratio >= _GONE):
                early.raised = True
                found.append(self._alert_early(record, stream, key, early, share))
        return found

    def _alert_early(
        self,
        record: StepRecord,
        stream: Stream,
        key: str,
        early: _Early,
        share: float,
    ) -> Alert:
        late = self._state.outside.late
        lower = text.lower_rate(early.ratio / LR_TOO_HIGH.at("ratio"))
        return text.alert(
            LR_TOO_HIGH,
            record,
            since=early.since,
            what=f"the first steps were too large for {stream.name}",
            shown=(
                f"update_ratio {early.ratio:.2g} at step {early.since} (alarm: "
                f"{_FIRST:g} or more): little of the weights was left; the loss is "
                f"{share:.2f} times that of a constant output"
            ),
            cause="clip_order" if late else "lr",
            why=None if late else _GONE_AT_ONCE,
            do=None if late else text.filled(lower + BEFORE, since=early.since),
            evidence={key: (early.ratio, _FIRST)},
            stream=stream,
        )

    def _jumps(self, stream: Stream, last: Sequence[float]) -> bool:
        """Tell whether an update leaves nothing of the weights, and not by its norm."""
        jump, leap = LR_TOO_HIGH.at("jump"), LR_TOO_HIGH.at("leap")
        late = self._state.outside.late  # it is known why
        if (self._state.taken <= self._warm_up and not late) or last[-1] < jump:
            return False
        if last[-1] < leap and sum(ratio >= jump for ratio in last) < _JUMPS:
            return False
        if late:
            return True
        usual, before = self._state.usual.get(stream.name, (0.0, 0.0))
        return last[-1] * before >= LR_TOO_HIGH.at("faster") * usual * self._state.burst

    def _take_usual(self, stream: Stream, ratio: float, norm: float) -> None:
        """Take a usual update, and the norm that it came from, into running means."""
        if math.isfinite(norm):
            usual, before = self._state.usual.get(stream.name, (ratio, norm))
            self._state.usual[stream.name] = (
                _KEEPS * usual + (1 - _KEEPS) * ratio,
                _KEEPS * before + (1 - _KEEPS) * norm,
            )

    def _can_be_judged(self, known: int) -> bool:
        share = self._state.losses.recent
        learnt = share is not None and share < LR_TOO_HIGH.at("loss")
        return known == self._last and self._state.taken > self._warm_up and not learnt

    def _alert(
        self, record: StepRecord, stream: Stream, key: str, size: float
    ) -> Alert:
        share = self._state.losses.recent
        least = LR_TOO_HIGH.at("late" if self._state.outside.late else "ratio")
        shown = (
            f"update_ratio {size:.2g} (alarm: median of {self._last} steps "
            f"{least} or more, two steps of "
            f"{LR_TOO_HIGH.at('jump'):g}, or one of {LR_TOO_HIGH.at('leap'):g})"
        )
        if share is not None:
            shown += f"; the loss is {share:.2f} times what it was at first"
        since, outside = self._state.running[stream.name].since, self._state.outside
        cause, why = "clip_order" if outside.late else "lr", None
        if outside.was_raised(since):
            cause, why = "schedule", outside.rise
        return text.alert(
            LR_TOO_HIGH,
            record,
            since=since,
            what=f"steps are too large for {stream.name}",
            shown=shown,
            cause=cause,
            why=why,
            evidence={key: (size, least)},
            stream=stream,
        )
