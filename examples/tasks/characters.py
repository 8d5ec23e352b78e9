"""A character model with truncated backpropagation through time.

An LSTM reads the help texts of Python itself in 32 streams, 50 characters at a time.
The state is handed on from one piece to the next and detached there, so that backward
ends at the seam: the usual way to train on text that has no end.

Run: .venv/bin/python examples/tasks/characters.py
"""

import math
import pydoc_data.topics

import torch
from torch import Tensor, nn

import gradwatch

STREAMS, PIECE, STEPS = 32, 50, 400


class Characters(nn.Module):
    """Predicts the next character of each stream."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        self.rnn = nn.LSTM(32, 128)
        self.head = nn.Linear(128, symbols)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map ``(T, B)`` characters and a state to ``(T, B, symbols)`` and a state."""
        out, state = self.rnn(self.embedding(x), state)
        return self.head(out), state


def streams() -> tuple[Tensor, int]:
    """Return the text as ``(length, STREAMS)`` numbers, and how many symbols it has."""
    text = "".join(
        pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)
    )
    symbols = sorted(set(text))
    numbers = torch.tensor([symbols.index(c) for c in text[: STREAMS * 10_000]])
    return numbers.view(STREAMS, -1).T.contiguous(), len(symbols)


def main() -> None:
    """Train, and say what a character costs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, symbols = streams()
    model = Characters(symbols)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    watch = gradwatch.watch(model, name="characters", budget=None, report=True)
    state, at, losses = None, 0, []
    for _ in range(STEPS):
        if at + PIECE + 1 > len(text):
            state, at = None, 0
        piece = text[at : at + PIECE + 1]
        at += PIECE
        scores, state = model(piece[:-1], state)
        state = (state[0].detach(), state[1].detach())
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), piece[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    watch.close()
    print(f"bits a character: {losses[0]:.2f} at first, {sum(losses[-50:]) / 50:.2f}")


if __name__ == "__main__":
    main()
