"""Exported directories: compressed-tensors by its own library and transformers, GPTQ by its
formula; what the formats cannot hold is refused; a killed run goes on."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from support import exported, tiny
from support.close import assert_close
from support.exported import WIDE, assert_same_matrices, logits, packed_model

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.export import directory
from engine.export.formats import export
from engine.kernels.w4.format import Packed


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return {k: t for file in directory.glob("*.safetensors") for k, t in load_file(file).items()}


def modules_of(checkpoint) -> dict[str, Packed]:
    names = (name for name in checkpoint.names() if name.endswith(".weight"))
    found = {name.removesuffix(".weight"): checkpoint.packed(name) for name in names}
    return {module: packed for module, packed in found.items() if packed is not None}


COMPRESSED = {
    "symmetric": {"group": 32},
    "asymmetric": {"group": 32, "scheme": "zero"},
    "channel": {"group": 0, "scale_dtype": "bfloat16"},
    "eight": {"group": 16, "bits": 8, "scheme": "zero"},
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors_decompresses_to_our_values(kind, source, rng, tmp_path):
    from compressed_tensors.compressors import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationConfig

    ours = packed_model(source("qwen2", **WIDE), tmp_path / "ours", rng, **COMPRESSED[kind])
    export(ours, ours.config, tmp_path / "out", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig(**config).config_groups.values()
    stored, modules = tensors_of(tmp_path / "out"), modules_of(ours)
    assert len(modules) == 7 * 4
    for module in modules:
        parts = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in stored.items()
            if name.startswith(f"{module}.weight")
        }
        expected = ours.read(f"{module}.weight")
        parts["weight_scale"] = parts["weight_scale"].float()  # it multiplies in that dtype
        assert torch.equal(Compressor.decompress(parts, scheme)["weight"], expected), module
    assert_same_matrices(ours, open_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("case, v", [("gemma3", 8), ("phi3", 4), ("qwen2", 8), ("olmo2", 4)])
@torch.no_grad()
def test_compressed_tensors_in_transformers(case, v, source, rng, tmp_path):
    import transformers

    whole = source(case, **(WIDE if case != "phi3" else {"hidden_size": 96}))
    ours = packed_model(whole, tmp_path / "ours", rng, drop=(1,), group=16, v=v)
    export(ours, ours.config, tmp_path / "out", "compressed-tensors")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in said["ignore"]  # that of a tied model too, which has no tensor
    ids = torch.randint(3, tiny.VOCAB, (2, 40), generator=rng)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert_close(case, logits(ours, ids), peer(ids, use_cache=False).logits, 1e-3)


def _gptq_values(stored: dict[str, torch.Tensor], module: str, bits: int) -> torch.Tensor:
    """W.T = scales * (q - z) by AutoGPTQ's own shifts, in float32."""
    shifts = torch.arange(0, 32, bits)
    top = (1 << bits) - 1
    words, zeros = stored[f"{module}.qweight"], stored[f"{module}.qzeros"]
    q = (words[:, None] >> shifts[:, None] & top).flatten(0, 1)
    z = ((zeros[..., None] >> shifts & top) + 1).flatten(1)
    group = stored[f"{module}.g_idx"].long()
    return (stored[f"{module}.scales"].float()[group] * (q - z[group])).T


@pytest.mark.parametrize("recipe", [
    {"group": 32}, {"group": 0}, {"group": 16, "bits": 8},
    {"group": 16, "method": "gptq", "scheme": "symmetric", "act_order": True},
    {"group": 32, "scale_dtype": "bfloat16"},
], ids=str)  # fmt: skip
def test_gptq_by_its_formula(recipe, source, rng, tmp_path):
    ours = packed_model(source("llama", **WIDE), tmp_path / "ours", rng, **recipe)
    export(ours, ours.config, tmp_path / "out", "gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] == recipe.get("act_order", False) and config["sym"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    stored, modules = tensors_of(tmp_path / "out"), modules_of(ours)
    for module in modules:
        found = _gptq_values(stored, module, config["bits"])
        assert torch.equal(found, ours.read(f"{module}.weight")), module
    again = open_checkpoint(tmp_path / "out")
    if recipe.get("scale_dtype") is None and not config["desc_act"]:
        assert_same_matrices(ours, again)  # within a group, an order is sorted as it is read
    ids = torch.randint(3, tiny.VOCAB, (1, 20), generator=rng)
    assert torch.equal(logits(ours, ids), logits(again, ids))


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_fused_matrices_are_joined_and_layers_dropped(to, source, rng, tmp_path):
    ours = packed_model(source("phi3", hidden_size=96), tmp_path / "ours", rng, group=16)
    config = ours.config.keep([0, 3])
    export(ours, config, tmp_path / "out", to)
    again = open_checkpoint(tmp_path / "out")
    ids = torch.randint(3, tiny.VOCAB, (1, 30), generator=rng)
    assert torch.equal(logits(ours, ids, config), logits(again, ids))
    assert any("qkv_proj" in name for name in again.names()) and len(again.config.layers) == 2


def test_hf_is_what_the_values_are(source, rng, tmp_path):
    ours = packed_model(source("llama"), tmp_path / "ours", rng, group=16)
    export(ours, ours.config, tmp_path / "out", "hf", dtype=torch.float32)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == set(ours.names())
    for name, tensor in found.items():
        assert torch.equal(tensor, ours.read(name).float()), name


def test_hf_has_the_16_bits_of_what_was_quantized(rng, tmp_path):
    """Also where the embedding, whose dtype tells, is quantized: float16 lacks the range."""
    seed = int(torch.randint(2**31, (1,), generator=rng))
    tiny.build("qwen3", seed).bfloat16().save_pretrained(tmp_path / "whole")
    ours = packed_model(
        open_checkpoint(tmp_path / "whole"), tmp_path / "ours", rng, group=16, head=8
    )
    assert ours.dtype("model.embed_tokens.weight") is None
    export(ours, ours.config, tmp_path / "out", "hf")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("recipe, to, sentence", [
    ({"method": "nf4", "scheme": "codebook"}, "compressed-tensors",
     r"expected scheme symmetric or zero, found codebook \(`engine quantize --scheme symmetric` "
     r"makes one that it holds\); the nearest format that can is hf"),
    ({"method": "rtn", "scheme": "codebook"}, "gptq",
     r"expected scheme symmetric, found codebook \(`engine quantize --scheme symmetric` makes one "
     r"that it holds\); the nearest format that can is hf"),
    ({"scheme": "zero"}, "gptq",
     r"expected scheme symmetric, found zero \(.*\); the nearest format that can is compressed-t"),
    ({"head": 8}, "compressed-tensors", "embed_tokens.weight: a quantized tied embedding"),
    ({"head": 8}, "gptq", "with --dtype it is written in 16 bits"),
    ({"method": "gptq", "scheme": "symmetric", "act_order": True}, "compressed-tensors",
     "no longer has an activation order; the nearest format that can is gptq"),
    ({"scale_dtype": "float32"}, "gptq", "scales are no float16"),
    ({"v": 8}, "gptq", r"alike, found 4 bits, group 32 \(\S+\) and 8 bits, group 32 \(\S+v_proj\)"),
])  # fmt: skip
def test_what_cannot_be_said_is_refused(recipe, to, sentence, source, rng, tmp_path):
    tied = {"tie_word_embeddings": True} if "head" in recipe else {}
    ours = packed_model(source("llama", **WIDE, **tied), tmp_path / "ours", rng, **recipe)
    with pytest.raises(InputError, match=sentence) as refused:
        export(ours, ours.config, tmp_path / "out", to)
    assert str(refused.value).count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "ours"]
    if tied:
        export(ours, ours.config, tmp_path / "out", to, dtype=torch.float32)
        again = open_checkpoint(tmp_path / "out")
        ids = torch.randint(3, tiny.VOCAB, (1, 20), generator=rng)
        assert torch.equal(logits(ours, ids), logits(again, ids))


def test_a_head_of_rows_that_no_words_hold_is_refused(source, rng, tmp_path):
    whole = source("llama", **WIDE, vocab_size=tiny.VOCAB + 5)
    ours = packed_model(whole, tmp_path / "ours", rng, head=4)
    with pytest.raises(InputError, match=r"its shape \(165, 96\) does not divide by 8"):
        export(ours, ours.config, tmp_path / "out", "gptq")


def test_unquantized_models_and_unknown_formats_are_refused(source, tmp_path):
    plain = source("llama")
    for to in ("compressed-tensors", "gptq"):
        with pytest.raises(InputError, match="quantized.*; the nearest format that can is hf"):
            export(plain, plain.config, tmp_path / "out", to)
    with pytest.raises(InputError, match="to: expected one of compressed-tensors, gptq, gguf, hf"):
        export(plain, plain.config, tmp_path / "out", "awq")
    with pytest.raises(InputError, match="model: exists already"):
        export(plain, plain.config, tmp_path / "model", "hf")


def test_a_killed_export_goes_on(source, rng, tmp_path, monkeypatch):
    from engine.export import compressed_tensors

    ours = packed_model(source("llama"), tmp_path / "ours", rng, group=16)

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(ours, ours.config, tmp_path / "out", "compressed-tensors", progress=kill)
    assert not (tmp_path / "out").exists()
    encoded = []
    original = compressed_tensors.CompressedTensors.encode
    monkeypatch.setattr(
        compressed_tensors.CompressedTensors,
        "encode",
        lambda self, packed: encoded.append(packed) or original(self, packed),
    )
    export(ours, ours.config, tmp_path / "out", "compressed-tensors")
    assert len(encoded) == 2 * 7  # two of four layers were there
    assert_same_matrices(ours, open_checkpoint(tmp_path / "out"))


def test_a_run_with_another_dtype_begins_anew(source, rng, tmp_path):
    """Without one norms stay as they are stored, of which config.json says nothing."""
    ours = packed_model(source("llama"), tmp_path / "ours", rng, group=16)

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(ours, ours.config, tmp_path / "out", "compressed-tensors", progress=kill)
    export(ours, ours.config, tmp_path / "out", "compressed-tensors", dtype=torch.float16)
    files = (tmp_path / "out").glob("*.safetensors")
    dtypes = {
        tensor.dtype
        for file in files
        for name, tensor in load_file(file).items()
        if name.endswith("norm.weight")
    }
    assert dtypes == {torch.float16}


def test_a_library_that_is_not_here_hides_no_reason(source, rng, tmp_path, monkeypatch):
    ours = packed_model(source("llama", **WIDE), tmp_path / "ours", rng, scale_dtype="float32")
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    with pytest.raises(InputError, match="scales are no float16") as refused:
        export(ours, ours.config, tmp_path / "out", "gptq")
    assert "pip install" not in str(refused.value)
    with pytest.raises(InputError, match="pip install"):
        export(ours, ours.config, tmp_path / "out", "compressed-tensors")


def test_a_full_disk_is_one_sentence(source, rng, tmp_path):
    import resource

    ours = packed_model(source("llama"), tmp_path / "ours", rng, group=16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for to, name in (("compressed-tensors", "out"), ("hf", "half")):
            with pytest.raises(InputError, match="File too large"):
                export(ours, ours.config, tmp_path / name, to)
            assert not (tmp_path / name).exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    export(ours, ours.config, tmp_path / "out", "compressed-tensors")
    assert exported.logits(open_checkpoint(tmp_path / "out"), torch.tensor([[3]])).isfinite().all()


def test_a_tokenizer_that_finds_no_room_is_one_sentence(default_model, tmp_path):
    """Written anew from a GGUF by tokenizers, which raises no OSError."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(InputError, match="File too large"):
            directory.copy_tokenizer(default_model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
