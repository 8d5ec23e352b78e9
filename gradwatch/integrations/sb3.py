"""Stable-Baselines3: ``algorithm.learn(steps, callback=GradwatchCallback())``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradwatch.integrations.fit import Fit, Watching, needs
from gradwatch.sinks import Scalars

_BaseCallback: Any = needs(
    "stable_baselines3.common.callbacks", extra="sb3"
).BaseCallback


class GradwatchCallback(Watching, _BaseCallback):  # type: ignore[misc]  # loosely typed
    """Watches the policy while it learns; what it does between is not measured.

    The last numbers go to the algorithm's logger (TensorBoard, CSV; not the console)
    each time that it writes. A saved model holds no state of callbacks: keep
    ``callback.state_dict()`` beside it.

    Args:
        arguments: Of :func:`gradwatch.watch`.

    Raises:
        TypeError: If one of them is unknown.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._fit = Fit(arguments)

    def _on_training_start(self) -> None:
        self._fit.begin(self.model.policy, [Scalars(self._record)])

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._fit.end()

    def _record(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.model.logger.record(key, value, exclude=("stdout", "log"))
