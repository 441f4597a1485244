"""How commands speak: --version, --quiet, --verbose, progress without a terminal, start-up."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from support import tiny
from support.commands import call

import engine
from engine import progress
from engine.commands import output
from engine.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write("llama", path, 1)
    tiny.save_tokenizer(path)
    numbers = torch.randint(3, tiny.VOCAB, (200,), generator=torch.Generator().manual_seed(1))
    path.joinpath("text.txt").write_text(" ".join(map(str, numbers.tolist())))
    return path


def test_version():
    assert call("--version") == (0, f"shallow {engine.__version__}\n", "")


WARNS = """
import warnings
from engine.commands import output

def app(standalone_mode):
    warnings.simplefilter("always")
    warnings.warn("mind this")
    warnings.warn("a name is old", DeprecationWarning)

output.execute(app)
"""


def test_warnings_are_a_line_and_those_for_programmers_none():
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "engine: mind this\n")


def test_quiet_leaves_the_record_alone(model):
    asked = ("eval", model, "--text", model / "text.txt", "--window", "32")
    code, out, err = call("--quiet", *asked)
    assert (code, err, out.count("\n")) == (0, "", 1)
    record = json.loads(out)
    assert record["kind"] == "evaluation"
    _, out, _ = call(*asked)
    assert out.count("\n") > 1 and json.loads(out.splitlines()[-1]) == record


def test_quiet_runs(model):
    code, out, err = call(
        "--quiet", "run", "--model", model, "--prompt-tokens", 4, "--new-tokens", 4
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["new_tokens"] == 4


def test_quiet_still_refuses(model):
    code, out, err = call("--quiet", "eval", model / "absent")
    assert (code, out) == (2, "") and "no such file" in err


def test_verbose_says_what_is_chosen(model):
    code, _, err = call("--verbose", "eval", model, "--text", model / "text.txt", "--window", "32")
    assert code == 0
    assert f"engine: model: {model}" in err and "4 of 4 layers" in err


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
    RuntimeError("unable to mmap 1572864 bytes from file <hidden.0>: Cannot allocate memory (12)"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
], ids=lambda error: str(error)[:9])  # fmt: skip
def test_too_little_memory(error, monkeypatch):
    """Whoever says so: Python, torch, the system's loader."""

    def examine(threads):
        raise error

    monkeypatch.setattr("engine.commands.doctor.examine", examine)
    said = "engine: there is not enough memory for this: a smaller batch or context needs less\n"
    assert call("doctor") == (2, "", said)


def test_a_library_that_reaches_no_hub_speaks_for_itself(monkeypatch):
    """It raises an error of the system without a number, which is about no file of ours."""

    def examine(threads):
        raise ConnectionError("Couldn't reach\n'piqa' on the Hub")

    monkeypatch.setattr("engine.commands.doctor.examine", examine)
    assert call("doctor") == (2, "", "engine: Couldn't reach 'piqa' on the Hub\n")


def test_a_refusal_where_no_file_can_be_opened_any_more(monkeypatch, capsys):
    """Not even to import what would tidy up."""

    def refused(standalone_mode: bool) -> None:
        raise InputError("out: Too many open files")

    class Exhausted:
        def find_spec(self, name, *_):
            if name == "engine.export.directory":
                raise OSError(errno.EMFILE, "Too many open files", name)

    monkeypatch.delitem(sys.modules, "engine.export.directory", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Exhausted(), *sys.meta_path])
    with pytest.raises(SystemExit) as exit:
        output.execute(refused)
    assert exit.value.code == 2 and capsys.readouterr().err == "engine: out: Too many open files\n"


def test_quiet_and_verbose_exclude_each_other(model):
    code, _, err = call("--quiet", "--verbose", "budget")
    assert code == 2 and "exclude each other" in err


def test_a_line_every_few_seconds_without_a_terminal(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with output.progress("layers") as report:
        for done in range(1, 11):
            now[0] += 2
            report(done, 10)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "layers: 3 of 10, 14 s left", "layers: 6 of 10, 8 s left", "layers: 9 of 10, 2 s left"
    ]  # fmt: skip


def test_a_run_taken_up_again_does_not_count_what_it_found(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with output.progress("steps") as report:
        for done in range(81, 85):
            now[0] += 3
            report(done, 100, f"loss {100 - done}")
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["steps: 82 of 100, loss 18, 54 s left", "steps: 84 of 100, loss 16, 48 s left"]


def test_a_bar_of_stages_is_not_full_while_there_is_work():
    """However many things the last one counts, under one label or several."""
    heard = []
    bar = progress.Joint(lambda done, total, note: heard.append((done, note)))
    bar.stage("heal", 0.5)
    for done in range(11):
        bar.hear("steps", done, 10)
    bar.stage("judge", 1.0)
    for label in ("windows", "windows", "tokens"):
        for done in (0, 50, 100):
            bar.hear(label, done, 100, "as before")
    shown = [done for done, _ in heard]
    assert shown == sorted(shown) and shown[10] == 25 and shown[11] == 50 and shown[-1] < 95
    assert shown[13] < shown[15] < shown[17] < shown[19]
    assert heard[13][1] == "judge: 100 of 100 windows, as before"


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_narrow_terminal_cuts_no_number_off(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = call("budget", "llama-2-70b", "--drop", "39-78")
    assert code == 0 and "…" not in out
    numbers = "".join(line.split("│")[3] for line in out.splitlines() if line[:1] == "│")
    assert "68,976,648,192" in numbers.replace(" ", "")


def test_no_word_of_help_is_taken_for_markup():
    """What stands in square brackets would not be shown."""
    import typer

    from engine.cli import app

    commands = typer.main.get_command(app).commands
    said = {name: [p.help or "" for p in command.params] for name, command in commands.items()}
    assert said.keys() >= {"quantize", "shrink", "run"}
    assert not [(n, text) for n, texts in said.items() for text in texts if "[" in text]


# What needs neither torch nor transformers; MODEL is a directory, GGUF the default model's file.
LIGHT = [
    ("--help",), ("--version",), ("run", "--help"), ("quantize", "--help"), ("heal", "--help"),
    ("budget",),
    ("budget", "MODEL", "--drop", "1"), ("budget", "/nowhere"), ("fetch", "/nowhere"),
    ("run", "--model", "/nowhere"), ("run", "--backend", "abacus"), ("run", "--dtype", "int3"),
    ("run", "--temperature", "-1"), ("run", "--json", "/nowhere/file"), ("eval", "/nowhere"),
    ("eval", "MODEL", "--text", "/nowhere"), ("prune", "/nowhere", "/tmp/nowhere"),
    ("prune", "MODEL", "/tmp/nowhere", "--drop", "99"), ("plan", "/nowhere", "--out", "/tmp/x"),
    ("eval", "MODEL", "--choices", "/nowhere"), ("compare", "/nowhere", "/nowhere"),
    ("profile", "/nowhere", "--out", "/tmp/x"), ("plot", "/nowhere", "--out", "/tmp/x.svg"),
]  # fmt: skip
IMPORTED = """
import sys
from engine.cli import main
try:
    main()
except SystemExit as stopped:
    print(stopped.code or 0, *{"torch", "transformers", "matplotlib", "numpy"} & set(sys.modules))
"""


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_nothing_heavy_is_imported_in_vain(arguments, model):
    given = [str(model) if each == "MODEL" else each for each in arguments]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *given], capture_output=True, text=True, timeout=60
    )
    refused = any(word in " ".join(arguments) for word in ("nowhere", "abacus", "int3", "-1", "99"))
    assert done.stdout.splitlines()[-1] == ("2" if refused else "0"), done.stderr


def test_a_budget_of_a_gguf_reads_its_header_alone(default_model):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, "--quiet", "budget", str(default_model)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    record, last = done.stdout.splitlines()
    assert last == "0" and sum(json.loads(record)["file"].values()) > 90e6


def test_plotting_needs_no_torch(model, tmp_path):
    record = tmp_path / "budget.json"
    assert call("budget", model, "--drop", "1", "--json", record)[0] == 0
    arguments = ["plot", str(record), "--out", str(tmp_path / "budget.svg")]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == {"0", "matplotlib", "numpy"}, done.stderr
