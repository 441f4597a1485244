"""Generation health: does greedy text go on, or round in circles, and is it the whole model's?"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from engine.errors import InputError
from engine.evaluate.perplexity import check_vocabularies
from engine.generation import Generation, generate
from engine.judgement import LAST, LONGEST, NEW_TOKENS, PROMPTS, Health
from engine.options import Options
from engine.runtime import Runtime
from engine.text import Text, default_text, heldout_text
from engine.text.samples import bos_prefix

NGRAMS = 4  # distinct-1 .. distinct-4
WORDS, PARAGRAPH = 16, 32  # a prompt: the first words of a paragraph of at least so many
BATCH = 16

Ids = Sequence[int]


def prompts(count: int = PROMPTS) -> list[str]:
    """Beginnings of paragraphs, spread evenly over the two built-in texts, taking turns."""
    texts = [_beginnings(text) for text in (heldout_text(), default_text())]
    most = 2 * min(map(len, texts))
    if not 1 <= count <= most:
        raise InputError(f"prompts: expected 1 to {most}, found {count}")
    half = (count + 1) // 2
    spread = [[text[index * len(text) // half] for index in range(half)] for text in texts]
    return [prompt for pair in zip(*spread, strict=True) for prompt in pair][:count]


def _beginnings(text: str) -> list[str]:
    paragraphs = [paragraph.split() for paragraph in text.split("\n\n")]
    return [" ".join(words[:WORDS]) for words in paragraphs if len(words) >= PARAGRAPH]


def encode_prompts(
    text: Text, count: int, new_tokens: int, bos: bool | None, max_context: int
) -> list[list[int]]:
    """InputError for fewer new tokens than a loop takes, or more than the context holds."""
    if new_tokens < LAST:
        raise InputError(f"new-tokens: expected at least {LAST}, found {new_tokens}")
    prefix = bos_prefix(text, bos)
    rows = [prefix + text.encode(prompt, add_special=False) for prompt in prompts(count)]
    longest = max(map(len, rows)) + new_tokens
    if longest > max_context:
        raise InputError(
            f"new-tokens: a prompt and {new_tokens} new tokens are {longest}; the model's context "
            f"holds {max_context}"
        )
    return rows


def judge_health(
    runtime: Runtime[Any],
    text: Text,
    *,
    count: int = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    bos: bool | None = None,
    second: Runtime[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Health:
    """Greedy text of `count` fixed prompts, at most `new_tokens` each, as it stops by itself.

    With `second`, the whole model, also the mean share of tokens before the first that differs
    from its text. `bos` is as for perplexity. `progress` is called with prompts done and in
    total. Raises `InputError` as `encode_prompts` does.
    """
    if second is not None:
        check_vocabularies(runtime, second)
    rows = encode_prompts(text, count, new_tokens, bos, runtime.config.max_context)
    models = [runtime] if second is None else [runtime, second]
    found: list[list[Generation]] = [[] for _ in models]
    options = Options(max_new_tokens=new_tokens)
    for start in range(0, count, BATCH):
        batch = rows[start : start + BATCH]
        for model, taken in zip(models, found, strict=True):
            taken += generate(model, text, batch, options)
        if progress:
            progress(start + len(batch), count)
    own = [each.token_ids for each in found[0]]
    agreements = []
    if second is not None:
        whole = [each.token_ids for each in found[1]]
        agreements = [agreement(a, b) for a, b in zip(own, whole, strict=True)]
    return Health(
        prompts=count,
        prompts_hash=hashlib.sha256(repr(rows).encode()).hexdigest(),
        new_tokens=new_tokens,
        bos=bool(bos_prefix(text, bos)),
        mean_tokens=sum(map(len, own)) / count,
        looping=sum(map(loops, own)) / count,
        ended=sum(each.finish_reason == "stop" for each in found[0]) / count,
        distinct=tuple(distinct(own, n) for n in range(1, NGRAMS + 1)),
        agreement=sum(agreements) / count if agreements else None,
    )


def loops(ids: Ids) -> bool:
    """Are the last LAST ids periodic, with a period of at most LONGEST? Never when there are
    fewer."""
    if len(ids) < LAST:
        return False
    tail = list(ids[-LAST:])
    return any(tail[period:] == tail[:-period] for period in range(1, LONGEST + 1))


def distinct(generations: Sequence[Ids], n: int) -> float:
    """Different n-grams of each generation over all n-grams of all; 0 where there are none."""
    grams = [[tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)] for ids in generations]
    return sum(len(set(each)) for each in grams) / max(1, sum(map(len, grams)))


def agreement(own: Ids, whole: Ids) -> float:
    """Tokens before the first difference over those of the longer one, 0..1."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(own, whole, strict=False))
    return sum(1 for _ in pairs) / max(len(own), len(whole))
