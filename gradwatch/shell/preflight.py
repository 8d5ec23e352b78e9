"""The verb preflight: a look at a model before it is trained."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any, Final

from gradwatch.before import Preflight, inspected
from gradwatch.shell.verb import Answer, Verb

_ABOUT: Final = """\
Look at a model before it is trained: forward and backward of a few batches. How far
back gradients arrive, whether they grow, stuck gates, the inputs, the axes, the loss
and its read-out, the optimizer. Nothing is trained, and nothing is written.

FUNCTION is called without arguments and returns those of gradwatch.preflight: a dict,
or (model, batches, loss_fn) and, as a fourth, a dict of the others.

  0  nothing failed
  1  a check failed
  2  the function could not be found, or called

example: gradwatch preflight train:preflight_arguments
"""


_KNOWN: Final = tuple(inspect.signature(inspected).parameters)


def _tried(given: argparse.Namespace) -> Answer:
    try:
        arguments = _arguments_of(_called(given.function))
        odd = arguments.keys() - _KNOWN
        if odd:
            raise ValueError(
                f"no argument of gradwatch.preflight is called {sorted(odd)[0]!r}; "
                f"they are {', '.join(_KNOWN)}."
            )
        found = inspected(**arguments)
    except ValueError:
        raise
    except Exception as error:  # of the user's own code: where it is, is told
        traceback.print_exc()
        raise ValueError(
            f"{given.function} cannot be tried ({type(error).__name__}: {error})."
        ) from error
    return Answer(str(found), plain(found), code=0 if found.ok else 1)


def plain(found: Preflight) -> dict[str, Any]:
    """Return a verdict as plain values."""
    return {
        "ok": found.ok,
        "lag": found.lag,
        "checks": [check._asdict() for check in found.checks],
        "starts": [start._asdict() for start in found.starts],
    }


def _called(name: str) -> Any:
    """Return what the function that was named returns."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{name!r} names no function; expected module:function.")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"there is no module {error.name!r} here; {name!r} is looked up from the "
            "current folder."
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ValueError(f"{module} has no function {function!r}.")
    return found()


def _arguments_of(given: Any) -> dict[str, Any]:
    """Return the arguments of a preflight, by name."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, tuple) and len(given) in (3, 4):
        names = ("model", "batches", "loss_fn")
        more = given[3] if len(given) == 4 else {}
        return {**dict(zip(names, given, strict=False)), **more}
    raise ValueError(
        f"the function returned {type(given).__name__}; expected a dict of the "
        "arguments of gradwatch.preflight, or (model, batches, loss_fn)."
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("function", metavar="MODULE:FUNCTION")


PREFLIGHT: Final = Verb(
    name="preflight",
    help="look at a model before it is trained",
    description=_ABOUT,
    arguments=_arguments,
    answer=_tried,
)
