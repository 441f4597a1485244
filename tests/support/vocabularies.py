"""Small tokenizers, trained on the spot, and the GGUF metadata that describes them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.text import Text, default_text
from engine.text.spm import BYTE, CONTROL, NORMAL, UNKNOWN

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
SAMPLES = [
    "",
    " ",
    "Hello, world!",
    "  two spaces before and after  ",
    "tabs\tand\n\nlines\r\n   indented\n",
    "In 1984, 12345678 people paid 3.14159 or ²³ ½ of it   9",
    "I'm, you're, he'd; DON'T SHOUT'S they'LL",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "naïve café Zoë, combining: e\u0301 a\u0308o\u0302 \u0928\u093f",
    "漢字とかな混じり文。한국어 텍스트, 中文 ABC",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 done",
    "русский العربية עברית ไทย",
    "<s>inline</s> special <|user|>\nHello<|user|>",
    "CamelCaseWords mixedUPPERlower o'clock aaaa aaaaa bbbbbbb",
    "▁already escaped ▁▁ and <0x41> \u00a0\u2003\u200b\ufeff.",
]


SMOLLM = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def prose() -> list[str]:
    return default_text()[:60_000].split("\n")


def byte_level(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, size: int = 700
) -> Tokenizer:
    """A byte-level BPE with the tokens of SPECIAL at ids 0 to 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose(), trainer)
    return tokenizer


def gguf_of_bpe(tokenizer: Tokenizer, split: str | None, **changes: Any) -> dict[str, Any]:
    """GGUF metadata of a `byte_level` tokenizer; `changes` are of tokenizer.ggml entries."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    ggml = {
        "model": "gpt2",
        "pre": split,
        "tokens": tokens,
        "token_type": [CONTROL if token in SPECIAL else NORMAL for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    return _metadata(ggml | changes)


def gguf_of_spm(path: Path, **changes: Any) -> dict[str, Any]:
    """GGUF metadata of a sentencepiece model file."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(str(path))
    ids = range(model.get_piece_size())
    kinds = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_byte, BYTE))
    ggml = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": [next((kind for is_, kind in kinds if is_(i)), NORMAL) for i in ids],
    }
    return _metadata(ggml | changes)


def _metadata(ggml: dict[str, Any]) -> dict[str, Any]:
    named = {f"tokenizer.ggml.{key}": x for key, x in ggml.items() if x is not None}
    return {"general.architecture": "llama", "llama.context_length": 256, **named}


def train_spm(directory: Path, kind: str = "bpe", **options: Any) -> Path:
    """Writes `directory`/tokenizer.model; byte fallback and no normalisation unless `options`."""
    import sentencepiece

    options = {
        "vocab_size": 800,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    } | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose()),
        model_prefix=str(directory / "tokenizer"),
        model_type=kind,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return directory / "tokenizer.model"


def comparable(sample: str) -> bool:
    """sentencepiece takes special tokens in a text for text, `tokenizers` byte pieces for bytes."""
    return not any(token in sample for token in (*SPECIAL, "<0x", "▁"))


def same_as_transformers(text: Text, other) -> None:
    for sample in SAMPLES:
        ids = text.encode(sample)
        assert ids == other(sample)["input_ids"], sample
        assert text.encode(sample, add_special=False) == other.encode(
            sample, add_special_tokens=False
        ), sample
        assert text.decode(ids, skip_special=False) == other.decode(ids), sample
        assert text.decode(ids) == other.decode(ids, skip_special_tokens=True), sample
