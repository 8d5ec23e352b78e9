"""Activations that are saturated, so that hardly any gradient passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Losses, Outside, Seen, SeenState
from gradwatch.kinds.text import BEFORE, CLIP_FIRST, CLIPPED_LATE, LOWER_RATE
from gradwatch.metrics import run_key, stream_key
from gradwatch.record import Alert, StepRecord, Stream, reinitialised

_NORMALISE: Final = (
    "inputs = (inputs - inputs.mean((0, 1))) / inputs.std((0, 1))  # each feature of "
    "(T, B, features); then train from the start"
)

SATURATED = Kind(
    name="saturated",
    title="gradwatch: activations are saturated",
    severity="warning",
    meaning="Nearly all activations are saturated, and nothing is learnt.",
    evidence={
        "share": Evidence(
            "`saturated`, of the tanh",
            0.9,
            0.8,
            "nets that learn stay below .5, or have learnt by then",
        ),
        "gates": Evidence(
            "beside it in gated nets: `open` and `shut` together, mean of the gates",
            0.75,
            None,
            "gates that still move learn to",
        ),
        "without": Evidence(
            "the same, where `grad_norm_hh` is exactly 0",
            0.7,
            None,
            "the first steps of a sequence begin at 0, and are not saturated yet",
        ),
        "steps": Evidence(
            "steps for which all looks have said so",
            50,
            None,
            "what a large first step has done may come back",
        ),
        "loss": Evidence(
            "lowest loss over its start, where it is known, at least",
            0.9,
            None,
            "who learns so is left alone",
        ),
    },
    warm_up="none",
    confirmed="by the number of steps, at 3 looks or more",
    over="with the first look at .8 or below",
    excused=(
        "ReLU nets; a loss that has fallen by a tenth, and is below `loss_constant` "
        "where that is known"
    ),
    causes={
        "clip_order": Cause(
            "it was below .5 at a look before, and `written_late`",
            CLIPPED_LATE,
            CLIP_FIRST,
        ),
        "rate": Cause(
            "it was below .5 at a look before, and no clip comes late",
            "the units were not saturated at first: steps too large have driven them "
            "there",
            LOWER_RATE + BEFORE,
        ),
        "inputs": Cause(
            "it was so at the first look; the input's part of what drives the units is "
            "twice that of the state or more",
            "the inputs are so large that the units are at their ends",
            _NORMALISE,
        ),
        "weights": Cause(
            "likewise, and the state's part is twice that of the input or more",
            "the recurrent weights are so large that the units are at their ends",
            remedy="init.orthogonal_",
        ),
        None: Cause(
            "likewise, and neither is",
            "inputs and states together are so large that the units are at their ends",
            _NORMALISE,
        ),
    },
    numbers={
        "looks": Number(3, "looks at least", "one or two may be a batch"),
        "free": Number(0.5, "share at a look before which it was not so"),
    },
    explained_by=(*text.BREAKS, "loss_divergence", "gate_stuck", "not_cleared"),
)

_ENDS: Final = ("shut", "open")
_CONSTANT: Final = run_key("loss_constant")
_GATES: Final[Mapping[str, Sequence[str]]] = {"LSTM": "ifo", "GRU": "rz"}


@dataclass(slots=True)
class _Look:
    """What is remembered of a stream.

    Attributes:
        since: Since when it is saturated; -1 while it is not.
        looks: How many looks have said so.
        free: Whether it was far from it at a look before.
        raised: Whether that was said.
    """

    since: int = -1
    looks: int = 0
    free: bool = False
    raised: bool = False


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        seen: What was last seen of every stream.
        losses: The losses so far.
        constant: What a constant output would have for a loss; 0 if unknown.
        outside: What was done beside the steps.
        streams: What is remembered of each.
    """

    seen: SeenState = field(default_factory=SeenState)
    losses: Losses = field(default_factory=Losses)
    constant: float = 0.0
    outside: Outside = field(default_factory=Outside)
    streams: dict[str, _Look] = field(default_factory=dict)


class Saturated(Remembering[_State]):
    """The share of activations at their ends, at each look, while nothing is learnt."""

    kind = SATURATED.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._watched = [(s, _keys(s)) for s in streams if s.kind != "RNN_RELU"]
        self._seen = Seen(streams, ())
        super().__init__(_State(seen=self._seen.state))

    @property
    def active(self) -> bool:
        """Whether some stream still is."""
        return any(look.raised for look in self._state.streams.values())

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: no look is among them."""
        self._state.losses.take_block(block)
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        state = self._state
        self._seen.take(record)
        state.losses.take(record)
        state.constant = record.metrics.get(_CONSTANT, state.constant)
        state.outside.take(record)
        for name in reinitialised(record.events):
            state.streams.pop(name, None)
        found = []
        for stream, keys in self._watched:
            share = _share(record.metrics, keys)
            if share is None:
                continue
            none = record.metrics.get(stream_key(stream, "grad_norm_hh")) == 0
            level = SATURATED.at("without" if none else "share")
            look = state.streams.setdefault(stream.name, _Look())
            if share <= SATURATED.clear("share") and share < level:
                look.since, look.looks, look.raised = -1, 0, False
                look.free = look.free or share <= SATURATED.number("free")
            elif share >= level:
                look.since = record.step if look.since < 0 else look.since
                look.looks += 1
                if not look.raised and self._lasts(record.step, look):
                    look.raised = True
                    found.append(self._alert(record, stream, keys, share))
        return found

    def _lasts(self, step: int, look: _Look) -> bool:
        """Tell whether it has lasted, and nothing was learnt."""
        losses, learnt = self._state.losses, SATURATED.at("loss")
        lowest, constant = losses.lowest, self._state.constant
        if constant and losses.usual >= constant:
            lowest = None  # whatever it has fallen from, that is nothing
        if lowest is not None and lowest < learnt:
            # What was learnt before it came about is no progress since.
            gone = look.free and losses.share is not None and losses.share >= learnt
            if not gone:
                return False
        long = step - look.since >= SATURATED.at("steps")
        return long and look.looks >= SATURATED.count("looks")

    def _alert(
        self, record: StepRecord, stream: Stream, keys: Sequence[str], share: float
    ) -> Alert:
        look = self._state.streams[stream.name]
        cause = self._cause(stream, look)
        facts = self._seen.module(stream)
        shown = (
            f"{share:.0%} of the activations pass less than a twentieth of a gradient"
        )
        if facts.input_scale is not None:
            shown += f"; root mean square of the input about {facts.input_scale:g}"
        why = None
        if cause == "rate" and self._state.outside.was_raised(look.since):
            why = self._state.outside.rise
        return text.alert(
            SATURATED,
            record,
            since=look.since,
            what=f"{stream.name} is saturated",
            shown=shown,
            cause=cause,
            evidence={keys[0]: (share, SATURATED.at("share"))},
            stream=stream,
            remedy=SATURATED.remedy(cause, stream, facts.T or 0),
            why=why,
        )

    def _cause(self, stream: Stream, look: _Look) -> str | None:
        if look.free:
            return "clip_order" if self._state.outside.late else "rate"
        drive = self._seen.stream(stream).drive or ""
        return {"input": "inputs", "state": "weights"}.get(drive)


def _keys(stream: Stream) -> list[str]:
    """Return the keys of a stream: of the tanh, then of each gate's two ends."""
    gates = _GATES.get(stream.kind, ())
    each = [f"{end}/{gate}" for end in _ENDS for gate in gates]
    return [stream_key(stream, name) for name in ("saturated", *each)]


def _share(metrics: Mapping[str, float], keys: Sequence[str]) -> float | None:
    """Return the share that is saturated; None where nobody looked.

    Of a gated net 0 where the gates are not at their ends as well.
    """
    if keys[0] not in metrics:
        return None
    gates = [metrics.get(key, 0.0) for key in keys[1:]]
    mean = len(_ENDS) * sum(gates) / len(gates) if gates else 1.0
    return metrics[keys[0]] if mean >= SATURATED.at("gates") else 0.0
