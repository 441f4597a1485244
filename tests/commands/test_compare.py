"""benchmarks/compare.py on records of pytest-benchmark, made up here or by a decoder's steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compare
import pytest

from engine.kernels.w4.cpu import isas


def one(share: float, ceiling: str = "reading") -> dict:
    """extra_info of a case that reached `share` of its ceiling, and hardly any of the other."""
    shares = {"share_of_reading": 0.01, "share_of_compute": 0.01}
    return shares | {f"share_of_{ceiling}": share, "ceiling": ceiling}


@pytest.fixture
def write(tmp_path):
    def write(name: str, machine: object = None, **cases: dict):
        """A record; cases by name, each its extra_info."""
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        benchmarks = [{"fullname": case, "extra_info": info} for case, info in cases.items()]
        file.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": machine}))
        return file

    return write


def run(*arguments) -> int:
    return compare.main([str(argument) for argument in arguments])


def test_a_fall_of_more_than_a_tenth_fails(write, capsys):
    before = write("before.json", a=one(0.8), b=one(0.5, "compute"))
    after = write("after.json", a=one(0.73), b=one(0.44, "compute"))
    assert run(before, after) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["a", "80.0%", "73.0%", "-9%"]
    assert lines[1].split() == ["b", "50.0%", "44.0%", "-12%", "FELL"]
    assert lines[2] == "1 of 2 cases fell by more than 10%: b"
    assert run(before, after, "--fall", 0.15) == 0
    assert run(before, after, "--fall", 0.05) == 1
    capsys.readouterr()
    assert run(before, after, "--fall", 0.005) == 1
    assert "by more than 0.5%: a, b" in capsys.readouterr().out
    assert run(after, before) == 0
    assert run(before, before, "--fall", 0) == 0


def test_a_ceiling_may_change_and_a_case_may_be_missing(write, capsys):
    before = write("before.json", a=one(0.5, "reading"), gone=one(0.9), other={"tokens": 3})
    after = write("after.json", a=one(0.6, "compute"), new=one(0.1))
    assert run(before, after) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["a", "50.0%", "60.0%", "+20%"],
        ["gone", "90.0%", "-", "only", "before"],
        ["new", "-", "10.0%", "only", "after"],
    ]
    assert lines[3] == "0 of 1 cases fell by more than 10%"


def test_other_work_under_the_same_name_is_said(write, capsys):
    before = write("before.json", a=one(0.5) | {"bytes": 100, "threads": 2}, b=one(0.5))
    after = write("after.json", a=one(0.5) | {"bytes": 40, "threads": 2}, b=one(0.5) | {"bytes": 3})
    assert run(before, after) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("+0%  (bytes: 100 before, 40 after)") and second.endswith("+0%")


def test_another_processor_is_said(write, capsys):
    def on(cpu: object):
        return write(f"{cpu}.json", {"cpu": cpu}, a=one(0.5))

    some, other = (on({"brand_raw": name}) for name in ("Some", "Other"))
    assert run(some, other) == 0
    _, said, last = capsys.readouterr().out.splitlines()
    assert said.startswith("The runs are of two processors, so their shares may differ")
    assert said.endswith(": Some before, Other after.")
    assert last == "0 of 1 cases fell by more than 10%"
    for unnamed in (some, on(None), on({"brand_raw": 3}), write("x.json", "y", a=one(0.5))):
        assert run(some, unnamed) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_two_latest_runs_are_found(write, tmp_path, monkeypatch, capsys):
    for age, (name, share) in enumerate({"0010_c": 0.5, "0009_b": 0.8, "0001_a": 0.1}.items()):
        file = write(f".benchmarks/Linux-{share}/{name}.json", a=one(share))
        os.utime(file, (1000 - age, 1000 - age))
    monkeypatch.chdir(tmp_path)
    assert run() == 1
    assert capsys.readouterr().out.split()[:3] == ["a", "80.0%", "50.0%"]


@pytest.mark.skipif(isas()[0] == "generic", reason="the steps are timed by instruction set")
def test_the_steps_of_a_decoder_are_cases(default_model, tmp_path, capsys):
    """As in benchmarks/README.md, of one instruction set and without the larger shapes."""
    root, record = Path(compare.__file__).parents[1], tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["benchmarks/bench_decoder.py", "--benchmark-only", f"--benchmark-json={record}"]
    # Other tests run on the other cores, and a worker's variables would switch measuring off.
    lone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    lone["OMP_NUM_THREADS"] = "1"
    subprocess.run([*command, "-k", f"steps and {isas()[0]}"], cwd=root, env=lone, check=True)
    assert run(record, record) == 0
    case, share, *_ = capsys.readouterr().out.splitlines()[0].rsplit(maxsplit=3)
    assert case == f"benchmarks/bench_decoder.py::test_steps[smollm2-135m-{isas()[0]}]"
    assert share != "-"


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is not a record"),
        ("{", "is not a record"),
        ("[]", "is not a record"),
        ('{"benchmarks": 3}', "is not a record"),
        ('{"benchmarks": [{"fullname": "a"}]}', "is not a record"),
        ('{"benchmarks": [{"fullname": "a", "extra_info": {"ceiling": "x"}}]}', "share_of_x"),
        ("[" * 100_000, "is not a record"),
        ('{"benchmarks": [{"fullname": 3, "extra_info": {}}]}', "is not a record"),
        ('{"benchmarks": [{"fullname": "\\ud800", "extra_info": {}}]}', "is not a record"),
        (json.dumps({"benchmarks": [{"fullname": "a", "extra_info": {}}] * 2}), "case a twice"),
        (
            json.dumps({"benchmarks": [{"fullname": "a", "extra_info": one(10**400)}]}),
            "is not a record",
        ),
        ('{"benchmarks": []}', "holds no case"),
        ('{"benchmarks": [{"fullname": "a", "extra_info": {}}]}', "holds no case"),
        (json.dumps({"benchmarks": [{"fullname": "a", "extra_info": one(float("nan"))}]}), "nan"),
        (json.dumps({"benchmarks": [{"fullname": "a", "extra_info": one(0)}]}), "positive"),
        (None, "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(write, tmp_path, capsys, content, message):
    good, bad = write("good.json", a=one(0.5)), tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    for files in ((good, bad), (bad, good)):
        assert run(*files) == 2
        error = capsys.readouterr().err
        assert str(bad) in error and message in error and error.count("\n") == 1


def test_what_cannot_be_compared_is_said(write, tmp_path, monkeypatch, capsys):
    file, other = write("a.json", a=one(0.5)), write("b.json", b=one(0.5))
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ((file,), "found 1"),
        ((file, other), "no case in common"),
        ((file, file, "--fall", 1), "--fall"),
        ((), ".benchmarks must hold two runs"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
