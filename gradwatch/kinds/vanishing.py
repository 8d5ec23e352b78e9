"""Gradients that do not reach the first steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.reach import Reached, cause_of
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Seen, add_travel
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import upper_median
from gradwatch.record import Alert, StepRecord, Stream, reinitialised

VANISHING = Kind(
    name="vanishing",
    title="gradwatch: vanishing gradients",
    severity="warning",
    meaning=(
        "No gradient reaches the first steps of the sequence, it has lasted longer "
        "than what opens by itself, and the task is not being learnt without them."
    ),
    evidence={
        "reach": Evidence(
            "`adjoint_log10`, the median of the last 5 probes, and the last one",
            -6.0,
            -4.5,
            "float32 sums lose what is below a millionth; who remembers stays above -2",
        ),
        "demand": Evidence(
            "`demand`, at most",
            0.5,
            None,
            "with a loss at half of the steps nobody can tell whether memory is wanted",
        ),
        "learnt": Evidence(
            "`signal`, at least",
            0.6,
            0.5,
            "nets that learn a near target fall below it, the others stay above .65",
        ),
        "loss": Evidence(
            "lowest loss over its start, where it is known, at least",
            0.9,
            0.5,
            "in runs that never learn a far target it stays above .98; down to .5 the "
            "loss has to go on falling, or the read-out alone has learnt",
        ),
        "chance": Evidence(
            "mean of 100 losses over `loss_constant`, where that is known, at least",
            0.97,
            None,
            "no better than a constant: nothing far is being learnt, nor anything near",
        ),
        "travel": Evidence(
            "cumulative update size, the sum of `update_ratio`, since the first "
            "probe, where the loss is known and `loss_constant` is not",
            1.0,
            None,
            "healthy nets that begin without reach open at .3 to .7",
        ),
        "travel_padded": Evidence(
            "the same, behind padding",
            0.5,
            None,
            "padding does not go away by itself; a blank input that is meant may open",
        ),
        "travel_alone": Evidence(
            "the same, where it is not",
            1.5,
            None,
            "nets that learn a near target pass 1.3 before their signal falls",
        ),
        "opening": Evidence(
            "decades by which the reach has grown since, at most",
            1.5,
            None,
            "nets that open rise by more than that first",
        ),
        "rising": Evidence(
            "beside it, with the loss known: decades in the last 10 probes, at most",
            0.5,
            None,
            "a reach that has grown and stays where it is opens nothing",
        ),
    },
    warm_up="100 steps since the first probe that showed it, or 3,000 whatever moved",
    confirmed=(
        "after 100 steps alone (300 where the loss is not known) where the cause does "
        "not go away by itself: saturation, a shut gate, a state cut off; after five "
        "probes where gradients had reached the first steps before; else by the "
        "cumulative update size"
    ),
    over="after 3 probes at -4.5 or above, or with `signal` below .5",
    excused="sequences of 5 steps or fewer; a task that is being learnt",
    causes={
        "truncation": Cause(
            "the state is detached between calls, in mid-sequence",
            "the state is detached: no gradient passes to an earlier call",
            "pass longer sequences; or no detach(), and one backward after all calls",
        ),
        "padding": Cause(
            "the input is all zeros in the last third of the steps or more",
            "the state is read after the padding, by which time the sequence has "
            "faded from it",
            "pack_padded_sequence(x, lengths, enforce_sorted=False), or read each "
            "sequence out at its last real step",
        ),
        "input_scale": Cause(
            "mean slope of the tanh below .35; the input's part of it is twice that of "
            "the state or more",
            "the inputs are so large that the tanh is saturated: slope below .35",
            "inputs = 0.1 * inputs  # or normalise them; then train from the start",
        ),
        "large_weights": Cause(
            "the same, and the state's part is twice that of the input or more",
            "the recurrent weights keep the tanh saturated: its slope is below .35",
            remedy="init.orthogonal_",
        ),
        "saturation": Cause(
            "the same, and neither is; or in a cell of your own half of the state is "
            "within .025 of 1 or -1",
            "the activations are saturated: their slope is below .35",
            "inputs = 0.1 * inputs  # or normalise them; then train from the start",
        ),
        "forget_gate": Cause(
            "f is below .05 in 90 % of units and steps",
            "the forget gate is shut: the cell keeps nothing",
            remedy="init.chrono_",
        ),
        "update_gate": Cause(
            "z is below .05 in 90 % of units and steps",
            "the update gate z is near 0: each step overwrites the state",
            remedy="init.chrono_",
        ),
        "drift": Cause(
            "rho has fallen by a tenth since the start",
            "rho, the spectral radius of W_hh, has fallen by a tenth or more",
            remedy="parametrize.orthogonal",
        ),
        "horizon_too_long": Cause(
            "a gated net; or more than 70 steps with rho above .5",
            "the sequence is longer than what the cell remembers",
            remedy="init.chrono_",
        ),
        "contraction": Cause(
            "a cell of your own whose state is not saturated",
            "each step of the cell shrinks the gradient of its state",
            "let the cell keep more of its state (forget bias 1, a residual path), "
            "or nn.init.orthogonal_(its recurrent weight); then train from the start",
        ),
        "small_radius": Cause(
            "none of these",
            "the recurrent weights shrink the gradient at every time step",
            remedy="init.orthogonal_",
        ),
    },
    numbers={
        "fallen": Number(
            0.1, "logarithm of rho's start over rho from which on it has fallen"
        ),
        "floor": Number(
            -45.0,
            "decades that stand for an adjoint of 0",
            "the least that float32 tells from it",
        ),
        "probes": Number(
            5, "probes that the median is taken over", "one or two are a batch"
        ),
        "trend": Number(
            10, "medians that tell whether it still rises", "fewer follow single probes"
        ),
        "clear_after": Number(
            3, "consecutive probes after which it is over", "one may be a batch"
        ),
        "shortest": Number(5, "steps of a sequence at most that is left alone"),
        "hold": Number(100, "steps that a cause which stays has to last"),
        "hold_alone": Number(
            300, "the same, where the loss is not known", "no loss tells of progress"
        ),
        "long": Number(
            3000,
            "steps after which a net will not open by itself, however little it has "
            "moved",
        ),
        "often": Number(10, "steps between probes while an incident is open, at first"),
        "often_for": Number(1000, "steps for which they are as frequent"),
        "seldom": Number(100, "steps between probes later", "as without an incident"),
        "saturated": Number(0.35, "mean slope of the tanh that is the cause"),
        "flat": Number(
            0.5, "share of the state of a cell of your own that is saturated, more than"
        ),
        "for_good": Number(0.2, "mean slope that does not go away by itself"),
        "shut": Number(
            0.9,
            "share of units and steps in which a gate is below .05, to be the cause",
        ),
        "padded": Number(
            0.3,
            "share of the steps, at the end, whose input is all zeros, to be the cause",
        ),
        "at_chance": Number(
            600,
            "steps at chance after which it is no slow start",
            "of 30 nets that never learn a lag of 60, 29 are told by then, of 68 slow "
            "starts 2; at 500, 29 and 4; at 250, 27 and 26",
        ),
        "stalled": Number(
            150,
            "steps without progress after which a loss has been learnt as far as it "
            "goes",
            "what the read-out alone can learn is learnt soon, and then no more",
        ),
        "few": Number(4, "sequences of a call below which its loss tells nothing"),
        "lasts": Number(0.5, "`rho` above which a long sequence is the cause"),
        "long_sequence": Number(
            70, "steps of a sequence that is long for a vanilla net, more than"
        ),
    },
    explained_by=(*text.BREAKS, *text.LOOP, "dead_units", "gate_stuck", "saturated"),
)

_LOW: Final = VANISHING.at("reach")
_HIGH: Final = VANISHING.clear("reach")
_FLOOR: Final = VANISHING.number("floor")
_PROBES: Final = VANISHING.count("probes")
_HOLD: Final = VANISHING.count("hold")
_CONSTANT: Final = run_key("loss_constant")
_LASTING: Final = ("forget_gate", "update_gate", "truncation")
_CONTEXT: Final = (
    "act_deriv",
    "rho",
    "rho_total_drift",
    "shut/f",
    "shut/z",
    "saturated",
)
_METRICS: Final = ("adjoint_log10", "demand", "signal", "horizon", "update_ratio")


class Vanishing(Remembering[Reached]):
    """No gradient reaches the first steps, for long, and nothing is learnt without.

    At the first probe that is a notice: many nets open by themselves. It is an alarm
    once it has lasted what such nets need, by a cause that stays, by steps at chance or
    by the cumulative update size; at once where the gradient had reached them.
    """

    kind = VANISHING.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wishes: str | None = None
        self._watched = [
            (s, {name: stream_key(s, name) for name in _METRICS}) for s in streams
        ]
        self._seen = Seen(streams, _CONTEXT)
        super().__init__(Reached(seen=self._seen.state))

    @property
    def active(self) -> bool:
        """Whether some stream's first steps are out of reach."""
        return bool(self._state.open)

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: no probe is among them."""
        self._state.losses.take_block(block)
        for stream, keys in self._watched:
            known = self._state.open.get(stream.name)
            ratios = block.column(keys["update_ratio"])
            if known is not None and ratios is not None:
                add_travel(known, zip(ratios, block.full, strict=True))
        self.wishes = self._asks(block.steps[-1])
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self._seen.take(record)
        self._state.losses.take(record)
        self._state.constant = record.metrics.get(_CONSTANT, self._state.constant)
        for name in reinitialised(record.events):
            state = self._state
            each = state.open, state.past, state.reached, state.learnt, state.doubts
            for own in each:
                own.pop(name, None)
        found: list[Alert] = []
        for stream, keys in self._watched:
            known = self._state.open.get(stream.name)
            if known is not None:
                ratio = record.metrics.get(keys["update_ratio"])
                add_travel(known, [(ratio, not record.partial)])
            reach = record.metrics.get(keys["adjoint_log10"])
            if reach is not None:
                self._state.probed = record.step
                found += self._probe(record, stream, keys, max(reach, _FLOOR))
        self.wishes = self._asks(record.step)
        return found

    def _asks(self, step: int) -> str | None:
        """Return the depth that an open incident, or one to be, asks for next."""
        if not self._state.open and not self._state.doubts:
            return None
        opened = [known["since"] for known in self._state.open.values()]
        since = min(opened, default=step)
        late = step - since >= VANISHING.count("often_for")
        every = VANISHING.count("seldom") if late else VANISHING.count("often")
        return "flow" if step + 1 - self._state.probed >= every else None

    def _probe(
        self, record: StepRecord, stream: Stream, keys: Mapping[str, str], reach: float
    ) -> list[Alert]:
        name, state = stream.name, self._state
        if self._cut(stream):
            reach = _FLOOR  # what is measured is the last piece alone
        past = state.past[name] = [*state.past.get(name, []), reach][-_PROBES:]
        signal = record.metrics.get(keys["signal"], 1.0)
        learnt = signal < VANISHING.clear("learnt")
        known = state.open.get(name)
        if known is not None:
            calm = reach >= _HIGH or learnt
            known["calm"] = known["calm"] + 1 if calm else 0
            if known["calm"] >= VANISHING.count("clear_after"):
                del state.open[name]
                state.learnt[name] = state.learnt.get(name, False) or learnt
                state.reached[name] = state.reached.get(name, False) or reach >= _HIGH
                return []
            return self._rise(record, stream, keys, known, past)
        if reach >= _HIGH:
            state.reached[name] = True
            state.learnt[name] = False
        learnt = learnt or state.learnt.get(name, False)
        state.doubts.pop(name, None)
        if reach > _LOW or learnt or not self._can_matter(record, stream, keys):
            return []
        if state.reached.get(name) and (len(past) < _PROBES or max(past) > _HIGH):
            state.doubts[name] = True
            return []
        known = state.open[name] = {
            "since": record.step,
            "first": reach,
            "middles": [],  # medians of the last probes
            "travel": 0.0,
            "calm": 0,
            "raised": False,
        }
        if state.reached.get(name):
            return self._rise(record, stream, keys, known, past)
        return [self._alert(record, stream, keys, alarm=False)]

    def _cut(self, stream: Stream) -> bool:
        """Tell whether earlier calls of the same step were cut off, and get nothing."""
        return bool(self._seen.module(stream).cut)

    def _can_matter(
        self, record: StepRecord, stream: Stream, keys: Mapping[str, str]
    ) -> bool:
        """Tell whether the loss can want the far past at all."""
        length, seen = self._length(stream), self._seen.module(stream).T or 0
        demand = record.metrics.get(keys["demand"])
        if demand is None or length <= VANISHING.count("shortest"):
            return False
        return bool(demand * seen < VANISHING.at("demand") * length)

    def _length(self, stream: Stream) -> int:
        facts = self._seen.module(stream)
        return (facts.T or 0) + (facts.cut or 0)

    def _rise(
        self,
        record: StepRecord,
        stream: Stream,
        keys: Mapping[str, str],
        known: dict[str, Any],
        past: Sequence[float],
    ) -> list[Alert]:
        """Return the alarm where a notice has lasted what opens by itself."""
        lasted = record.step - known["since"]
        middle = upper_median(past)
        low = max(middle, past[-1]) <= _LOW and len(past) >= _PROBES
        low = low and max(past) <= _HIGH
        if known["raised"] or not low or self._progress(record, stream, keys):
            return []
        moved = self._moved(stream, known, middle, lasted)
        known["middles"] = [*known["middles"], middle][-VANISHING.count("trend") :]
        waits = _HOLD if self._tells(stream) else VANISHING.count("hold_alone")
        stays = lasted >= waits and self._stays(stream)
        fell = bool(self._state.reached.get(stream.name))
        long = lasted >= VANISHING.count("long") or (lasted >= _HOLD and moved)
        if not (fell or stays or long):
            return []
        known["raised"] = True
        return [self._alert(record, stream, keys, alarm=True)]

    def _progress(
        self, record: StepRecord, stream: Stream, keys: Mapping[str, str]
    ) -> bool:
        """Tell whether the task is being learnt, by the signal or by the loss."""
        signal, losses = record.metrics.get(keys["signal"], 1.0), self._state.losses
        if self._cut(stream):  # what the last piece holds is learnt all the same
            return signal < VANISHING.clear("learnt")
        told = losses.lowest is not None and losses.lowest < VANISHING.at("loss")
        told = told and not self._at_chance()
        if told and losses.share is not None:
            told = losses.share <= VANISHING.clear("loss")
            # What the read-out alone can learn is learnt soon, and then no more.
            stalled = VANISHING.count("stalled")
            told = told or record.step - losses.improved < stalled
        return told or signal < VANISHING.at("learnt")

    def _at_chance(self) -> bool:
        """Tell whether the loss is known to be that of a constant."""
        least = VANISHING.at("chance") * self._state.constant
        return 0 < least <= self._state.losses.mean

    def _tells(self, stream: Stream) -> bool:
        """Tell whether the loss is known, of enough sequences to tell of progress."""
        many = (self._seen.module(stream).B or 0) >= VANISHING.count("few")
        return many and self._state.losses.share is not None

    def _moved(
        self, stream: Stream, known: Mapping[str, Any], middle: float, lasted: int
    ) -> bool:
        """Tell whether it has been given what nets that open need."""
        level = "travel" if self._tells(stream) else "travel_alone"
        if level == "travel" and self._cause(stream) == "padding":
            level = "travel_padded"
        elif level == "travel" and self._state.constant:
            return self._at_chance() and lasted >= VANISHING.number("at_chance")
        opens = middle > known["first"] + VANISHING.at("opening")
        if level != "travel_alone":  # and it goes on
            before = [*known["middles"], known["first"]][0]
            opens = opens and middle > before + VANISHING.at("rising")
        return bool(known["travel"] >= VANISHING.at(level)) and not opens

    def _stays(self, stream: Stream) -> bool:
        """Tell whether the cause is one that does not go away by itself."""
        if self._cause(stream) in _LASTING:
            return True
        slope = self._seen.of(stream).get("act_deriv", 1.0)
        return stream.kind != "RNN_RELU" and slope < VANISHING.number("for_good")

    def _alert(
        self,
        record: StepRecord,
        stream: Stream,
        keys: Mapping[str, str],
        *,
        alarm: bool,
    ) -> Alert:
        known = self._state.open[stream.name]
        reach = record.metrics[keys["adjoint_log10"]]
        horizon = record.metrics.get(keys["horizon"])
        length, cut = self._length(stream), self._seen.module(stream).cut or 0
        cause = self._cause(stream)
        shown = (
            f"the gradient at the first time step is {text.times_largest(reach)} the "
            f"largest one (reported at 10^{_LOW:.0f} or below)"
        )
        if cut:
            reach = -float("inf")
            shown = f"the first {cut} of {length} time steps are cut off from the loss"
        signal = record.metrics.get(keys["signal"], 1.0)
        if f"{signal:.2f}" != "1.00":
            shown += f"; the output gradient is {signal:.2f} times what it was at first"
        if known["travel"]:
            size = f"{known['travel']:.2g}"
            shown += f"; cumulative update size {size} of the weights' norm"
        if (share := self._state.losses.share) is not None:
            shown += f"; the loss is {share:.2f} times what it was at first"
        far = f"{horizon:.0f}" if horizon is not None else "only a few"
        why = VANISHING.causes[cause].why
        return text.alert(
            VANISHING,
            record,
            severity="warning" if alarm else "info",
            since=known["since"],
            what=f"gradients of {stream.name} reach {far} of {length} time steps back",
            shown=shown,
            cause=cause,
            evidence={keys["adjoint_log10"]: (reach, _LOW)},
            stream=stream,
            remedy=VANISHING.remedy(cause, stream, length),
            why=f"{why}; this matters only if the task needs the early time steps",
        )

    def _cause(self, stream: Stream) -> str:
        return cause_of(VANISHING, self._seen, stream, self._length(stream))
