"""All families: importing this adds them to the benchmark."""

from benchmarks.detection import (
    healthy,
    healthy_awkward,
    sick_flow,
    sick_growth,
    sick_loop,
)

__all__ = ["healthy", "healthy_awkward", "sick_flow", "sick_growth", "sick_loop"]
