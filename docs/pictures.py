"""Draw the pictures of docs/flow.md from real runs on handwritten digits.

An LSTM as PyTorch makes it, one whose forget gate has a bias of 1, and a tanh RNN with
orthogonal recurrent weights learn to read digits pixel by pixel, 64 in a row.

Run: python docs/pictures.py
"""

import logging
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import gradwatch
from testbed.training import classifier, digit_batches, learn

DOCS = Path(__file__).parent
STEPS = 600


def lstm(forget_bias: float | None = None) -> nn.Module:
    """Return a classifier of digits with one LSTM."""
    model = classifier(nn.LSTM, hidden=64)
    if forget_bias is not None:
        with torch.no_grad():
            model.rnn.bias_ih_l0[64:128] = forget_bias
            model.rnn.bias_hh_l0[64:128] = 0
    return model


def main() -> None:
    """Train, and save a picture of each run."""
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    nets = {
        "flow-lstm": lstm(),
        "flow-forget-bias-1": lstm(1.0),
        "flow-orthogonal-rnn": classifier(nn.RNN, hidden=64, orthogonal=True),
    }
    for name, model in nets.items():
        with gradwatch.watch(model, every={"flow": 20}, budget=None, dir=None) as watch:
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            learn(model, optimizer, digit_batches(STEPS, batch=32), clip=1.0)
            watch.flush()
            reach = watch.records.series("gradwatch/rnn/l0/horizon")[1]
            ratio = watch.records.series("gradwatch/rnn/l0/adjoint_log10")[1]
            chart = gradwatch.plot.flow(watch.records).properties(height=200)
            chart.save(DOCS / f"{name}.png", scale_factor=1.2)
        found = f"horizon {reach[0]:.0f} to {reach[-1]:.0f}"
        print(f"{name}: {found}; adjoint_log10 {ratio[0]:.1f} to {ratio[-1]:.1f}")


if __name__ == "__main__":
    main()
