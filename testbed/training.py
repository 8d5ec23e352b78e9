"""Real training runs, healthy and sick, for the tests of the alarms."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from testbed.models import Tagger


def digit_batches(steps, batch=64, seed=0):
    """Yield handwritten digits read pixel by pixel, ``(64, B, 1)``, with labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(labels), (batch,), generator=generator)
        yield images[index].T.unsqueeze(-1), labels[index]


def adding_batches(steps, length=50, batch=32, seed=0):
    """Yield the adding problem: two marked numbers of a sequence, and their sum."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        values = torch.rand(length, batch, generator=generator)
        marks = torch.zeros(length, batch)
        rows = torch.arange(batch)
        half = length // 2
        one = torch.randint(half, (batch,), generator=generator)
        two = torch.randint(half, length, (batch,), generator=generator)
        marks[one, rows] = marks[two, rows] = 1.0
        yield torch.stack([values, marks], -1), (values * marks).sum(0)


def classifier(kind, hidden=48, orthogonal=False, seed=0, **options):
    """Return a net that reads a digit pixel by pixel."""
    torch.manual_seed(seed)
    model = Tagger(kind(1, hidden, **options), hidden, 10)
    if orthogonal:
        for gate in model.rnn.weight_hh_l0.data.split(hidden):
            nn.init.orthogonal_(gate)
    return model


def learn(model, optimizer, data, clip=None, at=None, change=None, loss_fn=None):
    """Train as anyone would; ``change()`` happens before step ``at``."""
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    for step, (x, y) in enumerate(data):
        if step == at:
            change()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def faster(optimizer, factor):
    """Return what multiplies the learning rate."""

    def change():
        for group in optimizer.param_groups:
            group["lr"] *= factor

    return change


def inflated(model, factor):
    """Return what multiplies the recurrent weights."""

    def change():
        with torch.no_grad():
            model.rnn.weight_hh_l0.mul_(factor)

    return change
