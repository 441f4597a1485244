"""`--breakdown`: parts that add up to the step, with the bytes that each reads."""

from types import SimpleNamespace

import pytest
import torch
from support.fake import FakeRuntime, FakeText

from engine.benchmark.breakdown import LABELS, breakdown
from engine.errors import InputError
from engine.generation import Step
from engine.kernels import native
from engine.options import Options
from engine.runtime import Times

OPTIONS = Options(max_new_tokens=24, ignore_eos=True)


def open_with(runtime):
    return SimpleNamespace(runtime=runtime, text=FakeText(["x"] * runtime.config.vocab_size))


@pytest.mark.skipif(native.error("cpu") is not None, reason=f"engine._cpu: {native.error('cpu')}")
@pytest.mark.parametrize("batch", [1, 3])
def test_the_parts_make_the_step(source, batch, rng):
    from engine.runtime.cpu import CpuRuntime

    checkpoint = source("gemma3")
    runtime = CpuRuntime.load(checkpoint, checkpoint.config, 2, cache_dtype="float32")
    prompt = torch.randint(3, checkpoint.config.vocab_size, (40,), generator=rng).tolist()
    parts = {part["name"]: part for part in breakdown(open_with(runtime), prompt, OPTIONS, batch)}
    own = {label for name, label in LABELS.items() if name != "choice"}  # in the head's part
    assert set(parts) == {*own, "threads", "Python"}
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1, abs=1e-6)
    assert all(part["ms"] >= 0 for part in parts.values())
    weights = ("q, k, v", "output", "gate, up", "down", "head")
    assert sum(parts[name]["bytes"] for name in weights) == runtime.weight_bytes_per_token
    assert parts["down"]["gb_s"] == pytest.approx(
        parts["down"]["bytes"] / parts["down"]["ms"] / 1e6
    )
    c = checkpoint.config  # 40 prompt tokens, then 23 steps: 52 positions, or the window
    read = sum(min(52, layer.window or 52) for layer in c.layers)
    assert parts["attention"]["bytes"] == batch * read * 2 * c.kv_heads * c.head_dim * 4
    assert runtime.decoder.times()["whole"] == 0  # off again


def test_attention_reads_what_drafts_add(rng, monkeypatch):
    class Told(FakeRuntime):
        def measure(self, on): ...

        def times(self):
            return Times({"attention": 1.0, "wait": 0.0}, {}, 2.0)

        def kv_bytes(self, context):
            return 1000 * context

    def guessed(runtime, text, prompts, options, after):
        counts = (2, 0), (4, 3), (2, 0), (2, 2)  # tokens of two sequences, of which were guessed
        for tokens, drafted in counts:
            after(Step(("", ""), tokens, 10**9, drafted))
        return [SimpleNamespace(prompt_tokens=40)]

    monkeypatch.setattr("engine.benchmark.breakdown.generate", guessed)
    runtime = Told(int(torch.randint(2**31, (1,), generator=rng)))
    found = {part["name"]: part for part in breakdown(open_with(runtime), "a", OPTIONS, 2)}
    # Behind each step lie 2, 6 and 8 tokens, and 3, 0 and 2 that it guessed: 7 a step.
    assert found["attention"]["bytes"] == 2 * 1000 * (40 + 7 / 2)


def test_what_cannot_be_broken_down(rng):
    fake = FakeRuntime(int(torch.randint(2**31, (1,), generator=rng)))
    with pytest.raises(InputError, match="--breakdown: the backend fake cannot tell; cpu, tri"):
        breakdown(open_with(fake), "a", OPTIONS)
    fake.name = "cpu"
    with pytest.raises(InputError, match="--new-tokens of at least 2"):
        breakdown(open_with(fake), "a", Options(max_new_tokens=1))
