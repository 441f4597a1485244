"""heal and shrink, killed at any moment, go on to what an unkilled run gives."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    root = tmp_path_factory.mktemp("killed")
    tiny.write("llama", root / "model", seed, num_hidden_layers=5)
    tiny.save_tokenizer(root / "model")
    numbers = torch.randint(3, tiny.VOCAB, (1500,), generator=torch.Generator().manual_seed(seed))
    root.joinpath("text.txt").write_text(" ".join(map(str, numbers.tolist())))
    return root


def heal(tree) -> tuple:
    learnt = ("--text", tree / "text.txt", "--window", 16, "--batch-tokens", 16, "--steps", 45)
    return "heal", tree / "model", "OUT", "--drop", "2", *learnt


def qlora(tree) -> tuple:
    learnt = ("--text", tree / "text.txt", "--window", 16, "--batch-tokens", 16, "--steps", 30)
    method = ("--method", "qlora", "--check-every", 4)
    return "heal", tree / "model", "OUT", "--drop", "2", *method, *learnt


def beside(tree) -> tuple:
    return *qlora(tree), "--adapter"


def shrink(tree) -> tuple:
    text, sizes = tree / "text.txt", ("--window", 16, "--windows", 2, "--steps", 3)
    return (
        "shrink", tree / "model", "OUT", "--drop", 2, "--text", text, "--judge-text", text,
        "--prompts", 0, *sizes,
    )  # fmt: skip


def same_as_unkilled(command, tree, tmp_path, moments: int) -> None:
    seed, out = secrets.randbits(32), tmp_path / "out"
    print(f"seed of the moments {seed}")
    called = [sys.executable, "-m", "support.killed", seed, moments, out, *command(tree)]
    found = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}  # tests/engine is not the package
    done = subprocess.run(
        list(map(str, called)), cwd=ROOT, env=found, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole, *killed = (
        result(path) for path in [tmp_path / "out.whole", *tmp_path.glob("out.[0-9]*")]
    )
    assert killed
    for found in killed:
        assert found == whole
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out.whole"} | {f"out.{number}" for number in range(len(killed))}


def result(out: Path) -> dict:
    """Every tensor to the bit, and what was chosen and learnt on the way.

    Not the files' bytes: safetensors writes its metadata in an order that changes.
    """
    found: dict = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = file.metadata()
            for name in file.keys():
                tensor = file.get_tensor(name)
                found[name] = tensor.dtype, tensor.shape, tensor.view(torch.uint8).numpy().tobytes()
    for file in out.rglob("*.json"):
        if file.name in ("heal.json", "plan.json", "profile.json", "after.json"):
            record = json.loads(file.read_text())
            for name in ("minutes", "model", "texts"):  # times, and the paths of stages
                record.pop(name, None)
            found[file.name] = record
    assert found
    return found


@pytest.mark.parametrize("command", [heal, shrink])
def test_killed_at_a_few_moments(command, tree, tmp_path):
    same_as_unkilled(command, tree, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("command", [heal, qlora, beside, shrink])
def test_killed_at_twenty_moments(command, tree, tmp_path):
    same_as_unkilled(command, tree, tmp_path, 20)
