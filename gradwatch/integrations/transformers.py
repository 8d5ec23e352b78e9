"""Hugging Face: ``Trainer(..., callbacks=[GradwatchCallback()])``."""

from __future__ import annotations

import json
from typing import Any

import gradwatch
from gradwatch.integrations.fit import Fit, needs

_trainer: Any = needs("transformers.trainer_callback", extra="transformers")


_TrainerCallback: Any = _trainer.TrainerCallback
_ExportableState: Any = _trainer.ExportableState


class GradwatchCallback(_TrainerCallback, _ExportableState):  # type: ignore[misc]  # loosely typed
    """Watches the model while a Trainer trains it.

    Numbers go to the W&B run that the Trainer makes; for TensorBoard give both the same
    writer: ``callbacks=[TensorBoardCallback(writer),
    GradwatchCallback(sinks=[gradwatch.sinks.TensorBoard(writer)])]``. The Trainer's
    checkpoints hold the state, in ``trainer_state.json``.

    Args:
        arguments: Of :func:`gradwatch.watch`. With
            ``restore_callback_states_from_checkpoint=True`` the Trainer makes this
            object anew from those among them that JSON can hold.

    Raises:
        TypeError: If one of them is unknown.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._arguments = arguments
        self._fit = Fit(arguments)

    @property
    def watch(self) -> gradwatch.Watch | None:
        """The watch; None before training."""
        return self._fit.watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin; a resumed run goes on from what its checkpoint holds."""
        self._fit.end()  # of a training that an exception has ended
        # The Trainer asks for it when it saves, though a checkpoint may lack it.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        saved = saved[0] if isinstance(saved, list) else saved
        resumed = state.global_step > 0
        self._fit.load_state_dict(
            saved.get("attributes", {}).get("saved", {}) if resumed else {}
        )
        self._fit.begin(given["model"], start_step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """End."""
        self._fit.end()

    def state(self) -> dict[str, Any]:
        """Return what ``trainer_state.json`` holds."""
        args = {name: v for name, v in self._arguments.items() if _is_json(v)}
        return {"args": args, "attributes": {"saved": self._fit.state_dict()}}

    @property
    def saved(self) -> dict[str, Any]:
        """The state of the watch, which the Trainer may set."""
        return self._fit.state_dict()

    @saved.setter
    def saved(self, state: dict[str, Any]) -> None:
        self._fit.load_state_dict(state)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
