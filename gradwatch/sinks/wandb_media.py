"""What a W&B run gets beside numbers: pictures, a table of alarms, the report.

The table is HTML: one of W&B's own is an artifact, and making one waits for the server,
for as long as that cannot be reached.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from gradwatch.block import Block
from gradwatch.metrics import PREFIX, STEP_KEY
from gradwatch.record import Alert, StepRecord, printable
from gradwatch.sinks.pictures import Pictures, Shown

FLOW: Final = f"{PREFIX}/media/flow"
ALARMS: Final = f"{PREFIX}/media/alarms"
REPORT: Final = f"{PREFIX}/media/report"
HEAD: Final = ("step", "since", "kind", "severity", "cause", "streams", "message")
_ROWS: Final = 100


class Media:
    """What one run gets; each thing is logged once, into the row that is to come.

    Args:
        run: The run.
        tell: Told once where no picture can be drawn.
        commit: Whether each thing is a row of its own.
        whole: Whether it gets more than the report.
    """

    def __init__(
        self, run: Any, tell: Callable[[str], None], *, commit: bool, whole: bool
    ) -> None:
        self._run, self._commit = run, commit
        self._pictures = Pictures(tell) if whole else None
        self._rows: list[str] = []
        self._at = 0
        self._defined: set[str] = set()

    def take(self, part: StepRecord | Block, alarms: Sequence[Alert]) -> None:
        """Take in what came; log the table of alarms, and a picture that is ready."""
        self._at = part.steps[-1] if isinstance(part, Block) else part.step
        if self._pictures is None:
            return
        self._pictures.take(part, alarms)
        if alarms and len(self._rows) < _ROWS:
            self._rows += map(_row, alarms)
            self._log({ALARMS: self._html(_table(self._rows))}, self._at)
        if (shown := self._pictures.ready()) is not None:
            self._show(shown)

    def finish(self, page: str | None, seconds: float) -> None:
        """Log the report where there is one, and the last picture if there is time."""
        if page is not None:
            self._log({REPORT: self._html(page)}, self._at)
        if self._pictures is not None:
            for shown in self._pictures.last(seconds):
                self._show(shown)

    def _show(self, shown: Shown) -> None:
        image = self._wandb.Image(shown.image, caption=printable(shown.title))
        self._log({FLOW: image}, shown.step)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        for key in values.keys() - self._defined:
            self._run.define_metric(key, step_metric=STEP_KEY)
            self._defined.add(key)
        own = {STEP_KEY: step} if self._commit else {}  # else that of the row
        self._run.log({**values, **own}, commit=self._commit)

    def _html(self, page: str) -> Any:
        return self._wandb.Html(page, inject=False)

    @property
    def _wandb(self) -> Any:
        return sys.modules["wandb"]  # whose run this is


def _row(alert: Alert) -> str:
    told = (
        alert.step,
        alert.since,
        alert.kind,
        alert.severity,
        alert.cause or "",
        ", ".join(alert.streams),
        alert.message,
    )
    cells = (html.escape(printable(cell, lines=True)) for cell in told)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _table(rows: Sequence[str]) -> str:
    """Return the alarms so far as a page."""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    return (
        "<!doctype html><meta charset=utf-8><style>body{font:14px sans-serif}"
        "td,th{text-align:left;vertical-align:top;padding:.2em .8em .2em 0;"
        "border-bottom:1px solid #ccc}td:last-child{white-space:pre-wrap}</style>"
        f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    )
