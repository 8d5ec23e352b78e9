"""What one W&B run gets: folded rows with their own x axis, and few alerts.

wandb merges what is logged with ``commit=False`` into the row that the user commits
next, and a later value replaces an earlier one. So a row that waits for the commit is
sent again and again with all that it holds, and a new one begins once it is gone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from gradwatch.block import Block
from gradwatch.kinds.catalogue import title
from gradwatch.metrics import PREFIX, STEP_KEY
from gradwatch.record import Alert, StepRecord, printable
from gradwatch.sinks.fold import Fold

LEVELS: Final = {"warning": "WARN", "error": "ERROR"}
"""Severities that W&B is told of, and what it calls them."""

_ROW_STEPS: Final = 10
_SILENT_STEPS: Final = 200
_ALERT_GAP_S: Final = 30 * 60
_ALERTS_A_RUN: Final = 20
_HINT: Final = (
    f"the W&B run has not moved for {_SILENT_STEPS} steps, so rows wait for your next "
    "run.log; if you log seldom and never pass step=, use "
    "gradwatch.watch(model, wandb=gradwatch.sinks.Wandb(commit=True))."
)


def finished(run: Any) -> bool:
    """Tell whether the user has finished a run; wandb raises from then on."""
    return bool(getattr(run, "_is_finished", False))


class Item(NamedTuple):
    """A record, or a block of plain ones, on its way to the worker.

    ``number`` counts the records put, and ``at`` is the run's own step, read after
    that number was taken: what the user had committed when the record was put.
    """

    run: Any
    number: int
    at: int | None
    part: StepRecord | Block
    alerts: tuple[Alert, ...]

    @property
    def steps(self) -> Sequence[int]:
        """The steps that it has records of."""
        part = self.part
        return [part.step] if isinstance(part, StepRecord) else part.steps


class Rows:
    """The rows and alerts of one run: folded, named, and no more than it can use.

    Args:
        first: The first record for the run.
        keys: The metric keys to send, or None for all.
        config: What goes into ``run.config``.
        commit: Whether each row is a row of its own.
        put: Returns how many records the training thread has put so far.
        clock: Returns seconds, for the rate of alerts.
    """

    def __init__(
        self,
        first: Item,
        *,
        keys: Container[str] | None,
        config: Mapping[str, Any],
        commit: bool,
        put: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self.run = first.run
        self.failures = 0
        self._config, self._commit = config, commit
        self._put, self._clock = put, clock
        self._waiting, self._fresh = Fold(keys), Fold(keys)
        self._alarms: deque[Alert] = deque()
        self._at = first.at
        self._sent = 0
        self._settled: int | None = None
        self._began = first.steps[0]
        self._moved_at: int | None = None
        self._row_at = self._began - _ROW_STEPS
        self._defined: set[str] = set()
        self._last_alert: dict[str, float] = {}
        self._alerts = 0
        self._held_back: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """How many records and alerts have not reached the run for sure."""
        return self._waiting.count + self._fresh.count + len(self._alarms)

    def take(self, item: Item) -> str | None:
        """Take in what has come, and send what is due; return a line to tell."""
        due, first = self._follow(item) and not self._commit, 0
        self._alarms.extend(item.alerts)
        try:
            for after, step in enumerate(item.steps, 1):
                if self._alarms or due or step - self._row_at >= _ROW_STEPS:
                    self._fold(item.part, first, after)
                    due, first = False, after
                    self.send()
        finally:  # what wandb raises takes no later row of the block with it
            if first < len(item.steps):
                self._fold(item.part, first, len(item.steps))
        since = self._began if self._moved_at is None else self._moved_at
        silent = item.steps[-1] - since >= _SILENT_STEPS and item.at is not None
        return _HINT if silent else None

    def _fold(self, part: StepRecord | Block, first: int, after: int) -> None:
        if isinstance(part, StepRecord):
            self._fresh.add(part)
        else:
            self._fresh.add_rows(part, first, after)

    def _follow(self, item: Item) -> bool:
        """See what the user has committed; tell whether a row is due because of it.

        A commit seen just after a row went out may have come before that row: only
        once that has settled does a commit take the row along for sure. Until one
        has, the next row holds all that this one did, so that no peak is lost.
        """
        if self._sent and item.number > self._sent:
            if self.unsettled:
                self.settle(item.at)
            elif item.at != self._settled:
                self._waiting.clear()
                self._sent = 0
        if item.at == self._at:
            return False
        before, self._at, self._moved_at = self._moved_at, item.at, item.steps[0]
        # To users who log seldom a row is sent just after each commit, so that none
        # is sent at the very moment of the next.
        return before is None or item.steps[0] - before >= _ROW_STEPS

    @property
    def unsettled(self) -> bool:
        """Whether a row went out and what was committed before it is not yet known."""
        return self._sent > 0 and self._settled is None

    def settle(self, at: int | None) -> None:
        """Learn the run's own step at which the row that went out waits."""
        self._settled = at

    def send(self) -> None:
        """Send alerts, and the folded row; until a commit, a later one replaces it."""
        if finished(self.run):
            return
        while self._alarms:
            self._alert(self._alarms[0])
            self._alarms.popleft()
            self.failures = 0
        if not self._fresh.count:
            return
        self._waiting.absorb(self._fresh)
        self._fresh.clear()
        step, values = self._waiting.step, self._waiting.envelope()
        self._row_at = step
        self._define(values)
        self.run.log({**values, STEP_KEY: step}, commit=self._commit)
        self.failures = 0
        self._sent, self._settled = self._put(), None
        if self._commit or self._at is None:
            self._waiting.clear()
            self._sent = 0

    def _define(self, keys: Iterable[str]) -> None:
        """Name the x axis of every key in full; send the settings with the first."""
        if not self._defined:
            self.run.define_metric(STEP_KEY, hidden=True)
            if self._config:
                self.run.config.update(
                    {PREFIX: dict(self._config)}, allow_val_change=True
                )
            self._defined.add(STEP_KEY)
        for key in keys:
            if key not in self._defined:
                self.run.define_metric(
                    key, step_metric=STEP_KEY, summary="min,max,last"
                )
                self._defined.add(key)

    def _alert(self, alert: Alert) -> None:
        now, last = self._clock(), self._last_alert.get(alert.kind)
        early = last is not None and now - last < _ALERT_GAP_S
        if early or self._alerts >= _ALERTS_A_RUN:
            self._held_back[alert.kind] += 1
            return
        text = printable(alert.message, lines=True)
        if held := self._held_back[alert.kind]:
            text += f"\n({held} more of this kind were held back before)"
        if alert.streams:
            text += f"\nstreams: {', '.join(alert.streams)}"
        if not getattr(self.run, "offline", True) and getattr(self.run, "url", None):
            text += f"\n{self.run.url}"
        self.run.alert(title(alert.kind), text, level=LEVELS[alert.severity])
        self._held_back[alert.kind] = 0
        self._last_alert[alert.kind] = now
        self._alerts += 1
