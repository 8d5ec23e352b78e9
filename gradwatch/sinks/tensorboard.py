"""Scalars into a SummaryWriter that the user made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from gradwatch.block import Block
from gradwatch.record import Alert, StepRecord, printable
from gradwatch.sinks.fold import Fold


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

    def __init__(self, writer: Any, *, every: int = 10) -> None:
        if not hasattr(writer, "add_scalar"):
            raise TypeError(
                f"TensorBoard() got a {type(writer).__name__}; expected a "
                "torch.utils.tensorboard.SummaryWriter (or its like with add_scalar)."
            )
        self._writer = writer
        self._size = max(int(every), 1)
        self._fold = Fold()

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Take one record in; alerts become text at once."""
        self._fold.add(record)
        for alert in alerts:
            text = printable(alert.message, lines=True)
            self._writer.add_text(f"gradwatch/{alert.kind}", text, alert.step)
        if self._fold.count >= self._size:
            self._send()

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

    def close(self) -> None:
        """Write what is folded and flush. Safe to call twice."""
        if self._fold.count:
            self._send()
            self._writer.flush()
