"""Token ids to text, one token at a time, by the rule that the tokenizer's own decoder states."""

import codecs
import json
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from engine.errors import InputError

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
# GPT-2's byte alphabet: printable bytes stand for themselves, the rest follow from U+0100.
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(_UNPRINTABLE)}


@dataclass(frozen=True)
class Spelling:
    """How a token as stored becomes bytes of text."""

    byte_level: bool = False  # each character is a byte of GPT-2's alphabet
    byte_fallback: bool = False  # "<0xE2>" is the byte E2
    replaced: tuple[tuple[str, str], ...] = ()  # sentencepiece's "▁" is a space
    between: str = ""  # stands before every token; a tokenizer without a decoder joins with spaces
    bare: str = ""  # the first token loses this character (Metaspace)
    strip: str = ""  # the text loses this character at its start ...
    strip_count: int = 0  # ... this many times at most

    def bytes(self, token: str, first: bool, added: bool) -> bytes:
        """`added`: one that is matched in the text as it stands, and so is no bytes' letters."""
        if first and self.bare:
            token = token.replace(self.bare, "")
        for old, new in self.replaced:
            token = token.replace(old, new)
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass  # a token that only looks like a byte
        if self.byte_level and not added:
            try:
                return bytes(map(BYTE_OF.__getitem__, token))
            except KeyError:
                pass  # of no byte-level vocabulary
        return (self.between + token).encode()


def _read_step(spelling: Spelling, step: dict[str, Any], fused: bool) -> Spelling | None:
    """`spelling` with one decoder step applied, or None where the step is not known."""
    match step:
        case {"type": "Fuse"}:
            return spelling
        case {"type": "ByteLevel"}:
            return replace(spelling, byte_level=True)
        case {"type": "ByteFallback"}:
            return replace(spelling, byte_fallback=True)
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return replace(spelling, replaced=(*spelling.replaced, (old, new)))
        case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
            bare = "" if scheme == "never" else mark
            return replace(spelling, replaced=(*spelling.replaced, (mark, " ")), bare=bare)
        case {"type": "Strip", "content": strip, "start": count, "stop": 0} if fused:
            return replace(spelling, strip=strip, strip_count=count)
    return None


def read_spelling(tokenizer: Tokenizer, where: str) -> Spelling:
    """The rule in `tokenizer.decoder`; InputError for a decoder that no causal model uses."""
    if tokenizer.decoder is None:
        return Spelling(between=" ", strip=" ", strip_count=1)
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    spelling, fused = Spelling(), False
    for step in steps:
        known = _read_step(spelling, step, fused)
        if known is None:
            raise InputError(f"{where}: the tokenizer's decoder step {step} is not supported")
        spelling, fused = known, fused or step["type"] == "Fuse"
    return spelling


class Pieces:
    """The bytes of every token of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, where: str):
        self.spelling = read_spelling(tokenizer, where)
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self._added = frozenset(added)
        self._token = tokenizer.id_to_token
        self.whole: dict[int, str] = {}  # text behind complete characters, as far as met

    def bytes(self, token_id: int, first: bool) -> bytes | None:
        """None for an id without a token, which embeddings padded to a round size have."""
        token = self._token(token_id)
        if token is None:
            return None
        return self.spelling.bytes(token, first, token_id in self._added)


class PieceStream:
    """Text as its tokens arrive: complete characters only, the same in sum as `Text.decode`.

    Bytes that can no longer become a character turn into U+FFFD; those that still can are held
    back, three at most, until the next token or `finish`.
    """

    def __init__(self, pieces: Pieces, skip_special: bool):
        self._pieces = pieces
        self._skipped = pieces.special if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._settled = False  # nothing held back, nothing left to strip
        self._strip_left = pieces.spelling.strip_count

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none."""
        if token_id in self._skipped:
            return ""
        settled, whole = self._settled, self._pieces.whole
        if settled and token_id in whole:
            return whole[token_id]
        data = self._pieces.bytes(token_id, self._first)
        if data is None:
            return ""
        self._first = False
        text = self._strip(self._utf8.decode(data))
        self._settled = not (self._strip_left or self._utf8.getstate()[0])
        if settled and self._settled:
            whole[token_id] = text
        return text

    def finish(self) -> str:
        """What is held back at the end: U+FFFD for a character that never became complete."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not self._strip_left or not text:
            return text
        stripped = text.lstrip(self._pieces.spelling.strip)
        cut = min(len(text) - len(stripped), self._strip_left)
        self._strip_left = self._strip_left - cut if cut == len(text) else 0
        return text[cut:]
