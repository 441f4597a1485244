"""Token ids equal those of transformers, sentencepiece and the tokenizer a GGUF was made from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers, processors
from vocabularies import SAMPLES, SPECIAL, byte_level, gguf_of_bpe, gguf_of_spm, train_spm

from engine.errors import InputError
from engine.text import Text, default_text, load_text, read_text_file, text_from_gguf, windows

SMOLLM = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def save(tokenizer: Tokenizer, path: Path, **config) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def same_as_transformers(text: Text, other) -> None:
    for sample in SAMPLES:
        ids = text.encode(sample)
        assert ids == other(sample)["input_ids"], sample
        assert text.encode(sample, add_special=False) == other.encode(
            sample, add_special_tokens=False
        ), sample
        assert text.decode(ids, skip_special=False) == other.decode(ids), sample
        assert text.decode(ids) == other.decode(ids, skip_special_tokens=True), sample


def test_directory_equals_transformers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_level(SMOLLM)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    added = {"700": {"content": "<tool>", "special": False, "normalized": False, "lstrip": False,
                     "rstrip": True, "single_word": False}}  # fmt: skip
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
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 2]}')
    text, other = load_text(path), AutoTokenizer.from_pretrained(path)
    other.backend_tokenizer.no_truncation()
    other.backend_tokenizer.no_padding()
    same_as_transformers(text, other)
    assert text.encode("a <tool>  b") == other("a <tool>  b")["input_ids"]
    assert (text.bos_id, text.eos_ids, text.vocab_size, text.max_length) == (1, (2, 3), 701, 77)
    assert text.special["eos_token"] == other.eos_token
    made = text.to_transformers()
    assert (made.bos_token, made.model_max_length) == ("<s>", 77)


def test_special_tokens_map_stands_in_for_the_config(tmp_path):
    from transformers import AutoTokenizer

    path = save(byte_level(), tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    (path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (path / "config.json").write_text('{"eos_token_id": 3, "max_position_embeddings": 99}')
    text, other = load_text(path), AutoTokenizer.from_pretrained(path)
    same_as_transformers(text, other)
    assert (text.bos_id, text.eos_ids, text.max_length) == (1, (2, 3), 99)


def comparable(sample: str) -> bool:
    """sentencepiece takes special tokens in a text for text, `tokenizers` byte pieces for bytes."""
    return not any(token in sample for token in (*SPECIAL, "<0x", "▁"))


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

    train_spm(tmp_path)
    config = {"add_bos_token": True, "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>",
              "tokenizer_class": "LlamaTokenizer"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text, other = load_text(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for sample in SAMPLES:
        # legacy: sentencepiece puts "▁" before every text, transformers not before one with a space
        if not legacy or (comparable(sample) and not sample.startswith(" ")):
            assert text.encode(sample) == other(sample)["input_ids"], sample


def test_gguf_splits_equal_transformers(tmp_path):
    """Every pre-tokenizer that transformers knows by name, on one vocabulary."""
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
    for pre, expected in (("llama-bpe", [700]), ("smaug-bpe", None)):
        metadata = gguf_of_bpe(
            tokenizer, pre, tokens=extra, token_type=[1] * len(extra), add_bos_token=None
        )
        text = text_from_gguf(metadata, "test.gguf")
        ids = text.encode(" qzxj")
        assert (ids == [1, *expected]) if expected else len(ids) > 2 and ids[0] != 1
    metadata["tokenizer.ggml.add_eos_token"] = True
    assert text_from_gguf(metadata, "test.gguf").encode("")[-1] == 2


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


def test_import_is_light():
    """Importing the text module takes neither torch nor transformers."""
    code = "import sys, engine.text; print({'torch', 'transformers', 'jinja2'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


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


def test_unsupported_decoder_and_lone_surrogate():
    from tokenizers import decoders

    tokenizer = byte_level()
    assert Text(tokenizer, "x").decode([1, 5]) == tokenizer.decode([1, 5])
    with pytest.raises(InputError, match="Unicode"):
        Text(tokenizer, "x").encode("\ud800")
    tokenizer.decoder = decoders.CTC()
    with pytest.raises(InputError, match="CTC"):
        Text(tokenizer, "x").decode([1])


def test_added_token_flags_survive():
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True)])
    assert Text(tokenizer, "x").encode("<|user|>  a")[1:] == tokenizer.encode("a").ids


def test_windows():
    ids = list(range(10))
    assert windows(ids, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(ids, 4, keep_partial=True) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert windows(ids, 5, keep_partial=True) == windows(ids, 5) == [ids[:5], ids[5:]]
    assert windows(ids, 11) == windows([], 3, keep_partial=True) == []
    with pytest.raises(InputError, match="at least 1"):
        windows(ids, 0)


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
    import engine.text

    data = Path(engine.text.__file__).parents[1] / "data"
    heldout = read_text_file(data / "heldout.txt")
    assert 100_000 < len(heldout) < 130_000 < len(default_text()) < 200_000
    paragraphs = [line for line in default_text().split("\n") if len(line) > 40]
    assert not any(line in heldout for line in paragraphs)
