"""Train on handwritten digits, read pixel by pixel, under watch; then break it.

Act one: a bidirectional LSTM and a vanilla ReLU RNN learn the digits. Act two: the
RNN's recurrent weights are driven unstable in mid-training, and the alarm goes off.

Run: make demo
"""

import os
import time
from pathlib import Path

import torch
import wandb
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch

RUNS = Path(os.environ.get("GRADWATCH_DIR", "gradwatch-runs"))


class Reader(nn.Module):
    """Reads a sequence and classifies it by the last state of every direction."""

    def __init__(self, recurrent: nn.Module, states: int) -> None:
        super().__init__()
        self.rnn = recurrent
        self.head = nn.Linear(states, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map ``(T, B, 1)`` pixels to ``(B, 10)`` scores."""
        _, last = self.rnn(pixels)
        h_n = last[0] if isinstance(last, tuple) else last
        return self.head(h_n.transpose(0, 1).flatten(1))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train and test images as ``(64, N, 1)`` sequences, with their labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1)[order] / 16
    labels = torch.tensor(data.target)[order]
    sequences = images.T.unsqueeze(-1)
    return sequences[:, :1400], labels[:1400], sequences[:, 1400:], labels[1400:]


def train(
    model: Reader,
    watch: gradwatch.Watch,
    run: "wandb.Run",
    optimizer: torch.optim.Optimizer,
    steps: range,
    break_at: int | None = None,
) -> None:
    """Train as anyone would; nothing here knows of the watch but the printed line."""
    x, y, x_test, y_test = digits()
    shuffle = torch.Generator().manual_seed(steps.start)
    loss_fn = nn.CrossEntropyLoss()
    for step in steps:
        batch = torch.randint(len(y), (64,), generator=shuffle)
        loss = loss_fn(model(x[:, batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log({"loss": loss.item()})
        if step == break_at:
            with torch.no_grad():
                model.rnn.weight_hh_l0.mul_(3.0)
            print(f"  step {step:4}: the recurrent weights are multiplied by 3 ...")
        if step % 50 == 49:
            with torch.no_grad():
                right = (model(x_test).argmax(1) == y_test).float().mean().item()
            print(f"  step {step:4}: loss {loss.item():8.3f}  accuracy {right:.2f}")
            for stream in watch.streams:
                rho = watch.latest.get(f"gradwatch/{stream.key}/rho", float("nan"))
                norm = watch.latest[f"gradwatch/{stream.key}/grad_norm_hh"]
                print(f"    {stream.name:16} rho {rho:.3f}  |dL/dW_hh| {norm:.3g}")


def begin(name: str) -> "wandb.Run":
    """Start an offline W&B run; it lands beside the records."""
    RUNS.mkdir(exist_ok=True)
    quiet = wandb.Settings(silent=True, console="off")
    return wandb.init(
        project="gradwatch-demo", name=name, mode="offline", dir=RUNS, settings=quiet
    )


def main() -> None:
    """Play both acts and say where everything lies."""
    started = time.perf_counter()
    torch.manual_seed(0)

    print("\nAct one: a bidirectional LSTM learns the digits, 64 pixels in a row.")
    lstm = Reader(nn.LSTM(1, 64, bidirectional=True), 128)
    lstm_run = begin("lstm")
    lstm_watch = gradwatch.watch(lstm)
    adam = torch.optim.Adam(lstm.parameters(), 3e-3)
    train(lstm, lstm_watch, lstm_run, adam, range(150))
    print(f"\n{lstm_watch}\n")
    picture = lstm_watch.dir / "flow.svg"
    gradwatch.plot.flow(lstm_watch.records).save(picture)
    print(f"How far back its gradients reach, as a picture: {picture}")
    lstm_watch.close()
    lstm_run.finish()

    print("\nA ReLU RNN, its recurrent weights orthogonal at the start, does too.")
    rnn = Reader(nn.RNN(1, 64, nonlinearity="relu"), 64)
    nn.init.orthogonal_(rnn.rnn.weight_hh_l0)
    rnn_run = begin("relu-rnn")
    rnn_watch = gradwatch.watch(rnn)
    sgd = torch.optim.SGD(rnn.parameters(), 0.01, momentum=0.9)
    train(rnn, rnn_watch, rnn_run, sgd, range(150))
    print(f"\n{rnn_watch}\n")

    print("\nAct two: its recurrent weights are driven unstable in mid-training.")
    train(rnn, rnn_watch, rnn_run, sgd, range(150, 200), break_at=160)
    print(f"\n{rnn_watch}\n")
    print(f"The run as one page, for a browser: {rnn_watch.report()}")
    rnn_watch.close()
    rnn_run.finish()

    for title, watch, run in (
        ("LSTM", lstm_watch, lstm_run),
        ("RNN", rnn_watch, rnn_run),
    ):
        saved = gradwatch.load(watch.dir)
        print(
            f"{title}: {len(saved.records)} records, alerts: {len(saved.alerts)}, "
            f"in {watch.dir}\n"
            f"  read them:     gradwatch.load({str(watch.dir)!r}).records.keys()\n"
            f"  show the run:  wandb sync {Path(run.dir).parent}"
        )
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
