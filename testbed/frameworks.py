"""The same small training in each framework: an LSTM reads digits row by row.

Every function trains for some steps, saves a checkpoint in a folder at the end, and
goes on from it where that is asked for. Gradients are clipped at .5 by the framework's
own means. Stable-Baselines3 has a policy for a pole in place of the digits.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import gradwatch

BATCH, CLIP, PER_EPOCH = 64, 0.5, 16


class Fitted(NamedTuple):
    """What came of a training.

    Attributes:
        watch: The watch; None without one.
        losses: What the training saw itself, a step each; empty where it shows none.
        model: The model.
    """

    watch: gradwatch.Watch | None
    losses: list[float]
    model: nn.Module


class Net(nn.Module):
    """Reads 8 rows of 8 numbers and scores ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, shape ``(B, 10)``."""
        scores: Tensor = self.head(self.rnn(x)[0][:, -1])
        return scores


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,024 images of shape ``(8, 8)``, from 0 to 1, and their digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    size = BATCH * PER_EPOCH
    return (found.images[:size] / 16).astype(np.float32), found.target[:size]


def _data() -> TensorDataset:
    return TensorDataset(*map(torch.from_numpy, digits()))


def lightning(
    folder: Path,
    *,
    steps: int = 40,
    lr: float = 0.01,
    watched: bool = True,
    resume: bool = False,
    **arguments: Any,
) -> Fitted:
    """Train by Lightning's Trainer, with loggers for TensorBoard and CSV."""
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from gradwatch.integrations.lightning import GradwatchCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = Net(), list[float]()

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr)

    torch.manual_seed(0)
    module, callback = Module(), GradwatchCallback(**arguments) if watched else None
    saved = folder / "lightning.ckpt"
    before = torch.load(saved, weights_only=False)["global_step"] if resume else 0
    trainer = L.Trainer(
        max_steps=before + steps,
        accelerator="cpu",
        logger=[TensorBoardLogger(folder, "tb"), CSVLogger(folder, "csv")],
        callbacks=[callback] if callback is not None else [],
        gradient_clip_val=CLIP,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        module,
        DataLoader(_data(), BATCH, shuffle=True),
        ckpt_path=saved if resume else None,
        weights_only=False,
    )
    trainer.save_checkpoint(saved)
    watch = callback.watch if callback is not None else None
    return Fitted(watch, module.seen, module)


def transformers(
    folder: Path,
    *,
    steps: int = 40,
    lr: float = 0.01,
    watched: bool = True,
    resume: bool = False,
    **arguments: Any,
) -> Fitted:
    """Train by the Trainer of Hugging Face, with its callback for TensorBoard."""
    import transformers as hf
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    from gradwatch.integrations.transformers import GradwatchCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = Net(), list[float]()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            scores = self.net(x)
            loss = cross_entropy(scores, labels)
            self.seen.append(loss.item())
            return {"loss": loss, "logits": scores}

    hf.set_seed(0)
    model, writer = Model(), SummaryWriter(folder / "tb")
    tensorboard = gradwatch.sinks.TensorBoard(writer)
    own = GradwatchCallback(sinks=[tensorboard], **arguments) if watched else None
    saved = max(folder.glob("hf/checkpoint-*"), default=None)
    before = int(saved.name.partition("-")[2]) if saved and resume else 0
    trainer = hf.Trainer(
        model,
        hf.TrainingArguments(
            str(folder / "hf"),
            max_steps=before + steps,
            learning_rate=lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=BATCH,
            max_grad_norm=CLIP,
            save_steps=before + steps,
            logging_steps=10,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[
            {"x": x, "labels": y} for x, y in zip(*_data().tensors, strict=True)
        ],
        callbacks=[TensorBoardCallback(writer), *([own] if own else [])],
    )
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(saved) if resume else None)
    return Fitted(own.watch if own is not None else None, model.seen, model)


def accelerate(
    folder: Path,
    *,
    steps: int = 40,
    lr: float = 0.01,
    watched: bool = True,
    resume: bool = False,
    **arguments: Any,
) -> Fitted:
    """Train a loop of one's own with Accelerate, and its tracker for TensorBoard."""
    from accelerate import Accelerator

    from gradwatch.integrations.accelerate import watch

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    plain, losses = Net(), list[float]()
    optimizer = torch.optim.Adam(plain.parameters(), lr)
    data = DataLoader(_data(), BATCH, shuffle=True)
    model, optimizer, data = accelerator.prepare(plain, optimizer, data)
    accelerator.init_trackers("tb")
    made = watch(accelerator, model, **arguments) if watched else None
    if resume:
        accelerator.load_state(folder / "accelerate")
    while len(losses) < steps:
        for x, y in data:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    accelerator.save_state(folder / "accelerate")
    accelerator.end_training()
    return Fitted(made, losses, plain)


def ignite(
    folder: Path,
    *,
    steps: int = 40,
    lr: float = 0.01,
    watched: bool = True,
    resume: bool = False,
    **arguments: Any,
) -> Fitted:
    """Train by an engine of Ignite, with its logger for TensorBoard."""
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.handlers.tensorboard_logger import TensorboardLogger

    from gradwatch.integrations.ignite import GradwatchHandler

    torch.manual_seed(0)
    model, losses = Net(), list[float]()
    optimizer = torch.optim.Adam(model.parameters(), lr)

    def step(engine: Engine, batch: Any) -> None:
        loss = cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())

    trainer, logger = Engine(step), TensorboardLogger(log_dir=str(folder / "tb"))
    saved: dict[str, Any] = {"model": model, "optimizer": optimizer, "trainer": trainer}
    handler = None
    if watched:
        handler = GradwatchHandler(model, logger, **arguments).attach(trainer)
        saved["gradwatch"] = handler
    if resume:
        file = folder / "ignite" / "checkpoint.pt"
        kept = torch.load(file, weights_only=False)
        known = {key: one for key, one in saved.items() if key in kept}
        Checkpoint.load_objects(known, kept)
    disk = DiskSaver(str(folder / "ignite"), require_empty=False)
    checkpoint = Checkpoint(saved, disk, filename_pattern="checkpoint.pt")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    before = trainer.state.epoch  # an epoch is all the steps of one training
    data = DataLoader(_data(), BATCH, shuffle=True)
    trainer.run(data, max_epochs=before + 1, epoch_length=steps)
    logger.close()
    return Fitted(handler.watch if handler is not None else None, losses, model)


def skorch(
    folder: Path,
    *,
    steps: int = 48,
    lr: float = 0.01,
    watched: bool = True,
    resume: bool = False,
    **arguments: Any,
) -> Fitted:
    """Train by a net of skorch, for whole epochs of 16 steps."""
    from skorch import NeuralNetClassifier
    from skorch.callbacks import GradientNormClipping

    from gradwatch.integrations.skorch import GradwatchCallback

    torch.manual_seed(0)
    callbacks: list[Any] = [("clip", GradientNormClipping(CLIP))]
    if watched:
        callbacks.append(("gradwatch", GradwatchCallback(**arguments)))
    file = folder / "net.pkl"
    if resume:
        net = pickle.loads(file.read_bytes())
    else:
        net = NeuralNetClassifier(
            Net,
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.Adam,
            lr=lr,
            batch_size=BATCH,
            train_split=None,
            callbacks=callbacks,
            verbose=0,
        ).initialize()
    start = len(net.history)
    net.partial_fit(*digits(), epochs=-(-steps // PER_EPOCH))
    file.write_bytes(pickle.dumps(net))
    losses = [
        b["train_loss"] for epoch in net.history[start:] for b in epoch["batches"]
    ]
    watch = dict(net.callbacks_)["gradwatch"].watch_ if watched else None
    return Fitted(watch, losses, net.module_)


def sb3(
    folder: Path,
    *,
    steps: int = 32,
    lr: float = 3e-4,
    watched: bool = True,
    resume: bool = False,
    **arguments: Any,
) -> Fitted:
    """Let RecurrentPPO of sb3-contrib learn to balance a pole, 4 steps a rollout."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.logger import configure

    from gradwatch.integrations.sb3 import GradwatchCallback

    callback = GradwatchCallback(**arguments) if watched else None
    if resume:
        algorithm = RecurrentPPO.load(folder / "sb3", env=_pole())
        state = torch.load(folder / "sb3.pt", weights_only=False)
        if callback is not None:
            callback.load_state_dict(state)
    else:
        algorithm = RecurrentPPO(
            "MlpLstmPolicy",
            _pole(),
            n_steps=32,
            batch_size=16,
            n_epochs=2,
            learning_rate=lr,
            max_grad_norm=CLIP,
            seed=0,
            policy_kwargs={"lstm_hidden_size": 16, "net_arch": [16]},
        )
    algorithm.set_logger(configure(str(folder / "tb"), ["tensorboard", "csv"]))
    rollouts = 32 * steps // 4
    algorithm.learn(rollouts, callback=callback, reset_num_timesteps=not resume)
    algorithm.save(folder / "sb3")
    torch.save(callback.state_dict() if callback is not None else {}, folder / "sb3.pt")
    watch = callback.watch if callback is not None else None
    return Fitted(watch, [], algorithm.policy)


def _pole() -> Any:
    import gymnasium

    return gymnasium.make("CartPole-v1")


FRAMEWORKS: dict[str, Callable[..., Fitted]] = {
    "lightning": lightning,
    "transformers": transformers,
    "accelerate": accelerate,
    "ignite": ignite,
    "skorch": skorch,
    "sb3": sb3,
}
"""Name of the room in ``gradwatch.integrations`` -> its training."""
