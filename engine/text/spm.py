"""sentencepiece vocabularies, from a `tokenizer.model` or from GGUF metadata."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.checkpoint.files import read_regular
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


def read_model(path: Path) -> Vocabulary:
    """The vocabulary of a sentencepiece `tokenizer.model`, BPE or unigram, by its own protobuf."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as protobuf
    except ImportError:
        raise InputError(
            f"{path}: without a tokenizer.json it needs sentencepiece and protobuf: "
            "pip install 'sentencepiece>=0.2' 'protobuf>=4.25'"
        ) from None
    model = protobuf.ModelProto()
    data = read_regular(path)
    try:
        model.ParseFromString(data)
        pieces = [piece.piece for piece in model.pieces]
    except (DecodeError, ValueError) as error:
        raise InputError(
            f"{path}: expected a sentencepiece model, found otherwise ({error})"
        ) from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not pieces or trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise InputError(
            f"{path}: expected a BPE or unigram sentencepiece model,"
            f" found {len(pieces)} pieces of model type {trainer.model_type}"
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise InputError(
            f"{path}: expected a sentencepiece model with ▁ before its words, found one with ▁"
            " behind them, or with plain spaces"
        )
    ids = {"unk_token": trainer.unk_id, "bos_token": trainer.bos_id,
           "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}  # fmt: skip
    return Vocabulary(
        pieces,
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        prefix="every" if normalizer.add_dummy_prefix else "never",
        isolated=True,
        unigram=trainer.model_type == trainer.UNIGRAM,
        squeeze=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
        special={name: pieces[i] for name, i in ids.items() if 0 <= i < len(pieces)},
    )
