"""Sick runs on text: classification, slots, sequence to sequence, characters."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss, softmax
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.detection import truth
from benchmarks.detection.case import Case, Draw, History, Label, Measured, family
from benchmarks.detection.sets.b_text import (
    Chatbot,
    Classifier,
    Labelled,
    Pair,
    SentenceVAE,
    SlotFiller,
    Tagger,
    answering,
    flights,
    phrases,
    topics,
)
from benchmarks.detection.truth import Truth, compared
from testbed.tasks import characters

GITHUB = "https://github.com/"
WORDS = 40


def failing(
    label: Label,
    thread: str,
    model: nn.Module,
    batches: Iterator[Any],
    measure: Truth,
    *,
    loss: Callable[[Any, Any], Tensor],
    lr: float = 1e-3,
    steps: int = 400,
    **more: Any,
) -> Case:
    """Return a case trained by Adam, if nothing else is given."""
    more.setdefault("optimizer", torch.optim.Adam(model.parameters(), lr=lr))
    return Case(
        model=model,
        batches=batches,
        loss=loss,
        label=label,
        steps=steps,
        thread=GITHUB + thread,
        truth=measure,
        **more,
    )


def fault(
    kind: str,
    *causes: str,
    shown: Iterable[str] = (),
    same: Iterable[str] = (),
    others: Iterable[str] = (),
) -> Label:
    """Return the label of a fault from the start, which only the code can cure."""
    return Label(
        kind=kind,
        causes=frozenset(causes),
        streams=frozenset(shown),
        same=frozenset(same),
        others=frozenset(others),
    )


def classified(model: nn.Module, batch: Labelled) -> Tensor:
    """Cross entropy of the topics of sentences."""
    text, sizes, label = batch
    return cross_entropy(model(text, sizes), label)


def mean_of(value: Callable[[Any], Tensor], batches: Iterator[Any]) -> float:
    """Return the mean of a loss over 60 fresh batches."""
    with torch.no_grad():
        return sum(float(value(batch)) for batch in islice(batches, 60)) / 60


# ---- the loss


class TextRNN(Classifier):
    """A bidirectional LSTM over padded sentences, ended by a softmax or its log."""

    def __init__(self, *given: Any, logs: bool) -> None:
        super().__init__(*given)
        self.end = log_softmax if logs else softmax

    def forward(self, text: Tensor) -> Tensor:
        """Return probabilities, or their logarithms."""
        _, (hidden, _) = self.layer(self.embed(text))
        return self.end(self.head(torch.cat([*hidden], 1)), dim=1)


@family
@compared
def b_probabilities_to_nll(draw: Draw, sick: bool) -> Case:
    """A text classifier ends in softmax, and its loss is NLLLoss."""
    classes, batch = draw.between(4, 6), draw.between(24, 40)
    rnn = nn.LSTM(
        draw.between(16, 24),
        draw.between(16, 32),
        batch_first=True,
        bidirectional=True,
    )
    model = TextRNN(draw.module_name(), rnn, classes, logs=not sick)
    longest = draw.between(8, 12)
    given: Any = (batch, (longest, longest), classes)
    batches = topics(draw.source(), *given, wrong=0.3)
    fresh = topics(draw.source(), *given, wrong=0.3)

    def loss(model: nn.Module, batch: Labelled) -> Tensor:
        return nll_loss(model(batch[0]), batch[2])

    def log_loss(batch: Labelled) -> Tensor:
        out = model(batch[0])
        return nll_loss(out.clamp(min=1e-12).log() if sick else out, batch[2])

    def measure(case: Case, history: History) -> Measured:
        with torch.no_grad():
            out = model(next(case.batches)[0])
        off = float((out.sum(1) - 1).abs().max())
        values = {"sum_off_by": off, "largest_loss": max(history.losses)}
        holds = off < 1e-5 and float(out.min()) >= 0 > max(history.losses)
        return Measured(holds, values)

    return failing(
        fault("loss_mismatch", "probabilities"),
        "AnubhavGupta3377/Text-Classification-Models-Pytorch/issues/9",
        model,
        batches,
        measure,
        loss=loss,
        lr=5e-3,
        goal=lambda: mean_of(log_loss, fresh),
    )


# ---- the axes


@family
@compared
def b_slot_filler_steps_over_batch(draw: Draw, sick: bool) -> Case:
    """A slot filler calls its LSTM with (B, 1, E), and batch_first is missing."""
    rnn = nn.LSTM(draw.between(16, 24), draw.between(24, 32), batch_first=not sick)
    model = SlotFiller(draw.module_name(), rnn)
    batches = flights(draw.source(), draw.between(12, 20), draw.between(8, 12))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def measure(case: Case, history: History) -> Measured:
        others = len(answering(model, next(case.batches)[0], 0, 30)) - 1
        return Measured(others > 0, {"others_that_move": others})

    return failing(
        fault("axes_mixed", "batch_axis", shown=[f"{model.name}.l0"]),
        "ray075hl/Bi-Model-Intent-And-Slot/pull/2",
        model,
        batches,
        measure,
        loss=loss,
        lr=5e-3,
        steps=300,
    )


@family
@compared
def b_sentence_vae_hidden_viewed(draw: Draw, sick: bool) -> Case:
    """A sentence VAE views its h_n, (2, B, H), as (B, 2 H)."""
    words, step = draw.between(6, 9), iter(range(10_000))
    hidden, name = draw.between(40, 56), draw.module_name()
    model = SentenceVAE(name, words, hidden, viewed=sick)
    batch, length = 2 * draw.between(12, 20), draw.between(4, 5)
    batches = phrases(draw.source(), batch, length, words)

    def loss(model: nn.Module, text: Tensor) -> Tensor:
        scores, mean, log_variance = model(text)
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        weight = 1 / (1 + math.exp(-0.0025 * (next(step) - 2500)))
        value: Tensor = cross_entropy(scores.flatten(0, 1), text.flatten())
        value += weight * kl
        return value

    def measure(case: Case, history: History) -> Measured:
        moved = answering(model.encode, next(case.batches), 0, words + 1)
        others = len(set(moved) - {0})
        return Measured(others > 0, {"others_that_move": others})

    return failing(
        fault("axes_mixed", "view", others=["not_learning"]),
        "timbmg/Sentence-VAE/issues/15",
        model,
        batches,
        measure,
        loss=loss,
        lr=5e-3,
        steps=500,
    )


@family
@compared
def b_bidirectional_next_character(draw: Draw, sick: bool) -> Case:
    """A model of the next character is bidirectional, and has seen what it predicts."""
    rnn = nn.LSTM(draw.between(24, 32), draw.between(48, 64), bidirectional=sick)
    model = Tagger(draw.module_name(), rnn, 128, 128)
    length, batch = draw.between(80, 100), draw.between(8, 10)
    batches = characters(draw.source(), length, batch)
    fresh = characters(draw.source(), length, batch)

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def when_writing(batch: Pair) -> Tensor:
        return cross_entropy(model(batch[0])[-1], batch[1][-1])

    def measure(case: Case, history: History) -> Measured:
        text, _ = next(case.batches)
        changed = text.clone()
        changed[-1] = (text[-1] + 1) % 128
        with torch.no_grad():
            apart = (model(text) - model(changed)).abs()[-2].amax(1)
        share = float((apart > 0).float().mean())
        return Measured(share == 1.0, {"share_that_sees_the_next": share})

    return failing(
        fault("axes_mixed", "future", shown=[f"{model.name}.l0_reverse"]),
        "sherjilozair/char-rnn-tensorflow/pull/64",
        model,
        batches,
        measure,
        loss=loss,
        lr=1e-2,
        steps=500,
        goal=lambda: mean_of(when_writing, fresh),
    )


# ---- padding


class Sorted(Classifier):
    """Sorts sentences by length, packs and reads them, and may restore their order."""

    def __init__(self, *given: Any, restores: bool) -> None:
        super().__init__(*given)
        self.restores = restores

    def forward(self, text: Tensor, sizes: Tensor) -> Tensor:
        """Return scores of the topics."""
        longest_first, order = sizes.sort(descending=True)
        words = self.embed(text[order])
        packed = pack_padded_sequence(words, longest_first, batch_first=True)
        _, hidden = self.layer(packed)
        last = torch.cat([*hidden], 1)
        scores: Tensor = self.head(last[order.argsort()] if self.restores else last)
        return scores


@family
@compared
def b_order_lost_after_sorting(draw: Draw, sick: bool) -> Case:
    """Sentences are sorted for packing, and the last states are left in that order."""
    classes = draw.between(3, 5)
    rnn = nn.GRU(draw.between(16, 24), draw.between(16, 32), bidirectional=True)
    model = Sorted(draw.module_name(), rnn, classes, restores=not sick)
    batch, longest = draw.between(24, 40), draw.between(14, 20)
    batches = topics(draw.source(), batch, (4, longest), classes)

    def measure(case: Case, history: History) -> Measured:
        text, sizes, _ = next(case.batches)
        answers = [
            answering(lambda x: model(x, sizes), text, row, WORDS)
            for row in range(batch)
        ]
        own = sum(row in moved for row, moved in enumerate(answers)) / batch
        values = {"rows_that_answer_their_own": own, "end": history.final}
        return Measured(own < 0.25 and history.final > 0.9 * math.log(classes), values)

    return failing(
        fault("not_learning", same=["axes_mixed"]),
        "Lizhen0628/text_classification/issues/12",
        model,
        batches,
        measure,
        loss=classified,
        lr=5e-3,
        steps=300,
    )


class LastOfAll(nn.Module):
    """An LSTM over padded sentences, time first, read out at some step."""

    def __init__(self, name: str, rnn: nn.LSTM, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, rnn.input_size, padding_idx=0)
        self.name = name
        self.add_module(name, rnn)
        self.head = nn.Linear(rnn.hidden_size, classes)

    def forward(self, text: Tensor, at: Tensor) -> Tensor:
        """Return scores of the topics, from the outputs at those steps."""
        out, _ = getattr(self, self.name)(self.embed(text.T))
        scores: Tensor = self.head(out[at, torch.arange(len(at))])
        return scores


@family
@compared
def b_read_behind_fixed_length(draw: Draw, sick: bool) -> Case:
    """Sentences of a few words are filled up to 60 or more, and read at the end."""
    classes, width = draw.between(3, 5), draw.between(60, 75)
    rnn = nn.LSTM(draw.between(12, 20), draw.between(16, 28))
    model = LastOfAll(draw.module_name(), rnn, classes)
    sizes = 3, draw.between(6, 8)
    batches = topics(draw.source(), draw.between(16, 24), sizes, classes, width=width)

    def loss(model: nn.Module, batch: Labelled) -> Tensor:
        text, sizes, label = batch
        at = torch.full_like(sizes, width - 1) if sick else sizes - 1
        return cross_entropy(model(text, at), label)

    case = failing(
        fault(
            "vanishing",
            "padding",
            shown=[f"{model.name}.l0"],
            others=["not_learning"],
        ),
        "keitakurita/practical-torchtext/issues/5",
        model,
        batches,
        truth.no_reach,
        loss=loss,
        lr=2e-3,
        steps=500,
    )
    truth.keep(case, range(0, 500, 100))
    return case


# ---- the optimizer and the loop


@family
@compared
def b_chatbot_decoder_without_optimizer(draw: Draw, sick: bool) -> Case:
    """The second optimizer of a chatbot is given the encoder's weights once more."""
    words, hidden = draw.between(10, 14), draw.between(24, 36)
    writer = draw.one_of("decoder", "speaker", "answer_rnn")
    model = Chatbot((draw.module_name(), writer), words, hidden)
    encoder, decoder = model.parts()
    first = torch.optim.Adam(encoder, lr=2e-3)
    second = torch.optim.Adam(encoder if sick else decoder, lr=2e-3)
    batches = phrases(draw.source(), draw.between(16, 24), draw.between(5, 7), words)
    weight = getattr(model, writer).weight_hh_l0
    begun, missing = weight.detach().clone(), list[bool]()

    def once(question: Tensor) -> Tensor:
        answer = question.flip(1)
        given = torch.cat([torch.zeros_like(answer[:, :1]), answer[:, :-1]], 1)
        model.zero_grad()
        loss = cross_entropy(model(question, given).flatten(0, 1), answer.flatten())
        loss.backward()
        first.step()
        second.step()
        missing.append(not weight.grad.any())
        return loss

    def measure(case: Case, history: History) -> Measured:
        moved = float((weight.detach() - begun).abs().max())
        values = {"moved": moved, "steps_without_gradient": sum(missing)}
        return Measured(moved == 0 and not any(missing), values)

    return failing(
        fault("not_updating", "not_in_optimizer", shown=[f"{writer}.l0"]),
        "zhaoyingjun/chatbot/issues/115",
        model,
        batches,
        measure,
        loss=lambda model, question: once(question),
        optimizer=first,
        once=once,
        steps=500,
    )


class Benchmark(Classifier):
    """An LSTM over sentences, read out by the mean of its outputs."""

    def forward(self, text: Tensor, sizes: Tensor) -> Tensor:
        """Return scores of the topics."""
        out, _ = self.layer(self.embed(text))
        scores: Tensor = self.head(out.mean(1))
        return scores


@family
@compared
def b_text_benchmark_without_zero_grad(draw: Draw, sick: bool) -> Case:
    """A loop without zero_grad: sentences, a fifth of the labels drawn anew; SGD."""
    classes = draw.between(4, 6)
    rnn = nn.LSTM(draw.between(16, 24), draw.between(24, 40), batch_first=True)
    model = Benchmark(draw.module_name(), rnn, classes)
    longest = draw.between(8, 12)
    batch, sizes = draw.between(24, 40), (longest, longest)
    batches = topics(draw.source(), batch, sizes, classes, wrong=0.2)
    left = list[bool]()

    def loss(model: nn.Module, batch: Labelled) -> Tensor:
        left.append(any(w.grad is not None for w in model.parameters()))
        return classified(model, batch)

    def measure(case: Case, history: History) -> Measured:
        values = {"steps": case.steps, "begun_with_old_gradients": sum(left)}
        return Measured(sum(left) == case.steps - 1, values)

    return failing(
        fault("not_cleared", others=["lr_too_high", "loss_divergence"]),
        "FreedomIntelligence/TextClassificationBenchmark/issues/20",
        model,
        batches,
        measure,
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.7),
        clip=5.0,
        clears=not sick,
    )
