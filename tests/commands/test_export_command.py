"""`engine export` and `engine prune` of what is quantized: what they write, say and refuse."""

import os
from pathlib import Path

import pytest
import torch
from support import llama_files, vocabularies
from support.commands import call, refused
from support.exported import packed_model
from tokenizers import normalizers

from engine.artifacts import Plan
from engine.checkpoint import open_checkpoint


@pytest.fixture
def packed(source, rng, tmp_path):
    whole = source("llama", vocab_size=300, hidden_size=64, num_attention_heads=4)
    vocabularies.byte_level(vocabularies.SMOLLM, 300).save(str(whole.path / "tokenizer.json"))
    packed_model(whole, tmp_path / "packed", rng, group=16)
    return tmp_path / "packed"


def test_a_model_goes_to_every_format(packed, tmp_path):
    for to, name in (("compressed-tensors", "ct"), ("gptq", "gptq"), ("hf", "half")):
        code, said, err = call("export", packed, tmp_path / name, "--to", to, "--drop", "1-2")
        assert code == 0, err
        assert f"{tmp_path / name}: 2 of 4 layers, {to}" in said
        assert len(open_checkpoint(tmp_path / name).config.layers) == 2
    code, said, err = call("export", tmp_path / "half", tmp_path / "half.gguf", "--to", "gguf")
    assert code == 0, err
    half = open_checkpoint(tmp_path / "half.gguf")
    assert len(half.config.layers) == 2
    assert half.read("model.layers.0.mlp.up_proj.weight").dtype == torch.float16
    call("export", tmp_path / "half.gguf", tmp_path / "wide", "--to", "hf", "--dtype", "float32")
    assert open_checkpoint(tmp_path / "wide").read("model.norm.weight").dtype == torch.float32


def test_a_plan_chooses_the_layers(packed, tmp_path):
    checkpoint = open_checkpoint(packed)
    from engine.checkpoint.weights import lineage_hash

    made_for = checkpoint.config.architecture_hash, lineage_hash(checkpoint, checkpoint.config)
    plan = Plan("packed", *made_for, 4, (0, 3), "manual", None, (), None, None, "")
    plan.save(tmp_path / "plan.json")
    asked = ("export", packed, tmp_path / "out", "--to", "gptq", "--plan", tmp_path / "plan.json")
    code, said, err = call(*asked)
    assert code == 0 and "2 of 4 layers" in said, err
    assert call("prune", packed, tmp_path / "cut", "--plan", tmp_path / "plan.json")[0] == 0
    assert len(open_checkpoint(tmp_path / "cut").config.layers) == 2


def test_refusals_are_one_sentence_and_write_nothing(packed, tmp_path):
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out.gguf"
    refused("expected one of compressed-tensors, gptq, gguf, hf, found 'awq'",
            "export", packed, out, "--to", "awq")  # fmt: skip
    refused("expected blocks of 32; the nearest format that can is compressed-tensors",
            "export", packed, out, "--to", "gguf")  # fmt: skip
    refused("exists already", "export", packed, packed, "--to", "gptq")
    refused(
        "no/out: there is no directory", "export", packed, tmp_path / "no" / "out", "--to", "gptq"
    )
    refused("keeps the bits that it has", "prune", packed, tmp_path / "o", "--dtype", "float16")
    refused("Missing option '--to'", "export", packed, out)
    no_text = Path(os.fsdecode(os.fsencode(tmp_path / "name") + b"\xff"))
    expected, drop = "expected a name in UTF-8", ("--drop", 0)
    refused(expected, "prune", packed, no_text, *drop)
    refused(expected, "prune", no_text, tmp_path / "o", *drop)
    refused(expected, "shrink", packed, no_text)
    cached = "--steps", 1, "--text", __file__, "--cache", no_text
    refused(expected, "heal", packed, tmp_path / "o", *drop, *cached)
    assert sorted(tmp_path.iterdir()) == before


def composing(whole) -> None:
    """Gives it a tokenizer of a kind that GGUF has no word for."""
    tokenizer = vocabularies.byte_level(vocabularies.SMOLLM, 300)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(whole.path / "tokenizer.json"))


def test_a_refusal_says_nothing_of_what_another_format_would_lose(source, rng, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    whole = source("llama", vocab_size=300, **sizes)
    composing(whole)
    packed_model(whole, tmp_path / "packed", rng, group=32, scheme="minimum")
    asked = ("export", tmp_path / "packed", tmp_path / "out", "--to", "gptq")
    refused("the nearest format that can is gguf", *asked)
    code, _, err = call("export", tmp_path / "packed", tmp_path / "out.gguf", "--to", "gguf")
    assert code == 0 and "GGUF has no word for the tokenizer's NFC" in err


def test_a_refusal_says_nothing_of_what_would_be_lost(source, tmp_path):
    whole = source("olmo2", vocab_size=300, tie_word_embeddings=True)
    composing(whole)
    asked = ("export", whole.path, tmp_path / "out.gguf", "--to", "gguf")
    refused("llama.cpp loads no olmo2 with a head that is the embedding", *asked)


def test_a_gguf_is_pruned_to_a_gguf(tmp_path):
    def two(fields, tensors):
        fields["llama.block_count"] = 2
        for name in [name for name in tensors if name.startswith("blk.0.")]:
            tensors[name.replace("blk.0.", "blk.1.")] = tensors[name]

    llama_files.write_tiny(tmp_path / "model.gguf", two)
    code, said, err = call("prune", tmp_path / "model.gguf", tmp_path / "o.gguf", "--drop", 0)
    assert code == 0 and "1 of 2 layers" in said, err
    refused("expected a name that ends in .gguf",
            "prune", tmp_path / "model.gguf", tmp_path / "directory", "--drop", 0)  # fmt: skip
