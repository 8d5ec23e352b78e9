"""Try a built wheel as a stranger would: in a fresh environment, away from the source.

The wheel is made from the sdist, and has all of the package. Then, with nothing but
torch and what it asks for: the README's example, the command and its pages, a run that
is read back, the type marker, and the message where an extra is missing.

Run: make dist
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MORE = """
import gradwatch
from pathlib import Path

[run] = [path for path in Path("gradwatch-runs").iterdir() if path.is_dir()]
assert len(gradwatch.load(run).records) == 60
assert (Path(gradwatch.__file__).parent / "py.typed").exists()
assert "site-packages" in gradwatch.__file__
try:
    import gradwatch.integrations.lightning
except ModuleNotFoundError as error:
    assert "pip install 'gradwatch[lightning]'" in str(error), error
else:
    raise AssertionError("Lightning is here")
"""
COMMANDS = (
    ("explain", "vanishing"),
    ("explain", "contraction"),
    ("explain", "horizon"),
    ("runs",),
    ("check", "latest"),
    ("--version",),
)


def built(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it; return both."""
    build = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def holds(wheel: Path) -> None:
    """Check that the wheel has all of the package, and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    files = (ROOT / "gradwatch").rglob("*")
    source = {
        str(path.relative_to(ROOT))
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    }
    pages = {f"gradwatch/pages/{p.name}" for p in (ROOT / "docs/alerts").glob("*.md")}
    assert source | pages <= names, sorted((source | pages) - names)
    parts = {name.split("/")[0] for name in names}
    assert all(p.startswith("gradwatch") for p in parts), parts


def tried(wheel: Path, folder: Path, python: str) -> None:
    """Install the wheel into a fresh environment, and use it there."""
    where = folder / "venv"
    if python == sys.executable:
        venv.create(where, with_pip=True)
    else:
        subprocess.run([python, "-m", "venv", str(where)], check=True)
    own = where / "bin" / "python"
    pip = [own, "-m", "pip", "install", "--quiet", "--constraint"]
    pip += [ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, str(wheel)], check=True)
    work = folder / "work"
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GRADW", "PYTHON"))}
    assert EXAMPLE is not None
    for code in (EXAMPLE[1], MORE):
        subprocess.run(
            [own, "-W", "error:::gradwatch", "-c", code],
            check=True,
            cwd=work,
            env=env,
            stdout=subprocess.DEVNULL,
        )
    for words in COMMANDS:
        command = [where / "bin" / "gradwatch", *words]
        subprocess.run(
            command, check=True, cwd=work, env=env, stdout=subprocess.DEVNULL
        )
    subprocess.run([own, "-m", "pip", "check"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Build, look, and try."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="that tries the wheel")
    parser.add_argument("--keep", type=Path, help="folder for the sdist and the wheel")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name) / "dist"
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
            old.unlink()
        sdist, wheel = built(folder)
        holds(wheel)
        tried(wheel, Path(name), given.python)
        kib = wheel.stat().st_size // 1024
        print(f"{sdist.name}, {wheel.name} ({kib} KiB): installed, tried")


if __name__ == "__main__":
    main()
