"""What a watch does to the model, where it is asked to: a remedy, a way back."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from gradwatch import console, remedies
from gradwatch.engine import Engine
from gradwatch.processes import processes
from gradwatch.record import Remedy
from gradwatch.recorder import Recorder, greeting
from gradwatch.rewrite import Optimizers, several
from gradwatch.settings import Settings


def apply(engine: Engine | None, remedy: Remedy, optimizer: Optimizers) -> Any:
    """Carry out a remedy on the watched model; see ``Watch.apply``."""
    model = engine.model if engine is not None else None
    if engine is None or engine.closed or model is None:
        raise RuntimeError("this watch is closed or off; nothing was applied.")
    if processes() > 1:
        raise RuntimeError(
            "with several processes a remedy has to change every rank alike; call "
            f"it yourself on each: {remedies.line(remedy)}"
        )
    given = several(optimizer) or engine.optimizers()
    if not given:
        raise ValueError(
            "no optimizer has stepped yet, so pass it: "
            "watch.apply(remedy, optimizer=optimizer)."
        )
    engine.settle()
    if engine.open:
        raise RuntimeError(
            "there are gradients that no optimizer has used yet; apply a remedy "
            "between optimizer.step() and the next backward()."
        )
    done = remedies.apply(remedy, model, given)
    engine.was_remade(*(f"reinit:{name}" for name in done.streams))
    return done.answer


def recorder(
    engine: Engine, settings: Settings, folder: Path | None
) -> Recorder | None:
    """Return the flight recorder of a watch, where one is wanted."""
    model = engine.model
    if settings.recorder is None or model is None:
        return None
    console.say(greeting(model, settings.recorder))
    known = weakref.ref(engine)

    def number() -> int:
        living = known()
        return 0 if living is None else living.number

    def rolled_back(step: int) -> None:
        if (living := known()) is not None:
            living.was_remade(f"rollback:{step}")

    return Recorder(
        model,
        settings.recorder,
        folder=folder,
        number=number,
        say=console.report,
        rolls_back=settings.on_alert == "rollback",
        rolled_back=rolled_back,
        scaler=settings.scaler,
    )


def roll_back(engine: Engine | None, kept: Recorder | None) -> int:
    """Put a training back to its last good state; see ``Watch.rollback``."""
    if engine is None or engine.closed:
        raise RuntimeError("this watch is closed or off; nothing was rolled back.")
    if processes() > 1:
        raise RuntimeError(
            "with several processes a rollback would put this one back and not the "
            "others; start all of them again from a checkpoint."
        )
    if kept is None:
        raise RuntimeError(
            "this watch keeps no state; gradwatch.watch(model, recorder=100) does."
        )
    return kept.roll_back()
