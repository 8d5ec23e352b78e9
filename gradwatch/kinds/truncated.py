"""States that are cut off from an earlier call: a notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Kind
from gradwatch.kinds.remembering import Remembering
from gradwatch.record import Alert, StepRecord, Stream

TRUNCATED = Kind(
    name="truncated",
    title="gradwatch: backpropagation is truncated",
    severity="info",
    meaning=(
        "The first states of a call are those that an earlier call returned, and no "
        "gradient passes: truncated backpropagation through time."
    ),
    evidence={},
    warm_up="none",
    confirmed="at once: by where the states lie in memory",
    over="at once; it is reported once a stream",
    causes={
        "truncation": Cause(
            "by structure",
            "truncated backpropagation through time: nothing farther back than "
            "{length} steps is learnt from; no fault by itself",
            "if more is needed, pass a longer piece of the sequence to each call",
        )
    },
)


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        said: Streams that it was reported of.
    """

    said: list[str] = field(default_factory=list)


class Truncated(Remembering[_State]):
    """The first states are those of an earlier call, and no gradient passes: a notice.

    Known by structure: they lie where an earlier call returned them, are not 0, and
    have no graph. Said once a stream.
    """

    kind = TRUNCATED.name
    active = False

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._streams = tuple(streams)
        super().__init__(_State())

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: what is judged here stands in none of them."""
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        found = []
        modules = record.facts.modules
        for stream in self._streams if modules else ():
            facts = modules.get(stream.module)
            if facts is None or not facts.state_detached:
                continue
            if stream.name not in self._state.said:
                self._state.said.append(stream.name)
                found.append(self._alert(record, stream, facts.T or 0))
        return found

    def _alert(self, record: StepRecord, stream: Stream, length: int) -> Alert:
        return text.alert(
            TRUNCATED,
            record,
            since=record.step,
            what=f"the state of {stream.name} is detached every {length} steps",
            shown="each call starts from an earlier one's state, without its graph",
            cause="truncation",
            evidence={},
            stream=stream,
            why=TRUNCATED.causes["truncation"].why.format(length=length),
        )
