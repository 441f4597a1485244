"""Damaged tokenizers: one sentence that names the file, never a panic of the library."""

import random
import secrets

import pytest
from support.vocabularies import byte_level, gguf_of_bpe, train_spm

from engine.errors import InputError
from engine.text import load_text, text_from_gguf

BAD_GGUF = {
    "no tokenizer": {"tokens": None},
    "unknown model": {"model": "bert"},
    "unknown pre": {"pre": "martian"},
    "types too few": {"token_type": [1, 1]},
    "types of text": {"token_type": ["a"] * 700},
    "tokens not text": {"tokens": [1, 2]},
    "tokens not an array": {"tokens": "abc"},
    "token twice": {"tokens": ["a"] * 700},
    "merge of one": {"merges": ["ab"]},
    "merge of unknown": {"merges": ["a \u4e2d"]},
    "merge into unknown": {"merges": ["q z"]},
    "merge empty": {"merges": [" "]},
    "bos out of range": {"bos_token_id": 700},
    "eos negative": {"eos_token_id": -1},
    "eos not a number": {"eos_token_id": "</s>"},
    "bos wanted, not named": {"bos_token_id": None, "add_bos_token": True},
    "flag not a flag": {"add_bos_token": "yes"},
    "sentencepiece without scores": {"model": "llama"},
    "scores too many": {"model": "llama", "scores": [0.0] * 701},
}


@pytest.mark.parametrize("name", BAD_GGUF)
def test_bad_gguf(name):
    metadata = gguf_of_bpe(byte_level(), "gpt-2", **BAD_GGUF[name])
    with pytest.raises(InputError, match=r"^bad\.gguf: ") as error:
        text_from_gguf(metadata, "bad.gguf")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1200


BAD_FILES = {
    "nothing": {},
    "not json": {"tokenizer.json": b"{"},
    "not a tokenizer": {"tokenizer.json": b"{}"},
    "merges into nothing": {
        "tokenizer.json": b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE",'
        b'"vocab":{"a":0,"b":1},"merges":["a b"]}}'
    },
    "not sentencepiece": {"tokenizer.model": b"hello, this is text"},
    "empty sentencepiece": {"tokenizer.model": b""},
    "config not json": {"tokenizer.json": None, "tokenizer_config.json": b"\xff"},
    "config a list": {"tokenizer.json": None, "tokenizer_config.json": b"[]"},
    "config nested": {"tokenizer.json": None, "tokenizer_config.json": b"[" * 100_000},
    "token a number": {"tokenizer.json": None, "tokenizer_config.json": b'{"bos_token": 3}'},
    "token id gap": {
        "tokenizer.json": None,
        "tokenizer_config.json": b'{"added_tokens_decoder": {"900": {"content": "<x>"}}}',
    },
    "token id not a number": {
        "tokenizer.json": None,
        "tokenizer_config.json": b'{"added_tokens_decoder": {"x": {"content": "<x>"}}}',
    },
    "template a number": {"tokenizer.json": None, "tokenizer_config.json": b'{"chat_template": 3}'},
    "templates unnamed": {
        "tokenizer.json": None,
        "tokenizer_config.json": b'{"chat_template": [3]}',
    },
    "template not UTF-8": {"tokenizer.json": None, "chat_template.jinja": b"\xff"},
    "eos not a number": {
        "tokenizer.json": None,
        "generation_config.json": b'{"eos_token_id": "a"}',
    },
    "limit not a number": {
        "tokenizer.json": None,
        "config.json": b'{"max_position_embeddings":"a"}',
    },
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_directory(name, tmp_path):
    for file, content in BAD_FILES[name].items():
        if content is None:
            byte_level().save(str(tmp_path / file))
        else:
            (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_text(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_truncated_sentencepiece(tmp_path):
    pytest.importorskip("sentencepiece", reason="trains the model")
    data = train_spm(tmp_path).read_bytes()
    for cut in range(1, len(data), 97):
        (tmp_path / "tokenizer.model").write_bytes(data[:cut])
        try:
            load_text(tmp_path)  # a cut between two pieces leaves a smaller vocabulary
        except InputError as error:
            assert "tokenizer.model" in str(error)


@pytest.mark.parametrize(
    "part, option, value",
    [
        ("trainer_spec", "treat_whitespace_as_suffix", True),
        ("normalizer_spec", "escape_whitespaces", False),
    ],
)
def test_a_sentencepiece_model_that_marks_white_space_otherwise(part, option, value, tmp_path):
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="edits a model")
    model = protobuf.ModelProto.FromString(train_spm(tmp_path).read_bytes())
    setattr(getattr(model, part), option, value)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="tokenizer.model: expected a sentencepiece model with ▁"):
        load_text(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_mutated_files(file, tmp_path):
    """1,000 files with bytes changed, cut out or put in: a tokenizer, or one sentence."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    if file == "tokenizer.model":
        pytest.importorskip("sentencepiece", reason="trains the model")
        train_spm(tmp_path, "unigram", normalization_rule_name="nmt_nfkc", vocab_size=400)
    else:
        byte_level(size=300).save(str(tmp_path / file))
    whole = (tmp_path / file).read_bytes()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5, 20))):
            at, cut = rng.randrange(len(data)), rng.choice((0, 1, 1, 40))
            data[at : at + cut] = rng.randbytes(rng.choice((0, 1, 1, 8)))
        (tmp_path / file).write_bytes(data)
        try:
            text = load_text(tmp_path)
            text.decode(text.encode("Hello é 漢 <s> 12"))
        except InputError as error:
            assert "\n" not in str(error)
