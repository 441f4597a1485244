"""Ctrl-C, and a standard output that nobody reads or that is full."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support import tiny

PROGRAMS = ("engine", "engine.cli", "engine.run")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write("llama", path, 1, max_position_embeddings=1 << 20)
    tiny.save_tokenizer(path)
    return path


def command(program: str, model, new_tokens: int) -> list[str]:
    run = ["run"] if program != "engine.run" else []
    options = ["--model", str(model), "--new-tokens", str(new_tokens), "--ignore-eos", "--raw"]
    return [sys.executable, "-m", program, *run, *options, "--prompt", "3 1 4"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_interrupts_at_any_moment(program, model, rng):
    """The first comes as soon as our first line can have run, the others later and later."""
    for latest in (0.3, 1.0, 3.0):
        started = subprocess.Popen(
            [*command(program, model, 1_000_000)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while b"\0-m\0" not in _arguments(started.pid) or not _watches(started.pid):
            time.sleep(0.005)
        time.sleep(latest * float(torch.rand(1, generator=rng)))
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
        assert started.returncode == 130, said
        assert b"Traceback" not in said and b"Exception" not in said


def _arguments(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def _watches(pid: int) -> bool:
    """Our handler is in place of Python's: its thread waits beside the first."""
    return len(os.listdir(f"/proc/{pid}/task")) > 1


def test_an_import_does_not_swallow_it(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "try:\n"
        "    print('importing', flush=True)\n"
        "    time.sleep(60)\n"
        "except BaseException:\n"
        "    print('swallowed', flush=True)\n"
    )
    program = (
        "from engine.commands import interrupt\ninterrupt.watch()\ninterrupt.begin()\nimport slow"
    )
    places = os.pathsep.join([str(tmp_path), *sys.path])
    started = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": places},
    )
    assert started.stdout.readline() == b"importing\n"
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=60)
    assert (started.returncode, *said) == (130, b"", b"")


FORGETS = """
import time
from engine.commands import interrupt

interrupt.watch()
interrupt.begin()
until, ready = time.monotonic() + interrupt.GRACE_SECONDS + 2, False

def wait():  # a call: of a loop's own jump back Python 3.13 knows no handler
    while time.monotonic() < until:
        WAIT

while time.monotonic() < until:
    try:
        if not ready:  # in here: what hears of it may interrupt at once
            ready = True
            print("ready", flush=True)
        wait()
    except KeyboardInterrupt:
        interrupt.forget()
        print("forgotten", flush=True)
"""


@pytest.mark.parametrize("wait", ["pass", "time.sleep(0.01)"])
def test_an_interrupt_that_is_forgotten_does_not_end_the_program(wait, rng):
    """As in a chat, whose answer it ends: by which thread hears of it first."""
    programs = []
    for _ in range(6):
        program = [sys.executable, "-c", FORGETS.replace("WAIT", wait)]
        programs.append(subprocess.Popen(program, stdout=subprocess.PIPE))
    for each in programs:
        assert each.stdout.readline() == b"ready\n"
    for each in programs:
        time.sleep(0.05 * float(torch.rand(1, generator=rng)))
        each.send_signal(signal.SIGINT)
    for each in programs:
        assert each.communicate(timeout=60)[0] == b"forgotten\n"
        assert each.returncode == 0


def test_one_that_is_pressed_twice_is_one(rng):
    program = [sys.executable, "-c", FORGETS.replace("WAIT", "time.sleep(0.01)")]
    programs = [subprocess.Popen(program, stdout=subprocess.PIPE) for _ in range(6)]
    late = []  # where this process had no processor meanwhile: two interrupts, both forgotten
    for each in programs:
        assert each.stdout.readline() == b"ready\n"
        first = time.monotonic()
        each.send_signal(signal.SIGINT)
        assert each.stdout.readline() == b"forgotten\n"
        time.sleep(0.05 * float(torch.rand(1, generator=rng)))
        each.send_signal(signal.SIGINT)
        late.append(time.monotonic() - first > 0.25)
    for each, apart in zip(programs, late, strict=True):
        assert each.communicate(timeout=60)[0] in ([b"", b"forgotten\n"] if apart else [b""])
        assert each.returncode == 0
    assert not all(late)


def test_a_directory_that_is_gone(model, tmp_path):
    """Where libraries would end the process in their own words."""
    (tmp_path / "gone").mkdir()
    words = command("engine.run", model, 4)
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, str(tmp_path / "gone"), *words],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        check=False,
    )
    said = b"engine: the current directory: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", said)


def test_nobody_reads(model):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command("engine.run", model, 4), stdout=writing, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_full_output(model, tmp_path):
    """Of which the record in a file is independent, as of one that nobody reads."""
    said = b"engine: standard output: No space left on device\n"
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(3, 60))))
    evaluate = ["eval", model, "--text", tmp_path / "text.txt", "--window", "16", "--json"]
    for program in (
        [*command("engine.run", model, 4), "--quiet", "--json"],
        [sys.executable, "-m", "engine", *evaluate],
        [sys.executable, "-m", "engine", "budget", model, "--drop", "1", "--json"],
        [sys.executable, "-m", "engine", "doctor", "--json"],
    ):
        record = tmp_path / "record.json"
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*program, record], stdout=full, stderr=subprocess.PIPE, timeout=120
            )
        assert (done.returncode, done.stderr[-len(said) :]) == (2, said)
        assert json.loads(record.read_text())
        record.unlink()


def test_a_full_output_leaves_a_whole_profile(model, tmp_path):
    """With its report, and without the work directory, whole or in parts."""
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(3, 60))))
    profile = [sys.executable, "-m", "engine", "profile", model, "--out", tmp_path / "out.json"]
    read = ["--text", tmp_path / "text.txt", "--length", "16"]
    for asked, beside in (
        (["--report", tmp_path / "out.html"], {"out.html"}),
        (["--shard=0/2"], set()),
    ):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*profile, *read, *asked], stdout=full, stderr=subprocess.PIPE, timeout=120
            )
        assert (done.returncode, b"No space left" in done.stderr) == (2, True)
        assert {each.name for each in tmp_path.iterdir()} == {"text.txt", "out.json"} | beside
        for name in ("out.json", *beside):
            (tmp_path / name).unlink()


def test_a_closed_standard_error():
    """What would be said there is not said on standard output, which may be a path or a record."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "engine", "fetch", "/nowhere"],
        stdout=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout) == (2, b"")


NO_THREADS = """
import sys, threading

def start(self):
    raise RuntimeError("can't start new thread")

threading.Thread.start, sys.argv = start, ["engine", "--version"]
from engine.__main__ import main

main()
"""


def test_no_thread_is_to_be_had():
    done = subprocess.run([sys.executable, "-c", NO_THREADS], capture_output=True)
    assert (done.returncode, done.stdout[:8], done.stderr) == (0, b"shallow ", b"")
