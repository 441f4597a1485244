"""`--compare transformers` does the same work: same layers, same ids, every step timed."""

import pytest
import tiny
import torch
from fake import FakeText

from engine.checkpoint import open_checkpoint
from engine.generation import Options, generate
from engine.peer import TransformersPeer
from engine.runtime.reference import ReferenceRuntime


@pytest.mark.parametrize("case", ["llama", "gemma3", "phi2", "phi3"])
@pytest.mark.parametrize("drop", [(), (1,)])
def test_greedy_ids_are_the_same(case, drop, rng, tmp_path):
    tiny.write(case, tmp_path, int(torch.randint(2**31, (1,), generator=rng)))
    checkpoint = open_checkpoint(tmp_path)
    config = checkpoint.config
    kept = [layer for layer in range(config.total_layers) if layer not in drop]
    runtime = ReferenceRuntime.load(checkpoint, config.keep(kept))
    prompts = torch.randint(config.vocab_size, (2, 12), generator=rng).tolist()
    text = FakeText(["x"] * config.vocab_size)
    ours = generate(runtime, text, prompts, Options(max_new_tokens=16, ignore_eos=True))

    peer = TransformersPeer(tmp_path, prompts, kept, runtime.device, runtime.dtype)
    ids, timings = peer.generate(16)
    assert ids == [list(result.token_ids) for result in ours]
    assert timings.prompt_tokens == 24 and timings.step_tokens == (2,) * 15
    assert len(timings.step_ns) == 15 and min(timings.step_ns) > 0 and timings.prefill_ms > 0
