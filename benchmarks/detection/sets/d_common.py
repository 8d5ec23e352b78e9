"""What both halves of the set are made of: digits, names, reviews, sine waves.

Axes: T time, B batch, I inputs, C classes.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.detection.case import Draw
from testbed import tasks

Kind = type[nn.RNNBase]
Pair = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A recurrent module under any name, and what is built around it."""

    def __init__(self, name: str, rnn: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, rnn)
        self.fc = nn.Linear(rnn.hidden_size, outputs)

    @property
    def layer(self) -> Any:
        """The recurrent module."""
        return getattr(self, self.name)

    @property
    def hidden_weight(self) -> str:
        """The name of its recurrent weight."""
        return f"{self.name}.weight_hh_l0"


class Image(Net):
    """An image read by row, as the well-known tutorial has it."""

    def __init__(self, draw: Draw, kind: Kind, layers: int, batch_first: bool) -> None:
        rnn = kind(8, draw.between(24, 48), layers, batch_first=batch_first)
        super().__init__(draw.module_name(), rnn, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of 10 classes."""
        out, _ = self.layer(x)
        scores: Tensor = self.fc(out[:, -1, :])
        return scores


class Spelling(Net):
    """The language of a name, by letter."""

    def __init__(self, draw: Draw, kind: Kind, languages: int) -> None:
        rnn: Any = kind(draw.between(8, 16), draw.between(24, 48), batch_first=True)
        super().__init__(draw.module_name(), rnn, languages)
        self.embed = nn.Embedding(26, rnn.input_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of the languages."""
        out, _ = self.layer(self.embed(x))
        scores: Tensor = self.fc(out[:, -1])
        return scores


def classified(model: nn.Module, batch: Pair) -> Tensor:
    """Cross entropy of one class a sample."""
    return cross_entropy(model(batch[0]), batch[1])


def rows(source: torch.Generator, batch: int) -> Iterator[Pair]:
    """Yield digits by row as a DataLoader has them, ``(B, 8, 8)``, and their classes.

    Yields:
        Images and classes.

    """
    for x, y in tasks.digits(source, batch, rows=True):
        yield x.transpose(0, 1).contiguous(), y


def names(
    source: torch.Generator, languages: int, length: int, batch: int
) -> Iterator[Pair]:
    """Yield names by letter ``(B, T)``, and which language each is from.

    A language says how likely each of 26 letters is behind each other one.

    Yields:
        Codes of letters, and languages.

    """
    logits = 2.5 * torch.randn(languages, 26, 26, generator=source)
    follows = logits.softmax(-1)
    while True:
        y = torch.randint(languages, (batch,), generator=source)
        letters = [torch.randint(26, (batch,), generator=source)]
        while len(letters) < length:
            chances = follows[y, letters[-1]]
            letters.append(torch.multinomial(chances, 1, generator=source)[:, 0])
        yield torch.stack(letters, 1), y


WORDS, OPINIONS = 40, 8
"""Words of a review, 0 for padding; the first 8 are praise, the next 8 complaints."""


def reviews(
    source: torch.Generator, shortest: int, longest: int, batch: int, good: float = 0.5
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield reviews ``(B, T)`` padded behind their ends, lengths, and 1 for good ones.

    Of a review's words a third say what its writer thinks, and one at least.

    Yields:
        Codes of words, lengths, and floats.

    """
    while True:
        y = (torch.rand(batch, generator=source) < good).long()
        lengths = torch.randint(shortest, longest + 1, (batch,), generator=source)
        shape = batch, longest
        neutral = torch.randint(1 + 2 * OPINIONS, WORDS, shape, generator=source)
        opinion = torch.randint(1, 1 + OPINIONS, shape, generator=source)
        opinion = opinion + OPINIONS * (1 - y[:, None])
        says = torch.rand(shape, generator=source) < 1 / 3
        says[:, 0] = True
        x = torch.where(says, opinion, neutral)
        behind = torch.arange(longest) >= lengths[:, None]
        yield x.masked_fill(behind, 0), lengths, y.float()


def waves(source: torch.Generator, length: int, batch: int) -> Iterator[Pair]:
    """Yield pieces of sine waves ``(B, T, 1)`` of any phase and pace.

    Yields:
        Pieces, and the next value of each, ``(B,)``.

    """
    steps = torch.arange(length + 1)
    while True:
        phase = 2 * math.pi * torch.rand(batch, 1, generator=source)
        pace = 0.2 + 0.4 * torch.rand(batch, 1, generator=source)
        wave = torch.sin(phase + pace * steps)
        yield wave[:, :-1, None], wave[:, -1]
