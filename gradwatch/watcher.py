"""``watch()`` and ``Watch``: the one call, and the handle that it returns.

A stranger's way in: ``sampler`` turns what the hooks saw into readings, ``pipeline``
turns readings into records, alerts and files, and the watch holds the two together.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from gradwatch import _torch, console, opening, remedies
from gradwatch.derive import Reading
from gradwatch.health import Health
from gradwatch.numerics.streaming import median
from gradwatch.observe.probe import ForwardHook
from gradwatch.opening import DIR, OnAlert, Settings
from gradwatch.pipeline import Pipeline
from gradwatch.record import Alert, Incident, Records, Remedy, Stream, TrainingAlert
from gradwatch.recurrent import Recurrence, recurrences
from gradwatch.rewrite import Optimizers, several
from gradwatch.rules import Exploding, Rule, default_rules
from gradwatch.rules.exploding import WARM_UP
from gradwatch.sampler import Sampler
from gradwatch.schedule import DEPTHS, Schedule
from gradwatch.sinks import Sink


def watch(
    model: nn.Module,
    *,
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
) -> Watch:
    """Attach to the recurrent modules of a model; the training loop stays as it is.

    Args:
        model: A bare nn.RNN, nn.LSTM, nn.GRU or cell, or any module, wrapped or not,
            that contains some.
        every: Steps between two measurements: one int for state, spectrum and flow,
            or a mapping from depth to steps. None: the defaults of each depth.
        budget: Share of the training time that state, spectrum and flow may take;
            None fixes the cadences.
        flow_samples: How many sequences are replayed; None: all.
        rules: Rules in place of the catalogue's.
        mute: Kinds, or ``(kind, stream)`` pairs, that are not wanted.
        on_alert: Called with every warning and error; ``"raise"`` raises
            :class:`TrainingAlert` out of ``optimizer.step()`` on an error, for
            ``nonfinite`` before a weight has moved. On an accelerator ``"raise"``
            costs one synchronisation a step.
        sinks: More destinations: any object with the Sink protocol.
        wandb: ``"auto"``: the active run whenever there is one; a run; None; or a
            :class:`gradwatch.sinks.Wandb`.
        dir: Where the run folder goes; ``GRADWATCH_DIR`` in the environment overrides
            the default. None keeps everything in memory.
        name: Name of the run folder; by default the W&B run's id, else date and time.
        scaler: The GradScaler, where it cannot be found: it is found by itself where
            ``scaler.step(optimizer)`` is used.
        start_step: Number of the first step.

    Returns:
        The handle. It may be thrown away: the model keeps it alive.

    Raises:
        TypeError: If ``model`` is no nn.Module, or another argument is of no use.
        ValueError: If the model has no recurrent module or holds no values, or a
            cadence, the budget or ``start_step`` is out of range.
    """
    if os.environ.get("GRADWATCH_DISABLED") == "1":
        return Watch(None, Settings())
    found = recurrences(model)
    if (known := _watching(found)) is not None:
        opening.report(
            "this model is watched already; the same watch is returned and the "
            "arguments of this call are not used. Close it first to change them."
        )
        return known
    settings = Settings(
        schedule=Schedule(every, budget),
        rules=rules,
        mute=tuple(mute),
        on_alert=on_alert,
        sinks=tuple(sinks),
        wandb=wandb,
        dir=dir,
        name=name,
        scaler=scaler,
        start_step=start_step,
        said={"every": every, "budget": budget, "flow_samples": flow_samples},
    )
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
        self._raise: Alert | None = None
        self._health = Health(opening.report)
        self._loud = model is not None and opening.rank() == 0
        meta = opening.meta(settings, self._streams)
        self._folder = opening.open_folder(settings, meta) if self._loud else None
        self._pipeline = self._make_pipeline(meta)
        self._sampler: Sampler | None = None
        # Every rank raises at the same step; else one process speaks for all.
        if model is not None and (self._loud or settings.raising):
            self._sampler = self._attach(model, found)
        self._closed = self._sampler is None
        if self._loud:
            opening.greet(settings, self._streams, self.dir)

    def _make_pipeline(self, meta: dict[str, Any]) -> Pipeline:
        settings, rules = self._settings, self._settings.rules
        sinks: dict[str, Sink] = {}
        if self._loud and settings.wandb is not None:
            close = functools.partial(_close, weakref.ref(self))
            settings.wandb.attach(self._streams, meta, console.say, close)
            self._health.queued = lambda: settings.wandb.queued
            sinks["W&B"] = settings.wandb
        if self._loud:
            for i, sink in enumerate(settings.sinks):
                sinks[f"sink {i} ({type(sink).__name__})"] = sink
        on_alert = settings.on_alert if self._loud else None
        return Pipeline(
            rules=default_rules(self._streams) if rules is None else rules,
            mute=settings.mute,
            on_alert=on_alert if callable(on_alert) else None,
            folder=self._folder,
            sinks=sinks,
            health=self._health,
            quiet=not self._loud,
        )

    def _attach(self, model: nn.Module, found: Sequence[Recurrence]) -> Sampler:
        sampler = Sampler(
            model,
            found,
            self,
            schedule=self._settings.schedule,
            health=self._health,
            take=self._take,
            taken=self._taken,
            on_return=self._raise_if_due,
            measuring=self._loud,
            samples=self._settings.said.get("flow_samples"),
            refuse=self._settings.raising,
            scaler=self._settings.scaler,
            start=self._settings.start_step,
        )
        self._finalizer = weakref.finalize(
            model, _model_gone, weakref.ref(self), list(sampler.tap.global_hooks)
        )
        return sampler

    # ---- between the sampler and the pipeline

    def _take(self, reading: Reading) -> None:
        given = self._pipeline.take(reading)
        if not self._settings.raising:
            return
        errors = [alert for alert in given if alert.severity == "error"]
        if not errors and reading.step.skipped_by == "refused":
            known = [i for i in self._pipeline.judge.incidents.all() if i.until is None]
            errors = [known[-1].alerts[-1]] if known else []
        if errors:
            self._raise = errors[0]

    def _taken(self) -> float:
        """Hand on what was taken in; return the norm below which a step can wait."""
        self._pipeline.handed_on()
        if self._sampler is not None:
            schedule, step = self._settings.schedule, self._sampler.tap.number
            for depth in self._pipeline.wanted("wishes"):
                schedule.ask_within_budget(depth, step)
            for depth in self._pipeline.wanted("wants"):
                schedule.ask(depth, step)
        norms = self._pipeline.memory.norms
        custom = self._settings.sinks or self._settings.rules is not None
        if custom or len(norms) < WARM_UP:
            return 0.0
        return Exploding.clear * median(norms)

    def _raise_if_due(self) -> None:
        alert, self._raise = self._raise, None
        if alert is not None:
            raise TrainingAlert(alert)

    def _bring_up_to_date(self) -> None:
        if self._sampler is not None and not self._closed:
            with self._health.guard("gradients"):
                self._sampler.bring_up_to_date()

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
        return dict(self._pipeline.latest)

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
        if self._settings.wandb is not None and self._settings.wandb.dropped:
            self._health.dropped["W&B"] = self._settings.wandb.dropped
        return self._health.as_dict("off" if self._closed else "on")

    def flush(self) -> None:
        """Bring everything measured so far into records, alerts, files and sinks."""
        if self._closed or self._sampler is None:
            return
        with self._health.guard("gradients"):
            self._sampler.settle()
        self._pipeline.flush()

    def step(self) -> None:
        """Count a step by hand, where neither backward nor an optimizer can be seen."""
        if not self._closed and self._sampler is not None:
            with self._health.guard("gradients"):
                self._sampler.tap.finish_step()
            self._raise_if_due()

    def log(self, *, loss: float | Tensor) -> None:
        """Tell the loss of the step; a tensor is not waited for.

        Args:
            loss: A number, or a tensor of one element.

        Raises:
            ValueError: If the tensor has more than one element.
        """
        value: float | Tensor
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"loss has shape {tuple(loss.shape)}; expected one number, such as "
                    "watch.log(loss=loss.mean())."
                )
            loss = loss.detach().reshape(())
            value = float(loss) if loss.device.type == "cpu" else loss
        else:
            value = float(loss)
        if self._sampler is not None:
            self._sampler.loss = value

    def pause(self) -> None:
        """Stop measuring; steps are still counted."""
        if self._sampler is not None:
            self._sampler.paused = True

    def resume(self) -> None:
        """Measure again after :meth:`pause`."""
        if self._sampler is not None:
            self._sampler.paused = False

    def apply(self, remedy: Remedy, *, optimizer: Optimizers = None) -> Any:
        """Carry out a remedy, such as ``watch.alerts[-1].remedy``, on the model.

        It changes weights, and on a healthy net that costs: save a checkpoint first.
        The optimizer's moments of what changed are deleted, the step is marked with
        the event ``reinit``, and what the alarms compare with begins anew.

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
        sampler = self._sampler
        model = sampler.model if sampler is not None else None
        if sampler is None or model is None or self._closed:
            raise RuntimeError("this watch is closed or off; nothing was applied.")
        if opening.processes() > 1:
            raise RuntimeError(
                "one process of several knows of this alert; call the remedy on every "
                f"rank alike instead: {remedies.line(remedy)}"
            )
        given = several(optimizer) or sampler.tap.optimizers()
        if not given:
            raise ValueError(
                "no optimizer was seen to step yet; name it: "
                "watch.apply(remedy, optimizer=optimizer)."
            )
        sampler.settle()
        if sampler.tap.open:
            raise RuntimeError(
                "gradients of the old weights wait for an optimizer; apply a remedy "
                "between optimizer.step() and the next backward()."
            )
        done = remedies.apply(remedy, model, given)
        sampler.events += [f"reinit:{name}" for name in done.streams]
        sampler.tap.rescan()
        return done.answer

    def probe_now(self) -> None:
        """Have every depth measured at the next step."""
        if self._sampler is not None:
            for depth in DEPTHS:
                self._settings.schedule.ask(depth, self._sampler.tap.upcoming[-1])

    def close(self) -> None:
        """Settle the open step, take every hook off, and close. Safe to call twice."""
        if self._closed or os.getpid() != self._pid or self._sampler is None:
            return
        with self._health.guard("gradients"):
            self._sampler.close()
        self._closed = True
        self._finalizer.detach()
        self._pipeline.close()
        if self._folder is not None:
            with self._health.guard("the run folder"):
                self._folder.close(self.health)
        if self._loud:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        health = self.health
        lost = [f"{part} failed: {why}" for part, why in health["failed"].items()]
        lost += [f"{n} records did not reach {s}" for s, n in health["dropped"].items()]
        console.say(
            console.verdict(
                self._pipeline.steps,
                self.incidents,
                self._pipeline.notices,
                lost,
                self.dir,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values for a checkpoint."""
        self.flush()
        return {
            "step": self._sampler.tap.number if self._sampler is not None else 0,
            "schedule": self._settings.schedule.state_dict(),
            "pipeline": self._pipeline.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`: same step axis, no warm-up, no repeats.

        Raises:
            ValueError: If ``state`` is not what :meth:`state_dict` returned.
        """
        missing = {"step", "schedule", "pipeline"} - set(state)
        if missing:
            raise ValueError(
                f"the state lacks {', '.join(sorted(missing))}; expected what "
                "watch.state_dict() returned."
            )
        self._settings.schedule.load_state_dict(state["schedule"])
        self._pipeline.load_state_dict(state["pipeline"])
        if self._sampler is not None:
            self._sampler.tap.number = int(state["step"])
            self._sampler.events.append("resume")

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
        if self._sampler is None:
            return "gradwatch is off here (disabled, or not the first process)"
        self._bring_up_to_date()
        seen = {**self._sampler.depths.facts, **self._pipeline.memory.facts}
        lost = self._pipeline.memory.left_out
        notes = self._sampler.notes(seen, lost, begun=self._pipeline.steps > 0)
        known = {r.stream.name for r in self._sampler.recurrences()}
        gone = [s.name for s in self._streams if s.name not in known]
        notes |= dict.fromkeys(gone, "its module is gone")
        return console.table(self._streams, self._pipeline.latest, notes, seen)

    def _watches(self, modules: int) -> bool:
        return self._sampler is not None and len(self._sampler.depths.probes) == modules


def _close(watch_ref: weakref.ref[Watch]) -> None:
    """Close a watch that still lives."""
    found = watch_ref()
    if found is not None:
        found.close()


def _model_gone(watch_ref: weakref.ref[Watch], hooks: Sequence[Any]) -> None:
    """Close the watch of a model that is freed, or at the end of the process."""
    _close(watch_ref)
    for hook in hooks:  # where the collector took the watch first
        hook.remove()


def _watching(found: Sequence[Recurrence]) -> Watch | None:
    """Return the watch that looks at just these modules, if there is one."""
    modules = {id(r.module): r.module for r in found}
    owners = set()
    for module in modules.values():
        hooks = [h for h in _torch.forward_hooks(module) if isinstance(h, ForwardHook)]
        owners.add(frozenset(h.probe.owner for h in hooks if not h.probe.closed))
    for owner in owners.pop() if len(owners) == 1 else ():
        if isinstance(owner, Watch) and owner._watches(len(modules)):
            return owner
    return None
