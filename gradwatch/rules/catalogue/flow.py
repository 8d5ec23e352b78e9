"""Kinds that concern gradients on their way through time, and rho."""

from __future__ import annotations

from gradwatch.rules.catalogue.kind import Cause, Evidence, Kind

HIDDEN = "clipping would hide that, not cure it"
LOWER_RATE = "for group in optimizer.param_groups: group['lr'] /= 10"
BEFORE = "  # from a checkpoint before step {since}"

EXPLODING = Kind(
    name="exploding",
    title="gradwatch: exploding gradients",
    severity="error",
    meaning=(
        "A gradient grows on its way back through the sequence, or the norm of all "
        "gradients stays far above what was usual."
    ),
    evidence={
        "growth": Evidence(
            "`growth_log10`, at 3 probes running",
            2.7,
            1.7,
            "healthy chrono LSTMs reach 3.0 at one probe as they learn, never at "
            "three; sick ones 4.7 and more",
        ),
        "growth_at_once": Evidence(
            "`growth_log10`, once", 4.0, 1.7, "no healthy run came near it"
        ),
        "norm": Evidence(
            "`grad_norm` over its running median, at 3 steps running",
            1e4,
            10.0,
            "healthy orthogonal ReLU nets reached 263",
        ),
        "lasting": Evidence(
            "the same, at 25 steps running",
            100.0,
            10.0,
            "healthy bursts of more than 100 are over within 25 steps",
        ),
        "peak": Evidence(
            "these norms over the largest median so far, beside either",
            10.0,
            None,
            "a net that had learnt and moves again only returns to its early norms",
        ),
        "rising": Evidence(
            "`growth_log10` that rises, with rho: an early notice",
            1.2,
            1.0,
            "a line through the last 8 values crosses the threshold within 50 steps",
        ),
    },
    warm_up="12 norms for what is compared with their median; none for growth",
    confirmed=(
        "by the third probe, of which two are asked for within 3 steps, or by the "
        "steps that stand with each number"
    ),
    over="after 3 probes, or 3 norms, at the clear value or below",
    causes={
        "large_recurrent_weights": Cause(
            "a gated net",
            "the recurrent weights are too large for the gates to hold back; " + HIDDEN,
        ),
        "drift": Cause(
            "rho has grown by a tenth since the start",
            "rho has grown by a tenth or more since the start; " + HIDDEN,
        ),
        "nonnormal": Cause(
            "rho is below 1, in a ReLU net three quarters of the units are on",
            "rho is below 1, but powers of W_hh grow before they shrink",
        ),
        "active_subnetwork": Cause(
            "a ReLU net with rho below 1 of which fewer units are on",
            "rho is below 1, but the part of the net that is active is not: only the "
            "units that fire count",
        ),
        "large_radius": Cause(
            "a ReLU net with rho at 1 or above",
            "rho is 1 or above, and a ReLU does not hold it back",
        ),
        "chaos": Cause(
            "a tanh net with rho at 1 or above",
            "rho is 1 or above and the activation does not hold it back: chaos",
        ),
        None: Cause(
            "the norm exploded, and nothing was seen to grow through time",
            "undecided: a changed input or growing weights; rho of the recurrent "
            "weights had not grown by a tenth when last measured",
        ),
    },
)

VANISHING = Kind(
    name="vanishing",
    title="gradwatch: vanishing gradients",
    severity="warning",
    meaning=(
        "No gradient reaches the first steps of the sequence, it has lasted longer "
        "than what opens by itself, and the task is not being learnt without them."
    ),
    evidence={
        "reach": Evidence(
            "`adjoint_log10`, the median of the last 5 probes",
            -6.0,
            -4.5,
            "float32 sums lose what is below a millionth; who remembers stays above -2",
        ),
        "demand": Evidence(
            "`demand`, at most",
            0.5,
            None,
            "with a loss at half of the steps nobody can tell whether memory is wanted",
        ),
        "learnt": Evidence(
            "`signal`, at least",
            0.6,
            0.5,
            "nets that learn a near target fall below it; those that never learn a far "
            "one stay above .65",
        ),
        "loss": Evidence(
            "loss over its start, where it is logged, at least",
            0.9,
            0.5,
            "in runs that never learn a far target it stays above .98; down to .5 the "
            "loss has to go on falling, or the read-out alone has learnt",
        ),
        "travel": Evidence(
            "sum of `update_ratio` since the first probe, with the loss logged",
            1.0,
            None,
            "healthy nets that begin without reach open at .3 to .7",
        ),
        "travel_padded": Evidence(
            "the same, behind padding",
            0.5,
            None,
            "padding does not go away by itself; a blank input that is meant may open",
        ),
        "travel_alone": Evidence(
            "the same, without a logged loss",
            1.5,
            None,
            "nets that learn a near target pass 1.3 before their signal falls",
        ),
        "opening": Evidence(
            "decades by which the reach has grown since, at most",
            1.5,
            None,
            "nets that open rise by more than that first",
        ),
        "rising": Evidence(
            "beside it, with the loss logged: decades in the last 10 probes, at most",
            0.5,
            None,
            "a reach that has grown and stays where it is opens nothing",
        ),
    },
    warm_up="100 steps since the first probe that showed it, or 3,000 whatever moved",
    confirmed=(
        "after 100 steps alone (300 where the loss is not logged) where the cause does "
        "not go away by itself: saturation, a shut gate, a state cut off; after five "
        "probes where gradients had reached the first steps before; else by the way "
        "that the weights have gone"
    ),
    over="after 3 probes at -4.5 or above, or with `signal` below .5",
    excused="sequences of 5 steps or fewer; a task that is being learnt",
    causes={
        "truncation": Cause(
            "the state is detached between calls, in mid-sequence",
            "the state is detached: no gradient passes to an earlier call",
            "a longer piece of the sequence in each call; no detach() in between",
        ),
        "padding": Cause(
            "the input is all zeros in the last third of the steps or more",
            "the state is read behind the padding: what is wanted has died out by then",
            "pack_padded_sequence(x, lengths, enforce_sorted=False), or read out at "
            "each length",
        ),
        "input_scale": Cause(
            "mean slope of the tanh below .35; the input's part of it is twice that of "
            "the state or more",
            "the inputs are so large that the tanh is saturated: slope below .35",
            "inputs = 0.1 * inputs  # or normalise them; then from the start",
        ),
        "large_weights": Cause(
            "the same, and the state's part is twice that of the input or more",
            "the recurrent weights hold the tanh saturated: its slope is below .35",
        ),
        "saturation": Cause(
            "the same, and neither is",
            "the activations are saturated: their slope is below .35",
            "inputs = 0.1 * inputs  # or normalise them; then from the start",
        ),
        "forget_gate": Cause(
            "f is below .05 in 90 % of units and steps",
            "the forget gate is shut: the cell keeps nothing",
        ),
        "update_gate": Cause(
            "z is below .05 in 90 % of units and steps",
            "the update gate is shut: the state keeps nothing",
        ),
        "drift": Cause(
            "rho has fallen by a tenth since the start",
            "rho has fallen by a tenth or more since the start",
        ),
        "horizon_too_long": Cause(
            "a gated net; or more than 70 steps with rho above .5",
            "the sequence is longer than what the cell remembers",
        ),
        "small_radius": Cause(
            "none of these",
            "the recurrent weights shrink what goes through them",
        ),
    },
)

TRUNCATED = Kind(
    name="truncated",
    title="gradwatch: backpropagation is truncated",
    severity="info",
    meaning=(
        "The first states of a call are those that an earlier call returned, and no "
        "gradient passes: truncated backpropagation through time."
    ),
    evidence={},
    warm_up="none",
    confirmed="at once: by where the states lie in memory",
    over="at once; it is said once a stream",
    causes={
        "truncation": Cause(
            "by structure",
            "truncated backpropagation through time: nothing farther back than "
            "{length} steps is learnt from; no fault by itself",
            "a longer piece of the sequence in each call, if more is needed",
        )
    },
)

DRIFT = Kind(
    name="drift",
    title="gradwatch: the spectral radius has drifted",
    severity="info",
    meaning="rho of a vanilla net is far from where it began.",
    evidence={
        "moved": Evidence(
            "`rho_total_drift`, in size, twice running",
            0.5,
            0.35,
            "healthy runs reach .92: a notice, and no alarm",
        )
    },
    warm_up="20 steps after the first measurement",
    confirmed="by two measurements running",
    over="after 3 measurements at .35 or below",
    excused="the gates of an LSTM or GRU, which move by 1.05 in healthy runs",
    causes={
        "drift": Cause(
            "by measurement",
            "gradients through time now {way}; no fault by itself",
        )
    },
)

KINDS = (EXPLODING, VANISHING, TRUNCATED, DRIFT)
