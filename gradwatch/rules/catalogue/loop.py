"""Kinds that concern the loop, the data and the precision."""

from __future__ import annotations

from gradwatch.rules.catalogue.flow import BEFORE, LOWER_RATE
from gradwatch.rules.catalogue.kind import Cause, Evidence, Kind

_ANOMALY = "torch.autograd.set_detect_anomaly(True)  # then run that step again"

NONFINITE = Kind(
    name="nonfinite",
    title="gradwatch: NaN or Inf in gradients",
    severity="error",
    meaning="A gradient, or the loss given to `watch.log`, holds NaN or Inf.",
    evidence={
        "tensors": Evidence(
            "`nonfinite`, gradient tensors with NaN or Inf", 1, 0, "exact"
        ),
        "skips": Evidence(
            "skipped steps in a row that are excused, at most",
            10,
            None,
            "a loss scaler that begins too high halves itself this often",
        ),
    },
    warm_up="none",
    confirmed="at once",
    over="after 25 finite steps",
    excused="what a GradScaler or a refusing clipper skips, up to 10 steps in a row",
    causes={
        "nan_data": Cause(
            "the logged loss, or the input, is not finite",
            "the loss was already not finite: the input, the target or the forward",
            "assert torch.isfinite(batch).all(), 'NaN or Inf in the input'",
        ),
        "nan_backward": Cause(
            "the logged loss is finite",
            "the loss was finite, so backward made it: sqrt, log or a division at 0",
            _ANOMALY,
        ),
        "fp16_overflow": Cause(
            "the scaler has skipped more than 10 steps in a row though the input is "
            "finite; or the net computes in float16 and the loss is finite",
            "float16 overflows; where a loss scaler halves for ever, its scale is not "
            "what is too large",
            "scaler = torch.amp.GradScaler(enabled=False)  # and autocast to bfloat16",
        ),
        None: Cause(
            "no loss was logged",
            "undecided without the loss: watch.log(loss=...) tells data from backward",
            _ANOMALY,
        ),
    },
)

SPIKE = Kind(
    name="spike",
    title="gradwatch: a spike in the gradient norm",
    severity="warning",
    meaning="One gradient norm stood out, and is back within three steps.",
    evidence={
        "z": Evidence(
            "robust z-score of ln(`grad_norm`) in the last 25",
            10.0,
            None,
            "healthy nets that have learnt reach 32: alone it decides nothing",
        ),
        "ratio": Evidence(
            "`grad_norm` over the median of the last 25",
            25.0,
            None,
            "healthy nets that have learnt reach 565: alone it decides nothing",
        ),
        "record": Evidence(
            "`grad_norm` over the largest that was no spike itself",
            30.0,
            None,
            "nets that have learnt reach 14 when they meet a hard batch; a batch of "
            "broken targets 1,500",
        ),
        "record_with_loss": Evidence(
            "the same, where a loss is logged that has never been as large",
            3.0,
            None,
            "a loss that stands out too tells a bad batch from a hard one",
        ),
        "loss": Evidence(
            "loss over the largest so far, where it is logged",
            2.0,
            None,
            "nets that have learnt reach 1.5",
        ),
    },
    warm_up="50 norms: a net that opens to its gradients jumps once",
    confirmed="once the norm is back: a longer one belongs to another kind",
    over="at once",
    causes={
        "bad_batch": Cause(
            "by measurement",
            "a batch unlike the others, most likely: a long sequence, a bad label, "
            "an outlier in the input",
        )
    },
)

LR_TOO_HIGH = Kind(
    name="lr_too_high",
    title="gradwatch: the learning rate is too high",
    severity="warning",
    meaning="Updates are so large beside the recurrent weights that nothing settles.",
    evidence={
        "ratio": Evidence(
            "`update_ratio`, the median of 5 steps",
            0.25,
            0.15,
            "healthy runs reach .09, in their first steps",
        ),
        "jump": Evidence(
            "`update_ratio`, at 2 of 5 steps",
            1.0,
            None,
            "an update as large as the weights; the largest healthy one was .17",
        ),
        "leap": Evidence(
            "`update_ratio`, once",
            3.0,
            None,
            "nothing of the weights that were there is left",
        ),
        "faster": Evidence(
            "beside either: times by which the update has grown more than the gradient",
            10.0,
            None,
            "an update that is large because its gradient is, is an explosion's",
        ),
        "loss": Evidence(
            "median of 5 losses over the loss at the start, where it is logged, at "
            "least; not asked for a jump",
            0.8,
            None,
            "who learns at such a rate is left alone",
        ),
    },
    warm_up="10 steps",
    confirmed="by 4 such medians running, by 2 jumps, or by one leap",
    over="after 25 medians at .15 or below, after 100 where there was a jump",
    excused="a loss that has fallen by a fifth",
    causes={
        "lr": Cause(
            "by measurement",
            "each step moves the recurrent weights by a quarter of their norm or more",
            LOWER_RATE + BEFORE,
        )
    },
)

OVER_CLIPPING = Kind(
    name="over_clipping",
    title="gradwatch: the clip leaves nothing of the gradients",
    severity="warning",
    meaning="The clip is so tight that the weights hardly move.",
    evidence={
        "clip_ratio": Evidence(
            "`clip_ratio`, at most",
            0.01,
            0.1,
            "alone it decides nothing: Adam does not mind, and a net that explodes "
            "is clipped as much",
        ),
        "update": Evidence(
            "largest `update_ratio`, at most",
            1e-4,
            None,
            "healthy runs move by 1e-3; sick ones by 1e-5",
        ),
    },
    warm_up="none",
    confirmed="by 20 steps running",
    over="after 3 steps with a `clip_ratio` above .1, or larger updates",
    excused="while gradients explode: the clip then does what it is for",
    causes={
        "scaled_gradients": Cause(
            "a loss scaler is at work",
            "the clip acts on gradients that the loss scaler has multiplied: it comes "
            "before they are unscaled",
            "scaler.unscale_(optimizer)  # before clip_grad_norm_",
        ),
        "clip": Cause(
            "else",
            "the clip is far below the usual norm of the gradients",
            "torch.nn.utils.clip_grad_norm_(model.parameters(), {usual:.2g})  # the "
            "usual norm",
        ),
    },
)

LOSS_DIVERGENCE = Kind(
    name="loss_divergence",
    title="gradwatch: the loss has gone up and stays up",
    severity="warning",
    meaning="The loss given to `watch.log` has left its best far behind, and stays.",
    evidence={
        "best": Evidence(
            "median of 20 losses over the lowest such median",
            2.2,
            1.5,
            "near 0 a healthy loss multiplies by 8: the next two decide there",
        ),
        "start": Evidence(
            "the same over the median of the first 20",
            0.35,
            None,
            "a healthy net that has learnt does not come back to a third of its start",
        ),
        "spread": Evidence(
            "median deviations of the best 20 above their median",
            6.0,
            None,
            "a noisy loss is not judged by its luck",
        ),
    },
    warm_up="60 logged losses",
    confirmed=(
        "by 30 steps running in which the loss does not fall by a tenth (healthy nets "
        "lose half of what they have learnt, and are on their way back by then), by 10 "
        "where the learning rate has been raised"
    ),
    over="after 3 steps at 1.5 times the best or below",
    excused="losses that are not positive throughout",
    causes={
        "bad_batch": Cause(
            "it began with a spike of the gradient norm",
            "it began at one batch with a gradient norm far above all others",
            "torch.save(batch, 'batch.pt')  # look at the batch of step {since}",
        ),
        "lr": Cause(
            "the learning rate is three times what it was at the best, or updates are "
            "large beside the weights",
            "the learning rate, or the updates, are far larger than they were when the "
            "loss was at its best",
            LOWER_RATE + BEFORE,
        ),
        "data": Cause(
            "else",
            "the learning rate is as it was, so the data are not: other targets, "
            "another order, another source",
            "print(batch)  # of step {since} and of one before it",
        ),
    },
)

UNDERFLOW = Kind(
    name="underflow",
    title="gradwatch: gradients underflow in float16",
    severity="warning",
    meaning="The recurrent weights' gradient is 0 in every entry, in float16.",
    evidence={
        "steps": Evidence(
            "steps running with a gradient of exactly 0",
            10,
            None,
            "exact: float16 holds nothing below 6e-8",
        )
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="after 3 steps with a gradient",
    excused="dead units and stuck gates, which have alarms of their own",
    causes={
        "fp16_underflow": Cause(
            "by measurement",
            "what is below 6e-8 is 0 in float16, and the loss is not scaled up",
            "scaler = torch.amp.GradScaler()  # or autocast to bfloat16",
        )
    },
)

NOT_CLEARED = Kind(
    name="not_cleared",
    title="gradwatch: gradients are never cleared",
    severity="warning",
    meaning=(
        "Each backward adds to the gradients that the optimizer has used already: "
        "zero_grad() was forgotten."
    ),
    evidence={
        "steps": Evidence(
            "steps running that began with used gradients",
            10,
            None,
            "exact: the same tensor, written once since the optimizer's step",
        )
    },
    warm_up="none",
    confirmed="by 10 steps running: a few may be meant",
    over="after 3 steps that began with cleared gradients",
    causes={
        "zero_grad": Cause(
            "by structure",
            "the gradients of all steps so far pile up: nobody clears them",
            "optimizer.zero_grad()  # before each backward",
        )
    },
)

CLEARED_EARLY = Kind(
    name="cleared_early",
    title="gradwatch: gradients are cleared before the step",
    severity="warning",
    meaning="backward() gives a gradient, and the optimizer finds none, or zeros.",
    evidence={
        "steps": Evidence(
            "steps running with `grad_norm` above 0 and nothing left of it",
            10,
            None,
            "exact: clipping leaves something",
        )
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="after 3 steps in which something was left",
    excused="what a refusing clipper takes away: those gradients are not finite",
    causes={
        "zero_grad": Cause(
            "by measurement",
            "zero_grad() stands between backward() and step()",
            "optimizer.zero_grad(); loss.backward(); optimizer.step()  # in this order",
        )
    },
)

REPEATED_BATCH = Kind(
    name="repeated_batch",
    title="gradwatch: the same batch again and again",
    severity="info",
    meaning="The sequences looked at were the same, bit for bit, at every look.",
    evidence={
        "looks": Evidence(
            "looks running at the same sequences",
            8,
            None,
            "by then at least 50 steps lie between the first and the last",
        )
    },
    warm_up="none",
    confirmed="by the number of looks",
    over="with the first other batch",
    causes={
        "data": Cause(
            "by measurement",
            "one batch is served at each step; no fault if it is all the data, or to "
            "be fitted on purpose",
            "for batch in loader: ...  # not next(iter(loader)) at each step",
        )
    },
)

KINDS = (
    NONFINITE,
    SPIKE,
    LR_TOO_HIGH,
    OVER_CLIPPING,
    LOSS_DIVERGENCE,
    UNDERFLOW,
    NOT_CLEARED,
    CLEARED_EARLY,
    REPEATED_BATCH,
)
