"""Check the docs: every link leads somewhere, every example runs, no page is stale.

Run: make check
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import generate

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the usual renderers make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in heads}


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead nowhere inside the project."""
    wrong = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            wrong.append(f"{page.name}: {link} does not exist")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{page.name}: {link} has no such heading")
    return wrong


def failing_examples(page: Path) -> list[str]:
    """Run a page's Python blocks in order, in one process and an empty folder."""
    blocks = EXAMPLE.findall(page.read_text(encoding="utf-8"))
    if not blocks:
        return []
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(blocks)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HOME": folder, "WANDB_MODE": "offline"},
        )
    return [f"{page.name}: {done.stderr[-800:]}"] if done.returncode else []


def main() -> int:
    """Return 1 if anything is wrong, having said what."""
    wrong = [line for page in PAGES for line in broken_links(page)]
    wrong += [line for page in PAGES for line in failing_examples(page)]
    stale = generate.DOCS / "metrics.md"
    if stale.read_text(encoding="utf-8") != generate.page():
        wrong.append("metrics.md is stale: run make docs")
    for line in wrong:
        print(line)
    print(f"{len(PAGES)} pages, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
