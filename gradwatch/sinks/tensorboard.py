"""Scalars into a SummaryWriter that the user made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, final

import numpy as np

from gradwatch import console
from gradwatch.block import Block
from gradwatch.metrics import PREFIX
from gradwatch.record import Alert, StepRecord, printable
from gradwatch.sinks.fold import Fold
from gradwatch.sinks.pictures import Pictures, Shown

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
        self._size = max(int(every), 1)
        self._fold = Fold()
        shows = pictures and hasattr(writer, "add_image")
        self._pictures = Pictures(console.report) if shows else None

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Take one record in; alerts become text at once."""
        self._fold.add(record)
        for alert in alerts:
            text = printable(alert.message, lines=True)
            self._writer.add_text(f"gradwatch/{alert.kind}", text, alert.step)
        if self._fold.count >= self._size:
            self._send()
        if self._pictures is not None:
            self._pictures.take(record, [a for a in alerts if a.severity != "info"])
            if (shown := self._pictures.ready()) is not None:
                self._show(shown)

    def write_block(self, block: Block) -> None:
        """Take plain rows in."""
        first = 0
        for after in range(1, len(block) + 1):
            if self._fold.count + after - first >= self._size:
                self._fold.add_rows(block, first, after)
                self._send()
                first = after
        if first < len(block):
            self._fold.add_rows(block, first, len(block))

    def _send(self) -> None:
        for key, value in self._fold.envelope().items():
            self._writer.add_scalar(key, value, self._fold.step)
        self._fold.clear()

    def _show(self, shown: Shown) -> None:
        pixels = np.asarray(shown.image.convert("RGB"))
        key = f"{PREFIX}/flow"
        self._writer.add_image(key, pixels, shown.step, dataformats="HWC")

    def close(self) -> None:
        """Write what is folded and the last picture, and flush. Safe to call twice."""
        if self._fold.count:
            self._send()
        if self._pictures is not None:
            for shown in self._pictures.last(_CLOSING_S):
                self._show(shown)
            self._pictures = None
        self._writer.flush()
