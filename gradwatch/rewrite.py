"""Writing recurrent weights in place, with everything that holds or remembers them.

A weight may be a parameter, or computed by a parametrization from others. It is written
without replacing a parameter; a failure half-way puts back what was there; and what an
optimizer remembers of the old values is deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.optim import LBFGS, Adagrad, Optimizer

from gradwatch.numerics.spectral import spectral_radius
from gradwatch.record import Stream
from gradwatch.recurrent import KEEPS, Recurrence, gate_matrices, stored_weights

Optimizers = Optimizer | Iterable[Optimizer] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """What an initialiser changed in one stream.

    Attributes:
        stream: Name of the stream.
        weights: The weights that were written, inside their module.
        before: Spectral radius of each gate before, by the gate's letter; by the empty
            string for a vanilla net. NaN where the weights held NaN or Inf.
        after: The same, after.
        memory: Median memory of the units in steps, before and after, by the biases of
            the forget or update gate alone: 1 + exp(b). None where no bias of a gated
            net was written.
    """

    stream: str
    weights: tuple[str, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    memory: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Return one line: what was changed, with rho and memory before and after."""
        rho = ", ".join(
            f"{gate} {self.before[gate]:.3g} -> {self.after[gate]:.3g}".strip()
            for gate in self.after
        )
        line = f"{self.stream}: {', '.join(self.weights)}; rho {rho}"
        if self.memory is None:
            return line
        return f"{line}; memory {self.memory[0]:.3g} -> {self.memory[1]:.3g} steps"


class _Written(NamedTuple):
    """A new value on its way: of which weight of which stream.

    Attributes:
        recurrence: The stream that it belongs to.
        name: Name of the weight inside its module.
        value: The new value, in the weight's own dtype and on its device.
        behind: The tensors that hold it: parameters, and buffers of a parametrization.
    """

    recurrence: Recurrence
    name: str
    value: Tensor
    behind: list[Tensor]


New = Callable[[Stream, Mapping[str, Tensor]], dict[str, Tensor]]
"""From a stream and its present weights to the new values of some."""


def write(
    found: Sequence[Recurrence], new: New, optimizer: Optimizers
) -> list[Changed]:
    """Compute all, then write all, or leave everything as it was."""
    planned = _plan(found, new)
    behind = [tensor for written in planned for tensor in written.behind]
    held = holders(optimizer, behind)
    before = [(radii(r), _memory(r)) for r in found]
    with ExitStack() as undo:
        for written in planned:
            undo.callback(_restorer(written))
            _store(written)
        undo.pop_all()
    for one in held:
        forget(one, behind)
    names = [
        tuple(w.name for w in planned if w.recurrence.stream == r.stream) for r in found
    ]
    return [
        Changed(
            stream=r.stream.name,
            weights=n,
            before=rho,
            after=rho if _keeps_rho(n) else radii(r),
            memory=_both(memory, _memory(r)) if _has_bias(n) else None,
        )
        for r, n, (rho, memory) in zip(found, names, before, strict=True)
    ]


def _memory(recurrence: Recurrence) -> float | None:
    """Return the median memory in steps, by the gate's biases; None without one."""
    stream, weights = recurrence.stream, stored_weights(recurrence)
    gate = KEEPS.get(stream.kind)
    if gate is None or "bias_ih" not in weights:
        return None
    bias = (weights["bias_ih"].double() + weights["bias_hh"].double()).detach()
    of_gate = bias.chunk(len(stream.gates))[stream.gates.index(gate)]
    return float((1 + of_gate.exp()).median())


def _both(before: float | None, after: float | None) -> tuple[float, float] | None:
    return None if before is None or after is None else (before, after)


def _has_bias(names: Sequence[str]) -> bool:
    return any(name.startswith("bias") for name in names)


def _keeps_rho(names: Sequence[str]) -> bool:
    """Tell whether biases alone were written; else it may be by a shared weight."""
    return bool(names) and all(name.startswith("bias") for name in names)


def _plan(found: Sequence[Recurrence], new: New) -> list[_Written]:
    planned: list[_Written] = []
    seen: set[int] = set()
    for recurrence in found:
        old = stored_weights(recurrence)
        behind = {n: holding(recurrence, n + recurrence.suffix) for n in old}
        if "weight_hh" not in old:
            holding(recurrence, "weight_hh" + recurrence.suffix)  # says why
        for name, value in new(recurrence.stream, old).items():
            if any(id(tensor) in seen for tensor in behind[name]):
                continue  # two streams share this weight
            seen.update(id(tensor) for tensor in behind[name])
            ready = value.to(old[name])
            if not torch.isfinite(ready).all():
                raise ValueError(
                    f"the new {name} of {recurrence.stream.name} does not fit into "
                    f"{ready.dtype}; choose a smaller number."
                )
            whole = name + recurrence.suffix
            planned.append(_Written(recurrence, whole, ready, behind[name]))
    return planned


def holding(recurrence: Recurrence, name: str) -> list[Tensor]:
    """Return the tensors that hold a weight and can be written.

    Args:
        recurrence: The stream that the weight belongs to.
        name: The weight's name inside its module.

    Returns:
        The parameter itself; the parameters and buffers behind a parametrized weight.

    Raises:
        ValueError: If it cannot be written; the message says why and what to do.
    """
    module, stream = recurrence.module, recurrence.stream
    where = f"{name} of {stream.module}"
    if parametrize.is_parametrized(module, name):
        inner: Any = module.parametrizations[name]  # type: ignore[index]  # nn.Module types attributes loosely
        return [*inner.parameters(), *inner.buffers()]
    param = module._parameters.get(name)
    if param is None:
        raise ValueError(
            f"{where} is no parameter: pruning, the old weight_norm or spectral_norm, "
            "or a sharding wrapper computes it. Remove that first, initialise, and "
            "apply it again."
        )
    if hasattr(param, "to_local"):
        raise ValueError(
            f"{where} is sharded over processes; initialise before fully_shard()."
        )
    if param.is_inference():
        raise ValueError(
            f"{where} was made under torch.inference_mode() and cannot be written; "
            "make the model outside of it."
        )
    if param.dim() != (1 if name.startswith("bias") else 2):
        raise ValueError(
            f"{where} has shape {tuple(param.shape)}: a sharding wrapper has flattened "
            "it; initialise before wrapping."
        )
    return [param]


def _restorer(written: _Written) -> Callable[[], object]:
    """Return what puts a weight back as it is now."""
    module, name = written.recurrence.module, written.name
    if parametrize.is_parametrized(module, name):
        inner: Any = module.parametrizations[name]  # type: ignore[index]  # nn.Module types attributes loosely
        kept = {k: v.clone() for k, v in inner.state_dict().items()}
        return lambda: inner.load_state_dict(kept)
    [param] = written.behind
    value = param.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            param.copy_(value)

    return restore


def _store(written: _Written) -> None:
    module, name = written.recurrence.module, written.name
    if not parametrize.is_parametrized(module, name):
        with torch.no_grad():
            module._parameters[name].copy_(written.value)  # type: ignore[union-attr]  # nn.Module types attributes loosely
        return
    where = f"{name} of {written.recurrence.stream.module}"
    steps = "the parametrization " + ", ".join(
        type(step).__name__
        for step in module.parametrizations[name]  # type: ignore[index]  # nn.Module types attributes loosely
    )
    try:
        with torch.no_grad():
            setattr(module, name, written.value)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{where} is held by {steps}, which cannot take on new values for want of "
            "a right_inverse; remove it first."
        ) from error
    base = name.removesuffix(written.recurrence.suffix)
    now = stored_weights(written.recurrence)[base].cpu().double()
    wanted = written.value.cpu().double()
    off = (now - wanted).abs().max().item()
    if not off <= 1e-3 * max(wanted.abs().max().item(), 1e-3):
        raise ValueError(
            f"{where} is held by {steps}, which cannot take on the new values (off by "
            f"up to {off:.2g}); remove it first."
        )


def radii(recurrence: Recurrence) -> dict[str, float]:
    """Return rho of every gate by its letter; of a vanilla net by the empty string."""
    weights = stored_weights(recurrence)
    gates = gate_matrices(
        recurrence.stream, weights["weight_hh"], weights.get("weight_hr")
    )
    radii = [radius.rho for radius in spectral_radius(gates)]
    return dict(zip(recurrence.stream.gates or ("",), radii, strict=True))


# ---- what an optimizer remembers


def several(optimizer: Optimizers) -> list[Optimizer]:
    """Return what was given as ``optimizer=`` as a list, unchecked."""
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]


def holders(optimizer: Optimizers, params: Sequence[Tensor]) -> list[Optimizer]:
    """Return the optimizers given, if one of them holds one of the parameters.

    Raises:
        TypeError: If one is no optimizer.
        ValueError: If they hold none of the parameters.
    """
    given = several(optimizer)
    if optimizer is not None and not given:
        raise ValueError("optimizer= got no optimizer; leave it out, or name some.")
    if wrong := [type(o).__name__ for o in given if not isinstance(o, Optimizer)]:
        raise TypeError(
            f"optimizer= got {wrong[0]}; expected a torch.optim.Optimizer, or several. "
            "A wrapper's own is often its .optimizer."
        )
    ours = {id(p) for p in params}
    if (
        given
        and params
        and not any(
            id(p) in ours for o in given for g in o.param_groups for p in g["params"]
        )
    ):
        raise ValueError(
            "the optimizer given holds none of the weights to change; it was made from "
            "other tensors. Nothing was changed."
        )
    return given


def forget(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Delete what an optimizer remembers of some parameters, step counts included.

    Kept second moments hold a re-initialised layer still: W_hh moved 10 times less.
    """
    ours = {id(p) for p in params}
    for group in optimizer.param_groups:
        held = [p for p in group["params"] if id(p) in ours]
        if isinstance(optimizer, LBFGS) and held:
            held = group["params"]  # its one history is of all of them
        for param in held:
            if isinstance(optimizer, Adagrad):  # which makes its state only once
                if state := optimizer.state.get(param):
                    state["step"].zero_()
                    state["sum"].fill_(group["initial_accumulator_value"])
            else:
                optimizer.state.pop(param, None)
