"""Which remedy cures which cause: sick nets untreated, and treated before step 0.

All learn delayed recall. Symptoms are measured by float64 autograd through an unrolled
loop, on one fixed batch, as the median of three probes in the last fifth of the run:

- vanishing: log10 of the gradient at the first state over the largest; gone at -4.5.
- exploding: log10 growth of random adjoints from the end backward; gone at 1.7.
- dead_units: share of ReLU units that are always off; gone at .3.
- gate_shut: share of values of i or o below .05, of a GRU's z above .95; gone at .85.
- drift: abs ln(rho / rho at step 0); gone at .35.
- lr_too_high: update ratio of W_hh, the largest median of 5 steps; gone at .15.
- standing_still: -log10 of its median in the last fifth; gone at 4.

A remedy counts in a run if the symptom is gone, the held-out loss beats the trivial
predictor or is at most 1.05 times that of the untreated net, and no symptom is there
that the untreated net has not. Drift is left out there: of itself it is no harm.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, tee
from operator import itemgetter
from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from benchmarks.remedies import recall
from benchmarks.remedies.causes import (
    CAUSES,
    HIDDEN,
    LAYERS,
    LENGTH,
    RATE,
    Cause,
    Change,
    Trial,
)
from benchmarks.remedies.nets import Batch, Net, generator
from benchmarks.remedies.unrolled import (
    dead_share,
    growth,
    reach,
    shut_share,
    unroll,
)
from benchmarks.results import Results, middle_of, spread

BATCH, PROBED, HELD_OUT = 32, 16, 256
WORSE = 1.05
TRIVIAL = math.log(recall.SYMBOLS)

Signs = dict[str, float]


@dataclass(frozen=True)
class Limit:
    """When a symptom is there, and when it is gone: more is worse."""

    there: float
    gone: float
    sign: int = field(default=1)
    """What the value is multiplied by to be shown."""


LIMITS: Final[Mapping[str, Limit]] = MappingProxyType(
    {
        "vanishing": Limit(6.0, 4.5, -1),
        "exploding": Limit(2.4, 1.7),
        "dead_units": Limit(0.5, 0.3),
        "gate_shut": Limit(0.95, 0.85),
        "drift": Limit(0.5, 0.35),
        "lr_too_high": Limit(0.25, 0.15),
        "standing_still": Limit(4.0, 4.0),
    }
)
NEW: Final = tuple(name for name in LIMITS if name != "drift")


@dataclass(frozen=True)
class Outcome:
    """What became of one run: its symptoms, and the held-out loss."""

    signs: Signs
    loss: float

    def has(self, symptom: str) -> bool:
        """Return whether a symptom is there; NaN counts."""
        return not self.signs[symptom] < LIMITS[symptom].there

    def is_rid_of(self, symptom: str) -> bool:
        """Return whether a symptom is gone."""
        return self.signs[symptom] <= LIMITS[symptom].gone

    def new(self, untreated: "Outcome") -> list[str]:
        """Return the symptoms that an untreated net has not."""
        found = [s for s in NEW if self.has(s) and not untreated.has(s)]
        broken = math.isfinite(untreated.loss) and not math.isfinite(self.loss)
        return [*found, *["nonfinite"] * broken]

    def counts(self, symptom: str, untreated: "Outcome") -> bool:
        """Return whether a remedy worked, by the rule in the module's docstring."""
        # An untreated loss of NaN is beaten by any number.
        good = self.loss < TRIVIAL or not self.loss > WORSE * untreated.loss
        good = good and math.isfinite(self.loss)
        return self.is_rid_of(symptom) and good and not self.new(untreated)


def radius(net: Net) -> float:
    """Return rho of a vanilla net, from all eigenvalues; NaN: gated, or not finite."""
    weight = net.rnn.weight_hh_l0.detach().double()
    if weight.shape[0] != weight.shape[1] or not weight.isfinite().all():
        return math.nan
    return torch.linalg.eigvals(weight).abs().max().item()


def measure(trial: Trial, batch: Batch, rho: float) -> Signs:
    """Return the symptoms that are seen in the weights and the states."""
    x, y = trial.shaped(batch)
    net = trial.net
    if not all(p.isfinite().all() for p in net.parameters()):
        return dict.fromkeys(LIMITS, math.nan)
    layer = unroll(net.rnn, x)
    gated = net.rnn.mode in ("LSTM", "GRU")
    return {
        "vanishing": -reach(net, x, y, nn.functional.cross_entropy, trial.chunk),
        "exploding": growth(layer),
        "dead_units": dead_share(net.rnn, layer),
        "gate_shut": shut_share(layer),
        "drift": 0.0 if gated else abs(math.log(radius(net) / rho)),
    }


def updates(moved: list[float], last: int) -> Signs:
    """Return the symptoms that are seen in the update ratios of a run."""
    fives = [middle_of(moved[n : n + 5]) for n in range(len(moved) - 4)]
    late = middle_of(moved[-last:])
    still = math.inf if late == 0 else -math.log10(late)
    return {"lr_too_high": max(fives), "standing_still": still}


def follow(cause: Cause, remedy: Change | None, seed: int, steps: int) -> Outcome:
    """Train a sick net, treated or not."""
    torch.manual_seed(seed)
    trial = Trial(Net(LAYERS[cause.kind](recall.SYMBOLS, HIDDEN), recall.SYMBOLS))
    cause.fault(trial)
    torch.manual_seed(100 + seed)  # a second draw of the same weights is no remedy
    if remedy is not None:
        remedy(trial)
    rnn, rho = trial.net.rnn, radius(trial.net)
    held = recall.sequences(trial.length, HELD_OUT, generator(10_000))
    probe = (held[0][:, :PROBED], held[1][:PROBED])
    fresh = recall.endless(trial.length, BATCH, generator(1000 + seed))
    signs, moved, before = [], [], rnn.weight_hh_l0.detach().clone()
    probed = {steps * tenth // 10 for tenth in (8, 9, 10)}
    for step, _ in enumerate(trial.train(map(trial.shaped, fresh), steps), 1):
        now = rnn.weight_hh_l0.detach().clone()
        moved.append(((now - before).norm() / (before.norm() + 1e-12)).item())
        before = now
        if step in probed:
            signs.append(measure(trial, probe, rho))
    found = {name: middle_of([one[name] for one in signs]) for name in signs[0]}
    x, y = trial.shaped(held)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(trial.net(x), y).item()
    return Outcome(found | updates(moved, steps // 5), loss)


def rows_of(cause: Cause, seeds: int, steps: int) -> Iterator[tuple[str, ...]]:
    """Yield a row for the untreated net and for each remedy."""
    untreated = [follow(cause, None, s, steps) for s in range(seeds)]
    for name, remedy in {"none": None, **cause.remedies}.items():
        found = untreated
        if remedy is not None:
            found = [follow(cause, remedy, s, steps) for s in range(seeds)]
        pairs = list(zip(found, untreated, strict=True))
        gone = sum(one.is_rid_of(cause.symptom) for one in found)
        counts = sum(one.counts(cause.symptom, other) for one, other in pairs)
        new = Counter(name for one, other in pairs for name in one.new(other))
        value = [LIMITS[cause.symptom].sign * o.signs[cause.symptom] for o in found]
        yield (
            f"{cause.name} ({cause.kind})",
            f"{cause.symptom} {spread(value, '.2g')}",
            name,
            f"{gone}/{seeds}",
            "" if remedy is None else f"{counts}/{seeds}",
            spread([o.loss for o in found]),
            "" if remedy is None else spread([a.loss / b.loss for a, b in pairs]),
            ", ".join(f"{name} {times}/{seeds}" for name, times in new.items()),
        )


def short(rows: Iterable[Sequence[str]]) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each cause: what counts in most of its runs, and what does not.

    Args:
        rows: Those of the whole table.
    """
    for cause, treated in groupby(rows, key=itemgetter(0)):
        good, bad = [], []
        for _, _, remedy, gone, counts, _, ratio, new in treated:
            won, _, of = counts.partition("/")
            if not of:
                continue  # untreated
            if 2 * int(won) > int(of):
                good.append(f"{remedy} {counts} (x{ratio.partition(' ')[0]})")
            else:
                instead = new and not gone.startswith("0/")
                bad.append(f"{remedy} {counts}" + f", {new} instead" * bool(instead))
        yield cause, "; ".join(good), "; ".join(bad)


def cures(results: Results, seeds: int, quick: bool) -> None:
    """Report the whole table, and the short of it."""
    steps = 20 if quick else 120
    title = (
        f"Which remedy cures which cause: delayed recall of one of {recall.SYMBOLS}, "
        f"T = {LENGTH} unless the cause is the length, H = {HIDDEN}, B = {BATCH}, "
        f"Adam {RATE}, {steps} steps; remedies before step 0. The trivial predictor "
        f"has {TRIVIAL:.2f}."
    )
    columns = (
        "cause (net)",
        "symptom at the end",
        "remedy",
        "gone",
        "counts",
        "loss",
        "loss / untreated",
        "new symptoms",
    )
    rows = (row for cause in CAUSES for row in rows_of(cause, seeds, steps))
    whole, again = tee(rows)
    results.table("cures", columns, title, whole)
    columns = ("cause (net)", "counts (loss over untreated)", "does not")
    results.table("short", columns, "The short of it.", short(again))
