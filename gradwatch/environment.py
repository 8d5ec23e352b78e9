"""What is set for a machine, or one start of a program, in the environment.

A variable stands for an argument of ``watch`` that the call leaves as it is. What a
variable says wrongly is reported and not used: it is no reason to stop a training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Final, Literal

from gradwatch import console
from gradwatch.kinds.judge import Rule, check_mute

BUDGET: Final = 0.03
"""The budget, unless another one is given."""
_YES: Final = ("1", "true", "yes", "on")
_NO: Final = ("", "0", "false", "no", "off")


def disabled() -> bool:
    """Tell whether ``GRADWATCH_DISABLED`` has every watch do nothing."""
    given = os.environ.get("GRADWATCH_DISABLED", "")
    word = given.strip().lower()
    if word not in (*_YES, *_NO):
        _wrong(
            "GRADWATCH_DISABLED",
            given,
            "1, true, yes or on, or 0, false, no or off",
            "The watch stays on",
        )
    return word in _YES


def budget(given: float | None) -> float | None:
    """Return the budget: as given, or of ``GRADWATCH_BUDGET`` where it is the default.

    Args:
        given: The argument of ``watch``.
    """
    if given != BUDGET or not (said := os.environ.get("GRADWATCH_BUDGET", "").strip()):
        return given
    if said.lower() == "none":
        return None
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if 0 < value < 1:
        return value
    _wrong("GRADWATCH_BUDGET", said, "a share such as 0.01, or none", "It is not used")
    return given


def on_alert(given: Any) -> Any:
    """Return what an alarm does: as given, or of ``GRADWATCH_ON_ALERT`` where None.

    Args:
        given: The argument of ``watch``.
    """
    said = os.environ.get("GRADWATCH_ON_ALERT", "").strip().lower()
    if given is not None or said in ("", "none"):
        return given
    if said == "raise":
        word: Literal["raise"] = "raise"
        return word
    _wrong("GRADWATCH_ON_ALERT", said, "raise or none", "It is not used")
    return None


def muted(rules: Sequence[Rule], streams: Sequence[str]) -> list[str | tuple[str, str]]:
    """Return what ``GRADWATCH_MUTE`` names beside what the call mutes.

    Args:
        rules: The rules of the watch.
        streams: Names of its streams.
    """
    found: list[str | tuple[str, str]] = []
    for said in os.environ.get("GRADWATCH_MUTE", "").split(","):
        kind, colon, stream = said.strip().partition(":")
        entry = (kind, stream) if colon else kind
        if not kind:
            continue
        try:
            check_mute([entry], rules, streams)
        except ValueError as error:
            console.report(f"GRADWATCH_MUTE: {error} It is not used.")
        else:
            found.append(entry)
    return found


def _wrong(name: str, given: str, expected: str, so: str) -> None:
    console.report(f"{name} is {given!r}; expected {expected}. {so}.")
