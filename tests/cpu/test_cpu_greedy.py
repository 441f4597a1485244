"""The greedy step of the CPU runtime against the largest of the logits that it hands out."""

import math
import secrets
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.fake import FakeText

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.generation import Generation, Options, generate
from engine.kernels import native
from engine.sample import likeliest

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

from engine.kernels.w4.cpu import isas
from engine.runtime.cpu import CpuRuntime

VOCAB = 1003  # blocks of the search, then a part of one, of a tile and of a vector


@pytest.mark.parametrize("speculate", [None, "ngram"])
def test_slots_of_greedy_text(speculate, source):
    """Which the step that chooses by itself does not know."""
    checkpoint = source("llama")
    text = FakeText([chr(97 + i % 26) for i in range(tiny.VOCAB)])

    def made(config, **given) -> tuple[int, ...]:
        runtime = CpuRuntime.load(checkpoint, config, 1, mode="exact", cache_dtype="float32")
        options = Options(max_new_tokens=24, ignore_eos=True, speculate=speculate, **given)
        return generate(runtime, text, [[5, 6, 7] * 5], options)[0].token_ids

    kept = made(checkpoint.config.keep([0, 2]))
    assert made(checkpoint.config, slots=(0, 2)) == kept != made(checkpoint.config)


class Edited:
    """A checkpoint of `case` with some of its tensors changed."""

    def __init__(self, case: str, path, changes=(), **overrides) -> None:
        seed = secrets.randbits(32)
        print(f"seed {seed}")
        tiny.write(case, path, seed, **{"vocab_size": VOCAB} | overrides)
        self._stored, self._changes = open_checkpoint(path), dict(changes)
        self.config = self._stored.config

    def __getattr__(self, name: str):
        return getattr(self._stored, name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._stored.read(name)
        return self._changes[name](tensor.clone()) if name in self._changes else tensor

    def load(self, threads: int = 2, isa: str | None = None) -> CpuRuntime:
        return CpuRuntime.load(self, self.config, threads, isa=isa)


@pytest.fixture
def four_threads():
    cpu = native.load("cpu")
    size = cpu.pool_threads()
    cpu.resize_pool(4)
    yield
    cpu.resize_pool(size)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", ["llama", "llama-dynamic", "gemma2", "phi2", "phi3-longrope"])
def test_greedy_is_the_likeliest(tmp_path, case, isa):
    """Steps past the first tables of angles; one sequence finishes, then the cache is cut back."""
    runtime = Edited(case, tmp_path, max_position_embeddings=400).load(2, isa)
    prompt = torch.randint(3, VOCAB, (3, 7))
    prompt[1, :4] = -1
    caches = [runtime.new_cache(3), runtime.new_cache(3)]
    fed = [likeliest(runtime.forward(prompt, cache)[:, -1]) for cache in caches][0].tolist()
    for step in range(270):
        if step == 20:
            fed[2] = -1
        if step == 265:
            for cache in caches:
                cache.truncate([30, 20, 10])
        running = [row for row, token in enumerate(fed) if token >= 0]
        logits = runtime.forward(torch.tensor(fed)[:, None], caches[0])[running, -1]
        ids = runtime.greedy(fed, caches[1])
        assert ids == likeliest(logits).tolist()
        assert torch.equal(caches[0].lengths, caches[1].lengths)
        for row, token in zip(running, ids, strict=True):
            fed[row] = token


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", ["llama", "gemma2", "phi2"])
def test_what_follows_several_tokens(tmp_path, case, isa):
    """The last more than the 512 rows that run at once."""
    runtime = Edited(case, tmp_path, max_position_embeddings=500).load(2, isa)
    caches = [runtime.new_cache(3), runtime.new_cache(3)]
    for width in (7, 1, 9, 400):
        tokens = torch.randint(3, VOCAB, (3, width))
        tokens[1, : width // 2] = -1
        tokens[2] = -1
        logits = runtime.forward(tokens, caches[0], logits="all")
        found = runtime.likeliest(tokens, caches[1])
        assert found == [
            likeliest(logits[0]).tolist(),
            likeliest(logits[1, width // 2 :]).tolist(),
            [],
        ]
        assert torch.equal(caches[0].lengths, caches[1].lengths)
    with pytest.raises(InputError, match=f"expected ids below {VOCAB}, found {VOCAB}"):
        runtime.likeliest(torch.full((3, 2), VOCAB), caches[1])


@pytest.mark.parametrize("isa", isas())
def test_the_lowest_of_equal_logits(rng, tmp_path, four_threads, isa):
    ties = sorted(torch.randperm(VOCAB, generator=rng)[:5].tolist())

    def equal(bias: torch.Tensor) -> torch.Tensor:
        bias[ties] = 1e30  # beside which the products vanish
        return bias

    checkpoint = Edited("phi2", tmp_path, {"lm_head.bias": equal})
    for threads in (1, 2, 4):
        runtime = checkpoint.load(threads, isa)
        assert runtime.greedy([5, 6], runtime.new_cache(2)) == [ties[0]] * 2


@pytest.mark.parametrize("isa", isas())
def test_a_head_that_threads_claim_twice(tmp_path, four_threads, isa):
    """A megabyte a thread and more, whose last sixteenth goes to whoever is first."""
    checkpoint = Edited("llama", tmp_path, vocab_size=(1 << 16) + 3)
    results = []
    for threads in (1, 2, 4):
        runtime = checkpoint.load(threads, isa)
        assert checkpoint.nbytes("lm_head.weight") >= threads << 20
        logits = runtime.forward(torch.tensor([[5]]), runtime.new_cache(1))
        assert runtime.greedy([5], runtime.new_cache(1)) == likeliest(logits[:, -1]).tolist()
        results.append(logits)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_logits_that_are_not_finite(tmp_path, isa, value):
    at = int(torch.randint(VOCAB, ()))

    def spoilt(bias: torch.Tensor) -> torch.Tensor:
        bias[at] = value
        return bias

    runtime = Edited("phi2", tmp_path, {"lm_head.bias": spoilt}).load(2, isa)
    cache = runtime.new_cache(1)
    with pytest.raises(ArithmeticError, match="produced logits that are not finite numbers"):
        runtime.greedy([5], cache)
    assert int(cache.lengths.min()) == 1


def test_infinity_below(tmp_path):
    """-inf is a logit like any other, unless there is nothing else."""
    kept = int(torch.randint(VOCAB, ()))

    def one(bias: torch.Tensor) -> torch.Tensor:
        return bias.where(torch.arange(VOCAB) == kept, -math.inf)

    runtime = Edited("phi2", tmp_path, {"lm_head.bias": one}).load()
    assert runtime.greedy([5], runtime.new_cache(1)) == [kept]
    runtime = Edited("phi2", tmp_path, {"lm_head.bias": lambda b: b - math.inf}).load()
    with pytest.raises(ArithmeticError, match="not finite"):
        runtime.greedy([5], runtime.new_cache(1))


def test_bad_calls(tmp_path):
    runtime = Edited("llama", tmp_path).load()
    cache = runtime.new_cache(2)
    for tokens, message in (
        ([5], r"expected shape \(2, T >= 1\), found \(1, 1\)"),
        ([5, VOCAB], f"expected ids below {VOCAB}, found {VOCAB}"),
    ):
        with pytest.raises(InputError, match=message):
            runtime.greedy(tokens, cache)
        assert int(cache.lengths.sum()) == 0
    runtime.forward(torch.full((2, 256), 5), cache)
    with pytest.raises(InputError, match="holds 256 positions, this call needs 257"):
        runtime.greedy([5, -1], cache)


@pytest.mark.parametrize("case", ["llama", "phi3-longrope"])
def test_generate_with_and_without_it(tmp_path, case):
    runtime = Edited(case, tmp_path).load()
    plain = SimpleNamespace(
        config=runtime.config,
        device=runtime.device,
        prefill_chunk=runtime.prefill_chunk,
        new_cache=runtime.new_cache,
        forward=runtime.forward,
    )
    text = FakeText([f"{token} " for token in range(VOCAB)])
    prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in (30, 4, 11)]
    options = Options(max_new_tokens=40, ignore_eos=True)
    (full, *_) = generate(runtime, text, prompts, options)
    options = replace(options, stop=[full.token_ids[9], full.text[30:40]])
    for got, expected in zip(
        generate(runtime, text, prompts, options),
        generate(plain, text, prompts, options),
        strict=True,
    ):
        assert (got.text, got.token_ids, got.finish_reason) == (
            expected.text,
            expected.token_ids,
            expected.finish_reason,
        )


def test_what_is_left_turns_as_if_alone_once_the_longest_has_finished(tmp_path):
    """LongRoPE: keys behind its switch and before it are not mixed in one cache."""
    runtime = Edited("phi3-longrope", tmp_path).load()
    switch = runtime.config.rope_switch
    assert switch is not None
    text, options = FakeText([f"{token} " for token in range(VOCAB)]), Options(max_new_tokens=16)

    def run(*prompts: list[int], **more) -> list[Generation]:
        return generate(runtime, text, prompts, replace(options, ignore_eos=True, **more))

    for _ in range(99):
        long, short = (torch.randint(3, VOCAB, (length,)).tolist() for length in (switch + 3, 4))
        stop = run(long, short)[0].token_ids[3]
        first, second = run(long, short, stop=stop)
        ran = len(first.token_ids)
        if first.finish_reason == "stop" and second.finish_reason == "length":
            break
    assert len(second.token_ids) == 16 > ran
    before, after = list(second.token_ids[:ran]), second.token_ids[ran:]
    assert after == run(short + before, max_new_tokens=16 - ran)[0].token_ids
