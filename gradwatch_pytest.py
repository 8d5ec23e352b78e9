"""The pytest plugin of gradwatch: a preflight as a test.

It imports neither torch nor gradwatch before a test asks for one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_MARKER = (
    "gradwatch(fail_on='FAIL'): from which sign on a preflight fails the test, "
    "FAIL or WARN"
)


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def gradwatch_preflight(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Return :func:`gradwatch.preflight`, which fails the test where a check fails."""
    marker = request.node.get_closest_marker("gradwatch")
    fail_on = "FAIL" if marker is None else marker.kwargs.get("fail_on", "FAIL")
    if fail_on not in ("FAIL", "WARN"):
        raise pytest.UsageError(f"fail_on is {fail_on!r}; expected 'FAIL' or 'WARN'.")

    def run(*arguments: Any, **named: Any) -> Any:
        from gradwatch.before import inspected

        found = inspected(*arguments, **named)
        if found.failed or (fail_on == "WARN" and found.warned):
            pytest.fail(f"gradwatch preflight:\n{found}", pytrace=False)
        return found

    return run
