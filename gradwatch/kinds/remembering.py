"""The base of the rules: what a rule remembers is one dataclass, saved as it is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from gradwatch import saved

_S = TypeVar("_S", bound=saved.State)


class Remembering(Generic[_S]):
    """A rule with a state.

    Args:
        state: What it remembers, as it is at the start.
    """

    def __init__(self, state: _S) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return saved.write(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If the state is not one of this rule.
        """
        saved.restore(self._state, state, type(self).__name__, _OLDER)


def _named(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was saved without a version: by the names of private attributes."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        name = _NAMES.get(key, key.removeprefix("_"))
        if name == "facts":  # stood in a dict of their own, without empty scopes
            found |= value
        elif name not in ("wants", "wishes"):
            found[name] = _part(name, value)
    return found


def _part(name: str, value: Any) -> Any:
    if name not in _PARTS or not isinstance(value, Mapping):
        return value
    if name == "running" and "steps" not in value:  # one for each stream
        return {stream: _named(running) for stream, running in value.items()}
    return _named(value)


_NAMES: Final = {"_back": "away"}
_PARTS: Final = ("levels", "seen", "losses", "running")
_OLDER: Final[Mapping[int, saved.Upgrade]] = MappingProxyType({0: _named})
"""What can be read beside the present layout, which is version 1."""
