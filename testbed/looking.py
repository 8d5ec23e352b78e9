"""A probe that looks at every call of one module."""

from torch import nn

from gradwatch.health import Health
from gradwatch.hooks.probe import Probe, Wanted

ALL = Wanted(weights=True, sequences=True, grads=True)
STATES = Wanted(weights=True, sequences=True)


def looking_at(
    module: nn.Module, wanted: Wanted = ALL, samples: int | None = None
) -> Probe:
    """Return a probe on a module; each call from now on shows what is wanted."""
    probe = Probe(module, None, samples=samples, guard=Health(print).guard("probe"))
    probe.expect(wanted)
    return probe
