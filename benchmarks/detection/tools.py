"""The tools that are judged: each gets an ordinary model and loop, and tells alarms.

A tool is a function of a case and of its steps. It may look at the model and optimizer
before the first step and between two steps; going over the steps trains. Thresholds are
those that its authors publish.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.detection.case import Case, Step


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What a tool said.

    Attributes:
        kind: By the names of docs/alerts.md.
        step: When.
        cause: If it names one.
        streams: If it names some.
    """

    kind: str
    step: int
    cause: str | None = None
    streams: frozenset[str] = frozenset()


@dataclass(kw_only=True)
class Report:
    """What a tool said of one run.

    Attributes:
        alarms: In their order; the first of each kind at least.
        open: Kinds that still hold at the end; those it ever raised, for a tool that
            takes nothing back.
        notices: What it noted without alarm.
        treated: The step at which it applied a remedy, or None.
    """

    alarms: list[Alarm] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    notices: list[Alarm] = field(default_factory=list)
    treated: int | None = None


Tool = Callable[[Case, Iterator[Step], bool], Report]
"""From a case, its steps and whether the tool may apply its remedy, to what it said."""


def gradwatch_as_it_is(case: Case, steps: Iterator[Step], treat: bool) -> Report:
    """Watch with the defaults, at fixed cadences so that a run can be repeated."""
    report = Report()
    try:
        watching = gradwatch.watch(case.model, dir=None, wandb=None, budget=None)
    except ValueError as error:  # it refuses what has no recurrent module, and says why
        told = {"kind": "not_updating", "cause": "not_in_optimizer"}
        if "nn.ModuleList" in str(error):
            report.alarms.append(Alarm(step=0, **told))
            report.open.add(told["kind"])
        for _ in steps:
            pass
        return report
    with watching as watch:
        for step in steps:
            if treat and report.treated is None:
                named = [a.remedy for a in watch.alerts if a.severity != "info"]
                remedy = next((r for r in named if r is not None), None)
                if remedy is not None:
                    watch.apply(remedy)
                    report.treated = step.number
        watch.flush()
        alerts, incidents = watch.alerts, watch.incidents
    for alert in alerts:
        said = Alarm(
            kind=alert.kind,
            step=alert.step,
            cause=alert.cause,
            streams=frozenset(alert.streams),
        )
        notice = alert.severity == "info"
        (report.notices if notice else report.alarms).append(said)
    report.open = {
        i.kind for i in incidents if i.until is None and i.severity != "info"
    }
    return report


class _Once:
    """Takes the first alarm of each kind."""

    def __init__(self) -> None:
        self.report = Report()

    def say(self, kind: str, step: int, streams: frozenset[str] = frozenset()) -> None:
        if kind not in self.report.open:
            self.report.open.add(kind)
            self.report.alarms.append(Alarm(kind=kind, step=step, streams=streams))


def _grads(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: p.grad.detach() for name, p in named if p.grad is not None}


def norm_threshold(case: Case, steps: Iterator[Step], treat: bool) -> Report:
    """The usual hand-made check: total norm above 100, below 1e-7, or not finite."""
    once = _Once()
    for step in steps:
        norm = float(step.norm)
        if not math.isfinite(norm):
            once.say("nonfinite", step.number)
        elif norm > 100:
            once.say("exploding", step.number)
        elif norm < 1e-7:
            once.say("vanishing", step.number)
    return once.report


_SMALL_MEAN: Final = 1e-7
_LARGE_UPDATE: Final = 10.0
_SMALL_UPDATE: Final = 1e-8
_UNCHANGED: Final = 3
_LOSS_STEPS: Final = 10


def sagemaker_debugger(case: Case, steps: Iterator[Step], treat: bool) -> Report:
    """The documented rules of SageMaker Debugger with their defaults, at every step.

    VanishingGradient (mean of absolute values below 1e-7 in a tensor), ExplodingTensor
    (NaN or Inf), WeightUpdateRatio (above 10, below 1e-8), UnchangedTensor (weights
    close at three steps), AllZero (gradients), LossNotDecreasing (not lower than ten
    steps ago). By the names used here the latter is ``loss_divergence``. Source:
    awslabs/sagemaker-debugger, docs/rules/FirstPartyRules.md.
    """
    once, losses = _Once(), list[float]()
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    still = dict.fromkeys(before, 0)
    for step in steps:
        number = step.number
        losses.append(float(step.loss))
        for grad in _grads(case.model).values():
            mean = float(grad.abs().mean())
            if not math.isfinite(mean):
                once.say("nonfinite", number)
            elif mean == 0:
                once.say("no_gradient", number)
            elif mean < _SMALL_MEAN:
                once.say("vanishing", number)
        for name, param in case.model.named_parameters():
            old, new = before[name], param.detach()
            moved = float((new - old).abs().mean() / (old.abs().mean() + 1e-9))
            if moved > _LARGE_UPDATE:
                once.say("lr_too_high", number)
            elif moved < _SMALL_UPDATE:
                once.say("not_updating", number)
            still[name] = still[name] + 1 if torch.allclose(new, old) else 0
            if still[name] >= _UNCHANGED - 1:
                once.say("not_updating", number)
            before[name] = new.clone()
        if (
            number
            and number % _LOSS_STEPS == 0
            and losses[-1] >= losses[-1 - _LOSS_STEPS]
        ):
            once.say("loss_divergence", number)
    return once.report


_EPOCH: Final = 20
"""Steps that stand for one of AUTOTRAINER's epochs."""


def autotrainer(case: Case, steps: Iterator[Step], treat: bool) -> Report:
    """The published rules of AUTOTRAINER (Zhang et al., ICSE 2021) and its thresholds.

    Every epoch, by the first and last weight matrix: vanishing below a ratio of 1e-3 of
    their gradient norms with the first below 1e-4, exploding above 70, dead units where
    70 % of all gradient entries are 0; each said only while the net has not converged.
    That is an accuracy of .7 there, and here, where not every task has one, a loss of
    .3 of its start. Slow convergence and oscillation have no kind here.
    """
    once, first = _Once(), math.nan
    for step in steps:
        loss = float(step.loss)
        first = loss if math.isnan(first) else first
        grads = _grads(case.model)
        kernels = [g for g in grads.values() if g.dim() > 1]
        if not math.isfinite(loss) or not all(
            g.isfinite().all() for g in grads.values()
        ):
            once.say("nonfinite", step.number)
            continue
        if step.number % _EPOCH != _EPOCH - 1 or loss <= 0.3 * first or not kernels:
            continue
        low, high = float(kernels[0].norm()), float(kernels[-1].norm())
        ratio = low / high if high > 0 else math.inf
        size = sum(g.numel() for g in grads.values())
        zeros = sum(int((g == 0).sum()) for g in grads.values())
        if zeros >= 0.7 * size:
            once.say("dead_units", step.number)
        elif ratio > 70:
            once.say("exploding", step.number)
        elif ratio < 1e-3 and low < 1e-4:
            once.say("vanishing", step.number)
    return once.report


_LOW, _HIGH = 1e-6, 1e3
_EVERY: Final = 20
_RUNNING: Final = 3


class _Outputs:
    """The mean slope of the activation, and T, by what a recurrent module returned."""

    def __init__(self, module: nn.Module) -> None:
        self.slope, self.length = math.nan, 0
        self._handle = module.register_forward_hook(self._look)

    def _look(self, module: nn.Module, args: object, output: object) -> None:
        out = output[0] if isinstance(output, tuple) else output
        out = getattr(out, "data", out).detach()
        kind = getattr(module, "mode", getattr(module, "nonlinearity", "tanh"))
        steps = out.shape[0] if out.dim() == 3 else 1
        self.length = max(steps, 1)
        relu = "relu" in str(kind).lower()
        slope = (out > 0).double() if relu else 1 - out.double().square()
        self.slope = float(slope.mean())

    def close(self) -> None:
        """Take the hook off."""
        self._handle.remove()


def rho_times_slope(case: Case, steps: Iterator[Step], treat: bool) -> Report:
    """The recipe by rho of W_hh and the mean slope of the activation.

    Every 20 steps (rho * mean sigma')^T: vanishing below 1e-6, exploding above 1e3, at
    three checks running; of a gated net the largest gate. For a net in a loop T is 1
    step as the hook sees it, and nothing is said.
    """
    once = _Once()
    kinds = (nn.RNNBase, nn.RNNCellBase)
    layers = {n: m for n, m in case.model.named_modules() if isinstance(m, kinds)}
    outputs = {name: _Outputs(module) for name, module in layers.items()}
    running: dict[tuple[str, str], int] = {}
    for step in steps:
        if step.number % _EVERY:
            continue
        for name, module in layers.items():
            for weight, value in module.named_parameters(recurse=False):
                if not weight.startswith("weight_hh"):
                    continue
                stream = f"{name}.{weight.removeprefix('weight_hh_')}"
                rho = _largest_radius(value.detach().double())
                gain = (rho * outputs[name].slope) ** outputs[name].length
                for kind, there in (
                    ("vanishing", gain < _LOW),
                    ("exploding", gain > _HIGH),
                ):
                    count = running.get((stream, kind), 0) + 1 if there else 0
                    running[stream, kind] = count
                    if count >= _RUNNING:
                        once.say(kind, step.number, frozenset({stream}))
    for output in outputs.values():
        output.close()
    return once.report


def _largest_radius(weight: Tensor) -> float:
    if not weight.isfinite().all():
        return math.nan
    size = weight.shape[1]
    if weight.shape[0] % size:
        return math.nan  # a projection: not square
    blocks = weight.reshape(-1, size, size)
    return float(torch.linalg.eigvals(blocks).abs().max())


NAME_REMEDIES: Final = frozenset({"gradwatch"})
"""The tools that name a remedy that can be applied to a model in training."""

TOOLS: Final[dict[str, Tool]] = {
    "gradwatch": gradwatch_as_it_is,
    "norm threshold": norm_threshold,
    "SageMaker Debugger rules": sagemaker_debugger,
    "AUTOTRAINER rules": autotrainer,
    "rho * mean slope": rho_times_slope,
}
