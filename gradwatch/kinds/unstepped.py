"""Weights that learn nothing though gradients come: no optimizer, or not all of them.

The rules of ``not_updating`` for a whole model, and for what is not recurrent in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.not_updating import NOT_UPDATING, line_of, listed
from gradwatch.kinds.remembering import Remembering
from gradwatch.metrics import run_key
from gradwatch.record import Alert, StepRecord, Stream

_NONFINITE = run_key("nonfinite")
_PASSES = NOT_UPDATING.count("passes")
_HOLD = int(NOT_UPDATING.at("unheld"))


@dataclass(slots=True)
class _Idle:
    """What the rule of a whole model remembers.

    Attributes:
        active: Whether it was reported, and is not over.
    """

    active: bool = False


class NoStep(Remembering[_Idle]):
    """Backward passes, and no optimizer that steps on any weight of the model."""

    kind = NOT_UPDATING.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        super().__init__(_Idle())

    @property
    def active(self) -> bool:
        """Whether it still holds."""
        return self._state.active

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: an optimizer has stepped in each."""
        return not self._state.active

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        passes = record.facts.run.unchanged
        if passes is None or record.metrics.get(_NONFINITE):
            return []
        if passes < _PASSES or self._state.active:
            self._state.active = self._state.active and passes > 0
            return []
        self._state.active = True
        elsewhere = bool(record.facts.run.steps_elsewhere)
        shown = (
            f"{passes} backward passes have left every weight as it was, bit for bit"
        )
        if elsewhere:
            shown += "; an optimizer steps that holds tensors of the same shapes, and "
            shown += "none of this model's"
        return [
            text.alert(
                NOT_UPDATING,
                record,
                since=0,
                what="no weight changes",
                shown=shown,
                cause="stale_parameters" if elsewhere else "no_step",
                evidence={},
            )
        ]


@dataclass(slots=True)
class _Unheld:
    """What the rule of single parameters remembers.

    Attributes:
        names: Those that no optimizer holds.
        since: Since when these.
        raised: Whether it was reported.
    """

    names: list[str] = field(default_factory=list)
    since: int = 0
    raised: bool = False


class Unheld(Remembering[_Unheld]):
    """Parameters with a gradient that no optimizer holds, none of them recurrent."""

    kind = NOT_UPDATING.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._recurrent = {f"{s.module}." if s.module else "" for s in streams}
        super().__init__(_Unheld())

    @property
    def active(self) -> bool:
        """Whether it still holds."""
        return self._state.raised

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: no look is among them."""
        return not self._state.names or self._state.raised

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        state, seen = self._state, record.facts.run.unheld
        names = list(seen or ())
        if any(_is_within(name, self._recurrent) for name in names):
            names = []  # the rule of streams names all of them
        if seen is not None and names != state.names:
            state.names, state.since, state.raised = names, record.step, False
        if not state.names or state.raised or record.step - state.since < _HOLD:
            return []
        state.raised = True
        return [
            text.alert(
                NOT_UPDATING,
                record,
                since=state.since,
                what=f"no change of {listed(state.names)}",
                shown=(
                    f"{len(state.names)} tensors have a gradient, and no optimizer "
                    f"holds them, for {record.step - state.since} steps"
                ),
                cause="not_in_optimizer",
                do=line_of(state.names),
                evidence={},
            )
        ]


def _is_within(name: str, modules: set[str]) -> bool:
    return any(name.startswith(f"{module}weight_hh") for module in modules)
