"""What is known of modules and streams at a sampled step, beside numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from gradwatch import _torch
from gradwatch.facts import ModuleFacts, StreamFacts
from gradwatch.hooks.capture import Capture
from gradwatch.hooks.chain import Chain
from gradwatch.hooks.modules import ModuleHooks
from gradwatch.hooks.optimizers import Training
from gradwatch.record import CELL
from gradwatch.recurrent import Recurrence, own_weight


def of_calls(chain: Sequence[Capture]) -> ModuleFacts | None:
    """Return the facts of a module whose calls a gradient has reached, if any."""
    shapes = [c.shape for c in chain if c.shape is not None]
    if not shapes:
        return None
    return ModuleFacts(
        T=sum(length for length, _ in shapes),
        B=shapes[0][1],
        dtype=chain[0].dtype,
        autocast=chain[0].autocast or None,
        call_steps=_each([length for length, _ in shapes]),
        stateless_calls=chain[0].apart or None,
        cut=_steps_cut_off(chain[0]) or None,
        evaluating=any(call.evaluating for call in chain) or None,
        graph_kept=chain[0].graph_kept or None,
    )


def of_cell(chain: Chain) -> ModuleFacts:
    """Return the facts of a cell of the user's own, from a chain of its calls."""
    steps, batch, _ = chain.shape
    return ModuleFacts(
        T=steps or None,
        B=batch or None,
        dtype=chain.dtype or None,
        replay=f"left out: {chain.why}" if chain.why else None,
        evaluating=chain.evaluating or None,
    )


def _each(lengths: Sequence[int]) -> int | None:
    """Return the steps of each of several calls, where all have as many, not one."""
    alike = len(lengths) > 1 and len(set(lengths)) == 1 and lengths[0] > 1
    return lengths[0] if alike else None


def reach_of(
    known: ModuleFacts | None, *, reached: bool, called: bool, alive: bool
) -> ModuleFacts:
    """Return the facts of a module, with whether gradients reached it in this step."""
    if not alive:
        return ModuleFacts(reach="gone")
    reach = "reached" if reached else "detached" if called else "unused"
    return dataclasses.replace(known or ModuleFacts(), reach=reach)


def of_stream(
    known: StreamFacts | None, recurrence: Recurrence, training: Training | None
) -> StreamFacts | None:
    """Return whether W_hh can learn, and whether anything trains it.

    Args:
        known: What was known of the stream.
        recurrence: The stream.
        training: None while no optimizer was seen.

    Returns:
        None where W_hh is parametrised.
    """
    weight = own_weight(recurrence)
    if weight is None:
        return known
    rates = None if training is None else training.rates
    rate = None if rates is None else rates.get(id(weight))
    return dataclasses.replace(
        known or StreamFacts(),
        requires_grad=weight.requires_grad,
        in_optimizer=None if rates is None else id(weight) in rates,
        lr=None if rate is None else _roughly(rate),
    )


def notes_of(
    modules: ModuleHooks,
    seen: Mapping[str, ModuleFacts],
    left_out: Mapping[str, int],
    *,
    begun: bool,
) -> dict[str, str]:
    """Say of which streams something is not measured, and why.

    Args:
        modules: The watched modules.
        seen: Their facts, by path.
        left_out: Path of a module -> how many of its replays were dropped.
        begun: Whether a step has been measured.
    """
    found = dict.fromkeys((s.name for s in modules.streams), "its module is gone")
    for own in modules.alive():
        name, path = own.stream.name, own.stream.module
        note = _note(own, seen.get(path, ModuleFacts()), left_out.get(path, 0), begun)
        if modules.shards.any or _torch.is_sharded(own_weight(own)):
            note = "; ".join(filter(None, (note, modules.shards.note)))
        if note is not None:
            found[name] = note
        else:
            del found[name]
    return found


def _note(
    recurrence: Recurrence, facts: ModuleFacts, lost: int, begun: bool
) -> str | None:
    weight, cell = own_weight(recurrence), recurrence.stream.kind == CELL
    if begun and facts.T is None:
        hidden = "compiled code hides its calls, or " if _torch.compiles() else ""
        return (
            f"{'it' if cell else 'rho'} is not measured: {hidden}no gradient has come "
            "back through the module (call module(x), not module.forward(x))"
        )
    if cell and facts.replay is not None:
        return f"the flow is {facts.replay}"
    if facts.replay is not None:
        times = f"left out ({lost} times)"
        return f"states {facts.replay.replace('left out', times)}"
    if facts.state_detached:
        return f"its state is detached every {facts.T} steps"
    if cell:
        return None
    if weight is None:
        return "W_hh is parametrised: no update_ratio"
    return None if weight.requires_grad else "W_hh is frozen: no gradient norms"


def _steps_cut_off(first: Capture) -> int:
    """Return the steps of earlier calls whose state was detached, and that get nothing.

    Where an earlier call has had a gradient of its own, through a loss of its own,
    nothing is lost.
    """
    steps, past = 0, first.cut_from
    while past is not None and not past.reached:
        steps, past = steps + past.steps + past.lost, past.before
    return steps


def _roughly(rate: float) -> float:
    """Return a learning rate as a power of 2, or 0: a fact is not to change often."""
    return 2.0 ** round(math.log2(rate)) if rate > 0 and math.isfinite(rate) else 0.0
