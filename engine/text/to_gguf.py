"""A tokenizer as the metadata of a GGUF file, checked by reading that back.

llama.cpp knows two kinds: "gpt2", a byte-level BPE whose split into words has a name
(`tokenizer.ggml.pre`), and "llama", sentencepiece's BPE by scores. The name is found by what it
does: the one that cuts texts of many scripts where the tokenizer does.
"""

import json
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any

from tokenizers.pre_tokenizers import PreTokenizer

from engine.checkpoint.gguf_names import END_TOKENS
from engine.errors import InputError
from engine.text import spm
from engine.text.gguf import SPECIAL, SPLITS, text_from_gguf
from engine.text.text import Text

_SENTENCEPIECE_SPACE = "▁"
# Numbers, contractions, white space, marks, scripts with and without case and spaces, emoji.
PROBES = (
    "Hello, World! It's 1234567 o'clock; WE'RE here, I'd say. 3.14 3..3 0x1F",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nend  of   spaces ",
    "def f(x):\n    return {'a': [x**2, -1]} # ok\r\n\tpass",
    "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 ------=======",
    '```````""""......!!!!!!??????',
    "нещо на Български; ΑΒΓ αβγ; שלום עולם; مرحبا بالعالم ١٢٣; हिन्दी में पाठ",
    "កាន់តែពិសេសអាច 我想在apple工作1314151天～ 日本語のテキスト。 한국어 문장입니다",
    "I've been 'told he's there, 'RE you sure? 'M not sure, 'D you like some tea? We'Ve a'lL",
    "camelCaseWord HTTPServer naïve café Ünïcödé e\u0301 ＡＢＣ ½ ² Ⅷ",
)


def to_gguf(text: Text, size: int, architecture: str = "") -> dict[str, Any]:
    """The `tokenizer.*` entries for a vocabulary of `size` ids; ids without a token are padding.
    `architecture` is the GGUF's: a reader takes the white space behind Phi-3's tags along.

    Added tokens behind them, which no embedding is for, are left out, as by llama.cpp's converter.
    InputError where GGUF has no name for what the tokenizer does. What it has no word for is left
    out with a warning: NFC, as by llama.cpp's converter (Qwen), so that composed text alone is read
    alike, and what becomes of white space at the start of a text and around added tokens.
    """
    # First: as JSON a tokenizer is as long as its largest id.
    most = max(text.tokenizer.get_vocab(with_added_tokens=False).values(), default=0)
    if most >= size:
        raise InputError(f"{text.where}: token {most} has no row among {size} embeddings")
    described = json.loads(text.tokenizer.to_str())
    composes = (described["normalizer"] or {}).get("type") == "NFC"
    probes = [unicodedata.normalize("NFC", probe) if composes else probe for probe in PROBES]
    ends, reason = _ends(text, size), "cuts texts in another way"
    for fields in _kinds(described, text):
        fields |= _vocabulary(described, text, size, fields) | ends
        if text.chat_template is not None:
            fields["tokenizer.chat_template"] = text.chat_template
        try:
            read = text_from_gguf(fields | {"general.architecture": architecture}, text.where)
        except InputError as error:
            reason = f"cannot be read back: {error}"
            continue
        if all(read.encode(probe) == text.encode(probe) for probe in probes):
            _tell_what_is_lost(text, read, size, composes)
            return fields
    raise InputError(
        f"{text.where}: expected a tokenizer that GGUF has a name for, found one that {reason}"
    )


def _tell_what_is_lost(text: Text, read: Text, size: int, composes: bool) -> None:
    """Warnings of what the file reads otherwise: `read` is its tokenizer."""
    lost = []
    if composes:
        lost.append("NFC: decomposed text is read otherwise")
    spaces = next((x for x in (" a", "  a") if read.encode(x) != text.encode(x)), None)
    if spaces is not None:
        lost.append(f"rule for white space at the start: {spaces!r} is read otherwise")
    added = text.tokenizer.get_added_tokens_decoder().items()
    for token in (token.content for index, token in added if index < size):
        around = (f"a{token} b", f"a {token}b", f"a{token}b", f"{token}\nb")
        other = next((x for x in around if read.encode(x) != text.encode(x)), None)
        if other is not None:
            lost.append(f"rule for text around added tokens: {other!r} is read otherwise")
            break
    if set(text.eos_ids) - set(read.eos_ids):
        missing = sorted(set(text.eos_ids) - set(read.eos_ids))
        lost.append(f"third end of a text: it does not stop at the tokens {missing}")
    for each in lost:
        warnings.warn(f"{text.where}: GGUF has no word for the tokenizer's {each}", stacklevel=3)


def _kinds(described: dict[str, Any], text: Text) -> Iterator[dict[str, Any]]:
    """What the tokenizer may be, the likeliest first."""
    model = described["model"]
    if model["type"] != "BPE":
        raise InputError(f"{text.where}: GGUF takes a BPE tokenizer here, found {model['type']}")
    if model.get("byte_fallback"):
        prefixed = text.tokenizer.encode("a", add_special_tokens=False).tokens
        prefix = "".join(prefixed).startswith(_SENTENCEPIECE_SPACE)
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": prefix,
        }
        return
    whole, words = bool(model.get("ignore_merges")), _words(text.tokenizer.pre_tokenizer)
    for names, split in sorted(SPLITS.items(), key=lambda item: item[1].ignore_merges != whole):
        if _words(split.pre_tokenizer()) == words:
            first = names.removeprefix("default ").split()[0]  # llama.cpp's default is another
            yield {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": first}


def _words(cut: PreTokenizer | None) -> list[list[str]]:
    """Into what the probes are cut; a vocabulary without long tokens would not tell."""
    return [[word for word, _ in cut.pre_tokenize_str(probe)] for probe in PROBES if cut]


def _vocabulary(
    described: dict[str, Any], text: Text, size: int, kind: dict[str, Any]
) -> dict[str, Any]:
    """Tokens and their types by id, and what joins them: merges, or scores."""
    model = described["model"]
    byte_level = kind["tokenizer.ggml.model"] == "gpt2"
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, spm.NORMAL)
    for index, token in tokens.items():
        if not byte_level and token.startswith("<0x") and len(token) == 6:
            types[index] = spm.BYTE
    for added in described["added_tokens"]:
        index, plain = added["id"], added["content"]
        types[index] = spm.CONTROL if added["special"] else spm.USER_DEFINED
        # sentencepiece's mark stands for a space; a byte-level vocabulary means it as it is.
        whole = added["special"] or byte_level
        tokens[index] = plain if whole else plain.replace(_SENTENCEPIECE_SPACE, " ")
    unknown = text.tokenizer.token_to_id(model.get("unk_token") or "")
    if unknown is not None and not byte_level:
        types[unknown] = spm.UNKNOWN
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    fields: dict[str, Any] = {
        "tokenizer.ggml.tokens": [tokens.get(index, f"[PAD{index}]") for index in range(size)],
        "tokenizer.ggml.token_type": [types.get(index, spm.UNUSED) for index in range(size)],
    }
    if not merges:
        raise InputError(f"{text.where}: llama.cpp opens no BPE without merges, and this has none")
    if byte_level:
        return fields | {"tokenizer.ggml.merges": [" ".join(merge) for merge in merges]}
    # sentencepiece joins what gives the best score: here, the merge that comes first.
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    scores = [-float(ranks.get(tokens.get(index, ""), len(merges))) for index in range(size)]
    return fields | {"tokenizer.ggml.scores": scores}


def _ends(text: Text, size: int) -> dict[str, Any]:
    """The special tokens by name, those that end a text, and which of them go around one."""
    fields: dict[str, Any] = {}
    for name, key in SPECIAL.items():
        index = text.tokenizer.token_to_id(text.special.get(name, ""))
        if index is not None and index < size:
            fields[f"tokenizer.ggml.{key}"] = index
    known = {
        fields.get("tokenizer.ggml.eos_token_id"),
        *map(text.tokenizer.token_to_id, END_TOKENS),
    }
    others = [index for index in text.eos_ids if index < size and index not in known]
    for key, index in zip(("eot", "eom"), others, strict=False):
        fields[f"tokenizer.ggml.{key}_token_id"] = index
    bare, around = text.encode("a", add_special=False), text.encode("a")
    fields["tokenizer.ggml.add_bos_token"] = around[:1] != bare[:1]
    fields["tokenizer.ggml.add_eos_token"] = around[-1:] != bare[-1:]
    return fields
