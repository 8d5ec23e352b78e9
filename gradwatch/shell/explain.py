"""The verb explain: the page of a kind, the row of a metric, what a cause means."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gradwatch import metrics
from gradwatch.kinds.catalogue import CATALOGUE as KINDS
from gradwatch.metrics import CATALOGUE as METRICS
from gradwatch.metrics import PREFIX
from gradwatch.shell.verb import Answer, Verb

_ABOUT: Final = """\
Print what a kind of alert, a metric or a cause means. Of a kind: its page, with the
numbers that decide it, its causes and what helps against each. Without a name: all
kinds, with a line on each.

example: gradwatch explain vanishing
         gradwatch explain gradwatch/rnn/l0/rho
"""
_MARKS: Final = ("<!-- catalogue -->", "<!-- by hand -->")
"""Lines of a page that are no part of what it says."""
_WIDTH: Final = 88


def page(kind: str) -> str:
    """Return the page of a kind of alert, as Markdown."""
    package = Path(__file__).parents[1]
    shipped, written = package / "pages", package.parent / "docs" / "alerts"
    folder = shipped if shipped.is_dir() else written  # of an installation from source
    text = (folder / f"{kind}.md").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if line not in _MARKS)


def _of_metric(name: str) -> str:
    row = METRICS[name]
    key = f"{PREFIX}/{name}" if row.scope == "run" else f"{PREFIX}/<stream>/{name}"
    sent = "sent by default" if row.headline else "in the run folder"
    lines = [
        f"{name}: a metric",
        *textwrap.wrap(row.meaning, _WIDTH),
        "",
        f"key     {key}",
        f"unit    {row.unit}",
        f"range   {row.range}",
        f"group   {row.depth}: watch(every={{{row.depth!r}: N}}) sets how often",
        f"nets    {row.nets}",
        f"W&B     {sent}",
    ]
    if row.gates:
        gates = row.gates.replace("yes", "each")
        lines.append(f"gates   {gates}; without a gate: {row.unsuffixed or '-'}")
    return "\n".join(lines)


def _of_cause(name: str) -> Iterator[str]:
    for kind in KINDS.values():
        cause = kind.causes.get(name)
        if cause is None or name == kind.name:
            continue
        named = f"gradwatch.{cause.remedy}(...)" if cause.remedy else "-"
        helps = re.sub(r"\{(\w+)[^}]*\}", r"<\1>", cause.do) or named
        parts = ("told by", cause.known), ("why", cause.why), ("do", helps)
        yield "\n".join(
            [f"{name}: a cause of {kind.name}"]
            + [
                textwrap.fill(f"{head:8}{text}", _WIDTH, subsequent_indent=" " * 8)
                for head, text in parts
            ]
            + [f"more:   gradwatch explain {kind.name}"]
        )


def _explained(given: argparse.Namespace) -> Answer:
    if given.name is None:
        lines = [f"{k.name:16} {k.meaning}" for k in KINDS.values()]
        wrapped = [
            textwrap.fill(line, _WIDTH, subsequent_indent=" " * 17) for line in lines
        ]
        kinds = [{"kind": k.name, "meaning": k.meaning} for k in KINDS.values()]
        return Answer("\n".join(wrapped), {"kinds": kinds})
    name = given.name
    if name.startswith(f"{PREFIX}/") and (row := metrics.of(name)) is not None:
        name = row.name
    found: list[dict[str, Any]] = []
    if name in KINDS:
        found.append({"what": "kind", "text": page(name)})
    if name in METRICS:
        found.append({"what": "metric", "text": _of_metric(name)})
    found += [{"what": "cause", "text": text} for text in _of_cause(name)]
    if not found:
        raise ValueError(_unknown(name))
    return Answer(
        "\n\n".join(part["text"] for part in found), {"name": name, "found": found}
    )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, names(), n=3)
    hint = f"near it: {', '.join(near)}" if near else f"there are {', '.join(KINDS)}"
    return f"no kind of alert, metric or cause is called {name!r}; {hint}."


def names() -> list[str]:
    """Return all that can be explained."""
    causes = {c for kind in KINDS.values() for c in kind.causes if c is not None}
    return sorted({*KINDS, *METRICS, *causes})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="KIND|METRIC|CAUSE",
        help="such as vanishing, rho or forget_gate; none: list the kinds",
    )


EXPLAIN: Final = Verb(
    name="explain",
    help="print what a kind of alert, a metric or a cause means",
    description=_ABOUT,
    arguments=_arguments,
    answer=_explained,
)
