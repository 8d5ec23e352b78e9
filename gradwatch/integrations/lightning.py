"""Lightning: ``Trainer(callbacks=[GradwatchCallback()])``."""

from __future__ import annotations

from typing import Any

from gradwatch.integrations.fit import Fit, Watching, needs
from gradwatch.sinks import Scalars, Sink, TensorBoard

_Callback: Any = needs(
    "lightning.pytorch", "pytorch_lightning", extra="lightning"
).Callback


class GradwatchCallback(Watching, _Callback):  # type: ignore[misc]  # whichever is there
    """Watches the LightningModule while it is fitted.

    Numbers go to the trainer's loggers: to W&B as always, to TensorBoard's writer, and
    to any other by its ``log_metrics``. The trainer's checkpoints hold the state.

    Args:
        arguments: Of :func:`gradwatch.watch`.

    Raises:
        TypeError: If one of them is unknown.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self._fit = Fit(arguments)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, once the checkpoint is loaded and the model where it is trained."""
        self._fit.begin(
            pl_module,
            [sink for one in trainer.loggers for sink in _sinks(trainer, one)],
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            start_step=trainer.global_step,
        )

    def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None:
        """End where the training does."""
        self._fit.end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End before the loggers are closed."""
        self._fit.end()


def _sinks(trainer: Any, logger: Any) -> list[Sink]:
    """Return where one of the trainer's loggers has its numbers."""
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    if trainer.global_rank or "WandbLogger" in kinds:  # W&B's run is found by itself
        return []
    every = max(trainer.log_every_n_steps, 1)
    if "TensorBoardLogger" in kinds:
        return [TensorBoard(logger.experiment, every=every)]
    return [Scalars(logger.log_metrics, every=every)]
