"""Facts: what is known of a run and is not a number. The third catalogue.

A field below is a fact; its class is its scope, and its type and meaning stand beside
it. ``docs/files.md`` has the same as a table. A fact is None where it is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Self, TypeVar


def _fact(meaning: str) -> Any:
    return field(default=None, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What is true of one step alone."""

    skipped_by: str | None = _fact(
        "who skipped the step: `scaler`, `clipper`, `user`, `refused` "
        "(gradwatch itself), or `unknown` while no step has been taken"
    )
    nonfinite: tuple[str, ...] | None = _fact(
        "the first parameters, on the way back, whose gradient was not finite"
    )
    weights_finite: bool | None = _fact(
        "False where a gradient was not finite, and a weight was not before it"
    )
    broken: str | None = _fact(
        "where the loss is not finite: the first that is not, of what its graph still "
        "holds as backward comes to the first weight, on the CPU: `data`, `weights`, "
        "or `forward: <function> <nan or inf>`; `loss` where all of that is finite"
    )
    carriers: Mapping[str, float] | None = _fact(
        "the parameters that carry an unusual total norm, each with its share of the "
        "square"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What is true of the loop until it changes."""

    cleared: bool | None = _fact(
        "whether the gradients of a step are cleared before the next one's; recorded "
        "from the first time they were not"
    )
    scaled: bool | None = _fact("whether a loss scaler multiplies the gradients")
    written_late: bool | None = _fact(
        "True where gradients were written, as a clip does, after the optimizer's step "
        "and before they were cleared"
    )
    unchanged: int | None = _fact(
        "backward passes in which no weight has changed by a bit, while no optimizer "
        "has used a gradient; recorded from 20 on"
    )
    steps_elsewhere: bool | None = _fact(
        "beside it: whether an optimizer steps that holds tensors of the same shapes, "
        "and none of the model's"
    )
    optimizers: Mapping[str, Mapping[str, Any]] | None = _fact(
        "the options of each group of parameters that an optimizer trains: `lr`, "
        "`weight_decay`, `momentum`, `betas`, `eps`, `maximize`, ...; those that are 0 "
        "are left out"
    )
    unheld: tuple[str, ...] | None = _fact(
        "the parameters that have a gradient, and that no optimizer that has stepped "
        "holds"
    )
    readout: str | None = _fact(
        "the module whose output the loss reads; its path, empty for the model itself"
    )
    loss_kind: str | None = _fact(
        "what the loss is: `cross_entropy`, `nll` (of anything but a log-softmax), "
        "`bce`, `bce_with_logits`, `mse`, `l1`, `smooth_l1`, `huber`, `ctc`; several "
        "with a `+`"
    )
    loss_terms: int | None = _fact(
        "how many such functions there are, such as one a time step; at most 512"
    )
    loss_reads: str | None = _fact(
        "the functions between the read-out and the loss, the last one first: "
        "`softmax`, `relu`, ...; views are left out"
    )
    loss_axes: str | None = _fact(
        "the axis of each softmax among them, cross entropy's own first"
    )
    loss_views: tuple[str, ...] | None = _fact(
        "views between the recurrent module and the loss that mix axes, such as "
        "`20x32x8 to 32x20x8`: they tear an axis apart and join the pieces to others"
    )
    loss_classes: tuple[int, ...] | None = _fact(
        "of a log-softmax before a negative log-likelihood: along how many entries it "
        "adds up to 1, and how many classes the loss takes them for"
    )
    loss_negative: float | None = _fact(
        "of squared errors behind a ReLU: share of the targets below 0, of those that "
        "can be seen, where an output is above 0"
    )
    loss_broadcast: str | None = _fact(
        "how the read-out was expanded to be compared with targets of another shape, "
        "such as `32x1 to 32x32`; empty where it was not"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """What was true of a recurrent module when it was last sampled."""

    T: int | None = _fact("time steps of its calls, joined")
    B: int | None = _fact("sequences in a call")
    dtype: str | None = _fact("type of its output")
    autocast: str | None = _fact("type that autocast computes in, where it is on")
    reach: str | None = _fact(
        "whether a gradient reached it: `reached`, `detached`, `unused`, or `gone`"
    )
    call_steps: int | None = _fact(
        "time steps of each of several calls that one sequence is made of, where all "
        "have as many, and more than one"
    )
    stateless_calls: int | None = _fact(
        "calls in a step, where there are several, each of one time step and given no "
        "state"
    )
    cut: int | None = _fact(
        "time steps of earlier calls whose state was detached, and that receive no "
        "gradient"
    )
    state_detached: bool | None = _fact(
        "whether it goes on from the detached state of an earlier call"
    )
    replay: str | None = _fact("why a replay was left out or is approximate")
    padding: float | None = _fact(
        "share of its input, at the end of the sequences, that is all zeros"
    )
    same_batch: int | None = _fact(
        "how many consecutive probes found the same input, at most 8"
    )
    input_finite: bool | None = _fact("False where its input held NaN or Inf")
    input_scale: float | None = _fact(
        "root mean square of its input, all-zero steps left out, as the nearest power "
        "of 2"
    )
    input_offset: float | None = _fact(
        "largest share of a channel's mean square that its mean makes up: 1 for a "
        "channel that is constant"
    )
    input_spread: float | None = _fact(
        "largest root mean square of a channel over the smallest that is not 0, as "
        "the nearest power of 10"
    )
    blank: float | None = _fact(
        "share of its input, but for the end of the sequences, that is all zeros"
    )
    repeats: float | None = _fact(
        "share of its time steps whose input is that of the step before"
    )
    input_order: str | None = _fact(
        "the one axis of an input of data along which neighbours are alike: `time`, or "
        "`batch`; of 64 time steps and sequences, von Neumann ratio at most .3, along "
        "the other at least .8"
    )
    sequences_read: float | None = _fact(
        "share of the sequences of a call whose outputs a gradient reaches"
    )
    steps_read: float | None = _fact(
        "share of its time steps whose outputs a gradient reaches, in any sequence"
    )
    samples_mix: bool | None = _fact(
        "whether in a cell of your own, without batch norm in it, the state of one "
        "sequence depends on another's"
    )
    evaluating: bool | None = _fact(
        "True where a gradient reached a call in evaluation mode"
    )
    graph_kept: bool | None = _fact(
        "True where its first state brings the graph of an earlier step along"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFacts:
    """What was true of a stream when it was last sampled."""

    requires_grad: bool | None = _fact("whether W_hh can learn")
    in_optimizer: bool | None = _fact(
        "whether an optimizer that has stepped holds W_hh"
    )
    lr: float | None = _fact("its learning rate, as the nearest power of 2")
    drive: str | None = _fact("what drives its units: `input`, `state`, or `both`")
    state_size: int | None = _fact(
        "entries of the state of a cell of your own, all its tensors together"
    )


_Scope = TypeVar("_Scope", StepFacts, RunFacts, ModuleFacts, StreamFacts)

STEP_SCOPE: Final = StepFacts()
RUN_SCOPE: Final = RunFacts()
_NONE: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts of one record: those of the step, and those that have changed.

    Attributes:
        step: Of this step alone.
        run: Of the loop.
        modules: Of each recurrent module, by its path.
        streams: Of each stream, by its name.
    """

    step: StepFacts = STEP_SCOPE
    run: RunFacts = RUN_SCOPE
    modules: Mapping[str, ModuleFacts] = field(default_factory=lambda: _NONE)
    streams: Mapping[str, StreamFacts] = field(default_factory=lambda: _NONE)

    def __bool__(self) -> bool:
        """Tell whether there is any."""
        return bool(
            self.modules
            or self.streams
            or self.step != STEP_SCOPE
            or self.run != RUN_SCOPE
        )

    def since(self, known: Facts) -> Facts:
        """Return what is new beside what was known: whole modules and streams."""
        return Facts(
            step=self.step,
            run=RunFacts(**_differing(_plain(known.run), _plain(self.run))),
            modules=_differing(known.modules, self.modules),
            streams=_differing(known.streams, self.streams),
        )

    def with_later(self, later: Facts) -> Facts:
        """Return these facts, with later ones in place of what they speak of."""
        return Facts(
            step=joined(self.step, later.step),
            run=joined(self.run, later.run),
            modules={**self.modules, **later.modules},
            streams={**self.streams, **later.streams},
        )

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for a file; what is not known is left out."""
        found: dict[str, Any] = {
            "step": _plain(self.step),
            "run": _plain(self.run),
            "modules": {path: _plain(own) for path, own in self.modules.items()},
            "streams": {name: _plain(own) for name, own in self.streams.items()},
        }
        return {scope: facts for scope, facts in found.items() if facts}

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any]) -> Self:
        """Return the facts of :meth:`to_plain`; names that are unknown are ignored."""
        modules, streams = raw.get("modules", {}), raw.get("streams", {})
        return cls(
            step=_scope(StepFacts, raw.get("step", {})),
            run=_scope(RunFacts, raw.get("run", {})),
            modules={path: _scope(ModuleFacts, own) for path, own in modules.items()},
            streams={name: _scope(StreamFacts, own) for name, own in streams.items()},
        )


NO_FACTS: Final = Facts()

_Value = TypeVar("_Value")


def _differing(
    known: Mapping[str, _Value], now: Mapping[str, _Value]
) -> Mapping[str, _Value]:
    return {name: value for name, value in now.items() if known.get(name) != value}


def joined(early: _Scope, later: _Scope) -> _Scope:
    """Return facts of one scope, with later ones in place of what they speak of."""
    return dataclasses.replace(early, **_plain(later))


def _plain(facts: StepFacts | RunFacts | ModuleFacts | StreamFacts) -> dict[str, Any]:
    own = {f.name: getattr(facts, f.name) for f in dataclasses.fields(facts)}
    return {name: value for name, value in own.items() if value is not None}


def _names(scope: type) -> set[str]:
    return {f.name for f in dataclasses.fields(scope)}


_TUPLES: Final = frozenset({"nonfinite", "unheld", "loss_views", "loss_classes"})


def _scope(kind: type[_Scope], raw: Mapping[str, Any]) -> _Scope:
    known = {name: raw[name] for name in _names(kind) & set(raw)}
    for name in _TUPLES & known.keys():
        known[name] = tuple(known[name])
    return kind(**known)


def state_from_format_1(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved state of a pipeline of format 1 with all its facts by scope."""
    memory = {**state["memory"], "facts": from_format_1(state["memory"]["facts"])}
    rules = {name: _rule_from_format_1(rule) for name, rule in state["rules"].items()}
    return {**state, "memory": memory, "rules": rules}


def _rule_from_format_1(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rule's state; its facts are its own, or of what it has seen."""
    found = dict(state)
    for name, value in state.items():
        if name == "facts":
            found[name] = from_format_1(value)
        elif name in ("seen", "_seen") and "facts" in value:
            found[name] = {**value, "facts": from_format_1(value["facts"])}
    return found


def from_format_1(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain facts as format 1 had them, in one dict of all scopes, by scope.

    Args:
        raw: Facts of the step and the run by name, those of modules and streams as a
            dict each under the module's path or the stream's name.

    Returns:
        What :meth:`Facts.from_plain` takes.
    """
    found: dict[str, Any] = {"step": {}, "run": {}, "modules": {}, "streams": {}}
    for name, value in raw.items():
        inner = set(value) if isinstance(value, Mapping) else set()
        if inner & (_names(ModuleFacts) | _names(StreamFacts)):
            for scope, kind in (("modules", ModuleFacts), ("streams", StreamFacts)):
                if own := {k: value[k] for k in value if k in _names(kind)}:
                    found[scope][name] = own
        elif name in _names(StepFacts):
            found["step"][name] = value
        elif name in _names(RunFacts):
            found["run"][name] = value
    return {scope: facts for scope, facts in found.items() if facts}
