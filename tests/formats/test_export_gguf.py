"""Exported GGUFs: blocks by the gguf package, models tensor by tensor as llama.cpp's converter has
them, tokenizers by their ids; what GGUF has no word for is refused."""

import tempfile
import unicodedata
import warnings
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from support import llama_files, tiny, vocabularies
from support.exported import WIDE, assert_same_matrices, logits, packed_model
from support.packed import every_spec, random_packed, spec_id
from tokenizers import Regex, normalizers, pre_tokenizers

from engine.checkpoint import open_checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks, dequantize
from engine.checkpoint.gguf_file import GgufFile
from engine.errors import InputError
from engine.export.formats import export, prune
from engine.export.gguf import Gguf
from engine.export.gguf_blocks import to_blocks
from engine.export.gguf_file import typed_fields
from engine.export.tensors import stored_tensors
from engine.kernels.w4.format import Spec, pack_codes, unpack, unpack_codes
from engine.kernels.w4.from_gguf import BLOCKS, from_blocks
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.text import load_text, text_from_gguf
from engine.text.gguf import SPLITS
from engine.text.to_gguf import to_gguf

VOCAB = 300
HALVES = [
    spec
    for spec in every_spec()
    if spec.scale_dtype == torch.float16
    and (spec.scheme in ("symmetric", "kquant") or (spec.scheme, spec.bits) == ("minimum", 4))
    and spec.group != 16
]


def test_empty_lists_are_left_out():
    """A tokenizer without merges: an empty list has no type that the format could name."""
    said = typed_fields({"tokenizer.ggml.merges": [], "a": [1], "b": "", "c": 0})
    assert {key: field.value for key, field in said.items()} == {"a": [1], "b": "", "c": 0}


@pytest.mark.parametrize("spec", HALVES, ids=spec_id)
def test_blocks_have_the_packed_values(spec, rng):
    packed = random_packed(rng, 5, 512, spec)
    blocks = to_blocks(packed)
    assert isinstance(blocks, GgufBlocks), blocks
    found = gguf.quants.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[blocks.type])
    assert np.array_equal(found.view(np.uint32), unpack(packed).numpy().view(np.uint32))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K"])
def test_blocks_come_back_byte_for_byte(kind, rng):
    block = BLOCKS[kind]
    shape = (3, 4 * block.weights)
    weights = torch.randn(shape, generator=rng).numpy()
    if kind == "Q4_K":  # the package reads these and does not write them
        data = torch.randint(0, 256, (3, 4 * block.nbytes), generator=rng, dtype=torch.uint8)
        supers = torch.rand(3 * 4 * 2, generator=rng).half().view(torch.uint8)
        data.view(-1, block.nbytes)[:, :4] = supers.view(-1, 4)
    else:
        data = torch.from_numpy(gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind]))
    again = to_blocks(from_blocks(kind, shape, data))
    assert isinstance(again, GgufBlocks) and again.type == kind and torch.equal(again.data, data)


def test_iq4_nl_comes_back_byte_for_byte(rng):
    data = torch.randint(0, 256, (3 * 4, 18), generator=rng, dtype=torch.uint8)
    data[:, :2] = torch.randn(3 * 4, 1, generator=rng).half().view(torch.uint8)
    packed = from_blocks("IQ4_NL", (3, 128), data)
    again = to_blocks(packed)
    assert isinstance(again, GgufBlocks) and again.type == "IQ4_NL"
    assert torch.equal(again.data.flatten(), data.flatten())


def of_eight_bits(kind, rng):
    """Random blocks as they are packed: 3 rows of 4."""
    block = BLOCKS[kind]
    data = torch.randint(0, 256, (3 * 4, block.nbytes), generator=rng, dtype=torch.uint8)
    scales = torch.randn(3 * 4 * 2, generator=rng).half().view(torch.uint8).view(-1, 4)
    if kind == "Q6_K":
        data[:, -2:] = scales[:, :2]
        data[1, 192:194] = torch.tensor([128, 1])  # -128 is a scale, and 128 none
    else:
        data[:, : 2 if kind == "Q5_0" else 4] = scales[:, : 2 if kind == "Q5_0" else 4]
    data[0] = 0  # a block of scale 0
    return from_blocks(kind, (3, 4 * block.weights), data)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_K", "Q6_K"])
def test_blocks_that_became_eight_bits_go_back(kind, rng):
    """Their values and our codes; the two factors of a scale may be others of the same product."""
    packed = of_eight_bits(kind, rng)
    again = to_blocks(packed)
    assert isinstance(again, GgufBlocks) and again.type == kind
    found = from_blocks(kind, packed.shape, again.data)
    assert all(torch.equal(part, found.tensors()[name]) for name, part in packed.tensors().items())


@pytest.mark.parametrize("kind, outside, sentence", [
    ("Q5_0", (111, 144), None), ("Q5_1", (32,), "no blocks of 8 bits"),
    ("Q5_K", (32,), "scales are no float16"), ("Q6_K", (95, 160), "groups of 16"),
])  # fmt: skip
def test_a_code_that_five_or_six_bits_do_not_have(kind, outside, sentence, rng):
    packed = of_eight_bits(kind, rng)
    for code in outside:
        codes = unpack_codes(packed)
        codes[1, 5] = code
        other = replace(packed, codes=pack_codes(codes, 8))
        found = to_blocks(other)
        if sentence is None:
            assert found.type == "Q8_0" and torch.equal(dequantize(found), unpack(other))
        else:
            assert sentence in str(found)


@pytest.mark.parametrize("spec, sentence", [
    (Spec(4, 32, "codebook"), "no codebook"), (Spec(8, 32, "minimum"), "no blocks of 8 bits"),
    (Spec(4, 16, "symmetric"), "groups of 16, expected blocks of 32"),
    (Spec(4, 32, "symmetric", torch.float32), "scales are no float16"),
    (Spec(4, 32, "zero"), "zero points times their scales are no float16"),
])  # fmt: skip
def test_what_has_no_blocks(spec, sentence, rng):
    assert sentence in str(to_blocks(random_packed(rng, 8, 512, spec)))
    assert "order" in str(to_blocks(random_packed(rng, 8, 512, Spec(4, 32, "symmetric"), True)))


def save_tokenizer(directory, split=vocabularies.SMOLLM) -> None:
    vocabularies.byte_level(split, VOCAB).save(str(directory / "tokenizer.json"))


# What a GGUF cannot say is set to what llama.cpp takes for granted.
SAYABLE = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
}
REFUSED = {
    "llama-dynamic": "no dynamic scaling",
    "qwen2-window": "windows must follow one period",
    "smollm3-window": "windows must follow one period",
    "phi2-qk-norm-tied": "GGUF says qk_norm None, and the model has 'head'",
}


@pytest.mark.filterwarnings("ignore:llama.cpp has no windows")
@pytest.mark.parametrize("case", sorted(set(tiny.CASES) - REFUSED.keys()))
def test_every_family_as_its_converter_has_it(case, tmp_path, rng):
    seed = int(torch.randint(2**31, (1,), generator=rng))
    model = tiny.write(case, tmp_path / "hf", seed, vocab_size=VOCAB, **SAYABLE.get(case, {}))
    save_tokenizer(tmp_path / "hf")
    checkpoint, out = open_checkpoint(tmp_path / "hf"), tmp_path / "out.gguf"
    export(checkpoint, checkpoint.config, out, "gguf")
    llama_files.convert(model, tmp_path / "reference.gguf")
    theirs = {
        tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "reference.gguf").tensors
    }
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        atol = 1e-6 if name.startswith("rope") else 0
        np.testing.assert_allclose(tensor.data, theirs[name].data, rtol=0, atol=atol, err_msg=name)
    again = open_checkpoint(out)
    assert again.config.max_context == checkpoint.config.max_context
    ids = torch.randint(3, VOCAB, (2, 40), generator=rng)
    torch.testing.assert_close(logits(checkpoint, ids), logits(again, ids), rtol=1e-4, atol=1e-4)


def test_a_window_that_no_text_fills_is_none(tmp_path):
    """Where GGUF has no word for one."""
    tiny.write("qwen2-window", tmp_path / "hf", 1, vocab_size=VOCAB, sliding_window=256)
    save_tokenizer(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert {entry.window for entry in checkpoint.config.layers} == {None, 256}
    export(checkpoint, checkpoint.config, tmp_path / "out.gguf", "gguf")
    again = open_checkpoint(tmp_path / "out.gguf").config
    assert again.max_context == 256 and {entry.window for entry in again.layers} == {None}


def test_yarn_is_told_by_the_keys_that_llama_cpp_reads(tmp_path):
    """It multiplies its own factor by `attn_factor`; betas it takes as 32 and 1."""
    betas = {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.7}
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 64
    for name, more in (("usual", {}), ("betas", betas)):
        tiny.write("llama", tmp_path / name, 1, vocab_size=VOCAB, rope_parameters=rope | more)
        save_tokenizer(tmp_path / name)
    usual, other = (open_checkpoint(tmp_path / name) for name in ("usual", "betas"))
    export(usual, usual.config, tmp_path / "usual.gguf", "gguf")
    with pytest.warns(UserWarning, match="llama.cpp reads no beta_fast and beta_slow for llama"):
        export(other, other.config, tmp_path / "betas.gguf", "gguf")
    again, told = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("usual", "betas"))
    assert "llama.rope.scaling.attn_factor" not in again.file.metadata
    factor = told.file.metadata["llama.rope.scaling.attn_factor"]
    assert factor == pytest.approx(1.7 / usual.config.layers[0].rope.attention_factor)
    for ours, theirs in ((usual, again), (other, told)):
        rope, said = ours.config.layers[0].rope, theirs.config.layers[0].rope
        assert said.attention_factor == pytest.approx(rope.attention_factor)
        assert replace(said, attention_factor=rope.attention_factor) == rope


@pytest.mark.filterwarnings("ignore:llama.cpp has no windows")
def test_longrope_is_told_by_its_divisors_alone(tmp_path):
    """ik_llama.cpp dies of a type that it does not know; llama.cpp's converter writes none."""
    tiny.write("phi3-longrope", tmp_path / "hf", 1, vocab_size=VOCAB)
    save_tokenizer(tmp_path / "hf")
    checkpoint, out = open_checkpoint(tmp_path / "hf"), tmp_path / "out.gguf"
    export(checkpoint, checkpoint.config, out, "gguf")
    again = open_checkpoint(out)
    assert "phi3.rope.scaling.type" not in again.file.metadata
    ours, theirs = (each.config.layers[0].rope for each in (checkpoint, again))
    assert theirs.kind == "longrope" and theirs.long_divisors == ours.long_divisors


def test_an_attention_factor_is_of_all_layers(tmp_path):
    """llama.cpp multiplies the rotations of Gemma's layers with a window by it, scaled or not."""
    whole = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    whole["original_max_position_embeddings"] = 64
    local = {"rope_type": "default", "rope_theta": 1e4}
    for name, more in (("usual", {}), ("other", {"attention_factor": 1.7})):
        ropes = {"full_attention": whole | more, "sliding_attention": local}
        sizes = SAYABLE["gemma3"] | {"vocab_size": VOCAB, "rope_parameters": ropes}
        tiny.write("gemma3", tmp_path / name, 1, **sizes)
        save_tokenizer(tmp_path / name)
    usual, other = (open_checkpoint(tmp_path / name) for name in ("usual", "other"))
    export(usual, usual.config, tmp_path / "usual.gguf", "gguf")
    with pytest.raises(InputError, match="one attention factor for the rotations of all layers"):
        export(other, other.config, tmp_path / "other.gguf", "gguf")


@pytest.mark.parametrize("case", ["gemma3", "qwen3"])
def test_added_tokens_without_an_embedding_are_left_out(case, tmp_path):
    """Gemma 3 1B has one, of the family's larger models: <image_soft_token>."""
    tiny.write(case, tmp_path / "hf", 1, vocab_size=VOCAB, **SAYABLE.get(case, {}))
    tokenizer = vocabularies.byte_level(vocabularies.SMOLLM, VOCAB)
    tokenizer.add_special_tokens(["<image_soft_token>"])
    assert tokenizer.token_to_id("<image_soft_token>") == VOCAB
    tokenizer.save(str(tmp_path / "hf/tokenizer.json"))
    checkpoint = open_checkpoint(tmp_path / "hf")
    export(checkpoint, checkpoint.config, tmp_path / "out.gguf", "gguf")
    again = open_checkpoint(tmp_path / "out.gguf")
    assert again.config.vocab_size == VOCAB
    assert len(again.file.metadata["tokenizer.ggml.tokens"]) == VOCAB


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_has_no_word_for(case, tmp_path):
    tiny.write(case, tmp_path / "hf", 1, vocab_size=VOCAB)
    save_tokenizer(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    with pytest.raises(InputError, match=f"{REFUSED[case]}.*the nearest format that can is hf"):
        export(checkpoint, checkpoint.config, tmp_path / "out.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("case, keep, sentence", [
    ("gemma3", [0, 2, 3, 4], "windows must follow one period"),
    ("smollm3", [0, 1, 3], "GGUF says every fourth layer has none"),
    ("gemma2", None, "GGUF says attention_scale"),
])  # fmt: skip
def test_cuts_that_gguf_has_no_word_for(case, keep, sentence, tmp_path):
    changes = SAYABLE.get(case, {}) if keep else {}
    tiny.write(case, tmp_path / "hf", 1, vocab_size=VOCAB, **changes)
    save_tokenizer(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    config = checkpoint.config.keep(keep) if keep else checkpoint.config
    with pytest.raises(InputError, match=f"{sentence}.*the nearest format that can is hf"):
        export(checkpoint, config, tmp_path / "out.gguf", "gguf")


@pytest.mark.parametrize("case, changes, words", [
    ("qwen2", {"rope_parameters": tiny._LLAMA3 | {"rope_theta": 1e4}}, "divisors of rotary"),
    ("qwen3", {"attention_bias": True}, "biases where the family has none"),
    ("olmo2", {"tie_word_embeddings": True}, "a head that is the embedding"),
    ("gemma2", {"tie_word_embeddings": False}, "a head of its own"),
    ("qwen2", {"head_dim": 10}, "heads that are not as wide"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                   "partial_rotary_factor": 0.5}}, "rotary embeddings of a part"),
])  # fmt: skip
def test_what_llama_cpp_does_not_load(case, changes, words, tmp_path):
    tiny.write(case, tmp_path / "hf", 1, vocab_size=VOCAB, **SAYABLE.get(case, {}) | changes)
    save_tokenizer(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    with pytest.raises(InputError, match=f"llama.cpp loads no {case} with {words}"):
        export(checkpoint, checkpoint.config, tmp_path / "out.gguf", "gguf")


@pytest.mark.parametrize("case, layers", [("gemma2", 46), ("gemma3", 62)])
def test_a_scale_that_follows_from_the_number_of_layers(case, layers, tmp_path):
    """Of Gemma 27B, whose file loses it with a layer."""
    sizes = {"num_hidden_layers": layers, "query_pre_attn_scalar": 8}
    if case == "gemma3":
        sizes["layer_types"] = None
    model = tiny.write(case, tmp_path, 1, **sizes)
    llama_files.convert(model, tmp_path / "whole.gguf")
    source = open_checkpoint(tmp_path / "whole.gguf")
    assert source.config.attention_scale == pytest.approx(8**-0.5)
    with pytest.raises(InputError, match=f"GGUF says attention_scale 0.25 of {layers - 6} layers"):
        prune(source, source.config.keep(range(layers - 6)), tmp_path / "out.gguf")


@pytest.mark.parametrize("recipe", [
    {"group": 32}, {"group": 64}, {"group": 0}, {"group": 32, "scheme": "minimum", "head": 8},
    {"group": 64, "bits": 8}, {"group": 64, "scheme": "codebook"},
    {"group": 64, "scheme": "codebook", "v": 8}, {"group": 32, "scheme": "minimum", "v": 8},
], ids=str)  # fmt: skip
def test_packed_models_keep_their_bits(recipe, source, rng, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    whole = source("llama", **sizes, vocab_size=VOCAB, tie_word_embeddings=True)
    save_tokenizer(whole.path)
    ours = packed_model(whole, tmp_path / "ours", rng, drop=(2,), **recipe)
    export(ours, ours.config, tmp_path / "out.gguf", "gguf")
    again = open_checkpoint(tmp_path / "out.gguf")
    ids = torch.randint(3, VOCAB, (1, 20), generator=rng)
    assert torch.equal(logits(ours, ids), logits(again, ids))
    pack(again, again.config, tmp_path / "back", Recipe(method="keep", head=None))
    if recipe["group"] == 32:
        assert_same_matrices(ours, open_checkpoint(tmp_path / "back"))
    export(open_checkpoint(tmp_path / "back"), again.config, tmp_path / "twice.gguf", "gguf")
    first, second = (GgufFile(tmp_path / f"{name}.gguf") for name in ("out", "twice"))
    for name, tensor in first.tensors.items():
        other = second.tensors[name]
        data = [
            file.data[t.offset : t.offset + t.nbytes]
            for file, t in ((first, tensor), (second, other))
        ]
        assert tensor.type == other.type and torch.equal(*data), name


def test_eight_bits_have_no_code_that_llama_cpp_never_writes(source, rng, tmp_path):
    """-128, which ik_llama.cpp misreads; in what others quantized it is told."""
    whole = source("llama", **WIDE, vocab_size=VOCAB)
    save_tokenizer(whole.path)
    ours = packed_model(whole, tmp_path / "ours", rng, bits=8, head=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(ours, ours.config, tmp_path / "out.gguf", "gguf")
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    found = [t.data for t in tensors if t.tensor_type == gguf.GGMLQuantizationType.Q8_0]
    codes = np.concatenate([data.reshape(-1, 34)[:, 2:].view(np.int8).ravel() for data in found])
    assert (codes.min(), codes.max()) == (-127, 127)
    theirs = Gguf(whole, whole.config, None)
    for slot in (None, *range(len(whole.config.layers))):
        for item, stored in stored_tensors(whole, whole.config, slot):
            if item.role == "up":
                stored = random_packed(rng, *item.shape, Spec(8, 32, "symmetric"))
            theirs.look(item, stored)
    with pytest.warns(UserWarning, match=r"mlp\.up_proj\.weight has codes of -128"):
        theirs.ready()


def test_a_run_killed_behind_any_tensor_goes_on(source, tmp_path):
    """With a vector of rope divisors, which no layer holds, among them."""
    checkpoint = source("llama-llama3", vocab_size=VOCAB)
    save_tokenizer(checkpoint.path)
    straight, out = tmp_path / "straight.gguf", tmp_path / "out.gguf"
    export(checkpoint, checkpoint.config, straight, "gguf")
    expected = straight.read_bytes().replace(b"straight", b"out")
    for stop in range(1, len(GgufFile(straight).tensors)):

        def kill(done: int, _: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, checkpoint.config, out, "gguf", progress=kill)
        export(checkpoint, checkpoint.config, out, "gguf")
        assert out.read_bytes() == expected, stop
        out.unlink()


def test_what_appears_meanwhile_is_not_replaced(source, tmp_path):
    checkpoint, out = source("llama", vocab_size=VOCAB), tmp_path / "out.gguf"
    save_tokenizer(checkpoint.path)

    def another_program(*_: int) -> None:
        out.write_text("mine")

    with pytest.raises(InputError, match=r"out.gguf: exists already"):
        export(checkpoint, checkpoint.config, out, "gguf", progress=another_program)
    assert out.read_text() == "mine"


def test_blocks_of_a_gguf_pass_through(tmp_path):
    def quantize(fields, tensors):
        for name, kind in (("attn_q", "Q5_0"), ("attn_k", "Q8_0"), ("ffn_up", "Q4_1")):
            kind, name = gguf.GGMLQuantizationType[kind], f"blk.0.{name}.weight"
            tensors[name] = gguf.quants.quantize(tensors[name], kind), kind
        fields["general.author"] = "somebody"

    llama_files.write_tiny(tmp_path / "model.gguf", quantize)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    export(checkpoint, checkpoint.config, tmp_path / "copy.gguf", "gguf")
    export(checkpoint, checkpoint.config, tmp_path / "half.gguf", "gguf", dtype=torch.float16)
    whole, half = (GgufFile(tmp_path / f"{name}.gguf") for name in ("copy", "half"))
    assert dict(whole.metadata) == dict(checkpoint.file.metadata)
    assert half.metadata["tokenizer.ggml.tokens"] == whole.metadata["tokenizer.ggml.tokens"]
    for name, tensor in checkpoint.file.tensors.items():
        data = checkpoint.file.data[tensor.offset : tensor.offset + tensor.nbytes]
        for file in (whole, half):
            other = file.tensors[name]
            if file is whole or tensor.type.dtype is None:
                assert torch.equal(file.data[other.offset : other.offset + other.nbytes], data)
            else:
                assert other.type.name == ("F32" if len(other.shape) == 1 else "F16")


LLAMA3 = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(SPLITS["glm4"].patterns[0]), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])  # fmt: skip


@pytest.mark.parametrize("split, pre", [
    (None, "gpt-2"), (vocabularies.SMOLLM, "smollm"), (LLAMA3, "dbrx"),
], ids=["gpt-2", "smollm", "dbrx"])  # fmt: skip
def test_the_split_into_words_gets_its_name(split, pre, tmp_path):
    vocabularies.byte_level(split).save(str(tmp_path / "tokenizer.json"))
    text = load_text(tmp_path)
    fields = to_gguf(text, text.vocab_size + 5)
    assert fields["tokenizer.ggml.pre"] == pre
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{text.vocab_size + 4}]"
    again = text_from_gguf(fields, "again")
    for sample in vocabularies.SAMPLES:
        assert again.encode(sample) == text.encode(sample)


def test_a_tokenizer_that_composes_is_told_without(tmp_path):
    """As Qwen's: GGUF tokenizers normalise nothing, and composed text is read alike."""
    tokenizer = vocabularies.byte_level(vocabularies.SMOLLM)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = load_text(tmp_path)
    with pytest.warns(UserWarning, match="GGUF has no word for the tokenizer's NFC"):
        fields = to_gguf(text, text.vocab_size)
    assert fields["tokenizer.ggml.pre"] == "smollm"
    again = text_from_gguf(fields, "again")
    for sample in (unicodedata.normalize("NFC", sample) for sample in vocabularies.SAMPLES):
        assert again.encode(sample) == text.encode(sample)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="expected a tokenizer that GGUF has a name for"):
        to_gguf(load_text(tmp_path), text.vocab_size)


@pytest.mark.parametrize("name", ["SmolLM2-1.7B-packed", "Llama-3.2-1B"])
def test_a_name_keeps_what_follows_its_dots(name, source, rng, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    whole = source("llama", **sizes, vocab_size=VOCAB)
    save_tokenizer(whole.path)
    ours = packed_model(whole, tmp_path / name, rng, group=32)
    export(ours, ours.config, tmp_path / "out.gguf", "gguf")
    assert GgufFile(tmp_path / "out.gguf").metadata["general.name"] == name


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_told_by_scores(prefix, tmp_path):
    vocabularies.train_spm(tmp_path, add_dummy_prefix=prefix)
    text = load_text(tmp_path)
    fields = to_gguf(text, text.vocab_size)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] == prefix
    again = text_from_gguf(fields, "again")
    for sample in filter(vocabularies.comparable, vocabularies.SAMPLES):
        assert again.encode(sample) == text.encode(sample), sample


def test_a_split_without_a_name_is_refused(tmp_path):
    odd = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("[aeiou]"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    vocabularies.byte_level(odd).save(str(tmp_path / "tokenizer.json"))
    text = load_text(tmp_path)
    with pytest.raises(InputError, match="expected a tokenizer that GGUF has a name for"):
        to_gguf(text, text.vocab_size)


def test_no_other_disk_needs_room(tmp_path, monkeypatch):
    """That of TMPDIR may be full, or not there."""
    llama_files.write_tiny(tmp_path / "source.gguf")
    checkpoint = open_checkpoint(tmp_path / "source.gguf")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    prune(checkpoint, checkpoint.config, tmp_path / "out.gguf")
    assert GgufFile(tmp_path / "out.gguf").tensors.keys() == checkpoint.file.tensors.keys()
