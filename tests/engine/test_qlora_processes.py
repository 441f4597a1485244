"""QLoRA in two processes, as launchers of torch begin them, on a CPU over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tiny

from engine.artifacts import HealRecord
from engine.checkpoint import open_checkpoint

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


def began(processes: int, arguments: list) -> subprocess.CompletedProcess:
    launcher = "-m torch.distributed.run --standalone --nproc_per_node".split()
    command = [sys.executable, *launcher, processes, "-m", "engine.cli", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    tiny.write("llama", tmp_path / "model", 1)
    tiny.save_tokenizer(tmp_path / "model")
    numbers = torch.randint(3, tiny.VOCAB, (900,), generator=torch.Generator().manual_seed(1))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, numbers.tolist())))
    records = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        asked = "--method qlora --drop 1 --window 16 --batch-tokens 64 --steps 6 --device cpu"
        options = *asked.split(), "--text", text, "--precision", "float32", "--adapter"
        done = began(processes, ["heal", tmp_path / "model", out, *options])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("3 of 4 layers, healed") == 1, "the first process alone speaks"
        assert len(open_checkpoint(out).config.layers) == 3
        records.append(HealRecord.load(out / "heal.json"))
    one, two = records
    assert one.losses[0] == pytest.approx(two.losses[0], rel=1e-5)  # B is 0: no dropout yet
    assert one.losses == pytest.approx(two.losses, rel=1e-2)
    distil = "--method distil --drop 1 --window 16 --steps 2 --device cpu --text".split()
    refusal = began(2, ["heal", tmp_path / "model", tmp_path / "no", *distil, text])
    assert "of several processes qlora is the last method" in refusal.stderr
    assert refusal.returncode != 0 and not (tmp_path / "no").exists()
