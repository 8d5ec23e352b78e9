"""Made-up sentences, and what the models of this set share.

Axes: B batch, T words, E embedding, H units, C classes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softmax

from benchmarks.detection.case import History

PAD = 0

Labelled = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


def topics(
    source: torch.Generator,
    batch: int,
    sizes: tuple[int, int],
    classes: int,
    *,
    width: int = 0,
    words: int = 40,
    wrong: float = 0.0,
) -> Iterator[Labelled]:
    """Yield sentences with one keyword each, which tells the topic.

    Args:
        source: Of the random numbers.
        batch: B.
        sizes: The fewest and the most words of a sentence.
        classes: How many topics; topic c has the word c + 1.
        width: T, filled up with zeros; 0: the most words of a sentence.
        words: How many there are, 0 for padding included.
        wrong: Share of the labels that are drawn anew.

    Yields:
        Codes ``(B, T)``, numbers of words and topics ``(B,)``.
    """
    low, high = sizes
    rows, places = torch.arange(batch), torch.arange(width or high)
    while True:
        size = torch.randint(low, high + 1, (batch,), generator=source)
        label = torch.randint(classes, (batch,), generator=source)
        shape = batch, len(places)
        codes = torch.randint(classes + 1, words, shape, generator=source)
        at = (torch.rand(batch, generator=source) * size).long()
        codes[rows, at] = label + 1
        codes[places >= size[:, None]] = PAD
        other = torch.randint(classes, (batch,), generator=source)
        replaced = torch.rand(batch, generator=source) < wrong
        yield codes, size, torch.where(replaced, other, label)


def flights(
    source: torch.Generator, batch: int, length: int, rare: float = 0.35
) -> Iterator[Pair]:
    """Yield sentences with cities, whose slots tell if "from" or "to" came last.

    Words: 1 from, 2 to, 3 to 12 cities, 13 to 29 others. Slots: 0 none, 1 where from,
    2 where to.

    Yields:
        Codes and slots ``(B, T)``.
    """
    while True:
        kind = torch.rand(batch, length, generator=source)
        codes = torch.randint(13, 30, (batch, length), generator=source)
        city = torch.randint(3, 13, (batch, length), generator=source)
        way = torch.randint(1, 3, (batch, length), generator=source)
        codes = torch.where(kind < rare, city, codes)
        codes = torch.where(kind > 0.75, way, codes)
        codes[:, 0] = way[:, 0]
        places = torch.arange(length).expand(batch, length)
        last = torch.where(codes < 3, places, 0).cummax(1).values
        slots = codes.gather(1, last)
        is_city = (codes >= 3) & (codes < 13)
        yield codes, torch.where(is_city, slots, 0)


def phrases(
    source: torch.Generator, batch: int, length: int, words: int
) -> Iterator[Tensor]:
    """Yield sentences of words 1 to ``words``, each drawn by itself, ``(B, T)``."""
    while True:
        yield torch.randint(1, words + 1, (batch, length), generator=source)


def frames(
    source: torch.Generator, batch: int, letters: int, count: int
) -> Iterator[Pair]:
    """Yield letters as noisy frames, three each, ``(T, B, letters + 1)``, and them.

    Yields:
        Frames, and the letters 1 to ``letters``, ``(B, count)``.
    """
    while True:
        codes = torch.randint(1, letters + 1, (batch, count), generator=source)
        clean = one_hot(codes.repeat_interleave(3, 1).T, letters + 1).float()
        yield clean + 0.3 * torch.randn(clean.shape, generator=source), codes


class Classifier(nn.Module):
    """Reads sentences and scores their topics by the last state; a base class."""

    def __init__(
        self, name: str, rnn: nn.RNNBase, classes: int, words: int = 40
    ) -> None:
        super().__init__()
        self.name = name
        self.embed = nn.Embedding(words, rnn.input_size, padding_idx=PAD)
        self.add_module(name, rnn)
        directions = 2 if rnn.bidirectional else 1
        self.head = nn.Linear(directions * rnn.hidden_size, classes)

    @property
    def layer(self) -> Any:
        """The recurrent module."""
        return getattr(self, self.name)


class Tagger(nn.Module):
    """A recurrent net over words or frames, time first, and scores at every step."""

    def __init__(
        self, name: str, rnn: nn.RNNBase, classes: int, vocabulary: int = 0
    ) -> None:
        super().__init__()
        self.name = name
        self.embed: Any = nn.Identity()
        if vocabulary:
            self.embed = nn.Embedding(vocabulary, rnn.input_size)
        self.add_module(name, rnn)
        directions = 2 if rnn.bidirectional else 1
        self.head = nn.Linear(directions * rnn.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, ``(T, B, C)``."""
        scores: Tensor = self.head(getattr(self, self.name)(self.embed(x))[0])
        return scores


class SlotFiller(nn.Module):
    """A tagger that calls its LSTM word by word, and gives it the last slot as well."""

    def __init__(self, name: str, rnn: nn.LSTM) -> None:
        super().__init__()
        self.name = name
        self.embed = nn.Embedding(30, rnn.input_size - 3)
        self.add_module(name, rnn)
        self.head = nn.Linear(rnn.hidden_size, 3)

    def forward(self, text: Tensor) -> Tensor:
        """Return scores of the slots, ``(B, T, 3)``."""
        words, state, made = self.embed(text).transpose(0, 1), None, []
        slot = words.new_zeros(text.shape[0], 1, 3)
        for word in words:
            given = torch.cat([word.unsqueeze(1), slot], 2)
            out, state = getattr(self, self.name)(given, state)
            slot = self.head(out)
            made.append(slot)
        return torch.cat(made, 1)


class SentenceVAE(nn.Module):
    """A variational autoencoder of sentences, the encoder in both directions."""

    def __init__(self, name: str, words: int, hidden: int, *, viewed: bool) -> None:
        super().__init__()
        self.name, self.viewed = name, viewed
        self.embed = nn.Embedding(words + 1, hidden)
        encoder = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.add_module(name, encoder)
        self.mean = nn.Linear(2 * hidden, hidden)
        self.log_variance = nn.Linear(2 * hidden, hidden)
        self.start = nn.Linear(hidden, hidden)
        self.decoder = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, words + 1)

    def encode(self, text: Tensor) -> Tensor:
        """Return what the encoder makes of each sentence, ``(B, 2 H)``."""
        _, hidden = getattr(self, self.name)(self.embed(text))
        if not self.viewed:
            hidden = hidden.transpose(0, 1).flatten(1)
        read: Tensor = hidden.view(len(text), -1)
        return read

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores ``(B, T, words + 1)``, and the latent means and variances."""
        read = self.encode(text)
        mean, log_variance = self.mean(read), self.log_variance(read)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        given = torch.cat([torch.zeros_like(text[:, :1]), text[:, :-1]], 1)
        out, _ = self.decoder(self.embed(given), self.start(z).unsqueeze(0))
        return self.head(out), mean, log_variance


class Chatbot(nn.Module):
    """An encoder, and a decoder that attends to its outputs; teacher forcing."""

    def __init__(self, names: tuple[str, str], words: int, hidden: int) -> None:
        super().__init__()
        reader, writer = names
        self.names = names
        self.add_module(reader, nn.GRU(hidden, hidden, batch_first=True))
        self.add_module(writer, nn.GRU(hidden, hidden, batch_first=True))
        self.embed_question = nn.Embedding(words + 1, hidden)
        self.embed_answer = nn.Embedding(words + 1, hidden)
        self.head = nn.Linear(2 * hidden, words + 1)

    def forward(self, question: Tensor, given: Tensor) -> Tensor:
        """Return scores of the words of the answer, ``(B, T, words + 1)``."""
        reader, writer = (getattr(self, name) for name in self.names)
        read, state = reader(self.embed_question(question))
        out, _ = writer(self.embed_answer(given), state)
        weights = softmax(out @ read.transpose(1, 2), 2)
        scores: Tensor = self.head(torch.cat([out, weights @ read], 2))
        return scores

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the weights of the encoder, and those of the decoder."""
        reader, writer = (getattr(self, name) for name in self.names)
        encoder = [reader, self.embed_question]
        decoder = [writer, self.embed_answer, self.head]
        return tuple(  # type: ignore[return-value]
            [w for module in part for w in module.parameters()]
            for part in (encoder, decoder)
        )


def answering(
    outputs: Callable[[Tensor], Tensor], x: Tensor, row: int, words: int
) -> list[int]:
    """Return which rows of the outputs move when one row of ``x`` changes."""
    changed = x.clone()
    changed[row] = torch.where(x[row] > 0, x[row] % (words - 1) + 1, 0)
    with torch.no_grad():
        apart = (outputs(x) - outputs(changed)).abs()
    return torch.nonzero(apart.flatten(1).amax(1) > 0).flatten().tolist()


def share(history: History) -> float:
    """Return the mean of the last 20 losses by that of the first 20."""
    return history.final / (sum(history.losses[:20]) / 20)
