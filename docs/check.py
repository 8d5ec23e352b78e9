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
ALERTS = sorted((ROOT / "docs" / "alerts").glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = """
import torch
from torch import nn

import gradwatch


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.relu = nn.RNN(4, 8), nn.RNN(8, 8, nonlinearity="relu")
        self.lstm, self.gru = nn.LSTM(8, 8), nn.GRU(8, 8)

    def forward(self, x):
        for layer in (self.rnn, self.relu, self.lstm, self.gru):
            x = layer(x)[0]
        return x


model, batch = Model(), torch.randn(12, 4, 4)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
watch = gradwatch.watch(model, dir="runs", wandb=None, budget=None)
for _ in range(12):
    loss = model(batch)[-1].square().mean()
    watch.log(loss=loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
watch.flush()
"""
"""What the examples of the pages of alerts begin with: a run under a watch."""
EACH = """
import sys, traceback

for page, code in PAGES:
    try:
        exec(code, dict(globals()))
    except BaseException:
        sys.stderr.write(f"{page}: {traceback.format_exc()}")
        failed = True
sys.exit("failed" in globals())
"""


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


def examples(page: Path) -> str:
    """Return the Python blocks of a page, one behind the other."""
    return "\n".join(EXAMPLE.findall(page.read_text(encoding="utf-8")))


def failing(name: str, code: str) -> list[str]:
    """Run Python in a process of its own and an empty folder."""
    if not code:
        return []
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HOME": folder, "WANDB_MODE": "offline"},
        )
    return [f"{name}: {done.stderr[-800:]}"] if done.returncode else []


def main() -> int:
    """Return 1 if anything is wrong, having said what."""
    every = [*PAGES, *ALERTS]
    wrong = [line for page in every for line in broken_links(page)]
    wrong += [line for page in PAGES for line in failing(page.name, examples(page))]
    about = [(page.name, examples(page)) for page in ALERTS]
    wrong += failing("docs/alerts", f"{RUN}\nPAGES = {about!r}\n{EACH}")
    wrong += generate.stale()
    for line in wrong:
        print(line)
    print(f"{len(every)} pages, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
