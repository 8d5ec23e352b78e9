"""Pictures of the flow for sinks that show images, drawn beside the training.

One is drawn at an alarm, at most one at a time, and one at the end. Without the extra
``plot`` there are none.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from gradwatch.block import Block
from gradwatch.plot.history import History
from gradwatch.record import Alert, StepRecord
from gradwatch.report.drawing import DrawingError, Picture, can_draw

_MOST: Final = 20
"""Pictures of a run, but for the last one."""
_PATIENCE_S: Final = 20.0


class Shown(NamedTuple):
    """A picture that has been drawn.

    Attributes:
        step: The step at which it was asked for.
        title: What was found.
        image: As PIL has it.
    """

    step: int
    title: str
    image: Any


class Pictures:
    """Draws the flow of one run at alarms, and at its end.

    Args:
        tell: Told once where none can be drawn.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._history = History()
        self._tell = tell
        self._pending: tuple[int, Picture] | None = None
        self._drawn = 0
        self._able = can_draw()
        self._last: tuple[int, Sequence[str]] = (0, ())

    def take(self, part: StepRecord | Block, alerts: Sequence[Alert]) -> None:
        """Take in what was measured; an alarm begins a picture."""
        if not self._able or isinstance(part, Block):  # plain rows have no flow
            return
        self._history.add(part)
        streams = [name for alert in alerts for name in alert.streams]
        self._last = part.step, streams or self._last[1]
        if alerts and self._pending is None and self._drawn < _MOST:
            self._begin(part.step, streams)

    def _begin(self, step: int, streams: Sequence[str]) -> None:
        if self._history.empty:
            return
        _, chart, title = self._history.picture(streams)
        try:
            self._pending = step, Picture(chart, title)
        except DrawingError as error:
            self._give_up(error)
        self._drawn += 1

    def ready(self) -> Shown | None:
        """Return a picture that has been drawn since the last call, or None."""
        if self._pending is None or not self._pending[1].ready:
            return None
        return self._finished(_PATIENCE_S, tell=True)

    def last(self, seconds: float) -> Iterator[Shown]:
        """Yield what is left to show at the end: what is being drawn, and all of it.

        Args:
            seconds: That may pass: a program is not kept from its end.
        """
        end = time.monotonic() + seconds
        for late in (False, True):
            if late and self._able:
                self._begin(*self._last)
            if self._pending is None:
                continue
            shown = self._finished(max(end - time.monotonic(), 0.0), tell=False)
            if shown is not None:
                yield shown

    def _finished(self, seconds: float, *, tell: bool) -> Shown | None:
        from PIL import Image

        assert self._pending is not None
        (step, picture), self._pending = self._pending, None
        try:
            drawn = picture.png(seconds)
        except DrawingError as error:
            self._able = False
            if tell:
                self._give_up(error)
            return None
        image = Image.open(io.BytesIO(drawn))
        image.load()
        return Shown(step, picture.title, image)

    def _give_up(self, error: DrawingError) -> None:
        self._able = False
        self._tell(f"{error} Nothing else is affected.")
