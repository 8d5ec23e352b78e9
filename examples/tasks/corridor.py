"""A recurrent policy: a sign at the entrance of a corridor, and a fork at its end.

The agent sees the sign in the first step alone, walks ten steps, and is paid if it
turns to the side that the sign has named. A GRU cell is stepped through the episode;
the policy is trained by REINFORCE with a running mean as baseline.

Run: .venv/bin/python examples/tasks/corridor.py
"""

import torch
from torch import Tensor, nn

import gradwatch

LENGTH, EPISODES, STEPS = 10, 64, 400


class Policy(nn.Module):
    """Chooses a side from what it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, seen: Tensor) -> Tensor:
        """Map ``(T, B, 3)`` observations to ``(B, 2)`` scores at the fork."""
        state = torch.zeros(seen.shape[1], 32)
        for one in seen:
            state = self.cell(one, state)
        return self.head(state)


def walk() -> tuple[Tensor, Tensor]:
    """Return what is seen in a batch of episodes, and which side is paid."""
    side = torch.randint(2, (EPISODES,))
    seen = torch.zeros(LENGTH + 1, EPISODES, 3)
    seen[0].scatter_(1, side.unsqueeze(1), 1.0)
    seen[-1, :, 2] = 1.0
    return seen, side


def main() -> None:
    """Train, and say how often the agent is paid."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Policy()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    watch = gradwatch.watch(model, name="corridor", budget=None, report=True)
    usual, paid = 0.5, []
    for _ in range(STEPS):
        seen, side = walk()
        chosen = torch.distributions.Categorical(logits=model(seen))
        turn = chosen.sample()
        reward = (turn == side).float()
        loss = -(chosen.log_prob(turn) * (reward - usual)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        usual = 0.9 * usual + 0.1 * reward.mean().item()
        paid.append(reward.mean().item())
    watch.close()
    print(
        f"paid: {sum(paid[:20]) / 20:.0%} of the first episodes, "
        f"{sum(paid[-20:]) / 20:.0%} of the last"
    )


if __name__ == "__main__":
    main()
