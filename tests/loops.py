"""Twenty training loops as people write them, each with the truth noted beside.

Call a loop as `loop(model, truth)` with `truth = Truth(model)`, where `model` is
`testbed.models.lstm()`. The rows are then in `truth.rows`.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from testbed.models import batches


@dataclass
class Row:
    """What a loop measured by hand at one of its steps.

    Attributes:
        pre: The norm of the step's gradients before clipping, without a loss scale.
        post: Their norm as the first optimizer is about to use them. None where no
            optimizer used them.
        change: How far `weight_hh_l0` went in all the optimizer steps of the step,
            relative to its norm. None where no optimizer that holds it stepped.
        skipped: The gradients were not finite, and no optimizer used them.
    """

    pre: float
    post: float | None
    change: float | None
    skipped: bool = False


class Truth:
    """The rows of a loop, and the helpers by which it notes them.

    A loop calls `pre` after the last backward of a step, `post` before the first
    optimizer, and `add` (or `skip`) at the end of the step.
    """

    def __init__(self, model):
        self.model = model
        self.rows = []
        self._clear()

    def norm(self, parameters=None, scale=1.0):
        """Return the norm of the gradients, in float64.

        Args:
            parameters: Those that count. All of the model's, as it is now, if None.
            scale: A loss scale that the gradients still carry.
        """
        total = 0.0
        for p in self.model.parameters() if parameters is None else parameters:
            if p.grad is not None:
                total += p.grad.detach().double().square().sum().item()
        return math.sqrt(total) / scale

    def pre(self, parameters=None, scale=1.0):
        """Note the gradients of a step, once its last backward is complete."""
        self._pre = self.norm(parameters, scale)

    def post(self, parameters=None):
        """Note the gradients as the first optimizer is about to use them.

        Remembers the weight too, unless `remember` did so already for this step.
        """
        self._post = self.norm(parameters)
        if self._before is None:
            self.remember()

    def remember(self):
        """Remember the weight as it is before the optimizers of this step."""
        self._before = self._weight()

    def add(self, held=True):
        """Add the row of the step that ends here.

        Args:
            held: Whether an optimizer that holds the weight stepped.
        """
        change = None
        if held and self._post is not None:
            change = (self._weight() - self._before).norm() / self._before.norm()
            change = change.item()
        self.rows.append(Row(self._pre, self._post, change))
        self._clear()

    def skip(self):
        """Add the row of a step whose gradients are thrown away, not finite."""
        self.rows.append(Row(self._pre, None, None, skipped=True))
        self._clear()

    def _weight(self):
        return self.model.rnn.weight_hh_l0.detach().double().clone()

    def _clear(self):
        self._pre = self._post = self._before = None


def labels(x, classes=3):
    """Return which of the first features is the largest in the last row."""
    return x[-1, :, :classes].argmax(-1)


def loss_of(model, x):
    """Return the loss of a model that tells the largest feature."""
    return cross_entropy(model(x), labels(x))


def delayed_actor(model, truth):
    """Someone in RL with a shared body, whose actor learns at every third batch."""
    torch.manual_seed(0)
    value = nn.Linear(8, 1)
    body = list(model.rnn.parameters())
    critic = Adam([*body, *value.parameters()], lr=0.01)
    actor = Adam(model.parameters(), lr=0.003)
    for k, x in enumerate(batches(8)):
        reward = x[-1, :, :1]
        critic.zero_grad()
        mse_loss(value(model.rnn(x)[0][-1]), reward).backward()
        truth.pre(body)
        clip_grad_norm_([*body, *value.parameters()], 0.5)
        truth.post(body)
        critic.step()
        truth.add()
        if k % 3 == 2:
            actor.zero_grad()
            with torch.no_grad():
                advantage = reward - value(model.rnn(x)[0][-1])
            (-advantage * log_softmax(model(x), -1)[:, :1]).mean().backward()
            truth.pre()
            clip_grad_norm_(model.parameters(), 0.1)
            truth.post()
            actor.step()
            truth.add()


def actor_through_critic(model, truth):
    """Someone with DDPG, whose actor's loss leaves gradients in the critic."""
    torch.manual_seed(0)
    actor = nn.Linear(4, 4)
    actor_optimizer = Adam(actor.parameters(), lr=0.01)
    critic_optimizer = Adam(model.parameters(), lr=0.01)
    for x in batches(8):
        actor_optimizer.zero_grad()
        actor_loss = -model(actor(x)).mean()
        actor_loss.backward()
        actor_optimizer.step()

        critic_optimizer.zero_grad()
        critic_loss = loss_of(model, x)
        critic_loss.backward()
        truth.pre()
        clip_grad_norm_(model.parameters(), 0.3)
        truth.post()
        critic_optimizer.step()
        truth.add()


def step_twice(model, truth):
    """A beginner whose helper steps, and whose loop steps again by mistake."""
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

    def fit(x):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        truth.pre()
        clip_grad_norm_(model.parameters(), 0.25)
        truth.post()
        optimizer.step()
        return loss.item()

    total = 0.0
    for x in batches(6):
        total += fit(x)
        optimizer.step()
        truth.add()
    return total / 6


class CentredSGD(SGD):
    """SGD that decays, centres and clips the gradients in place."""

    def __init__(self, params, lr, decay, max_norm):
        super().__init__(params, lr=lr, momentum=0.9)
        self.decay, self.max_norm = decay, max_norm

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(p, alpha=self.decay)
                if p.dim() > 1:
                    p.grad.sub_(p.grad.mean(dim=1, keepdim=True))
            clip_grad_norm_(group["params"], self.max_norm)
        return super().step(closure)


def centred(model, truth):
    """An author of an optimizer that edits the gradients inside its step."""
    optimizer = CentredSGD(model.parameters(), lr=0.1, decay=0.1, max_norm=0.2)
    for x in batches(7):
        loss = loss_of(model, x)
        optimizer.zero_grad()
        loss.backward()
        truth.pre()
        truth.post()
        optimizer.step()
        truth.add()


class SAM(Optimizer):
    """Sharpness-aware minimisation as the well-known repository has it."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        scale = self.param_groups[0]["rho"] / (norm + 1e-12)
        for p in params:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base.step()
        if zero_grad:
            self.zero_grad()


def sam(model, truth):
    """Someone who took SAM from GitHub and calls its two half steps."""
    optimizer = SAM(model.parameters(), SGD, lr=0.2, momentum=0.9)
    for x in batches(6):
        truth.remember()
        loss_of(model, x).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, x).backward()
        truth.pre()
        truth.post()
        optimizer.second_step(zero_grad=True)
        truth.add()


def maml(model, truth):
    """A researcher in meta-learning who writes MAML's inner loop by hand."""
    optimizer = Adam(model.parameters(), lr=0.01)
    for meta_batch in batches(6, batch=16):
        optimizer.zero_grad()
        for task in meta_batch.split(8, dim=1):
            support, query = task.split(4, dim=1)
            fast = dict(model.named_parameters())
            for _ in range(2):
                out = functional_call(model, fast, (support,))
                inner = cross_entropy(out, labels(support))
                grads = torch.autograd.grad(inner, fast.values(), create_graph=True)
                pairs = zip(fast.items(), grads, strict=True)
                fast = {name: p - 0.3 * g for (name, p), g in pairs}
            out = functional_call(model, fast, (query,))
            (cross_entropy(out, labels(query)) / 2).backward()
        truth.pre()
        clip_grad_norm_(model.parameters(), 0.2)
        truth.post()
        optimizer.step()
        truth.add()


def pcgrad(model, truth):
    """Someone in multi-task learning who removes conflicts between gradients."""
    params = list(model.parameters())
    optimizer = Adam(params, lr=0.01)
    for x in batches(7):
        out = model(x)
        losses = [cross_entropy(out, labels(x)), cross_entropy(out, labels(-x))]
        flat = [
            parameters_to_vector(torch.autograd.grad(loss, params, retain_graph=True))
            for loss in losses
        ]
        merged = torch.zeros_like(flat[0])
        for mine, other in (flat, flat[::-1]):
            conflict = (mine @ other).clamp(max=0) / other.square().sum()
            merged += mine - conflict * other
        pieces = merged.split([p.numel() for p in params])
        for p, piece in zip(params, pieces, strict=True):
            p.grad = piece.view_as(p).clone()
        truth.pre()
        clip_grad_norm_(params, 0.1)
        truth.post()
        optimizer.step()
        truth.add()


def averaged_workers(model, truth):
    """Someone who simulates data-parallel or federated workers by copies."""
    workers = [copy.deepcopy(model) for _ in range(2)]
    optimizer = SGD(model.parameters(), lr=0.3, momentum=0.9)
    for x in batches(6, batch=8):
        for worker, shard in zip(workers, x.chunk(2, dim=1), strict=True):
            worker.load_state_dict(model.state_dict())
            worker.zero_grad()
            loss_of(worker, shard).backward()
        copies = zip(*(worker.parameters() for worker in workers), strict=True)
        for p, replicas in zip(model.parameters(), copies, strict=True):
            p.grad = torch.stack([replica.grad for replica in replicas]).mean(0)
        truth.pre()
        clip_grad_norm_(model.parameters(), 0.3)
        truth.post()
        optimizer.step()
        truth.add()


def dynamic_loss_scale(model, truth):
    """Someone with old half-precision code that keeps its loss scale by hand."""
    params = list(model.parameters())
    optimizer = Adam(params, lr=0.01)
    scale, good = 2.0**17, 0
    for x in batches(9):
        optimizer.zero_grad()
        loss = loss_of(model, x).half()
        (loss * scale).backward()
        truth.pre(scale=scale)
        if any(not p.grad.isfinite().all() for p in params):
            scale, good = scale / 2, 0
            truth.skip()
            continue
        for p in params:
            p.grad.div_(scale)
        clip_grad_norm_(params, 0.3)
        truth.post()
        optimizer.step()
        truth.add()
        good += 1
        if good % 4 == 0:
            scale *= 2


def clip_in_closure(model, truth):
    """A framework that hands backward and clipping to the step as a closure."""
    optimizer = AdamW(model.parameters(), lr=0.02)
    for x in batches(6):

        def closure(x=x):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            truth.pre()
            clip_grad_norm_(model.parameters(), 0.25)
            truth.post()
            return loss

        truth.remember()
        optimizer.step(closure)
        truth.add()


def never_zeroed(model, truth):
    """A beginner with truncated backpropagation who never zeroes the gradients."""
    optimizer = SGD(model.parameters(), lr=0.05)
    for text in batches(3, length=12):
        state = None
        for chunk in text.split(4):
            out, state = model.rnn(chunk, state)
            state = tuple(s.detach() for s in state)
            loss = cross_entropy(model.head(out[-1]), labels(chunk))
            loss.backward()
            truth.pre()
            clip_grad_norm_(model.parameters(), 0.6)
            truth.post()
            optimizer.step()
            truth.add()


def ppo(model, truth):
    """Someone with PPO: one optimizer and one clip for both nets, an early stop."""
    torch.manual_seed(0)
    critic = nn.Linear(4, 1)
    params = [*model.parameters(), *critic.parameters()]
    optimizer = Adam(params, lr=0.02)
    for x in batches(3, batch=16):
        with torch.no_grad():
            old = log_softmax(model(x), -1)
            action = old.exp().multinomial(1)
            reward = (action == labels(x)[:, None]).float()
        for _ in range(5):
            value = critic(x[-1])
            new = log_softmax(model(x), -1)
            ratio = (new - old).gather(1, action).exp()
            gain = reward - value.detach()
            surrogate = torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            loss = mse_loss(value, reward) - surrogate.mean()
            optimizer.zero_grad()
            loss.backward()
            if kl_div(new, old, log_target=True, reduction="batchmean") > 0.004:
                break
            truth.pre()
            clip_grad_norm_(params, 0.5)
            truth.post()
            optimizer.step()
            truth.add()


class Lookahead(Optimizer):
    """Lookahead around another optimizer, without the base class's __init__."""

    def __init__(self, base, alpha=0.5, k=3):
        self.base, self.alpha, self.k = base, alpha, k
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = defaultdict(dict)
        self.count = 0
        for p in self._params():
            self.state[p]["slow"] = p.detach().clone()

    def _params(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.base.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for p in self._params():
                slow = self.state[p]["slow"]
                slow.add_(p - slow, alpha=self.alpha)
                p.copy_(slow)
        return loss

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)


def lookahead(model, truth):
    """A competitor who wraps RAdam or Adam in a Lookahead from a model zoo."""
    optimizer = Lookahead(Adam(model.parameters(), lr=0.02))
    for x in batches(7):
        loss = loss_of(model, x)
        loss.backward()
        truth.pre()
        clip_grad_norm_(model.parameters(), 0.3)
        truth.post()
        optimizer.step()
        truth.add()
        optimizer.zero_grad()


def halved_until_better(model, truth):
    """A numerical analyst who takes a step back and retries at half the rate."""
    optimizer = SGD(model.parameters(), lr=0.1)
    rate = 64.0
    for x in batches(6):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        truth.pre()
        truth.post()
        saved = copy.deepcopy(model.state_dict())
        while True:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            with torch.no_grad():
                if loss_of(model, x) < loss:
                    break
            model.load_state_dict(saved)
            rate /= 2
        truth.add()
        rate *= 4


def gradual_unfreezing(model, truth):
    """Someone who fine-tunes: first the head, then a new group for the body."""
    model.rnn.requires_grad_(False)
    optimizer = Adam(model.head.parameters(), lr=0.02)
    for k, x in enumerate(batches(8)):
        if k == 3:
            model.rnn.requires_grad_(True)
            optimizer.add_param_group({"params": model.rnn.parameters(), "lr": 0.005})
        loss = loss_of(model, x)
        optimizer.zero_grad()
        loss.backward()
        truth.pre()
        clip_grad_norm_(model.parameters(), 0.3)
        truth.post()
        optimizer.step()
        truth.add(held=k >= 3)


def class_incremental(model, truth):
    """Someone in continual learning who replaces the head and the optimizer."""
    torch.manual_seed(0)
    optimizer, teacher = SGD(model.parameters(), lr=0.1, momentum=0.9), None
    for k, x in enumerate(batches(9)):
        if k in (3, 6):
            teacher = copy.deepcopy(model).eval()
            old, model.head = model.head, nn.Linear(8, model.head.out_features + 1)
            with torch.no_grad():
                model.head.weight[: old.out_features].copy_(old.weight)
                model.head.bias[: old.out_features].copy_(old.bias)
            optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.zero_grad()
        out = model(x)
        loss = cross_entropy(out, labels(x, min(out.shape[1], 4)))
        if teacher is not None:
            with torch.no_grad():
                soft = teacher(x)
            loss = loss + mse_loss(out[:, : soft.shape[1]], soft)
        loss.backward()
        truth.pre()
        clip_grad_norm_(model.parameters(), 0.5)
        truth.post()
        optimizer.step()
        truth.add()


def checkpointed(model, truth):
    """Someone short of memory: checkpoints, a clip per layer, gradient noise."""
    torch.manual_seed(0)
    optimizer = Adam(model.parameters(), lr=0.01)

    def run(chunk, h, c):
        out, (h, c) = model.rnn(chunk, (h, c))
        return out, h, c

    for k, x in enumerate(batches(6)):
        h = c = torch.zeros(1, x.shape[1], 8)
        for chunk in x.clone().requires_grad_().split(2):
            out, h, c = checkpoint(run, chunk, h, c, use_reentrant=True)
        loss = cross_entropy(model.head(out[-1]), labels(x))
        model.zero_grad()
        loss.backward()
        truth.pre()
        for p in model.parameters():
            clip_grad_norm_(p, 0.05)
        for p in model.parameters():
            p.grad += torch.randn_like(p) * 0.01 / (1 + k) ** 0.55
        truth.post()
        optimizer.step()
        truth.add()


def trainer(model, truth):
    """A trainer class: a first step for the scheduler, a short last accumulation."""
    biases = [p for p in model.parameters() if p.dim() == 1]
    weights = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=0.02, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    optimizer.zero_grad()
    optimizer.step()
    for _ in range(2):
        loader = batches(8)
        for i, x in enumerate(loader):
            (loss_of(model, x) / 3).backward()
            if (i + 1) % 3 == 0 or i + 1 == len(loader):
                truth.pre()
                clip_grad_norm_(model.parameters(), 0.2)
                truth.post()
                optimizer.step()
                truth.add()
                scheduler.step()
                model.zero_grad()


def nan_to_zero(model, truth):
    """Someone with an old memory network who repairs and clamps `.grad.data`."""
    optimizer = RMSprop(model.parameters(), lr=0.002, momentum=0.9)
    for k, x in enumerate(batches(7)):
        if k in (2, 5):
            x[0, 1, 2] = float("inf")
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        truth.pre()
        for p in model.parameters():
            p.grad.data[p.grad.data != p.grad.data] = 0
            p.grad.data.clamp_(-0.05, 0.05)
        truth.post()
        optimizer.step()
        truth.add()


def reptile(model, truth):
    """Someone with Reptile: a new optimizer per task, then weights mixed by hand."""
    for task in batches(3, batch=15):
        before = copy.deepcopy(model.state_dict())
        optimizer = SGD(model.parameters(), lr=0.3)
        for x in task.split(5, dim=1):
            model.zero_grad()
            loss_of(model, x).backward()
            truth.pre()
            clip_grad_norm_(model.parameters(), 0.4)
            truth.post()
            optimizer.step()
            truth.add()
        after = model.state_dict()
        mixed = {n: before[n] + 0.5 * (after[n] - before[n]) for n in before}
        model.load_state_dict(mixed)


LOOPS: dict[str, Callable] = {
    "actor and critic take turns over one body": delayed_actor,
    "an actor's loss goes through the critic": actor_through_critic,
    "step is called twice": step_twice,
    "the optimizer edits the gradients": centred,
    "SAM in two half steps": sam,
    "MAML by hand": maml,
    "conflicting gradients projected": pcgrad,
    "gradients averaged over copies": averaged_workers,
    "dynamic loss scale by hand": dynamic_loss_scale,
    "clipping inside the closure": clip_in_closure,
    "gradients never zeroed": never_zeroed,
    "PPO with early stop and joint clip": ppo,
    "Lookahead around Adam": lookahead,
    "step retried at half the rate": halved_until_better,
    "body unfrozen later": gradual_unfreezing,
    "head and optimizer replaced": class_incremental,
    "reentrant checkpoints and noise": checkpointed,
    "trainer with warm-up and short accumulation": trainer,
    "NaN set to zero and values clamped": nan_to_zero,
    "Reptile": reptile,
}
