"""The open step: what was read and launched of it so far, until the clock closes it."""

from __future__ import annotations

from collections.abc import Collection

from gradwatch.clock import Closed
from gradwatch.depths.gradients import Gradients
from gradwatch.depths.launch import Launcher
from gradwatch.depths.measured import Loss, Parts, Sampled
from gradwatch.depths.reach import Rates
from gradwatch.depths.reader import Reader


class OpenStep:
    """Collects what is measured of a step while it is open.

    Args:
        reader: Reads the gradients.
        launcher: Launches what else is due.
    """

    def __init__(self, reader: Reader, launcher: Launcher) -> None:
        self.sampled: Sampled | None = None
        """What was launched; None where nothing was due."""
        self._reader, self._launcher = reader, launcher
        self.aside: tuple[Gradients, Sampled | None] | None = None
        """What was read and launched of a step that may turn out to be one."""
        self._loss: Loss = None
        self._next_loss: Loss = None

    def log(self, loss: Loss, *, used: bool) -> None:
        """Take a loss: of the next step, where this one has been used."""
        if used:
            self._next_loss = loss
        else:
            self._loss = loss

    def launch(self, number: int, called: Collection[int]) -> None:
        """Launch what is due, once a backward pass has ended."""
        self.sampled = self._launcher.launch(number, self.sampled, called)

    def set_aside(self, rates: Rates | None) -> None:
        """Put the step aside: it may turn out to be one."""
        self.aside = self._reader.set_aside(), self._complete(rates)

    def forget_aside(self) -> None:
        """Forget what was set aside: it was no step."""
        self.aside = None

    def drop(self) -> None:
        """Forget the step: it was none."""
        self._reader.drop()
        self.sampled = None

    def _complete(self, rates: Rates | None) -> Sampled | None:
        """Return what was launched, with what is known at the end of the step."""
        sampled, self.sampled = self.sampled, None
        if sampled is not None:
            self._launcher.complete(sampled, rates)
        return sampled

    def close(self, closed: Closed, rates: Rates | None) -> Parts:
        """Return what was measured of a step that is over; begin anew.

        Args:
            closed: The step.
            rates: Learning rates of what optimizers hold; None while none was seen.
        """
        loss, self._loss, self._next_loss = self._loss, self._next_loss, None
        if closed.candidate and self.aside is not None:
            gradients, sampled = self.aside
            self._reader.complete(gradients, ())
        else:
            gradients = self._reader.take(closed.stepped)
            sampled = self._complete(rates)
        return Parts(gradients, self._reader.layout, sampled, loss)

    def who_skipped(self, closed: Closed) -> str:
        """Return who left gradients unused; empty where an optimizer used them."""
        if closed.skipped != "unused":
            return closed.skipped
        if self._reader.scaler is not None:
            return "scaler"
        return "unknown" if closed.early else "user"  # a scaler that nobody has named?
