"""Rows and alerts into the user's W&B run, without touching the user's own rows.

Rows are logged with ``commit=False``, never with ``step=``, and with their own x axis:
any other way destroys or misplaces the user's rows. Every call into wandb is made by
one daemon thread behind a bounded queue, because wandb can block for half a minute or
for ever; wandb itself is never imported here.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, final

from gradwatch.metrics import STEP_KEY, headline_keys
from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.rules.text import title
from gradwatch.sinks.fold import Fold

_QUEUE: Final = 1000
_ROW_STEPS: Final = 10
_REFRESH_STEPS: Final = 50
"""Steps after which a row that waits for the user's commit is brought up to date."""
_FAILURES: Final = 3
_JOIN_S: Final = 2.0
_STREAMS: Final = 8
_SILENT_STEPS: Final = 200
_ALERT_GAP_S: Final = 30 * 60
_ALERTS_A_RUN: Final = 20
_LEVELS: Final = {"warning": "WARN", "error": "ERROR"}


def active_run() -> Any | None:
    """Return the W&B run of this process, without importing wandb; None if none is."""
    module = sys.modules.get("wandb")
    return getattr(module, "run", None) if module is not None else None


@final
class Wandb:
    """Sends records to a W&B run.

    Args:
        run: A run, or None for whichever is active at each row.
        keys: ``headline``: the unsuffixed keys that the catalogue names, of the first
            8 streams; ``all``: every key.
        commit: Whether each row is a row of its own. Only for users who never pass
            ``step=`` to ``run.log`` and log seldom.

    Raises:
        ValueError: If ``keys`` is neither ``headline`` nor ``all``.
        TypeError: If ``run`` has no ``log``.
    """

    def __init__(
        self,
        run: Any | None = None,
        *,
        keys: Literal["headline", "all"] = "headline",
        commit: bool = False,
    ) -> None:
        if keys not in ("headline", "all"):
            raise ValueError(f'keys is {keys!r}; expected "headline" or "all".')
        if run is not None and not hasattr(run, "log"):
            raise TypeError(
                f"Wandb() got a {type(run).__name__} as run; expected what "
                "wandb.init() returned, or None for the active run."
            )
        self._run = run
        self._keys = keys
        self._commit = commit
        self._chosen: frozenset[str] | None = None
        self._notify: Callable[[str], None] = lambda line: None
        self._config: dict[str, Any] = {}
        self._clock = time.monotonic
        self._queue: queue.Queue[tuple[Any, StepRecord | None, tuple[Alert, ...]]]
        self._queue = queue.Queue(_QUEUE)
        self._worker: threading.Thread | None = None
        self._pid = os.getpid()
        self._closed = False
        self.dropped = 0
        self._broken = self._stuck = False
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # From here on: the worker's alone.
        self._fold = Fold()
        self._current: Any = None
        self._defined: set[str] = set()
        self._at: Any = None
        self._moved_at = 0
        self._row_at = 0
        self._sent = False
        self._hinted = False
        self._failures = 0
        self._last_alert: dict[str, float] = {}
        self._given: Counter[str] = Counter()
        self._held_back: Counter[str] = Counter()

    def attach(
        self,
        streams: Sequence[Stream],
        config: dict[str, Any],
        notify: Callable[[str], None],
    ) -> None:
        """Learn the streams, the settings for ``run.config``, and whom to tell."""
        self._notify, self._config = notify, config
        if self._keys == "headline":
            self._chosen = frozenset(headline_keys(streams[:_STREAMS]))
            if len(streams) > _STREAMS:
                notify(
                    f"W&B gets the first {_STREAMS} of {len(streams)} streams; for all: "
                    'wandb=gradwatch.sinks.Wandb(keys="all").'
                )

    @property
    def queued(self) -> int:
        """How many records wait to be sent."""
        return self._queue.qsize()

    # ---- the training thread: put, and never wait

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Queue one record for the active run, if there is one."""
        while not self._lines.empty():
            self._notify(self._lines.get())
        if self._closed or self._broken or os.getpid() != self._pid:
            return
        run = self._run if self._run is not None else active_run()
        if run is None or getattr(run, "_is_finished", False):
            return
        item = (run, record, tuple(a for a in alerts if a.severity in _LEVELS))
        while True:
            try:
                self._queue.put_nowait(item)
                break
            except queue.Full:
                try:
                    self._queue.get_nowait()  # the oldest goes
                    self.dropped += 1
                except queue.Empty:
                    continue
        if self._worker is None and not sys.is_finalizing():
            self._worker = threading.Thread(
                target=self._work, name="gradwatch-wandb", daemon=True
            )
            self._worker.start()

    def flush(self, timeout: float = _JOIN_S) -> None:
        """Wait until everything queued was handed to wandb, for a bounded time."""
        end = time.monotonic() + timeout
        alive = self._worker is not None and self._worker.is_alive()
        if alive and not self._stuck:  # a stuck service is waited for once
            marked = threading.Event()
            try:
                self._queue.put((marked, None, ()), timeout=timeout)
            except queue.Full:
                self._stuck = True
                return
            self._stuck = not marked.wait(max(end - time.monotonic(), 0.0))
        while not self._lines.empty():
            self._notify(self._lines.get())

    def close(self) -> None:
        """Send what is queued, for two seconds at most. Safe to call twice."""
        if self._closed or os.getpid() != self._pid:
            return
        self.flush()
        self._closed = True
        worker, self._worker = self._worker, None
        if worker is not None:
            try:
                self._queue.put_nowait((None, None, ()))
            except queue.Full:
                return  # wandb is stuck; the thread is a daemon and ends with us
            worker.join(_JOIN_S)

    # ---- the worker: all calls into wandb

    def _work(self) -> None:
        while True:
            run, record, alerts = self._queue.get()
            if run is None:
                return
            try:
                if record is None:
                    self._send()
                    self._failures = 0
                elif not self._broken:
                    self._take(run, record, alerts)
                    self._failures = 0
            except Exception as error:  # whatever wandb raises, training goes on
                self._failed(error)
            finally:
                self._stuck = False
                if isinstance(run, threading.Event):
                    run.set()

    def _failed(self, error: Exception) -> None:
        self.dropped += 1
        self._failures += 1
        if self._failures == _FAILURES and not self._broken:
            self._broken = True
            self._lines.put(
                f"W&B failed {_FAILURES} times ({type(error).__name__}: {error}); "
                "nothing more is sent to it. The records stay in the run folder."
            )

    def _take(self, run: Any, record: StepRecord, alerts: Sequence[Alert]) -> None:
        if run is not self._current:
            self._begin(run, record.step)
        elif self._sent and getattr(run, "_local_step", None) != self._at:
            self._fold.clear()  # the user's commit took our row along: start anew
            self._sent = False
            self._moved_at = record.step
        self._fold.add(record)
        for alert in alerts:
            self._alert(run, alert)
        still = record.step - self._moved_at
        if still >= _SILENT_STEPS and not self._commit:
            self._hint()
        rest = _ROW_STEPS if self._commit or not self._sent else _REFRESH_STEPS
        if alerts or record.step - self._row_at >= rest:
            self._send()

    def _begin(self, run: Any, step: int) -> None:
        """Start with a run: its x axis and the settings; one run after the other."""
        self._current, self._defined = run, set()
        self._fold.clear()
        self._at = getattr(run, "_local_step", None)
        self._moved_at = self._row_at = step
        self._sent = False
        run.define_metric(STEP_KEY, hidden=True)
        if self._config:
            run.config.update({"gradwatch": self._config}, allow_val_change=True)

    def _send(self) -> None:
        """Log the folded row; until the user commits, a later one replaces it."""
        run, fold = self._current, self._fold
        if run is None or not fold.count or getattr(run, "_is_finished", False):
            return
        values = dict(fold.envelope())
        if self._chosen is not None:
            values = {k: v for k, v in values.items() if k in self._chosen}
        for key in values:
            if key not in self._defined:
                run.define_metric(key, step_metric=STEP_KEY, summary="min,max,last")
                self._defined.add(key)
        self._at, self._row_at = getattr(run, "_local_step", None), fold.step
        run.log({**values, STEP_KEY: fold.step}, commit=self._commit)
        self._sent = not self._commit
        if self._commit:
            fold.clear()

    def _hint(self) -> None:
        if not self._hinted:
            self._hinted = True
            self._lines.put(
                f"the W&B run has not moved for {_SILENT_STEPS} steps, so rows wait "
                "for your next run.log; if you log seldom and never pass step=, use "
                "gradwatch.watch(model, wandb=gradwatch.sinks.Wandb(commit=True))."
            )

    def _alert(self, run: Any, alert: Alert) -> None:
        now, last = self._clock(), self._last_alert.get(alert.kind)
        if (last is not None and now - last < _ALERT_GAP_S) or (
            self._given.total() >= _ALERTS_A_RUN
        ):
            self._held_back[alert.kind] += 1
            return
        text = alert.message
        if held := self._held_back.pop(alert.kind, 0):
            text += f"\n({held} more of this kind were held back before)"
        if alert.streams:
            text += f"\nstreams: {', '.join(alert.streams)}"
        if not getattr(run, "offline", True) and getattr(run, "url", None):
            text += f"\n{run.url}"
        run.alert(title(alert.kind), text, level=_LEVELS[alert.severity])
        self._last_alert[alert.kind] = now
        self._given[alert.kind] += 1
