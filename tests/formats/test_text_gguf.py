"""Tokenizers from GGUF metadata: transformers', sentencepiece's, and those they were made from."""

import pytest
from support.versions import skip_before
from support.vocabularies import (
    SAMPLES,
    SMOLLM,
    SPECIAL,
    byte_level,
    comparable,
    gguf_of_bpe,
    gguf_of_spm,
    same_as_transformers,
    train_spm,
)
from tokenizers import Regex, pre_tokenizers

from engine.errors import InputError
from engine.text import heldout_text, load_text, text_from_gguf


def test_gguf_splits_equal_transformers():
    """Every pre-tokenizer that transformers knows by name, on one vocabulary."""
    skip_before("5.20", "splits the texts of a GGUF by other rules")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        convert_gguf_tokenizer,
    )

    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    from engine.text.gguf import _SPLIT_OF

    shared = ["gpt-2", *GGUF_PRE_TOKENIZER_SPLITS.keys() & _SPLIT_OF.keys()]
    assert {"llama-bpe", "qwen2", "tekken", "dbrx", "smaug-bpe", "gpt-4o"} <= set(shared)
    for pre in shared:
        metadata = gguf_of_bpe(tokenizer, pre)
        names = {"tokens": "tokens", "merges": "merges", "token_type": "token_type",
                 "tokenizer_type": "model", "pre_tokenizer_type": "pre"}  # fmt: skip
        described = {key: metadata[f"tokenizer.ggml.{name}"] for key, name in names.items()}
        other, _ = convert_gguf_tokenizer("llama", described)
        text = text_from_gguf(metadata, "test.gguf")
        for sample in SAMPLES:
            ids = text.encode(sample, add_special=False)
            if not _SPLIT_OF[pre].ignore_merges:  # transformers does not know of it
                assert ids == other.encode(sample, add_special_tokens=False).ids, (pre, sample)
            assert text.decode(ids, skip_special=False) == sample


@pytest.mark.parametrize(
    ("pre", "original"),
    [
        ("smollm", SMOLLM),
        ("phi-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "deepseek-v3",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                    pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
                    pre_tokenizers.Split(
                        Regex(
                            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
                            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
                            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                        ),
                        "isolated",
                    ),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        ),
    ],
)
def test_gguf_equals_the_tokenizer_it_was_made_from(pre, original):
    tokenizer = byte_level(original)
    tokenizer.add_special_tokens(SPECIAL)
    text = text_from_gguf(gguf_of_bpe(tokenizer, pre), "test.gguf")
    for sample in SAMPLES:
        ids = tokenizer.encode(sample).ids
        assert text.encode(sample) == ids, sample
        assert text.decode(ids) == tokenizer.decode(ids), sample


def test_gguf_takes_whole_words_and_adds_bos():
    """llama-bpe: a word that is a token skips the merges; BOS unless the file says no."""
    tokenizer = byte_level()
    extra = [*gguf_of_bpe(tokenizer, "llama-bpe")["tokenizer.ggml.tokens"], "Ġqzxj"]
    for pre, expected in (("llama-bpe", [700]), ("glm4", [700]), ("smaug-bpe", None)):
        metadata = gguf_of_bpe(
            tokenizer, pre, tokens=extra, token_type=[1] * len(extra), add_bos_token=None
        )
        text = text_from_gguf(metadata, "test.gguf")
        ids = text.encode(" qzxj")
        begun = [1] if pre == "llama-bpe" else []
        assert (ids == [*begun, *expected]) if expected else len(ids) > 2 and ids[0] != 1
    metadata["tokenizer.ggml.add_eos_token"] = True
    assert text_from_gguf(metadata, "test.gguf").encode("")[-1] == 2


def test_gguf_of_a_model_without_bos():
    """Where the file does not say whether a text begins with one."""
    metadata = gguf_of_bpe(byte_level(), "llama-bpe", add_bos_token=None, bos_token_id=None)
    text = text_from_gguf(metadata, "test.gguf")
    assert text.bos_id is None and text.encode("a") == text.encode("a", add_special=False)


def test_gguf_without_types_names_what_is_no_text():
    text = text_from_gguf(gguf_of_bpe(byte_level(), "gpt-2", token_type=None), "test.gguf")
    ids = text.encode("<s>a</s>")
    assert (ids[0], ids[-1]) == (1, 2) and text.decode(ids) == "a"


@pytest.mark.parametrize(("kind", "ends"), [(1, (2,)), (3, (2, 700))])
def test_gguf_ends_at_tokens_of_a_known_name_that_are_no_text(kind, ends):
    metadata = gguf_of_bpe(byte_level(), "gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["<|im_end|>"]
    metadata["tokenizer.ggml.token_type"] += [kind]
    assert text_from_gguf(metadata, "test.gguf").eos_ids == ends


def test_gguf_tokens_that_are_empty_or_come_twice():
    """Padding is empty, however many ids it takes."""
    metadata = gguf_of_bpe(byte_level(), "gpt-2", token_type=None)
    expected, tokens = text_from_gguf(metadata, "x").encode("Hello"), "tokenizer.ggml.tokens"
    text = text_from_gguf(metadata | {tokens: [*metadata[tokens], "", ""]}, "test.gguf")
    assert text.encode("Hello") == expected and text.vocab_size == 702
    with pytest.raises(InputError, match="test.gguf: .* the same token twice"):
        text_from_gguf(metadata | {tokens: [*metadata[tokens], "a"]}, "test.gguf")


def test_gguf_sentencepiece(tmp_path):
    """sentencepiece's own ids; after a special token the text gets its prefix again."""
    spm = pytest.importorskip("sentencepiece", reason="trains the model and is the oracle")
    model = train_spm(tmp_path)
    oracle = spm.SentencePieceProcessor(str(model))
    text = text_from_gguf(gguf_of_spm(model), "test.gguf")
    assert (text.bos_id, text.eos_ids, text.encode("")) == (1, (2,), [1])
    for sample in SAMPLES:
        if comparable(sample):
            assert text.encode(sample) == [1, *oracle.encode(sample)], sample
            assert text.decode([1, *oracle.encode(sample)]) == oracle.decode(oracle.encode(sample))
    assert text.encode("a</s> b", False) == [*oracle.encode("a"), 2, *oracle.encode(" b")]
    bare = text_from_gguf(gguf_of_spm(model, add_space_prefix=False, add_bos_token=False), "x")
    assert bare.decode(bare.encode("  a b")) == "  a b"


def test_gguf_sentencepiece_without_types(tmp_path):
    """Bytes are known by their text then, as to llama.cpp."""
    pytest.importorskip("sentencepiece", reason="trains the model")
    model = train_spm(tmp_path)
    text = text_from_gguf(gguf_of_spm(model), "test.gguf")
    bare = text_from_gguf(gguf_of_spm(model, token_type=None), "test.gguf")
    assert bare.encode("The 12 \u3042") == text.encode("The 12 \u3042")


def test_gguf_user_defined_and_phi3_tokens(tmp_path):
    pytest.importorskip("sentencepiece", reason="trains the model")
    metadata = gguf_of_spm(train_spm(tmp_path), add_space_prefix=False, add_bos_token=False)
    metadata["tokenizer.ggml.tokens"] += ["    ", "<|end|>", "<|user|>"]
    metadata["tokenizer.ggml.scores"] += [-1000.0] * 3
    metadata["tokenizer.ggml.token_type"] += [4, 3, 4]
    text = text_from_gguf(metadata, "gemma.gguf")
    ids = text.encode("a     <|end|>\n<|user|>")
    assert ids.count(800) == ids.count(801) == ids.count(802) == 1
    assert text.eos_ids == (2, 801)
    assert text.decode(ids) == "a     \n<|user|>"
    text = text_from_gguf(metadata | {"general.architecture": "phi3"}, "phi3.gguf")
    assert text.encode("<|end|>\n\n<|user|> a")[:2] == [801, 802]
    assert text.encode("<s>\n")[1:] == text.encode("\n")


def test_gguf_file_equals_transformers(tmp_path):
    """Written by the gguf package, read through `load_text` and by transformers."""
    import gguf
    from transformers import AutoTokenizer

    skip_before("5.23", "reads the tokens of a GGUF otherwise")
    metadata = gguf_of_bpe(byte_level(), "gpt-2", add_bos_token=True)
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif key != "general.architecture":
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    text = load_text(tmp_path / "toy.gguf")
    same_as_transformers(text, AutoTokenizer.from_pretrained(tmp_path, gguf_file="toy.gguf"))
    assert text.max_length == 256


def test_default_model_equals_transformers(default_model):
    """transformers ignores the file's rule that every digit stands alone: see the last line."""
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
    text = load_text(default_model)
    assert (text.vocab_size, text.bos_id, text.eos_ids, text.max_length) == (49152, 1, (0, 2), 8192)
    heldout = heldout_text()
    for sample in [*SAMPLES, heldout, *heldout.split("\n")]:
        if "½" not in sample:
            assert text.encode(sample) == other(sample)["input_ids"], sample
            assert text.decode(text.encode(sample), skip_special=False) == sample
    chat = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Yo"}]
    expected = other.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert text.chat(chat) == expected
    assert text.encode("a ½") != other("a ½")["input_ids"]
