"""Notices of how a recurrent module is called: no fault by itself, seldom meant."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradwatch.block import Block
from gradwatch.facts import ModuleFacts
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Seen, SeenState, by_module
from gradwatch.record import Alert, StepRecord, Stream

GRAPH_KEPT = Kind(
    name="graph_kept",
    title="gradwatch: backward goes through earlier steps",
    severity="info",
    meaning="The state brings the graph of earlier steps along.",
    evidence={
        "steps": Evidence("steps for which all looks have said so", 10, None, "exact")
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="at once; it is reported once a module",
    causes={
        "graph": Cause(
            "`graph_kept`",
            "the first state has a graph from before the last step: each backward goes "
            "through all steps so far, ever slower, with weights that are no more",
            "state = tuple(s.detach() for s in state)  # before each step",
        )
    },
)

EVAL_MODE = Kind(
    name="eval_mode",
    title="gradwatch: trained in evaluation mode",
    severity="info",
    meaning="The module is trained in evaluation mode.",
    evidence={
        "steps": Evidence("steps for which all looks have said so", 10, None, "exact")
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="at once; it is reported once a module",
    causes={
        "eval": Cause(
            "`evaluating`",
            "model.eval() was called and model.train() was not, after it: dropout is "
            "off, and batch norm does not learn its statistics",
            "model.train()  # before each epoch of training",
        )
    },
)

STATE_CARRIED = Kind(
    name="state_carried",
    title="gradwatch: a state is carried into the next batch",
    severity="info",
    meaning="Each call goes on from the last one's state, and its end alone is read.",
    evidence={
        "steps": Evidence("steps for which all looks have said so", 10, None, "exact")
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="at once; it is reported once a module",
    excused="a state that is read all along, as that of a language model",
    causes={
        "carried": Cause(
            "`state_detached`, and `demand` is the last time step alone",
            "each sequence has one answer, and begins with the state in which another "
            "one has ended; no fault where it goes on from that one",
            "state = None  # at the start of each batch that begins new sequences",
        )
    },
    numbers={
        "least": Number(4, "time steps at least", "of fewer each may be a piece"),
        "read": Number(1.5, "time steps that are read, less than", "the last one"),
    },
)


@dataclass(slots=True)
class _State:
    """What such a rule remembers.

    Attributes:
        seen: What was last seen of every module.
        since: Path of a module that shows it -> since when.
        said: Those that it was reported of.
    """

    seen: SeenState = field(default_factory=SeenState)
    since: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


class OfCalls(Remembering[_State], ABC):
    """What the looks at a module's calls say for some steps; once a module."""

    kind: str
    active = False
    _row: Kind

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._modules = by_module(streams)
        self._seen = Seen(streams, ("demand",))
        super().__init__(_State(seen=self._seen.state))

    @abstractmethod
    def _shown(self, facts: ModuleFacts, demand: float) -> str:
        """Return what was seen of a module's calls; empty where it is nothing."""

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: no look is among them."""
        return not self._state.since

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        state = self._state
        if len(state.said) == len(self._modules):
            return []
        self._seen.take(record)
        if not record.facts.modules and not state.since:
            return []
        found = []
        for path, streams in self._modules.items():
            if path in state.said:
                continue
            demand = max(self._seen.of(s).get("demand", 0.0) for s in streams)
            shown = self._shown(self._seen.module(streams[0]), demand)
            if not shown:
                state.since.pop(path, None)
                continue
            since = state.since.setdefault(path, record.step)
            if record.step - since >= self._row.at("steps"):
                del state.since[path]
                state.said.append(path)
                found.append(self._alert(record, path, shown, since))
        return found

    def _alert(self, record: StepRecord, path: str, shown: str, since: int) -> Alert:
        [cause] = self._row.causes
        where = f" ({path})" if path else ""
        return text.alert(
            self._row,
            record,
            since=since,
            what=text.first_line(self._row) + where,
            shown=shown,
            cause=cause,
            evidence={},
        )


class GraphKept(OfCalls):
    """A first state with a graph from before the last step."""

    kind, _row = GRAPH_KEPT.name, GRAPH_KEPT

    def _shown(self, facts: ModuleFacts, demand: float) -> str:
        kept = bool(facts.graph_kept)
        return "the first state was made in an earlier step, with its graph" * kept


class EvalMode(OfCalls):
    """A call in evaluation mode that a gradient reaches."""

    kind, _row = EVAL_MODE.name, EVAL_MODE

    def _shown(self, facts: ModuleFacts, demand: float) -> str:
        return "gradients reach calls in evaluation mode" * bool(facts.evaluating)


class StateCarried(OfCalls):
    """A state of an earlier call, and one answer a sequence."""

    kind, _row = STATE_CARRIED.name, STATE_CARRIED

    def _shown(self, facts: ModuleFacts, demand: float) -> str:
        steps, least = facts.T or 0, STATE_CARRIED.count("least")
        read = 0 < demand * steps < STATE_CARRIED.number("read")
        if not facts.state_detached or steps < least or not read:
            return ""
        return (
            f"the first state is that of an earlier call, and the loss reads the last "
            f"of {steps} steps alone"
        )
