"""Cases of a test that ``make test`` leaves to ``make slow``."""

import pytest


def seldom(cases, slow):
    """Return the cases for ``parametrize``, those of ``slow`` marked as slow ones.

    Args:
        cases: All of them, by name.
        slow: The names of some: each has to be one.
    """
    cases = list(cases)
    assert set(slow) <= set(cases), set(slow) - set(cases)
    marked = pytest.mark.slow
    return [pytest.param(c, marks=marked) if c in slow else c for c in cases]
