"""The verb completion: what a shell needs to complete the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from gradwatch.shell.verb import Answer, Verb

_ABOUT: Final = """\
Print the completion of this command for bash or zsh, made by shtab
(pip install 'gradwatch[completion]').

example: eval "$(gradwatch completion bash)"              in ~/.bashrc
         gradwatch completion zsh > ~/.zfunc/_gradwatch  in a folder of your fpath
"""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"))


def completion(parser: Callable[[], argparse.ArgumentParser]) -> Verb:
    """Return the verb for a command line.

    Args:
        parser: Makes the parser of the whole command line.
    """

    def answer(given: argparse.Namespace) -> Answer:
        try:
            import shtab
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Completions are made by shtab: pip install 'gradwatch[completion]'."
            ) from error
        script = str(shtab.complete(parser(), shell=given.shell))
        return Answer(script, {"shell": given.shell, "script": script})

    return Verb(
        name="completion",
        help="print the completion for bash or zsh",
        description=_ABOUT,
        arguments=_arguments,
        answer=answer,
    )
