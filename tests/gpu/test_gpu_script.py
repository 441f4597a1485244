"""benchmarks/gpu.sh, as far as it goes without a GPU, and what it asks of one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bench_angular_gpu
import bench_qlora_gpu
import bench_w4_gpu
import gpu
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


KERNELS = bench_angular_gpu, bench_qlora_gpu, bench_w4_gpu, gpu


@pytest.mark.parametrize("module", [*KERNELS, gpu_tokens], ids=lambda module: module.__name__)
def test_no_gpu_is_one_sentence(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module.__name__])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "engine: torch finds no GPU\n"


@pytest.mark.parametrize("name", ["tokens.md", "no/tokens.json"])
def test_a_record_that_cannot_be_is_refused_first(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tokens, "measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(sys, "argv", ["gpu_tokens.py", "--small", "--out", str(tmp_path / name)])
    with pytest.raises(SystemExit) as ended:
        gpu_tokens.main()
    assert ended.value.code == 2 and name in capsys.readouterr().err


def test_a_small_run_has_a_record_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_tokens, "measure", lambda *_: iter(()))
    monkeypatch.setattr(gpu_tokens, "prefill", lambda *_: 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_tokens.py", "--small"])
    gpu_tokens.main()
    assert {file.name for file in tmp_path.iterdir()} == {
        f"interpreted-tokens-small{suffix}" for suffix in (".json", ".md")
    }


def test_what_is_measured_is_kept(tmp_path, monkeypatch):
    """Where a later case raises; a prompt that does not fit is left out like a model."""
    out, case = tmp_path / "tokens.json", gpu_tokens.Case("small", 1, 8, 1.0, 2.0, None, None, None)

    def measure(*_):
        yield case
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_tokens, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["gpu_tokens.py", "--small", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        gpu_tokens.main()
    assert [found["tok_s"] for found in json.loads(out.read_text())["tokens"]] == [2.0]

    def prefill(*_):
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(gpu_tokens, "measure", lambda *_: iter([case]))
    monkeypatch.setattr(gpu_tokens, "prefill", prefill)
    gpu_tokens.main()
    assert json.loads(out.read_text())["left_out"] == {"prefill": "no room"}


def test_a_launch_that_does_not_fit_is_said():
    one = {"us": 3.0, "speedup": 2.0, "launch": {"num_warps": 4}, "by_table": False}
    other = one | {"us": 4.0, "by_table": True}
    said = partial(bench_w4_gpu.line, "4096 x 4096", "nf4", 8)
    assert "4.00 us by the table,  2.00 x float16; best     3.00 us" in said([one, other])
    assert said([one]).endswith(
        "the table's launch does not fit; best     3.00 us, {'num_warps': 4}"
    )
    assert said([]).endswith("the table's launch does not fit")


def test_steps_alone_are_timed(monkeypatch):
    """Not the first step, nor what comes before and after them all."""
    now = 0.0

    def teach(model, data, settings, directory, device, report):
        nonlocal now
        now += 100
        for step in range(bench_qlora_gpu.STEPS):
            now += 50 if step == 0 else 2
            now += 70 * (step == bench_qlora_gpu.STEPS - 1)
            report(step, bench_qlora_gpu.STEPS, "")
        return SimpleNamespace(losses=[2.0, 1.0], seconds=now)

    monkeypatch.setattr(bench_qlora_gpu, "teach", teach)
    monkeypatch.setattr(bench_qlora_gpu.time, "monotonic", lambda: now)
    settings = SimpleNamespace(batch=3, window=8, of_qlora=None)
    found = bench_qlora_gpu.measure("ours", None, None, settings, "cpu")
    assert found["tok_s"] == 3 * 8 / 2


def test_a_failure_hides_no_later_measurement(tmp_path):
    """Of all three, with a Python that does nothing but fail for the tests."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/ran\n[ "$2" != pytest ]\n')
    fake.chmod(0o755)
    assert script(PYTHON=str(fake)).returncode == 1
    ran = (tmp_path / "ran").read_text()
    assert all(name in ran for name in ("-m pytest", "bench_qlora_gpu.py", "gpu_tokens.py"))
