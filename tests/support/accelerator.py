"""An accelerator with no hardware behind it: device ``toy``, in a process of its own.

Its memory is the host's under another label: DLPack hands a tensor over as it is, and
the label is changed on the way. So tensors on it are plain ``torch.Tensor``, with
addresses, views and versions; ``Module.to`` works; and the autograd engine runs their
backward on a device thread, as with CUDA.

As on an accelerator:

- what needs the device's answer waits for it, and is noted with the line of gradwatch
  that asked: numbers, shapes that depend on values, blocking copies either way;
- a copy to the host that does not block brings nothing until it is waited for: until
  then its place holds NaN, and for ever if nobody waits;
- an operation on tensors of both devices raises;
- a recurrent call is one operation, whose backward autograd does not see into. It is
  the CPU's own, so that training is bitwise as there.

Random numbers come from the CPU's generator, for the same reason. :func:`register`
cannot be undone, and has to come before the first backward of its process.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import gradwatch

NAME = "toy"
POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this torch lets Python be a device; 2.13 does, by private calls."""

_PACKAGE = f"{Path(gradwatch.__file__).parent}/"
_CPU, _EXTENSION = 1, 12  # DLDeviceType
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _relabelled(tensor: Tensor, device_type: int) -> Tensor:
    """Return the same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor.detach())
    label = _pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(label).value = device_type
    return torch._C._from_dlpack(capsule)


def _is_here(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _on_host(value):
    """Return a tensor of the device as one of the host; all else as it is."""
    return _relabelled(value, _CPU) if _is_here(value) else value


def _here(value):
    """Return a tensor of the host as one of the device; all else as it is."""
    if not isinstance(value, Tensor) or _is_here(value):
        return value
    return _relabelled(value, _EXTENSION)


# ---- what is noted


class Wait(NamedTuple):
    """One wait for the device.

    Attributes:
        what: The operation that waited.
        line: ``file:line`` of gradwatch that asked for it; empty for the user's own.
        step: The user's step in which it did.
        of: The user's steps whose copies it waited for.
    """

    what: str
    line: str
    step: int
    of: tuple[int, ...]


@dataclass
class Noted:
    """What has happened on the device.

    Attributes:
        step: The user's step, as the user counts it.
        waits: Every wait.
        copies: Of every copy to the host that did not block: in which step, which line.
        threads: The threads that ran its operations.
    """

    step: int = 0
    waits: list[Wait] = field(default_factory=list)
    copies: list[tuple[int, str]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def clear(self) -> None:
        """Begin again."""
        self.step = 0
        self.waits.clear()
        self.copies.clear()
        self.threads.clear()


NOTED = Noted()
_under_way: list[tuple[int, Tensor, Tensor]] = []
"""Copies that nobody has waited for: of which step, where to, and what."""


def on_the_way() -> int:
    """Return how many copies to the host nobody has waited for."""
    return len(_under_way)


def _asking_line() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            return f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _wait(what: str, copies: int | None = None) -> None:
    """Note a wait; what was under way has come by then, or the first few of it."""
    come = _under_way[:copies]
    del _under_way[:copies]
    for _, place, values in come:
        place.copy_(values)
    of = tuple(step for step, *_ in come)
    NOTED.waits.append(Wait(what, _asking_line(), NOTED.step, of))


def _send(values: Tensor) -> Tensor:
    """Begin a copy to the host; until it is waited for, its place holds none of it."""
    place = torch.empty_like(values)
    place.fill_(float("nan") if values.is_floating_point() else 77)
    _under_way.append((NOTED.step, place, values.clone()))
    NOTED.copies.append((NOTED.step, _asking_line()))
    return place


class Event:
    """A mark in the stream: waiting for it waits for the copies before it."""

    def __init__(self, device: object = None, **options: object) -> None:
        self._last = None

    def record(self, stream: object = None) -> None:
        """Put the mark behind what is under way."""
        self._last = _under_way[-1] if _under_way else None

    def query(self) -> bool:
        """Tell whether all before the mark has come."""
        return not any(copy is self._last for copy in _under_way)

    def synchronize(self) -> None:
        """Wait for what is before the mark, if that has not come yet."""
        for place, copy in enumerate(_under_way):
            if copy is self._last:
                _wait("Event.synchronize", place + 1)
                return


class _Module(getattr(backend_registration, "_DummyBackendModule", object)):
    """What ``torch.toy`` is, and ``torch.get_device_module("toy")`` returns."""

    Event = Event

    def current_stream(self, device: object = None) -> str:
        return "the only stream"

    def synchronize(self, device: object = None) -> None:
        _wait("synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Generator(torch.Generator):
    """A generator of the device is one of the CPU."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return super().__new__(cls, device="cpu")


# ---- what it can do

_METADATA = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""Whose kernels are asked for what is of sizes alone, on any device."""


def _any(op, *args, **kwargs):
    """Run an operation that has no kernel of its own here, by the host's kernel."""
    NOTED.threads.add(threading.get_ident())
    declared = op._schema.arguments
    if any(a.alias_info is not None and not a.alias_info.is_write for a in declared):
        # A view: the kernel only looks at sizes, and keeps the storage.
        return op.redispatch(_METADATA, *args, **kwargs)
    _refuse_strangers(op, (args, kwargs))
    if _has_to_wait(op, args):
        _wait(op.name())
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "cpu"}
    ours: dict[int, Tensor] = {}

    def host(value):
        found = _on_host(value)
        if found is not value:
            ours[id(found)] = value
        return found

    asked, named = tree_map(host, args), tree_map(host, kwargs)
    outs = [a.name for a in declared if a.is_out and a.name in kwargs]
    for name in outs:
        if not kwargs[name].numel():  # the kernel gives it its size
            named[name] = torch.empty(0, dtype=kwargs[name].dtype)
            ours[id(named[name])] = kwargs[name]
    # A number that stands for a tensor: the overload that takes one is chosen.
    number = any(
        str(a.type) == "Tensor" and isinstance(value, (int, float))
        for a, value in zip(declared, args, strict=False)
    )
    found = (op.overloadpacket if number else op)(*asked, **named)
    for name in outs:
        if named[name].shape != kwargs[name].shape:
            _replace(kwargs[name], named[name])
    return tree_map(lambda t: ours[id(t)] if id(t) in ours else _here(t), found)


def _refuse_strangers(op, given) -> None:
    tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    strangers = [tuple(t.shape) for t in tensors if not _is_here(t) and t.dim()]
    if strangers:
        raise RuntimeError(
            f"{op} got tensors of {NAME} and, of shapes {strangers}, of the host; "
            f"asked for at {_asking_line() or 'no line of gradwatch'}."
        )


def _replace(target: Tensor, values: Tensor) -> None:
    """Have a tensor of the device hold others, of another size."""
    ours = _here(values)
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(
        _METADATA, target, ours.untyped_storage(), 0, ours.shape, ours.stride()
    )


_SOLVED_ON_HOST = ("linalg_eig", "_linalg_eig", "_linalg_svd")


def _has_to_wait(op, args) -> bool:
    """Tell whether what an operation returns is a number, or of a size that follows."""
    name = op.name().removeprefix("aten::")
    if name.startswith("index"):
        indices = [t for t in tree_leaves(args[1:]) if isinstance(t, Tensor)]
        return any(t.dtype is torch.bool for t in indices)
    if name.startswith(_SOLVED_ON_HOST):
        return True
    waiting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return not waiting.isdisjoint(op.tags)


def _empty(op):
    def make(*args, **kwargs):
        return _here(op(*args, **{**kwargs, "device": "cpu", "pin_memory": False}))

    return make


def _to_copy(source: Tensor, **options):
    device, blocks = options.get("device"), not options.get("non_blocking")
    options = {k: v for k, v in options.items() if k != "non_blocking"}
    copy = torch.ops.aten._to_copy.default
    values = copy(_on_host(source), **{**options, "device": "cpu"})
    if device is None or device.type != "cpu":
        if blocks and not _is_here(source):
            _wait("a blocking copy to the device")
        return _here(values)
    if not blocks:
        return _send(values)
    _wait("a blocking copy to the host")
    return values


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if _is_here(source) and not _is_here(target):
        _wait("a copy to memory of the host that is not pinned")
    elif not _is_here(source) and not non_blocking:
        _wait("a blocking copy to the device")
    _on_host(target).copy_(_on_host(source))
    return target


class _Whole(torch.autograd.Function):
    """A recurrent call as one operation: the CPU's, with the CPU's own backward."""

    @staticmethod
    def forward(ctx, call, *tensors):
        given = [_on_host(t) for t in tensors]
        for tensor, ours in zip(tensors, given, strict=True):
            if ours is not tensor:
                ours.requires_grad_(tensor.requires_grad)
        with torch.enable_grad():
            found = call(given)
        ctx.save_for_backward(*tensors)
        ctx.given, ctx.found = given, tree_leaves(found)
        # Copies: what is written into them is not what backward needs.
        returned = tree_map(lambda t: _here(t.detach().clone()), ctx.found)
        return returned[0] if isinstance(found, Tensor) else tuple(returned)

    @staticmethod
    def backward(ctx, *grads):
        _ = ctx.saved_tensors  # raises where one of them was written since
        wanted = ctx.needs_input_grad[1:]
        asked = [t for t, want in zip(ctx.given, wanted, strict=True) if want]
        found = torch.autograd.grad(
            ctx.found,
            asked,
            [_on_host(grad) for grad in grads],
            retain_graph=True,
            allow_unused=True,
        )
        each = iter(found)
        return (None, *(_here(next(each)) if want else None for want in wanted))


def _whole(op):
    """Return what runs a recurrent operation as one, whatever its arguments."""

    def run(*args):
        leaves, spec = tree_flatten(args)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def call(tensors):
            filled = dict(zip(places, tensors, strict=True))
            now = [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
            return op(*tree_unflatten(now, spec))

        return _Whole.apply(call, *(leaves[i] for i in places))

    return run


_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_RECURRENT = [
    f"{kind}{form}" for kind in _KINDS for form in (".input", ".data", "_cell")
]
_libraries: list[torch.library.Library] = []


def register() -> None:
    """Make the device in this process; for good."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    torch.Generator, torch.Event = _Generator, Event
    torch.set_num_threads(1)
    every = torch.library.Library("_", "IMPL")
    every.fallback(_any, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name in ("empty.memory_format", "empty_strided"):
        aten.impl(name, _empty(_named(name)), "PrivateUse1")
    aten.impl("_to_copy", _to_copy, "PrivateUse1")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in _RECURRENT:
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            aten.impl(name, _whole(_named(name)), key)
    _libraries.extend((every, aten))  # which end with what holds them


def _named(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")
