"""Where outputs are written: places that are ours alone, and nothing of others is lost."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tiny

from engine.checkpoint import open_checkpoint
from engine.checkpoint.safetensors import save_tensors
from engine.errors import InputError
from engine.export.hf import prune
from engine.reference.stream import storage
from engine.scratch import MARKER, Scratch, allocate, copy, forget_bare, replacing, write_text


@pytest.fixture
def checkpoint(tmp_path):
    tiny.write("llama", tmp_path / "model", 1)
    return open_checkpoint(tmp_path / "model")


FOREIGN = {
    "a folder": lambda path: (path.mkdir(), (path / "mine").write_text("mine")),
    "a file": lambda path: path.write_text("mine"),
    "a link": lambda path: path.symlink_to("/nowhere"),
    "a marker that is no text": lambda path: (path.mkdir(), (path / MARKER).write_bytes(b"\xff")),
    "another's marker": lambda path: (path.mkdir(), (path / MARKER).write_text("{}")),
    "a deep marker": lambda path: (path.mkdir(), (path / MARKER).write_text("[" * 99999)),
}


def contents(path):
    if path.is_symlink():
        return os.readlink(path)
    if path.is_file():
        return path.read_bytes()
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_ours_is_named_and_stays(what, checkpoint, tmp_path):
    partial = tmp_path / "out.partial"
    FOREIGN[what](partial)
    before = contents(partial)
    with pytest.raises(InputError, match=r"out\.partial: is in the way.*move it away"):
        prune(checkpoint, checkpoint.config, tmp_path / "out")
    assert contents(partial) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "device"])
def test_targets_that_are_no_files(kind, tmp_path):
    path = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "mine").write_text("mine")
        path.symlink_to(tmp_path / "mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/full")
    with pytest.raises(InputError, match="expected a regular file or none, found a"):
        write_text(path, "text")
    assert os.path.lexists(path) and not path.is_file() or (tmp_path / "mine").read_text() == "mine"


def test_one_run_at_a_time(tmp_path):
    code = (
        "import sys; from engine.scratch import Scratch; Scratch(sys.argv[1]); print(1, flush=1);"
    )
    command = [sys.executable, "-c", code + "input()", str(tmp_path / "out.partial")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(InputError, match="another run is writing there"):
        Scratch(tmp_path / "out.partial")
    other.kill()
    other.communicate()
    Scratch(tmp_path / "out.partial").remove()
    assert not any(tmp_path.iterdir())


def test_a_killed_write_is_cleared_by_the_next(tmp_path):
    code = "import os, sys; from pathlib import Path; from engine.scratch import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as p: p.write_text('half'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.json")])
    assert [file.name for file in tmp_path.iterdir()] == [".out.json.partial"]
    write_text(tmp_path / "out.json", "whole")
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


@pytest.fixture
def small_disk():
    """No file may be larger than 20,000 bytes: what a full disk says, in other words."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room(small_disk, tmp_path):
    path = tmp_path / "old"
    path.write_text("earlier")
    with pytest.raises(InputError, match="old: .*; 80,000 bytes are needed"):
        save_tensors(path, {"a": torch.zeros(20_000)}, {})
    with pytest.raises(InputError, match="old: .*; 50,000 bytes are needed"):
        write_text(path, "x" * 50_000)
    assert path.read_text() == "earlier" and [file.name for file in tmp_path.iterdir()] == ["old"]
    for place in (tmp_path / "flat", None):
        with pytest.raises(InputError, match="400,000 bytes are needed"):
            storage(100_000, torch.float32, 0, place)


def test_no_room_for_a_marker_leaves_nothing(small_disk, tmp_path):
    with pytest.raises(InputError, match="out.partial: File too large"):
        Scratch(tmp_path / "out.partial", "k" * 30_000)
    forget_bare(())
    assert not list(tmp_path.iterdir())


def test_room_is_taken_at_once(tmp_path):
    allocate(tmp_path / "file", 1 << 20)
    assert (tmp_path / "file").stat().st_blocks * 512 >= 1 << 20


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "out") as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{}", "[]", '{"key": 1, "slot": 2}', '{"key": "", "slot": "x"}'])
def test_damaged_progress(text, checkpoint, tmp_path):
    from engine.reference.stream import open_states

    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(InputError, match="progress.json"):
        open_states(checkpoint, checkpoint.config, [torch.ones(1, 3).long()], directory=tmp_path)
    assert (tmp_path / "progress.json").read_text() == text


def test_another_run_begins_anew(tmp_path):
    first = Scratch(tmp_path / "a", "one")
    (first.path / "half").write_text("half")
    first.release()
    assert (Scratch(tmp_path / "a", "one").path / "half").exists()
    assert not (Scratch(tmp_path / "a", "two").path / "half").exists()
    assert json.loads((tmp_path / "a" / MARKER).read_text())["key"] == "two"


def test_a_kill_while_it_is_cleared_leaves_it_ours(tmp_path, monkeypatch):
    first = Scratch(tmp_path / "a", "one")
    (first.path / "half").mkdir()
    first.release()
    listed = Path.iterdir  # its marker first, as a system may

    def in_order(self):
        return sorted(listed(self), key=lambda entry: entry.name != MARKER)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "iterdir", in_order)
    monkeypatch.setattr("engine.scratch.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        Scratch(tmp_path / "a", "two")
    monkeypatch.undo()
    Scratch(tmp_path / "a", "two").remove()
    assert not any(tmp_path.iterdir())


def test_tensors_are_for_whom_the_umask_lets(tmp_path):
    held = os.umask(0o027)
    try:
        save_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)}, {})
    finally:
        os.umask(held)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_read_is_named_and_not_its_copy(tmp_path):
    with pytest.raises(InputError, match="absent: No such file or directory"):
        copy(tmp_path / "absent", tmp_path / "copy")
    (tmp_path / "there").write_bytes(b"bytes")
    copy(tmp_path / "there", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"bytes"
    with pytest.raises(InputError, match="nowhere/copy: there is no directory"):
        copy(tmp_path / "there", tmp_path / "nowhere" / "copy")
