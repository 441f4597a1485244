"""Every family against transformers: logits, cache, padding, windows, and 64 greedy tokens."""

import json
import secrets
from pathlib import Path

import pytest
import torch
from support import tiny
from support.close import assert_close, rms_ratio
from support.versions import skip_before

from engine.architecture.hf_config import from_hf
from engine.architecture.rope import inverse_frequencies
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.runtime.reference import ReferenceRuntime

BOUND = 1e-4
LENGTH = 70  # past every window (9-17), the original contexts (32-64) and one doubling of the cache


@pytest.fixture(params=[*tiny.CASES, *tiny.ODD])
def pair(request, tmp_path):
    """(transformers model, our runtime of the same files, token ids (2, LENGTH))."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    model = tiny.write(request.param, tmp_path, seed)
    checkpoint = open_checkpoint(tmp_path)
    runtime = ReferenceRuntime.load(checkpoint, checkpoint.config)
    return model, runtime, torch.randint(3, tiny.VOCAB, (2, LENGTH))


@torch.no_grad()
def test_logits(pair, request, ratios):
    model, runtime, ids = pair
    reference = model(ids, use_cache=False).logits
    got = runtime.forward(ids, runtime.new_cache(2), logits="all")
    ratios[request.node.callspec.params["pair"]] = rms_ratio(reference, got)
    assert_close("logits", reference, got, BOUND)
    last = runtime.forward(ids, runtime.new_cache(2), logits="last")
    assert_close("last logits", reference[:, -1:], last, BOUND)


@torch.no_grad()
def test_cached_steps(pair):
    model, runtime, ids = pair
    cut = LENGTH - 20
    output = model(ids[:, :cut], use_cache=True)
    held = "cache" if "cache" in output else "past_key_values"  # renamed in transformers 5
    references = [output.logits]
    cache = runtime.new_cache(2)
    got = [runtime.forward(ids[:, :cut], cache, logits="all")]
    for step in [*range(cut, LENGTH - 4), slice(LENGTH - 4, LENGTH)]:  # singles, then four at once
        piece = ids[:, step] if isinstance(step, slice) else ids[:, step : step + 1]
        output = model(piece, use_cache=True, **{held: output[held]})
        references.append(output.logits)
        got.append(runtime.forward(piece, cache, logits="all"))
    assert_close("cached logits", torch.cat(references, 1), torch.cat(got, 1), BOUND)


@torch.no_grad()
def test_left_padding(pair):
    model, runtime, ids = pair
    short = 33
    mask = torch.ones_like(ids)
    mask[1, : LENGTH - short] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = ids.masked_fill(mask == 0, 0)
    reference = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = runtime.new_cache(2)
    got = runtime.forward(ids.masked_fill(mask == 0, -1), cache, logits="all")
    assert_close("padded logits", reference[mask == 1], got[mask == 1], BOUND)
    assert cache.lengths.tolist() == [[LENGTH] * len(runtime.config.layers)] + [
        [short] * len(runtime.config.layers)
    ]


@torch.no_grad()
def test_64_greedy_tokens(pair, request):
    from engine.generation import Options, stream_steps

    if "longrope" in request.node.callspec.params["pair"]:
        skip_before("5.20", "feeds one token where LongRoPE turns to other divisors, not all anew")
    model, runtime, ids = pair
    prompt = ids[:1, :30]
    expected = model.generate(
        prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 30:].tolist()
    sequences = [RawSequence(prompt[0].tolist(), 64)]
    for _ in stream_steps(runtime, sequences, Options(max_new_tokens=64)):
        pass
    assert sequences[0].ids[30:] == expected


class RawSequence:
    """A sequence of the decode loop without text: as many tokens as asked for."""

    def __init__(self, ids: list[int], count: int) -> None:
        self.ids, self.end, self.finish_reason = ids, len(ids) + count, None

    def take(self, tokens: list[int]) -> str:
        return "".join(map(self.push, tokens))

    def push(self, token: int) -> str:
        self.ids.append(token)
        self.finish_reason = "length" if len(self.ids) == self.end else None
        return ""


def test_slots_by_request(pair):
    """Skipping slots at run time equals dropping the layers at load, each sequence on its own."""
    _, runtime, ids = pair
    total = len(runtime.config.layers)
    lists = [[0, total - 1], list(range(total))]
    cache = runtime.new_cache(2)
    got = runtime.forward(ids, cache, slots=lists, logits="all")
    whole = runtime.forward(ids, runtime.new_cache(2), logits="all")
    both = runtime.forward(ids, runtime.new_cache(2), slots=lists[0], logits="all")
    assert_close("skipping", both[:1], got[:1], 1e-6)
    assert_close("its neighbour", whole[1:], got[1:], 1e-6)
    with pytest.raises(InputError, match="sequence 0 stands at position 70, but slot 1"):
        runtime.forward(ids[:, :1], cache)
    cache.truncate([0, LENGTH])
    runtime.forward(torch.cat((ids[:1], ids[:1].new_full((1, LENGTH), -1))), cache)
    assert cache.lengths[0].tolist() == [LENGTH] * total


@pytest.mark.parametrize("slots", [3, "ab", [1.0], [[0], None], [0, 0], [10**9], [-1], []])
def test_slots_that_are_none(slots, pair):
    _, runtime, ids = pair
    with pytest.raises(InputError, match="slots: expected"):
        runtime.forward(ids, runtime.new_cache(2), slots=slots)


def test_slots_of_any_integer_type(pair):
    _, runtime, ids = pair
    mine = runtime.forward(ids, runtime.new_cache(2), slots=[0, 1])
    theirs = runtime.forward(ids, runtime.new_cache(2), slots=torch.arange(2))
    assert torch.equal(mine, theirs)


def test_truncate_rewinds(pair):
    _, runtime, ids = pair
    if runtime.config.whole_prefill:
        pytest.skip("the rotation of this case depends on the length of the call")
    cache = runtime.new_cache(2)
    whole = runtime.forward(ids, cache, logits="all")
    cache.truncate(41)
    again = runtime.forward(ids[:, 41:], cache, logits="all")
    assert_close("after truncate", whole[:, 41:], again, 1e-5)


def test_dropped_layers_are_never_read(tmp_path):
    tiny.write("gemma3", tmp_path, secrets.randbits(32))
    checkpoint = open_checkpoint(tmp_path)
    read = []
    original = checkpoint.read
    checkpoint.read = lambda name: read.append(name) or original(name)
    config = checkpoint.config.keep([0, 2, 5])
    runtime = ReferenceRuntime.load(checkpoint, config)
    layers = {name.split(".")[2] for name in read if name.startswith("model.layers.")}
    assert layers == {"0", "2", "5"}
    assert [entry.window for entry in runtime.config.layers] == [9, None, None]
    assert len({entry.rope for entry in runtime.config.layers}) == 2


@torch.no_grad()
def test_dropped_layers_equal_transformers(tmp_path):
    """Against the same surgery done by hand on the transformers model."""
    model = tiny.write("llama", tmp_path, secrets.randbits(32))
    checkpoint = open_checkpoint(tmp_path)
    runtime = ReferenceRuntime.load(checkpoint, checkpoint.config.keep([0, 1, 3]))
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 1, 3))
    model.config.num_hidden_layers = 3
    ids = torch.randint(3, tiny.VOCAB, (1, 20))
    reference = model(ids, use_cache=False).logits
    assert_close(
        "dropped", reference, runtime.forward(ids, runtime.new_cache(1), logits="all"), BOUND
    )


@torch.no_grad()
def test_tap(pair):
    """Every boundary equals what transformers' layers receive; the last is before the norm."""
    model, runtime, ids = pair
    expected = {}
    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, slot=slot: expected.__setitem__(
                slot, args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        for slot, layer in enumerate(layers)
    ]
    final = getattr(model.model, "norm", None) or model.model.final_layernorm
    hooks.append(
        final.register_forward_pre_hook(lambda _, args: expected.__setitem__(len(layers), args[0]))
    )
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    got = {}
    runtime.forward(ids, runtime.new_cache(2), tap=lambda b, x: got.__setitem__(b, x.clone()))
    assert sorted(got) == sorted(expected) == list(range(len(layers) + 1))
    for boundary, reference in expected.items():
        assert_close(f"boundary {boundary}", reference, got[boundary], BOUND)


def test_cache_grows_without_copying_every_token(tmp_path):
    tiny.write("llama", tmp_path, 1)
    checkpoint = open_checkpoint(tmp_path)
    runtime = ReferenceRuntime.load(checkpoint, checkpoint.config)
    cache = runtime.new_cache(1, capacity=4)
    stores = set()
    for _ in range(100):
        runtime.forward(torch.tensor([[5]]), cache)
        stores.add(cache.keys[0].data_ptr())
    assert len(stores) <= 6  # 4, 8, 16 ... 128


def test_context_overflow_names_the_limit(tmp_path):
    tiny.write("llama", tmp_path, 1)
    checkpoint = open_checkpoint(tmp_path)
    runtime = ReferenceRuntime.load(checkpoint, checkpoint.config)
    cache = runtime.new_cache(1)
    with pytest.raises(InputError, match="256 positions, this call needs 257"):
        runtime.forward(torch.full((1, 257), 5), cache)
    assert runtime.forward(torch.full((1, 256), 5), cache).shape == (1, 1, tiny.VOCAB)


@pytest.mark.parametrize("theta, original", [(10.0, 512), (1e4, 4)])
def test_the_ramp_of_yarn_ends_within_a_head(theta, original):
    """At its last value, and at its first for both ends."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = {"rope_type": "yarn", "factor": 4.0, "rope_theta": theta}
    said["original_max_position_embeddings"] = original
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4 * original}
    config = LlamaConfig(**sizes, rope_parameters=said)
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    (rope,) = from_hf(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, "FILE").ropes
    torch.testing.assert_close(inverse_frequencies(rope, 1), expected, rtol=1e-6, atol=0)


def _old_style(raw: dict) -> dict:
    """The same config with the keys that checkpoints carried before `rope_parameters`."""
    raw = dict(raw)
    parameters = raw.pop("rope_parameters")
    if "full_attention" in parameters:
        full = dict(parameters["full_attention"])
        raw["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    else:
        full = dict(parameters)
    raw["rope_theta"] = full.pop("rope_theta")
    if "partial_rotary_factor" in full:
        raw["partial_rotary_factor"] = full.pop("partial_rotary_factor")
    kind = full.pop("rope_type")
    full.pop(
        "original_max_position_embeddings", None
    ) if "original_max_position_embeddings" in raw else None
    raw["rope_scaling"] = None if kind == "default" else full | {"type": kind}
    return raw


@pytest.mark.parametrize("case", tiny.CASES)
def test_older_config_keys_read_the_same(case, tmp_path):
    tiny.write(case, tmp_path, 1)
    raw = json.loads(Path(tmp_path, "config.json").read_text())
    assert from_hf(_old_style(raw), "old") == from_hf(raw, "new")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*known are LlamaForCausalLM"),
        ({"architectures": None, "model_type": None}, "expected a list 'architectures'"),
        ({"hidden_size": "48"}, "hidden_size: expected a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers: expected a whole number from 1 to 4096"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: expected a divisor of 6"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number"),
        ({"hidden_act": "mish"}, "hidden_act: expected one of silu"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type: expected"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor: expected"),
        ({"rope_parameters": 7}, "rope_parameters: expected an object"),
    ],
)
def test_bad_config(change, sentence, tmp_path):
    tiny.write("llama", tmp_path, 1)
    raw = json.loads(Path(tmp_path, "config.json").read_text()) | change
    with pytest.raises(InputError, match=sentence):
        from_hf(raw, "config.json")
