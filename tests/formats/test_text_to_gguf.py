"""What a tokenizer loses on its way into a GGUF is said, and what it need not lose stays."""

import json
import warnings

import pytest
from support import tiny
from support.vocabularies import SPECIAL, byte_level
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from tokenizers.processors import TemplateProcessing

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.export.formats import export
from engine.text import Text, load_text
from engine.text.gguf import text_from_gguf
from engine.text.spm import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from engine.text.to_gguf import to_gguf

ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def opened(tokenizer: Tokenizer, path, named=ENDS, **generation) -> Text:
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    (path / "generation_config.json").write_text(json.dumps(generation))
    return load_text(path)


def pieces(*added: AddedToken, scheme: str = "", greedy: bool = False) -> Tokenizer:
    """Like sentencepiece's: "▁" for a space, by Metaspace's `scheme` or before every text.

    `greedy`: </s> and <|user|> take the white space behind them along, as Phi-3's.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    alphabet = [*"▁abcdefgh", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*SPECIAL, *alphabet, "▁a", "ab", "▁▁", "cd"]
    tokenizer.model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[("▁", "a"), ("a", "b"), ("▁", "▁"), ("c", "d")],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    )  # fmt: skip
    tags = [AddedToken(x, rstrip=greedy and i > 1, normalized=False) for i, x in enumerate(SPECIAL)]
    tokenizer.add_special_tokens(tags)
    tokenizer.add_tokens(list(added))
    return tokenizer


def silently(text: Text, size: int, architecture: str = "") -> tuple[dict, Text]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fields = to_gguf(text, size, architecture)
    return fields, text_from_gguf(fields | {"general.architecture": architecture}, "again")


def test_a_mark_in_an_added_token_of_bytes_stays(tmp_path):
    """DeepSeek's, that stand around a hole to be filled."""
    hole = "<｜fim▁hole｜>"
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(hole, normalized=False, special=False)])
    text = opened(tokenizer, tmp_path)
    fields, again = silently(text, 701)
    assert fields["tokenizer.ggml.tokens"][700] == hole
    assert again.encode(f"a{hole}b") == text.encode(f"a{hole}b")


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_white_space_at_the_start_of_a_text(scheme, tmp_path):
    text = opened(pieces(scheme=scheme), tmp_path)
    with pytest.warns(UserWarning, match="no word for the tokenizer's rule for white space at the"):
        to_gguf(text, text.vocab_size)
    silently(opened(pieces(), tmp_path), text.vocab_size)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_white_space_and_words_around_added_tokens(flag, tmp_path):
    text = opened(pieces(AddedToken("<x>", normalized=False, **{flag: True})), tmp_path)
    with pytest.warns(UserWarning, match="rule for text around added tokens: '.*<x>"):
        to_gguf(text, text.vocab_size)


def test_tags_of_phi3_take_white_space_along(tmp_path):
    """Readers know it of all its tags, by the architecture or the name of the model."""
    text = opened(pieces(greedy=True), tmp_path)
    silently(text, text.vocab_size, "phi3")
    with pytest.warns(UserWarning, match="rule for text around added tokens: 'a</s>"):
        to_gguf(text, text.vocab_size)


@pytest.mark.filterwarnings("ignore:llama.cpp has no windows")
def test_a_phi3_is_named_so(tmp_path):
    """By which llama.cpp knows its tags, where it has those that it asks of one."""
    for end, named in (("<|endoftext|>", "Phi-3 hf"), ("<|finish|>", "hf")):
        tokenizer = pieces(AddedToken(end, normalized=False), greedy=True)
        directory = tmp_path / end / "hf"
        tiny.write("phi3", directory, 1, vocab_size=tokenizer.get_vocab_size())
        opened(tokenizer, directory)
        source, out = open_checkpoint(directory), tmp_path / end / "out.gguf"
        export(source, source.config, out, "gguf")
        assert open_checkpoint(out).file.metadata["general.name"] == named


@pytest.mark.parametrize("name, said", [("Phi-3-like", "Phi 3-like"), ("tinyphi3", "tinyphi 3")])
def test_a_model_without_phi3s_tokens_is_not_named_so(name, said, tmp_path):
    """llama.cpp would ask for them, and not open it."""
    tokenizer = byte_level()
    tiny.write("llama", tmp_path / name, 1, vocab_size=tokenizer.get_vocab_size())
    opened(tokenizer, tmp_path / name)
    source, out = open_checkpoint(tmp_path / name), tmp_path / "out.gguf"
    export(source, source.config, out, "gguf")
    assert open_checkpoint(out).file.metadata["general.name"] == said


@pytest.mark.parametrize("ends", [[2], [2, 3], [3, 2, 9], [2, 3, 9, 11]])
def test_several_ends_of_a_text(ends, tmp_path):
    text = opened(byte_level(), tmp_path, eos_token_id=ends)
    assert text.eos_ids == tuple(sorted(ends))
    if len(ends) < 4:
        assert silently(text, 700)[1].eos_ids == text.eos_ids
        return
    with pytest.warns(UserWarning, match=r"it does not stop at the tokens \[11\]"):
        to_gguf(text, 700)


def test_ends_that_readers_know_by_name_take_no_place_of_others(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_end|>", "<one>", "<two>"])
    text = opened(tokenizer, tmp_path, eos_token_id=[2, 700, 701, 702])
    assert silently(text, 703)[1].eos_ids == (2, 700, 701, 702)


def test_what_goes_around_a_text(tmp_path):
    tokenizer, around = byte_level(), {"special_tokens": [("<s>", 1), ("</s>", 2)]}
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", **around)
    text = opened(tokenizer, tmp_path)
    ids = silently(text, 700)[1].encode("a")
    assert ids == text.encode("a") and (ids[0], ids[-1]) == (1, 2)


def test_a_named_token_without_an_embedding_is_left_out(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["[PAD]"])
    text = opened(tokenizer, tmp_path, ENDS | {"pad_token": "[PAD]"})
    fields, _ = silently(text, 700)
    assert "tokenizer.ggml.padding_token_id" not in fields
    assert silently(text, 701)[0]["tokenizer.ggml.padding_token_id"] == 700


def test_every_token_has_its_type(tmp_path):
    text = opened(pieces(AddedToken("<x>", normalized=False, special=False)), tmp_path)
    fields, _ = silently(text, text.vocab_size + 2)
    tokens, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    found = {token: types[tokens.index(token)] for token in ("<s>", "<0x41>", "ab", "<x>")}
    assert found == {"<s>": CONTROL, "<0x41>": BYTE, "ab": NORMAL, "<x>": USER_DEFINED}
    assert types[0] == UNKNOWN and types[-2:] == [UNUSED, UNUSED]


def test_a_token_without_an_embedding_is_refused(tmp_path):
    text = opened(byte_level(), tmp_path)
    with pytest.raises(InputError, match="token 699 has no row among 699 embeddings"):
        to_gguf(text, 699)


def test_a_vocabulary_without_merges_is_refused(tmp_path):
    tokenizer = byte_level()
    described = json.loads(tokenizer.to_str())
    described["model"]["merges"] = []
    text = opened(Tokenizer.from_str(json.dumps(described)), tmp_path)
    with pytest.raises(InputError, match="llama.cpp opens no BPE without merges"):
        to_gguf(text, 700)
