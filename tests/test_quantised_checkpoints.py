"""Hugging Face directories quantised by others, and our own packed ones, read as plain names."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed import every_spec, random_packed, spec_id
from safetensors.torch import save_file

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.kernels.w4 import store
from engine.kernels.w4.format import NF4, Packed, Spec, pack_codes, unpack

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
MODULE = "model.layers.0.self_attn.q_proj"
HEAD = "lm_head.weight"
N, K = 48, 100  # K: no multiple of a group


def write(
    path: Path,
    parts: dict[str, torch.Tensor],
    quantization: dict | None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A directory with the parts of MODULE and a plain head."""
    tensors = {f"{MODULE}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors | {HEAD: torch.eye(4).half()}, path / "model.safetensors", metadata)
    found = {} if quantization is None else {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(CONFIG | found))
    return path


def draw(rng: torch.Generator, limit: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, limit, shape, generator=rng)


def into_words(fields: torch.Tensor, bits: int, order=range(8)) -> torch.Tensor:
    """(R, C) -> (R, ceil(C * bits / 32)) int32; field i of a word goes to its place order[i]."""
    per_word = 32 // bits
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[1] % per_word))
    words = sum(
        fields[:, i::per_word].long() << bits * place
        for i, place in enumerate(list(order)[:per_word])
    )
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


# ---- a directory of every kind: (parts, configuration, the weight it stands for) ----


def gptq(rng, bits=4, group=32, desc_act=False, version="gptq", n=N):
    groups, levels = (1 if group == -1 else -(-K // group)), 1 << bits
    q, z = draw(rng, levels, K, n), draw(rng, levels, groups, n)
    scales = torch.randn(groups, n, generator=rng).half()
    g_idx = torch.arange(K) // (K if group == -1 else group)
    if desc_act:
        g_idx = g_idx[torch.randperm(K, generator=rng)]
    stored = (z - 1) % levels if version == "gptq" else z
    parts = {
        "qweight": into_words(q.T, bits).T,
        "qzeros": into_words(stored, bits),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act}
    config |= {"sym": False, "checkpoint_format": version, "pack_dtype": "int32"}
    return parts, config, (scales.float()[g_idx] * (q - z[g_idx])).T


def awq(rng):
    q, z, group = draw(rng, 16, K, N), draw(rng, 16, -(-K // 64), N), torch.arange(K) // 64
    scales = torch.randn(len(z), N, generator=rng).half()
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of each column
    parts = {
        "qweight": into_words(q, 4, order),
        "qzeros": into_words(z, 4, order),
        "scales": scales,
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}
    return parts, config | {"zero_point": True}, (scales.float()[group] * (q - z[group])).T


def compressed(rng, bits=4, group=32, symmetric=True, actorder=False):
    groups, half = (1 if group == -1 else -(-K // group)), 1 << (bits - 1)
    q, z = draw(rng, 2 * half, N, K), draw(rng, 2 * half, N, groups)
    scale = torch.randn(N, groups, generator=rng).bfloat16()
    g_idx = torch.arange(K) // (K if group == -1 else group)
    parts = {
        "weight_packed": into_words(q, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([N, K]),
    }
    if symmetric:
        z = torch.full_like(z, half)
    else:
        parts["weight_zero_point"] = into_words(z.T, bits).T
    if actorder:
        g_idx = g_idx[torch.randperm(K, generator=rng)]
        parts["weight_g_idx"] = g_idx.int()
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel" if group == -1 else "group"}
    weights |= {"group_size": None if group == -1 else group}
    other = weights | {"num_bits": 12 - bits}  # a second group, which this module is not of
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": other, "input_activations": None},
            "group_1": {"targets": [f"re:.*{MODULE}"], "weights": weights},
        },
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "transform_config": {},
    }
    return parts, config, (q - z[:, g_idx]) * scale.float()[:, g_idx]


def nf4(rng, nested=False, k=128, blocksize=64):
    q, table = draw(rng, 16, N, k), torch.tensor(NF4)
    flat = torch.nn.functional.pad(q.flatten(), (0, N * k % 2))
    parts = {"weight": (flat[::2] << 4 | flat[1::2]).byte()[:, None], "weight.quant_map": table}
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float16", "shape": [N, k]}
    blocks = -(-N * k // blocksize)
    absmax = torch.rand(blocks, generator=rng) + 0.1
    parts["weight.absmax"] = absmax
    if nested:
        codes, inner = draw(rng, 256, blocks).byte(), torch.randn(256, generator=rng)
        outer = torch.rand(-(-blocks // 16), generator=rng)
        parts |= {"weight.absmax": codes, "weight.nested_quant_map": inner}
        parts |= {"weight.nested_absmax": outer}
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = inner[codes.long()] * outer[torch.arange(blocks) // 16] + 0.25
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    parts["weight.quant_state.bitsandbytes__nf4"] = text
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    config |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}
    scale = absmax[torch.arange(N * k) // blocksize].view(N, k)
    return parts, config, table[q] * scale


CASES = {
    "gptq": gptq,
    "gptq-desc_act": lambda rng: gptq(rng, desc_act=True),
    "gptq-v2": lambda rng: gptq(rng, version="gptq_v2", group=128),
    "gptq-column": lambda rng: gptq(rng, group=-1),
    "gptq-8bit-odd": lambda rng: gptq(rng, bits=8, desc_act=True, n=N - 1),
    "awq": awq,
    "compressed": compressed,
    "compressed-asymmetric": lambda rng: compressed(rng, symmetric=False),
    "compressed-channel": lambda rng: compressed(rng, group=-1, symmetric=False),
    "compressed-8bit": lambda rng: compressed(rng, bits=8),
    "compressed-actorder": lambda rng: compressed(rng, symmetric=False, actorder=True),
    "nf4": nf4,
    "nf4-nested": lambda rng: nf4(rng, nested=True),
    "nf4-straddling": lambda rng: nf4(rng, nested=True, k=37),
}


@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_source_means(case, rng, tmp_path):
    parts, config, weight = CASES[case](rng)
    checkpoint = open_checkpoint(write(tmp_path, parts, config))
    name = f"{MODULE}.weight"
    assert sorted(checkpoint.names()) == sorted([HEAD, name])
    assert checkpoint.shape(name) == tuple(weight.shape)
    assert checkpoint.nbytes(name) == sum(part.nbytes for part in parts.values())
    read = checkpoint.read(name)
    assert read.dtype == torch.float32 and torch.equal(read, weight)
    packed = checkpoint.packed(name)
    if case == "nf4-straddling":
        assert packed is None
    else:
        assert isinstance(packed, Packed) and torch.equal(unpack(packed), weight)
        assert (packed.perm is not None) == case.endswith(("desc_act", "odd", "actorder"))
    assert checkpoint.packed(HEAD) is None and checkpoint.nbytes(HEAD) == 32
    assert torch.equal(checkpoint.read(HEAD), torch.eye(4).half())
    assert checkpoint.shape(HEAD) == (4, 4)


def test_older_gptq_keeps_its_settings_in_a_file_of_its_own(rng, tmp_path):
    parts, config, weight = gptq(rng, desc_act=True)
    write(tmp_path, parts, None)
    for key in ("quant_method", "checkpoint_format", "pack_dtype"):
        del config[key]
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    assert torch.equal(open_checkpoint(tmp_path).read(f"{MODULE}.weight"), weight)


@pytest.mark.parametrize("permuted", [False, True], ids=["", "permuted"])
@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_our_own_survives_the_disk(spec, permuted, rng, tmp_path):
    name, packed = f"{MODULE}.weight", random_packed(rng, 5, 100, spec, permuted)
    parts = store.to_tensors("weight", packed)
    write(tmp_path, parts, {"quant_method": "shallow"}, store.to_metadata(name, packed))
    checkpoint = open_checkpoint(tmp_path)
    loaded = checkpoint.packed(name)
    assert (loaded.spec, loaded.shape) == (spec, (5, 100)) == (packed.spec, checkpoint.shape(name))
    for part, tensor in packed.tensors().items():
        assert torch.equal(loaded.tensors()[part], tensor)
    assert checkpoint.nbytes(name) == packed.nbytes
    assert torch.equal(checkpoint.read(name), unpack(packed))


# ---- what cannot be read is named in one sentence ----


def refused(path: Path, words: str) -> None:
    """Opening the directory, or reading everything in it, raises InputError that says `words`."""
    with pytest.raises(InputError, match=words) as caught:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            checkpoint.shape(name), checkpoint.packed(name), checkpoint.read(name)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "case, change, words",
    [
        ("gptq", {"quant_method": "aqlm"}, "quant_method must be one of .*, found 'aqlm'"),
        ("gptq", {"quant_method": None}, "found None"),
        ("gptq", {"quant_method": ["gptq"]}, r"found \['gptq'\]"),
        ("gptq", {"bits": 3}, "bits must be 4 or 8, found 3"),
        ("gptq", {"bits": "4"}, "bits must be 4 or 8, found '4'"),
        ("gptq", {"bits": True}, "found True"),
        ("gptq", {"group_size": 48}, "group_size must be .*, found 48"),
        ("gptq", {"group_size": 0}, "group_size must be .*, found 0"),
        ("gptq", {"group_size": 64}, rf"{MODULE}: qzeros must be \(2, 6\), found \(4, 6\)"),
        ("gptq", {"bits": 8}, rf"{MODULE}: qweight must be \(25, 48\), found \(13, 48\)"),
        ("gptq", {"checkpoint_format": "marlin"}, "'gptq' or 'gptq_v2', found 'marlin'"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype must be 'int32', found 'int16'"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic must be None"),
        ("awq", {"bits": 8}, "bits must be 4, found 8"),
        ("awq", {"version": "gemv"}, "version must be 'gemm', found 'gemv'"),
        ("awq", {"group_size": None}, "group_size must be .*, found None"),
        ("compressed", {"format": "int-quantized"}, "must be 'pack-quantized', found 'int-qu"),
        ("compressed", {"config_groups": {}}, "config_groups is missing"),
        ("compressed", {"config_groups": {"g": 1}}, "an object 'weights', found 1"),
        ("compressed", {"transform_config": {"R1": 1}}, "transform_config must be None"),
        ("compressed", {"sparsity_config": {"format": "x"}}, "sparsity_config must be None"),
        ("nf4", {"load_in_8bit": True}, "load_in_8bit must be False, found True"),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "must be 'nf4', found 'fp4'"),
        ("nf4", {"bnb_4bit_quant_storage": "bfloat16"}, "must be 'uint8', found 'bfloat16'"),
    ],
)
def test_configuration_that_cannot_be_read(case, change, words, rng, tmp_path):
    parts, config, _ = CASES[case](rng)
    refused(write(tmp_path, parts, config | change), words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_bits": 3}, "num_bits must be 4 or 8, found 3"),
        ({"type": "float"}, "type must be 'int', found 'float'"),
        ({"strategy": "tensor"}, "strategy must be 'group' or 'channel', found 'tensor'"),
        ({"group_size": 24}, "group_size must be .*, found 24"),
        ({"group_size": None}, "group_size must be .*, found None"),
        ({"group_size": 128}, rf"{MODULE}: weight_scale must be \(48, 1\), found \(48, 4\)"),
    ],
)
def test_compressed_weights_that_cannot_be_read(change, words, rng, tmp_path):
    parts, config, _ = compressed(rng)
    weights = config["config_groups"].pop("group_1")["weights"] | change
    config["config_groups"] = {"group_0": {"weights": weights}}
    refused(write(tmp_path, parts, config), words)


def test_compressed_activations_are_refused(rng, tmp_path):
    parts, config, _ = compressed(rng)
    config["config_groups"]["group_1"]["input_activations"] = {"num_bits": 8}
    refused(write(tmp_path, parts, config), "input_activations must be None")


@pytest.mark.parametrize(
    "case, part, tensor, words",
    [
        ("gptq", "qzeros", None, f"{MODULE}: tensor 'qzeros' is missing"),
        ("gptq", "scales", torch.full((4, 48), torch.nan), f"{MODULE}: scales must be finite"),
        ("gptq", "scales", torch.ones(4, 48).int(), f"{MODULE}: scale_dtype must be"),
        ("gptq", "qweight", torch.zeros(13), f"{MODULE}: qweight must .*2 dimensions"),
        ("gptq", "qweight", torch.zeros(13, 48), f"{MODULE}: qweight must be torch.int32"),
        ("gptq", "g_idx", torch.zeros(100).int(), "in sorted order input 32 is in group 0"),
        ("gptq", "g_idx", torch.zeros(2, 50).int(), "g_idx must have 1 dimensions"),
        ("awq", "scales", torch.ones(2, 40).half(), r"qweight must be \(100, 5\)"),
        ("compressed", "weight_shape", torch.tensor([48, -1]), "two positive integers"),
        ("compressed", "weight_shape", torch.tensor([48, 1 << 50]), "two positive integers"),
        ("compressed", "weight_shape", torch.tensor([48, 1 << 39]), "weight_packed must be"),
        ("compressed", "weight_shape", torch.tensor([4.0, 1.0]), "two positive integers"),
        ("compressed", "weight_shape", torch.tensor([[48, 100]]), "must have 1 dimensions"),
        ("compressed", "weight_scale", torch.ones(48, 9), r"must be \(48, \d\), found \(48, 9\)"),
        ("nf4", "weight", torch.zeros(9, 1).byte(), "are 3072 uint8, found 9"),
        ("nf4", "weight.absmax", torch.ones(3), r"absmax must be \(96,\), found \(3,\)"),
        ("nf4-nested", "weight.nested_absmax", None, "'weight.nested_absmax' is missing"),
        ("nf4-nested", "weight.absmax", torch.ones(96), "absmax must be torch.uint8"),
    ],
)
def test_parts_that_disagree(case, part, tensor, words, rng, tmp_path):
    parts, config, _ = CASES[case](rng)
    parts |= {part: tensor}
    parts = {part: tensor for part, tensor in parts.items() if tensor is not None}
    refused(write(tmp_path, parts, config), words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quant_type": "fp4"}, "quant_type cannot be 'fp4'"),
        ({"shape": [48]}, r"shape cannot be \[48\]"),
        ({"shape": [48, 1.5]}, "shape cannot be"),
        ({"shape": [1 << 39, 1 << 39]}, "NF4 codes of .* found 3072"),
        ({"blocksize": 0}, "blocksize cannot be 0"),
        ({"blocksize": 1 << 39}, r"absmax must be \(1,\)"),
        ({"nested_blocksize": 1 << 39}, r"nested_absmax must be \(1,\)"),
        ({"nested_offset": "a"}, "nested_offset cannot be 'a'"),
        ({"nested_offset": float("nan")}, "nested_offset cannot be nan"),
        (None, "quant_state: not valid JSON"),
    ],
)
def test_nf4_state_that_cannot_be_read(change, words, rng, tmp_path):
    parts, config, _ = nf4(rng, nested=True)
    key = "weight.quant_state.bitsandbytes__nf4"
    text = b"{"
    if change is not None:
        text = json.dumps(json.loads(bytes(parts[key].tolist())) | change).encode()
    parts[key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    refused(write(tmp_path, parts, config), words)


def our_own(rng, path: Path, change: dict | None = None, drop: str | None = None) -> Path:
    name = f"{MODULE}.weight"
    packed = random_packed(rng, 5, 100, Spec(4, 32, "zero"), permuted=True)
    parts = store.to_tensors("weight", packed)
    if drop:
        del parts[f"weight.{drop}"]
    metadata = store.to_metadata(name, packed)
    if change is not None:
        metadata[name] = json.dumps(json.loads(metadata[name]) | change)
    return write(path, parts, {"quant_method": "shallow"}, metadata)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": 2}, "spec of version 2, this version reads 1"),
        ({"bits": 5}, "bits must be 4 or 8, found 5"),
        ({"group": 16}, r"scales must be \(5, 7\), found \(5, 4\)"),
        ({"scheme": "codebook"}, "tensor 'weight.codebook' is missing"),
        ({"shape": [5, 200]}, r"codes must be \(5, 112\), found \(5, 64\)"),
        ({"shape": [5, 0]}, "shape must be two positive integers"),
        ({"shape": 5}, "shape must be two positive integers"),
        ({"perm": 1}, "perm must be true or false, found 1"),
        ({"extra": 1}, "unusable quantisation metadata"),
        ({"scale_dtype": "float32"}, "scales must be torch.float32, found torch.float16"),
    ],
)
def test_our_own_metadata_that_cannot_be_read(change, words, rng, tmp_path):
    refused(our_own(rng, tmp_path, change), f"{MODULE}.*{words}")


def test_our_own_without_a_part_or_metadata(rng, tmp_path):
    refused(our_own(rng, tmp_path, drop="zeros"), "tensor 'weight.zeros' is missing")
    packed = random_packed(rng, 5, 100, Spec(4, 32, "zero"))
    parts, quantization = store.to_tensors("weight", packed), {"quant_method": "shallow"}
    refused(write(tmp_path, parts, quantization), "its metadata is missing")
    metadata = {f"{MODULE}.weight": "[" * 100000}
    refused(write(tmp_path, parts, quantization, metadata), "unusable quantisation metadata")


def test_our_own_damaged_file(rng, tmp_path):
    """Cut anywhere: one sentence. A bit flipped in the header: one sentence, or still readable."""
    our_own(rng, tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 4, 8, header // 2, header, header + 1, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(tmp_path, "model.safetensors")
    read = 0
    for at in range(header):
        bit = 1 << int(torch.randint(0, 8, (1,), generator=rng))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            checkpoint = open_checkpoint(tmp_path)
            for name in checkpoint.names():
                checkpoint.shape(name), checkpoint.packed(name), checkpoint.read(name)
            read += 1
        except InputError:
            pass
    assert read < header / 2


def test_mapped_packed_tensors_are_views(rng, tmp_path):
    """Opening reads the header only: the codes are the file's own pages."""
    spec = Spec(4, 64, "symmetric")
    n, k = 64, 256
    packed = random_packed(rng, n, k, spec)
    name = f"{MODULE}.weight"
    metadata = store.to_metadata(name, packed)
    write(tmp_path, store.to_tensors("weight", packed), {"quant_method": "shallow"}, metadata)
    checkpoint = open_checkpoint(tmp_path)
    first, second = checkpoint.packed(name), checkpoint.packed(name)
    assert first.codes.data_ptr() == second.codes.data_ptr()


def test_store_round_trip_in_memory(rng):
    packed = random_packed(rng, 3, 70, Spec(4, 32, "kquant"))
    tensors, metadata = store.to_tensors("a.weight", packed), store.to_metadata("a.weight", packed)
    assert set(tensors) == {"a.weight." + part for part in ("codes", "scales", "mins", "supers")}
    again = store.from_tensors("a.weight", tensors.__getitem__, metadata["a.weight"])
    assert torch.equal(unpack(again), unpack(packed))
    broken = replace(packed, mins=packed.mins[:2])
    tensors = store.to_tensors("a.weight", broken)
    with pytest.raises(ValueError, match=r"^a\.weight: mins must be \(3, 3\), found \(2, 3\)"):
        store.from_tensors("a.weight", tensors.__getitem__, metadata["a.weight"])
    assert pack_codes(torch.zeros(1, 1).byte(), 4).shape == (1, 16)
