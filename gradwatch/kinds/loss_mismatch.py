"""A loss that does not fit what it reads: normalised twice, or not at all."""

from __future__ import annotations

from gradwatch.facts import RunFacts
from gradwatch.kinds.kind import Cause, Evidence, Kind, Number
from gradwatch.kinds.of_loss import OfLoss

LOSS_MISMATCH = Kind(
    name="loss_mismatch",
    title="gradwatch: the loss does not fit what it reads",
    severity="warning",
    meaning="The loss does not fit what it reads.",
    evidence={
        "steps": Evidence(
            "steps for which the loss's graph has said so",
            10,
            None,
            "the graph is exact: of 10,000 losses of known kinds none was misread",
        )
    },
    warm_up="none",
    confirmed="by the number of steps, at every look",
    over="with the first look at which it fits",
    excused=(
        "a log-softmax before cross entropy, which changes nothing; a logarithm of a "
        "softmax; a ReLU before squared errors of targets that are not negative"
    ),
    causes={
        "softmax_twice": Cause(
            "`loss_kind` cross_entropy, and `loss_reads` begins with softmax",
            "cross entropy applies a softmax itself; that of a softmax is nearly flat, "
            "and so is its gradient",
            "return scores  # and no softmax: cross_entropy(scores, y) applies it",
        ),
        "sigmoid_twice": Cause(
            "`loss_kind` bce_with_logits, and `loss_reads` begins with sigmoid",
            "this loss applies a sigmoid itself; the sigmoid of a sigmoid lies between "
            ".5 and .73, so that no output can be near 0",
            "return scores  # and no sigmoid: "
            "binary_cross_entropy_with_logits(scores, y) applies it",
        ),
        "probabilities": Cause(
            "`loss_kind` nll, and `loss_reads` begins with softmax",
            "the negative log-likelihood takes log-probabilities and is given "
            "probabilities: no logarithm is taken",
            "loss = torch.nn.functional.cross_entropy(scores, y)  # on the raw scores",
        ),
        "scores": Cause(
            "`loss_kind` nll, and nothing, a ReLU or a sigmoid before it",
            "the negative log-likelihood takes log-probabilities and is given scores "
            "that add up to nothing: it falls without bound",
            "loss = torch.nn.functional.cross_entropy(scores, y)  # on the raw scores",
        ),
        "axis": Cause(
            "`loss_classes` are two numbers",
            "the softmax adds up over another axis than the loss takes its classes "
            "from: over the batch, or over time",
            "log_p = scores.log_softmax(-1)  # the axis of the classes",
        ),
        "relu": Cause(
            "`loss_kind` cross_entropy or bce_with_logits, and `loss_reads` begins "
            "with relu; or mse, and a tenth of the targets are below 0",
            "the loss asks for values of both signs, and a ReLU cuts off one: what is "
            "below 0 gets no gradient",
            "return scores  # and no relu behind the last layer",
        ),
    },
    numbers={
        "negative": Number(
            0.1,
            "share of targets below 0 from which on a ReLU is a fault",
            "a few of many may be outliers",
        ),
    },
)

_RAW = ("", "relu", "sigmoid")


class LossMismatch(OfLoss):
    """A loss beside what it reads, by its graph."""

    kind, _row = LOSS_MISMATCH.name, LOSS_MISMATCH

    def _fault(self, run: RunFacts) -> str | None:
        if run.loss_kind is None or run.loss_reads is None:
            return None
        first = run.loss_reads.partition(",")[0]
        normalised = run.loss_kind == "cross_entropy" and run.loss_classes
        if normalised and len(set(normalised)) > 1:
            return "axis"
        if run.loss_kind == "nll":
            softmax = "probabilities" if first == "softmax" else None
            return "scores" if first in _RAW else softmax
        negative = (run.loss_negative or 0.0) >= LOSS_MISMATCH.number("negative")
        signed = ("cross_entropy", "bce_with_logits", *(["mse"] * negative))
        if first == "relu" and run.loss_kind in signed:
            return "relu"
        twice = {("cross_entropy", "softmax"), ("bce_with_logits", "sigmoid")}
        return f"{first}_twice" if (run.loss_kind, first) in twice else None

    def _shown(self, run: RunFacts) -> str:
        reads = f"{run.loss_reads} of " if run.loss_reads else ""
        module = run.readout if run.readout is not None else "an output"
        shown = f"{run.loss_kind} reads {reads}{module or 'the model'}"
        classes = run.loss_classes or ()
        if self._state.cause == "axis":
            shown += f"; its softmax adds up over {classes[0]} entries, and the loss "
            shown += f"takes them for {classes[-1]} classes"
        return shown
