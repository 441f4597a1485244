"""The decode loop: prompts in, text out, over any runtime."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.architecture.config import ModelConfig
from engine.errors import InputError
from engine.options import Options
from engine.runtime import Bounded, Cache, Drawing, Greedy, Runtime, Verifying, too_many
from engine.sample import make_generators, one_thread, sample
from engine.speculate import Drafts, Pace
from engine.text import Text
from engine.text.pieces import PieceStream

DEFAULTS = Options()

Prompt = str | Sequence[dict] | Sequence[int]  # raw text, chat messages, or token ids


class Step(NamedTuple):
    """One step of the loop: the prompt's (which yields the first tokens) or a decode step."""

    pieces: tuple[str, ...]  # text that became certain, one a sequence
    tokens: int  # of all sequences
    elapsed_ns: int
    drafted: int = 0  # tokens that were guessed for it, and of these the right ones
    accepted: int = 0


@dataclass(frozen=True)
class Timings:
    """Times of one call of `generate`; the sequences of a batch share them."""

    prompt_tokens: int  # of all sequences
    ttft_ms: float  # from the call to the first token's text, encoding included
    prefill_ms: float  # the prompt's step alone
    step_ns: tuple[int, ...]  # every decode step
    step_tokens: tuple[int, ...]  # tokens that each of them yielded
    drafted: int = 0  # tokens that `speculate` guessed, and of these the right ones
    accepted: int = 0

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens of all sequences over the time of the prompt's step."""
        return self.prompt_tokens / self.prefill_ms * 1e3

    def decode_tok_s(self, quantile: float = 0.5) -> float | None:
        """Tokens a second at a quantile (0..1) of the decode steps; None when there were none."""
        return rate_tok_s(self.step_tokens, self.step_ns, quantile)

    @property
    def overall_tok_s(self) -> float | None:
        """All tokens over the time of all decode steps: what counts where drafts make some steps
        yield many tokens, and no step is like the median one."""
        return sum(self.step_tokens) / sum(self.step_ns) * 1e9 if self.step_ns else None


@dataclass(frozen=True)
class Generation:
    """What one prompt gave.

    `text` has nothing of the stop, `token_ids` every token sampled. `finish_reason` is "stop" for a
    stop token or stop string, "length" where max_new_tokens were reached. `prompt_tokens` counts
    the special tokens that were added. `timings` are the whole batch's: `ttft_ms` to the first
    token's text, `prefill_tok_s`, `decode_tok_s()`, `overall_tok_s`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    timings: Timings


def generate(
    runtime: Runtime[Any],
    text: Text,
    prompts: Sequence[Prompt],
    options: Options = DEFAULTS,
    on_step: Callable[[Step], None] | None = None,
) -> list[Generation]:
    """Completes every prompt of a batch; a prompt's result does not depend on its neighbours, but
    where two tokens are nearly as likely, and rounded attention meets it in other parts, or where a
    model's rotations follow the longest sequence that runs (LongRoPE, dynamic NTK); what is drawn
    for it by a seed depends on its place in the batch.

    `on_step` sees the text while it comes. Raises `InputError` for an empty prompt, an id outside
    the vocabulary, or a prompt that with `max_new_tokens` exceeds the context.
    """
    if not prompts:
        return []
    start = time.perf_counter_ns()
    sequences = open_sequences(runtime, text, prompts, options)
    steps: list[Step] = []
    ttft_ns = 0
    for step in stream_steps(runtime, sequences, options):
        ttft_ns = ttft_ns or time.perf_counter_ns() - start
        steps.append(step)
        if on_step:
            on_step(step)
    timings = Timings(
        prompt_tokens=sum(s.prompt_tokens for s in sequences),
        ttft_ms=ttft_ns / 1e6,
        prefill_ms=steps[0].elapsed_ns / 1e6,
        step_ns=tuple(step.elapsed_ns for step in steps[1:]),
        step_tokens=tuple(step.tokens for step in steps[1:]),
        drafted=sum(step.drafted for step in steps),
        accepted=sum(step.accepted for step in steps),
    )
    return [s.generation(timings) for s in sequences]


def stream(
    runtime: Runtime[Any], text: Text, prompt: Prompt, options: Options = DEFAULTS
) -> Iterator[str]:
    """Yields the pieces of one prompt's completion; joined, they are `Generation.text`."""
    sequences = open_sequences(runtime, text, [prompt], options)
    return (s.pieces[0] for s in stream_steps(runtime, sequences, options) if s.pieces[0])


def rate_tok_s(tokens: Sequence[int], elapsed_ns: Sequence[int], quantile: float) -> float | None:
    """The quantile (0..1) of the rates of single steps, tokens a second; None without steps."""
    if not tokens:
        return None
    rates = torch.tensor(tokens, dtype=torch.float64) / torch.tensor(elapsed_ns).clamp_min(1) * 1e9
    return rates.quantile(quantile).item()


def stream_steps(
    runtime: Runtime[Any], sequences: Sequence["Decoding"], options: Options
) -> Iterator[Step]:
    """The loop: runs the prompts, then a step at a time until every sequence has finished.

    A finished sequence is fed -1, which the runtime neither runs nor caches. The caller's own time
    between two steps counts in neither.
    """
    generators = make_generators(options.seed, len(sequences))
    plain = options.is_greedy and options.slots is None
    greedy = runtime.greedy if plain and isinstance(runtime, Greedy) else None
    draws = options.temperature > 0 and options.repetition_penalty == 1 and options.slots is None
    draw = runtime.draw if draws and isinstance(runtime, Drawing) else None
    switch = runtime.config.rope_switch
    long = switch is not None and max(len(s.ids) for s in sequences) > switch
    drafting = Drafting(len(sequences)) if options.speculate else None
    clock = time.perf_counter_ns()
    tokens = left_padded([s.ids for s in sequences])
    cache = runtime.new_cache(len(sequences), tokens.shape[1] + options.max_new_tokens)
    running, fed = list(range(len(sequences))), [-1] * len(sequences)
    ids = _run(runtime, tokens, cache, sequences, options, generators)
    found = [[token] for token in ids]  # a list a running sequence
    counts = 0, 0
    while True:
        pieces, before = [""] * len(sequences), sum(len(s.ids) for s in sequences)
        for row, given in zip(running, found, strict=True):
            pieces[row] = sequences[row].take(given)
            fed[row] = -1 if sequences[row].finish_reason else given[-1]
        running = [row for row in running if fed[row] >= 0]
        elapsed_ns = time.perf_counter_ns() - clock
        yield Step(tuple(pieces), sum(len(s.ids) for s in sequences) - before, elapsed_ns, *counts)
        counts = 0, 0
        if not running:
            return
        clock = time.perf_counter_ns()
        if drafting is not None:
            drafting.saw(elapsed_ns)
            if drafts := drafting.propose(sequences, running):
                found = _verify(runtime, cache, sequences, running, drafts, options, generators)
                counts = drafting.learn(running, drafts, found)
                continue
        was_long = long
        long = switch is not None and max(len(sequences[row].ids) for row in running) > switch
        anew = long != was_long
        if greedy is not None and not anew:
            found = [[token] for token in greedy(fed, cache)]
            continue
        if draw is not None and not anew:
            uniforms = [0.0] * len(sequences)
            for row in running:
                uniforms[row] = generators[row].random()
            found = [[token] for token in draw(fed, cache, options, uniforms)]
            continue
        if anew:  # LongRoPE turns to its other divisors, back where the longest has finished
            cache.truncate(0)
        rows = [[] if s.finish_reason else s.ids[0 if anew else -1 :] for s in sequences]
        ids = _run(runtime, left_padded(rows), cache, sequences, options, generators)
        found = [[token] for token in ids]


def _run(
    runtime: Runtime[Any],
    tokens: torch.Tensor,
    cache: Cache,
    sequences: Sequence["Decoding"],
    options: Options,
    generators: Sequence[random.Random],
) -> list[int]:
    """Runs tokens (B, T); returns the next id of each sequence that has not finished."""
    chunk = tokens.shape[1] if runtime.config.whole_prefill else runtime.prefill_chunk
    for part in tokens.split(chunk, dim=1):
        logits = runtime.forward(part, cache, slots=options.slots, logits="last")
    last = logits.select(1, -1)
    running = [row for row, s in enumerate(sequences) if s.finish_reason is None]
    if len(running) < len(sequences):
        with one_thread():
            last = last[running]
    history = [sequences[row].ids for row in running]
    return sample(last, options, history, [generators[row] for row in running]).tolist()


def _verify(
    runtime: Runtime[Any],
    cache: Cache,
    sequences: Sequence["Decoding"],
    running: Sequence[int],
    drafts: Mapping[int, Sequence[int]],
    options: Options,
    generators: Sequence[random.Random],
) -> list[list[int]]:
    """Runs the last token of each sequence with its draft; the ids that each of `running` got.

    Every id is drawn as if it had been asked for alone, from the same random numbers: a draft only
    says how many can be had at once. The cache is left with what comes before the last id.
    """
    rows: list[list[int]] = [[] for _ in sequences]
    for row in running:
        rows[row] = [sequences[row].ids[-1], *drafts[row]]
    tokens, logits, known = left_padded(rows), None, None
    if options.is_greedy and options.slots is None and isinstance(runtime, Verifying):
        known = runtime.likeliest(tokens, cache)
    else:
        logits = runtime.forward(tokens, cache, slots=options.slots, logits="all")
    lengths, found = cache.lengths.amax(dim=1), []
    for row in running:
        draft, count = drafts[row], len(rows[row])
        history, ids = list(sequences[row].ids), list[int]()
        for place in range(count):
            if known is not None:
                ids.append(known[row][place])
            else:
                assert logits is not None
                own = logits[row, place - count][None]
                ids.append(int(sample(own, options, [history], [generators[row]])))
            history.append(ids[-1])
            if place == len(draft) or ids[-1] != draft[place] or sequences[row].ends(ids[-1]):
                break
        lengths[row] -= count - len(ids)
        found.append(ids)
    cache.truncate(lengths)
    return found


class Drafting:
    """The drafts of a batch, and what steps cost."""

    def __init__(self, count: int) -> None:
        self._pace = Pace()
        self._drafts = [Drafts(self._pace) for _ in range(count)]
        self._ran = 0  # tokens a sequence in the last step; 0: it was the prompt's

    def saw(self, elapsed_ns: int) -> None:
        if self._ran:
            self._pace.saw(self._ran, elapsed_ns)
        self._ran = 1

    def propose(
        self, sequences: Sequence["Decoding"], running: Sequence[int]
    ) -> dict[int, list[int]]:
        """A draft for each of `running`; nothing where none has one.

        Nor before a step without one was seen, which says what those with drafts cost.
        """
        if not self._pace.single:
            return {}
        drafts = {
            row: self._drafts[row].propose(sequences[row].ids, sequences[row].room - 1)
            for row in running
        }
        longest = max(map(len, drafts.values()))
        self._ran = 1 + longest
        return drafts if longest else {}

    def learn(
        self, running: Sequence[int], drafts: Mapping[int, Sequence[int]], found: list[list[int]]
    ) -> tuple[int, int]:
        """(tokens that were guessed, the right ones)"""
        drafted = accepted = 0
        for row, ids in zip(running, found, strict=True):
            if drafts[row]:
                right = len(ids) - 1 + (ids == drafts[row][: len(ids)])
                self._drafts[row].learn(len(drafts[row]), right)
                drafted, accepted = drafted + len(drafts[row]), accepted + right
        return drafted, accepted


def open_sequences(
    runtime: Runtime[Any], text: Text, prompts: Sequence[Prompt], options: Options
) -> list["Decoding"]:
    """Encodes and checks every prompt; raises `InputError` before anything has run."""
    config = runtime.config
    if isinstance(runtime, Bounded) and len(prompts) > runtime.most_sequences:
        raise InputError(too_many(runtime, len(prompts)))
    if options.speculate and (config.whole_prefill or config.rope_switch is not None):
        raise InputError(
            f"speculate: the rotations of {config.family} depend on how long the text is, so that "
            "several tokens cannot be verified at once"
        )
    stop_ids = {item for item in options.stops if isinstance(item, int)}
    if unknown := sorted(each for each in stop_ids if not 0 <= each < config.vocab_size):
        raise InputError(f"stop: expected ids in 0-{config.vocab_size - 1}, found {unknown[0]}")
    if not options.ignore_eos:
        stop_ids.update(text.eos_ids, config.eos_ids)
    stops = [item for item in options.stops if isinstance(item, str)]
    sequences = []
    for prompt in prompts:
        ids = encode_prompt(text, prompt)
        _check_prompt(ids, options.max_new_tokens, config)
        pieces, matcher = text.piece_stream(), StopStrings(stops)
        sequences.append(Decoding(ids, pieces, stop_ids, matcher, options.max_new_tokens))
    return sequences


def encode_prompt(text: Text, prompt: Prompt) -> list[int]:
    """Token ids of raw text (special tokens added), of chat messages, or of ids as they are."""
    if len(prompt) == 0:
        raise InputError("the prompt is empty")
    if isinstance(prompt, str):
        return text.encode(prompt)
    messages = [each for each in prompt if isinstance(each, dict)]
    ids = [each for each in prompt if not isinstance(each, dict)]
    if messages and ids:
        raise InputError("the prompt mixes messages and token ids")
    if messages:
        return text.chat(messages)
    try:
        return [index(token) for token in ids]
    except TypeError:
        raise InputError(f"prompt: token ids are whole numbers, found {prompt!r:.80}") from None


def _check_prompt(ids: list[int], max_new_tokens: int, config: ModelConfig) -> None:
    if not ids:
        raise InputError("the prompt is empty")
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise InputError(f"prompt id {token} is outside the vocabulary of {config.vocab_size}")
    check_length(len(ids), max_new_tokens, config)


def check_length(tokens: int, max_new_tokens: int, config: ModelConfig) -> None:
    """InputError where a prompt of so many tokens and what follows it outgrow the context."""
    limit = config.max_context
    if tokens > limit:
        raise InputError(f"the prompt has {tokens} tokens; the model's context holds {limit}")
    if tokens + max_new_tokens > limit:
        raise InputError(
            f"the prompt's {tokens} tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {limit}"
        )


def left_padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """(B, longest) int64, short rows filled with -1 on the left."""
    width = max(map(len, rows))
    padded = [[-1] * (width - len(row)) + list(row) for row in rows]
    return torch.from_numpy(np.array(padded, np.int64))


class Decoding:
    """One sequence on its way: its ids, its certain text, and why it ended."""

    def __init__(
        self,
        prompt: Sequence[int],
        pieces: PieceStream,
        stop_ids: set[int],
        stops: "StopStrings",
        max_new: int,
    ) -> None:
        self.ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.finish_reason: str | None = None
        self._text: list[str] = []
        self._pieces = pieces
        self._stop_ids = stop_ids
        self._stops = stops
        self._max_length = len(prompt) + max_new

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self._max_length - len(self.ids)

    def ends(self, token: int) -> bool:
        return token in self._stop_ids

    def take(self, tokens: Sequence[int]) -> str:
        """Pushes them up to the one that ends it."""
        pieces = []
        for token in tokens:
            if self.finish_reason is None:
                pieces.append(self.push(token))
        return "".join(pieces)

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that it made certain."""
        self.ids.append(token)
        if token in self._stop_ids:
            piece = self._end("stop")
        else:
            piece = self._stops.push(self._pieces.push(token))
            if self._stops.found:
                self.finish_reason = "stop"
            elif len(self.ids) == self._max_length:
                piece += self._end("length")
        self._text.append(piece)
        return piece

    def _end(self, reason: str) -> str:
        piece = self._stops.push(self._pieces.finish())
        self.finish_reason = "stop" if self._stops.found else reason
        return piece + self._stops.finish()

    def generation(self, timings: Timings) -> Generation:
        assert self.finish_reason is not None  # the loop ends when every sequence has
        return Generation(
            text="".join(self._text),
            token_ids=tuple(self.ids[self.prompt_tokens :]),
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            timings=timings,
        )


class StopStrings:
    """Passes a stream of text on up to the stop string that is complete first.

    What may be the beginning of a stop string is held back, so the result does not depend on how
    the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.found = False
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> str:
        """Takes more text; returns what certainly precedes any stop string."""
        if not self._stops:
            return piece
        text = self._held + piece
        matches = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        prefixes = (s[:n] for s in self._stops for n in range(1, len(s)))
        held = max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What is still held back, once no more text comes."""
        held, self._held = self._held, ""
        return held
