"""What a trial says about a model: a line each, and how much it matters.

The thresholds are those of the alarms, whose rows have the reasons; the few that are
of a first look alone are here, and measured in ``docs/preflight.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from gradwatch.before.targets import Targets
from gradwatch.before.trial import Seen
from gradwatch.kinds.axes_mixed import AxesMixed
from gradwatch.kinds.catalogue import CATALOGUE
from gradwatch.kinds.dead_units import DEAD_UNITS
from gradwatch.kinds.exploding import EXPLODING
from gradwatch.kinds.gate_stuck import GATE_STUCK
from gradwatch.kinds.loss_mismatch import LossMismatch
from gradwatch.kinds.not_updating import line_of
from gradwatch.kinds.saturated import SATURATED
from gradwatch.kinds.target_broadcast import TargetBroadcast
from gradwatch.metrics import stream_key
from gradwatch.record import Stream

OK, NOTE, WARN, FAIL = "ok", "note", "WARN", "FAIL"
_SCALE: Final = 32.0
"""Root mean square of an input that is far out of scale, at least."""
_SMALL: Final = 2.0**-9
"""The same, at most."""
_EARLY: Final = 0.1
"""Share of a sequence that a direction has seen where it has seen hardly any."""
_END: Final = 0.85
"""The same, from which on only the end of a sequence is read."""
_PADDED: Final = 0.25
"""Share of padding that is told, at least: images have blank ends, up to .2."""
_SHORTEST: Final = 8
"""Time steps of a sequence whose ends are told apart, at least."""


_OUTSIDE: Final = 0.05
"""Share of targets that no output can be, from which on that is a fault."""
_LEFT: Final = 0.01
"""Share of their variance that cannot be learned then, from which on it is one."""
_OPEN: Final = (
    "end with a linear layer, nothing behind it; or scale the targets to that range"
)


class Check(NamedTuple):
    """One line of a preflight.

    Attributes:
        name: What was checked, in a word.
        sign: ``ok``, ``note``, ``WARN`` or ``FAIL``.
        text: What was seen.
        do: What to do; empty for nothing.
    """

    name: str
    sign: str
    text: str
    do: str = ""


def growth(seen: Seen) -> Iterator[Check]:
    """Yield whether a gradient grows on its way back through time."""
    found = [(max(g), s) for s in seen.streams if (g := seen.metric(s, "growth_log10"))]
    if not found:
        return
    most, stream = max(found, key=lambda one: one[0])
    text = f"gradients grow at most 10^{most:.1f} through time"
    if most >= EXPLODING.at("growth"):
        do = f"gradwatch.init.orthogonal_(model, streams=[{stream.name!r}])"
        yield Check("growth", FAIL, f"{text}, in {stream.name}", do)
    else:
        yield Check("growth", OK, text)


def gates(seen: Seen) -> Iterator[Check]:
    """Yield gates that are shut, dead units and saturated activations."""
    odd = False
    share = GATE_STUCK.at("share")
    for stream in seen.streams:
        for metric, gate in (("shut", "i"), ("shut", "o"), ("open", "z")):
            values = seen.metric(stream, metric, gate)
            if values and min(values) >= share and not _meant(seen, stream):
                odd = True
                text = f"gate {gate} of {stream.name} is {metric} in {min(values):.0%}"
                yield Check("gates", FAIL, text, "gradwatch explain gate_stuck")
        dead = seen.metric(stream, "dead")
        if dead and min(dead) >= DEAD_UNITS.at("dead"):
            odd = True
            text = f"{min(dead):.0%} of the units of {stream.name} are dead"
            do = f"gradwatch.init.orthogonal_(model, streams=[{stream.name!r}])"
            yield Check("units", FAIL, text, do)
        flat = seen.metric(stream, "saturated")
        if flat and min(flat) >= SATURATED.at("share"):
            odd = True
            text = f"{min(flat):.0%} of the activations of {stream.name} are saturated"
            yield Check("units", FAIL, text, "gradwatch explain saturated")
    looked = any(seen.metric(stream, "act_deriv") for stream in seen.streams)
    if looked and not odd:
        yield Check("units", OK, "no gate is stuck, no layer dead or saturated")


def _meant(seen: Seen, stream: Stream) -> bool:
    """Tell whether a gate is on one side because memory was set so."""
    times = seen.metric(stream, "timescale")
    facts = seen.facts.modules.get(stream.module)
    if not times or facts is None or not facts.T:
        return False
    return 1 < times[-1] / facts.T <= GATE_STUCK.at("meant")


def inputs(seen: Seen) -> Iterator[Check]:
    """Yield the scale of the inputs, and what of them is padding."""
    for path, facts in seen.facts.modules.items():
        name = path or "the model"
        if facts.input_finite is False:
            yield Check("inputs", FAIL, f"the input of {name} holds NaN or Inf")
            continue
        scale = facts.input_scale
        if scale is None:
            continue
        text = f"input of {name}: finite, scale {scale:g}"
        if facts.padding:
            text += f"; {facts.padding:.0%} of its steps are padding"
        if scale >= _SCALE or 0 < scale <= _SMALL:
            do = SATURATED.causes["inputs"].do
            yield Check("inputs", FAIL, f"{text}, far from 1", do)
        else:
            yield Check("inputs", OK, text)


def finite(seen: Seen) -> Iterator[Check]:
    """Yield losses and gradients that are not finite."""
    odd = [loss for loss in seen.losses if not math.isfinite(loss)]
    if odd:
        text = f"the loss is {odd[0]}"
        yield Check("finite", FAIL, text, "gradwatch explain nonfinite")
    elif any(number > 0 for number in seen.run("nonfinite")):
        what = "gradients hold NaN or Inf, and the loss does not"
        yield Check("finite", FAIL, what, "gradwatch explain nonfinite")


def padding(seen: Seen) -> Iterator[Check]:
    """Yield read-outs of the last step of sequences that end in padding."""
    for stream in _uppermost(seen):
        facts = seen.facts.modules.get(stream.module)
        share = (facts.padding if facts is not None else None) or 0.0
        read = _read_at(seen, stream)
        if (
            stream.direction == "forward"
            and share >= _PADDED
            and min(read, default=0) > _END
        ):
            behind, of = seen.padded.get(stream.module, (0, 0))
            where = f"behind the padding in {behind} of {of} sequences"
            yield Check(
                "padding",
                WARN,
                f"{stream.name} is read at the end: {where if of else 'behind padding'}"
                f" ({share:.0%} of the steps)",
                "nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False), "
                "and read h_n",
            )


def _uppermost(seen: Seen) -> list[Stream]:
    """Return the streams of the last layer of each module."""
    last: dict[str, int] = {}
    for stream in seen.streams:
        last[stream.module] = max(stream.layer, last.get(stream.module, 0))
    return [s for s in seen.streams if s.layer == last[s.module]]


def _read_at(seen: Seen, stream: Stream) -> list[float]:
    """Return where the loss reads a stream: 0 its first step, just below 1 its last.

    Nothing where a sequence is too short for its ends to be told apart.
    """
    key = stream_key(stream, "direct")
    profiles = [r.profiles[key] for r in seen.records if key in r.profiles]
    if any(len(own) < _SHORTEST for own in profiles):
        return []
    return [
        t / len(own) for own in profiles for t, value in enumerate(own) if value > 0
    ]


def gradients(seen: Seen) -> Iterator[Check]:
    """Yield streams that get no gradient, or are read where they begin.

    A direction that is read at its first step has had no state yet, so that its W_hh
    has no gradient: that is one fault, and told once.
    """
    for stream in seen.streams:
        end = stream.name.rpartition(".")[2]
        own = [n for n in seen.trainable if _is_recurrent(n, stream, end)]
        if _read_too_early(seen, stream):
            yield Check(
                "direction",
                FAIL,
                f"{stream.name} is read where it begins: it has seen hardly any input",
                "read h_n, or out[:, 0] (out[0] where time comes first): there it ends",
            )
        elif own and not any(n in seen.with_gradient for n in own):
            if seen.held is not None and not seen.held.intersection(own):
                continue  # nobody means to train it, as of a target network
            text = f"no gradient reaches W_hh of {stream.name}"
            yield Check("gradient", FAIL, text, "gradwatch explain no_gradient")


def _is_recurrent(name: str, stream: Stream, end: str) -> bool:
    owner, _, weight = name.rpartition(".")
    within = owner == stream.module or (not owner and "." not in stream.module)
    return within and weight in (f"weight_hh_{end}", "weight_hh")


def targets(found: Targets) -> Check:
    """Return whether outputs can be what the targets are."""
    size = max(abs(found.lowest), abs(found.highest))
    low, high = (round(v / size, 4) * size + 0.0 for v in found[:2])
    span = f"{low:.3g} to {high:.3g}"
    if found.outside < _OUTSIDE or found.left < _LEFT:
        text = f"targets of the first batch, {span}, are what outputs can be"
        return Check("targets", OK, text)
    if math.isinf(found.least):
        stay = f"below {found.most:.3g}"
    elif math.isinf(found.most):
        stay = f"above {found.least:.3g}"
    else:
        stay = f"between {found.least:.3g} and {found.most:.3g}"
    text = f"outputs stay {stay}, whatever the weights; {found.outside:.0%} of the "
    return Check("targets", FAIL, f"{text}targets, {span}, lie outside", _OPEN)


def held(seen: Seen) -> Iterator[Check]:
    """Yield parameters with a gradient that no optimizer holds."""
    if seen.held is None:
        return
    missing = sorted(seen.with_gradient - seen.held)
    known = len(seen.with_gradient)
    text = f"optimizers hold {known - len(missing)} of {known} tensors with a gradient"
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        yield Check("optimizers", FAIL, f"{text}; not {named}", line_of(missing))
    else:
        yield Check("optimizers", OK, text)


def _read_too_early(seen: Seen, stream: Stream) -> bool:
    """Tell whether a reverse direction is read before it has seen the sequence."""
    if stream.direction != "reverse" or stream not in _uppermost(seen):
        return False
    read = _read_at(seen, stream)
    return bool(read) and max(read) < _EARLY


_OF_LOSS: Final = (LossMismatch, TargetBroadcast, AxesMixed)


def fits(seen: Seen) -> Iterator[Check]:
    """Yield whether loss, read-out and axes fit each other, by the loss's graph."""
    odd = False
    for make in _OF_LOSS:
        rule = make(seen.streams)
        for record in seen.records:
            rule.update(record)
        if rule.suspected is not None:
            odd = True
            cause, shown = rule.suspected
            name = "axes" if make is AxesMixed else "loss"
            yield Check(name, FAIL, shown, CATALOGUE[rule.kind].causes[cause].do)
    if not odd:
        yield from _loss(seen)


def _loss(seen: Seen) -> Iterator[Check]:
    kind, loss = seen.facts.run.loss_kind, seen.losses[0]
    constant = seen.run("loss_constant")
    text = f"loss: {kind.replace('_', ' ') if kind else 'not recognised'}; {loss:.3g}"
    if constant:
        text += f" beside {constant[0]:.3g} of the best constant output"
    yield Check("loss", OK if kind else NOTE, text)


ALL: Final[Sequence[Callable[[Seen], Iterator[Check]]]] = (
    finite,
    growth,
    gates,
    inputs,
    padding,
    gradients,
    fits,
    held,
)
"""The checks that need no more than one trial."""
