"""Patches without training, against least squares by hand and streams multiplied by hand."""

import numpy as np
import pytest
import torch
from support.close import assert_close
from support.healing import WINDOW, draw, logits, shortened

from engine.checkpoint.weights import Observed
from engine.errors import InputError
from engine.healing.heal import heal
from engine.healing.patch import RIDGE, Both, patch
from engine.healing.replaced import Replaced
from engine.healing.settings import Cut, Settings, find_cuts
from engine.reference.cache import KVCache
from engine.reference.decoder import Angles, linear, load_decoder, run_layer


@torch.no_grad()
def streams(checkpoint, config, batches, slot=0, first=0) -> tuple[torch.Tensor, torch.Tensor]:
    """(S + 1, n, D) boundaries and (n, D) output of slot's MLP, float64, from token `first` on."""
    decoder, inputs = load_decoder(checkpoint, config), []
    weights = decoder.layers[slot]
    decoder.layers[slot] = Observed(weights, lambda r, x: inputs.append(x) if r == "down" else None)
    found = []
    for tokens in batches:
        own = []
        decoder.forward(
            tokens, KVCache(config, 1), tap=lambda _, x, own=own: own.append(x[0, first:])
        )
        found.append(torch.stack(own))
    m = torch.cat([linear(x, weights, "down")[0, first:] for x in inputs])
    return torch.cat(found, dim=1).double(), m.double()


def test_cuts_are_the_runs_that_are_missing(source):
    config = source("llama", num_hidden_layers=9).config
    assert find_cuts(config.keep([0, 1, 4, 6, 7])) == [Cut(2, 4), Cut(5, 6), Cut(8, 9)]
    assert find_cuts(config.keep([2, 3])) == [Cut(0, 2), Cut(4, 9)]
    assert find_cuts(config) == []


@pytest.mark.parametrize("case", ["llama-biased-tied", "phi2", "phi3"])
def test_the_linear_patch_is_least_squares(case, source, rng):
    checkpoint = source(case, num_hidden_layers=7)
    config = checkpoint.config.keep([0, 1, 4, 6])
    batches = draw(checkpoint, rng).spread()
    changed = patch("linear", checkpoint, config, batches)
    down = f"mlp.{'fc2' if case == 'phi2' else 'down_proj'}"
    whole, _ = streams(checkpoint, checkpoint.config, batches)
    earlier = {}  # the second cut is measured behind the first one's patch
    for layer, slot, end in ((1, 1, 4), (4, 2, 6)):
        before = Replaced(checkpoint, earlier)
        boundaries, m = streams(before, config, batches, slot)
        r, e = boundaries[slot + 1], whole[end]
        length = e.norm(dim=1, keepdim=True)
        ridge = torch.eye(m.shape[1]) * (RIDGE * (m / length).square().sum(0).mean()).sqrt()
        rows = torch.cat([m / length, ridge]).numpy()
        wanted = torch.cat([(e - r + m) / length, torch.zeros_like(ridge)]).numpy()
        t = torch.from_numpy(np.linalg.lstsq(rows, wanted, rcond=None)[0])
        prefix = f"model.layers.{layer}.{down}"
        own = {name: tensor for name, tensor in changed.items() if name.startswith(prefix)}
        assert len(own) == 1 + (case != "phi3")
        for name, tensor in own.items():
            stored = checkpoint.read(name).double()
            assert_close(name, t.T @ stored if stored.ndim == 2 else stored @ t, tensor, 1e-4)
        earlier |= own
        after = streams(Replaced(checkpoint, earlier), config, batches)[0][slot + 1]
        assert_close("stream", r - m + m @ t, after, 1e-4)
        assert ((after - e) / length).norm() < ((r - e) / length).norm()
    assert changed.keys() == earlier.keys()


def test_a_token_on_which_attention_rests_stays_one(source, rng, monkeypatch):
    """The MLP before the cut writes the first one as long as it came in, a hundred times the
    embedding of others: a fit that left it out would throw it farther."""
    checkpoint = source("llama", num_hidden_layers=5)
    config = checkpoint.config.keep([0, 1, 3, 4])
    batches = draw(checkpoint, rng).spread()
    first = batches[0][:, :1]
    batches = [torch.cat((first, batch[:, 1:]), dim=1) for batch in batches if len(batch) == 1]
    long = Replaced(checkpoint, written_long(checkpoint, int(first), rng))

    def errors(model) -> torch.Tensor:
        return (streams(model, config, batches, 1)[0][2] - whole).norm(dim=1) / whole.norm(dim=1)

    whole = streams(long, long.config, batches)[0][3]
    patched = errors(Replaced(long, patch("linear", long, config, batches)))
    vectors = Both._vectors
    monkeypatch.setattr(Both, "_vectors", lambda self, index, first: vectors(self, index, 1))
    left_out = errors(Replaced(long, patch("linear", long, config, batches)))
    assert patched[0] < left_out[0] and patched.norm() < errors(long).norm()


def written_long(checkpoint, token: int, rng) -> dict[str, torch.Tensor]:
    """What makes a token's stream long: its embedding, and a neuron of layer 1 that knows it."""
    mlp = "model.layers.1.mlp"
    names = ["model.embed_tokens", *(f"{mlp}.{each}_proj" for each in ("gate", "up", "down"))]
    changed = {f"{name}.weight": checkpoint.read(f"{name}.weight").clone() for name in names}
    embedding, gate, up, down = changed.values()
    embedding[token] *= 100
    towards = embedding[token] * checkpoint.read("model.layers.1.post_attention_layernorm.weight")
    gate[0] = up[0] = towards / towards.norm()
    written = torch.randn(len(towards), generator=rng)
    down[:, 0] = written * embedding[token].norm() / written.norm() / len(towards)
    return changed


@pytest.mark.parametrize("case", ["llama-biased-tied", "phi2"])
def test_the_scale_is_as_if_the_stream_were_multiplied(case, source, rng):
    """One draw in some forty has a factor so near 1 that it would tell nothing: another follows."""
    for _ in range(5):
        checkpoint = source(case, num_hidden_layers=7)
        factors = multiplied_by_hand(checkpoint, draw(checkpoint, rng).spread())
        if telling := all(abs(factor - 1) > 1e-3 for factor in factors):
            break
    assert telling


def multiplied_by_hand(checkpoint, batches) -> list[float]:
    """The factors behind both cuts, by which the logits are those of the scaled model."""
    config = checkpoint.config.keep([0, 1, 3, 4, 6])
    scaled = Replaced(checkpoint, patch("scale", checkpoint, config, batches))
    whole = streams(checkpoint, checkpoint.config, batches, first=1)[0]
    decoder, factors = load_decoder(checkpoint, config), {}

    def stream(x, upto):
        """The pruned model up to a boundary, multiplied behind each cut."""
        found = []
        pruned = config.keep([entry.layer for entry in config.layers[:upto]])
        for slot in range(upto):
            x = x * factors.get(slot, 1.0)
            one = KVCache(pruned, 1)
            x = layer_of(decoder, pruned, slot, x, one)
            found.append(x)
        return x * factors.get(upto, 1.0)

    for slot, end in ((2, 3), (4, 6)):
        starts = [torch.nn.functional.embedding(t, decoder.outer["embedding"]) for t in batches]
        r = torch.cat([stream(x, slot)[0, 1:] for x in starts]).double()
        factors[slot] = float((r * whole[end]).sum() / (r * r).sum())
    expected = torch.cat([decoder.head(stream(x, 5)) for x in starts])
    assert_close("logits", expected, logits(scaled, config, torch.cat(batches)), 1e-5)
    return list(factors.values())


def layer_of(decoder, config, slot, x, cache):
    rows = torch.arange(1)
    angles = Angles(config, torch.arange(x.shape[1])[None])
    entry = config.layers[slot]
    return run_layer(config, entry, decoder.layers[slot], x, angles, cache, slot, rows)


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_behind_the_mlp_refuses_a_patch(case, source, tmp_path):
    checkpoint = source(case)
    for method in ("linear", "scale"):
        settings = Settings((method,), window=WINDOW)
        for config in (shortened(checkpoint), checkpoint.config.keep([1, 2, 3])):
            with pytest.raises(InputError, match=f"{method}: a norm follows"):  # layer 0 or not
                heal(checkpoint, config, None, tmp_path / "out", settings)
    assert not list(tmp_path.glob("out*"))
