"""GGUF: values against the `gguf` package, models against the Hugging Face files they came from."""

import secrets
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from support import llama_files, tiny

from engine.architecture.rope import inverse_frequencies
from engine.checkpoint import gguf_blocks, open_checkpoint
from engine.checkpoint.gguf_blocks import BLOCK_TYPES, GgufBlocks, dequantize
from engine.checkpoint.gguf_file import GgufFile
from engine.errors import InputError
from engine.export.gguf_fields import read_back
from engine.text import load_text

QUANTISED = {number: kind for number, kind in BLOCK_TYPES.items() if kind.dtype is None}
Q_NAME = "model.layers.0.self_attn.q_proj.weight"


def assert_same_bits(reference: np.ndarray, got: torch.Tensor) -> None:
    """Equal bit for bit, except that any NaN equals any other."""
    reference, got = np.ascontiguousarray(reference), got.numpy()
    nan = np.isnan(reference)
    assert np.array_equal(nan, np.isnan(got))
    assert np.array_equal(reference.view(np.uint32)[~nan], got.view(np.uint32)[~nan])


@pytest.mark.parametrize("number", QUANTISED, ids=lambda number: QUANTISED[number].name)
@pytest.mark.parametrize("rows", [1, 7])
def test_values_of_random_blocks(number, rows, rng, monkeypatch):
    kind = QUANTISED[number]
    monkeypatch.setattr(gguf_blocks, "_CHUNK_WEIGHTS", 5 * kind.weights)  # several, the last short
    shape = (rows, 3 * kind.weights)
    data = torch.randint(0, 256, (rows, 3 * kind.nbytes), generator=rng, dtype=torch.uint8)
    with np.errstate(all="ignore"):
        reference = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(number))
    assert_same_bits(reference, dequantize(GgufBlocks(kind.name, shape, data)))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_values_of_quantized_weights(name, rng):
    weights = torch.randn(9, 64, generator=rng)
    kind = gguf.GGMLQuantizationType[name]
    data = gguf.quants.quantize(weights.numpy(), kind)
    got = dequantize(GgufBlocks(name, (9, 64), torch.from_numpy(data)))
    assert_same_bits(gguf.quants.dequantize(data, kind), got)
    assert (got - weights).abs().max() < 1


# What a GGUF cannot say is set to what llama.cpp takes for granted.
SAYABLE = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "layer_types": None},
}
UNSAYABLE = {"llama-dynamic", "llama-llama3", "qwen2-window", "smollm3-window", "phi2-qk-norm-tied"}


def as_stored(config):
    """With the factors of rotary embeddings as float32 holds them."""

    def rounded(entry):
        if entry.rope is None:
            return entry
        factor = float(np.float32(entry.rope.attention_factor))
        return replace(entry, rope=replace(entry.rope, attention_factor=factor))

    return replace(config, layers=tuple(map(rounded, config.layers)))


@pytest.mark.parametrize("case", sorted(set(tiny.CASES) - UNSAYABLE))
def test_model_as_converted(case, tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    model = tiny.write(case, tmp_path, seed, **SAYABLE.get(case, {}))
    llama_files.convert(model, tmp_path / "model.gguf")
    source, converted = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "model.gguf")
    assert as_stored(converted.config) == as_stored(source.config)
    assert set(converted.names()) == set(source.names())
    for name in source.names():
        reference, got = source.read(name), converted.read(name)
        assert converted.shape(name) == source.shape(name) == tuple(got.shape)
        # Gemma's +1 and -1 round in float32; all else is moved, not computed with
        atol = 2**-22 if case.startswith("gemma") and "norm" in name else 0
        torch.testing.assert_close(got, reference, rtol=0, atol=atol)
        assert converted.packed(name) is None


def test_packed_blocks_have_their_rows_in_order(tmp_path):
    originals = {}  # Hugging Face name -> blocks of the unpermuted matrix

    def quantize(fields, tensors):
        for stored, name, heads, kind in (
            ("blk.0.attn_q.weight", Q_NAME, 2, "Q4_1"),
            ("blk.0.attn_k.weight", Q_NAME.replace("q_proj", "k_proj"), 1, "Q8_0"),
            ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", 0, "Q5_0"),
        ):
            kind, rows = gguf.GGMLQuantizationType[kind], torch.from_numpy(tensors[stored])
            originals[name] = gguf.quants.quantize(rows.numpy(), kind), kind
            rows = llama_files.permute(rows, heads) if heads else rows
            tensors[stored] = gguf.quants.quantize(rows.numpy(), kind), kind

    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path, quantize)
    checkpoint = open_checkpoint(path)
    for name, (data, kind) in originals.items():
        packed = checkpoint.packed(name)
        assert (packed.type, packed.shape) == (kind.name, checkpoint.shape(name))
        assert torch.equal(packed.data, torch.from_numpy(data))
        assert checkpoint.nbytes(name) == data.nbytes
        assert_same_bits(gguf.quants.dequantize(data, kind), checkpoint.read(name))


def test_sixteen_bit_tensors_are_views_in_their_dtype(tmp_path):
    def narrow(fields, tensors):
        tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype(np.float16)

    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path, narrow)
    checkpoint = open_checkpoint(path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.read(name).dtype == torch.float16
    assert checkpoint.read(name).data_ptr() == checkpoint.read(name).data_ptr()


@pytest.mark.parametrize("case", ["phi2", "llama", "smollm3", "qwen2"])
def test_fused_qkv_is_split(case, tmp_path):
    """Of older Phi-2 files, and of the converter's --fuse-qkv; rotated rows are interleaved."""
    sizes = {"num_key_value_heads": 6} if case == "phi2" else {}
    model = tiny.write(case, tmp_path, secrets.randbits(32), **sizes)
    path = tmp_path / "model.gguf"
    llama_files.convert(model, path, fuse_qkv=True)
    source, converted = open_checkpoint(tmp_path), open_checkpoint(path)
    assert {name for name in GgufFile(path).tensors if "attn_qkv" in name}
    for name in source.names():
        assert torch.equal(converted.read(name), source.read(name)), name


def test_no_scaling_and_no_cap_may_be_written_as_zero(tmp_path):
    """As llama.cpp's own saver does."""

    def zero(fields, tensors):
        fields["llama.rope.scaling.factor"] = 0.0

    llama_files.write_tiny(tmp_path / "plain.gguf")
    llama_files.write_tiny(tmp_path / "zero.gguf", zero)
    plain, saved = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("plain", "zero"))
    assert saved.config == plain.config


def test_yarn_without_its_first_context_takes_the_whole(tmp_path):
    def scale(fields, tensors):
        fields |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
        fields["llama.rope.scaling.yarn_attn_factor"] = 1.75  # the whole, as the converter says it

    llama_files.write_tiny(tmp_path / "model.gguf", scale)
    rope = open_checkpoint(tmp_path / "model.gguf").config.ropes[0]
    assert (rope.original_context, rope.attention_factor) == (64, 1.75)


def test_as_much_of_a_head_is_rotated_as_the_file_counts(tmp_path):
    """By a share that config.json has, where 44 * (30 / 44) is less than 30."""
    llama_files.write_tiny(tmp_path / "model.gguf")
    file = GgufFile(tmp_path / "model.gguf")
    sizes = {"attention.key_length": 44, "attention.value_length": 44, "rope.dimension_count": 30}
    said = dict(file.metadata) | {f"llama.{key}": size for key, size in sizes.items()}
    assert read_back(said, file.tensors, {}).ropes[0].dim == 30


def test_an_older_key_of_linear_scaling(tmp_path):
    def scale(fields, tensors):
        fields["llama.rope.scale_linear"] = 4.0

    llama_files.write_tiny(tmp_path / "model.gguf", scale)
    rope = open_checkpoint(tmp_path / "model.gguf").config.ropes[0]
    assert (rope.kind, rope.factor) == ("linear", 4.0)


def test_gemma2_has_a_window_where_the_file_says_nothing(tmp_path, monkeypatch):
    """The first ones; llama.cpp has 4,096 for them."""
    model = tiny.write("gemma2", tmp_path, 1, max_position_embeddings=8192, sliding_window=None)
    windows = []
    for name in ("zero", "none"):
        llama_files.convert(model, tmp_path / f"{name}.gguf")
        config = open_checkpoint(tmp_path / f"{name}.gguf").config
        windows.append({entry.window for entry in config.layers})
        monkeypatch.setattr(gguf.GGUFWriter, "add_sliding_window", lambda *_: None)
    assert windows == [{None}, {4096, None}]


def test_what_gemmas_keys_say_and_what_holds_without_them(tmp_path):
    files = {}
    for case in ("gemma2", "gemma3"):
        model = tiny.write(case, tmp_path / case, 1, **SAYABLE[case])
        llama_files.convert(model, tmp_path / f"{case}.gguf")
        files[case] = GgufFile(tmp_path / f"{case}.gguf")

    def read(case, **said):
        """`None`: without the key."""
        fields = dict(files[case].metadata) | {f"{case}.{k}": v for k, v in said.items()}
        fields = {key: value for key, value in fields.items() if value is not None}
        return read_back(fields, files[case].tensors, {})

    caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    for said, expected in ((caps, (20, 10)), (dict.fromkeys(caps), (50, 30))):
        config = read("gemma2", **said)
        assert (config.attention_softcap, config.logit_softcap) == expected
    assert read("gemma3", final_logit_softcapping=0.0).logit_softcap is None
    listed = [bool(at % 3) for at in range(10)]  # of more layers than the six
    for pattern, expected in ((3, [True, True, False] * 2), (listed, listed[:6])):
        said = {"attention.sliding_window_pattern": pattern, "rope.freq_base_swa": 5000.0}
        layers = read("gemma3", **said).layers
        assert [entry.window is not None for entry in layers] == expected
        assert all((entry.rope.theta == 5000) == (entry.window is not None) for entry in layers)
    with pytest.raises(InputError, match="sliding_window_pattern: expected 6 booleans"):
        read("gemma3", **{"attention.sliding_window_pattern": listed[:5]})


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies(factor, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny.write("llama", tmp_path, 0, head_dim=64, rope_parameters=rope)
    llama_files.convert(model, tmp_path / "model.gguf")
    config = open_checkpoint(tmp_path / "model.gguf").config
    assert config == open_checkpoint(tmp_path).config
    assert config.layers[0].rope.kind == "llama3"


def test_frequencies_of_no_known_scaling_are_kept(tmp_path, rng):
    divisors = torch.rand(8, generator=rng) * 9 + 1

    def scale(fields, tensors):
        tensors["rope_freqs.weight"] = divisors.numpy()

    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path, scale)
    rope = open_checkpoint(path).config.layers[0].rope
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(inverse_frequencies(rope, 1), plain / divisors, rtol=1e-6, atol=0)


def test_end_tokens_are_the_named_and_the_known(tmp_path):
    def name_another(fields, tensors):
        fields["tokenizer.ggml.tokens"][0] = "<eos>"
        fields["tokenizer.ggml.model"] = "gpt2"
        fields |= {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 4}

    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path, name_another)
    # <|eot_id|> is an ordinary token of this vocabulary, <eos> and <|im_end|> control tokens
    assert open_checkpoint(path).config.eos_ids == load_text(path).eos_ids == (0, 1, 3, 4, 6)


def test_default_model_agrees_with_the_gguf_package(default_model):
    checkpoint = open_checkpoint(default_model)
    assert checkpoint.config.family == "llama"
    assert len(checkpoint.config.layers) == 30
    heads = {"attn_q": 9, "attn_k": 3}
    names = {source.tensor.offset: name for name, source in checkpoint._sources.items()}
    for tensor in gguf.GGUFReader(checkpoint.path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        role = tensor.name.split(".")[-2]
        if role in heads:
            halves = values.reshape(heads[role], 32, 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        assert_same_bits(values, checkpoint.read(names[tensor.data_offset]))


def test_a_tensor_that_is_not_there(tmp_path):
    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path)
    checkpoint = open_checkpoint(path)
    for ask in (checkpoint.read, checkpoint.shape, checkpoint.nbytes, checkpoint.packed):
        with pytest.raises(InputError, match="no tensor 'lm_head.weight'"):
            ask("lm_head.weight")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_only_what_is_read_comes_into_memory(tmp_path):
    def add_rows(fields, tensors):
        tensors["token_embd.weight"] = np.zeros((1 << 18, 32), np.float32)  # 32 MiB
        del fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]

    path = tmp_path / "model.gguf"
    llama_files.write_tiny(path, add_rows)
    checkpoint = open_checkpoint(path)
    checkpoint.read(Q_NAME).sum()
    assert resident_bytes(path) < 1 << 20
    checkpoint.read("model.embed_tokens.weight").sum()
    assert resident_bytes(path) > 32 << 20


def resident_bytes(path) -> int:
    """Of the mappings of a file, from the kernel's account of this process."""
    total, ours = 0, False
    for line in open("/proc/self/smaps"):
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            ours = line.rstrip().endswith(str(path))
        elif ours and first == "Rss:":
            total += int(line.split()[1]) << 10
    return total
