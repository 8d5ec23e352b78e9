"""The open step: what was read and launched of it so far, until the clock closes it."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from gradwatch.clock import Closed
from gradwatch.depths.launch import Launcher
from gradwatch.depths.measured import Parts, Sampled
from gradwatch.depths.reader import Reader
from gradwatch.hooks.optimizers import Training
from gradwatch.hooks.roots import Loss, Roots


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
        self._aside: Parts | None = None
        self._found: Loss = None
        self._passes = 0  # that are in it
        self._loss: Loss = None
        self._loss_since: Loss = None  # logged after the last pass has ended
        self._next_loss: Loss = None  # logged after an optimizer has stepped
        self.has_ended = False
        """Whether a backward pass of it has."""
        self.has_loss = False
        """Whether any loss that was logged waits for a step."""

    def log(self, loss: float | Tensor, *, used: bool) -> bool:
        """Take a loss; of the next step, if this one has been used.

        Returns:
            Whether it is on its way from an accelerator: it is not waited for.
        """
        if isinstance(loss, Tensor):
            loss = loss.detach().reshape(())
            loss = float(loss) if loss.device.type == "cpu" else loss
        self.has_loss = True
        if used:
            self._next_loss = loss
        elif self.has_ended:
            self._loss_since = loss
        else:
            self._loss = loss
        return isinstance(loss, Tensor)

    def found_by(self, roots: Roots, *, kept: bool) -> None:
        """Take what was found of a backward pass; see :meth:`found`."""
        if roots.broken and not self._reader.gradients.broken:
            self._reader.gradients.broken = roots.broken
        self.found(roots.loss, kept=kept)

    def found(self, loss: Loss, *, kept: bool = True) -> None:
        """Take the loss that a backward pass was called on.

        The step's is the sum of those whose gradients it uses; unknown, if one is.

        Args:
            loss: What was found; None: it cannot be told.
            kept: Whether the gradients of the passes before this one are still there.
        """
        self._passes = self._passes + 1 if kept else 1
        if self._passes > 1:
            known = self._found
            loss = None if loss is None or known is None else known + loss
        self._found = loss

    @property
    def has_found(self) -> bool:
        """Whether a backward pass of the open step was seen to be called."""
        return self._passes > 0

    def ended(self) -> None:
        """Note that a backward pass has ended: a loss before it is of this step."""
        if self._loss_since is not None:
            self._loss, self._loss_since = self._loss_since, None
        self.has_ended = True

    def used_again(self) -> None:
        """Note that one more optimizer steps: a loss before it is of this step."""
        if self._next_loss is not None:
            self._loss_since, self._next_loss = self._next_loss, None

    def launch(self, number: int, called: Collection[int]) -> None:
        """Launch what is due, once a backward pass has ended."""
        self.sampled = self._launcher.launch(number, self.sampled, called)

    def _complete(self, training: Training | None) -> Sampled | None:
        """Return what was launched, with what is known at the end of the step."""
        sampled, self.sampled = self.sampled, None
        if sampled is not None:
            sampled.passes = self._passes
            updated = self._reader.updated() if training is not None else []
            self._launcher.complete(sampled, training, updated)
        return sampled

    def set_aside(self, training: Training | None) -> None:
        """Set the step aside: it is one if updates turn out to be hand-written."""
        sampled = self._complete(training)
        gradients, layout = self._reader.set_aside(), self._reader.layout
        loss = self.take_loss(used=False)
        self._aside = Parts(gradients, layout, sampled, *loss)

    def drop(self) -> None:
        """Forget the step: it was none."""
        self._reader.drop()
        self.take_loss(used=False)
        self.sampled = None

    def close(self, closed: Closed, training: Training | None) -> Parts:
        """Return what was measured of a step that is over; begin again.

        Args:
            closed: The step.
            training: How parameters are trained; None while no optimizer was seen.
        """
        aside, self._aside = self._aside, None  # if it is not this one, it was none
        if closed.aside and aside is not None:
            self._reader.complete(aside.gradients, (), closed.number)
            return aside
        sampled = self._complete(training)
        loss = self.take_loss(used=bool(closed.stepped))
        gradients = self._reader.take(closed.stepped, closed.number)
        return Parts(gradients, self._reader.layout, sampled, *loss)

    def take_loss(self, *, used: bool) -> tuple[Loss, bool]:
        """Return the loss of the step that is over, and whether it was found.

        What was found counts, but for a loss that was logged after the step's last
        backward and before the optimizer. Where none was found: if optimizers have used
        the step's gradients, it is the last one that was logged before that; else the
        step has closed at the next backward, and what was logged since its own is the
        next step's, unless nothing was logged before.
        """
        found, loss, since = self._found, self._loss, self._loss_since
        self._found, self._passes = None, 0
        self._loss = self._next_loss
        if since is not None and (used or loss is None):
            loss = since
        elif self._loss is None:
            self._loss = since
        self._loss_since = self._next_loss = None
        self.has_ended, self.has_loss = False, self._loss is not None
        if found is not None and not (used and since is not None):
            return found, True
        return loss, False

    def who_skipped(self, closed: Closed) -> str:
        """Return who left gradients unused; empty where an optimizer used them."""
        if closed.skipped != "unused":
            return closed.skipped
        if self._reader.scaler is not None:
            return "scaler"
        return "unknown" if closed.early else "user"  # a scaler that nobody has named?
