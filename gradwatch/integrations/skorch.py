"""skorch: ``NeuralNetClassifier(..., callbacks=[GradwatchCallback()])``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradwatch
from gradwatch.integrations.fit import Fit, needs
from gradwatch.sinks import Scalars

_Callback: Any = needs("skorch.callbacks", extra="skorch").Callback


class GradwatchCallback(_Callback):  # type: ignore[misc]  # untyped
    """Watches the module while a net is fitted.

    Numbers go to the batches of ``net.history``, at every tenth step, and to a W&B run.
    A pickle of the net, such as of ``Checkpoint(f_pickle=...)``, holds the state:
    ``partial_fit`` goes on from it, ``fit`` starts again.

    Args:
        arguments: Of :func:`gradwatch.watch`.

    Raises:
        TypeError: If one of them is unknown.
    """

    def __init__(self, **arguments: Any) -> None:
        self.set_params(**arguments)

    def set_params(self, **params: Any) -> None:
        """Set arguments of the watch, as scikit-learn does."""
        kept = {**self.get_params(), **params}
        self.fit_ = Fit(kept)
        self.__dict__.update(kept)  # skorch finds them there

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of the watch that were given."""
        return {name: v for name, v in vars(self).items() if not name.endswith("_")}

    @property
    def watch_(self) -> gradwatch.Watch | None:
        """The watch; None before the first fit."""
        return self.fit_.watch

    def initialize(self) -> GradwatchCallback:
        """Start again, as the net does."""
        self.fit_.end()
        self.fit_.load_state_dict({})
        return self

    def on_train_begin(self, net: Any, *given: Any, **more: Any) -> None:
        """Begin."""

        def record(values: Mapping[str, float], step: int) -> None:
            for key, value in values.items():
                net.history.record_batch(key, value)

        self.fit_.begin(net.module_, [Scalars(record)])

    def on_train_end(self, net: Any, *given: Any, **more: Any) -> None:
        """End."""
        self.fit_.end()
