"""ReLU units that never fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gradwatch import remedies
from gradwatch.block import Block
from gradwatch.facts import ModuleFacts
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.latch import Hysteresis, Levels
from gradwatch.kinds.remembering import Remembering
from gradwatch.metrics import stream_key
from gradwatch.record import Alert, StepRecord, Stream, reinitialised

DEAD_UNITS = Kind(
    name="dead_units",
    title="gradwatch: dead ReLU units",
    severity="warning",
    meaning=(
        "Half or more of a ReLU layer's units are 0 at every step of every sequence "
        "looked at: they pass no gradient and cannot come back."
    ),
    evidence={
        "dead": Evidence(
            "`dead`, at two consecutive measurements",
            0.5,
            0.3,
            "largest share in healthy runs: .21",
        )
    },
    warm_up="40 states (steps times sequences): of fewer, half are 0 by chance",
    confirmed="by two consecutive measurements; the second is asked for at once",
    over="after 3 measurements at .3 or below",
    causes={
        "dead_relu": Cause(
            "by measurement",
            "a ReLU that is 0 everywhere passes no gradient and cannot come back: "
            "a step that was too large, or biases that hold it down",
            remedy="init.orthogonal_",
        )
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
        "states": Number(
            40,
            "states (steps times sequences) to be judged, at least",
            "of fewer, half are 0 by chance",
        ),
        "replayed": Number(
            4,
            "sequences that stand for the batch below the uppermost layer",
            "as many are replayed",
        ),
    },
    explained_by=text.BREAKS,
)


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        levels: Of every stream.
        modules: Path of a module -> its facts.
    """

    levels: Levels = field(default_factory=Levels)
    modules: dict[str, ModuleFacts] = field(default_factory=dict)


class DeadUnits(Remembering[_State]):
    """Half of the ReLU units are 0 at every step of every sequence looked at.

    Raised at .5, at two consecutive measurements (the second is asked for at once),
    cleared at .3. In healthy runs the largest share was .21.
    """

    kind = DEAD_UNITS.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self.wants: str | None = None
        self._watched = [
            (stream, stream_key(stream, "dead"))
            for stream in streams
            if stream.kind == "RNN_RELU"
        ]
        self._top = {s.module: s.layer for s in sorted(streams, key=lambda s: s.layer)}
        self._levels = Hysteresis.of(DEAD_UNITS, "dead")
        super().__init__(_State(levels=self._levels.state))

    @property
    def active(self) -> bool:
        """Whether a stream is still below its clear value."""
        return self._levels.active

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: what is judged here stands in none of them."""
        self.wants = None
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        self.wants, found = None, []
        self._state.modules.update(record.facts.modules)
        for name in reinitialised(record.events):
            self._levels.forget(name)
        for stream, key in self._watched:
            share = record.metrics.get(key)
            if share is None or not self._enough(stream):
                continue
            change = self._levels.update(stream.name, record.step, share)
            if change == "suspected":
                self.wants = "state"
            elif change == "raised":
                found.append(self._alert(record, stream, share))
        return found

    def _enough(self, stream: Stream) -> bool:
        """Tell whether enough states were seen: of few, half are 0 by chance."""
        facts = self._state.modules.get(stream.module, ModuleFacts())
        length, batch = facts.T or 0, facts.B or 0
        if stream.layer < self._top[stream.module]:
            batch = min(batch, DEAD_UNITS.count("replayed"))
        return bool(length * batch >= DEAD_UNITS.number("states"))

    def _alert(self, record: StepRecord, stream: Stream, share: float) -> Alert:
        since = self._levels.since(stream.name)
        active = record.metrics.get(stream_key(stream, "act_deriv"))
        shown = f"dead {share:.2f} in {stream.name} (alarm at {self._levels.raise_at})"
        if active is not None:
            shown += f"; share of active units at a step {active:.2f}"
        remedy, do = DEAD_UNITS.remedy("dead_relu", stream), None
        if since and remedy is not None:  # they fired before: the step was too large
            lower = text.filled(text.LOWER_RATE + text.BEFORE, since=since)
            do = f"{lower}; without one: {remedies.line(remedy)}"
        return text.alert(
            DEAD_UNITS,
            record,
            since=since,
            what=f"{text.percent(share)} of the units of {stream.name} never fire",
            shown=shown,
            cause="dead_relu",
            evidence={stream_key(stream, "dead"): (share, self._levels.raise_at)},
            stream=stream,
            remedy=remedy,
            do=do,
        )
