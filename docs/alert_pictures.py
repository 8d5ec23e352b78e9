"""Draw the pictures of docs/alerts/ from real runs, and print what helped in them.

Each is a run of ``benchmarks/detection``, seed 0, from a family on which thresholds may
be chosen where the kind has one: the metric that decides, its threshold, the alarm, and
where it says something the same run without the fault. Printed is the loss in the last
20 steps: of the run, of the run without the fault, and where the alarm names a remedy,
of the run to which it was applied then, beside the run as it was, for as long; and the
alarm's message.

Run: python docs/alert_pictures.py [kind ...]; given a family in place of a kind, it
prints the same and draws nothing.
"""

import io
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import altair as alt
import torch
from PIL import Image  # comes with the extra ``tensorboard``
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import gradwatch
from benchmarks.detection import families
from benchmarks.detection.case import Case, History, loop, make, trained
from benchmarks.detection.score import TREATED
from gradwatch.metrics import PREFIX
from gradwatch.record import Alert, Remedy, StepRecord

assert families.__all__  # importing them is what adds them

FOLDER = Path(__file__).parent / "alerts"
RUN: Final = "the run"
COLOURS: Final = ("#d55e00", "#0072b2")

Point = tuple[int, float]
Values = Callable[[list[StepRecord], str], list[Point]]
"""From the records of a run and a metric's key to the points of a line."""


def series(records: list[StepRecord], key: str) -> list[Point]:
    """Return the finite values of a metric."""
    found = [(r.step, r.metrics[key]) for r in records if key in r.metrics]
    return [(step, value) for step, value in found if math.isfinite(value)]


def looks(records: list[StepRecord], key: str) -> list[Point]:
    """Return how many looks running found the same batch."""
    facts = [(r.step, f) for r in records for f in r.facts.modules.values()]
    return [(step, f.same_batch) for step, f in facts if f.same_batch is not None]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn of a kind.

    Attributes:
        family: The run.
        axis: What the vertical axis is called.
        key: Metric that is drawn; the first of the alert's evidence, if none is given.
        levels: The thresholds; that of the alert's evidence, if none is given.
        log: Whether the vertical axis is logarithmic.
        beside: The name of the second line: of the same metric in the control run, or
            of ``other`` in the same run. None: there is none.
        other: A second metric of the same run.
        values: What makes points of the records.
    """

    family: str
    axis: str
    key: str | None = None
    levels: tuple[float, ...] = ()
    log: bool = False
    beside: str | None = "without the fault"
    other: str | None = None
    values: Values = series


FROM: Final = gradwatch.kinds.catalogue.CATALOGUE
MOVED: Final = FROM["drift"].at("moved")

PICTURES: Final = {
    "nonfinite": Picture(
        family="nonfinite_nan_data", axis="gradient tensors with NaN or Inf"
    ),
    "spike": Picture(family="spike_bad_batch", axis="grad_norm", log=True),
    "lr_too_high": Picture(
        family="lr_too_high_schedule_sgd", axis="update_ratio", log=True
    ),
    "over_clipping": Picture(family="over_clipping_sgd", axis="clip_ratio", log=True),
    "loss_divergence": Picture(
        family="loss_divergence_rate_adam", axis="loss", log=True
    ),
    "underflow": Picture(family="underflow_float16", axis="grad_norm_hh"),
    "not_cleared": Picture(family="not_cleared_midway", axis="grad_norm", log=True),
    "cleared_early": Picture(
        family="cleared_early_to_zero",
        axis="norm of the gradients",
        key=f"{PREFIX}/grad_norm_clipped",
        other=f"{PREFIX}/grad_norm",
        beside="at the end of backward",
    ),
    "repeated_batch": Picture(
        family="healthy_one_batch",
        axis="looks running at the same batch",
        levels=(FROM["repeated_batch"].at("looks"),),
        beside=None,
        values=looks,
    ),
    "exploding": Picture(family="exploding_drift_inflated", axis="growth_log10"),
    "vanishing": Picture(family="vanishing_horizon_lstm", axis="adjoint_log10"),
    "truncated": Picture(
        family="healthy_streams_of_text_lstm",
        axis="horizon, steps",
        key="horizon",
        levels=(22.0,),  # of pieces of 23 steps
        beside=None,
    ),
    "drift": Picture(
        family="vanishing_drift_decay",
        axis="rho_total_drift",
        levels=(-MOVED, MOVED),
        beside="a run that learns",
    ),
    "dead_units": Picture(family="dead_units_from_start", axis="dead"),
    "gate_stuck": Picture(family="gate_stuck_input_lstm", axis="shut/i"),
    "no_gradient": Picture(family="no_gradient_readout_index", axis="grad_norm_hh"),
    "not_updating": Picture(family="not_updating_rate_zero", axis="update_ratio"),
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a watch saw of a run."""

    records: list[StepRecord]
    alerts: list[Alert]
    streams: list[gradwatch.Stream]
    loss: float

    def first(self, kind: str) -> Alert:
        """Return the first alarm of a kind, or its first notice."""
        found = [a for a in self.alerts if a.kind == kind]
        return next((a for a in found if a.severity != "info"), found[0])


def watched(case: Case, remedy: Remedy | None = None, at: int = -1) -> Seen:
    """Train under a watch; apply a remedy behind a step."""
    plain, history = case.loss, History()
    with gradwatch.watch(case.model, dir=None, wandb=None, budget=None) as watch:

        def told(model: nn.Module, batch: Any) -> Tensor:
            loss = plain(model, batch)
            watch.log(loss=loss)
            return loss

        case.loss = told
        for step in loop(case, history):
            if remedy is not None and step.number == at:
                watch.apply(remedy)
        watch.flush()
        return Seen(
            records=list(watch.records),
            alerts=list(watch.alerts),
            streams=list(watch.streams),
            loss=history.final,
        )


def draw(kind: str, picture: Picture) -> str:
    """Save the picture of a kind; return what was found."""
    seen, control, found = measured(picture.family, kind)
    alert = seen.first(kind)
    key = picture.key or next(iter(alert.evidence), "")
    if key and not key.startswith(PREFIX):
        key = f"{PREFIX}/{seen.streams[0].key}/{key}"
    lines = {RUN: picture.values(seen.records, key)}
    if picture.beside is not None and picture.other is not None:
        lines[picture.beside] = picture.values(seen.records, picture.other)
    elif picture.beside is not None and control is not None:
        lines[picture.beside] = picture.values(control.records, key)
    levels = list(picture.levels)
    if not levels:
        levels = [at for _, at in alert.evidence.values() if at is not None][:1]
    save(layers(picture, lines, levels, alert), FOLDER / f"{kind}.png")
    return found


def measured(family: str, kind: str | None) -> tuple[Seen, Seen | None, str]:
    """Return what was seen of a family, of its control if it has one, and the losses.

    Args:
        family: Its name.
        kind: Whose alert counts; the one that is true, for None.
    """
    case = make(family, 0)
    kind = kind or case.label.kind
    seen, control = watched(case), None
    alert = seen.first(str(kind))
    found = [f"{family}: {alert.kind} ({alert.severity}) at step {alert.step}"]
    found.append(f"cause {alert.cause}; loss at the end {seen.loss:.3g}")
    if case.control is not None:
        control = watched(case.control())
        found.append(f"without the fault {control.loss:.3g}")
    if alert.remedy is not None:
        found.append(treated(family, alert, alert.remedy))
    return seen, control, "; ".join(found) + f"\n{alert.message}"


def treated(family: str, alert: Alert, remedy: Remedy) -> str:
    """Return the losses with the remedy and without, for as long as it may take."""
    cases = [make(family, 0) for _ in range(2)]
    for case in cases:
        case.steps = max(case.steps, alert.step + TREATED)
    helped = watched(cases[0], remedy, alert.step).loss
    before = trained(cases[1]).final
    return (
        f"after {cases[0].steps} steps {before:.3g}, with {remedy.name} from the "
        f"{'notice' if alert.severity == 'info' else 'alarm'} on {helped:.3g}"
    )


def save(chart: alt.LayerChart, path: Path) -> None:
    """Save a picture in 64 colours, which is a quarter of the size."""
    drawn = io.BytesIO()
    chart.save(drawn, format="png", scale_factor=1.0)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def layers(
    picture: Picture, lines: dict[str, list[Point]], levels: list[float], alert: Alert
) -> alt.LayerChart:
    """Return the chart."""
    rows: list[dict[str, Any]] = [
        {"step": step, "value": value, "run": name}
        for name, points in lines.items()
        for step, value in points
        if value > 0 or not picture.log
    ]
    logs = [math.log10(row["value"]) for row in rows] if picture.log else []
    decades = range(
        math.floor(min(logs, default=0)), math.ceil(max(logs, default=0)) + 1
    )
    y = alt.Y(
        "value:Q",
        title=picture.axis,
        scale=alt.Scale(type="log") if picture.log else alt.Scale(zero=False),
        axis=alt.Axis(format="~e", values=[10.0**k for k in decades])
        if picture.log
        else alt.Axis(format=".3~g", tickCount=5),
    )
    legend = alt.Legend(title=None, orient="top") if len(lines) > 1 else None
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("step:Q", title="step", scale=alt.Scale(nice=False)),
        y=y,
        color=alt.Color(
            "run:N",
            scale=alt.Scale(domain=list(lines), range=list(COLOURS[: len(lines)])),
            legend=legend,
        ),
    )
    few = max(map(len, lines.values())) < 100
    parts: list[alt.Chart] = [base.mark_line(strokeWidth=1.5, point=few)]
    values = alt.Data(values=[{"value": level} for level in levels])
    at = alt.Chart(values).encode(y="value:Q")
    parts.append(at.mark_rule(strokeDash=[6, 4], color="#444"))
    word = "notice" if alert.severity == "info" else "alarm"
    said = [{"step": alert.step, "word": f"{word} at step {alert.step}"}]
    when = alt.Chart(alt.Data(values=said)).encode(x="step:Q")
    parts.append(when.mark_rule(color="#000"))
    late = alert.step > 0.7 * max(row["step"] for row in rows)
    label = when.mark_text(align="right" if late else "left", dx=-5 if late else 5)
    parts.append(label.encode(y=alt.value(-7), text="word:N"))
    return alt.LayerChart(layer=parts).properties(
        width=600,
        height=260,
        autosize=alt.AutoSizeParams(type="fit", contains="padding"),
    )


def main() -> None:
    """Draw and measure the kinds that are named, or all."""
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        drawn = name in PICTURES
        print(draw(name, PICTURES[name]) if drawn else measured(name, None)[-1])


if __name__ == "__main__":
    main()
