"""The state of a watch: what a checkpoint holds, and how a later run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradwatch import facts
from gradwatch.depths.finish import Memory
from gradwatch.engine import Engine
from gradwatch.folder import FORMAT
from gradwatch.pipeline import Pipeline
from gradwatch.schedule import Schedule


def state_of(
    engine: Engine | None, schedule: Schedule, pipeline: Pipeline
) -> dict[str, Any]:
    """Return what a resumed run needs, as plain values; the engine has settled.

    Args:
        engine: What measures; None where the watch is off.
        schedule: Its cadences.
        pipeline: Its rules and incidents.
    """
    number, memory = 0, Memory()
    if engine is not None:
        number, memory = engine.number, engine.memory
    return {
        "format": FORMAT,
        "step": number,
        "schedule": schedule.state_dict(),
        "pipeline": {"memory": memory.state_dict(), **pipeline.state_dict()},
    }


def go_on_from(
    state: Mapping[str, Any],
    engine: Engine | None,
    schedule: Schedule,
    pipeline: Pipeline,
) -> None:
    """Go on from :func:`state_of`; nothing is changed where the state does not fit.

    Args:
        state: The state.
        engine: As there.
        schedule: The same.
        pipeline: The same.

    Raises:
        ValueError: If ``state`` is not one, or of a version that cannot be read.
    """
    given = state.keys() if isinstance(state, Mapping) else set[str]()
    missing = {"step", "schedule", "pipeline"} - given
    if missing:
        raise ValueError(
            f"the state lacks {', '.join(sorted(missing))}; expected what "
            "watch.state_dict() returned."
        )
    before = schedule.state_dict(), pipeline.state_dict()
    try:
        _go_on(state, engine, schedule, pipeline)
    except Exception as error:
        schedule.load_state_dict(before[0])
        pipeline.load_state_dict(before[1])
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"the state is incomplete or damaged ({type(error).__name__}: "
            f"{error}); expected what watch.state_dict() returned. Nothing was "
            "changed."
        ) from error


def _go_on(
    state: Mapping[str, Any],
    engine: Engine | None,
    schedule: Schedule,
    pipeline: Pipeline,
) -> None:
    saved = state["pipeline"]
    if state.get("format", 1) < 2:
        saved = facts.state_from_format_1(saved)
    number, memory = state["step"], Memory.from_state(saved["memory"])
    if not isinstance(number, int):
        raise ValueError(f"the state's step is {number!r}; expected an int.")
    schedule.load_state_dict(state["schedule"])
    pipeline.load_state_dict(saved)
    if engine is not None:
        engine.resume_from(number, memory)
    pipeline.write_open()
