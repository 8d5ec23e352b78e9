"""Run the gallery, check what each of its scripts promises, and write its page.

A script of ``examples/gallery`` trains twice, with a fault and without. Its docstring
names the alarm: the sick run has to give that one and no other, the mended run none.
The report of each sick run is written too, as a check that it stays small.

Run: python docs/gallery.py; with --write to write docs/gallery.md as well
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gradwatch
from gradwatch import report
from gradwatch.record import Alert
from gradwatch.runs import Run

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "docs" / "gallery.md"
SCRIPTS: Final = sorted((ROOT / "examples" / "gallery").glob("*.py"))
REPORT_LIMIT: Final = 1_500_000
"""Bytes of a report, at most."""
ALARM: Final = re.compile(r"Alarm: (?P<kind>\w+)(, cause (?P<cause>\w+))?")
HEAD: Final = """# A gallery by symptom

Twelve small trainings that go wrong, each named after what one sees of it, and each
with the alarm that names the fault. Every script trains twice, with the fault and
without it, and the second run gives no alarm. They run within seconds, and have
gradwatch look at fixed steps (`budget=None`), so that a rerun finds the same.

Written by `python docs/gallery.py --write`, which runs them all and checks the alarms.

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What a script says of itself.

    Attributes:
        path: The script.
        symptom: What one sees, in a sentence without its full stop.
        fault: What is wrong.
        kind: Kind of the alarm.
        cause: Its cause; None where the docstring names none.
    """

    path: Path
    symptom: str
    fault: str
    kind: str
    cause: str | None

    @property
    def name(self) -> str:
        """Name of the script and, with its ending, of its runs."""
        return self.path.stem.replace("_", "-")

    @property
    def alarm(self) -> str:
        """The alarm, in words."""
        return told(self.kind, self.cause)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a script has shown.

    Attributes:
        printed: What it printed.
        seconds: How long it took.
        sick: The run with the fault.
        mended: The run without.
    """

    printed: str
    seconds: float
    sick: Run
    mended: Run


def told(kind: str, cause: str | None) -> str:
    """Return an alarm in words."""
    return kind if cause is None else f"{kind}, cause {cause}"


def read(path: Path) -> Example:
    """Return what a script says of itself.

    Raises:
        ValueError: If its docstring names no alarm.
    """
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    symptom, fault, alarm, *_ = [*doc.split("\n\n"), "", "", ""]
    match = ALARM.fullmatch(alarm)
    if match is None:
        raise ValueError(
            f"{path.name}: the docstring has to be the symptom, the fault and a line "
            "such as 'Alarm: spike, cause bad_batch', with blank lines between them."
        )
    return Example(
        path=path,
        symptom=symptom.removesuffix("."),
        fault=fault,
        kind=match["kind"],
        cause=match["cause"],
    )


# ---- the lines that mend it


class _Decide(ast.NodeTransformer):
    """Puts a value in the place of ``sick``, and keeps what is then carried out."""

    def __init__(self, sick: bool) -> None:
        self.sick = sick

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Replace the name."""
        return ast.Constant(self.sick) if node.id == "sick" else node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        """Carry out ``not``."""
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant):
            return ast.Constant(not node.operand.value)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """Keep one side of a conditional expression."""
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return node.body if node.test.value else node.orelse

    def visit_If(self, node: ast.If) -> Any:
        """Keep one side of a conditional statement."""
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return node.body if node.test.value else node.orelse


def decided(path: Path, *, sick: bool) -> list[str]:
    """Return the statements of a script that depend on ``sick``, decided.

    What only hands ``sick`` on, or names the run, is left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.Assign)
        and _depends(node.test if isinstance(node, ast.If) else node.value)
    ]
    lines = []
    for node in sorted(found, key=lambda node: node.lineno):
        kept = _Decide(sick).visit(node)
        for one in kept if isinstance(kept, list) else [kept]:
            lines.append(ast.unparse(ast.fix_missing_locations(one)))
    return lines


def _depends(value: ast.expr) -> bool:
    """Tell whether a value depends on ``sick``, and is neither a name nor handed on."""
    handed_on = isinstance(value, ast.Call) and any(
        isinstance(arg, ast.Name) and arg.id == "sick" for arg in value.args
    )
    names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    return "sick" in names and not isinstance(value, ast.JoinedStr) and not handed_on


def mending(path: Path) -> str:
    """Return what mends a script: the lines of the sick run, and those instead."""
    before = [f"- {line}" for line in decided(path, sick=True)]
    return "\n".join(before + [f"+ {line}" for line in decided(path, sick=False)])


# ---- the runs


def show(example: Example, folder: Path) -> Shown:
    """Run a script in a process of its own.

    Args:
        example: The script.
        folder: Where its run folders go.

    Raises:
        RuntimeError: If it failed.
        FileNotFoundError: If it left no run of the name that is expected.
    """
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(example.path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GRADWATCH_DIR": str(folder)},
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"{example.name}: exit code {done.returncode}: {last}")
    return Shown(
        printed=done.stdout.rstrip(),
        seconds=seconds,
        sick=gradwatch.load(folder / f"{example.name}-sick"),
        mended=gradwatch.load(folder / f"{example.name}-mended"),
    )


def alarms(run: Run) -> list[Alert]:
    """Return the alarms of a run: its alerts without the notices."""
    return [alert for alert in run.alerts if alert.severity != "info"]


def failures(example: Example, shown: Shown) -> list[str]:
    """Return what a script has not kept of what it promises."""
    given = {told(alert.kind, alert.cause) for alert in alarms(shown.sick)}
    wrong = []
    if example.alarm not in given:
        wrong.append(f"the sick run has no alarm {example.alarm}")
    if others := sorted(given - {example.alarm}):
        wrong.append(f"the sick run has other alarms: {'; '.join(others)}")
    if others := sorted({told(a.kind, a.cause) for a in alarms(shown.mended)}):
        wrong.append(f"the mended run has alarms: {'; '.join(others)}")
    return [f"{example.name}: {line}" for line in wrong]


def reported(example: Example, shown: Shown, folder: Path) -> list[str]:
    """Write the report of a sick run; return what is wrong with it."""
    page = report.save([shown.sick], folder / f"{example.path.stem}.html")
    size = page.stat().st_size
    if size < REPORT_LIMIT:
        return []
    return [f"{example.name}: the report has {size:,} bytes, over {REPORT_LIMIT:,}"]


# ---- the page


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as the usual renderers make it."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")


def row(example: Example) -> str:
    """Return the line of a script in the index."""
    first = " ".join(example.fault.split()).split(". ")[0].removesuffix(".")
    symptom = f"[{example.symptom}](#{anchor(example.symptom)})"
    kind = f"[`{example.kind}`](alerts/{example.kind}.md)"
    cause = "" if example.cause is None else f", `{example.cause}`"
    return f"| {symptom} | {first} | {kind}{cause} |"


def section(example: Example, shown: Shown) -> str:
    """Return what the page says of a script."""
    alert = next(a for a in alarms(shown.sick) if a.kind == example.kind)
    script = f"examples/gallery/{example.path.name}"
    return f"""## {example.symptom}

{example.fault}

What the script prints, with the fault and without:

```text
{shown.printed}
```

What gradwatch says:

```text
{alert.message}
```

What mends it:

```diff
{mending(example.path)}
```

[{script}](../{script}); more on the alarm: [{example.kind}](alerts/{example.kind}.md).
"""


def page(pairs: list[tuple[Example, Shown]]) -> str:
    """Return the page."""
    head = "| what one sees | what it was | alarm |\n|---|---|---|\n"
    rows = "\n".join(row(example) for example, _ in pairs)
    sections = "\n".join(section(example, shown) for example, shown in pairs)
    return f"{HEAD}{head}{rows}\n\n{sections}"


def run_all(folder: Path, *, write: bool) -> int:
    """Run all scripts; say what is wrong and return 1, or return 0."""
    pairs, wrong = [], []
    for path in SCRIPTS:
        example = read(path)
        try:
            shown = show(example, folder)
        except (RuntimeError, FileNotFoundError) as error:
            wrong.append(str(error))
            continue
        wrong += failures(example, shown) + reported(example, shown, folder)
        pairs.append((example, shown))
        print(f"{shown.seconds:5.1f} s  {path.stem}: {example.alarm}")
    for line in wrong:
        print(line)
    seconds = sum(shown.seconds for _, shown in pairs)
    print(f"{len(SCRIPTS)} scripts, {seconds:.0f} s, {len(wrong)} problems")
    if write and not wrong:
        PAGE.write_text(page(pairs), encoding="utf-8")
    return 1 if wrong else 0


def main() -> int:
    """Run all scripts; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Run the gallery and check it.")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="keep runs here")
    parser.add_argument("--write", action="store_true", help="write docs/gallery.md")
    options = parser.parse_args()
    if options.keep is None:
        with tempfile.TemporaryDirectory() as folder:
            return run_all(Path(folder), write=options.write)
    folder = options.keep.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{options.keep} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return run_all(folder, write=options.write)


if __name__ == "__main__":
    sys.exit(main())
