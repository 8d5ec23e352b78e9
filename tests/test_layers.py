"""The rooms of the house: a module imports only from lower layers."""

import ast
from pathlib import Path

import gradwatch

ROOT = Path(gradwatch.__file__).parent
FLOORS = (
    "_version record _torch",
    "health metrics schedule numerics.streaming numerics.matrices",
    "numerics.subspace numerics.spectral numerics.singular numerics.drift",
    "numerics.through_time numerics.activation numerics.adjoint",
    "recurrent rewrite init parametrize console",
    "observe.measure observe.rows observe.capture observe.probe observe.sequence",
    "observe.spectrum observe.state observe.flow observe.depths",
    "observe.weights observe.optimizers observe.clearing observe.gradient_tap",
    "clip.gradients clip.clipper clip remedies",
    "derive.reading derive.gradients derive.spectrum derive.state derive.flow",
    "derive",
    "rules.catalogue.kind rules.catalogue.flow rules.catalogue.units",
    "rules.catalogue.loop rules.catalogue rules.text rules.seen rules.causes",
    "rules.hysteresis rules.incidents rules.judge",
    "rules.nonfinite rules.exploding rules.spike rules.loop rules.rates",
    "rules.divergence rules.units rules.learning rules.drift rules.growth",
    "rules.vanishing",
    "rules",
    "sinks.fold sinks.jsonl sinks.tensorboard sinks.wandb_rows sinks.wandb sinks",
    "opening sampler pipeline watcher runs checkpoint inspection",
    "plot cli __main__",
)
ROOMS = [name for floor in FLOORS for name in floor.split()]
"""From the ground up, each room above all that it may import."""


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "gradwatch"
        ):
            base = node.module.removeprefix("gradwatch").lstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                file = ROOT / (whole.replace(".", "/") + ".py")
                folder = ROOT / whole.replace(".", "/")
                yield whole if file.exists() or folder.is_dir() else base


def rooms():
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name = name.removesuffix("__init__").removesuffix(".")
        if name not in ("", "observe", "numerics"):  # faces without a definition
            yield name, path


def test_every_room_has_its_place():
    assert sorted(name for name, _ in rooms()) == sorted(ROOMS)


def test_imports_only_run_downwards():
    wrong = [
        f"{name} imports {other}"
        for name, path in rooms()
        for other in imports(path)
        if ROOMS.index(other) >= ROOMS.index(name)
    ]
    assert wrong == []


def test_no_room_is_too_large():
    sizes = {p.name: len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
    assert {name: n for name, n in sizes.items() if n > 500} == {}
