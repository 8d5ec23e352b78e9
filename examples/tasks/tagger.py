"""A tagger of packed lines: what each character of a line of Python belongs to.

A bidirectional GRU reads lines of the standard library's own source, of 5 to 78
characters, packed so that no step is spent on padding. The tags are those of the
``tokenize`` module: name, operator, number, string, comment, and space.

Run: .venv/bin/python examples/tasks/tagger.py
"""

import io
import textwrap
import tokenize

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_sequence,
)

import gradwatch

BATCH, STEPS = 32, 300
TAGS = {
    tokenize.NAME: 1,
    tokenize.OP: 2,
    tokenize.NUMBER: 3,
    tokenize.STRING: 4,
    tokenize.COMMENT: 5,
}


class Tagger(nn.Module):
    """Tags every character of packed lines."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 16)
        self.rnn = nn.GRU(16, 48, bidirectional=True)
        self.head = nn.Linear(96, 6)

    def forward(self, lines: PackedSequence) -> Tensor:
        """Map packed characters to ``(characters, 6)`` scores, in the packed order."""
        packed = lines._replace(data=self.embedding(lines.data))
        out, _ = self.rnn(packed)
        return self.head(out.data)


def tagged_lines() -> list[tuple[Tensor, Tensor]]:
    """Return lines as numbers, each with the tag of every character."""
    with (
        open(textwrap.__file__, encoding="utf-8") as one,
        open(tokenize.__file__, encoding="utf-8") as other,
    ):
        sources = [one.read(), other.read()]
    found = []
    for source in sources:
        lines = source.splitlines()
        tags = [[0] * len(line) for line in lines]
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            for row in range(token.start[0], token.end[0] + 1):
                if token.type not in TAGS or row > len(lines):
                    continue
                first = token.start[1] if row == token.start[0] else 0
                last = token.end[1] if row == token.end[0] else len(lines[row - 1])
                tags[row - 1][first:last] = [TAGS[token.type]] * (last - first)
        for line, tag in zip(lines, tags, strict=True):
            if 5 <= len(line) < 79 and line.isascii():
                found.append((torch.tensor([ord(c) for c in line]), torch.tensor(tag)))
    return found


def main() -> None:
    """Train, and say how many characters are tagged rightly in lines never seen."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = tagged_lines()
    order = torch.randperm(len(lines)).tolist()
    unseen, seen = order[:100], order[100:]
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    watch = gradwatch.watch(model, name="tagger", budget=None, report=True)
    for _ in range(STEPS):
        chosen = [lines[seen[i]] for i in torch.randint(len(seen), (BATCH,)).tolist()]
        x = pack_sequence([line for line, _ in chosen], enforce_sorted=False)
        y = pack_sequence([tag for _, tag in chosen], enforce_sorted=False)
        loss = nn.functional.cross_entropy(model(x), y.data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    watch.close()
    with torch.no_grad():
        x = pack_sequence([lines[i][0] for i in unseen], enforce_sorted=False)
        y = pack_sequence([lines[i][1] for i in unseen], enforce_sorted=False)
        right = (model(x).argmax(-1) == y.data).float().mean()
    print(f"characters tagged rightly in 100 unseen lines: {right:.1%}")


if __name__ == "__main__":
    main()
