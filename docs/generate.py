"""Write what comes from the catalogues: metrics, facts and the pages of the alerts.

Of ``docs/alerts/<kind>.md`` all down to the second mark is generated, of
``docs/alerts.md`` and ``docs/files.md`` the tables; the rest is by hand and kept.

``gradwatch/kinds/right.csv`` has how often alarms are right, which a report tells.

Tables of results, between their marks, are those that the benchmarks have kept in
``docs/results``.

Run: make docs
"""

import argparse
import dataclasses
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Final

import yaml

from gradwatch.cli import parser
from gradwatch.facts import ModuleFacts, RunFacts, StepFacts, StreamFacts
from gradwatch.kinds.catalogue import CATALOGUE as KINDS
from gradwatch.kinds.kind import Evidence, Kind
from gradwatch.metrics import CATALOGUE, Metric
from gradwatch.record import Stream

DOCS = Path(__file__).parent
RIGHT: Final = DOCS.parent / "gradwatch" / "kinds" / "right.csv"
BEGIN: Final = "<!-- catalogue -->"
END: Final = "<!-- by hand -->"
MEASURED = {
    "gradients": (
        "Every step. Gradients are read at the end of backward (before clipping) and "
        "as each optimizer is about to use them (after clipping)."
    ),
    "spectrum": (
        "At steps 0, 1, 2, 4, 8 and then every 50, of the weights that the forward of "
        "that step used; `sigma_max` and `orthogonality` every second time; "
        "`rho_drift` of the update that ends the step, absent where `W_hh` is "
        "parametrised. How: [spectral-radius.md](spectral-radius.md), "
        "[drift.md](drift.md)."
    ),
    "state": (
        "At steps 0, 1, 2, 4, 8 and then every 50, from a replay of `flow_samples` "
        "sequences of the step. How each is defined and read: [state.md](state.md)."
    ),
    "flow": (
        "At steps 0, 1, 2, 4, 8, 16, 32, 64 and then every 100, and when a rule asks: "
        "backpropagation through time over the same replay. How each is defined and "
        "read: [flow.md](flow.md)."
    ),
}

HEAD = """# Metrics

Generated from the catalogue `gradwatch/metrics.csv` by `make docs`; do not edit.

A key is `gradwatch/<metric>` for the whole run, `gradwatch/<stream>/<metric>` for one
stream and `gradwatch/<stream>/<metric>/<gate>` for one gate, with `/` for every dot of
the stream's name: `gradwatch/encoder/rnn/l1_reverse/rho/f`. The same key everywhere:
`watch.records`, `records.jsonl`, W&B, TensorBoard. A value that was not measured is
absent, never 0; NaN and Inf are kept as such.

Headline metrics go to W&B by default, without their gates; the others with
`gradwatch.sinks.Wandb(keys="all")`.
"""


def line(cells: list[str]) -> str:
    """Return one line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)]) + "\n"


def row(metric: Metric) -> list[str]:
    """Return the cells of one metric."""
    gates = metric.gates + (f" (whole: {metric.unsuffixed})" * bool(metric.unsuffixed))
    return [
        f"`{metric.name}`",
        metric.scope,
        gates or "-",
        metric.nets,
        "yes" if metric.headline else "-",
        metric.unit,
        metric.range,
        metric.meaning,
    ]


def page() -> str:
    """Return the reference of all metrics, depth by depth."""
    head = ["metric", "of", "gates", "nets", "headline", "unit", "range", "meaning"]
    parts = [HEAD]
    for depth, when in MEASURED.items():
        rows = [row(m) for m in CATALOGUE.values() if m.depth == depth]
        parts.append(f"\n## {depth.capitalize()}\n\n{when}\n\n{table(head, rows)}")
    return "".join(parts)


# ---- the pages of the alerts

_NETS: Final = (("LSTM", ("i", "f", "g", "o")), ("RNN_TANH", ()))
"""A gated net and a vanilla one: what helps may differ."""
_BY_RULE: Final[Mapping[tuple[str, str | None], str]] = {
    ("exploding", None): "clip.NormClip",
    ("spike", "bad_batch"): "clip.LogZClip",
}
"""Remedies that a rule names with numbers of its own, which no catalogue has."""


def title(kind: Kind) -> str:
    """Return the title of a kind's page."""
    words = kind.title.removeprefix("gradwatch: ")
    return words[0].upper() + words[1:]


def fill(text: str, indent: str = "") -> str:
    """Return a paragraph or an item of a list, in lines."""
    return (
        textwrap.fill(text, 96, subsequent_indent=indent, break_on_hyphens=False) + "\n"
    )


def number(value: float | None) -> str:
    """Return a threshold as it is read."""
    return "-" if value is None else f"{value:,.6g}"


def values(value: float | Sequence[float]) -> str:
    """Return a number, or several, as they are read."""
    return ", ".join(map(number, value if isinstance(value, Sequence) else [value]))


def plain(do: str) -> str:
    """Return a line of the catalogue with its placeholders in angle brackets."""
    parts = [
        text + (f"<{name}>" if name is not None else "")
        for text, name, _, _ in Formatter().parse(do)
    ]
    return "".join(parts)


def named(kind: Kind, cause: str | None) -> list[str]:
    """Return the remedies that an alert may name: of a gated net, then of others."""
    if (kind.name, cause) in _BY_RULE:
        return [_BY_RULE[kind.name, cause]]
    found = []
    # Only a gated net has a cause that is a gate.
    for mode, gates in _NETS[:1] if str(cause).endswith("_gate") else _NETS:
        stream = Stream(
            name="rnn.l0",
            module="rnn",
            kind=mode,
            layer=0,
            direction="forward",
            input_size=1,
            hidden_size=1,
            gates=gates,
        )
        remedy = kind.remedy(cause, stream)
        found += [remedy.name] if remedy is not None else []
    return list(dict.fromkeys(found))


def help_against(kind: Kind, cause: str | None) -> str:
    """Return what the message says to do."""
    names = [f"[`gradwatch.{n}`](../remedies.md)" for n in named(kind, cause)]
    if names:
        return "; of a vanilla net ".join(names)
    return f"`{plain(kind.causes[cause].do)}`"


def alert_head(kind: Kind) -> str:
    """Return the generated part of the page of a kind, down to the second mark."""
    decided = [
        ("warm-up", kind.warm_up),
        ("confirmed", kind.confirmed),
        ("over", kind.over),
        ("excused", kind.excused or "nothing"),
    ]
    causes = [
        [f"`{name}`" if name else "none", cause.known, help_against(kind, name)]
        for name, cause in kind.causes.items()
    ]
    why = ["cause", "how it is known", "what the message says to do"]
    evidence = "No number decides it.\n"
    if kind.evidence:
        head = ["evidence", "raised at", "cleared at", "why there"]
        evidence = table(head, [_number_row(e) for e in kind.evidence.values()])
    others = [
        [other.what, values(other.value), other.reason]
        for other in kind.numbers.values()
    ]
    return (
        f"{BEGIN}\n# {title(kind)}\n\n"
        + fill(f"`{kind.name}`, {_SEVERITY[kind.severity]}. {kind.meaning}")
        + f"\n{evidence}\n"
        + "".join(fill(f"- *{name}*: {text}", indent="  ") for name, text in decided)
        + (f"\n{table(['other numbers', 'value', 'why'], others)}" if others else "")
        + f"\n{table(why, causes)}\n{END}\n"
    )


_SEVERITY: Final = {
    "error": "an alarm (error)",
    "warning": "an alarm (warning)",
    "info": "a notice (info)",
}


def _number_row(evidence: Evidence) -> list[str]:
    return [
        evidence.what,
        number(evidence.at),
        number(evidence.clear),
        evidence.reason,
    ]


def explained_by(name: str) -> str:
    """Return the kinds that explain one while they are open, or nothing."""
    row = KINDS[name]
    ranks = {kind: KINDS[kind].rank for kind in KINDS if KINDS[kind].rank is not None}
    # An open error explains also what ranks above it.
    ranked = [
        kind
        for kind in sorted(ranks, key=ranks.__getitem__)
        if row.rank is not None and kind != name
        if ranks[kind] < row.rank or KINDS[kind].severity == "error"
    ]
    always = dict.fromkeys((*ranked, *row.explained_by))
    cells = [f"`{kind}`" for kind in always]
    cells += [f"`{kind}` if it names no cause" for kind in row.undecided_by]
    return ", ".join(cells)


def overview() -> str:
    """Return the tables of docs/alerts.md: all kinds, and which explains which."""
    rows = [
        [f"[`{kind.name}`](alerts/{kind.name}.md)", kind.severity, kind.meaning]
        for kind in KINDS.values()
    ]
    explained = {name: explained_by(name) for name in KINDS}
    return (
        f"{BEGIN}\n## All kinds\n\n{table(['kind', 'severity', 'meaning'], rows)}\n"
        "## What explains what\n\n"
        + table(
            ["an alert of", "is evidence of an open incident of"],
            [[f"`{name}`", kinds] for name, kinds in explained.items() if kinds],
        )
        + f"\n{END}\n"
    )


def facts_table() -> str:
    """Return the table of all facts."""
    scopes = {
        "step": StepFacts,
        "run": RunFacts,
        "modules": ModuleFacts,
        "streams": StreamFacts,
    }
    rows = [
        [scope, f"`{fact.name}`", str(fact.type).removesuffix(" | None"), told]
        for scope, kind in scopes.items()
        for fact in dataclasses.fields(kind)
        for told in [fact.metadata["meaning"]]
    ]
    head = ["scope", "fact", "type", "meaning"]
    return f"{BEGIN}\n\n{table(head, rows)}\n{END}\n"


def _tables() -> list[tuple[str, str]]:
    """Return what is generated in the middle of a page, by page."""
    return [
        ("alerts.md", overview()),
        ("files.md", facts_table()),
        ("shell.md", f"{BEGIN}\n\n{verbs()}\n{END}\n"),
    ]


def due(docs: Path = DOCS) -> dict[Path, str]:
    """Return each page that is generated, or partly, as it should be.

    What is by hand is taken from the pages as they are; a page that is not there has
    nothing by hand.
    """
    pages = {docs / "metrics.md": page()}
    for name, made in _tables():
        before, _, rest = (docs / name).read_text("utf-8").partition(f"{BEGIN}\n")
        pages[docs / name] = before + made + rest.partition(f"{END}\n")[2]
    for name, kind in KINDS.items():
        path = docs / "alerts" / f"{name}.md"
        pages[path] = alert_head(kind) + by_hand(path)
    if docs == DOCS:
        pages[RIGHT] = right(docs / "results")
        pages[docs / "llms.txt"] = map_of_pages(docs)
    for path in sorted(docs.glob("*.md")):
        text = pages.get(path) or path.read_text(encoding="utf-8")
        if _RESULTS.search(text):
            pages[path] = with_results(text, docs / "results")
    return pages


def right(results: Path) -> str:
    """Return how often the alarms of each kind are right, as the package has it."""
    kept = json.loads((results / "detection.json").read_text(encoding="utf-8"))
    rows = ["kind,right,alarms", *map(",".join, kept["kinds"]["rows"])]
    return "\n".join(rows) + "\n"


def verbs() -> str:
    """Return the help of every verb of the command line."""
    os.environ["COLUMNS"] = "90"  # argparse asks for the width of the terminal
    [choices] = [
        action.choices
        for action in parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return "\n".join(
        f"## {name}\n\n```text\n{verb.format_help().rstrip()}\n```\n"
        for name, verb in choices.items()
    )


def map_of_pages(docs: Path) -> str:
    """Return ``llms.txt``: what there is to read, for programs that read it."""
    site = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    lines = [f"# {site['site_name']}", "", f"> {_SUMMARY}", "", _HINTS]
    for part in site["nav"]:
        [(section, pages)] = part.items()
        if isinstance(pages, str):
            continue
        lines += ["", f"## {section}", ""]
        for item in pages:
            [(name, path)] = item.items()
            source = docs / path if (docs / path).exists() else docs.parent / path
            about = first_sentence(source) if source.exists() else ""
            lines.append(f"- [{name}]({path})" + (f": {about}" if about else ""))
    lines += ["", "## Kinds of alert", ""]
    lines += [f"- [{k.name}](alerts/{k.name}.md): {k.meaning}" for k in KINDS.values()]
    return "\n".join(lines) + "\n"


def first_sentence(page: Path) -> str:
    """Return the first sentence of a page's first paragraph, without its links."""
    parts = page.read_text(encoding="utf-8").split("\n\n")
    plain = [p for p in parts if p[:1].isalnum() or re.match(r"`[^`]", p)]
    text = re.sub(
        r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(plain[:1]).replace("\n", " ")
    )
    return re.split(r"(?<=[.])\s", text, maxsplit=1)[0].rstrip(":")


_SUMMARY: Final = (
    "gradwatch watches nn.RNN, nn.LSTM, nn.GRU and their cells train in PyTorch: one "
    "call, gradwatch.watch(model), measures gradients through time, spectral radii, "
    "gates and the loss, and raises alarms with a cause and a line to paste."
)
_HINTS: Final = """\
- The training loop stays as it is; `watch = gradwatch.watch(model)` before it is all.
- Afterwards: `gradwatch check latest --json` in a shell, or `gradwatch.load(folder)`.
- `gradwatch explain KIND|METRIC|CAUSE` prints what a name in an alert means."""


def with_results(text: str, results: Path) -> str:
    """Return a page with the tables of results between their marks as they are kept.

    Args:
        text: The page.
        results: The folder of what the benchmarks have kept.
    """

    def table_of(marked: re.Match[str]) -> str:
        name, key = marked["name"], marked["key"]
        kept = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        found = kept[key]
        used = ", ".join(" ".join(pair) for pair in found["versions"].items())
        told = f"{found['date']}, `{found['command']}`; {found['machine']}; {used}"
        body = table(found["head"], found["rows"])
        return f"<!-- results: {name}/{key} -->\n{body}\n({told})\n{_RESULTS_END}"

    return _RESULTS.sub(table_of, text)


_RESULTS_END: Final = "<!-- end of results -->"
_RESULTS: Final = re.compile(
    rf"<!-- results: (?P<name>\w+)/(?P<key>\w+) -->\n.*?{_RESULTS_END}", re.DOTALL
)


def by_hand(path: Path) -> str:
    """Return what stands behind the second mark of a page; empty for no page."""
    if not path.exists():
        return ""
    return path.read_text(encoding="utf-8").partition(f"{END}\n")[2]


def stale(docs: Path = DOCS) -> list[str]:
    """Return the pages that are missing, not as they should be, or of no kind."""
    found = []
    for path, text in due(docs).items():
        name = path.relative_to(docs) if path.is_relative_to(docs) else path.name
        if not path.exists():
            found.append(f"{name} is missing: run make docs")
        elif path.read_text(encoding="utf-8") != text:
            found.append(f"{name} is stale: run make docs")
        elif path.parent == docs / "alerts" and not by_hand(path).strip():
            found.append(f"{name} has nothing by hand yet")
    of_kinds = {f"{name}.md" for name in KINDS}
    for path in sorted((docs / "alerts").glob("*.md")):
        if path.name not in of_kinds:
            found.append(f"alerts/{path.name} is of no kind in the catalogue")
    return found


def main() -> None:
    """Write the pages."""
    (DOCS / "alerts").mkdir(exist_ok=True)
    for path, text in due().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
