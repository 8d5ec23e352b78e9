"""The same batch again and again: a notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gradwatch.block import Block
from gradwatch.kinds import text
from gradwatch.kinds.kind import Cause, Evidence, Kind
from gradwatch.kinds.remembering import Remembering
from gradwatch.record import Alert, StepRecord, Stream

REPEATED_BATCH = Kind(
    name="repeated_batch",
    title="gradwatch: the same batch again and again",
    severity="info",
    meaning="The sequences looked at were the same, bit for bit, at every look.",
    evidence={
        "looks": Evidence(
            "consecutive looks at the same sequences",
            8,
            None,
            "by then at least 50 steps lie between the first and the last",
        )
    },
    warm_up="none",
    confirmed="by the number of looks",
    over="with the first other batch",
    excused="`LBFGS`, which is to be given the same batch until it has converged",
    causes={
        "data": Cause(
            "by measurement",
            "one batch is served at each step; not a fault if it is all your data, or "
            "is overfitted on purpose",
            "for batch in loader: ...  # not next(iter(loader)) at each step",
        )
    },
)


_LOOKS: Final = REPEATED_BATCH.at("looks")


@dataclass(slots=True)
class _State:
    """What the rule remembers.

    Attributes:
        same: Path of a module -> consecutive looks at the same input.
        meant: Whether an optimizer is used that is to be given the same batch.
    """

    same: dict[str, int] = field(default_factory=dict)
    meant: bool = False


class RepeatedBatch(Remembering[_State]):
    """The sequences looked at are the same, bit for bit, at every look: a notice."""

    kind = REPEATED_BATCH.name

    def __init__(self, streams: Sequence[Stream] = ()) -> None:
        self._modules = tuple(dict.fromkeys(s.module for s in streams))
        super().__init__(_State())

    @property
    def active(self) -> bool:
        """Whether they still are."""
        looks = self._state.same.values()
        return not self._state.meant and max(looks, default=0) >= _LOOKS

    def update_block(self, block: Block) -> bool:
        """Take in plain rows: what is judged here stands in none of them."""
        return True

    def update(self, record: StepRecord) -> list[Alert]:
        """Judge one record."""
        modules, optimizers = record.facts.modules, record.facts.run.optimizers
        if optimizers:
            self._state.meant = any(name.startswith("LBFGS") for name in optimizers)
        for module in self._modules if modules else ():
            looks = modules[module].same_batch if module in modules else None
            if looks is None:
                continue
            before, self._state.same[module] = self._state.same.get(module, 0), looks
            if self._state.meant:
                continue
            if before < _LOOKS <= looks:
                return [self._alert(record, module, looks)]
        return []

    def _alert(self, record: StepRecord, module: str, looks: int) -> Alert:
        return text.alert(
            REPEATED_BATCH,
            record,
            since=record.step,
            what=f"{module} is given the same batch at every step",
            shown=f"its input was the same, bit for bit, at {looks} consecutive looks",
            cause="data",
            evidence={},
        )
