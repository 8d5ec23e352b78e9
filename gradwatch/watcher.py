"""``watch()`` and ``Watch``: owns the probes and the tap, and drains what they saw.

The story of one step: the tap sees a backward, and what is due is launched; it sees
the optimizer step and closes the step; the numbers are drained to the host and go to
the pipeline, which makes a record of them, has it judged, and hands it on.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch import _torch, console
from gradwatch._version import __version__
from gradwatch.derive import Layout, Reading
from gradwatch.health import Health
from gradwatch.numerics.streaming import median
from gradwatch.observe.gradient_tap import GradientTap, Step
from gradwatch.observe.measure import Drain, Spectrum, spectrum, too_large
from gradwatch.observe.probe import ForwardHook, Probe
from gradwatch.pipeline import Pipeline
from gradwatch.record import (
    Alert,
    Incident,
    Records,
    Stream,
    TrainingAlert,
)
from gradwatch.recurrent import (
    Recurrence,
    clean_path,
    parameter_names,
    plain_weight,
    recurrences,
)
from gradwatch.rules import Exploding, Rule, default_rules
from gradwatch.rules.kinds import WARM_UP
from gradwatch.schedule import DEPTHS, Schedule
from gradwatch.sinks import Sink, Wandb
from gradwatch.sinks.jsonl import FolderError, Jsonl, make_folder
from gradwatch.sinks.wandb import active_run

OnAlert = Callable[[Alert], object] | Literal["raise"] | None
_DIR = "gradwatch-runs"
_RESCAN_STEPS = 50
_BATCH = 16
_BATCH_S = 1.0
"""Most steps, and seconds, that an unremarkable step waits to be taken in."""


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
    dir: str | os.PathLike[str] | None = _DIR,
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
    _check(flow_samples, on_alert, start_step, sinks)
    if (known := _watching(found)) is not None:
        console.set_up()
        console.say(
            "this model is watched already; the same watch is returned and the "
            "arguments of this call are not used. Close it first to change them.",
            logging.WARNING,
        )
        return known
    settings = Settings(
        schedule=Schedule(every, budget),
        rules=rules,
        mute=tuple(mute),
        on_alert=on_alert,
        sinks=tuple(sinks),
        wandb=_wandb_sink(wandb),
        dir=dir,
        name=name,
        scaler=scaler,
        start_step=start_step,
        said={"every": every, "budget": budget, "flow_samples": flow_samples},
    )
    return Watch(model, settings, found)


@dataclass(kw_only=True)
class Settings:
    """The arguments of :func:`watch`, checked."""

    schedule: Schedule = field(default_factory=Schedule)
    rules: Sequence[Rule] | None = None
    mute: tuple[str | tuple[str, str], ...] = ()
    on_alert: OnAlert = None
    sinks: tuple[Sink, ...] = ()
    wandb: Wandb | None = None
    dir: str | os.PathLike[str] | None = None
    name: str | None = None
    scaler: Any = None
    start_step: int = 0
    said: dict[str, Any] = field(default_factory=dict)


class _Pending(NamedTuple):
    """A closed step whose numbers have not been taken in yet."""

    step: Step
    drain: Drain
    spectrum: Spectrum | None
    time: float
    loss: float | None
    overhead: float
    layout: Layout
    facts: Mapping[str, Any]
    events: tuple[str, ...]


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
        self._schedule = settings.schedule
        self._found = [(r.stream, weakref.ref(r.module), r.suffix) for r in found]
        self._streams = tuple(r.stream for r in found)
        self._model = weakref.ref(model) if model is not None else lambda: None
        self._rank = _rank()
        self._inert = model is None or self._rank > 0
        self._paused = False
        self._closed = model is None
        self._pid = os.getpid()
        self._loss: Any = None
        self._events: list[str] = []
        self._facts: dict[str, Any] = {}
        self._pending: deque[_Pending] = deque()
        self._spectrum: Spectrum | None = None
        self._spectrum_runs = 0
        self._raise: Alert | None = None
        self._layout = (list[str](), Layout((), {}))
        self._left_out = False
        self._last = self._drained = time.perf_counter()
        self._spent = self._ceiling = 0.0
        self._sampled = False
        self._at_once = bool(settings.sinks) or settings.rules is not None
        self._probes: list[Probe] = []
        self._tap: GradientTap | None = None
        self._health = Health(self._report)
        self._folder = self._open_folder() if not self._inert else None
        self._pipeline = self._make_pipeline()
        if model is not None:
            self._attach(model, found)
            self._greet()

    # ---- building

    def _attach(self, model: nn.Module, found: Sequence[Recurrence]) -> None:
        """Put the hooks on; a failure half-way undoes what came before."""
        raising = self._settings.on_alert == "raise"
        if self._inert and not raising:
            self._closed = True
            return
        guard = self._health.guard("probe", self._close_probes)
        try:
            for module in {id(r.module): r.module for r in found}.values():
                self._probes.append(Probe(module, self, self._armed, guard))
            self._tap = GradientTap(
                model,
                weights=self._plain_weights,
                on_backward=self._on_backward,
                on_step=self._on_step,
                on_return=self._raise_if_due,
                due=lambda step: self._due("gradients", step),
                guard=self._health.guard("gradients"),
                refuse=raising,
                scaler=self._settings.scaler,
                start=self._settings.start_step,
            )
        except BaseException:
            self._close_probes()
            raise
        self._finalizer = weakref.finalize(
            model, _model_gone, weakref.ref(self), list(self._tap.global_hooks)
        )

    def _make_pipeline(self) -> Pipeline:
        settings = self._settings
        sinks: dict[str, Sink] = {}
        if not self._inert:
            if settings.wandb is not None:
                sinks["W&B"] = settings.wandb
                settings.wandb.attach(self._streams, self._meta(), console.say)
                self._health.queued = lambda: settings.wandb.queued  # type: ignore[union-attr]
            for i, sink in enumerate(settings.sinks):
                sinks[f"sink {i} ({type(sink).__name__})"] = sink
        rules = settings.rules
        raising = settings.on_alert == "raise"
        return Pipeline(
            rules=default_rules(self._streams) if rules is None else rules,
            mute=settings.mute,
            on_alert=None if raising or self._inert else settings.on_alert,  # type: ignore[arg-type]
            folder=self._folder,
            sinks=sinks,
            health=self._health,
            quiet=self._inert,
        )

    def _open_folder(self) -> Jsonl | None:
        where = self._settings.dir
        if where == _DIR:
            where = os.environ.get("GRADWATCH_DIR", _DIR)
        if where is None:
            return None
        run = active_run()
        default = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
        name = self._settings.name or getattr(run, "id", None) or default
        try:
            folder, why = make_folder(Path(where), str(name))
            sink = Jsonl(folder, self._meta())
        except OSError as error:
            reason = error if isinstance(error, FolderError) else f"{where}: {error}"
            self._report(f"{reason}; records are kept in memory only.")
            return None
        if why is not None:
            self._report(f"{why}; records go to {folder} instead.")
        return sink

    def _meta(self) -> dict[str, Any]:
        return {
            "format": 1,
            "started": time.time(),
            "versions": {
                "gradwatch": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "settings": {
                **self._settings.said,
                "start_step": self._settings.start_step,
                "cadence": {d: self._schedule.cadence(d) for d in DEPTHS},
            },
            "streams": [asdict(stream) for stream in self._streams],
        }

    def _greet(self) -> None:
        if self._inert:
            return
        console.set_up()
        modules = len({stream.module for stream in self._streams})
        parts = [
            f"watching {_count(len(self._streams), 'stream')} in "
            f"{_count(modules, 'module')}",
            f"records in {self.dir}" if self.dir else "records in memory only",
        ]
        if self._settings.wandb is not None:
            run = active_run()
            if run is None:
                parts.append("W&B: on when a run starts")
            elif getattr(run, "disabled", False):
                parts.append("W&B: the active run is disabled, nothing is sent to it")
            else:
                parts.append(f"W&B: run {getattr(run, 'id', '?')}")
        console.say("; ".join(parts))

    def _report(self, line: str) -> None:
        console.set_up()
        console.say(line, logging.WARNING)

    # ---- asked by the hooks

    def _due(self, depth: str, step: int) -> bool:
        return not self._paused and self._schedule.due(depth, step)

    def _armed(self) -> bool:
        """Tell whether a forward now may belong to a step that samples weights."""
        if self._inert or self._paused or self._tap is None or self._left_out:
            return False
        return any(self._schedule.due("spectrum", n) for n in self._tap.upcoming)

    def _plain_weights(self) -> dict[str, nn.Parameter]:
        weights = {}
        for stream, module_ref, suffix in self._found:
            module = module_ref()
            if module is None:
                continue
            weight = plain_weight(Recurrence(stream, module, suffix))
            if weight is not None and weight.requires_grad:
                weights[stream.name] = weight
        return weights

    def _on_backward(self, step: int) -> None:
        """Launch what is due; the weights are those that the forward used."""
        if not self._probes or not self._due("spectrum", step):
            return
        self._sampled = True
        guard = self._health.guard("spectrum")
        if guard.failed:
            return
        with guard:
            began = time.perf_counter()
            weights = self._captured()
            if not weights or self._spectrum is not None:
                return  # nothing was reached, or this step has been measured
            sizes = [(s.hidden_size, max(len(s.gates), 1)) for s, _, _ in weights]
            if too_large(sizes, weights[0][1].device):
                self._left_out = True
                self._report(
                    "spectrum is left out: at this size one run takes over a second."
                )
                return
            gram = self._spectrum_runs % 2 == 0
            self._spectrum = spectrum(weights, gram=gram)
            self._spectrum_runs += 1
            self._spectrum.seconds = time.perf_counter() - began

    def _captured(self) -> list[tuple[Stream, Tensor, Tensor | None]]:
        taken = {}
        for probe in self._probes:
            capture = probe.take()
            if capture is not None:
                taken[id(probe.module())] = capture
        found = []
        for stream, module_ref, suffix in self._found:
            capture = taken.get(id(module_ref()))
            if capture is None:
                continue
            if capture.shape is not None:
                length, batch = capture.shape
                seen = {"T": length, "B": batch, "dtype": capture.dtype}
                self._facts[stream.module] = seen
            weight = capture.weights.get(suffix)
            if weight is not None and weight.numel():
                found.append((stream, weight, capture.weights.get(suffix + ".hr")))
        return found

    def _on_step(self, step: Step) -> None:
        """A step has closed: start its numbers on their way to the host."""
        now = time.perf_counter()
        own = self._health.spent
        self._schedule.stepped(now - self._last - (own - self._spent))
        elapsed, used = now - self._last, own - self._spent
        self._last, self._spent = now, own
        if self._sampled:
            self._sampled = False
            for probe in self._probes:
                probe.forget()
        if step.number % _RESCAN_STEPS == 0 and self._tap is not None:
            self._tap.rescan()
        run, self._spectrum = self._spectrum, None
        numbers = step.numbers
        if run is not None:
            numbers |= {f"spectrum.{k}": t for k, t in run.numbers.items()}
        loss, self._loss = self._loss, None
        if isinstance(loss, Tensor):
            numbers["loss"], loss = loss, None
        events, self._events = tuple(self._events), []
        if self._paused or not (numbers or step.events or events):
            return
        self._health.overhead = min(max(used / elapsed, 0.0), 1.0) if elapsed else 0.0
        waiting = _Pending(
            step=step,
            drain=Drain(numbers),
            spectrum=run,
            time=time.time(),
            loss=loss,
            overhead=self._health.overhead,
            layout=self._layout_of(step.names),
            facts=self._facts if run is not None else {},
            events=events,
        )
        self._pending.append(waiting)
        if not waiting.drain.immediate:
            self._drain(keep=1)
        elif not self._calm(waiting, now):
            self._drain(keep=0)

    def _calm(self, waiting: _Pending, now: float) -> bool:
        """Tell whether a step can wait a little, to be taken in with those after it.

        A step that no rule of the catalogue could object to: several at once cost half
        of what each costs alone. Anything unusual is taken in as it comes.
        """
        pre = waiting.step.numbers.get("pre")
        if self._at_once or waiting.spectrum is not None or not isinstance(pre, list):
            return False
        if waiting.events or waiting.step.events or "scale" in waiting.step.numbers:
            return False
        if waiting.loss is not None and not math.isfinite(waiting.loss):
            return False
        if len(self._pending) >= _BATCH or now - self._drained >= _BATCH_S:
            return False
        return math.hypot(*pre) < self._ceiling

    def _drain(self, keep: int) -> None:
        """Take in the steps whose numbers are due on the host."""
        while len(self._pending) > keep:
            waiting = self._pending.popleft()
            began = time.perf_counter()
            host = waiting.drain.wait()
            reading = Reading(
                step=waiting.step,
                host=host,
                layout=waiting.layout,
                spectrum=waiting.spectrum,
                time=waiting.time,
                loss=float(host["loss"]) if "loss" in host else waiting.loss,
                overhead=waiting.overhead,
                facts=waiting.facts,
                events=waiting.events,
            )
            given = self._pipeline.take(reading)
            if waiting.spectrum is not None:
                cost = waiting.spectrum.seconds + time.perf_counter() - began
                changed = self._schedule.ran("spectrum", cost)
                if changed is not None:
                    self._events.append(f"cadence: {changed}")
            self._to_raise(waiting.step, given)
        self._pipeline.handed_on()
        if self._tap is not None:
            for depth in self._pipeline.wanted():
                self._schedule.ask(depth, self._tap.number)
        self._drained = time.perf_counter()
        norms = self._pipeline.memory.norms
        enough = len(norms) >= WARM_UP
        self._ceiling = Exploding.clear * median(norms) if enough else 0.0

    def _bring_up_to_date(self) -> None:
        """Take in what waits on the host already; an accelerator is not waited for."""
        if self._pending and all(p.drain.immediate for p in self._pending):
            with self._health.guard("gradients"):
                self._drain(keep=0)

    def _layout_of(self, names: list[str]) -> Layout:
        """Return for every stream which parameters are behind its weights."""
        if self._layout[0] is not names:
            index = {name: i for i, name in enumerate(names)}
            groups = []
            for stream, module_ref, suffix in self._found:
                module, model = module_ref(), self._model()
                if module is None or model is None:
                    continue
                paths = (p for p, m in model.named_modules() if m is module)
                path = clean_path(next(paths, ""))
                start = f"{path}." if path else ""
                parts = parameter_names(Recurrence(stream, module, suffix))
                groups.append(
                    (
                        stream,
                        {
                            group: [index[start + n] for n in own if start + n in index]
                            for group, own in parts.items()
                        },
                    )
                )
            self._layout = (names, Layout.of(groups))
        return self._layout[1]

    def _to_raise(self, step: Step, given: Sequence[Alert]) -> None:
        if self._settings.on_alert != "raise":
            return
        errors = [alert for alert in given if alert.severity == "error"]
        if not errors and step.skipped_by == "refused":
            known = [
                i for i in self._pipeline.incidents if i.until is None and i.alerts
            ]
            errors = [known[-1].alerts[-1]] if known else []
        if errors:
            self._raise = errors[0]

    def _raise_if_due(self) -> None:
        alert, self._raise = self._raise, None
        if alert is not None:
            raise TrainingAlert(alert)

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
        return self._pipeline.incidents.all()

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
        if self._closed or self._tap is None:
            return
        with self._health.guard("gradients"):
            self._tap.settle()
            self._drain(keep=0)
        self._pipeline.flush()

    def step(self) -> None:
        """Count a step by hand, where neither backward nor an optimizer can be seen."""
        if not self._closed and self._tap is not None:
            with self._health.guard("gradients"):
                self._tap.finish_step()
            self._raise_if_due()

    def log(self, *, loss: float | Tensor) -> None:
        """Tell the loss of the step; a tensor is not waited for.

        Args:
            loss: A number, or a tensor of one element.

        Raises:
            ValueError: If the tensor has more than one element.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"loss has shape {tuple(loss.shape)}; expected one number, such as "
                    "watch.log(loss=loss.mean())."
                )
            detached = loss.detach().reshape(())
            self._loss = float(detached) if loss.device.type == "cpu" else detached
        else:
            self._loss = float(loss)

    def pause(self) -> None:
        """Stop measuring; steps are still counted."""
        self._paused = True

    def resume(self) -> None:
        """Measure again after :meth:`pause`."""
        self._paused = False

    def probe_now(self) -> None:
        """Have every depth measured at the next step."""
        if self._tap is not None:
            for depth in DEPTHS:
                self._schedule.ask(depth, self._tap.upcoming[-1])

    def close(self) -> None:
        """Settle the open step, take every hook off, and close. Safe to call twice."""
        if self._closed or os.getpid() != self._pid:
            return
        tap = self._tap
        if tap is not None:
            with self._health.guard("gradients"):
                tap.close()
                self._drain(keep=0)
        self._closed = True
        self._close_probes()
        if finalizer := getattr(self, "_finalizer", None):
            finalizer.detach()
        self._pipeline.close()
        if self._folder is not None:
            with self._health.guard("the run folder"):
                self._folder.close(self.health)
        if not self._inert:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        lost = [f"{part} failed: {why}" for part, why in self._health.failed.items()]
        lost += [
            f"{count} records did not reach {sink}"
            for sink, count in self.health["dropped"].items()
            if count
        ]
        console.say(
            console.verdict(
                self._pipeline.steps,
                self.incidents,
                self._pipeline.notices,
                lost,
                self.dir,
            )
        )

    def _close_probes(self) -> None:
        for probe in self._probes:
            probe.close()
        self._probes.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values for a checkpoint."""
        self.flush()
        return {
            "step": self._tap.number if self._tap is not None else 0,
            "schedule": self._schedule.state_dict(),
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
        if self._tap is not None:
            self._tap.number = int(state["step"])
        self._schedule.load_state_dict(state["schedule"])
        self._pipeline.load_state_dict(state["pipeline"])
        self._events.append("resume")

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
        if not self._streams:
            return "gradwatch is disabled (GRADWATCH_DISABLED=1)"
        self._bring_up_to_date()
        seen = {**self._pipeline.memory.facts, **self._facts}
        return console.table(self._streams, self._pipeline.latest, self._notes(), seen)

    def _notes(self) -> dict[str, str]:
        """Say of which streams something is not measured, and why."""
        notes = {}
        for stream, module_ref, suffix in self._found:
            module = module_ref()
            if module is None:
                notes[stream.name] = "its module is gone"
                continue
            weight = plain_weight(Recurrence(stream, module, suffix))
            if weight is None:
                notes[stream.name] = "W_hh is parametrised: no update_ratio"
            elif not weight.requires_grad:
                notes[stream.name] = "W_hh is frozen: no gradient norms"
        return notes


def _model_gone(watch_ref: weakref.ref[Watch], hooks: Sequence[Any]) -> None:
    """Close the watch of a model that is freed, or at the end of the process."""
    found = watch_ref()
    if found is not None:
        found.close()
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
        if isinstance(owner, Watch) and len(owner._probes) == len(modules):
            return owner
    return None


def _check(
    flow_samples: int | None, on_alert: Any, start_step: int, sinks: Sequence[Any]
) -> None:
    if flow_samples is not None and (
        not isinstance(flow_samples, int) or flow_samples < 1
    ):
        raise ValueError(
            f"flow_samples is {flow_samples!r}; expected at least 1, or None for all."
        )
    if on_alert is not None and on_alert != "raise" and not callable(on_alert):
        raise TypeError(
            f'on_alert is {on_alert!r}; expected a callable Alert -> None or "raise".'
        )
    if not isinstance(start_step, int) or start_step < 0:
        raise ValueError(
            f"start_step is {start_step!r}; expected an int of at least 0."
        )
    for sink in sinks:
        if not isinstance(sink, Sink):
            raise TypeError(
                f"sinks holds a {type(sink).__name__}; expected objects with "
                "write(record, alerts=()) and close(), such as "
                "gradwatch.sinks.TensorBoard(writer)."
            )


def _wandb_sink(given: Any) -> Wandb | None:
    if given is None or isinstance(given, Wandb):
        return given
    if isinstance(given, str):
        if given != "auto":
            raise ValueError(
                f'wandb is {given!r}; expected "auto", a run, None or '
                "gradwatch.sinks.Wandb(...)."
            )
        return Wandb()
    return Wandb(given)


def _rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
