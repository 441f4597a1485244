"""sentencepiece vocabularies, from a `tokenizer.model` or from GGUF metadata."""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.errors import InputError

# Token types, the same in sentencepiece's protobuf and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_T = TypeVar("_T", int, bytes)


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, with what sentencepiece does before it looks them up."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    prefix: str = "every"  # "▁" before "every" text between special tokens, the "first", or "never"
    isolated: bool = False  # user-defined pieces are matched in the normalised text
    unigram: bool = False
    squeeze: bool = False  # strip the text and make one space of several
    charsmap: bytes = b""  # sentencepiece's compiled normalisation
    special: Mapping[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>", ...

    def of_type(self, *kinds: int) -> list[str]:
        listed = zip(self.pieces, self.types, strict=True)
        return [piece for piece, kind in listed if kind in kinds]


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair that makes a token, best score first.

    sentencepiece breaks ties between places, from the left; `tokenizers` ranks pairs. The longer
    left part first gives the same pieces on runs of one character.
    """
    apart = {UNKNOWN, CONTROL, BYTE} | ({USER_DEFINED} if vocabulary.isolated else set())
    listed = zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)
    scores = {piece: score for piece, score, kind in listed if kind not in apart}
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):  # stable: then by id
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges


def _model(vocabulary: Vocabulary) -> models.Model:
    unknown = vocabulary.types.index(UNKNOWN) if UNKNOWN in vocabulary.types else None
    byte_fallback = BYTE in vocabulary.types
    if vocabulary.unigram:
        scored = list(zip(vocabulary.pieces, vocabulary.scores, strict=True))
        return models.Unigram(scored, unknown, byte_fallback)
    return models.BPE(
        vocab={piece: i for i, piece in enumerate(vocabulary.pieces)},
        merges=_merges(vocabulary),
        unk_token=None if unknown is None else vocabulary.pieces[unknown],
        fuse_unk=True,
        byte_fallback=byte_fallback,
        ignore_merges=vocabulary.isolated,
    )


def _normalizer(vocabulary: Vocabulary) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if vocabulary.squeeze:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if vocabulary.prefix == "every":
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def build(vocabulary: Vocabulary) -> Tokenizer:
    """Encodes as sentencepiece does; `add_special` has yet to be told of the special pieces."""
    tokenizer = Tokenizer(_model(vocabulary))
    tokenizer.normalizer = _normalizer(vocabulary)
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if vocabulary.prefix == "first":
        cuts.append(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    whole = sorted(vocabulary.of_type(USER_DEFINED), key=len, reverse=True)
    if vocabulary.isolated and whole:
        cuts.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), "isolated"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.prefix != "never":
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a protobuf message; IndexError where it is cut short."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        value: int | bytes
        if wire == 0:
            value, at = _varint(data, at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(wire) or _varint(data, at)
            value, at = data[at : at + size], at + size
            if wire not in (1, 2, 5) or at > len(data):
                raise IndexError("truncated or not a protobuf")
        yield key >> 3, value


def _typed(value: int | bytes, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"a field holds {type(value).__name__}, not {kind.__name__}")
    return value


def read_model(path: Path) -> Vocabulary:
    """The vocabulary of a sentencepiece `tokenizer.model`, BPE or unigram.

    Field numbers are those of sentencepiece_model.proto.
    """
    parts: dict[int, list[dict[int, int | bytes]]] = {1: [], 2: [{}], 3: [{}]}
    try:
        for number, value in _fields(path.read_bytes()):
            if number in parts:
                parts[number].append(dict(_fields(_typed(value, bytes))))
        listed, trainer, normalizer = parts[1], parts[2][-1], parts[3][-1]
        pieces = [_typed(piece[1], bytes).decode() for piece in listed]
        scores = [struct.unpack("<f", _typed(piece.get(2, bytes(4)), bytes))[0] for piece in listed]
        types = [_typed(piece.get(3, NORMAL), int) for piece in listed]
        kind = _typed(trainer.get(3, 1), int)
        named = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2),
                 "pad_token": (43, -1)}  # fmt: skip
        ids = {name: _typed(trainer.get(*field), int) for name, field in named.items()}
        charsmap = _typed(normalizer.get(2, b""), bytes)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise InputError(
            f"{path}: expected a sentencepiece model, found otherwise ({error})"
        ) from error
    if not pieces or kind not in (1, 2):
        raise InputError(
            f"{path}: expected a BPE or unigram sentencepiece model,"
            f" found {len(pieces)} pieces of model type {kind}"
        )
    return Vocabulary(
        pieces,
        scores,
        types,
        prefix="every" if normalizer.get(3, 1) else "never",
        isolated=True,
        unigram=kind == 1,
        squeeze=bool(normalizer.get(4, 1)),
        charsmap=charsmap,
        special={name: pieces[i] for name, i in ids.items() if 0 <= i < len(pieces)},
    )
