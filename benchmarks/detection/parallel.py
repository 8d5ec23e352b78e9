"""What two processes do at once: judge, verify, and run for long."""

import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.detection import families
from benchmarks.detection.case import loop, make
from benchmarks.detection.score import Judged, Verified, judge, verify
from benchmarks.detection.tools import NAME_REMEDIES, TOOLS, Report

__all__ = ["families", "judged", "long_run", "pool_of_two", "verified"]

PROCESSES = 2
LONG_STEPS = 20_000
LONG = (
    "healthy_rows_gru",
    "healthy_rows_identity_relu",
    "healthy_rows_stacked_dropout",
    "healthy_cosine_schedule",
    "healthy_warm_up_gru",
    "healthy_streams_of_text_gru",
    "healthy_policy_gradient",
    "healthy_packed_tagging",
    "healthy_batches_of_two",
    "healthy_recent_gru",
)
"""Families that are also run for 20,000 steps."""


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("gradwatch").setLevel(logging.CRITICAL)


def pool_of_two() -> ProcessPoolExecutor:
    """Return processes of one thread each."""
    return ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=_quiet)


def judged(
    job: tuple[str, int], tools: Sequence[str], remedies: bool
) -> dict[str, Judged] | Verified:
    """Judge tools on one family and seed; return why not, where its label is wrong."""
    measured = verify(*job)
    if measured.problems:
        return measured
    named = NAME_REMEDIES if remedies else ()
    return judge(*job, {tool: TOOLS[tool] for tool in tools}, named)


def verified(job: tuple[str, int]) -> Verified:
    """Verify the label of one family and seed."""
    return verify(*job)


def long_run(job: tuple[str, int]) -> tuple[str, Report]:
    """Watch one healthy family for long; return its name and what was said."""
    case = make(*job)
    case.steps = LONG_STEPS
    return job[0], TOOLS["gradwatch"](case, loop(case), False)
