"""Quantized directories that cannot be read: one sentence that names file, tensor or option."""

import json
import re
from pathlib import Path

import pytest
import torch
from support import tiny
from support.gguf_blocks import random_blocks
from support.packed import random_packed
from support.quantized import CASES, MODULE, compressed, nf4, write
from support.runtimes import HERE

import engine
from engine.checkpoint import open_checkpoint, open_unchecked
from engine.errors import InputError
from engine.kernels.w4 import store
from engine.kernels.w4.format import Spec
from engine.kernels.w4.tiled import Tiled


def refused(path: Path, words: str) -> None:
    """Opening the directory, or reading everything in it, raises InputError that says `words`."""
    with pytest.raises(InputError, match=words) as caught:
        checkpoint = open_unchecked(path)
        for name in checkpoint.names():
            checkpoint.shape(name), checkpoint.packed(name), checkpoint.read(name)
    assert str(path) in str(caught.value)
    for backend in HERE:
        with pytest.raises(InputError, match=re.escape(str(path))):
            engine.load(path, backend=backend)


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
        ("gptq", {"dynamic": {"+:.*": {"bits": 3}}}, "bits must be 4 or 8, found 3"),
        ("gptq", {"dynamic": ["-:.*"]}, "dynamic must be an object of objects"),
        ("gptq", {"dynamic": {".*": False}}, "dynamic must be an object of objects"),
        ("gptq", {"rotation": "hadamard"}, "rotation must be None, found 'hadamard'"),
        ("gptq", {"activation": {"format": "fp8"}}, "activation must be None"),
        ("auto-round", {"packing_format": "auto_round"}, "packing_format must be 'auto_round:auto"),
        ("auto-round", {"data_type": "mx_fp"}, "data_type must be 'int', found 'mx_fp'"),
        ("auto-round", {"act_bits": 8}, "act_bits must be 16, found 8"),
        ("auto-round", {"extra_config": {"a": {"bits": 2}}}, "bits must be 4 or 8, found 2"),
        ("auto-round", {"extra_config": 1}, "extra_config must be an object of objects, found 1"),
        ("awq", {"bits": 8}, "bits must be 4, found 8"),
        ("awq", {"version": "gemv"}, "version must be 'gemm', found 'gemv'"),
        ("awq", {"group_size": None}, "group_size must be .*, found None"),
        ("compressed", {"format": "int-quantized"}, "must be 'pack-quantized', found 'int-qu"),
        ("compressed", {"config_groups": {}}, "config_groups is missing"),
        ("compressed", {"config_groups": {"g": 1}}, "an object 'weights', found 1"),
        ("compressed", {"transform_config": {"R1": 1}}, "transform_config must be None"),
        ("compressed", {"sparsity_config": {"format": "x"}}, "sparsity_config must be None"),
        ("nf4", {"load_in_8bit": True}, "load_in_8bit must be False, found True"),
        ("nf4", {"bnb_4bit_quant_type": "int4"}, "must be 'nf4' or 'fp4', found 'int4'"),
    ],
)
def test_configuration_that_cannot_be_read(case, change, words, rng, tmp_path):
    parts, config, _ = CASES[case](rng)
    refused(write(tmp_path, parts, config | change), words)


@pytest.mark.parametrize(
    "file, text, method",
    [
        ("quanto_qmap.json", "{}", "quanto"),
        ("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}', "modelopt"),
    ],
)
def test_methods_that_a_file_of_their_own_tells(file, text, method, rng, tmp_path):
    """Their directories have no quantization_config."""
    parts, _, _ = CASES["gptq"](rng)
    write(tmp_path, parts, None)
    (tmp_path / file).write_text(text)
    refused(tmp_path, f"quant_method must be one of .*, found '{method}'")


@pytest.mark.parametrize("twice", [False, True])
def test_mlx_is_named(twice, rng, tmp_path):
    """Its config.json has a key of its own, and later a copy under the usual one."""
    write(tmp_path, {"weight": torch.zeros(48, 13).int()}, None)
    config = json.loads((tmp_path / "config.json").read_text())
    said = {"group_size": 64, "bits": 4}
    config |= {"quantization": said} | ({"quantization_config": said} if twice else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "quant_method must be one of .*, found 'mlx'")


def test_modelopts_keys_and_values_are_none_of_the_weights(tmp_path):
    tiny.write("llama", tmp_path, 1)
    said = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    open_checkpoint(tmp_path)


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


@pytest.mark.parametrize("key", ["input_activations", "output_activations"])
def test_compressed_activations_are_refused(key, rng, tmp_path):
    parts, config, _ = compressed(rng)
    config["config_groups"]["group_1"][key] = {"num_bits": 8}
    refused(write(tmp_path, parts, config), f"{key} must be None")


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
        ({"shape": [1 << 39, 1 << 39]}, "4-bit codes of .* found 3072"),
        ({"blocksize": 0}, "blocksize cannot be 0"),
        ({"blocksize": 1 << 39}, r"absmax must be \(1,\)"),
        ({"nested_blocksize": 1 << 39}, r"nested_absmax must be \(1,\)"),
        ({"nested_offset": "a"}, "nested_offset cannot be 'a'"),
        ({"nested_offset": float("nan")}, "nested_offset cannot be nan"),
        ({"nested_offset": 10**400}, "nested_offset cannot be 1000"),
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


def our_own(
    rng, path: Path, change: dict | None = None, drop: str | None = None, version: int = 3
) -> Path:
    name = f"{MODULE}.weight"
    packed = random_packed(rng, 5, 100, Spec(4, 32, "zero"), permuted=True)
    parts = store.to_tensors("weight", packed)
    if version == 1:
        parts = {f"weight.{part}": tensor for part, tensor in packed.tensors().items()}
    if drop:
        del parts[f"weight.{drop}"]
    metadata = store.to_metadata(name, packed)
    if change is not None:
        metadata[name] = json.dumps(json.loads(metadata[name]) | change)
    return write(path, parts, {"quant_method": "shallow", "version": version}, metadata)


OF_ARRAYS = [
    ({"group": 16}, r"scales must be \(5, 7\), found \(5, 4\)"),
    ({"shape": [5, 200]}, r"codes must be \(5, 112\), found \(5, 64\)"),
    ({"scale_dtype": "float32"}, "scales must be torch.float32, found torch.float16"),
]
OF_TILES = [
    ({"group": 16}, r"tiles must be \(1, \d+\), found \(1, 1216\)"),
    ({"bits": 8}, r"tiles must be \(1, \d+\), found \(1, 1216\)"),
    ({"shape": [5, 200]}, r"tiles must be \(1, \d+\), found \(1, 1216\)"),
    ({"shape": [17, 100]}, r"tiles must be \(2, \d+\), found \(1, 1216\)"),
    ({"shape": [5, (1 << 63) - 1]}, r"tiles must be \(1, \d+\), found \(1, 1216\)"),
    ({"shape": [5, 99]}, r"perm must be \(99,\), found \(100,\)"),
    ({"scale_dtype": "float32"}, r"tiles must be \(1, \d+\), found \(1, 1216\)"),
]


@pytest.mark.parametrize(
    "version, change, words",
    [(1, *case) for case in OF_ARRAYS] + [(v, *case) for case in OF_TILES for v in (2, 3)],
)
def test_our_own_of_another_size(version, change, words, rng, tmp_path):
    refused(our_own(rng, tmp_path, change, version=version), f"{MODULE}.*{words}")


@pytest.mark.parametrize("version", (1, 2, 3))
@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": 2}, "spec of version 2, this version reads 1"),
        ({"bits": 5}, "bits must be 4 or 8, found 5"),
        ({"bits": 4.0}, "bits must be 4 or 8, found 4.0"),
        ({"group": 32.0}, "group must be one of .*, found 32.0"),
        ({"group": False}, "group must be one of .*, found False"),
        ({"scheme": "codebook"}, "tensor 'weight.codebook' is missing"),
        ({"shape": [5, 0]}, "shape must be two positive integers"),
        ({"shape": 5}, "shape must be two positive integers"),
        ({"shape": [True, 64]}, r"shape must be two positive integers, found \[True, 64\]"),
        ({"perm": 1}, "perm must be true or false, found 1"),
        ({"extra": 1}, "unusable quantization metadata"),
        ({"gguf": "Q4_K"}, "gguf must be one of Q5_0, Q5_1, Q5_K, Q6_K, found 'Q4_K'"),
        ({"gguf": ["Q6_K"]}, r"gguf must be one of .*, found \['Q6_K'\]"),
        ({"gguf": "Q6_K"}, "perm must be false where gguf is Q6_K, found true"),
    ],
)
def test_our_own_metadata_that_cannot_be_read(change, words, version, rng, tmp_path):
    refused(our_own(rng, tmp_path, change, version=version), f"{MODULE}.*{words}")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bits": 4}, "Q6_K is restored as .*'bits': 8.*, found .*'bits': 4"),
        ({"gguf": "Q5_K"}, "Q5_K is restored as .*'minimum'.*, found .*'symmetric'"),
        ({"shape": [5, 500]}, "Q6_K needs K in blocks of 256, found K=500"),
        ({"shape": [5, 768]}, r"supers must be \(1, 3, 16\), found \(1, 2, 16\)"),
        ({"shape": [5, 1 << 62]}, r"supers must be \(1, \d+, 16\), found \(1, 2, 16\)"),
        ({"shape": [17, 512]}, r"supers must be \(2, 2, 16\), found \(1, 2, 16\)"),
        ({"gguf": None}, r"tiles must be \(1, \d+\), found \(1, \d+\)"),
    ],
)
def test_our_own_in_six_bits(change, words, rng, tmp_path):
    tiled = Tiled.from_blocks("Q6_K", (5, 512), random_blocks(rng, "Q6_K", 5, 512))
    name = f"{MODULE}.weight"
    metadata = store.to_metadata(name, tiled)
    metadata[name] = json.dumps(json.loads(metadata[name]) | change)
    parts = store.to_tensors("weight", tiled)
    refused(write(tmp_path, parts, {"quant_method": "shallow", "version": 3}, metadata), words)


def test_our_own_in_six_bits_without_a_part(rng, tmp_path):
    tiled = Tiled.from_blocks("Q6_K", (5, 512), random_blocks(rng, "Q6_K", 5, 512))
    metadata = store.to_metadata(f"{MODULE}.weight", tiled)
    config = {"quant_method": "shallow", "version": 3}
    for part in ("tiles", "supers"):
        parts = store.to_tensors("weight", tiled)
        parts[f"weight.{part}"] = parts[f"weight.{part}"][..., :-1].contiguous()
        refused(write(tmp_path, parts, config, metadata), f"{part} must be .*, found")
    del parts["weight.supers"]
    refused(write(tmp_path, parts, config, metadata), "'weight.supers' is missing")


@pytest.mark.parametrize("version", (1, 2))
def test_our_own_in_six_bits_before_there_were_any(version, rng, tmp_path):
    tiled = Tiled.from_blocks("Q6_K", (5, 512), random_blocks(rng, "Q6_K", 5, 512))
    parts = store.to_tensors("weight", tiled)
    if version == 1:
        parts = {f"weight.{part}": tensor for part, tensor in tiled.restored.tensors().items()}
    metadata = store.to_metadata(f"{MODULE}.weight", tiled)
    config = {"quant_method": "shallow", "version": version}
    words = f"{MODULE}.weight: gguf is of version 3, found in a file of {version}"
    refused(write(tmp_path, parts, config, metadata), words)


def test_our_own_whose_columns_are_no_permutation(rng, tmp_path):
    """Checked whatever reads it: kernels take x from there."""
    packed = random_packed(rng, 5, 100, Spec(4, 32, "codebook"), permuted=True)
    for part, value, words in (
        ("perm", 100, r"perm must hold each of 0\.\.99 once"),
        ("codebook", float("nan"), "codebook must be finite, found NaN or Inf"),
    ):
        parts = store.to_tensors("weight", packed)
        parts[f"weight.{part}"] = parts[f"weight.{part}"].clone()
        parts[f"weight.{part}"][3] = value
        metadata = store.to_metadata(f"{MODULE}.weight", packed)
        refused(write(tmp_path, parts, {"quant_method": "shallow"}, metadata), words)


def test_our_own_without_a_part_or_metadata(rng, tmp_path):
    refused(our_own(rng, tmp_path, drop="zeros", version=1), "tensor 'weight.zeros' is missing")
    refused(our_own(rng, tmp_path, drop="perm"), "tensor 'weight.perm' is missing")
    packed = random_packed(rng, 5, 100, Spec(4, 32, "zero"))
    parts, quantization = store.to_tensors("weight", packed), {"quant_method": "shallow"}
    refused(write(tmp_path, parts, quantization), "its metadata is missing")
    metadata = {f"{MODULE}.weight": "[" * 100000}
    refused(write(tmp_path, parts, quantization, metadata), "unusable quantization metadata")


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
            checkpoint = open_unchecked(tmp_path)
            for name in checkpoint.names():
                checkpoint.shape(name), checkpoint.packed(name), checkpoint.read(name)
            read += 1
        except InputError:
            pass
    assert read < header / 2
