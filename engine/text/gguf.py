"""The tokenizer that a GGUF file describes in its metadata, as llama.cpp reads it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.checkpoint.gguf_names import END_TOKENS
from engine.errors import InputError
from engine.text import spm
from engine.text.damage import tokenizer_errors
from engine.text.special import add_ends, add_special
from engine.text.text import Text

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ONE = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*")


def _cased(suffix: str, digits: str) -> str:
    """Words split where lower case turns to upper case (o200k, tekken)."""
    return (
        f"{_ONE}{_UPPER}*{_LOWER}+{suffix}|{_ONE}{_UPPER}+{_LOWER}*{suffix}|{digits}|{_CASED_TAIL}"
    )


@dataclass(frozen=True)
class Split:
    """How a text is cut into words before BPE: patterns applied one after the other."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # where the file does not say

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*steps, byte_level])


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_WORD}|\p{{N}}|{_TAIL}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")

# `tokenizer.ggml.pre` by what it means. A file without one, or with "default", is read as GPT-2's:
# llama.cpp has an older split for it, of which it warns itself that it degrades the output.
SPLITS = {
    "default gpt-2 phi-2 olmo mpt jais trillion exaone4 gigachat a.x-4.0 mellum": Split((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": Split((r"\p{N}", _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Split(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "glm4": Split((_LLAMA3,), ignore_merges=True),
    "dbrx smaug-bpe chatglm-bpe": Split((_LLAMA3,)),
    "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan kormo f2llmv2 grok-2 solar-open": Split(
        (_QWEN2,)
    ),
    "tekken": Split((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2": Split((_cased(f"{_CONTRACTION}?", r"\p{N}{1,3}"),)),
    "deepseek-v3 hunyuan-dense": Split(_DEEPSEEK3),
    "deepseek-coder": Split(_DEEPSEEK_CODER),
}
_SPLIT_OF = {name: split for names, split in SPLITS.items() for name in names.split()}

SPECIAL = {  # as templates know them -> tokenizer.ggml. ...
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


_BYTE = re.compile("<0x[0-9A-F]{2}>")


class _Metadata:
    """The `tokenizer.*` entries of one file, checked as they are read."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self.metadata, self.where = metadata, where
        tokens = self.array("tokens", str)
        if tokens is None:
            raise InputError(f"{where}: expected a tokenizer, found no tokenizer.ggml.tokens")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        if len(set(self.tokens)) != len(self.tokens):
            raise InputError(f"{where}: tokenizer.ggml.tokens has the same token twice")
        self.types = self.sized("token_type", int) or list(map(self._type, self.tokens))

    def _type(self, token: str) -> int:
        """Where the file does not say; as llama.cpp, which knows bytes by their text."""
        return spm.BYTE if self.is_sentencepiece and _BYTE.fullmatch(token) else spm.NORMAL

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.{name}", default)
        if value is not default and not isinstance(value, kind):
            raise InputError(
                f"{self.where}: expected tokenizer.{name} of type {kind.__name__},"
                f" found {value!r:.80}"
            )
        return value

    def array(self, name: str, kind: type) -> list | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        value = list(value) if not isinstance(value, (str, bytes, int, float)) else [None]
        if set(map(type, value)) - {kind}:
            raise InputError(
                f"{self.where}: expected tokenizer.ggml.{name} to be an array of {kind.__name__}"
            )
        return value

    def sized(self, name: str, kind: type) -> list | None:
        """An array that speaks of every token."""
        value = self.array(name, kind)
        if value is not None and len(value) != len(self.tokens):
            raise InputError(
                f"{self.where}: expected tokenizer.ggml.{name} of {len(self.tokens)} entries,"
                f" one a token, found {len(value)}"
            )
        return value

    @property
    def is_sentencepiece(self) -> bool:
        return self.metadata.get("tokenizer.ggml.model") == "llama"

    def of_type(self, *kinds: int) -> list[str]:
        listed = zip(self.tokens, self.types, strict=True)
        return [token for token, kind in listed if kind in kinds]

    def mark_control(self, tokens: set[str]) -> None:
        """Files without types, or with wrong ones, still name the tokens that must not be text."""
        for token in tokens:
            if self.types[index := self.tokens.index(token)] == spm.NORMAL:
                self.types[index] = spm.CONTROL

    def token(self, name: str, default: int | None = None) -> str | None:
        index = self.get(f"ggml.{name}", int, default)
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise InputError(
                f"{self.where}: tokenizer.ggml.{name} is {index}, expected below {len(self.tokens)}"
            )
        return self.tokens[index]


def _byte_level(data: _Metadata, split: Split) -> Tokenizer:
    """A byte-level BPE: `data.tokens` and the merges in GPT-2's byte alphabet."""
    merges = [tuple(merge.split(" ", 1)) for merge in data.array("merges", str) or ()]
    vocabulary = {token: i for i, token in enumerate(data.tokens)}
    # `tokenizers` panics, with a trace on stderr, where two tokens make none.
    parts = chain.from_iterable(merges), map("".join, merges)
    if set(map(len, merges)) - {2} or not all(map(vocabulary.__contains__, chain(*parts))):
        raise InputError(
            f"{data.where}: expected every entry of tokenizer.ggml.merges to be two tokens"
            " that make a third, found otherwise"
        )
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(data: _Metadata) -> Tokenizer:
    scores = data.sized("scores", float)
    if scores is None:
        raise InputError(f"{data.where}: a sentencepiece vocabulary needs tokenizer.ggml.scores")
    prefix = "every" if data.get("ggml.add_space_prefix", bool, True) else "never"
    return spm.build(spm.Vocabulary(data.tokens, scores, data.types, prefix))


def _tokenizer(data: _Metadata) -> tuple[Tokenizer, bool]:
    """The model and its split into words, and whether it takes a BOS where the file is silent."""
    model, pre = data.get("ggml.model", str), data.get("ggml.pre", str, "default")
    if model == "llama":
        return _sentencepiece(data), True
    if model != "gpt2":
        raise InputError(
            f"{data.where}: expected tokenizer.ggml.model gpt2 or llama, found {model!r}"
        )
    if pre not in _SPLIT_OF:
        known = ", ".join(sorted(_SPLIT_OF))
        raise InputError(f"{data.where}: expected tokenizer.ggml.pre among {known}, found {pre!r}")
    return _byte_level(data, _SPLIT_OF[pre]), _SPLIT_OF[pre].add_bos


def _add_types(tokenizer: Tokenizer, data: _Metadata) -> None:
    """Adds the special and the user-defined tokens that the file's token types name."""
    # Phi-3's tags take the white space after them along, which GGUF has no field for.
    phi3 = data.metadata.get("general.architecture") == "phi3" and data.is_sentencepiece
    greedy = set(data.tokens) - {"<unk>", "<s>", "<|endoftext|>"} if phi3 else ()
    special = data.of_type(spm.CONTROL, spm.UNKNOWN)
    add_special(tokenizer, special, data.of_type(spm.USER_DEFINED), greedy)


def text_from_gguf(metadata: Mapping[str, Any], where: str) -> Text:
    """The tokenizer in the metadata of a GGUF file; `where` names the file in errors.

    `tokenizer.ggml.model` is "gpt2" (byte-level BPE, cut into words as `tokenizer.ggml.pre` says)
    or "llama" (sentencepiece, Gemma's too). Raises InputError for any other, for a file without
    a tokenizer, and for arrays and ids that contradict each other.
    """
    data = _Metadata(metadata, where)
    defaults = {"bos_token": 1, "eos_token": 2, "unk_token": 0} if data.is_sentencepiece else {}
    named = {name: data.token(key, defaults.get(name)) for name, key in SPECIAL.items()}
    special = {name: token for name, token in named.items() if token is not None}
    found = special.get("eos_token"), data.token("eot_token_id"), data.token("eom_token_id")
    ends = {token for token in found if token is not None}
    data.mark_control(ends | {token for name, token in special.items() if name == "bos_token"})
    stops = ends | END_TOKENS.intersection(data.of_type(spm.CONTROL))

    with tokenizer_errors(where):
        tokenizer, bos = _tokenizer(data)
    _add_types(tokenizer, data)
    add_bos = data.get("ggml.add_bos_token", bool, bos and "bos_token" in special)
    add_eos = data.get("ggml.add_eos_token", bool, False)
    add_ends(tokenizer, special, add_bos, add_eos, where)
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return Text(
        tokenizer,
        where,
        special,
        eos_ids=tuple(sorted(map(data.tokens.index, stops))),
        chat_template=data.get("chat_template", str),
        max_length=length if type(length) is int else None,
    )
