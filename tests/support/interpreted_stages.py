"""Stages that look inside a model, as they run on a GPU: distances by the fused Triton kernel,
interpreted, then a plan by greedy scores on the same decoder."""

import pytest
import torch
from support import tiny

from engine.checkpoint import open_checkpoint
from engine.pruning.plan import greedy
from engine.pruning.profile import describe, measure, merge
from engine.pruning.score import PrefixScorer
from engine.reference.decoder import load_decoder


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_profile_and_greedy_plan(rng, tmp_path, tokens):
    tiny.write("llama", tmp_path, int(torch.randint(2**31, (1,), generator=rng)))
    checkpoint = open_checkpoint(tmp_path)
    decoder = load_decoder(checkpoint, checkpoint.config)
    samples = torch.randint(3, tiny.VOCAB, (5, 12), generator=rng).tolist()
    source = describe("tiny", checkpoint, checkpoint.config, samples, tokens)
    profiles = {
        backend: merge([measure(decoder, samples, source, batch_tokens=30, backend=backend)])
        for backend in ("triton", "reference")
    }
    found, expected = profiles["triton"], profiles["reference"]
    for ours, theirs in zip(found.distances, expected.distances, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert found.influence == pytest.approx(expected.influence, abs=1e-6)
    scorer = PrefixScorer(decoder, torch.tensor(samples))
    choice = greedy(scorer, 4, 2, frozenset({3}), lambda kept, score: scorer.anchor(kept))
    assert len(choice.drop) == 2 and 3 not in choice.drop
