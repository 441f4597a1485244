"""benchmarks/gpu.sh, as far as it goes without a GPU, and what it asks of one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_tokens
import pytest
import torch
from gpu_tokens import SMALL, random_runtime
from support import tiny

from engine.errors import InputError
from engine.runtime import GPU_RUNTIMES
from engine.runtime.gpu import GpuRuntime
from engine.runtime.gpu_weights import Placement

ROOT = Path(__file__).parents[2]


def script(*arguments: str, timeout_s: float = 60, **environment: str):
    return subprocess.run(
        ["benchmarks/gpu.sh", *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def test_its_arguments():
    shown = script("--help")
    assert shown.returncode == 0
    assert all(f"gpu.sh {name} " in shown.stdout for name in ("tests", "kernels", "tokens"))
    wrong = script("everything")
    assert wrong.returncode == 2 and "tests|kernels|tokens" in wrong.stderr
    if not torch.cuda.is_available():
        refused = script("tokens")
        assert refused.returncode == 2 and "torch finds no GPU" in refused.stderr


def test_what_does_not_fit_is_left_out(tmp_path, monkeypatch):
    def measure(*_):
        raise InputError("context: too long")

    out = tmp_path / "tokens.json"
    monkeypatch.setattr(gpu_tokens, "measure", measure)
    monkeypatch.setattr(gpu_tokens, "prefill", lambda *_: 1.0)
    monkeypatch.setattr(sys, "argv", ["gpu_tokens.py", "--small", "--out", str(out)])
    gpu_tokens.main()
    assert json.loads(out.read_text())["left_out"] == {"small": "context: too long"}


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
def test_tokens_interpreted(tmp_path, text):
    """Without a model for real text, and with one; our CUDA kernels say why they are left out."""
    out, options = tmp_path / "tokens.json", []
    if text:
        tiny.write("llama", tmp_path / "model", 1)
        tiny.save_tokenizer(tmp_path / "model")
        options = ["--model", str(tmp_path / "model")]
    done = script(
        "tokens", "--small", "--out", str(out), *options, timeout_s=600, TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [case["batch"] for case in record["tokens"]] == [1, 8] and not record["left_out"]
    assert len(out.with_suffix(".md").read_text().splitlines()) == 4 + 4 * text
    if text:
        triton, cuda = record["text"]
        assert triton["backend"] == "triton" and triton["tok_s"] > 0
        assert cuda["left_out"] or cuda["tok_s"] > 0
    else:
        assert "no real text" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_RUNTIMES)
def test_a_graph_gives_the_bits_of_its_launches(backend):
    """Over 1,000 replays, with and without overlap, the launches one by one between them."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    config = replace(SMALL["small"], max_context=2048)
    overlapped = random_runtime(config, torch.device("cuda"), backend)
    placement = Placement(overlapped.device, overlapped.dtype, backend)
    plain = GpuRuntime(config, placement, overlapped.outer, overlapped.layers, overlaps=False)
    lists = []
    for runtime in (overlapped, plain):
        runtime.greedy([5, 6, 7], runtime.new_cache(3, 1100))
        lists += runtime._steps.values()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for position in range(1000):
        found = []
        for steps in lists:
            steps.buffers.positions.fill_(position)
            steps.run()
            found.append(steps.buffers.logits.clone())
            for launch in steps.launches:
                launch()
            found.append(steps.buffers.logits.clone())
        for logits in found[1:]:
            wrong += (logits != found[0]).sum()
    assert int(wrong) == 0
