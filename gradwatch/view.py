"""A saved view of a W&B project: gradwatch's keys, in sections."""

from __future__ import annotations

import re
from typing import Any, Final

from gradwatch.metrics import CATALOGUE, PREFIX, STEP_KEY, Metric, run_key

NAME: Final = "gradwatch"
SECTIONS: Final = {
    "gradients": "gradients",
    "flow": "gradients through time",
    "spectrum": "recurrent weights",
    "state": "states, gates and the loss",
}
"""What measures a metric -> the section in which it is shown."""
_LOG: Final = frozenset({"grad_norm", "grad_norm_clipped", "grad_norm_hh"})
_PROJECT: Final = re.compile(r"[^/\s]+/[^/\s]+")


def save(project: str) -> str:
    """Make a saved view of a project, beside those that it has.

    Args:
        project: ``ENTITY/PROJECT``, as in the address of its page.

    Returns:
        The view's address.

    Raises:
        ValueError: If ``project`` is no such pair, or W&B refuses the view.
        ModuleNotFoundError: If the extra ``workspaces`` is not installed.
    """
    if not _PROJECT.fullmatch(project):
        raise ValueError(f"{project!r} is no project; expected ENTITY/PROJECT.")
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports.v2 import interface as panels
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The view is made by wandb-workspaces: pip install 'gradwatch[workspaces]'."
        ) from error
    entity, name = project.split("/")
    shown = [
        workspaces.Section(
            name=f"gradwatch: {title}",
            panels=[_panel(panels, m) for m in CATALOGUE.values() if _is_in(m, depth)],
            is_open=True,
        )
        for depth, title in SECTIONS.items()
    ]
    media = [f"{PREFIX}/media/{key}" for key in ("flow", "alarms", "report")]
    pictures = panels.MediaBrowser(media_keys=media)
    shown.insert(
        0,
        workspaces.Section(
            name="gradwatch: flow and alarms", panels=[pictures], is_open=True
        ),
    )
    view = workspaces.Workspace(
        entity=entity,
        project=name,
        name=NAME,
        sections=shown,
        auto_generate_panels=True,
    )
    try:
        view.save()
    except Exception as error:  # whatever the client of W&B raises
        raise ValueError(
            f"W&B did not take the view of {project} ({type(error).__name__}: "
            f"{error}); is it your project, and are you logged in (wandb login)?"
        ) from error
    return str(view.url)


def _is_in(metric: Metric, depth: str) -> bool:
    return metric.headline and metric.depth == depth


def _panel(panels: Any, metric: Metric) -> Any:
    """Return the lines of one metric, of all streams where it has some."""
    log = metric.name in _LOG
    if metric.scope == "run":
        y = [run_key(metric.name)]
        return panels.LinePlot(title=metric.name, x=STEP_KEY, y=y, log_y=log)
    regex = f"^{PREFIX}/.+/{metric.name}$"
    return panels.LinePlot(title=metric.name, x=STEP_KEY, metric_regex=regex, log_y=log)
