"""Tokens that are not text: matched before everything else, and put around a text."""

from collections.abc import Collection, Mapping, Sequence

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from engine.text.spm import CONTROL, UNKNOWN, USER_DEFINED


def add_special(
    tokenizer: Tokenizer, pieces: Sequence[str], types: Sequence[int], greedy: Collection[str] = ()
) -> None:
    """Has control, unknown and user-defined pieces matched in the text before anything else.

    The first two are special: `decode` leaves them out. Those in `greedy` take the white space
    that follows them along.
    """
    special, plain = [], []
    for piece, kind in zip(pieces, types, strict=True):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            token = AddedToken(piece, normalized=False, rstrip=piece in greedy)
            (plain if kind == USER_DEFINED else special).append(token)
    tokenizer.add_tokens(plain)
    tokenizer.add_special_tokens(special)


def add_ends(tokenizer: Tokenizer, special: Mapping[str, str], bos: bool, eos: bool) -> None:
    """Puts BOS before and EOS after every text that is encoded with special tokens."""
    around = [special[name] for name, wanted in (("bos_token", bos), ("eos_token", eos)) if wanted]
    tokenizer.post_processor = TemplateProcessing(
        single=[*around[:bos], "$A", *around[bos:]],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
    )
