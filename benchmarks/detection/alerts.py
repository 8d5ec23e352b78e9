"""What the alarms say of a family at fixed cadences."""

import gradwatch
from benchmarks.detection.case import loop, make


def alerts(name: str, *, in_full: int = 1) -> list[gradwatch.Alert]:
    """Train a family, seed 0; return its alerts.

    Args:
        name: Of the family.
        in_full: Every how many steps gradients are read in full at most.
    """
    case = make(name, 0)
    with gradwatch.watch(case.model, dir=None, wandb=None, budget=None) as watch:
        watch._settings.schedule.in_full = in_full
        for _ in loop(case):
            pass
        watch.flush()
        return watch.alerts
