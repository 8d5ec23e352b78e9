"""Kinds that concern units, gates, and weights that do not take part."""

from __future__ import annotations

from gradwatch.rules.catalogue.kind import Cause, Evidence, Kind

_ZERO_BIASES = (
    "for b in ({biases}): torch.nn.init.zeros_(b)  # from a checkpoint before step "
    "{since}"
)

DEAD_UNITS = Kind(
    name="dead_units",
    title="gradwatch: dead ReLU units",
    severity="warning",
    meaning=(
        "Half or more of a ReLU layer's units are 0 at every step of every sequence "
        "looked at: they pass no gradient and cannot come back."
    ),
    evidence={
        "dead": Evidence(
            "`dead`, twice running", 0.5, 0.3, "largest share in healthy runs: .21"
        )
    },
    warm_up="40 states (steps times sequences): of fewer, half are 0 by chance",
    confirmed="by two measurements running; the second is asked for at once",
    over="after 3 measurements at .3 or below",
    causes={
        "dead_relu": Cause(
            "by measurement",
            "a ReLU that is 0 everywhere passes no gradient and cannot come back: "
            "a step that was too large, or biases that hold it down",
        )
    },
)

GATE_STUCK = Kind(
    name="gate_stuck",
    title="gradwatch: a gate is stuck",
    severity="warning",
    meaning="A gate is on one side in nearly all units and steps.",
    evidence={
        "share": Evidence(
            "`shut/i` or `shut/o` (LSTM), `open/z` (GRU), twice running",
            0.95,
            0.85,
            "chrono gates, which are set so on purpose, reach .60 when left alone",
        ),
        "meant": Evidence(
            "`timescale` over the length of the sequence, at most: meant",
            20.0,
            None,
            "chrono initialisation spreads memories up to the length itself",
        ),
    },
    warm_up="none",
    confirmed="by two measurements running; the second is asked for at once",
    over="after 3 measurements at .85 or below",
    excused=(
        "an update gate that keeps for up to 20 lengths, an input gate beside a "
        "forget gate that does: memory that was set on purpose"
    ),
    causes={
        "input_gate": Cause(
            "`shut/i`: i is below .05",
            "the cell takes in nothing new: the input gate's bias or input weights "
            "hold it shut",
        ),
        "output_gate": Cause(
            "`shut/o`: o is below .05",
            "the cell shows nothing of what it holds, and no gradient comes in: the "
            "output gate's bias or input weights hold it shut",
            _ZERO_BIASES,
        ),
        "update_gate": Cause(
            "`open/z`: z is above .95",
            "z keeps: the state is never renewed, whatever the input is",
        ),
    },
)

NO_GRADIENT = Kind(
    name="no_gradient",
    title="gradwatch: recurrent weights without a gradient",
    severity="warning",
    meaning=(
        "The recurrent weights of a stream have no gradient, or one that is 0 in every "
        "entry, while other weights have one."
    ),
    evidence={
        "never": Evidence(
            "steps without, from the first one on",
            20,
            None,
            "some nets take turns, some begin a few steps late",
        ),
        "lost": Evidence(
            "steps without, after there had been some",
            50,
            None,
            "phases of a training in which a part rests are shorter",
        ),
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="after 3 steps with a gradient",
    excused=(
        "weights that no optimizer holds, or one that has not stepped; sequences of "
        "one step; dead units and stuck gates, which have alarms of their own. Never a "
        "small gradient: 7e-10 was healthy"
    ),
    causes={
        "frozen": Cause(
            "`requires_grad` is False: a notice",
            "requires_grad is False; if that is meant, nothing is wrong",
            "{weight}.requires_grad_(True)  # if it is to learn",
        ),
        "unused": Cause(
            "no call of the module was seen with gradients on",
            "no call of {module} was seen while gradients were on: it is registered "
            "but not used, or runs under torch.no_grad()",
            "print(model)  # then check that forward() calls {module}",
        ),
        "detached": Cause(
            "it was called, and no gradient came back to its output",
            "{module} runs, but no gradient comes back to its output: a detach(), "
            ".data, .item() or numpy between it and the loss",
            "assert output.requires_grad  # right behind {module}, then further on",
        ),
        "readout_index": Cause(
            "the gradient of W_hh is exactly 0, that of W_ih is not",
            "the loss reads only the first step that this direction takes, where no "
            "recurrent weight has acted yet",
            "_, h_n = {module}(x)  # h_n has the last step of both directions",
        ),
        None: Cause(
            "exactly 0 everywhere",
            "undecided: a gradient arrives, but every entry of it is 0",
            "watch.probe_now()  # then look at shut, open, dead in print(watch)",
        ),
    },
)

NOT_UPDATING = Kind(
    name="not_updating",
    title="gradwatch: recurrent weights do not change",
    severity="warning",
    meaning="The recurrent weights of a stream have a gradient and do not change.",
    evidence={
        "still": Evidence(
            "steps whose `update_ratio` is exactly 0, of a weight in an optimizer",
            10,
            None,
            "warm-ups begin with a step or two at a rate of 0",
        ),
        "unheld": Evidence(
            "steps in which no optimizer was seen that holds the weight",
            25,
            None,
            "some optimizers step rarely",
        ),
        "rate_zero": Evidence(
            "steps at a learning rate of 0",
            50,
            None,
            "a phase in which a group rests is meant; who freezes for good says "
            "requires_grad_(False), and pays no backward for it",
        ),
    },
    warm_up="none",
    confirmed="by the number of steps",
    over="after 3 steps with a change",
    causes={
        "not_in_optimizer": Cause(
            "no optimizer that has stepped holds the weight",
            "no optimizer that has stepped holds this weight",
            "optimizer.add_param_group({{'params': [{weight}]}})",
        ),
        "frozen": Cause(
            "its learning rate is 0",
            "its learning rate is 0, and still its gradient is computed; if that is "
            "meant, requires_grad_(False) is cheaper",
            "print([group['lr'] for group in optimizer.param_groups])",
        ),
        None: Cause(
            "the optimizer holds it at a rate that is not 0",
            "the optimizer holds it and its gradient is not 0: the update is lost, "
            "below the weight's precision or cut off",
            "print([group['lr'] for group in optimizer.param_groups])",
        ),
    },
)

KINDS = (DEAD_UNITS, GATE_STUCK, NO_GRADIENT, NOT_UPDATING)
