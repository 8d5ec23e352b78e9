"""The wings of the house: which may import which, and how large a room may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import gradwatch

ROOT = Path(gradwatch.__file__).parent
WINGS = {
    "values": "_version _torch facts record records block saved trees",
    "clock": "clock",
    "numerics": "numerics",
    "catalogue": "metrics",
    "model": "recurrent",
    "house": "health schedule console processes",
    "remedies": "rewrite init parametrize clip remedies",
    "hooks": "hooks",
    "recorder": "recorder",
    "depths": "depths",
    "kinds": "kinds",
    "pages": "runs plot report",
    "sinks": "sinks",
    "run": "environment settings folder pipeline intake usual quiet engine resume "
    "acting watcher",
    "beside": "rules checkpoint inspection view",
    "preflight": "before reproducing",
    "shell": "shell cli __main__",
    "frameworks": "integrations",
}
"""Each wing with its rooms and folders, from the ground up."""
MAY_IMPORT = {
    "values": "",
    "clock": "",
    "numerics": "values",
    "catalogue": "values",
    "model": "values",
    "house": "values catalogue",
    "remedies": "values numerics model house",
    "hooks": "values numerics model house",
    "recorder": "values house hooks",
    "depths": "values clock numerics catalogue model house hooks",
    "kinds": "values numerics catalogue remedies",
    "pages": "values catalogue house kinds",
    "sinks": "values catalogue house kinds pages",
    "run": "values clock numerics catalogue model house remedies hooks recorder depths "
    "kinds pages sinks",
    "beside": "values numerics catalogue model house remedies kinds pages",
    "preflight": "values catalogue model house remedies recorder kinds run",
    "shell": "preflight values catalogue house remedies kinds pages sinks run beside",
    "frameworks": "sinks",
}
"""What a wing may import beside itself. Down once, up never."""


def wing(room):
    folder = room.split(".")[0]
    [found] = [name for name, rooms in WINGS.items() if folder in rooms.split()]
    return found


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("gradwatch."):
                    yield alias.name.removeprefix("gradwatch.")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
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
        if name != "__init__":  # the face of the package names what is public
            yield name.removesuffix(".__init__"), path


def test_every_room_is_in_a_wing_and_wings_have_an_order():
    for name, _ in rooms():
        assert wing(name) in MAY_IMPORT
    order = list(WINGS)
    assert list(MAY_IMPORT) == order
    for name, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(name) for other in others.split())


def test_a_wing_imports_only_what_it_may():
    wrong = [
        f"{name} imports {other}"
        for name, path in rooms()
        for other in imports(path)
        if wing(other) not in (wing(name), *MAY_IMPORT[wing(name)].split())
    ]
    assert wrong == []


def test_no_two_rooms_import_each_other_in_a_circle():
    left = {name: {*imports(path)} - {name} for name, path in rooms()}
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


def test_only_the_hooks_and_the_clippers_put_hooks_on_the_users_objects():
    """And the recorder on outputs; what runs a copy of the model, on the copy.

    Those of the integrations are the frameworks' own, on saving and loading.
    """
    found = {
        str(path.relative_to(ROOT).parent)
        for _, path in rooms()
        if re.search(r"\bregister_\w*hook\b", path.read_text(encoding="utf-8"))
    }
    assert found == {
        *("hooks", "clip", "recorder", "before", "reproducing"),
        "integrations",
    }


def test_no_room_is_too_large():
    sizes = {path: len(path.read_text().splitlines()) for _, path in rooms()}
    large = {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n > 500}
    assert large == {}


HOME = ROOT.parent
MAY_ALSO = {
    "testbed": {"gradwatch", "testbed"},
    "benchmarks": {"gradwatch", "testbed", "benchmarks"},
    "examples": {"gradwatch"},
}
"""Which folders of the project those beside the package may import."""
ABOUT_BENCHMARKS = ("tests/test_detection.py", "tests/pins/families.py")
"""Tests of a benchmark itself, and what they are told by it."""


def roots(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name.partition(".")[0] for name in names)


def test_tests_and_benchmarks_are_untied():
    ours = {"gradwatch", "tests", *MAY_ALSO}
    for folder, allowed in MAY_ALSO.items():
        for path in (HOME / folder).rglob("*.py"):
            assert set(roots(path)) & ours <= allowed, path
    for path in (HOME / "tests").rglob("*.py"):
        if str(path.relative_to(HOME)) not in ABOUT_BENCHMARKS:
            assert "benchmarks" not in set(roots(path)), path


HEAVY = (
    "wandb altair vl_convert jinja2 pandas lightning transformers shtab IPython yaml"
)


def test_the_import_is_light():
    code = f"import sys, gradwatch; print({{*{HEAVY!r}.split()}} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
