"""An encoder and a decoder with attention: dates as people write them, into ISO 8601.

A GRU reads "Tuesday, 3 March 1998"; a GRU cell writes "1998-03-03", one character at
a time, and looks back at the encoder's outputs by dot products. In training it is
given the right characters so far (teacher forcing).

Run: .venv/bin/python examples/tasks/dates.py
"""

import datetime
import random

import torch
from torch import Tensor, nn

import gradwatch

BATCH, STEPS = 64, 500
FORMS = ("%A, %d %B %Y", "%d.%m.%Y", "%B %d, %Y", "%a %d %b %y", "%Y/%m/%d")
END = 0


class Translator(nn.Module):
    """Reads one string and writes another."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.encoder = nn.GRU(32, hidden, batch_first=True)
        self.decoder = nn.GRUCell(32 + hidden, hidden)
        self.head = nn.Linear(2 * hidden, 128)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map ``(B, T)`` characters and the right answers ``(B, L)`` to scores."""
        seen, last = self.encoder(self.embedding(x))
        hidden, told = last[0], torch.zeros(len(x), dtype=torch.long)
        context, scores = torch.zeros_like(hidden), []
        for step in range(y.shape[1]):
            given = torch.cat([self.embedding(told), context], -1)
            hidden = self.decoder(given, hidden)
            weights = torch.softmax((seen @ hidden.unsqueeze(-1)).squeeze(-1), 1)
            context = (weights.unsqueeze(1) @ seen).squeeze(1)
            scores.append(self.head(torch.cat([hidden, context], -1)))
            told = y[:, step]
        return torch.stack(scores, 1)


def numbers(lines: list[str]) -> Tensor:
    """Return lines as numbers; shorter ones have END before them."""
    size = max(map(len, lines))
    return torch.tensor([[*[END] * (size - len(s)), *map(ord, s)] for s in lines])


def batch(source: random.Random) -> tuple[Tensor, Tensor]:
    """Return dates as people write them, and the same in ISO 8601."""
    first = datetime.date(1950, 1, 1)
    days = [first + datetime.timedelta(source.randrange(27_000)) for _ in range(BATCH)]
    said = [day.strftime(source.choice(FORMS)) for day in days]
    return numbers(said), numbers([day.isoformat() for day in days])


def main() -> None:
    """Train, and say how many dates are right from the first to the last character."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source, model = random.Random(0), Translator()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    watch = gradwatch.watch(model, name="dates", budget=None, report=True)
    for _ in range(STEPS):
        x, y = batch(source)
        loss = nn.functional.cross_entropy(model(x, y).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    watch.close()
    with torch.no_grad():
        x, y = batch(source)
        right = (model(x, y).argmax(-1) == y).all(1).float().mean()
    print(f"dates with every character right, in a fresh batch: {right:.0%}")


if __name__ == "__main__":
    main()
