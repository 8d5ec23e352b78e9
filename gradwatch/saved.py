"""State that outlives a process: dataclasses, written as plain values and read again.

A state is a dataclass of plain values, of containers of these, and of other states.
Where it is written, its version goes with it. It is read whole before anything is
replaced: one that does not fit is refused with a sentence, and what was there stays.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol, TypeVar

VERSION_KEY: Final = "version"

Upgrade = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_NONE: Final[Mapping[int, Upgrade]] = types.MappingProxyType({})
UNCHANGED: Final[Mapping[int, Upgrade]] = types.MappingProxyType({0: dict})
"""For a state that was the same before it had a version."""


class State(Protocol):
    """A dataclass that is saved; ``VERSION`` is that of its layout, 1 by default."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


_State = TypeVar("_State", bound=State)


def write(state: State) -> dict[str, Any]:
    """Return a state as plain values, with its version."""
    plain = {f.name: _plain(getattr(state, f.name)) for f in dataclasses.fields(state)}
    return {VERSION_KEY: version(type(state)), **plain}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        unknown = [n for n, item in items.items() if item is None and _frozen(value)]
        return {n: _plain(item) for n, item in items.items() if n not in unknown}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque | set | frozenset):
        return [_plain(item) for item in value]
    return value


def version(kind: type[State]) -> int:
    """Return the version of a state's layout."""
    return int(getattr(kind, "VERSION", 1))


def read(
    kind: type[_State], raw: Any, what: str, older: Mapping[int, Upgrade] = _NONE
) -> _State:
    """Return the state that :func:`write` wrote.

    Args:
        kind: Its dataclass.
        raw: The plain values.
        what: What it is of, for an error.
        older: Version that can still be read, 0 for none -> what makes of its plain
            values those of the next version.

    Raises:
        ValueError: If it is of a newer version, of one that can no longer be read, or
            does not fit.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"the state of {what} is {raw!r}; expected a mapping.")
    now, then = version(kind), raw.get(VERSION_KEY, 0)
    complete = then == now  # else a part may have been left out where it was empty
    while then != now:
        if then not in older:
            raise ValueError(
                f"the state of {what} has the layout of version {then}; this version "
                f"of gradwatch reads version {now}. Go on with the version that wrote "
                "it, or without its state."
            )
        raw, then = older[then](raw), then + 1
    plain = {key: value for key, value in raw.items() if key != VERSION_KEY}
    found: _State = _dataclass(kind, plain, f"the state of {what}", complete)
    return found


def restore(
    state: _State, raw: Any, what: str, older: Mapping[int, Upgrade] = _NONE
) -> None:
    """Go on from what :func:`write` wrote; nothing is changed where it does not fit."""
    _replace(state, read(type(state), raw, what, older))


def reset(state: State, keep: Collection[str] = ()) -> None:
    """Begin again, but for the fields that are to be kept."""
    _replace(state, type(state)(), keep)


def _replace(state: Any, new: Any, keep: Collection[str] = ()) -> None:
    """Take another state's values; what others hold on to stays the same object."""
    for field in dataclasses.fields(state):
        if field.name in keep:
            continue
        old, value = getattr(state, field.name), getattr(new, field.name)
        held = dataclasses.is_dataclass(old) and not _frozen(old)
        if held and type(old) is type(value):
            _replace(old, value)
        else:
            setattr(state, field.name, value)


def _frozen(kind: Any) -> bool:
    """Tell whether a dataclass, or what is of one, is frozen."""
    return bool(kind.__dataclass_params__.frozen)


# ---- by types


def _dataclass(kind: Any, raw: Any, path: str, complete: bool) -> Any:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path} is {raw!r}; expected a mapping.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := raw.keys() - fields.keys():
        raise ValueError(
            f"{path} has {', '.join(sorted(map(str, unknown)))}; expected "
            f"{', '.join(fields)}."
        )
    # A fact that is None is left out; so may be what was empty in an older layout.
    lenient = _frozen(kind) or not complete
    needed = [name for name, f in fields.items() if not (lenient and _has_default(f))]
    if missing := sorted(name for name in needed if name not in raw):
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    return kind(
        **{k: _value(hints[k], v, f"{path}, {k},", complete) for k, v in raw.items()}
    )


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _value(hint: Any, raw: Any, path: str, complete: bool) -> Any:
    """Return a plain value as the type that a field has."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return raw
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, raw, path, complete)
    if origin in (types.UnionType, typing.Union):
        if raw is None and type(None) in inner:
            return None
        [only] = [one for one in inner if one is not type(None)]
        return _value(only, raw, path, complete)
    if origin is not None and isinstance(raw, Mapping) and issubclass(origin, Mapping):
        return {
            k: _value(inner[1], item, f"{path} {k}", complete)
            for k, item in raw.items()
        }
    if origin in (list, tuple, Sequence) and isinstance(raw, list | tuple):
        if origin is not tuple:
            return [_value(inner[0], item, path, complete) for item in raw]
        each = [inner[0]] * len(raw) if inner[-1] is Ellipsis else inner
        if len(each) == len(raw):
            return tuple(
                _value(h, x, path, complete) for h, x in zip(each, raw, strict=True)
            )
    elif hint is float and isinstance(raw, int | float):
        return float(raw)
    elif isinstance(hint, type) and isinstance(raw, hint):
        return raw
    shown = getattr(hint, "__name__", hint)
    raise ValueError(f"{path} is {raw!r}; expected {shown}.")
