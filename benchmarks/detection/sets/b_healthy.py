"""Healthy runs on text that a nervous tool may cry wolf over.

Each is known to be healthy by what :func:`healthy` says, or by a number of its own
where the loss alone does not show that it learns.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    ctc_loss,
    log_softmax,
    nll_loss,
    one_hot,
    softmax,
)
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.detection.case import Case, Draw, History, Label, Measured, family
from benchmarks.detection.sets.b_text import (
    Classifier,
    Labelled,
    Pair,
    Tagger,
    flights,
    frames,
    phrases,
    share,
    topics,
)
from benchmarks.detection.truth import Truth
from testbed.tasks import characters, streams_of_text

UNIGRAMS = 3.25
"""Entropy of the characters of the text by themselves."""


def healthy(below: float = math.inf, part: float = 0.8) -> Truth:
    """Return what asks for a loss that is finite, and ends low by itself and its start.

    Args:
        below: The most that the last 20 may have, on average.
        part: The most of the first 20's that they may have.
    """

    def truth(case: Case, history: History) -> Measured:
        values = {"share": share(history), "final": history.final}
        learnt = values["share"] <= part and history.final < below
        return Measured(learnt and history.nonfinite is None, values)

    return truth


def run(
    model: nn.Module,
    batches: Iterator[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    lr: float = 5e-3,
    steps: int = 400,
    truth: Truth | None = None,
    **more: Any,
) -> Case:
    """Return a healthy case; Adam, if nothing else is given."""
    more.setdefault("optimizer", torch.optim.Adam(model.parameters(), lr=lr))
    more.setdefault("label", Label())
    return Case(
        model=model,
        batches=batches,
        loss=loss,
        steps=steps,
        truth=truth or healthy(),
        **more,
    )


# ---- losses of their own


class CrfTagger(Tagger):
    """A tagger that scores whole paths, by a conditional random field."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        classes = self.head.out_features
        self.transitions = nn.Parameter(0.1 * torch.randn(classes, classes))

    def path(self, scores: Tensor, tags: Tensor) -> Tensor:
        """Return the score of the right path, ``(B,)``."""
        steps = scores.gather(2, tags.unsqueeze(2)).sum((0, 2))
        return steps + self.transitions[tags[:-1], tags[1:]].sum(0)

    def partition(self, scores: Tensor) -> Tensor:
        """Return the logarithm of the sum over all paths, ``(B,)``."""
        total = scores[0]
        for now in scores[1:]:
            steps = total.unsqueeze(2) + self.transitions + now.unsqueeze(1)
            total = steps.logsumexp(1)
        return total.logsumexp(1)


@family
def b_crf_tagger_tiny_batches(draw: Draw) -> Case:
    """A BiLSTM-CRF, its loss a sum over words, two or three sentences a step; SGD."""
    half = draw.between(12, 20)
    rnn = nn.LSTM(draw.between(12, 20), half, bidirectional=True)
    model = CrfTagger(draw.module_name(), rnn, 3, 30)
    batches = flights(draw.source(), draw.between(2, 3), draw.between(8, 12))

    def loss(model: CrfTagger, batch: Pair) -> Tensor:
        scores, tags = model(batch[0].T), batch[1].T
        return (model.partition(scores) - model.path(scores, tags)).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-4)
    return run(model, batches, loss, optimizer=optimizer, steps=600)


@family
def b_ctc_speller(draw: Draw) -> Case:
    """CTC over noisy frames of letters, three frames each; Adam."""
    letters, count = draw.between(5, 8), draw.between(4, 6)
    rnn = nn.GRU(letters + 1, draw.between(24, 32), bidirectional=True)
    model = Tagger(draw.module_name(), rnn, letters + 1)
    batch = draw.between(12, 20)
    batches = frames(draw.source(), batch, letters, count)
    given, wanted = (torch.full((batch,), n) for n in (3 * count, count))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        logs = log_softmax(model(batch[0]), 2)
        return ctc_loss(logs, batch[1], given, wanted)

    return run(model, batches, loss, truth=healthy(part=0.3))


@family
def b_focal_rare_entities(draw: Draw) -> Case:
    """Entities are one word in twenty; focal loss, weights of the classes."""
    rnn = nn.GRU(draw.between(16, 24), draw.between(16, 28), bidirectional=True)
    model = Tagger(draw.module_name(), rnn, 3, 30)
    batch, length = draw.between(12, 20), draw.between(12, 18)
    batches = flights(draw.source(), batch, length, rare=0.05)
    weights = torch.tensor([0.1, 1.0, 1.0])

    def focal(model: nn.Module, batch: Pair) -> Tensor:
        tags = batch[1].T.flatten()
        logs = log_softmax(model(batch[0].T).flatten(0, 1), 1)
        right = logs.gather(1, tags[:, None]).squeeze(1)
        return -(weights[tags] * (1 - right.exp()) ** 2 * right).mean()

    return run(model, batches, focal, truth=healthy(part=0.3))


class Stream(Tagger):
    """A character model that goes on where it stopped, with a softmax by hand."""

    state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """Return logarithms of probabilities, ``(T, B, C)``."""
        out, (h, c) = getattr(self, self.name)(self.embed(x), self.state)
        self.state = h.detach(), c.detach()
        scores = self.head(out)
        powers = (scores - scores.amax(2, keepdim=True)).exp()
        logs: Tensor = (powers / powers.sum(2, keepdim=True)).clamp(min=1e-8).log()
        return logs


@family
def b_stream_softmax_by_hand(draw: Draw) -> Case:
    """A stream of characters, the state carried on; a softmax by hand, its log, NLL."""
    rnn = nn.LSTM(draw.between(16, 28), draw.between(32, 48))
    model = Stream(draw.module_name(), rnn, 128, 128)
    batches = streams_of_text(draw.source(), draw.between(16, 28), draw.between(8, 16))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return nll_loss(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return run(
        model,
        batches,
        loss,
        clip=1.0,
        label=Label(others=frozenset({"truncated"})),
        truth=healthy(0.9 * UNIGRAMS),
    )


# ---- data and batches of their own


class Padded(Classifier):
    """Packs sentences in order of their lengths, and restores their own order."""

    def forward(self, text: Tensor, sizes: Tensor) -> Tensor:
        """Return scores, ``(B,)``."""
        longest_first, order = sizes.sort(descending=True)
        words = self.embed(text[order])
        packed = pack_padded_sequence(words, longest_first, batch_first=True)
        _, (hidden, _) = self.layer(packed)
        scores: Tensor = self.head(torch.cat([*hidden], 1)[order.argsort()])
        return scores.squeeze(1)


@family
def b_packed_frozen_embedding(draw: Draw) -> Case:
    """Packed sentences, given word vectors frozen, weighted samples, a warm-up."""
    rnn = nn.LSTM(draw.between(24, 32), draw.between(20, 32), bidirectional=True)
    model = Padded(draw.module_name(), rnn, 1)
    model.embed.weight.requires_grad_(False)
    sizes = 2, draw.between(10, 25)
    batches = topics(draw.source(), draw.between(16, 32), sizes, 6, wrong=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    warm_up = draw.between(80, 120)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))

    def before(number: int) -> None:
        if number:
            schedule.step()

    def weighted(model: nn.Module, batch: Labelled) -> Tensor:
        text, sizes, label = batch
        good = (label < 2).float()
        each = binary_cross_entropy_with_logits(
            model(text, sizes), good, reduction="none"
        )
        return (each * (1 + good)).mean()

    return run(model, batches, weighted, optimizer=optimizer, before=before)


MASK = 0


@family
def b_masked_characters(draw: Draw) -> Case:
    """A bidirectional LSTM fills in hidden characters; smoothed labels, accumulated."""
    rnn = nn.LSTM(draw.between(20, 32), draw.between(40, 56), bidirectional=True)
    model = Tagger(draw.module_name(), rnn, 128, 128)
    source, batch = draw.source(), draw.between(4, 6)
    length = draw.between(24, 36)

    def masked() -> Iterator[Pair]:
        for text, _ in characters(source, length, batch):
            hidden = torch.rand(text.shape, generator=source) < 0.15
            hidden[0, 0] = True
            yield text.where(~hidden, MASK), text.where(hidden, -100)

    def loss(model: nn.Module, batch: Pair, smoothing: float = 0.1) -> Tensor:
        scores, wanted = model(batch[0]).flatten(0, 1), batch[1].flatten()
        return cross_entropy(scores, wanted, label_smoothing=smoothing)

    def truth(case: Case, history: History) -> Measured:
        plain = partial(loss, model, smoothing=0.0)
        with torch.no_grad():
            fresh = sum(float(plain(b)) for b in islice(case.batches, 50)) / 50
        learnt = fresh < 0.9 * UNIGRAMS and history.nonfinite is None
        return Measured(learnt, {"plain_on_fresh": fresh, "share": share(history)})

    return run(model, masked(), loss, lr=1e-2, accumulate=4, truth=truth)


# ---- loops of their own


class Translator(nn.Module):
    """An encoder, and a cell that attends to it and is fed what it should write."""

    def __init__(self, name: str, words: int, hidden: int) -> None:
        super().__init__()
        self.name = name
        self.embed = nn.Embedding(words + 1, hidden)
        self.add_module(name, nn.GRU(hidden, hidden))
        self.writer = nn.GRUCell(2 * hidden, hidden)
        self.head = nn.Linear(hidden, words + 1)

    def forward(self, text: Tensor, wanted: Tensor, forced: bool) -> Tensor:
        """Return logarithms of probabilities ``(T, B, words + 1)``."""
        read, state = getattr(self, self.name)(self.embed(text))
        state, word, made = state[0], torch.zeros_like(wanted[0]), []
        for right in wanted:
            weights = softmax((read * state).sum(2), 0)
            context = (weights.unsqueeze(2) * read).sum(0)
            given = torch.cat([self.embed(word), context], 1)
            state = self.writer(given, state)
            made.append(log_softmax(self.head(state), 1))
            word = right if forced else made[-1].argmax(1)
        return torch.stack(made)


@family
def b_translator_forced_by_coin(draw: Draw) -> Case:
    """Attention, teacher forcing by a coin, two optimizers, log_softmax taken twice."""
    words, length = draw.between(6, 9), draw.between(4, 5)
    model = Translator(draw.module_name(), words, draw.between(32, 44))
    encoder = [*getattr(model, model.name).parameters(), *model.embed.parameters()]
    decoder = [*model.writer.parameters(), *model.head.parameters()]
    reading, writing = (torch.optim.Adam(part, lr=5e-3) for part in (encoder, decoder))
    batches, coin = phrases(draw.source(), 24, length, words), draw.source()

    def loss(model: nn.Module, text: Tensor) -> Tensor:
        wanted = text.T.flip(0)
        forced = float(torch.rand((), generator=coin)) < 0.5
        logs = model(text.T, wanted, forced)
        return cross_entropy(logs.flatten(0, 1), wanted.flatten())

    def once(text: Tensor) -> Tensor:
        reading.zero_grad()
        writing.zero_grad()
        value = loss(model, text)
        value.backward()
        reading.step()
        writing.step()
        return value

    return run(model, batches, loss, optimizer=reading, once=once, steps=500)


class Writer(nn.Module):
    """A GRU cell that writes symbols, each drawn from its own scores."""

    def __init__(self, name: str, symbols: int, hidden: int) -> None:
        super().__init__()
        self.name, self.symbols = name, symbols
        self.add_module(name, nn.GRUCell(symbols, hidden))
        self.head = nn.Linear(hidden, symbols)

    def forward(self, symbol: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return what is written after a symbol, ``(T, B)``, and its log-likelihood."""
        state, text, logs = None, [], []
        for _ in range(length):
            state = getattr(self, self.name)(
                one_hot(symbol, self.symbols).float(), state
            )
            choice = torch.distributions.Categorical(logits=self.head(state))
            symbol = choice.sample()
            text.append(symbol)
            logs.append(choice.log_prob(symbol))
        return torch.stack(text), torch.stack(logs)


@family
def b_reinforce_writer(draw: Draw) -> Case:
    """REINFORCE: a writer is rewarded for counting on; the loss hovers about zero."""
    symbols, length = draw.between(4, 6), draw.between(5, 8)
    model = Writer(draw.module_name(), symbols, draw.between(24, 40))
    source, batch, rewards = draw.source(), draw.between(24, 40), list[float]()

    def starts() -> Iterator[Tensor]:
        while True:
            yield torch.randint(symbols, (batch,), generator=source)

    def loss(model: nn.Module, start: Tensor) -> Tensor:
        text, logs = model(start, length)
        before = torch.cat([start.unsqueeze(0), text[:-1]])
        reward = (text == (before + 1) % symbols).float()
        rewards.append(float(reward.mean()))
        value: Tensor = -((reward - reward.mean()) * logs).mean()
        return value

    def truth(case: Case, history: History) -> Measured:
        begun, end = (sum(part) / 20 for part in (rewards[:20], rewards[-20:]))
        learnt = end > 0.8 and begun < 0.5 and history.nonfinite is None
        return Measured(learnt, {"reward_begin": begun, "reward_end": end})

    return run(model, starts(), loss, truth=truth)
