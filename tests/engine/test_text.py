"""Token ids and texts equal those of transformers and of sentencepiece; shipped texts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.vocabularies import (
    SAMPLES,
    SMOLLM,
    SPECIAL,
    byte_level,
    comparable,
    same_as_transformers,
    train_spm,
)
from tokenizers import AddedToken, Tokenizer, processors

from engine.errors import InputError
from engine.text import (
    Text,
    default_text,
    heldout_text,
    load_text,
    mixed_text,
    read_text_file,
)


def save(tokenizer: Tokenizer, path: Path, **config) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_directory_equals_transformers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_level(SMOLLM, size=999)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    flags = {"special": False, "normalized": False, "lstrip": False, "rstrip": True,
             "single_word": False}  # fmt: skip
    added = {"1000": {"content": "<look>"} | flags, "999": {"content": "<tool>"} | flags}
    path = save(
        tokenizer,
        tmp_path,
        added_tokens_decoder=added,
        bos_token="<s>",
        eos_token={"__type": "AddedToken", "content": "</s>"},
        extra_special_tokens=["<|user|>"],
        model_max_length=77,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    (path / "special_tokens_map.json").write_text('{"eos_token": "<|user|>"}')
    (path / "config.json").write_text('{"eos_token_id": 3, "max_position_embeddings": 99}')
    (path / "generation_config.json").write_text('{"eos_token_id": 0}')
    text, other = load_text(path), AutoTokenizer.from_pretrained(path)
    other.backend_tokenizer.no_truncation()
    other.backend_tokenizer.no_padding()
    same_as_transformers(text, other)
    assert text.encode("a <tool>  <look> b") == other("a <tool>  <look> b")["input_ids"]
    assert (text.bos_id, text.eos_ids, text.vocab_size, text.max_length) == (1, (0, 2), 1001, 77)
    assert text.special["eos_token"] == other.eos_token
    made = text.to_transformers()
    assert (made.bos_token, made.model_max_length) == ("<s>", 77)


def test_special_tokens_map_stands_in_for_the_config(tmp_path):
    from transformers import AutoTokenizer

    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}
    path = save(byte_level(), tmp_path, **named)
    (path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (path / "config.json").write_text('{"eos_token_id": 3, "max_position_embeddings": 99}')
    (path / "generation_config.json").write_text('{"do_sample": true}')
    text, other = load_text(path), AutoTokenizer.from_pretrained(path)
    same_as_transformers(text, other)
    assert (text.bos_id, text.eos_ids, text.max_length) == (1, (2, 3), 99)
    made = text.to_transformers()
    assert (made.pad_token, made.model_max_length) == ("<unk>", 99)


@pytest.mark.parametrize(
    "named",
    [
        {"additional_special_tokens": ["<|tool|>"]},
        {"extra_special_tokens": ["<|tool|>"]},
        {"extra_special_tokens": {"tool_token": "<|tool|>"}},
    ],
    ids=str,
)
def test_special_tokens_that_the_config_alone_knows(named, tmp_path):
    from transformers import AutoTokenizer

    path = save(byte_level(), tmp_path, tokenizer_class="PreTrainedTokenizerFast", **named)
    ids = AutoTokenizer.from_pretrained(path)("a<|tool|>tool_token")["input_ids"]
    text = load_text(path)
    assert text.encode("a<|tool|>tool_token") == ids
    assert ids[1] == 700 and "<" not in text.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("normalise", [False, True])
def test_sentencepiece_model(tmp_path, kind, normalise):
    """A directory with only tokenizer.model: ids of sentencepiece itself, and of transformers."""
    spm = pytest.importorskip("sentencepiece", reason="trains the model and is the oracle")
    options = {"user_defined_symbols": ["<sep>", "▁▁"]} if kind == "bpe" else {}
    if normalise:
        options |= {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    model = train_spm(tmp_path, kind, **options)
    oracle = spm.SentencePieceProcessor(str(model))
    text = load_text(tmp_path)
    for sample in [*SAMPLES, "a<sep> b  c<sep>", "x" * 9]:
        if comparable(sample):
            assert text.encode(sample) == oracle.encode(sample), sample
            assert text.decode(oracle.encode(sample)) == oracle.decode(oracle.encode(sample))
    assert (text.bos_id, text.eos_ids) == (1, (2,))


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_directory_equals_transformers(tmp_path, legacy):
    pytest.importorskip("sentencepiece", reason="trains the model; transformers needs it")
    pytest.importorskip("google.protobuf", reason="transformers needs it")
    from transformers import AutoTokenizer

    train_spm(tmp_path, control_symbols=["[INST]"])
    config = {"add_bos_token": True, "legacy": legacy, "bos_token": "<s>", "eos_token": "[INST]",
              "tokenizer_class": "LlamaTokenizer"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text, other = load_text(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    made = text.to_transformers()
    for sample in SAMPLES:
        assert made(sample)["input_ids"] == text.encode(sample), sample
        # legacy: sentencepiece puts "▁" before every text, transformers not before one with a space
        if not legacy or (comparable(sample) and not sample.startswith(" ")):
            assert text.encode(sample) == other(sample)["input_ids"], sample
    assert text.encode("[INST]a") == other("[INST]a")["input_ids"]
    assert text.decode(text.encode("[INST]a")) == "a"
    assert text.eos_ids == (other.eos_token_id,)


def test_import_is_light():
    """Importing the text module takes neither torch nor transformers."""
    code = "import sys, engine.text; print({'torch', 'transformers', 'jinja2'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_unsupported_decoder_and_lone_surrogate():
    from tokenizers import decoders

    tokenizer = byte_level()
    assert Text(tokenizer, "x").decode([1, 5]) == tokenizer.decode([1, 5])
    with pytest.raises(InputError, match="Unicode"):
        Text(tokenizer, "x").encode("\ud800")
    strip = decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])  # of every token
    for decoder, named in ((decoders.CTC(), "CTC"), (strip, "Strip")):
        tokenizer.decoder = decoder
        with pytest.raises(InputError, match=named):
            Text(tokenizer, "x").decode([1])


def test_added_token_flags_survive():
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True)])
    assert Text(tokenizer, "x").encode("<|user|>  a")[1:] == tokenizer.encode("a").ids


def test_bytes_that_tokens_span_are_of_the_text_alone():
    """Whatever the tokenizer puts around it."""
    tokenizer, sample = byte_level(), "The end"
    around = {"special_tokens": [("<s>", 1)]}
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", **around)
    text = Text(tokenizer, "x")
    assert text.span_bytes(sample, len(text.encode(sample, add_special=False))) == len(sample)


def test_text_files(tmp_path):
    good = tmp_path / "good.txt"
    good.write_bytes("déjà\r\nvu".encode())
    assert read_text_file(good) == "déjà\r\nvu"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    for name, found in (("absent", "No such"), (".", "irectory"), ("empty.txt", "empty"),
                        ("latin.txt", "0xe9 at offset 3")):  # fmt: skip
        with pytest.raises(InputError, match=found):
            read_text_file(tmp_path / name)


def test_shipped_texts_are_apart():
    """What is calibrated on is not what is measured on."""
    heldout = heldout_text()
    assert 100_000 < len(heldout) < 130_000 < len(default_text()) < 210_000
    assert 130_000 < len(mixed_text()) < 150_000
    for text in (default_text(), mixed_text()):
        paragraphs = [line for line in text.split("\n") if len(line) > 40]
        assert not any(line in heldout for line in paragraphs)
