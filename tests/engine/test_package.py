"""What is built and installed: `engine`, and nothing named `kernels`; and what is said when not."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import aot_cuda
import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
OUTPUTS = shutil.ignore_patterns(".*", "__pycache__", "*.so", "build", "dist", "*.egg-info")


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def python(*arguments, cwd: Path, **environment: str) -> str:
    """Output of this Python on `arguments`, in a process of its own that must succeed."""
    done = run(sys.executable, *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources without what building leaves behind."""
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp("source") / "tree", symlinks=True, ignore=OUTPUTS
    )


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    place = tmp_path_factory.mktemp("sdist")
    python("-c", BUILD, "build_sdist", place, cwd=tree)
    (archive,) = place.iterdir()
    with tarfile.open(archive) as file:
        file.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
        file.extractall(place)
    return place / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def payload(sdist, tmp_path_factory) -> Path:
    """What the wheel of the sdist installs, without the compiled extensions."""
    place = tmp_path_factory.mktemp("payload")
    python("setup.py", "-q", "build_py", "--build-lib", place, cwd=sdist)
    return place


def modules(folder: Path) -> set[str]:
    """Python files below `folder`, links followed."""
    walk = os.walk(folder, followlinks=True)
    found = (Path(top, name) for top, _, names in walk for name in names)
    return {str(path.relative_to(folder)) for path in found if path.suffix == ".py"}


def test_the_sdist_carries_everything(tree, sdist):
    assert os.readlink(sdist / "engine" / "kernels") == "../kernels"
    for folder in ("engine", "kernels", "csrc", "tests"):
        assert modules(sdist / folder) == modules(tree / folder), folder
        for file in (tree / folder).rglob("*.*"):
            assert (sdist / file.relative_to(tree)).exists(), file
    for name in ("LICENSE", "README.md", "Makefile", "pyproject.toml", "setup.py"):
        assert (sdist / name).exists()


def test_the_wheel_holds_engine_alone(tree, payload):
    assert [path.name for path in payload.iterdir()] == ["engine"]
    assert modules(payload / "engine") == modules(tree / "engine"), "PACKAGES in setup.py differs"
    data = [file.name for file in (tree / "engine" / "data").iterdir()]
    assert all((payload / "engine" / "data" / name).exists() for name in data)


def test_the_wheel_builds_where_nvcc_fails(payload, sdist, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    for objects in ROOT.glob("build/temp.*/*/csrc/cpu"):  # not compiled again
        shutil.copytree(objects, sdist / objects.relative_to(ROOT))
    said = python("-c", BUILD, "build_wheel", tmp_path, cwd=sdist, CUDA_HOME=str(tmp_path))
    assert 'building extension "engine._cuda" failed' in said
    (archive,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(archive) as file:
        file.extractall(installed)
    assert sorted(path.name.split("-")[0] for path in installed.iterdir()) == ["engine", "shallow"]
    assert modules(installed) == modules(payload)
    assert not list(installed.glob("engine/_cuda.*"))
    use = "from engine.kernels import native; print(native.load('cpu').__file__)"
    assert str(installed) in python("-c", use, cwd=tmp_path, PYTHONPATH=str(installed))


BESIDE_HUGGING_FACE = """
import pathlib, sys
place = pathlib.Path(sys.argv[1])
import kernels, transformers
assert callable(kernels.get_kernel) and pathlib.Path(kernels.__file__).parents[1] != place
from transformers import LlamaForCausalLM
from engine.kernels import native
assert place in pathlib.Path(native.__file__).parents, native.__file__
"""


def test_hugging_face_kernels_imports_beside_the_wheel(payload, tmp_path):
    python("-c", BESIDE_HUGGING_FACE, payload, cwd=tmp_path, PYTHONPATH=str(payload))


def test_hugging_face_kernels_imports_from_the_repository_root():
    python("-c", BESIDE_HUGGING_FACE, ROOT, cwd=ROOT)


def test_what_is_to_be_installed_is_named_by_its_own_name():
    """Never as an extra of ours: `shallow` on PyPI is another project, which `-U` would bring."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {each for extra in extras["optional-dependencies"].values() for each in extra}
    files = (*(ROOT / "engine").rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
    texts = [re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in files]
    said = [asked for text in texts for asked in re.findall(r"pip install (?:-\S+ )*(.*)", text)]
    assert not [asked for asked in said if asked.startswith(("shallow", "'shallow"))]
    named = {each for asked in said for each in re.findall(r"'([^']+>=[^']+)'", asked)}
    assert len(named) > 6 and named <= known


IMPORT_TIME = """
import sys, time
import engine
assert "torch" not in sys.modules
import torch
best = 1e9
for _ in range(5):
    for name in [name for name in sys.modules if name.split(".")[0] == "engine"]:
        del sys.modules[name]
    start = time.perf_counter()
    import engine
    best = min(best, time.perf_counter() - start)
assert not torch.cuda.is_initialized()
print(1e3 * best)
"""


def test_importing_the_engine_is_quick_and_touches_no_gpu():
    assert float(python("-c", IMPORT_TIME, cwd=ROOT)) < 50  # ms


def only_sentence(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode != 0
    said = (done.stdout + done.stderr).strip()
    assert "Traceback" not in said, said
    (sentence,) = (line for line in said.splitlines() if "Shallow needs" in line)
    assert all(word in sentence for word in words), sentence


def test_setup_names_the_missing_compiler(tree):
    build = (sys.executable, "setup.py", "-q", "build_ext")
    only_sentence(run(*build, cwd=tree, CXX="nonesuch"), "nonesuch", "g++")


def test_setup_names_the_missing_headers(tree):
    without = (
        "import runpy, sys, sysconfig; sys.argv[1:] = ['-q', 'build_ext'];"
        "sysconfig.get_path = lambda *_: '/nonexistent'; runpy.run_path('setup.py')"
    )
    only_sentence(run(sys.executable, "-c", without, cwd=tree), "Python.h", "python3-dev")


@pytest.mark.parametrize("home", [None, "", "/opt/cuda"])
def test_nvcc_is_that_of_cuda_home_then_of_path(home, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("SHALLOW_SANITIZE", raising=False)
    if home is None:
        monkeypatch.delenv("CUDA_HOME", raising=False)
    else:
        monkeypatch.setenv("CUDA_HOME", home)
    monkeypatch.setenv("PATH", "/mine")
    find = runpy.run_path("setup.py")["find_nvcc"]
    monkeypatch.setattr("shutil.which", lambda name, path: path)
    first = [f"{home}/bin"] if home else []
    assert find().split(":")[: len(first) + 1] == [*first, "/mine"]
    assert aot_cuda.find_nvcc() == find()


@pytest.mark.parametrize(
    "lacking, package",
    [("version_info", "3.11"), ("ensurepip", "python3-venv"), ("Python.h", "python3-dev")],
)
def test_make_names_what_python_lacks(tree, tmp_path, lacking, package):
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *{lacking}*) exit 1;; esac\nexec "{sys.executable}" "$@"\n'
    )
    fake.chmod(0o755)
    only_sentence(run("make", "run", f"PYTHON={fake}", cwd=tree), package)
    assert not (tree / ".venv").exists()


def test_make_names_the_missing_compiler(tree):
    done = run("make", "test", f"PYTHON={sys.executable}", "CXX=nonesuch", cwd=tree)
    only_sentence(done, "g++")
