"""The answer stands at the beginning, and the net guesses.

An LSTM as PyTorch makes it lets go of half of its state at each step. Of the first word
nothing is left 40 steps later, and nothing of the gradient arrives there that could
teach it to remember. chrono_ sets the gates so that it can from the start.

Alarm: vanishing, cause horizon_too_long

Run: .venv/bin/python examples/gallery/forgets_the_first_word.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import gradwatch

WORDS, LENGTH = 4, 40


class Listener(nn.Module):
    """Reads a sentence and names the word that it began with."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WORDS, 32)
        self.head = nn.Linear(32, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Map ``(T, B, 4)`` words to ``(B, 4)`` scores."""
        return self.head(self.lstm(words)[0][-1])


def sentences() -> tuple[Tensor, Tensor]:
    """Return 32 sentences, a word and then noise, and which word it was."""
    which = torch.randint(WORDS, (32,))
    sound = 0.3 * torch.randn(LENGTH, 32, WORDS)
    sound[0] = one_hot(which, WORDS).float()
    return sound, which


def train(sick: bool) -> float:
    """Train on fresh sentences; return the accuracy of the last 50 steps."""
    torch.manual_seed(0)
    model = Listener()
    if not sick:
        gradwatch.init.chrono_(model, t_max=2 * LENGTH)
    name = f"forgets-the-first-word-{'sick' if sick else 'mended'}"
    watch = gradwatch.watch(model, name=name, budget=None)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    right = []
    for _ in range(750):
        words, which = sentences()
        scores = model(words)
        loss = nn.functional.cross_entropy(scores, which)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((scores.argmax(-1) == which).float().mean().item())
    watch.close()
    return sum(right[-50:]) / 50


def main() -> None:
    """Train twice; say what the accuracy alone shows."""
    torch.set_num_threads(1)
    for sick, what in ((True, "as PyTorch makes it"), (False, "after chrono_")):
        print(f"{what}:")
        print(f"  right answers at the end: {train(sick):.0%}")


if __name__ == "__main__":
    main()
