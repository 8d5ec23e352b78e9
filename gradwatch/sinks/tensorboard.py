"""Scalars into a SummaryWriter that the user made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import numpy as np

from gradwatch import console
from gradwatch.block import Block
from gradwatch.metrics import PREFIX
from gradwatch.record import Alert, StepRecord, printable
from gradwatch.sinks.pictures import Pictures, Shown
from gradwatch.sinks.scalars import Scalars

_CLOSING_S: Final = 5.0
"""Seconds that the last picture may take."""


@final
class TensorBoard:
    """Writes records into a ``torch.utils.tensorboard.SummaryWriter``.

    Args:
        writer: The user's writer; it is flushed at close and never closed.
        every: Steps that are folded into one point: the last value, for gradient norms
            the largest.

    Raises:
        TypeError: If ``writer`` has no ``add_scalar``.
    """

    def __init__(self, writer: Any, *, every: int = 10, pictures: bool = True) -> None:
        if not hasattr(writer, "add_scalar"):
            raise TypeError(
                f"TensorBoard() got a {type(writer).__name__}; expected a "
                "torch.utils.tensorboard.SummaryWriter (or its like with add_scalar)."
            )
        self._writer = writer
        self._scalars = Scalars(self._send, every=max(int(every), 1))
        shows = pictures and hasattr(writer, "add_image")
        self._pictures = Pictures(console.report) if shows else None

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Take one record in; alerts become text at once."""
        self._scalars.write(record)
        for alert in alerts:
            text = printable(alert.message, lines=True)
            self._writer.add_text(f"gradwatch/{alert.kind}", text, alert.step)
        if self._pictures is not None:
            self._pictures.take(record, [a for a in alerts if a.severity != "info"])
            if (shown := self._pictures.ready()) is not None:
                self._show(shown)

    def write_block(self, block: Block) -> None:
        """Take plain rows in."""
        self._scalars.write_block(block)

    def _send(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def _show(self, shown: Shown) -> None:
        pixels = np.asarray(shown.image.convert("RGB"))
        key = f"{PREFIX}/flow"
        self._writer.add_image(key, pixels, shown.step, dataformats="HWC")

    def close(self) -> None:
        """Write what is folded and the last picture, and flush. Safe to call twice."""
        self._scalars.close()
        if self._pictures is not None:
            for shown in self._pictures.last(_CLOSING_S):
                self._show(shown)
            self._pictures = None
        self._writer.flush()
