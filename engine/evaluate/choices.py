"""Multiple choice: how likely a model finds each answer to a question.

A choice is encoded as lm-eval's `hf` model does: question and choice together, of which the first
tokens, as many as the question alone has, are left out; the space before a choice belongs to it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import InputError, NotFiniteError
from engine.evaluate.perplexity import LOGITS_BYTES
from engine.generation import left_padded
from engine.judgement import Choices
from engine.runtime import Runtime, at_once
from engine.sample import NOT_FINITE
from engine.text import Text
from engine.text.questions import Question
from engine.text.samples import bos_prefix

BATCH = 8  # questions at once; every choice after the first waits for the longest of the batch
CONTEXT = "Question: {}\nAnswer:"
CHOICE = " {}"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a question and, following it, of each of its choices."""

    context: list[int]
    choices: list[list[int]]


@dataclass(frozen=True)
class Likelihoods:
    """Of the choices of a question: (choices,) float64 summed log-probabilities in nats, and
    whether each is what greedy decoding would say."""

    sums: torch.Tensor
    greedy: tuple[bool, ...]


def judge_choices(
    runtime: Runtime[Any],
    text: Text,
    questions: Sequence[Question],
    *,
    source: str,
    bos: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Choices:
    """Accuracy and probability of the right choice by log-likelihood a character.

    `bos` begins every question with BOS, by default where the tokenizer has the habit. `source`
    is recorded. `progress` is called with questions done and in total. Raises `InputError` for a
    question that exceeds the model's context.
    """
    encoded = encode_questions(text, questions, bos, runtime.config.max_context)
    correct, probabilities = [], []
    for question, found in zip(questions, log_likelihoods(runtime, encoded), strict=True):
        sums = found.sums
        if not sums.isfinite().all():
            raise NotFiniteError(NOT_FINITE)
        lengths = torch.tensor([len(choice) for choice in question.choices])  # as acc_norm
        shares = (sums / lengths).softmax(-1)  # (choices,) float64
        correct.append(int(shares.argmax()) == question.answer)
        probabilities.append(round(float(shares[question.answer]), 6))
        if progress:
            progress(len(correct), len(questions))
    rows = [(each.question, each.choices, each.answer) for each in questions]
    return Choices.of(
        source=source,
        questions_hash=hashlib.sha256(repr(rows).encode()).hexdigest(),
        bos=bool(bos_prefix(text, bos)),
        chance=math.fsum(1 / len(each.choices) for each in questions) / len(questions),
        correct=tuple(correct),
        probabilities=tuple(probabilities),
    )


def encode_questions(
    text: Text, questions: Sequence[Question], bos: bool | None, max_context: int
) -> list[Encoded]:
    """InputError for a question that exceeds the context with one of its choices."""
    found = []
    for question in questions:
        each = encode(text, question, bos)
        length = len(each.context) + max(map(len, each.choices))
        if length > max_context:
            raise InputError(
                f"{question.where}: has {length} tokens; the model's context holds {max_context}"
            )
        found.append(each)
    return found


def encode(text: Text, question: Question, bos: bool | None = None) -> Encoded:
    """InputError for a choice that adds no token to its question."""
    prefix, context = bos_prefix(text, bos), CONTEXT.format(question.question)
    alone = text.encode(context, add_special=False)
    choices = []
    for choice in question.choices:
        whole = text.encode(context + CHOICE.format(choice), add_special=False)
        if len(whole) <= len(alone):
            raise InputError(f"{question.where}: {choice!r:.80} adds no token to its question")
        choices.append(whole[len(alone) :])
    return Encoded(prefix + alone, choices)


def log_likelihoods(
    runtime: Runtime[Any], questions: Sequence[Encoded], most: int = BATCH
) -> Iterator[Likelihoods]:
    """Yields one for every question, of which at most `most` run at once."""
    if not questions:
        return
    whole = runtime.config.whole_prefill
    longest = max(len(ids) + whole * len(q.context) for q in questions for ids in q.choices)
    room = LOGITS_BYTES // (4 * runtime.config.vocab_size * longest)
    # One alone where rotations depend on the longest of a batch.
    size = 1 if whole else at_once(min(most, max(1, room)), runtime)
    for start in range(0, len(questions), size):
        yield from _batch(runtime, questions[start : start + size])


def _batch(runtime: Runtime[Any], batch: Sequence[Encoded]) -> list[Likelihoods]:
    """A question's tokens run once; the cache goes back to their end before every choice.

    Where rotations depend on how long a sequence is in all, question and choice run together.
    """
    contexts = [each.context for each in batch]
    heads: list[list[int]] = [[] for _ in batch]  # run before each choice
    longest = max(len(each.context) + max(map(len, each.choices)) for each in batch) - 1
    cache = runtime.new_cache(len(batch), longest)
    first = None
    if runtime.config.whole_prefill:
        heads = contexts
    else:
        first = runtime.forward(left_padded(contexts).to(runtime.device), cache)  # (B, 1, V)
    shared = cache.lengths.amax(dim=1)  # (B,)
    scored: list[list[tuple[float, bool]]] = [[] for _ in batch]
    for number in range(max(len(each.choices) for each in batch)):
        tails = [each.choices[number] if number < len(each.choices) else [] for each in batch]
        pairs = zip(heads, tails, strict=True)
        rows = [head + tail[:-1] if tail else [] for head, tail in pairs]
        parts = [] if first is None else [first]
        if any(rows):
            tokens = left_padded(rows).to(runtime.device)
            parts.append(runtime.forward(tokens, cache, logits="all"))
            cache.truncate(shared)
        for row, tail in enumerate(tails):
            if tail:
                scored[row].append(_score([each[row] for each in parts], tail))
    found = []
    for each in scored:
        sums, greedy = zip(*each, strict=True)
        found.append(Likelihoods(torch.tensor(sums, dtype=torch.float64), greedy))
    return found


def _score(parts: Sequence[torch.Tensor], tail: Sequence[int]) -> tuple[float, bool]:
    """(log-probability of `tail`, is it greedy?).

    It is predicted at the end of the last of `parts` (n, V); where there are two, its first token
    at the end of the first and the rest at the end of the second.
    """
    own = parts[-1]
    if len(parts) == 2:
        own = torch.cat([parts[0], own[len(own) - len(tail) + 1 :]])
    own = own[len(own) - len(tail) :].double().log_softmax(-1)
    ids = torch.tensor(tail, device=own.device)
    return float(own.gather(-1, ids[:, None]).sum()), bool((own.argmax(-1) == ids).all())
