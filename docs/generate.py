"""Write the pages that come from the catalogues: docs/metrics.md.

Run: make docs
"""

from pathlib import Path

from gradwatch.metrics import CATALOGUE, Metric

DOCS = Path(__file__).parent
MEASURED = {
    "gradients": (
        "Every step. Gradients are read at the end of backward (before clipping) and "
        "as each optimizer is about to use them (after clipping)."
    ),
    "spectrum": (
        "At steps 0, 1, 2, 4, 8 and then every 50, of the weights that the forward of "
        "that step used; `sigma_max` and `orthogonality` every second time; "
        "`rho_drift` of the update that ends the step, absent where `W_hh` is "
        "parametrised. How: [spectral-radius.md](spectral-radius.md), "
        "[drift.md](drift.md)."
    ),
    "state": (
        "At steps 0, 1, 2, 4, 8 and then every 50, from a replay of `flow_samples` "
        "sequences of the step. How each is defined and read: [state.md](state.md)."
    ),
    "flow": (
        "At steps 0, 1, 2, 4, 8, 16, 32, 64 and then every 100, and when a rule asks: "
        "backpropagation through time over the same replay. How each is defined and "
        "read: [flow.md](flow.md)."
    ),
}

HEAD = """# Metrics

Generated from the catalogue `gradwatch/metrics.csv` by `make docs`; do not edit.

A key is `gradwatch/<metric>` for the whole run, `gradwatch/<stream>/<metric>` for one
stream and `gradwatch/<stream>/<metric>/<gate>` for one gate, with `/` for every dot of
the stream's name: `gradwatch/encoder/rnn/l1_reverse/rho/f`. The same key everywhere:
`watch.records`, `records.jsonl`, W&B, TensorBoard. A value that was not measured is
absent, never 0; NaN and Inf are kept as such.

Headline metrics go to W&B by default, without their gates; the others with
`gradwatch.sinks.Wandb(keys="all")`.
"""


def row(metric: Metric) -> str:
    """Return one line of a table."""
    gates = metric.gates + (f" (whole: {metric.unsuffixed})" * bool(metric.unsuffixed))
    cells = [
        f"`{metric.name}`",
        metric.scope,
        gates or "-",
        metric.nets,
        "yes" if metric.headline else "-",
        metric.unit,
        metric.range,
        metric.meaning,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """Return the reference of all metrics, depth by depth."""
    parts = [HEAD]
    for depth, when in MEASURED.items():
        rows = [row(m) for m in CATALOGUE.values() if m.depth == depth]
        parts.append(
            f"\n## {depth.capitalize()}\n\n{when}\n\n"
            "| metric | of | gates | nets | headline | unit | range | meaning |\n"
            "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "".join(parts)


def main() -> None:
    """Write the page."""
    (DOCS / "metrics.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
