"""Gates that let nothing in, nothing out, or nothing change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.latch import Hysteresis, Levels
from gradwatch.kinds.remembering import Remembering
from gradwatch.metrics import stream_key
from gradwatch.record import Alert, StepRecord, Stream, reinitialised

_ZERO_BIASES = (
    "for b in ({biases}): torch.nn.init.zeros_(b)  # from a checkpoint before step "
    "{since}"
)

GATE_STUCK = Kind(
    name="gate_stuck",
    title="gradwatch: a gate is stuck",
    severity="warning",
    meaning="A gate is on one side in nearly all units and steps.",
    evidence={
        "share": Evidence(
            "`shut/i` or `shut/o` (LSTM), `open/z` (GRU), at two consecutive "
            "measurements",
            0.95,
            0.85,
            "chrono gates, which are set so on purpose, reach .60 when left alone",
        ),
        "meant": Evidence(
            "`timescale` over the length of the sequence, at most: meant",
            20.0,
            None,
            "chrono initialisation spreads memories up to the length itself",
        ),
    },
    warm_up="none",
    confirmed="by two consecutive measurements; the second is asked for at once",
    over="after 3 measurements at .85 or below",
    excused=(
        "an update gate that keeps for up to 20 lengths, an input gate beside a "
        "forget gate that does: memory that was set on purpose"
    ),
    causes={
        "input_gate": Cause(
            "`shut/i`: i is below .05",
            "the cell takes in nothing new: the input gate's bias or input weights "
            "hold it shut",
            remedy="init.chrono_",
        ),
        "output_gate": Cause(
            "`shut/o`: o is below .05",
            "the output of the cell is shut off, so that no gradient gets in: the "
            "output gate's bias or input weights hold it shut",
            _ZERO_BIASES,
            remedy="init.zero_bias_",
        ),
        "update_gate": Cause(
            "`open/z`: z is above .95",
            "z near 1 keeps the old state, which hardly changes whatever the input is",
            remedy="init.chrono_",
        ),
    },
    numbers={
        "confirm": Number(
            2,
            "consecutive measurements that confirm it; the second is asked for at once",
            "one may be a batch",
        ),
        "calm": Number(
            3,
            "consecutive measurements at the clear value or below after which it is "
            "over",
            "one or two may be chance",
        ),
        "held": Number(
            0.5,
            "`open/f` of the forget gate beside which a shut input gate is meant, at "
            "least",
            "the cell then keeps more than it renews",
        ),
    },
    explained_by=text.BREAKS,
)

_GATES: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = {
    "LSTM": {"i": ("shut", "input_gate"), "o": ("shut", "output_gate")},
    "GRU": {"z": ("open", "update_gate")},
}
"""Of each kind of net: gate -> the metric that shows it stuck, and the cause."""

_SIDES: Final[Mapping[str, str]] = {
    "input_gate": "i is below .05",
    "output_gate": "o is below .05",
    "update_gate": "z is above .95",
}


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        levels: Of every stream.
        lengths: Path of a module -> time steps of its calls.
    """

    levels: Levels = field(default_factory=Levels)
    lengths: dict[str, int] = field(default_factory=dict)


class GateStuck(Remembering[_State]):
    """A gate that lets nothing in, nothing out, or nothing change, nearly everywhere.

    The input or output gate of an LSTM below .05, or the update gate of a GRU above
    .95, in 95 % of all units and steps, at two consecutive measurements (the second is
    asked for at once); cleared at 85 %. Gates that were set to remember are excused:
    an update gate that keeps for up to 20 lengths of the sequence, and an input gate
    beside a forget gate that does.
    """

    kind = GATE_STUCK.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [
            (stream, gate, stream_key(stream, metric, gate), cause)
            for stream in streams
            for gate, (metric, cause) in _GATES.get(stream.kind, {}).items()
        ]
        self._levels = Hysteresis.of(GATE_STUCK, "share")
        super().__init__(_State(levels=self._levels.state))

    @property
    def active(self) -> bool:
        """Whether a gate is still above its clear value."""
        return self._levels.active

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: what is judged here stands in none of them."""
        self.wants = None
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        for name, facts in record.facts.modules.items():
            if facts.T is not None:
                self._state.lengths[name] = facts.T
        remade = reinitialised(record.events)
        for stream, gate, key, cause in self._watched:
            if stream.name in remade:
                self._levels.forget(key)
            share = record.metrics.get(key)
            if share is None:
                continue
            if self._meant(record, stream, cause):
                share = 0.0
            change = self._levels.update(key, record.step, share)
            if change == "suspected":
                self.wants = "state"
            elif change == "raised":
                found.append(self._alert(record, stream, gate, key, cause))
        return found

    def _meant(self, record: StepRecord, stream: Stream, cause: str) -> bool:
        """Tell whether a gate is what a long memory looks like, as chrono sets it."""
        steps = record.metrics.get(stream_key(stream, "timescale"), 0.0)
        length = self._state.lengths.get(stream.module, 0)
        lasting = steps <= GATE_STUCK.at("meant") * length
        if cause == "input_gate":
            held = record.metrics.get(stream_key(stream, "open", "f"), 0.0)
            return lasting and held >= GATE_STUCK.number("held")
        return lasting and cause == "update_gate"

    def _alert(
        self, record: StepRecord, stream: Stream, gate: str, key: str, cause: str
    ) -> Alert:
        share, since = record.metrics[key], self._levels.since(key)
        length = self._state.lengths.get(stream.module, 0)
        return text.alert(
            GATE_STUCK,
            record,
            since=since,
            what=f"gate {gate} of {stream.name} is stuck",
            shown=(
                f"{_SIDES[cause]} in {text.percent(share)} of units and steps "
                f"(alarm at {text.percent(self._levels.raise_at)} or above)"
            ),
            cause=cause,
            evidence={key: (share, self._levels.raise_at)},
            stream=stream,
            remedy=GATE_STUCK.remedy(cause, stream, length),
        )
