"""``watch()`` and ``Watch``: the one call, and the handle that it returns.

Where to start reading: the ``engine`` measures each step by what the hooks report, and
its ``intake`` hands the steps on, in blocks of rows; the ``pipeline`` makes records,
alerts and files of them. The watch puts the three together, and passes on what is asked
of it.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn

from gradwatch import acting, console, environment, resume
from gradwatch.engine import Engine
from gradwatch.folder import meta, open_folder
from gradwatch.health import Health
from gradwatch.hooks.modules import owners
from gradwatch.intake import Intake
from gradwatch.kinds.catalogue import default_rules
from gradwatch.kinds.judge import Rule, check_mute
from gradwatch.pipeline import Pipeline
from gradwatch.processes import any_sharded, rank, refuse_parts
from gradwatch.record import Alert, Incident, Remedy, Stream
from gradwatch.recorder import Recorder
from gradwatch.records import Latest, Records
from gradwatch.recurrent import Cells, Recurrence, recurrences
from gradwatch.report import inline, save
from gradwatch.report import report as page_of
from gradwatch.rewrite import Optimizers
from gradwatch.runs import DIR, Run, load
from gradwatch.settings import OnAlert, Settings, checked_loss
from gradwatch.sinks import Sink
from gradwatch.sinks.jsonl import Jsonl
from gradwatch.sinks.wandb import destination

_T = TypeVar("_T")


def watch(
    model: nn.Module,
    *,
    cells: Cells = (),
    every: int | Mapping[str, int] | None = None,
    budget: float | None = 0.03,
    flow_samples: int | None = 4,
    rules: Sequence[Rule] | None = None,
    mute: Iterable[str | tuple[str, str]] = (),
    on_alert: OnAlert = None,
    sinks: Sequence[Sink] = (),
    wandb: Any = "auto",
    dir: str | os.PathLike[str] | None = DIR,
    name: str | None = None,
    scaler: Any = None,
    start_step: int = 0,
    report: bool = False,
    recorder: int | None = None,
) -> Watch:
    """Attach to the recurrent modules of a model; the training loop stays as it is.

    Args:
        model: A bare nn.RNN, nn.LSTM, nn.GRU or cell, or any module, wrapped or not,
            that contains some.
        cells: Classes, or modules, of your own that are called once a time step.
        every: Steps between two measurements: one int for state, spectrum and flow,
            or a mapping from probe group to steps. None: the defaults of each.
        budget: Share of the training time that measuring may take; None fixes the
            cadences, and has all gradients read in full at every step.
        flow_samples: How many sequences are replayed; None: all.
        rules: Rules in place of the catalogue's.
        mute: Kinds, or ``(kind, stream)`` pairs, that are not wanted.
        on_alert: Called with every warning and error; ``"raise"`` raises
            :class:`TrainingAlert` out of ``optimizer.step()`` on an error, for
            ``nonfinite`` before a weight has moved. On an accelerator ``"raise"``
            costs one synchronisation a step. ``"rollback"``: where a gradient is not
            finite, :meth:`Watch.rollback` in place of the step.
        sinks: More destinations: any object with the Sink protocol.
        wandb: ``"auto"``: the active run whenever there is one; a run; None; or a
            :class:`gradwatch.sinks.Wandb`.
        dir: Where the run folder goes; ``GRADWATCH_DIR`` in the environment overrides
            the default. None keeps everything in memory.
        name: Name of the run folder; by default the W&B run's id, else date and time.
        scaler: The GradScaler, where it cannot be found: it is found by itself where
            ``scaler.step(optimizer)`` is used.
        start_step: Number of the first step.
        report: Whether :meth:`Watch.report` is called at close.
        recorder: Steps between two states kept for :meth:`Watch.rollback`; a step that
            is not finite is then written for :func:`gradwatch.reproduce`.

    Returns:
        The handle. It may be thrown away: the model keeps it alive.

    Raises:
        TypeError: If ``model`` is no nn.Module, or another argument cannot be used.
        ValueError: If the model has no recurrent module, lacks a cell, holds no values
            or is split over processes other than by ``fully_shard``, a number is out
            of range, or what is to be muted does not exist.
        ModuleNotFoundError: If ``report`` is wanted and nothing can draw its charts.
    """
    if environment.disabled():
        return Watch(None, Settings())
    refuse_parts(
        model,
        recorder=recorder is not None,
        raising=environment.on_alert(on_alert) == "raise",
    )
    found = recurrences(model, cells)
    settings = Settings(
        every=every,
        budget=environment.budget(budget),
        flow_samples=flow_samples,
        rules=rules,
        mute=mute,
        on_alert=environment.on_alert(on_alert),
        sinks=sinks,
        wandb=wandb,
        dir=dir,
        name=name,
        scaler=scaler,
        start_step=start_step,
        report=report,
        recorder=recorder,
    )
    named = default_rules([]) if settings.rules is None else settings.rules
    streams = [r.stream.name for r in found]
    check_mute(settings.mute, named, streams)
    settings.mute = [*settings.mute, *environment.muted(named, streams)]
    if (known := _watching(found)) is not None:
        console.report(
            "this model is watched already; the same watch is returned and the "
            "arguments of this call are not used. Close it first to change them."
        )
        return known
    return Watch(model, settings, found)


class Watch:
    """The handle of a watched model; made by :func:`watch`.

    It is also a context manager, and closes by itself when the model is gone or the
    interpreter exits.
    """

    def __init__(
        self,
        model: nn.Module | None,
        settings: Settings,
        found: Sequence[Recurrence] = (),
    ) -> None:
        self._settings = settings
        self._streams = tuple(r.stream for r in found)
        self._pid = os.getpid()
        self._health = Health(console.report)
        self._undelivered = console.undelivered()
        self._loud = model is not None and (settings.silent or rank() == 0)
        self._folder: Jsonl | None = None
        self._engine: Engine | None = None
        self._recorder: Recorder | None = None
        content: dict[str, Any] = {}
        with self._health.guard("the run folder"):
            content = meta(settings, self._streams)
            self._folder = open_folder(settings, content) if self._loud else None
        self._pipeline = self._make_pipeline(content)
        # Every rank raises at the same step, and has its part of a sharded weight; else
        # one process speaks for all.
        if model is not None and (self._loud or settings.raising or any_sharded(model)):
            with self._health.guard("attaching to the model"):
                self._engine = self._attach(model, found)
                self._recorder = acting.recorder(self._engine, settings, self.dir)
        self._closed = self._engine is None
        if self._loud and self._engine is not None and not settings.silent:
            with self._health.guard("the first line"):
                wandb = None if settings.wandb is None else destination()
                console.greet(self._streams, self.dir, wandb)

    def _make_pipeline(self, content: dict[str, Any]) -> Pipeline:
        settings, rules = self._settings, self._settings.rules
        sinks: dict[str, Sink] = {}
        if self._loud and settings.wandb is not None:
            this = weakref.ref(self)
            close = functools.partial(_call, this, Watch.close)
            page = functools.partial(_call, this, Watch._page)
            with self._health.guard("W&B"):
                settings.wandb.attach(self._streams, content, console.say, close, page)
                sinks["W&B"] = settings.wandb
        if self._loud:
            for i, sink in enumerate(settings.sinks):
                sinks[f"sink {i} ({type(sink).__name__})"] = sink
        return Pipeline(
            default_rules(self._streams) if rules is None else rules,
            settings,
            folder=self._folder,
            sinks=sinks,
            health=self._health,
            quiet=not self._loud,
        )

    def _attach(self, model: nn.Module, found: Sequence[Recurrence]) -> Engine:
        engine = Engine(
            model,
            found,
            self,
            settings=self._settings,
            health=self._health,
            intake=Intake(self._pipeline, self._settings, self._health),
            measuring=self._loud,
        )
        self._finalizer = weakref.finalize(model, _call, weakref.ref(self), Watch.close)
        return engine

    def _bring_up_to_date(self) -> None:
        if self._engine is not None:
            self._engine.bring_up_to_date()

    # ---- the handle

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Every recurrence that is watched."""
        return self._streams

    @property
    def records(self) -> Records:
        """The last 1,024 records."""
        self._bring_up_to_date()
        return self._pipeline.records

    @property
    def latest(self) -> Mapping[str, float]:
        """The last value of every key ever measured."""
        self._bring_up_to_date()
        return Latest(self._pipeline.latest)

    @property
    def alerts(self) -> list[Alert]:
        """The alerts that were given out, notices too, oldest first."""
        self._bring_up_to_date()
        return list(self._pipeline.alerts)

    @property
    def incidents(self) -> list[Incident]:
        """What was wrong, and what is wrong now (``until`` is None)."""
        self._bring_up_to_date()
        return self._pipeline.judge.incidents.all()

    @property
    def dir(self) -> Path | None:
        """The run folder, or None where everything is kept in memory."""
        return self._folder.folder if self._folder is not None else None

    @property
    def health(self) -> dict[str, Any]:
        """What works, what failed, what was lost, and what it costs."""
        wandb = self._settings.wandb
        lost = {} if self._folder is None else self._folder.lost
        if wandb is not None and wandb.dropped:
            lost["W&B"] = wandb.dropped
        if (messages := console.undelivered() - self._undelivered) > 0:
            lost["the console"] = messages
        return self._health.as_dict(
            "off" if self._closed else "on",
            queued=0 if wandb is None else wandb.queued,
            dropped=lost,
        )

    def flush(self) -> None:
        """Bring everything measured so far into records, alerts, files and sinks."""
        if self._closed or self._engine is None:
            return
        self._engine.settle()
        self._pipeline.flush()

    def step(self) -> None:
        """Count a step by hand, where neither backward nor an optimizer can be seen."""
        if not self._closed and self._engine is not None:
            self._engine.count()

    def log(self, *, loss: float | Tensor) -> None:
        """Tell the loss of the step; a tensor is not waited for.

        Args:
            loss: A number, or a tensor of one element.

        Raises:
            TypeError: If it is no number.
            ValueError: If the tensor has more than one element.
        """
        loss = checked_loss(loss)
        if self._engine is not None:
            self._engine.log(loss)

    def pause(self) -> None:
        """Stop measuring; steps are still counted."""
        if self._engine is not None:
            self._engine.pause()

    def resume(self) -> None:
        """Measure again after :meth:`pause`."""
        if self._engine is not None:
            self._engine.resume()

    def apply(self, remedy: Remedy, *, optimizer: Optimizers = None) -> Any:
        """Carry out a remedy, such as ``watch.alerts[-1].remedy``, on the model.

        It changes weights, and on a healthy net that costs: save a checkpoint first.
        The optimizer's moments of what changed are deleted, the step is marked with
        the event ``reinit``, and what the alarms compare with starts again.

        Args:
            remedy: Its name, as typed behind ``gradwatch.``, and its arguments.
            optimizer: The optimizer, or several; None: those that were seen to step.

        Returns:
            What the remedy returns: what it changed, or the handles of the clippers.

        Raises:
            TypeError: If ``remedy`` is None or else no Remedy.
            ValueError: If it is unknown or cannot be applied, or no optimizer is known.
            RuntimeError: If the watch is closed or off, gradients wait for an
                optimizer, or there are several processes.
        """
        return acting.apply(self._engine, remedy, optimizer)

    def rollback(self) -> int:
        """Put model, optimizers, scaler and random numbers back to the last good state.

        Gradients are dropped, steps counted on (event ``rollback``).

        Returns:
            The step before which that state was kept.

        Raises:
            RuntimeError: If there is none, the watch is closed, or it was done thrice.
        """
        return acting.roll_back(self._engine, self._recorder)

    def probe_now(self) -> None:
        """Have every probe group measured at the next step."""
        if self._engine is not None:
            self._engine.probe_now()

    def report(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the run so far as one page of HTML; it takes seconds.

        Args:
            path: The file; None: ``report.html`` in the run folder. A report that is
                there is replaced, any other file is not.

        Returns:
            The file.

        Raises:
            ValueError: If there is neither a run folder nor a path.
            FileExistsError: If there is a file that is no report.
            ModuleNotFoundError: If what draws the charts is not installed.
            OSError: If the file cannot be written.
        """
        if path is None and self.dir is None:
            raise ValueError(
                "this watch has no run folder; pass a file: "
                'watch.report("report.html").'
            )
        self.flush()
        return save([self._as_run()], path)

    def _as_run(self) -> Run:
        """Return the run so far, with the records of its folder if it has one."""
        if self.dir is not None:
            self._pipeline.write_out()
            run, known = load(self.dir), self.incidents
            content = {**run.meta, "health": self.health}
            return replace(run, meta=content, incidents=known, closed=True)
        return self._as_run_in_memory()

    def _as_run_in_memory(self) -> Run:
        return Run(
            dir=Path("in memory"),
            meta={**meta(self._settings, self._streams), "health": self.health},
            streams=self.streams,
            records=self.records,
            alerts=self.alerts,
            incidents=self.incidents,
            closed=True,
        )

    def _page(self) -> str:
        return page_of([self._as_run()])

    def close(self) -> None:
        """Settle the open step, take every hook off, and close. Safe to call twice."""
        if self._closed or os.getpid() != self._pid or self._engine is None:
            return
        self._closed = True
        with ExitStack() as rest:  # all of it, whatever interrupts one of them
            rest.callback(self._say_goodbye)
            rest.callback(self._write_report)
            rest.callback(self._close_folder)
            rest.callback(self._pipeline.close)
            rest.callback(self._finalizer.detach)
            if self._recorder is not None:
                rest.callback(self._recorder.close)
            with self._health.guard("gradients"):
                self._engine.close()

    def _close_folder(self) -> None:
        if self._folder is not None:
            with self._health.guard("the run folder"):
                self._folder.close(self.health)

    def _write_report(self) -> None:
        if self._settings.report and self.dir is not None:
            with self._health.guard("the report"):
                save([self._as_run()])

    def _say_goodbye(self) -> None:
        if not self._loud or self._settings.silent:
            return
        with self._health.guard("the closing lines"):
            health, pipeline = self.health, self._pipeline
            lost = console.losses(health)
            incidents = pipeline.judge.incidents.all()
            console.say(console.verdict(pipeline.steps, incidents, lost, self.dir))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values for a checkpoint."""
        self.flush()
        return resume.state_of(self._engine, self._settings.schedule, self._pipeline)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`: same step axis, no warm-up, no repeats.

        Nothing is changed where the state does not fit.

        Raises:
            ValueError: If ``state`` is not what :meth:`state_dict` returned, or of a
                version that this one cannot read.
        """
        self.flush()
        parts = self._engine, self._settings.schedule, self._pipeline
        resume.go_on_from(state, *parts)

    def __enter__(self) -> Watch:
        """Return the watch itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Return the table of the streams with their latest numbers."""
        if self._engine is None:
            why = "; ".join(self._health.failed.values())
            return (
                f"gradwatch is off here ({why or 'disabled, or not the first process'})"
            )
        self._bring_up_to_date()
        seen, notes = self._engine.notes(begun=self._pipeline.steps > 0)
        return console.table(self._streams, self._pipeline.latest, notes, seen)

    def _repr_html_(self) -> str:
        """Return the table, with what was seen lately, for a notebook."""
        if self._engine is None:
            return inline.paragraph(repr(self))
        self._bring_up_to_date()
        seen, _ = self._engine.notes(begun=self._pipeline.steps > 0)
        return inline.of_run(self._as_run_in_memory(), self._pipeline.latest, seen)

    def _watches(self, modules: int) -> bool:
        return self._engine is not None and self._engine.watches(modules)


def _call(watch_ref: weakref.ref[Watch], method: Callable[[Watch], _T]) -> _T | None:
    """Call a method of a watch that still lives."""
    found = watch_ref()
    return None if found is None else method(found)


def _watching(found: Sequence[Recurrence]) -> Watch | None:
    """Return the watch that looks at just these modules, if there is one."""
    modules = {id(r.module): r.module for r in found}
    for owner in owners(modules.values()):
        if isinstance(owner, Watch) and owner._watches(len(modules)):
            return owner
    return None
