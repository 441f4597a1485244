"""`Text`: the light tokenizer that every part of the engine shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from engine.errors import InputError
from engine.text.damage import tokenizer_errors
from engine.text.pieces import Pieces, PieceStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """Text to token ids and back, for one checkpoint."""

    tokenizer: Tokenizer
    where: str  # the checkpoint, for messages
    special: Mapping[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>", ...
    eos_ids: tuple[int, ...] = ()  # every token that ends a generation
    chat_template: str | None = None
    max_length: int | None = None  # tokens the model was made for
    directory: Path | None = None  # holds a tokenizer.json that transformers can read itself

    @property
    def vocab_size(self) -> int:
        """Tokens that have a spelling; the embedding may have more rows."""
        return self.tokenizer.get_vocab_size()

    @property
    def bos_id(self) -> int | None:
        token = self.special.get("bos_token")
        return None if token is None else self.tokenizer.token_to_id(token)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids; special tokens written out in `text` count as such.

        `add_special` adds what the checkpoint puts around a text, often a BOS.
        """
        with tokenizer_errors(self.where):
            try:
                return self.tokenizer.encode(text, add_special_tokens=add_special).ids
            except TypeError:  # not a string, or one with a lone surrogate: not Unicode
                raise InputError(f"text: expected a Unicode string, found {text!r:.80}") from None

    def span_bytes(self, text: str, tokens: int) -> int:
        """UTF-8 bytes from the beginning of `text` to the end of so many of its tokens."""
        with tokenizer_errors(self.where):
            offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return len(text[: offsets[tokens - 1][1]].encode())

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token vanish."""
        stream = self.piece_stream(skip_special)
        return "".join(map(stream.push, ids)) + stream.finish()

    def piece_stream(self, skip_special: bool = True) -> PieceStream:
        """`push` each id as it comes; the pieces and `finish` add up to `decode` of them all."""
        return PieceStream(self._pieces, skip_special)

    @cached_property
    def _pieces(self) -> Pieces:
        with tokenizer_errors(self.where):
            return Pieces(self.tokenizer, self.where)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the prompt for the assistant's next words, as `render` writes it."""
        return self.encode(self.render(messages), add_special=False)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the chat template makes of `messages`.

        InputError where the checkpoint has no chat template, or it refuses `messages`.
        """
        if self.chat_template is None:
            raise InputError(f"{self.where}: has no chat template, so it takes only raw text")
        from engine.text.chat import render

        return render(self.chat_template, messages, self.special, self.where)

    def to_transformers(self) -> "PreTrainedTokenizerBase":
        """The tokenizer as transformers knows it, padding token set; takes a second or more."""
        if self.directory is not None:
            from transformers import AutoTokenizer

            with tokenizer_errors(self.where):
                # Without both it asks whether to run code of the directory.
                made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    self.directory, local_files_only=True, trust_remote_code=False
                )
        else:
            from transformers import PreTrainedTokenizerFast

            made = PreTrainedTokenizerFast(
                tokenizer_object=self.tokenizer,
                clean_up_tokenization_spaces=False,
                chat_template=self.chat_template,
                **self.special,
            )
        if made.pad_token is None:
            made.pad_token = made.eos_token
        made.padding_side = "left"  # what is padded on the right cannot be gone on with
        if self.max_length is not None:
            made.model_max_length = self.max_length
        return made
