"""Rows and alerts into the user's W&B run, without touching the user's own rows.

Rows are logged with ``commit=False``, never with ``step=``, and with their own x axis:
any other way destroys or misplaces the user's rows. Every call into wandb is made by
one daemon thread behind a bounded queue, because wandb can block for half a minute or
for ever; wandb itself is never imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, final

from gradwatch.block import Block
from gradwatch.metrics import headline_keys
from gradwatch.record import Alert, StepRecord, Stream
from gradwatch.report.drawing import renderer
from gradwatch.sinks.wandb_media import Media
from gradwatch.sinks.wandb_rows import LEVELS, Item, Rows, finished

_QUEUE: Final = 1000
_FAILURES: Final = 3
_JOIN_S: Final = 2.0
_LEAST_S: Final = 0.1
_SETTLE_S: Final = 0.01
"""Twice what a thread may wait for the interpreter: an earlier commit shows by then."""
_STREAMS: Final = 8
_SLOW: Final = (
    "W&B is not accepting data fast enough; the oldest records are dropped. "
    "Training and the run folder are not affected."
)


def active_run() -> Any | None:
    """Return the W&B run of this process, without importing wandb; None if none is."""
    module = sys.modules.get("wandb")
    return getattr(module, "run", None) if module is not None else None


def destination() -> str:
    """Return what becomes of the records, in words."""
    run = active_run()
    if run is None:
        return "on when a run starts"
    if getattr(run, "disabled", False):
        return "the active run is disabled, nothing is sent to it"
    return f"run {getattr(run, 'id', '?')}"


def _call_at_exit(sink_ref: weakref.ref[Wandb]) -> None:
    sink = sink_ref()
    if sink is not None:
        (sink._last_call or sink.close)()


def _own_step(run: Any) -> int | None:
    # Private, but run.step is a round trip to another process.
    step: int | None = getattr(run, "_local_step", None)
    return step


@final
class Wandb:
    """Sends records to a W&B run.

    Args:
        run: A run, or None for whichever is active at each row.
        keys: ``headline``: the unsuffixed keys that the catalogue names, of the first
            8 streams; ``all``: every key.
        commit: Whether each row is a row of its own. Only for users who never pass
            ``step=`` to ``run.log`` and log seldom.
        media: Whether it also gets a picture of the flow and a table of the alarms, at
            an alarm and at close; pictures need ``pip install 'gradwatch[plot]'``.
        report: Whether it gets the run as one page, at close.

    Attributes:
        dropped: How many records and alerts did not reach wandb.

    Raises:
        ValueError: If ``keys`` is neither ``headline`` nor ``all``.
        TypeError: If ``run`` has no ``log``.
        ModuleNotFoundError: If ``report`` is wanted and nothing can draw its charts.
    """

    def __init__(
        self,
        run: Any | None = None,
        *,
        keys: Literal["headline", "all"] = "headline",
        commit: bool = False,
        media: bool = True,
        report: bool = False,
    ) -> None:
        if keys not in ("headline", "all"):
            raise ValueError(f'keys is {keys!r}; expected "headline" or "all".')
        if run is not None and not hasattr(run, "log"):
            raise TypeError(
                f"Wandb() got a {type(run).__name__} as run; expected what "
                "wandb.init() returned, or None for the active run."
            )
        if report:
            renderer()
        self._commit, self._media, self._report = commit, media, report
        self._page: Callable[[], str | None] | None = None
        self._written: str | None = None
        self._chosen: frozenset[str] | None = None
        self._config: dict[str, Any] = {}
        self.dropped = 0
        self._put = 0
        self._run = run
        self._keys = keys
        self._streams: Sequence[Stream] = ()
        self._notify: Callable[[str], None] = lambda line: None
        self._clock = time.monotonic
        self._queue: queue.Queue[Item | threading.Event | None] = queue.Queue(_QUEUE)
        self._worker: threading.Thread | None = None
        self._pid = os.getpid()
        self._closed = self._stuck = False
        self._end = 0.0
        self._broken: Any = None
        self._rows: Rows | None = None  # the worker's alone, as the next
        self._shown: Media | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._said: set[str] = set()
        self._last_call: Callable[[], None] | None = None
        self._at_exit = functools.partial(_call_at_exit, weakref.ref(self))

    def attach(
        self,
        streams: Sequence[Stream],
        config: dict[str, Any],
        notify: Callable[[str], None],
        last_call: Callable[[], None] | None = None,
        page: Callable[[], str | None] | None = None,
    ) -> None:
        """Learn about the watch.

        Args:
            streams: What is watched.
            config: The settings for ``run.config``.
            notify: Told a line at a time, on the training thread.
            last_call: Called at exit, while wandb still takes rows; by default
                :meth:`close`. It is held as it is given, so it should be weak.
            page: Makes the report; held in the same way.
        """
        self._page = page
        self._streams, self._config, self._notify = streams, config, notify
        self._last_call = last_call
        if self._keys == "headline":
            self._chosen = frozenset(headline_keys(streams[:_STREAMS]))

    @property
    def queued(self) -> int:
        """How many records wait to be sent."""
        return self._queue.qsize()

    # ---- the training thread: put, and never wait

    def write(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Queue one record for the active run, if there is one."""
        alarms = tuple(a for a in alerts if a.severity in LEVELS)
        self._queue_up(record, 1, alarms)

    def write_block(self, block: Block) -> None:
        """Queue a block of plain rows for it."""
        self._queue_up(block, len(block), ())

    def _queue_up(
        self, part: StepRecord | Block, records: int, alarms: tuple[Alert, ...]
    ) -> None:
        self._deliver()
        if self._closed or os.getpid() != self._pid:
            return
        run = self._run if self._run is not None else active_run()
        if run is None or finished(run) or getattr(run, "disabled", False):
            return
        if run is self._broken:
            self.dropped += records + len(alarms)
            return
        self._put += 1
        self._enqueue(Item(run, self._put, _own_step(run), part, alarms))
        if self._worker is None and not sys.is_finalizing():
            self._worker = threading.Thread(
                target=self._work, name="gradwatch-wandb", daemon=True
            )
            self._worker.start()
            # wandb ends its service in an exit handler of its own, made when the run
            # began: a later one, such as this, comes before it.
            atexit.register(self._at_exit)

    def _enqueue(self, item: Item) -> None:
        while True:
            try:
                return self._queue.put_nowait(item)
            except queue.Full:
                self._lose_oldest()
                self._tell(_SLOW)

    def _lose_oldest(self) -> None:
        with contextlib.suppress(queue.Empty):  # the worker was faster
            oldest = self._queue.get_nowait()
            if isinstance(oldest, Item):
                self.dropped += len(oldest.steps) + len(oldest.alerts)

    def _tell(self, line: str) -> None:
        """Have a line told on the training thread, once."""
        if line not in self._said:
            self._said.add(line)
            self._lines.put(line)

    def _deliver(self) -> None:
        while not self._lines.empty():
            self._notify(self._lines.get())

    def flush(self, timeout: float = _JOIN_S) -> None:
        """Wait until everything queued was handed to wandb, for a bounded time."""
        end = time.monotonic() + timeout
        alive = self._worker is not None and self._worker.is_alive()
        if alive and not self._stuck:  # a stuck service is waited for once
            marked = threading.Event()
            try:
                self._queue.put(marked, timeout=timeout)
                self._stuck = not marked.wait(max(end - time.monotonic(), 0.0))
            except queue.Full:
                self._stuck = True
        self._deliver()

    def close(self) -> None:
        """Send what is queued, for two seconds at most. Safe to call twice."""
        if self._closed or os.getpid() != self._pid:
            return
        self.flush()
        rows = self._rows  # the worker has nothing left to do
        alive = rows is not None and not finished(rows.run) and not self._stuck
        if self._report and self._page is not None and alive:
            self._written = self._page()
        self._end = time.monotonic() + _JOIN_S - _LEAST_S
        self._closed = True
        atexit.unregister(self._at_exit)
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if self._stuck:  # the thread is a daemon and ends with us
            while self.queued:
                self._lose_oldest()
            self._tell(_SLOW)
        self._queue.put_nowait(None)
        if not self._stuck:
            worker.join(max(self._end - time.monotonic(), _LEAST_S))
        self._deliver()

    # ---- the worker: all calls into wandb

    def _work(self) -> None:
        while (item := self._next()) is not None:
            try:
                if isinstance(item, Item):
                    self._take(item)
                elif self._rows is not None and self._rows.run is not self._broken:
                    self._rows.send()
            except Exception as error:  # whatever wandb raises, training goes on
                self._failed(error)
            finally:
                self._stuck = False
                if isinstance(item, threading.Event):
                    item.set()
        self._finish()
        rows = self._rows
        if rows is not None and rows.failures and rows.run is not self._broken:
            self.dropped += rows.held  # no third failure, but no success either

    def _finish(self) -> None:
        """Log what comes last: the run's pictures, and its report."""
        rows, shown = self._rows, self._shown
        if rows is None or shown is None or rows.run is self._broken:
            return
        if not finished(rows.run):
            try:
                left = self._end - time.monotonic() - _LEAST_S
                shown.finish(self._written, left)
            except Exception as error:
                self._failed(error)

    def _next(self) -> Item | threading.Event | None:
        if self._rows is not None and self._rows.unsettled:
            try:
                return self._queue.get(timeout=_SETTLE_S)
            except queue.Empty:
                self._settle(self._rows)
        return self._queue.get()

    def _settle(self, rows: Rows) -> None:
        try:
            rows.settle(_own_step(rows.run))
        except Exception as error:
            self._failed(error)

    def _take(self, item: Item) -> None:
        if item.run is self._broken:
            self.dropped += len(item.steps) + len(item.alerts)
            return
        if self._rows is None or item.run is not self._rows.run:
            self._begin(item)
        assert self._rows is not None
        if finished(item.run):
            return
        if line := self._rows.take(item):
            self._tell(line)
        if self._shown is not None:
            self._shown.take(item.part, item.alerts)

    def _begin(self, first: Item) -> None:
        """Start with a run; one comes after the other."""
        if self._rows is not None and self._rows.run is not self._broken:
            try:
                self._rows.send()
            except Exception as error:
                self._failed(error)
        self._shown = None
        wanted = self._media or self._report
        if wanted and "wandb" in sys.modules:  # else it is no run of wandb's
            own = Media(first.run, self._tell, commit=self._commit, whole=self._media)
            self._shown = own
        self._rows = Rows(
            first,
            keys=self._chosen,
            config=self._config,
            commit=self._commit,
            put=lambda: self._put,
            clock=self._clock,
        )
        if self._chosen is not None and len(self._streams) > _STREAMS:
            self._tell(
                f"W&B gets {_STREAMS} of the {len(self._streams)} streams; for all: "
                'wandb=gradwatch.sinks.Wandb(keys="all").'
            )

    def _failed(self, error: Exception) -> None:
        rows = self._rows
        if rows is None or finished(rows.run):
            return  # finished by the user while we were at it
        rows.failures += 1
        if rows.failures >= _FAILURES:
            self._broken = rows.run
            self.dropped += rows.held
            self._tell(
                f"W&B failed {_FAILURES} times ({type(error).__name__}: {error}); "
                "nothing more is sent to this run. Training and the run folder are "
                "not affected."
            )
