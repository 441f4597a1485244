"""Where commands write: not over what they read, nor where nobody may; and no record is lost."""

import json
import os
import secrets
import shutil

import pytest
from support import tiny
from support.commands import call, refused

from engine.artifacts import Evaluation


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A model, text in its vocabulary, and the profile on it."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    root = tmp_path_factory.mktemp("outputs")
    tiny.write("llama", root / "model", seed)
    tiny.save_tokenizer(root / "model")
    root.joinpath("text.txt").write_text(" ".join(str(3 + n % 90) for n in range(200)))
    options = "--text", root / "text.txt", "--length", 16, "--out", root / "profile.json"
    assert call("profile", root / "model", *options)[0] == 0
    return root


def evaluation(model, tree) -> tuple:
    return "eval", model, "--text", tree / "text.txt", "--window", 16, "--json"


@pytest.fixture
def inputs(tree, tmp_path):
    """A file of every kind that a command reads, and an adapter whose base is a link."""
    names = ("a.gguf", "t.txt", "q.jsonl", "p.json", "other.json")
    for name in names:
        tmp_path.joinpath(name).write_text("mine")
    for name in ("model", "texts/deep", "adapter"):
        tmp_path.joinpath(name).mkdir(parents=True)
    for name in ("model/config.json", "texts/deep/t.md", "texts/record.json"):
        tmp_path.joinpath(name).write_text("mine")
    tmp_path.joinpath("model/model.safetensors").symlink_to(tmp_path / "q.jsonl")
    tmp_path.joinpath("adapter/base").symlink_to(tmp_path / "model")
    tmp_path.joinpath("linked.gguf").hardlink_to(tmp_path / "a.gguf")
    tmp_path.joinpath("profile.json").write_bytes(tree.joinpath("profile.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "asked",
    [
        "eval a.gguf --json a.gguf",
        "eval ./a.gguf --json linked.gguf",
        "eval model --text t.txt --json t.txt",
        "eval model --choices q.jsonl --json q.jsonl",
        "eval x --against a.gguf --json a.gguf",
        "eval x --plan p.json --json p.json",
        "run --model a.gguf --json a.gguf",
        "run --model model --json model/config.json",
        "run --model model --json q.jsonl",
        "run --model adapter --json model/config.json",
        "run --prompt-file t.txt --json t.txt",
        "run --plan p.json --json p.json",
        "profile a.gguf --out a.gguf",
        "profile x --text t.txt --out t.txt",
        "profile x --text texts --out texts/deep/t.md",
        "profile p.json other.json --merge --out p.json",
        "plan profile.json --count 2 --out profile.json",
        "plan profile.json --count 2 --rule greedy --model a.gguf --out a.gguf",
        "plan profile.json --count 2 --rule greedy --text t.txt --out t.txt",
        "budget model --json model/config.json",
        "budget --plan p.json --json p.json",
        "compare p.json other.json --json other.json",
    ],
)
def test_what_is_read_is_not_written(asked, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    refused(f"{asked.split()[-1]}: is an input of this command; name another file", *asked.split())
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before


def test_a_record_beside_its_model_is_replaced(tree, tmp_path):
    shutil.copytree(tree / "model", tmp_path / "model")
    record = tmp_path / "model" / "eval.json"
    asked = evaluation(tmp_path / "model", tree) + (record,)
    for _ in range(2):
        code, out, err = call(*asked)
        assert code == 0, err
        assert json.loads(record.read_text()) == json.loads(out.splitlines()[-1])
    for other in ('{"kind": "plan", "version": 1}', "[" * 99999):
        record.write_text(other)
        refused(f"{record}: is an input of this command", *asked)


def test_two_outputs_are_two_files(inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    two = ("--out", "x.html", "--report", "./x.html")
    refused("x.html: is also given as --report", "profile", "m", *two)
    # No text is what only lies beside one.
    refused("m: no such file", "profile", "m", "--text", "texts", "--out", "texts/record.json")


def test_what_may_not_be_written_is_said_first_and_no_record_is_lost(tree, tmp_path, monkeypatch):
    asked = evaluation(tree / "model", tree)
    old = tmp_path / "old.json"
    old.write_text("old")

    def full(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Evaluation, "save", full)
    code, out, err = call(*asked, old)
    assert code == 2 and json.loads(out.splitlines()[-1])["kind"] == "evaluation"
    assert err == f"engine: {old}: No space left on device\n"
    for locked in (tmp_path, old):
        monkeypatch.setattr("os.access", lambda *asked, locked=locked: asked != (locked, os.W_OK))
        refused(f"old.json: expected to write {locked}, found it read-only", *asked, old)
