"""Sick nets by cause, and what is tried on each before the first step."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.remedies.nets import Batch, Net
from gradwatch import init, parametrize
from gradwatch.clip import Clipper, LogZClip, NormClip

HIDDEN, LENGTH, RATE = 48, 40, 1e-3

Change = Callable[["Trial"], object]

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": nn.RNN,
    "ReLU": partial(nn.RNN, nonlinearity="relu"),
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
}


@dataclass
class Trial:
    """A net and how it will be trained; faults and remedies change either.

    Attributes:
        net: The net.
        length: T, before padding.
        padding: Steps of zeros at the end.
        scale: What the inputs are multiplied by.
        chunk: The state is detached every so many steps; None: never.
        optimizer: AdamW or SGD.
        rate: Learning rate.
        decay: Weight decay of the recurrent layer.
        clipper: What makes the clipper, if any.
    """

    net: Net
    length: int = LENGTH
    padding: int = 0
    scale: float = 1.0
    chunk: int | None = None
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    rate: float = RATE
    decay: float = 0.0
    clipper: Callable[[], Clipper] | None = None

    def shaped(self, batch: Batch) -> Batch:
        """Return a batch as this net gets it."""
        x = self.scale * batch[0]
        padding = x.new_zeros(self.padding, *x.shape[1:])
        return torch.cat((x, padding)), batch[1]

    def scores(self, x: Tensor) -> Tensor:
        """Return what the net says, without a gradient past the last chunk."""
        *early, last = x.split(self.chunk or len(x))
        state = None
        for part in early:
            state = self.net.rnn(part, state)[1].detach()
        scores: Tensor = self.net.head(self.net.rnn(last, state)[0][-1])
        return scores

    def train(self, batches: Iterable[Batch], steps: int) -> Iterator[float]:
        """Take optimizer steps.

        Yields:
            The loss before each step, once that step has been made.
        """
        parts = [{"params": [*m.parameters()]} for m in (self.net.rnn, self.net.head)]
        kept: Any = self.optimizer(parts, lr=self.rate, weight_decay=0.0)
        # Not by the constructor, which refuses a negative one.
        kept.param_groups[0]["weight_decay"] = self.decay
        if self.clipper is not None:
            self.clipper().attach(kept)
        for x, y in islice(batches, steps):
            loss = nn.functional.cross_entropy(self.scores(x), y)
            kept.zero_grad()
            loss.backward()
            kept.step()
            yield loss.item()


@dataclass(frozen=True)
class Cause:
    """What makes a net sick.

    Attributes:
        name: The cause.
        kind: Of layer.
        symptom: What is to go away.
        fault: Brings it about.
        remedies: What is tried, by name.
    """

    name: str
    kind: str
    symptom: str
    fault: Change
    remedies: dict[str, Change]


def put(**values: object) -> Change:
    """Return what sets attributes of a trial."""

    def change(trial: Trial) -> None:
        for name, value in values.items():
            setattr(trial, name, value)

    return change


def both(*changes: Change) -> Change:
    """Return one change after the other."""

    def change(trial: Trial) -> None:
        for one in changes:
            one(trial)

    return change


def weights(new: Callable[[Tensor], Tensor]) -> Change:
    """Return what makes W_hh a function of itself."""

    @torch.no_grad()
    def change(trial: Trial) -> None:
        weight = trial.net.rnn.weight_hh_l0
        weight.copy_(new(weight))

    return change


def with_radius(rho: float) -> Change:
    """Return what scales W_hh to a spectral radius."""
    return weights(lambda w: w * (rho / torch.linalg.eigvals(w).abs().max()))


def bias(value: float, gate: int = 0) -> Change:
    """Return what sets the bias of a gate, or of a vanilla net."""

    @torch.no_grad()
    def change(trial: Trial) -> None:
        rnn, block = trial.net.rnn, slice(gate * HIDDEN, (gate + 1) * HIDDEN)
        rnn.bias_ih_l0[block], rnn.bias_hh_l0[block] = value, 0.0

    return change


def zero_biases(trial: Trial) -> None:
    """Set all biases of the layer to 0, by hand: those of gated nets, too."""
    nn.init.zeros_(trial.net.rnn.bias_ih_l0)
    nn.init.zeros_(trial.net.rnn.bias_hh_l0)


def chain(weight: Tensor) -> Tensor:
    """Return half the identity and 1.5 times a shift: rho .5, norm nearly 2."""
    ones = torch.ones(len(weight) - 1)
    return 0.5 * torch.eye(len(weight)) + 1.5 * ones.diag(1)


def chrono(trial: Trial) -> None:
    """Spread memories up to the length of the sequences."""
    init.chrono_(trial.net, t_max=trial.length)


def reset(trial: Trial) -> None:
    """Draw the layer anew, as PyTorch does."""
    trial.net.rnn.reset_parameters()


def of_net(initialiser: Callable[..., object], *args: Any, **options: Any) -> Change:
    """Return what applies one of gradwatch's to the net of a trial."""
    return lambda trial: initialiser(trial.net, *args, **options)


ORTHOGONAL = of_net(init.orthogonal_)
HALF = of_net(init.orthogonal_, zero_bias=False)
GAIN = {"`orthogonal_(gain=2**.5)`": of_net(init.orthogonal_, 2**0.5)}

CLIP = {"`NormClip(1)`": put(clipper=NormClip)}
ORTHO = {"`orthogonal_()`": ORTHOGONAL}
NO_ZERO = {"`orthogonal_(zero_bias=False)`": HALF}
BIAS_1 = {"`forget_bias_(1)`": of_net(init.forget_bias_, 1.0)}
SPREAD = {"`chrono_(T)`": chrono}
CAP = {"`spectral_cap_(.95)`": of_net(init.spectral_cap_, 0.95)}
ZEROS = {"zero biases, by hand": zero_biases}
FRESH = {"`reset_parameters()`": reset}
SLOW = {"rate / 100": put(rate=RATE / 100)}
HELD = {"`parametrize.orthogonal()`": of_net(parametrize.orthogonal)}
UNIT = {"inputs normalised": put(scale=1.0)}

CAUSES = (
    Cause("small_radius", "tanh", "vanishing", with_radius(0.4), ORTHO | CLIP | SLOW),
    Cause(
        "saturation by inputs",
        "tanh",
        "vanishing",
        both(ORTHOGONAL, put(scale=50.0)),
        UNIT | ORTHO,
    ),
    Cause(
        "saturation by weights",
        "tanh",
        "vanishing",
        # Without a bias such a net latches what came first: no fault on this task.
        both(weights(lambda w: 4 * torch.eye(len(w))), bias(2.0)),
        ORTHO | NO_ZERO | CAP | CLIP,
    ),
    Cause(
        "forget_gate",
        "LSTM",
        "vanishing",
        of_net(init.forget_bias_, -5.0),
        SPREAD | BIAS_1 | ORTHO,
    ),
    Cause(
        "update_gate",
        "GRU",
        "vanishing",
        of_net(init.forget_bias_, -5.0),
        SPREAD | BIAS_1 | ORTHO,
    ),
    Cause("horizon_too_long", "tanh", "vanishing", put(length=100), ORTHO | CLIP),
    Cause("horizon_too_long", "GRU", "vanishing", put(length=100), SPREAD | CLIP),
    Cause(
        "truncation",
        "tanh",
        "vanishing",
        both(ORTHOGONAL, put(chunk=10)),
        {"full BPTT": put(chunk=None)} | ORTHO,
    ),
    Cause(
        "padding",
        "tanh",
        "vanishing",
        put(length=10, padding=60),
        {"trimmed, or packed": put(padding=0)} | ORTHO | CLIP,
    ),
    Cause("stuck gate i", "LSTM", "gate_shut", bias(-6.0, 0), ZEROS | SPREAD | ORTHO),
    Cause("stuck gate o", "LSTM", "gate_shut", bias(-6.0, 3), ZEROS | SPREAD | ORTHO),
    Cause("stuck gate z", "GRU", "gate_shut", bias(6.0, 1), ZEROS | SPREAD | ORTHO),
    Cause(
        "dead ReLU",
        "ReLU",
        "dead_units",
        bias(-10.0),
        ORTHO | {"`identity_()`": of_net(init.identity_)} | ZEROS | NO_ZERO,
    ),
    Cause(
        "large_radius",
        "ReLU",
        "exploding",
        with_radius(3.0),
        ORTHO | GAIN | NO_ZERO | CLIP | SLOW,
    ),
    Cause(
        "chaos",
        "tanh",
        "exploding",
        weights(lambda w: torch.randn_like(w) * 3 / len(w) ** 0.5),
        ORTHO | NO_ZERO | CAP | CLIP | SLOW,
    ),
    Cause("non-normal chain", "ReLU", "exploding", weights(chain), ORTHO | GAIN | CLIP),
    *(
        Cause(
            "large_recurrent_weights",
            kind,
            "exploding",
            both(of_net(init.forget_bias_, 1.0), weights(lambda w: 16 * w)),
            ORTHO | CAP | FRESH | CLIP | SPREAD,
        )
        for kind in ("LSTM", "GRU")
    ),
    *(
        Cause(
            name,
            "tanh",
            "drift",
            both(ORTHOGONAL, put(decay=decay)),
            HELD | {"no decay": put(decay=0.0)} | ORTHO,
        )
        for name, decay in (("drift, decay 30", 30.0), ("drift, decay -5", -5.0))
    ),
    Cause(
        "lr_too_high",
        "tanh",
        "lr_too_high",
        both(ORTHOGONAL, put(rate=0.3)),
        {f"rate {RATE}": put(rate=RATE)} | ORTHO | CLIP,
    ),
    Cause(
        "over_clipping",
        "tanh",
        "standing_still",
        both(
            ORTHOGONAL,
            put(
                optimizer=torch.optim.SGD,
                rate=0.1,
                clipper=partial(NormClip, 1e-6),
            ),
        ),
        {"`LogZClip()`": put(clipper=LogZClip)} | ORTHO,
    ),
)
