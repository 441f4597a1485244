"""engine doctor: what it says of the machine, for people and as JSON."""

import json

import pytest

from engine.cli import app
from engine.kernels import dispatch, native
from engine.kernels.w4.cpu import isas

testing = pytest.importorskip("typer.testing")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("engine.benchmark.machine.CEILING_BYTES", 2**22)


def doctor(*arguments: str) -> tuple[str, dict]:
    result = testing.CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(result.stdout.splitlines()[-1])


def test_says_what_is_here(small, tmp_path):
    output, found = doctor("--threads", "1", "--json", str(tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == found
    features = native.load("cpu").cpu_features()
    assert found["cpu_features"] == sorted(name for name in features if features[name])
    assert found["isas"] == isas()
    assert found["threads"] == 1 and 0.1 < found["read_gb_s"] < 10_000
    assert found["backends"]["reference"] is None and found["backends"]["cpu"] is None
    assert found["ops"].keys() == dispatch.OPS.keys()
    assert all(chosen["cpu"] == "cpu" for chosen in found["ops"].values())
    assert {"python", "torch", "engine", "safetensors"} <= found["versions"].keys()
    for backend, reason in found["backends"].items():
        assert dispatch.why_not(backend) == reason
    for words in ("backend", "operation", "angular distances", found["cpu"][:20]):
        assert words in output


def test_says_why_not(small, monkeypatch):
    """Without the extension: the reference runs, and the reason stands where the figure would."""
    monkeypatch.setattr(native, "_load", lambda name: f"no engine._{name}")
    output, found = doctor()
    assert found["backends"]["cpu"] == "no engine._cpu" and found["read_gb_s"] is None
    assert all(chosen["cpu"] == "reference" for chosen in found["ops"].values())
    assert "no: no engine._cpu" in output and "not measured: no engine._cpu" in output


def test_every_choice_is_one_that_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda name: None if name == "triton" else "no")
    for op, devices in dispatch.OPS.items():
        assert all(use[-1] == "reference" for use in devices.values())
        assert dispatch.choose(op, "cuda") == "triton"
