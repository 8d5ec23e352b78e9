"""Accelerate: ``watch(accelerator, model)`` after ``init_trackers``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import gradwatch
from gradwatch.integrations.fit import needs
from gradwatch.sinks import Scalars, Sink, TensorBoard

_GeneralTracker: Any = needs("accelerate.tracking", extra="accelerate").GeneralTracker

_FILE: Final = "gradwatch.pt"


def watch(accelerator: Any, model: nn.Module, **arguments: Any) -> gradwatch.Watch:
    """Watch a model, prepared or not.

    Numbers go to the accelerator's trackers, whose first one is this watch from now on:
    ``accelerator.end_training()`` closes it. ``accelerator.save_state()`` holds its
    state.

    Args:
        accelerator: The Accelerator; call ``init_trackers`` before, if you have any.
        model: The model.
        arguments: Of :func:`gradwatch.watch`.

    Returns:
        The watch.
    """
    trackers = [sink for one in accelerator.trackers for sink in _sinks(one)]
    given = {"scaler": accelerator.scaler, **arguments}
    given["sinks"] = [*given.get("sinks", ()), *trackers]
    made = gradwatch.watch(model, **given)
    if all(one.tracker is not made for one in accelerator.trackers):
        accelerator.trackers.insert(0, GradwatchTracker(made))
        accelerator.register_save_state_pre_hook(partial(_save, accelerator, made))
        accelerator.register_load_state_pre_hook(partial(_load, made))
    return made


def _save(accelerator: Any, watch: gradwatch.Watch, *given: Any) -> None:
    """Write the state beside what Accelerate saves; the last argument is the folder."""
    if accelerator.is_main_process:
        torch.save(watch.state_dict(), Path(given[-1]) / _FILE)


def _load(watch: gradwatch.Watch, *given: Any) -> None:
    """Go on from there; a checkpoint of a training without a watch has none."""
    if (file := Path(given[-1]) / _FILE).exists():
        watch.load_state_dict(torch.load(file, weights_only=False))


class GradwatchTracker(_GeneralTracker):  # type: ignore[misc]  # untyped
    """A watch among the trackers of an Accelerator.

    Args:
        watch: The watch, which is closed with the training.
    """

    name = "gradwatch"
    requires_logging_directory = False

    def __init__(self, watch: gradwatch.Watch) -> None:
        super().__init__()
        self._watch = watch

    @property
    def tracker(self) -> gradwatch.Watch:
        """The watch."""
        return self._watch

    def finish(self) -> None:
        """Close it, before the other trackers are."""
        self._watch.close()


def _sinks(tracker: Any) -> list[Sink]:
    """Return where a tracker has its numbers; W&B's run is found without it."""
    if tracker.name in ("wandb", "gradwatch"):
        return []
    if tracker.name == "tensorboard":
        return [TensorBoard(tracker.tracker)]
    return [Scalars(tracker.log)]
