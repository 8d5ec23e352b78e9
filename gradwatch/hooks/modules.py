"""The recurrent modules of one model, with a probe each."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from torch import nn

from gradwatch.health import Health
from gradwatch.hooks import calls
from gradwatch.hooks.capture import Capture
from gradwatch.hooks.chain import Chain
from gradwatch.hooks.probe import NOTHING, Probe, Wanted
from gradwatch.hooks.readout import Readout
from gradwatch.hooks.shards import Shards
from gradwatch.hooks.stepped import Stepped
from gradwatch.record import CELL, Stream
from gradwatch.recurrent import Recurrence

Chains = dict[int, list[Capture]]
"""Id of a module -> the longest chain of its calls that gradients have reached."""


def owners(modules: Iterable[nn.Module]) -> frozenset[object]:
    """Return whoever sees the calls of each of some modules, if it is the same."""
    found = set()
    for module in modules:
        probes = [p for p in calls.seeing(module) if isinstance(p, Probe | Stepped)]
        found.add(frozenset(probe.owner for probe in probes if not probe.closed))
    return found.pop() if len(found) == 1 else frozenset()


class ModuleHooks:
    """Owns the probes of one watch; the modules themselves are not kept alive.

    Args:
        found: The recurrences of the model.
        owner: Whoever is to live as long as the modules' hooks: the watch.
        model: The watched model; not kept alive.
        samples: How many sequences are looked at; None for all.
        health: Where failures are noted.
    """

    def __init__(
        self,
        found: Sequence[Recurrence],
        owner: object,
        model: nn.Module,
        *,
        samples: int | None,
        health: Health,
    ) -> None:
        self.probes: list[Probe | Stepped] = []
        self.readout = Readout(model, health.guard("readout"))
        """Sees what the loss reads."""
        self.shards = Shards(model, found, health)
        """Meets the other processes where weights are sharded."""
        self.wanted = NOTHING
        """What a forward now has to show."""
        self._looked, self._off = False, False
        guard = health.guard("probe", self._recover)
        cells = health.guard("cells", self._recover_cells)
        gates = health.guard("gates")
        self._found = [(r.stream, weakref.ref(r.module), r.suffix) for r in found]
        try:  # a failure half-way undoes what came before
            for one in {id(r.module): r for r in found}.values():
                of_own = one.stream.kind == CELL
                probe: Probe | Stepped
                if of_own:
                    probe = Stepped(
                        one.module, owner, samples=samples, guard=cells, gates=gates
                    )
                else:
                    probe = Probe(one.module, owner, samples=samples, guard=guard)
                self.probes.append(probe)
        except BaseException:
            self.close()
            raise

    def _recover(self, off: bool) -> None:
        """Forget a call that could not be looked at, or look at none any more."""
        if off:
            self.let_go()
        else:
            self.forget()

    def _recover_cells(self, off: bool) -> None:
        """The same of the cells of the user's own alone."""
        for probe in self.probes:
            if isinstance(probe, Stepped):
                probe.fail(off)

    def let_go(self) -> None:
        """Look at no call any more; the hooks stay, as they keep the owner alive."""
        self.expect(NOTHING)
        self._off = True
        for probe in self.probes:
            probe.let_go()

    @property
    def at_rest(self) -> bool:
        """Whether nothing is shown, and nothing remembered of what was."""
        return self.wanted is NOTHING and not self._looked

    @property
    def streams(self) -> list[Stream]:
        """Every stream, whether its module still lives or not."""
        return [stream for stream, *_ in self._found]

    def alive(self) -> list[Recurrence]:
        """Return the recurrences whose modules still live."""
        found = [(stream, ref(), suffix) for stream, ref, suffix in self._found]
        return [Recurrence(s, m, suffix) for s, m, suffix in found if m is not None]

    def members(self) -> dict[int, list[Recurrence]]:
        """Return the recurrences of each module that still lives, by its id."""
        members: dict[int, list[Recurrence]] = {}
        for recurrence in self.alive():
            members.setdefault(id(recurrence.module), []).append(recurrence)
        return members

    def take(self) -> Chains:
        """Return the calls that gradients have reached since the last time."""
        own = [probe for probe in self.probes if isinstance(probe, Probe)]
        chains = {id(probe.module()): probe.take() for probe in own}
        return {key: chain for key, chain in chains.items() if chain}

    def take_stepped(self) -> dict[int, Chain]:
        """Return the same of cells of the user's own."""
        own = [probe for probe in self.probes if isinstance(probe, Stepped)]
        chains = {id(probe.module()): probe.take() for probe in own}
        return {key: chain for key, chain in chains.items() if chain is not None}

    def expect(self, wanted: Wanted) -> None:
        """Have the forwards from now on show what is wanted."""
        if wanted != self.wanted and not self._off:
            self.wanted, self._looked = wanted, True
            for probe in self.probes:
                probe.expect(wanted)
            self.readout.expect(wanted.sequences)

    def called(self) -> list[int]:
        """Return the ids of the modules that were called in the open step."""
        return [id(probe.module()) for probe in self.probes if probe.called]

    def ended(self) -> None:
        """Note that a backward pass has ended: later calls are told apart."""
        if self._looked:
            for probe in self.probes:
                probe.ended()

    def used(self) -> None:
        """Note that an optimizer has stepped: later calls are told apart."""
        if self._looked:
            for probe in self.probes:
                probe.used()

    def forget(
        self, task: int = -1, *, states: tuple[bool, bool] = (False, False)
    ) -> None:
        """Let go of what was seen of a step that is over; see :meth:`Probe.forget`."""
        if self._looked:
            left = [probe.forget(task, states=states) for probe in self.probes]
            self.readout.forget(task)
            self._looked = self.wanted is not NOTHING or any(left)

    def close(self) -> None:
        """Take the hooks off. Safe to call twice."""
        with ExitStack() as each:
            each.callback(self.readout.close)
            each.callback(self.shards.close)
            for probe in self.probes:
                each.callback(probe.close)
        self.probes.clear()
