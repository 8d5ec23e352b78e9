"""Reading a pickle of tensors without running it.

The reader goes through the opcodes. What the pickle names is looked up in a table of
what torch.save writes, and refused if it is not there; what it calls is answered by
functions of this file, none of which makes more than it is given. A tensor stays a
:class:`Claim` on a storage. The memory that the pickle takes is counted, and bounded by
its own length.
"""

from __future__ import annotations

import io
import pickletools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

_SLACK: Final = 2**20
_GROWTH: Final = 24
_MOST: Final = 256 * 2**20
"""Bytes that a pickle may take in memory: so many, and so many for each of its own, but
no more than the last. Measured: 12 for the names of a model, 18 for Adam's state."""
_TOO_MUCH: Final = (
    "would allocate far more memory than weights need, and was not read; save "
    "model.state_dict() alone."
)
_DIMENSIONS: Final = 64
"""Of a tensor, at most; PyTorch's own limit."""
_ARGUMENTS: Final = 16
"""Of a call, at most."""
_SHARED: Final = frozenset([None, *range(-5, 257)])
"""What CPython keeps one of, however often it occurs."""


class CheckpointError(ValueError):
    """A file that cannot be read as weights; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A tensor by what a pickle tells of it; nothing of it is made.

    Attributes:
        key: Name of its storage; empty where it holds no values.
        dtype: Type of its numbers.
        offset: Place of its first number in the storage, counted in numbers.
        size: Its shape.
        stride: For each dimension, how many numbers a step along it passes over.
        layout: ``torch.strided``; if it is sparse, of the rest only ``size`` counts.
    """

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    layout: torch.layout = torch.strided

    def __post_init__(self) -> None:
        """Check what a pickle can give any type and size.

        Raises:
            ValueError: If it describes no tensor.
        """
        known = type(self.key) is str and isinstance(self.dtype, torch.dtype)
        for own in (self.size, self.stride):
            known = known and type(own) is tuple and len(own) <= _DIMENSIONS
        if not known or not all(
            type(number) is int and 0 <= number < 2**63
            for number in (self.offset, *self.size, *self.stride)
        ):
            raise ValueError("a tensor is described by what can be none")


# ---- what a pickle may name


def _dense(args: Any) -> Claim:
    (key, dtype), offset, size, stride = args[:4]
    return Claim(key, dtype, offset, size, stride)


def _typed(args: Any) -> Claim:
    return Claim(args[0][0], args[6], *args[1:4])


def _meta(args: Any) -> Claim:
    return Claim("", args[0], 0, args[1], args[2])


def _sparse(args: Any) -> Claim:
    [size] = [part for part in args[1][:_ARGUMENTS] if type(part) is tuple]
    return Claim("", torch.float32, 0, size, (), torch.sparse_coo)


def _mapping(args: Any) -> dict[str, Any]:
    """Return an OrderedDict's items; Python 2 wrote them as a list of pairs."""
    pairs = args[0] if args and type(args[0]) is list else []
    return {pair[0]: pair[1] for pair in pairs if type(pair[0]) is str}


def _bytes(args: Any) -> object:
    if any(isinstance(arg, int) for arg in args):
        raise CheckpointError(_TOO_MUCH)  # so many zeros, which no checkpoint needs
    return _NOTHING


def _called(function: Any, args: Any) -> Any:
    """Return what stands for the result of a call."""
    if type(args) is not tuple or len(args) > _ARGUMENTS:
        raise ValueError("a call has no proper arguments")
    if function is _NOTHING:
        return _NOTHING
    if type(function) is not str or function not in _CALLS:
        raise ValueError("what is called is no function")
    return _CALLS[function](args)


_NOTHING: Final = object()
"""Stands for whatever is not looked into."""
_CALLS: Final[Mapping[str, Callable[[Any], Any]]] = MappingProxyType(
    {
        "__builtin__ bytearray": _bytes,
        "builtins bytearray": _bytes,
        "collections Counter": lambda args: {},
        "collections OrderedDict": _mapping,
        "collections defaultdict": lambda args: {},
        "torch Size": lambda args: args[0],
        "torch._tensor _rebuild_from_type_v2": lambda args: _called(args[0], args[2]),
        "torch._utils _rebuild_device_tensor_from_cpu_tensor": lambda args: args[0],
        "torch._utils _rebuild_meta_tensor_no_storage": _meta,
        "torch._utils _rebuild_parameter": lambda args: args[0],
        "torch._utils _rebuild_parameter_with_state": lambda args: args[0],
        "torch._utils _rebuild_qtensor": _dense,
        "torch._utils _rebuild_sparse_tensor": _sparse,
        "torch._utils _rebuild_tensor": _dense,
        "torch._utils _rebuild_tensor_v2": _dense,
        "torch._utils _rebuild_tensor_v3": _typed,
    }
)
"""What a pickle may call -> what makes of the arguments what stands for the result."""
_STORAGES: Final = {
    "BFloat16": torch.bfloat16,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
    "QInt32": torch.int32,
    "QInt8": torch.int8,
    "QUInt2x4": torch.uint8,
    "QUInt4x2": torch.uint8,
    "QUInt8": torch.uint8,
    "Short": torch.int16,
}
"""PyTorch's classes of storages -> the type of their numbers, as they are stored."""
_INERT: Final = (
    *(
        f"{module} {name}"
        for module in ("builtins", "__builtin__")
        for name in ("complex", "dict", "float", "frozenset", "int", "list", "set")
    ),
    *(
        f"numpy.{core}.multiarray {name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    "_codecs encode",
    "numpy dtype",
    "numpy ndarray",
    "torch Tensor",
    "torch device",
    "torch per_channel_affine",
    "torch per_channel_affine_float_qparams",
    "torch per_channel_symmetric",
    "torch per_tensor_affine",
    "torch per_tensor_symmetric",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch._utils _rebuild_nested_tensor",
    "torch._utils _rebuild_wrapper_subclass",
    "torch.nn.parameter Parameter",
    "torch.serialization _get_layout",
)
"""What stands in real checkpoints beside weights, and need not be looked into."""
_NAMED: Final[Mapping[str, Any]] = MappingProxyType(
    {
        **{n: n for n in _CALLS},
        **{f"torch {n}": d for n, d in vars(torch).items() if type(d) is torch.dtype},
        **{f"torch {n}Storage": dtype for n, dtype in _STORAGES.items()},
        "torch.storage UntypedStorage": torch.uint8,
        **dict.fromkeys(_INERT, _NOTHING),
    }
)
"""All that a pickle may name -> what stands for it."""


# ---- the reader


class Pickle:
    """Reads one pickle.

    Args:
        size: Bytes of what it is in, which bound what it may take in memory.
    """

    def __init__(self, size: int) -> None:
        self.widths: dict[str, int] = {}
        """Storage -> bytes of each of its numbers."""
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = min(_SLACK + _GROWTH * size, _MOST)

    def load(self, stream: io.BytesIO) -> Any:
        """Read the pickle that starts where the stream is, and leave it at its end.

        Returns:
            Its value: of mappings the items whose key is a string, tensors as claims,
            and an inert object for what is not looked into.

        Raises:
            CheckpointError: If it names what is refused, or asks for too much memory;
                the message lacks the file's name at the start.
            ValueError: If it is broken. Also other errors, such as an IndexError.
        """
        for opcode, arg, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _PLAIN:
                self._push(arg, 0 if arg in _SHARED else sys.getsizeof(arg))
            elif name in _STEPS:
                _STEPS[name](self, arg)
            elif name != "PROTO":
                raise ValueError(f"its opcode {name} is none that torch.save writes")
            if self._left < 8 * len(self._stack):
                raise CheckpointError(_TOO_MUCH)
        raise ValueError("cut off")

    def _push(self, value: Any, cost: int = 0) -> None:
        self._stack.append(value)
        self._left -= cost

    def _mark(self) -> None:
        self._marks.append(len(self._stack))
        self._left -= 40

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _remember(self, place: int) -> None:
        if place not in self._memo:
            self._left -= 75
        self._memo[place] = self._stack[-1]

    def _tuple(self, items: list[Any]) -> None:
        self._push(tuple(items), 56 + 8 * len(items))

    def _tuple_of(self, count: int) -> None:
        items = self._stack[-count:]
        del self._stack[-count:]
        self._tuple(items)

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("what is appended to is no list")
        self._stack[-1].extend(items)
        self._left -= 8 * len(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise ValueError("what gets items is no mapping")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Any other key is of no use, and hashing a deep tuple ends the process.
            if type(key) is str:
                target[key] = value
                self._left -= 100

    def _global(self, name: str) -> None:
        if name not in _NAMED:
            raise CheckpointError(
                f"wants to run {name.replace(' ', '.')[:80]}, which is refused; save "
                "the weights alone: torch.save(model.state_dict(), path)."
            )
        self._push(_NAMED[name])

    def _call(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if type(args) is tuple:  # an OrderedDict copies a list
            self._left -= 100 * sum(len(arg) for arg in args if type(arg) is list)
        if self._left >= 0:
            self._push(_called(function, args), 100)

    def _storage(self) -> None:
        given = self._stack.pop()
        if type(given) is not tuple or len(given) not in (5, 6):
            raise ValueError("a storage is described by what can be none")
        what, dtype, key, _, _, *view = given
        if what != "storage" or type(key) is not str or type(dtype) is not torch.dtype:
            raise ValueError("a storage is described by what can be none")
        if view not in ([], [None]):
            raise ValueError("a view of a storage, which no torch.save writes now")
        self.widths.setdefault(key, dtype.itemsize)
        self._push((key, dtype), 150)


_PLAIN: Final = frozenset(
    {
        "BINFLOAT",
        "BININT",
        "BININT1",
        "BININT2",
        "BINUNICODE",
        "LONG1",
        "NONE",
        "SHORT_BINSTRING",
    }
)
"""Opcodes that push their argument."""
_STEPS: Final[Mapping[str, Callable[[Pickle, Any], Any]]] = MappingProxyType(
    {
        "APPEND": lambda p, arg: p._append([p._stack.pop()]),
        "APPENDS": lambda p, arg: p._append(p._since_mark()),
        "BINGET": lambda p, arg: p._push(p._memo[arg]),
        "BINPERSID": lambda p, arg: p._storage(),
        "BINPUT": lambda p, arg: p._remember(arg),
        "BUILD": lambda p, arg: p._stack.pop(),  # attributes, such as _metadata
        "EMPTY_DICT": lambda p, arg: p._push({}, 64),
        "EMPTY_LIST": lambda p, arg: p._push([], 56),
        "EMPTY_TUPLE": lambda p, arg: p._push(()),
        "GLOBAL": lambda p, arg: p._global(arg),
        "LONG_BINGET": lambda p, arg: p._push(p._memo[arg]),
        "LONG_BINPUT": lambda p, arg: p._remember(arg),
        "MARK": lambda p, arg: p._mark(),
        "NEWFALSE": lambda p, arg: p._push(False),
        "NEWOBJ": lambda p, arg: p._call(),
        "NEWTRUE": lambda p, arg: p._push(True),
        "REDUCE": lambda p, arg: p._call(),
        "SETITEM": lambda p, arg: p._set(
            [p._stack.pop(-2), p._stack.pop()],
        ),
        "SETITEMS": lambda p, arg: p._set(p._since_mark()),
        "TUPLE": lambda p, arg: p._tuple(p._since_mark()),
        "TUPLE1": lambda p, arg: p._tuple_of(1),
        "TUPLE2": lambda p, arg: p._tuple_of(2),
        "TUPLE3": lambda p, arg: p._tuple_of(3),
    }
)
"""The other opcodes that torch.save writes -> what they do."""
