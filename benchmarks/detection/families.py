"""All families: importing this adds them to the benchmark."""

from benchmarks.detection import (
    healthy,
    healthy_awkward,
    healthy_loops,
    healthy_more,
    sick_flow,
    sick_growth,
    sick_layers,
    sick_loop,
    sick_rates,
    sick_steps,
)

__all__ = [
    "healthy",
    "healthy_awkward",
    "healthy_loops",
    "healthy_more",
    "sick_flow",
    "sick_growth",
    "sick_layers",
    "sick_loop",
    "sick_rates",
    "sick_steps",
]
