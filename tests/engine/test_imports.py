"""The import direction: a folder imports only what stands above it in ORDER, lazily or not."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Folders and modules of one line, the stages above all, do not import each other.
ORDER = """
errors kernels progress
scratch
artifacts options
judgement sample speculate
architecture
checkpoint
text
reference
export
pruning quantize healing hf
runtime
generation
evaluate prompts
api
benchmark report
commands
run lm_eval
cli
__main__
__init__
""".split("\n")
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line.split()}
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("engine", "kernels")
    for path in ROOT.joinpath(folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "engine" / "kernels")
)


def dotted(file: Path) -> str:
    """engine/checkpoint/gguf.py -> engine.checkpoint.gguf; kernels/ is engine.kernels."""
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    return f"engine.{name}" if file.parts[0] == "kernels" else name


def unit(module: str) -> str:
    """What ORDER names: engine.checkpoint.gguf -> checkpoint, engine -> __init__."""
    return module.partition(".")[2].partition(".")[0] or "__init__"


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at any depth of it."""
    package = dotted(file) if file.name == "__init__.py" else dotted(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(ROOT.joinpath(file).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{above}.{base}".rstrip(".")
            if base == "engine":
                names = {alias.name for alias in node.names} - {"__version__"}
                yield from ((node.lineno, f"engine.{n}" if n in RANK else "engine") for n in names)
            else:
                yield node.lineno, base


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_upwards(file):
    own = unit(dotted(file))
    assert own in RANK, f"give {own} its line in ORDER"
    for line, name in imported(file):
        if name.partition(".")[0] == "engine" and unit(name) != own:
            assert unit(name) in RANK, f"give {unit(name)} its line in ORDER"
            assert RANK[unit(name)] < RANK[own], f"{file}:{line}: {own} imports {name}"


def test_every_package_imported_is_declared():
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["test"]  # with Hugging Face's `kernels`, which ours must not import
    declared = project["dependencies"] + sum(extras.values(), [])
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in declared}
    modules = {"google"} if "protobuf" in names else set()  # the module that protobuf installs
    known = sys.stdlib_module_names | names | modules | {"engine"}
    missing = {
        f"{file}:{line}: {name}"
        for file in FILES
        for line, name in imported(file)
        if name.partition(".")[0] not in known
    }
    assert not missing


def test_every_way_to_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = Path("engine/checkpoint/gguf.py")
    tmp_path.joinpath(file.parent).mkdir(parents=True)
    tmp_path.joinpath(file).write_text(
        "from engine import run\nfrom engine import load\nimport engine.cli\nfrom . import locate\n"
        "def f():\n    from ..reference.decoder import Decoder\n"
        "    from engine.kernels.w4 import format\n"
    )
    assert [name for _, name in imported(file)] == [
        "engine.run",
        "engine",
        "engine.cli",
        "engine.checkpoint",
        "engine.reference.decoder",
        "engine.kernels.w4",
    ]
