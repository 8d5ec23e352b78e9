"""Axes that are taken for each other: one sample's output depends on another sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gradwatch.block import Block
from gradwatch.facts import ModuleFacts
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.remembering import Remembering
from gradwatch.kinds.seen import Seen, SeenState, by_module
from gradwatch.record import Alert, StepRecord, Stream

AXES_MIXED = Kind(
    name="axes_mixed",
    title="gradwatch: axes are taken for each other",
    severity="warning",
    meaning="Axes are taken for each other: samples mix.",
    evidence={
        "steps": Evidence(
            "steps for which all looks have said so",
            10,
            None,
            "shapes and views are exact",
        ),
        "read": Evidence(
            "sequences of a call that a gradient reaches, times `sequences_read`, at "
            "most, while `steps_read` is all time steps",
            1.5,
            None,
            "one sequence of many that is read at each step is the last sample's: what "
            "the net takes for time is the batch",
        ),
    },
    warm_up="none",
    confirmed="by the number of steps, at every look",
    over="after 100 steps whose looks show none of it",
    excused=(
        "fewer than 4 sequences or steps; an input that a weight has made, for which "
        "nothing is told of neighbours"
    ),
    causes={
        "batch_axis": Cause(
            "one sequence of a call is read, at every time step; or `input_order` is "
            "`batch`; or a loop over time steps whose calls have several steps each, "
            "of one sequence",
            "the net recurs along the batch: each sample's state is handed to the next "
            "sample",
            "nn.LSTM(..., batch_first=True) where the batch is the first axis of the "
            "input, and without it where time is",
        ),
        "cell": Cause(
            "`samples_mix`: in a cell of your own the state of one sequence depends on "
            "another's",
            "the cell works along the axis of the sequences, too",
            "look in the cell for a softmax, a mean, a norm or a view over axis 0",
        ),
        "view": Cause(
            "`loss_views`: a view tears an axis apart and joins the pieces to others",
            "a view regroups numbers without moving them, so that those of several "
            "samples end up in one",
            "y = y.transpose(0, 1)  # in place of that view or reshape",
        ),
    },
    numbers={
        "away": Number(
            100, "steps without, after which it is over", "a batch may be like no other"
        ),
        "least": Number(
            4, "sequences, and time steps, at least", "one of two or three may be meant"
        ),
        "all": Number(
            0.95,
            "`steps_read` from which on all are read",
            "one may be left out",
        ),
    },
)


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        seen: What was last seen of every stream.
        views: The views between the recurrent module and the loss.
        cause: What is wrong; empty for nothing.
        path: Of the module that shows it; None where it is none.
        shown: What was seen of it.
        since: Since when.
        last: The last step at which it was seen.
        raised: Whether that was said.
    """

    seen: SeenState = field(default_factory=SeenState)
    views: list[str] = field(default_factory=list)
    cause: str = ""
    path: str | None = None
    shown: str = ""
    since: int = 0
    last: int = 0
    raised: bool = False


class AxesMixed(Remembering[_State]):
    """What the loss reads of a module's outputs, how it got there, and the input."""

    kind = AXES_MIXED.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._modules = by_module(streams)
        self._seen = Seen(streams, ())
        super().__init__(_State(seen=self._seen.state))

    @property
    def active(self) -> bool:
        """Whether it still holds."""
        return self._state.raised

    @property
    def suspected(self) -> tuple[str, str] | None:
        """The cause and what shows it, after however few looks; None for none."""
        cause, shown = self._state.cause, self._state.shown
        return (cause, shown) if cause else None

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: no look is among them."""
        return not self._state.cause or self._state.raised

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        state, views = self._state, record.facts.run.loss_views
        if not record.facts and not state.cause:
            return []
        self._seen.take(record)
        if views is not None:
            state.views = list(views)
        now = state.cause, state.path, state.shown
        cause, path, shown = self._fault() if record.facts else now
        if cause and cause != state.cause:
            state.cause, state.since, state.raised = cause, record.step, False
        if cause:
            state.path, state.shown, state.last = path, shown, record.step
        elif not state.raised or record.step - state.last >= AXES_MIXED.number("away"):
            state.cause, state.raised = "", False
        if not state.cause or state.raised:
            return []
        if record.step - state.since < AXES_MIXED.at("steps"):
            return []
        state.raised = True
        return [
            text.alert(
                AXES_MIXED,
                record,
                since=state.since,
                what=text.first_line(AXES_MIXED),
                shown=state.shown,
                cause=state.cause,
                evidence={},
                stream=None if state.path is None else self._modules[state.path][0],
            )
        ]

    def _fault(self) -> tuple[str, str | None, str]:
        """Return the cause and what shows it; nothing where there is none."""
        for path, streams in self._modules.items():
            facts = self._seen.module(streams[0])
            if shown := _recurs_along_the_batch(path, facts):
                return "batch_axis", path, shown
            if facts.samples_mix:
                told = "a gradient of one sequence of its state reaches others"
                return "cell", path, f"in {path or 'the model'} {told}"
        if self._state.views:
            views = ", ".join(self._state.views)
            return "view", None, f"a view from {views} between the net and the loss"
        return "", None, ""


def _recurs_along_the_batch(path: str, facts: ModuleFacts) -> str:
    """Return what shows that a module takes the batch for time; empty for nothing."""
    batch, steps, least = facts.B or 0, facts.T or 0, AXES_MIXED.count("least")
    name, read, each = path or "the model", facts.sequences_read, facts.call_steps or 0
    if batch == 1 and each >= least and steps >= least * each:
        return (
            f"{name} is called {steps // each} times a step, each with {each} time "
            "steps of one sequence, and its state goes from one call to the next"
        )
    if min(batch, steps) < least:
        return ""
    one = read is not None and 0 < read * batch <= AXES_MIXED.at("read")
    if one and (facts.steps_read or 0.0) >= AXES_MIXED.number("all"):
        return (
            f"the loss reads 1 of the {batch} sequences of {name}, at all of its "
            f"{steps} time steps"
        )
    if facts.input_order == "batch":
        return (
            f"the input of {name} goes on from one of its {batch} sequences to the "
            f"next, and not along its {steps} time steps"
        )
    return ""
