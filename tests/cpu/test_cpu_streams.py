"""The residual stream through any slots of the CPU runtime is the reference's."""

import secrets

import pytest
import torch
from support import tiny
from support.close import assert_close
from support.mixed import MixedCheckpoint

from engine.checkpoint import open_checkpoint
from engine.kernels import native
from engine.pruning.score import DecoderStreams, PrefixScorer
from engine.reference.decoder import load_decoder

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

from engine.runtime.cpu import CpuRuntime
from engine.runtime.streams import CpuStreams


@pytest.fixture(scope="module", params=tiny.CASES)
def pair(request, tmp_path_factory):
    """The same checkpoint of mixed weights in the reference and in the CPU runtime, exact."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    path = tmp_path_factory.mktemp("streams")
    tiny.write(request.param, path, seed, spread=0.1)
    checkpoint = MixedCheckpoint(open_checkpoint(path))
    runtime = CpuRuntime.load(checkpoint, checkpoint.config, 2, mode="exact", cache_dtype="float32")
    decoder = load_decoder(checkpoint, checkpoint.config)
    return DecoderStreams(decoder), CpuStreams(runtime), torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 8), (2, 35), (15, 35)])
def test_streams_and_logits(pair, shape):
    """Up to 8 rows every thread keeps them all; beyond they are shared, 512 of them at once."""
    theirs, ours, generator = pair
    tokens = torch.randint(3, tiny.VOCAB, shape, generator=generator)
    x = theirs.embed(tokens)
    assert_close("embeddings", x, ours.embed(tokens), 1e-6)
    total = theirs.total
    for slots in (range(total), [0], [total - 1], range(1, total - 1), []):
        after = theirs.run(slots, x, tokens)
        assert_close(f"through {list(slots)}", after, ours.run(slots, x, tokens), 1e-4)
        assert_close("logits", theirs.logits(after), ours.logits(after), 1e-4)


def test_streams_join_into_a_run(pair):
    """Layer by layer they give what one call of all gives, and what `forward` gives."""
    _, ours, generator = pair
    tokens = torch.randint(3, tiny.VOCAB, (2, 40), generator=generator)
    x = ours.embed(tokens)
    for slot in range(ours.total):
        x = ours.run([slot], x, tokens)
    assert torch.equal(x, ours.run(range(ours.total), ours.embed(tokens), tokens))
    whole = ours.runtime.forward(tokens, ours.runtime.new_cache(2), logits="all")
    assert torch.equal(whole, ours.logits(x))


def test_scores_equal_the_references(pair):
    theirs, ours, generator = pair
    windows = torch.randint(3, tiny.VOCAB, (3, 32), generator=generator)
    expected, found = (PrefixScorer(each, windows) for each in (theirs, ours))
    slots = tuple(range(theirs.total))
    for kept in (slots[1:], slots[:-1], slots[:1] + slots[2:]):
        assert found(kept) == pytest.approx(expected(kept), rel=1e-3, abs=1e-6)
