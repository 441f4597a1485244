"""Hugging Face directories quantized by others, and our own packed ones, read as plain names."""

import json
import secrets
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.packed import every_spec, random_packed, spec_id
from support.quantized import CASES, HEAD, MODULE, compressed, gptq, plain_names, values, write

from engine.checkpoint import open_unchecked
from engine.kernels.w4 import store
from engine.kernels.w4.format import Packed, Spec, unpack
from engine.quantize.methods import rtn
from engine.runtime.reference import ReferenceRuntime


@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_source_means(case, rng, tmp_path):
    parts, config, weight = CASES[case](rng)
    checkpoint = open_unchecked(write(tmp_path, parts, config))
    name = f"{MODULE}.weight"
    assert sorted(checkpoint.names()) == sorted(plain_names())
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
    assert checkpoint.packed(HEAD) is None and checkpoint.nbytes(HEAD) == 2 * 32 * 100
    assert torch.equal(checkpoint.read(HEAD), values((32, 100)))
    assert checkpoint.shape(HEAD) == (32, 100)


def test_older_gptq_keeps_its_settings_in_a_file_of_its_own(rng, tmp_path):
    parts, config, weight = gptq(rng, desc_act=True)
    write(tmp_path, parts, None)
    for key in ("quant_method", "checkpoint_format", "pack_dtype"):
        del config[key]
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    assert torch.equal(open_unchecked(tmp_path).read(f"{MODULE}.weight"), weight)


def test_older_compressed_tensors_have_another_key(rng, tmp_path):
    parts, config, weight = compressed(rng)
    write(tmp_path, parts, config)
    described = json.loads((tmp_path / "config.json").read_text())
    described["compression_config"] = described.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert torch.equal(open_unchecked(tmp_path).read(f"{MODULE}.weight"), weight)


@pytest.mark.parametrize("permuted", [False, True], ids=["", "permuted"])
@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_our_own_survives_the_disk(spec, permuted, rng, tmp_path):
    name, packed = f"{MODULE}.weight", random_packed(rng, 5, 100, spec, permuted)
    parts = store.to_tensors("weight", packed)
    write(tmp_path, parts, {"quant_method": "shallow"}, store.to_metadata(name, packed))
    checkpoint = open_unchecked(tmp_path)
    loaded = checkpoint.packed(name)
    assert (loaded.spec, loaded.shape) == (spec, (5, 100)) == (packed.spec, checkpoint.shape(name))
    for part, tensor in packed.tensors().items():
        assert torch.equal(loaded.tensors()[part], tensor)
    assert checkpoint.nbytes(name) == sum(part.nbytes for part in parts.values())
    assert torch.equal(checkpoint.read(name), unpack(packed))


@pytest.mark.parametrize("permuted", [False, True], ids=["", "permuted"])
@pytest.mark.parametrize("scheme", ("zero", "codebook", "kquant"))
def test_our_own_of_version_1_are_read(scheme, permuted, rng, tmp_path):
    """Arrays in the place of tiles."""
    name, packed = f"{MODULE}.weight", random_packed(rng, 5, 100, Spec(4, 32, scheme), permuted)
    parts = {f"weight.{part}": tensor for part, tensor in packed.tensors().items()}
    quantization = {"quant_method": "shallow", "version": 1}
    write(tmp_path, parts, quantization, store.to_metadata(name, packed))
    loaded = open_unchecked(tmp_path).packed(name)
    assert loaded.spec == packed.spec and loaded.tensors().keys() == packed.tensors().keys()
    assert all(torch.equal(loaded.tensors()[k], each) for k, each in packed.tensors().items())


@pytest.mark.parametrize("case", ["llama", "phi3"])  # phi3 stores q, k, v and gate, up fused
def test_a_packed_model_is_the_model_of_its_values(case, rng, tmp_path):
    """Logits from packed matrices are the logits of a plain directory of what they unpack to."""
    tiny.write(case, tmp_path / "plain", secrets.randbits(32))
    file = tmp_path / "plain" / "model.safetensors"
    plain, packed, metadata = load_file(file), {}, {}
    for name in [name for name in plain if name.endswith("_proj.weight")]:
        matrix = rtn(plain[name], Spec(4, 32, "minimum"), name=name)
        packed |= store.to_tensors(name, matrix)
        metadata |= store.to_metadata(name, matrix)
        plain[name] = unpack(matrix)
    save_file(plain, file)
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    kept = {name: plain[name] for name in plain if name not in metadata}
    save_file(kept | packed, tmp_path / "packed" / "model.safetensors", metadata)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "shallow"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))

    logits = []
    tokens = torch.randint(3, tiny.VOCAB, (2, 20), generator=rng)
    for directory in (tmp_path / "plain", tmp_path / "packed"):
        checkpoint = open_unchecked(directory)
        runtime = ReferenceRuntime.load(checkpoint, checkpoint.config)
        logits.append(runtime.forward(tokens, runtime.new_cache(2), logits="all"))
    assert len(metadata) >= 4 and torch.equal(*logits)


def test_mapped_packed_tensors_are_views(rng, tmp_path):
    """Opening reads the header only: the tiles are the file's own pages."""
    name, packed = f"{MODULE}.weight", random_packed(rng, 64, 256, Spec(4, 64, "symmetric"))
    metadata = store.to_metadata(name, packed)
    write(tmp_path, store.to_tensors("weight", packed), {"quant_method": "shallow"}, metadata)
    checkpoint = open_unchecked(tmp_path)
    first, second = (checkpoint.packed(name).stored["tiles"] for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


def test_store_round_trip_in_memory(rng):
    packed = random_packed(rng, 3, 70, Spec(4, 32, "kquant"))
    tensors, metadata = store.to_tensors("a.weight", packed), store.to_metadata("a.weight", packed)
    assert set(tensors) == {"a.weight.tiles", "a.weight.supers"}
    again = store.from_tensors("a.weight", tensors.__getitem__, metadata["a.weight"])
    assert torch.equal(unpack(again), unpack(packed))
    with pytest.raises(ValueError, match=r"mins must be \(3, 3\), found \(2, 3\)"):
        store.to_tensors("a.weight", replace(packed, mins=packed.mins[:2]))
    tensors["a.weight.supers"] = tensors["a.weight.supers"][:, :, :1]
    words = r"^a\.weight: supers must be \(1, 1, 2, 16\), found \(1, 1, 1, 16\)"
    with pytest.raises(ValueError, match=words):
        store.from_tensors("a.weight", tensors.__getitem__, metadata["a.weight"])
