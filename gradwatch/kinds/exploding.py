"""Exploding gradients: the kind, and its rule of the total norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch import remedies, saved
from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Seen, SeenState
from gradwatch.kinds.text import BEFORE, HIDDEN, LOWER_RATE
from gradwatch.metrics import run_key, stream_key
from gradwatch.numerics.streaming import Window, largest_median, median, push
from gradwatch.record import CELL, Alert, Remedy, StepRecord, Stream, reinitialised

EXPLODING = Kind(
    name="exploding",
    title="gradwatch: exploding gradients",
    severity="error",
    meaning=(
        "A gradient grows on its way back through the sequence, or the norm of all "
        "gradients stays far above what was usual."
    ),
    evidence={
        "growth": Evidence(
            "`growth_log10`, at 3 consecutive probes",
            2.7,
            1.7,
            "healthy chrono LSTMs reach 3.0 at one probe as they learn, never at "
            "three; sick ones 4.7 and more",
        ),
        "growth_at_once": Evidence(
            "`growth_log10`, once", 4.0, 1.7, "no healthy run came near it"
        ),
        "norm": Evidence(
            "`grad_norm` over its running median, at 3 consecutive steps",
            1e4,
            10.0,
            "healthy orthogonal ReLU nets reached 263",
        ),
        "lasting": Evidence(
            "the same, at 25 consecutive steps",
            100.0,
            10.0,
            "healthy bursts of more than 100 are over within 25 steps",
        ),
        "peak": Evidence(
            "these norms over the largest median so far, beside either",
            10.0,
            None,
            "a net that had learnt and moves again only returns to its early norms",
        ),
        "rising": Evidence(
            "`growth_log10` that rises, with rho: an early notice",
            1.2,
            1.0,
            "a line through the last 8 values crosses the threshold within 50 steps",
        ),
    },
    warm_up="12 norms for what is compared with their median; none for growth",
    confirmed=(
        "by the third probe, of which two are asked for at once, or by the steps that "
        "stand with each number"
    ),
    over="after 3 probes, or 3 norms, at the clear value or below",
    causes={
        "large_recurrent_weights": Cause(
            "a gated net",
            "the recurrent weights are too large for the gates to hold back; " + HIDDEN,
            remedy="init.orthogonal_",
        ),
        "drift": Cause(
            "rho has grown by a tenth since the start",
            "rho has grown by a tenth or more since the start; " + HIDDEN,
            remedy="parametrize.orthogonal",
        ),
        "expansion": Cause(
            "a cell of your own",
            "steps of the cell enlarge the gradient of its state; " + HIDDEN,
            "nn.init.orthogonal_ for the cell's recurrent weight, or a bounded state; "
            "then train from the start",
        ),
        "nonnormal": Cause(
            "rho is below 1, in a ReLU net three quarters of the units are on",
            "rho is below 1, but powers of W_hh grow before they shrink",
            remedy="init.orthogonal_",
        ),
        "active_subnetwork": Cause(
            "a ReLU net with rho below 1 of which fewer units are on",
            "rho of the whole matrix is below 1, but that of its active units is not",
            remedy="init.orthogonal_",
        ),
        "large_radius": Cause(
            "a ReLU net with rho at 1 or above",
            "rho is 1 or above, and a ReLU does not hold it back",
            remedy="init.orthogonal_",
        ),
        "chaos": Cause(
            "a tanh net with rho at 1 or above",
            "rho is 1 or above and the activation does not damp it: the net is chaotic",
            remedy="init.orthogonal_",
        ),
        None: Cause(
            "the norm exploded, and nothing was seen to grow through time",
            "undecided: a changed input or growing weights; rho of the recurrent "
            "weights had not grown by a tenth when last measured",
        ),
    },
    numbers={
        "calm": Number(
            3,
            "consecutive probes at the clear value or below after which a growth is "
            "over",
            "one or two may be chance",
        ),
        "grown": Number(
            0.1, "logarithm of rho over its start from which on it has grown"
        ),
        "on": Number(
            0.75,
            "share of active ReLU units from which on what they leave out decides "
            "nothing",
        ),
        "warm_up": Number(
            12,
            "finite norms before anything is compared with their median",
            "a median of fewer follows single batches",
        ),
        "window": Number(
            25,
            "usual norms that the median is taken over",
            "healthy bursts are over within as many",
        ),
        "running": Number(
            3,
            "consecutive steps far above the median; and back, after which it is over",
            "one or two are a batch, which is a spike",
        ),
        "lasting_for": Number(
            25,
            "consecutive steps of the lasting kind",
            "healthy bursts are over by then",
        ),
        "before_nonfinite": Number(
            10000.0,
            "times the median right before a NaN or Inf that is an explosion's",
            "as far as a norm that counts by itself",
        ),
        "leap": Number(
            10.0,
            "times the usual update that the last one before it was, which is then "
            "the cause",
        ),
        "looks": Number(
            (1, 2, 4, 8, 12, 16, 20, 24),
            "steps of a high norm at which the probe groups are asked for",
            "early while it rises, then while it stays",
        ),
        "clip_at": Number(
            5,
            "times the usual norm that the remedy clips at",
            "what is usual passes unclipped",
        ),
        "confirm": Number(3, "consecutive probes of growth", "a burst is over by then"),
        "often": Number(
            10, "steps between probes while an incident is open, or growth rises"
        ),
        "again": Number(
            (0, 1, 2),
            "steps to the next probe after none, one and two that counted",
            "a burst is over by then",
        ),
        "slope_over": Number(
            8,
            "probes that a slope of growth is taken over",
            "fewer follow single probes",
        ),
        "lost": Number(
            300,
            "steps without a measurement after which a stream is forgotten",
            "frozen or unused since: nobody can tell",
        ),
        "soon": Number(
            50,
            "steps within which a rising growth has to cross the threshold to be a "
            "notice",
        ),
    },
    rank=2,
    explained_by=("lr_too_high",),
)

_WARM_UP: Final = EXPLODING.count("warm_up")
_WINDOW: Final = EXPLODING.count("window")
_LOOKS: Final = EXPLODING.counts("looks")
CONTEXT: Final = ("rho", "rho_total_drift", "act_deriv", "growth_log10")
"""Metrics that decide it."""

GROWN: Final = EXPLODING.number("grown")
_ON: Final = EXPLODING.number("on")
_GROWS: Final = EXPLODING.clear("growth")

_NORM = run_key("grad_norm")


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        active: Whether the incident is open.
        seen: What was last seen of every stream.
        norms: The last usual norms.
        peak: Their largest median.
        since: When the norm rose.
        lasts: Consecutive steps since.
        high: Ratios to the median, while it stays above.
        updates: Largest update ratios of usual steps.
        calm: Consecutive usual steps.
        carriers: The parameters that carry the norm.
    """

    active: bool = False
    seen: SeenState = field(default_factory=SeenState)
    norms: Window = ()
    peak: float = 0.0
    since: int = 0
    lasts: int = 0
    high: list[float] = field(default_factory=list)
    updates: Window = ()
    calm: int = 0
    carriers: dict[str, float] = field(default_factory=dict)


class Exploding(Remembering[_State]):
    """The total norm far above its own running median, and staying there.

    Compared with the running median of the last 25 usual norms; see the catalogue. A
    net that explodes from step 0 is its own median and is not seen here.
    """

    kind = EXPLODING.name
    factor: Final = EXPLODING.at("norm")
    running: Final = EXPLODING.count("running")
    lasting_factor: Final = EXPLODING.at("lasting")
    lasting: Final = EXPLODING.count("lasting_for")
    above_peak: Final = EXPLODING.at("peak")
    clear: Final = EXPLODING.clear("norm")
    leap: Final = EXPLODING.number("leap")
    before_nonfinite: Final = EXPLODING.number("before_nonfinite")

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: tuple[str, ...] = ()
        self._streams = tuple(streams)
        self._keys = [stream_key(s, "update_ratio") for s in streams]
        self._seen = Seen(streams, CONTEXT)
        super().__init__(_State(seen=self._seen.state))

    @property
    def active(self) -> bool:
        """Whether it still holds."""
        return self._state.active

    def update_block(self, block: Block) -> bool:
        """Take in plain rows whose norms are all usual."""
        state, norms = self._state, block.whole(_NORM)
        ratios = block.largest(self._keys) if self._keys else None
        if norms is None or ratios is None or state.active or state.high:
            return False
        window, peak = state.norms, state.peak
        known = (*window, *norms)
        least = min(known)
        if len(window) < _WARM_UP or least <= 0:
            return False
        highest = largest_median(known, _WINDOW) if len(window) == _WINDOW else math.inf
        if max(norms) < self.clear * least and highest <= peak:
            window = known[-_WINDOW:]
        else:
            for norm in norms:
                usual = median(window)
                if norm >= self.clear * usual:
                    return False
                peak, window = max(peak, usual), push(window, norm, _WINDOW)
        state.norms, state.peak = window, peak
        state.updates = (*state.updates, *ratios)[-_WINDOW:]
        state.calm += len(norms)
        self.wants = ()
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        if reinitialised(record.events):  # norms of other weights are no measure
            saved.reset(self._state, keep=("seen",))
        self.wants = ()
        self._seen.take(record)
        norm = record.metrics.get(_NORM)
        if norm is None:
            return []
        usual = median(self._state.norms)
        warm = len(self._state.norms) >= _WARM_UP and usual > 0
        if not math.isfinite(norm):
            burst = (
                bool(self._state.high) and self._state.high[-1] >= self.before_nonfinite
            )
            self._state.high = []
            if burst and not self._state.active and "skipped_step" not in record.events:
                return [self._alert(record, norm, usual)]
            return []
        ratio = norm / usual if warm else 0.0
        if ratio < self.clear:
            self._take_usual(record, norm, usual)
            return []
        self._state.calm = 0
        if record.facts.step.carriers is not None:
            self._state.carriers = dict(record.facts.step.carriers)
        if not self._state.high:
            self._state.since, self._state.lasts = record.step, 0
        self._state.lasts += 1
        if not self._state.active and self._state.lasts in _LOOKS:
            self.wants = ("spectrum", "flow")
        self._state.high = [*self._state.high, ratio][-self.lasting :]
        if self._state.active or not self._decided(usual):
            return []
        return [self._alert(record, norm, usual)]

    def _decided(self, usual: float) -> bool:
        high = self._state.high
        last = high[-self.running :]
        far = len(last) == self.running and min(last) >= self.factor
        long = len(high) >= self.lasting and min(high) >= self.lasting_factor
        # One norm of these above all that was usual is a batch's, not the net's.
        least = min(last) if far else median(tuple(high))
        return (far or long) and least * usual >= self.above_peak * self._state.peak

    def _take_usual(self, record: StepRecord, norm: float, usual: float) -> None:
        """Take a usual norm into the median; count the steps back to calm."""
        if not record.partial:
            ratios = [record.metrics.get(key, 0.0) for key in self._keys]
            largest = max(ratios, default=0.0)
            self._state.updates = push(self._state.updates, largest, _WINDOW)
        self._state.norms = push(self._state.norms, norm, _WINDOW)
        if usual > self._state.peak and len(self._state.norms) > _WARM_UP:
            self._state.peak = usual
        self._state.high = []
        self._state.calm += 1
        if self._state.calm >= self.running:
            self._state.active = False

    def _alert(self, record: StepRecord, norm: float, usual: float) -> Alert:
        self._state.active = True
        since = self._state.since
        shown = (
            f"total norm {norm:.3g}, {norm / usual:.3g} times its median {usual:.3g}"
        )
        if not math.isfinite(norm):
            shown = (
                f"total norm {norm}, right after a burst; its median was {usual:.3g}"
            )
        if self._state.carriers:
            parts = (
                f"{text.percent(v)} {name}" for name, v in self._state.carriers.items()
            )
            shown += f"; carried by {', '.join(parts)}"
        stream, cause, why, do, remedy = self._judgement(usual)
        evidence: dict[str, tuple[float, float | None]] = {
            _NORM: (norm, self.factor * usual)
        }
        if cause is not None and stream is not None:
            grown = self._seen.of(stream).get("growth_log10", 0.0)
            evidence[stream_key(stream, "growth_log10")] = (grown, None)
            shown += f"; growth_log10 {grown:.1f} in {stream.name}"
        return text.alert(
            EXPLODING,
            record,
            since=since,
            what=f"the gradient norm has exploded since step {since}",
            shown=shown,
            cause=cause,
            evidence=evidence,
            stream=stream,
            remedy=remedy,
            why=why,
            do=do,
        )

    def _judgement(
        self, usual: float
    ) -> tuple[Stream | None, str | None, str | None, str | None, Remedy | None]:
        """Return the stream, the cause, why and do where they are not its, a remedy."""
        heavy = max(
            self._state.carriers, key=self._state.carriers.__getitem__, default=""
        )
        bearer = next((s for s in self._streams if _belongs(heavy, s)), None)
        *before, last = self._state.updates or (0.0,)
        common = median(tuple(before))
        if common > 0 and last >= self.leap * common:
            why = (
                f"the last update before it moved the recurrent weights {last:.2g} of "
                f"their norm, {last / common:.3g} times as far as usual: the learning "
                "rate is too high"
            )
            return (
                bearer,
                None,
                why,
                text.filled(LOWER_RATE + BEFORE, since=self._state.since),
                None,
            )
        grows = self._grows()
        if grows is None:
            return (
                bearer,
                None,
                None,
                None,
                remedies.clipping(EXPLODING.number("clip_at") * usual),
            )
        seen = self._seen.of(grows)
        cause = growth_cause(grows, seen)
        remedy = EXPLODING.remedy(cause, grows)
        if cause != "drift":
            return grows, cause, None, None, remedy
        now, moved = seen.get("rho", math.nan), seen["rho_total_drift"]
        why = (
            f"rho of {grows.name} was {now / math.exp(moved):.3g} at first and is "
            f"{now:.3g}; {HIDDEN}"
        )
        return grows, cause, why, None, remedy

    def _grows(self) -> Stream | None:
        """Return the stream through which gradients grow most, or whose rho has."""
        seen = {s: self._seen.of(s) for s in self._streams}
        growth = {s: v.get("growth_log10", 0.0) for s, v in seen.items()}
        drift = {
            s: v.get("rho_total_drift", 0.0) for s, v in seen.items() if not s.gates
        }
        for values, least in ((growth, _GROWS), (drift, GROWN)):
            most = max(values, key=values.__getitem__, default=None)
            if most is not None and values[most] >= least:
                return most
        return None


def _belongs(parameter: str, stream: Stream) -> bool:
    """Tell whether a parameter, by its name, is one of a stream's weights."""
    path, _, last = parameter.rpartition(".")
    own = stream.name.removeprefix(stream.module)[1:]
    within = path == stream.module or path.startswith(f"{stream.module}.") or not path
    return within and (f"_{own}" in f"{last}." or own in path if own else True)


def growth_cause(stream: Stream, seen: Mapping[str, float]) -> str:
    """Return the first cause that the evidence names.

    Args:
        stream: The stream that shows growth.
        seen: Metric -> its last value; of :data:`CONTEXT`, as far as it was measured.
    """
    if stream.kind == CELL:
        return "expansion"
    if stream.gates:
        return "large_recurrent_weights"
    if seen.get("rho_total_drift", 0.0) > GROWN:
        return "drift"
    relu = stream.kind == "RNN_RELU"
    if seen.get("rho", 1.0) < 1:
        partly = relu and seen.get("act_deriv", 1.0) < _ON
        return "active_subnetwork" if partly else "nonnormal"
    return "large_radius" if relu else "chaos"
