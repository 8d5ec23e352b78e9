"""A read-only view of nn.RNN, nn.LSTM, nn.GRU and their cells.

It finds the streams of a model, knows how PyTorch stacks the gates, and reads weights
without running a parametrization: some of them change at every read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradwatch import _torch
from gradwatch.record import CELL, Stream

WEIGHTS: Final = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
RECURRENT: Final = (nn.RNNBase, nn.RNNCellBase)
GATES: Final[Mapping[str, tuple[str, ...]]] = {
    "RNN_TANH": (),
    "RNN_RELU": (),
    "LSTM": ("i", "f", "g", "o"),
    "GRU": ("r", "z", "n"),
    CELL: (),
}
KEEPS: Final[Mapping[str, str]] = {"LSTM": "f", "GRU": "z"}
"""The gate that keeps the state; in PyTorch's GRU z keeps."""
_WRAPPERS: Final = ("module", "_orig_mod", "_fsdp_wrapped_module")
_BEHIND: Final = ("", "_orig", "_g", "_v")
"""What pruning, the old spectral_norm and the old weight_norm call the real weight."""


@dataclass(frozen=True, slots=True)
class Recurrence:
    """A stream together with the module that runs it.

    Attributes:
        stream: What is known of it without the module.
        module: The nn.RNNBase or nn.RNNCellBase, or a cell of the user's own.
        suffix: End of its weights' names: ``_l0``, ``_l1_reverse``; empty for a cell.
    """

    stream: Stream
    module: nn.Module
    suffix: str


Cells = Iterable[type[nn.Module] | nn.Module]
"""Cells of the user's own: classes, all instances of which count, or modules."""


def recurrences(model: nn.Module, cells: Cells = ()) -> list[Recurrence]:
    """Return every recurrence of a model, in the order of its modules.

    Args:
        model: A recurrent module, or any module that contains some.
        cells: What counts as one beside PyTorch's own.

    Returns:
        At least one recurrence. A module that is registered twice counts once.

    Raises:
        TypeError: If ``model`` is no ``nn.Module``, or a cell neither a class of
            modules nor a module.
        ValueError: If it contains no recurrent module, one on the device ``meta``, or
            not one of the cells.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is {_of_type(model)}; expected an nn.Module that is or "
            "contains an nn.RNN, nn.LSTM, nn.GRU or one of their cells."
        )
    own = _own_cells(model, cells)
    found: list[Recurrence] = []
    for path, module in model.named_modules():
        if id(module) in own:
            found.append(_of_cell(clean_path(path), module))
        elif isinstance(module, RECURRENT):
            found.extend(_of_module(clean_path(path), module))
    if not found:
        raise ValueError(_nothing_found(model))
    empty = [r.stream.name for r in found if _on_meta(r.module)]
    if empty:
        raise ValueError(
            f"the weights of {', '.join(empty)} are on the device 'meta' and hold no "
            "values yet; call model.to_empty(device=...) and initialise them first."
        )
    return found


def named(
    found: Sequence[Recurrence], streams: str | Iterable[str] | None
) -> list[Recurrence]:
    """Return the recurrences that are named.

    Args:
        found: All recurrences of a model.
        streams: Names of streams, or of modules for all their streams; None: all.

    Raises:
        ValueError: If a name is unknown; the message lists the known ones.
    """
    if streams is None:
        return list(found)
    wanted = {streams} if isinstance(streams, str) else set(_names(streams))
    known = {n for r in found for n in (r.stream.name, r.stream.module)}
    if not wanted or wanted - known:
        unknown = ", ".join(map(repr, sorted(wanted - known))) or "an empty list"
        names = ", ".join(r.stream.name for r in found[:20])
        raise ValueError(f"streams= names {unknown}; this model has {names}.")
    return [r for r in found if wanted & {r.stream.name, r.stream.module}]


def _names(streams: Iterable[str]) -> list[str]:
    names = list(streams) if isinstance(streams, Iterable) else [streams]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise TypeError(
            f"streams= got {_of_type(wrong[0])}; expected names of streams or modules."
        )
    return names


def clean_path(path: str) -> str:
    """Return a module path or parameter name without the names of wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _own_cells(model: nn.Module, cells: Cells) -> set[int]:
    """Return the ids of the modules that count as cells of the user's own."""
    if not isinstance(cells, Iterable) or isinstance(cells, nn.Module):
        raise TypeError(f"cells is {_of_type(cells)}; expected a list: cells=[MyCell].")
    modules, found = list(model.modules()), set[int]()
    for cell in cells:
        if isinstance(cell, type) and issubclass(cell, nn.Module):
            own, name = [m for m in modules if isinstance(m, cell)], cell.__name__
        elif isinstance(cell, nn.Module):
            own, name = [m for m in modules if m is cell], f"this {type(cell).__name__}"
        else:
            raise TypeError(
                f"cells holds {_of_type(cell)}; expected classes of modules, or "
                "modules: cells=[MyCell]."
            )
        if not own:
            kinds = sorted({type(m).__name__ for m in modules})
            raise ValueError(
                f"cells names {name}, which the model does not contain; it contains "
                f"{', '.join(kinds[:20])}."
            )
        found |= set(map(id, own))
    return found


def _of_cell(path: str, module: nn.Module) -> Recurrence:
    path = path or type(module).__name__.lower()
    return Recurrence(_stream(path, path, CELL, 0, 0, module), module, "")


def _of_module(path: str, module: nn.Module) -> Iterator[Recurrence]:
    path = path or parametrize.type_before_parametrizations(module).__name__.lower()
    if isinstance(module, nn.RNNCellBase):
        yield Recurrence(
            _stream(path, path, _cell_kind(module), 0, 0, module), module, ""
        )
        return
    assert isinstance(module, nn.RNNBase)
    for layer in range(module.num_layers):
        for direction in range(2 if module.bidirectional else 1):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            name = f"{path}.{suffix[1:]}"
            stream = _stream(name, path, module.mode, layer, direction, module)
            yield Recurrence(stream, module, suffix)


def _stream(
    name: str, path: str, kind: str, layer: int, direction: int, module: nn.Module
) -> Stream:
    proj, hidden, reads = (
        _size(module, name) for name in ("proj_size", "hidden_size", "input_size")
    )
    if layer:
        reads = (proj or hidden) * (2 if getattr(module, "bidirectional", False) else 1)
    way: Literal["forward", "reverse"] = "reverse" if direction else "forward"
    return Stream(
        name=name,
        module=path,
        kind=kind,
        layer=layer,
        direction=way,
        input_size=reads,
        hidden_size=hidden,
        proj_size=proj,
        gates=GATES[kind],
    )


def _size(module: nn.Module, name: str) -> int:
    """Return a size that a module has under a name; 0 where it has none."""
    value = getattr(module, name, 0)
    return value if isinstance(value, int) else 0


def _cell_kind(cell: nn.RNNCellBase) -> str:
    if isinstance(cell, nn.LSTMCell):
        return "LSTM"
    if isinstance(cell, nn.GRUCell):
        return "GRU"
    return "RNN_RELU" if getattr(cell, "nonlinearity", "tanh") == "relu" else "RNN_TANH"


def used_weights(module: nn.Module, *, recurrent_only: bool) -> dict[str, Tensor]:
    """Return the weights that the last forward used, detached, by their names.

    Args:
        module: An nn.RNNBase or nn.RNNCellBase, right after its forward.
        recurrent_only: Whether W_hh, and W_hr of a projection, are all that is wanted.

    Returns:
        ``weight_hh_l0``, ``bias_ih_l1_reverse`` and so on; without a suffix for a cell.
        What is not readable without side effects is left out, and what is sharded.
    """
    if isinstance(module, nn.RNNCellBase):
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
        values = [_attribute(module, name) for name in names]
    else:
        names = _torch.flat_weight_names(module)
        flat = _torch.flat_weights(module)
        values = list(flat) if flat else [_attribute(module, name) for name in names]
    wanted = ("weight_hh", "weight_hr") if recurrent_only else ("weight", "bias")
    return {
        name: value.detach()
        for name, value in zip(names, values, strict=False)
        if isinstance(value, Tensor)
        and name.startswith(wanted)
        and not _torch.is_sharded(value)
    }


def _attribute(module: nn.Module, name: str) -> Tensor | None:
    """Read a weight where that runs nothing: a parametrized one would be computed."""
    value = module._parameters.get(name)
    if value is None:
        value = module.__dict__.get(name)  # the old weight_norm and pruning put it here
    return value if isinstance(value, Tensor) else None


def stored_weights(recurrence: Recurrence) -> dict[str, Tensor]:
    """Return all weights of a stream as they are now, detached, whatever holds them.

    A parametrized weight is computed, in evaluation mode: in training mode some change
    when they are read, such as that of ``parametrizations.spectral_norm``.

    Returns:
        ``weight_ih``, ``weight_hh``, and where they exist ``bias_ih``, ``bias_hh`` and
        ``weight_hr``: without the suffix of layer and direction.
    """
    module, found = recurrence.module, dict[str, Tensor]()
    for name in WEIGHTS:
        whole = name + recurrence.suffix
        value = _attribute(module, whole)
        if value is None and parametrize.is_parametrized(module, whole):
            value = _computed(module, whole)
        if value is not None:
            found[name] = value.detach()
    return found


def _computed(module: nn.Module, name: str) -> Tensor:
    steps = list(module.parametrizations[name].modules())  # type: ignore[index, union-attr]  # nn.Module types attributes loosely
    modes = [step.training for step in steps]
    try:
        for step in steps:
            step.training = False
        with torch.no_grad():
            value: Tensor = getattr(module, name)
    finally:
        for step, mode in zip(steps, modes, strict=True):
            step.training = mode
    return value


def gate_matrices(stream: Stream, weight: Tensor, projection: Tensor | None) -> Tensor:
    """Return the recurrent matrix of each gate, the one that maps h to h.

    Args:
        stream: The stream that the weight belongs to.
        weight: W_hh, shape ``(gates * H, H)``, or ``(gates * H, P)`` with projection.
        projection: W_hr, shape ``(P, H)``, or None.

    Returns:
        Shape ``(gates, H, H)``; with a projection ``W_g W_hr``.
    """
    count = max(len(stream.gates), 1)
    blocks = weight.detach().reshape(count, stream.hidden_size, -1)
    return blocks if projection is None else blocks @ projection.detach()


def parameter_names(recurrence: Recurrence) -> dict[str, list[str]]:
    """Return the parameters behind a stream's weights, inside its module.

    Returns:
        ``{"hh": [...], "ih": [...], "bias": [...]}``: names as the module's own
        ``named_parameters`` gives them. A parametrised weight has the parameters
        behind it, such as ``parametrizations.weight_hh_l0.original0``. Of a cell of the
        user's own all are in the first group.
    """
    own = [name for name, _ in recurrence.module.named_parameters()]
    if recurrence.stream.kind == CELL:
        return {"hh": own}
    groups = {"hh": ["weight_hh"], "ih": ["weight_ih"], "bias": ["bias_ih", "bias_hh"]}
    return {
        group: [
            name
            for weight in weights
            for name in own
            if name in {weight + recurrence.suffix + end for end in _BEHIND}
            or name.startswith(f"parametrizations.{weight}{recurrence.suffix}.")
        ]
        for group, weights in groups.items()
    }


def plain_weight(recurrence: Recurrence) -> nn.Parameter | None:
    """Return W_hh where it is a parameter, and this process has the whole of it.

    None where it is parametrised or sharded.
    """
    weight = own_weight(recurrence)
    return None if _torch.is_sharded(weight) else weight


def own_weight(recurrence: Recurrence) -> nn.Parameter | None:
    """Return W_hh where it is a parameter, sharded or not; None: it is parametrised.

    Of a cell of the user's own it is the largest parameter: nobody knows which is W_hh.
    """
    if recurrence.stream.kind == CELL:
        own = recurrence.module.parameters()
        return max(own, key=lambda weight: weight.numel(), default=None)
    return recurrence.module._parameters.get("weight_hh" + recurrence.suffix)


def _on_meta(module: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in module.parameters())


def _of_type(value: object) -> str:
    kind = type(value)
    return f"a {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")


def _kept_aside(model: nn.Module) -> str:
    """Return where recurrent modules are kept in a plain list or dict, if any are."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value
            if name.startswith("_") or not isinstance(value, dict | list | tuple):
                continue
            if any(isinstance(one, nn.RNNBase | nn.RNNCellBase) for one in held):
                return f"model.{path}.{name}" if path else f"model.{name}"
    return ""


def _nothing_found(model: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules()} - {type(model).__name__})
    shown = ", ".join(kinds[:8]) + (", ..." if len(kinds) > 8 else "")
    told = (
        f"{type(model).__name__} contains no nn.RNN, nn.LSTM, nn.GRU nor one of their "
        f"cells, the modules that gradwatch knows"
        + (f"; it contains {shown}." if shown else ".")
    )
    if place := _kept_aside(model):
        return (
            f"{told} {place} holds modules that PyTorch does not see there: they are "
            "not in model.parameters(), and no optimizer is given them. Keep them in "
            "an nn.ModuleList."
        )
    stepped = _stepped(model)
    if stepped:
        names = ", ".join(dict.fromkeys(type(module).__name__ for _, module in stepped))
        return (
            f"{told} {' and '.join(path for path, _ in stepped[:3])} takes a state, it "
            f"seems: to watch it, pass gradwatch.watch(model, cells=[{names}])."
        )
    return (
        f"{told} Where one of these is called once a time step with the state that it "
        "returned, name it: gradwatch.watch(model, cells=[ItsClass])."
    )


_STATES: Final = frozenset(
    ("h", "hx", "c", "cx", "hidden", "hidden_state", "state", "states", "carry")
)


def _stepped(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules whose forward takes a state, by the names of its arguments."""
    found = []
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        try:
            names = list(inspect.signature(module.forward).parameters)
        except (TypeError, ValueError):  # a forward that is no Python function
            continue
        if _STATES & {name.rstrip("_t0123456789") or name for name in names[1:]}:
            found.append((f"model.{path}" if path else "the model", module))
    return found


def shape_of(module: nn.Module, given: object) -> tuple[int, int] | None:
    """Return ``(T, B)`` of what a recurrent module was given; None where unknown.

    A packed sequence has the longest T; a cell has T = 1.
    """
    if isinstance(given, nn.utils.rnn.PackedSequence):
        batches = given.batch_sizes
        return (len(batches), int(batches[0])) if len(batches) else (0, 0)
    if not isinstance(given, Tensor):
        return None
    sizes = list(given.shape)
    if isinstance(module, nn.RNNCellBase):
        return 1, (sizes[0] if len(sizes) == 2 else 1)
    if len(sizes) == 2:
        return sizes[0], 1
    if len(sizes) != 3:
        return None
    batch_first = bool(getattr(module, "batch_first", False))
    return (sizes[1], sizes[0]) if batch_first else (sizes[0], sizes[1])
