"""Tokens that are not text: matched before everything else, and put around a text."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from engine.errors import InputError


def add_special(
    tokenizer: Tokenizer,
    special: Iterable[str],
    plain: Iterable[str] = (),
    greedy: Collection[str] = (),
) -> None:
    """Has these tokens matched in the text as it stands, before anything else is.

    `decode` leaves the `special` ones out. Those in `greedy` take the white space that follows
    them along.
    """

    def added(tokens: Iterable[str]) -> list[AddedToken]:
        return [AddedToken(x, normalized=False, rstrip=x in greedy) for x in tokens]

    tokenizer.add_tokens(added(plain))
    tokenizer.add_special_tokens(added(special))


def add_ends(
    tokenizer: Tokenizer, special: Mapping[str, str], bos: bool, eos: bool, where: str | Path
) -> None:
    """Puts BOS before and EOS after every text that is encoded with special tokens."""
    around = []
    for name, wanted in (("bos_token", bos), ("eos_token", eos)):
        if wanted and name not in special:
            raise InputError(f"{where}: the tokenizer adds a {name} that it does not name")
        if wanted:
            around.append(special[name])
    tokenizer.post_processor = TemplateProcessing(
        single=[*around[:bos], "$A", *around[bos:]],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
    )
