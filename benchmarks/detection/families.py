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
from benchmarks.detection.sets import (
    a_healthy,
    a_sick,
    b_healthy,
    b_sick,
    c_healthy,
    c_sick,
    c_sick_loop,
    d_healthy,
    d_sick,
)

__all__ = [
    "a_healthy",
    "a_sick",
    "b_healthy",
    "b_sick",
    "c_healthy",
    "c_sick",
    "c_sick_loop",
    "d_healthy",
    "d_sick",
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
