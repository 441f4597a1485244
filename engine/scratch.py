"""Where outputs are written before they are whole: places beside them that are ours alone.

A place is a directory with a marker in it, made exclusively and locked while it is used. One that
is there already is taken up where its marker is ours and nobody holds it; whatever else lies there
is somebody's own, and is named, never touched.
"""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import InputError

MARKER = "resume.json"
_KIND, _VERSION = "shallow-scratch", 1
# What commands leave beside a model, which is not read from it.
_RECORDS = ("budget", "comparison", "evaluation", "judgement", "profile", "run")
_held: "dict[str, Scratch]" = {}  # by this process: after an error it may begin again


class Scratch:
    """The directory `path`, held until `remove`, `release` or the end of the process.

    `key` tells runs apart: what another run left is cleared. InputError where something that is not
    ours is in the way, where another run holds it, and where nothing can be written.
    """

    def __init__(self, path: Path, key: str = "") -> None:
        self.path = Path(path)
        text = json.dumps({"kind": _KIND, "version": _VERSION, "key": key})
        if (earlier := _held.get(str(self.path.absolute()))) is not None:
            earlier.release()
        with write_errors(self.path):
            made = _made(self.path)
            self._handle = _locked(self.path)
            _held[str(self.path.absolute())] = self
            if not made and _marker(self.path) == text:
                _clear(self.path, lambda name: name.startswith("."))  # halves of files
                return
            _clear(self.path, lambda name: name != MARKER)  # last, as a kill here leaves it ours
            beside = self.path / f".{MARKER}"
            with open(beside, "x", encoding="utf-8") as file:
                file.write(text)
            os.rename(beside, self.path / MARKER)

    def remove(self, late: str = MARKER) -> None:
        """All of it, where it is still there; the marker last, so that a kill leaves it ours, and
        `late` just before it, by which `clear_behind` knows what is left."""
        if self.path.exists():
            _clear(self.path, lambda name: name not in (late, MARKER))
            _clear(self.path, lambda name: name != MARKER)
            shutil.rmtree(self.path)
        self.release()

    @classmethod
    def held(cls, path: Path) -> "Scratch":
        """The one that this process holds at `path`."""
        return _held[str(Path(path).absolute())]

    def become(self, target: Path) -> None:
        """It is whole: renamed to `target`, which must not be there, without its marker."""
        with write_errors(target):
            check_new(target)
            os.rename(self.path, target)
            (target / MARKER).unlink()
        self.release()

    def release(self) -> None:
        """For others to take up, as it is."""
        _held.pop(str(self.path.absolute()), None)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def forget_bare(copied: Iterable[str]) -> None:
    """Removes what this process has begun and holds where no run could go on from it: where no
    file is in it but of the names `copied`, which every run writes anew."""
    names = {MARKER, f".{MARKER}", *copied}  # the second: the disk was full at once
    for held in list(_held.values()):
        if all(file.name in names for file in held.path.rglob("*") if not file.is_dir()):
            held.remove()


@contextmanager
def replacing(path: Path, nbytes: int | None = None) -> Iterator[Path]:
    """A path beside `path` to write to; renamed onto it at the end, removed on an error.

    `nbytes`, where known, is told where there is no room for them. In a place that is
    held anyway a hidden name is enough; elsewhere a kill leaves a place that the next run clears.
    """
    path = Path(path)
    check_target(path)
    ours = any(path.absolute().is_relative_to(held) for held in _held)
    scratch = None if ours else Scratch(_beside(path))
    beside = path.with_name(f".{path.name}") if scratch is None else scratch.path / path.name
    try:
        with write_errors(path, nbytes):
            yield beside
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
        if scratch is not None:
            scratch.remove()


def clear_behind(out: Path, work: Path, name: str) -> None:
    """Removes `work`, which a kill left behind its result: `out` holds the same file `name`."""
    try:
        same = (out / name).read_bytes() == (work / name).read_bytes()
    except OSError:
        return
    if same:
        Scratch(work).remove(name)


def write_text(path: Path, text: str) -> None:
    data = text.encode()
    with replacing(path, len(data)) as beside:
        beside.write_bytes(data)


def copy(source: Path, path: Path) -> None:
    """The file `source` as `path`, which is not to blame where that cannot be read."""
    try:
        file = open(source, "rb")
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}") from error
    with file, replacing(path) as beside, open(beside, "wb") as copied:
        shutil.copyfileobj(file, copied)


def allocate(path: Path, nbytes: int) -> None:
    """A file of so many bytes that the disk has room for: what is mapped sparse dies of a signal
    where there is none. One that has that size already stays as it is."""
    with write_errors(path, nbytes):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(handle).st_size == nbytes:
                return
            if nbytes and hasattr(os, "posix_fallocate"):  # macOS lacks it
                os.posix_fallocate(handle, 0, nbytes)
            os.ftruncate(handle, nbytes)
        finally:
            os.close(handle)


def check_new(path: Path) -> None:
    """InputError where something lies at `path`, or nothing can, before any work is done."""
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already; name a new one")
    check_name(path)
    check_parent(path)


def check_name(path: str | Path) -> None:
    """InputError for a directory whose name is no text: torch, safetensors and tokenizers open no
    file in it, and a record that holds it cannot be read again."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: expected a name in UTF-8, found bytes that are none") from None


def check_parent(path: Path) -> None:
    """InputError unless the directory that `path` would lie in is there."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}")


def check_target(path: Path, reads: Iterable[str | Path | None] = ()) -> None:
    """InputError for what may not be replaced by a file: anything but a regular one, what nobody
    may write, and what a command `reads`: files, or models, which may be directories."""
    path = Path(path)
    with write_errors(path):
        check_parent(path)
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputError(f"{path}: expected a regular file or none, found {_what(path)}")
        for place in (path, path.parent):
            if place.exists() and not os.access(place, os.W_OK):
                raise InputError(f"{path}: expected to write {place}, found it read-only")
        check_beside(_beside(path))
        if path.exists() and any(_holds(os.path.expanduser(each), path) for each in reads if each):
            raise InputError(f"{path}: is an input of this command; name another file")


def partial_of(out: Path) -> Path:
    """Where the directory `out`, or a file that takes long, lies before it is whole."""
    return out.with_name(f"{out.name}.partial")


def _beside(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(f".{path.name}.partial")


def check_beside(place: Path) -> None:
    """InputError where it could not be made, before the work whose result it is to hold."""
    try:
        os.lstat(place)  # an OSError for a name that is too long
    except FileNotFoundError:
        return
    if place.is_symlink() or not place.is_dir():
        raise InputError(_in_the_way(place))
    try:
        names = {entry.name for entry in place.iterdir()}
    except FileNotFoundError:  # another run has ended meanwhile
        return
    if not names <= {f".{MARKER}"}:
        _marker(place)


def _holds(read: str, path: Path) -> bool:
    """Whether the file `path` is `read`, or lies in it, be it by a link as an adapter's base."""
    if not os.path.isdir(read):
        return os.path.exists(read) and path.samefile(read)
    inside = (each for links in ("*", "*/*") for each in Path(read).glob(links) if each.is_file())
    within = any(parent.samefile(read) for parent in path.resolve().parents)
    return (within or any(path.samefile(each) for each in inside)) and not _is_record(path)


def _is_record(path: Path) -> bool:
    """Whether a command may replace it beside the model that it reads."""
    try:
        said = json.loads(path.read_bytes()) if path.suffix == ".json" else None
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and "version" in said and said.get("kind") in _RECORDS


@contextmanager
def write_errors(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turns what the system says of writing `path` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{_short(path)}: {_reason(error)}{_needed(nbytes)}") from error
    except Exception as error:
        if not _of_rust(error):
            raise
        raise InputError(f"{_short(path)}: {_reason(error)}{_needed(nbytes)}") from error


def _of_rust(error: Exception) -> bool:
    """Whether safetensors or tokenizers could not write: they raise no OSError."""
    bare = type(error) is Exception and "(os error " in str(error)
    return bare or type(error).__name__ == "SafetensorError"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _needed(nbytes: int | None) -> str:
    return "" if nbytes is None else f"; {nbytes:,} bytes are needed"


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) < 300 else f"{text[:140]}...{text[-140:]}"


def _in_the_way(path: Path) -> str:
    return (
        f"{path}: is in the way: expected a directory of an earlier run, found {_what(path)}; move "
        "it away"
    )


def _made(path: Path) -> bool:
    """Whether it was made just now; InputError where what is there is not ours."""
    try:
        path.mkdir()
        return True
    except FileNotFoundError:
        named = path.with_name(path.name.removesuffix(".partial"))  # undoes partial_of
        raise InputError(f"{named}: there is no directory {path.parent}") from None
    except FileExistsError:
        if path.is_symlink() or not path.is_dir():
            raise InputError(_in_the_way(path)) from None
        try:
            names = {entry.name for entry in path.iterdir()}
        except FileNotFoundError:  # another run has ended meanwhile
            return _made(path)
        if not names <= {f".{MARKER}"}:  # else a run that was killed as it began
            _marker(path)
        return not names


def _locked(path: Path) -> int:
    handle = -1
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    if handle >= 0:
        os.close(handle)
    raise InputError(f"{path}: another run is writing there; wait for its end")


def _marker(path: Path) -> str | None:
    """Its marker's text, None where it has none yet; InputError where that is not ours."""
    marker = path / MARKER
    try:
        if marker.is_symlink() or marker.stat().st_size > 1 << 26:
            raise ValueError
        text = marker.read_text(encoding="utf-8")
        said: Any = json.loads(text)
        if not isinstance(said, dict) or said.get("kind") != _KIND:
            raise ValueError
        return text
    except (OSError, ValueError, RecursionError):
        if {entry.name for entry in path.iterdir()} <= {f".{MARKER}"}:
            return None
        raise InputError(
            f"{path}: is in the way: not a work directory of Shallow, or its {MARKER} is damaged; "
            "move it away"
        ) from None


def _clear(path: Path, chosen: Any = lambda name: True) -> None:
    for entry in path.iterdir():
        if not chosen(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _what(path: Path) -> str:
    mode = os.lstat(path).st_mode
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFREG: "a file",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
