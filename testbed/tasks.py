"""What is learned: batches for ever, each from a source of random numbers of its own.

Axes: T time, B batch, I inputs, C classes.
"""

import pydoc_data.topics
from collections.abc import Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import PackedSequence, pack_sequence

Pair = tuple[Tensor, Tensor]


@cache
def _images() -> Pair:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return images, torch.tensor(data.target)


def digits(source: torch.Generator, batch: int, rows: bool = False) -> Iterator[Pair]:
    """Yield handwritten digits: pixel by pixel ``(64, B, 1)``, or by row ``(8, B, 8)``.

    Yields:
        Images and their 10 classes.
    """
    images, labels = _images()
    sequences = images if rows else images.flatten(1).unsqueeze(-1)
    while True:
        chosen = torch.randint(len(labels), (batch,), generator=source)
        yield sequences[chosen].transpose(0, 1).contiguous(), labels[chosen]


def adding(source: torch.Generator, length: int, batch: int) -> Iterator[Pair]:
    """Yield the adding problem, ``(T, B, 2)``: the sum of two marked numbers.

    Yields:
        Sequences, and the sums ``(B,)``.
    """
    half, rows = length // 2, torch.arange(batch)
    while True:
        x = torch.zeros(length, batch, 2)
        x[..., 0] = torch.rand(length, batch, generator=source)
        one = torch.randint(half, (batch,), generator=source)
        two = torch.randint(half, length, (batch,), generator=source)
        x[one, rows, 1] = x[two, rows, 1] = 1.0
        yield x, (x[..., 0] * x[..., 1]).sum(0)


def recall(
    source: torch.Generator,
    length: int,
    batch: int,
    symbols: int = 4,
    lag: int | None = None,
    noise: float = 0.3,
) -> Iterator[Pair]:
    """Yield sequences of noise, ``(T, B, symbols)``, with one symbol to be recalled.

    Args:
        source: Of the random numbers.
        length: T.
        batch: B.
        symbols: How many there are; the classes.
        lag: Steps from the symbol to the end; None: it comes first.
        noise: Standard deviation at the other steps.

    Yields:
        Sequences, and which symbol it was.
    """
    at = 0 if lag is None else length - 1 - lag
    while True:
        which = torch.randint(symbols, (batch,), generator=source)
        x = noise * torch.randn(length, batch, symbols, generator=source)
        x[at] = one_hot(which, symbols).float()
        yield x, which


@cache
def _text() -> Tensor:
    """The help pages of the standard library, as codes 0 to 127."""
    text = "\n".join(
        pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)
    )
    return torch.tensor([min(ord(c), 127) for c in text[:400_000]])


def characters(source: torch.Generator, length: int, batch: int) -> Iterator[Pair]:
    """Yield pieces of English text ``(T, B)`` and what follows each character.

    Yields:
        Codes of 128 characters, and the next ones ``(T, B)``.
    """
    text, offsets = _text(), torch.arange(length + 1)[:, None]
    while True:
        start = torch.randint(len(text) - length - 1, (batch,), generator=source)
        piece = text[start + offsets]
        yield piece[:-1], piece[1:]


def streams_of_text(source: torch.Generator, length: int, batch: int) -> Iterator[Pair]:
    """Yield text as :func:`characters`, each batch going on where the last one ended.

    Yields:
        Codes of 128 characters, and the next ones ``(T, B)``.
    """
    text, offsets = _text(), torch.arange(length + 1)[:, None]
    start = torch.randint(len(text), (batch,), generator=source)
    while True:
        piece = text[(start + offsets) % len(text)]
        yield piece[:-1], piece[1:]
        start = start + length


def tagging(
    source: torch.Generator, longest: int, batch: int, words: int = 12
) -> Iterator[tuple[PackedSequence, Tensor]]:
    """Yield packed sequences of words ``(t, words)``, a tag for each: seen just before?

    Yields:
        Packed one-hot words, longest first, and the tags of 2 classes in packed order.
    """
    while True:
        sizes = torch.randint(longest // 2, longest + 1, (batch,), generator=source)
        order = sizes.sort(descending=True).values.tolist()
        codes = [torch.randint(words, (size,), generator=source) for size in order]
        tags = [torch.cat([c.new_zeros(1), (c[1:] < c[:-1]).long()]) for c in codes]
        x = pack_sequence([one_hot(c, words).float() for c in codes])
        yield x, pack_sequence(tags).data
