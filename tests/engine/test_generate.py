"""The decode loop over a fake runtime: stopping, streaming, batches, refusals."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fake import FakeRuntime, FakeText

import engine.api
from engine.errors import InputError
from engine.generation import (
    Options,
    StopStrings,
    generate,
    rate_tok_s,
    stream,
)

LETTERS = [chr(ord("a") + i % 26) for i in range(64)]


def fakes(rng, **options):
    return FakeRuntime(int(torch.randint(2**31, (1,), generator=rng)), **options), FakeText(LETTERS)


def greedy(runtime, prompt: list[int], count: int) -> list[int]:
    """The obvious loop: one sequence, no cache, no batch."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(runtime.logits(ids).argmax()))
    return ids[len(prompt) :]


def prompts(rng, *lengths: int) -> list[list[int]]:
    return [torch.randint(64, (n,), generator=rng).tolist() for n in lengths]


def test_greedy_batch_of_unequal_lengths_equals_the_obvious_loop(rng):
    runtime, text = fakes(rng)
    batch = prompts(rng, 5, 1, 17, 2)
    results = generate(runtime, text, batch, Options(max_new_tokens=20))
    for prompt, result in zip(batch, results, strict=True):
        assert list(result.token_ids) == greedy(runtime, prompt, 20)
        assert result.text == text.decode(result.token_ids)
        assert (result.finish_reason, result.prompt_tokens) == ("length", len(prompt))


def test_sequences_stop_by_themselves_and_the_others_go_on(rng):
    runtime, text = fakes(rng)
    batch = prompts(rng, 3, 4, 5)
    full = [greedy(runtime, prompt, 12) for prompt in batch]
    stops = {full[0][3], full[1][7]}
    results = generate(runtime, text, batch, Options(max_new_tokens=12, stop=tuple(stops)))
    for ids, result in zip(full, results, strict=True):
        end = next((i + 1 for i, token in enumerate(ids) if token in stops), None)
        assert list(result.token_ids) == ids[:end]
        assert result.finish_reason == ("length" if end is None else "stop")
        assert result.text == text.decode(ids[:end] if end is None else ids[: end - 1])


@pytest.mark.parametrize("place", ["model", "tokenizer"])
def test_eos_of_model_and_tokenizer(place, rng):
    runtime, text = fakes(rng)
    (prompt,) = prompts(rng, 6)
    ids = greedy(runtime, prompt, 10)
    if place == "model":
        runtime.config.eos_ids = (ids[4],)
    else:
        text.eos_ids = (ids[4],)
    (result,) = generate(runtime, text, [prompt], Options(max_new_tokens=10))
    assert list(result.token_ids) == ids[: ids.index(ids[4]) + 1]
    assert result.finish_reason == "stop"
    (result,) = generate(runtime, text, [prompt], Options(max_new_tokens=10, ignore_eos=True))
    assert list(result.token_ids) == ids and result.finish_reason == "length"


def test_seeded_samples_are_reproducible_and_independent_of_neighbours(rng):
    runtime, text = fakes(rng)
    batch = prompts(rng, 4, 9, 4)
    batch[2] = batch[0]
    options = Options(max_new_tokens=15, temperature=1.5, top_p=0.9, seed=7)
    first, second, third = generate(runtime, text, batch, options)
    assert first.token_ids == generate(runtime, text, batch, options)[0].token_ids
    assert first.token_ids == generate(runtime, text, batch[:1], options)[0].token_ids
    assert first.token_ids != third.token_ids, "two sequences drew the same numbers"
    # The second stops at once; the third must draw on as if it had not.
    stopping = Options(max_new_tokens=15, temperature=1.5, top_p=0.9, seed=7, stop=second.text[0])
    again = generate(runtime, text, batch, stopping)
    assert len(again[1].token_ids) <= 2  # the text of a token comes one token late
    assert again[2].token_ids == third.token_ids[: len(again[2].token_ids)]


def test_repetition_penalty_sees_the_prompt_and_what_was_generated(rng):
    runtime, text = fakes(rng, vocab_size=8)
    (prompt,) = [[0, 1, 2]]
    options = Options(max_new_tokens=5, repetition_penalty=1000.0)
    runtime.table.abs_().add_(1)
    (result,) = generate(runtime, FakeText(LETTERS[:8]), [prompt], options)
    assert sorted(result.token_ids) == [3, 4, 5, 6, 7]


def test_long_prompts_run_in_chunks(rng):
    runtime, text = fakes(rng, max_context=3 * FakeRuntime.prefill_chunk)
    batch = prompts(rng, 2 * FakeRuntime.prefill_chunk + 1, 3)
    results = generate(runtime, text, batch, Options(max_new_tokens=2))
    assert max(shape[1] for shape, _, _ in runtime.calls) == FakeRuntime.prefill_chunk
    assert {logits for _, _, logits in runtime.calls} == {"last"}
    for prompt, result in zip(batch, results, strict=True):
        assert list(result.token_ids) == greedy(runtime, prompt, 2)


def test_slots_reach_every_call(rng):
    runtime, text = fakes(rng)
    generate(runtime, text, prompts(rng, 3), Options(max_new_tokens=3, slots=[0, 2]))
    assert [slots for _, slots, _ in runtime.calls] == [[0, 2]] * 3


def test_prompts_as_text_messages_and_ids(rng):
    runtime, text = fakes(rng)
    forms = ["hello", [{"role": "user", "content": "hello"}], text.encode("hello")]
    results = generate(runtime, text, forms, Options(max_new_tokens=4))
    assert len({result.token_ids for result in results}) == 1
    assert generate(runtime, text, [], Options()) == []


def test_interruption_leaves_the_runtime_usable(rng):
    runtime, text = fakes(rng)
    (prompt,) = prompts(rng, 4)
    expected = generate(runtime, text, [prompt], Options(max_new_tokens=6))
    steps = []

    def interrupt(step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(runtime, text, [prompt], Options(max_new_tokens=6), interrupt)
    assert len(steps) == 3
    again = generate(runtime, text, [prompt], Options(max_new_tokens=6))
    assert again[0].token_ids == expected[0].token_ids


def test_no_module_hides_the_function_of_the_package():
    assert callable(engine.generate) and callable(engine.load)


def test_timings(rng):
    runtime, text = fakes(rng)
    (result, _) = generate(runtime, text, prompts(rng, 4, 2), Options(max_new_tokens=6))
    timings = result.timings
    assert timings.prompt_tokens == 6
    assert timings.step_tokens == (2,) * 5 and len(timings.step_ns) == 5
    assert 0 < timings.prefill_ms <= timings.ttft_ms
    assert 0 < timings.decode_tok_s(0.05) <= timings.decode_tok_s() <= timings.decode_tok_s(0.95)
    (one,) = generate(runtime, text, prompts(rng, 4), Options(max_new_tokens=1))
    assert one.timings.decode_tok_s() is None
    assert rate_tok_s([1, 2], [10**9, 10**9], 0.5) == 1.5


# Stop strings ------------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first (the longest such), all at once."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


pieces = st.lists(st.text("abc", max_size=4), max_size=12)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), max_size=3)


@given(pieces, stop_lists)
def test_stop_strings_across_any_borders(pieces, stops):
    stream, text, expected = StopStrings(stops), "", cut("".join(pieces), stops)
    for piece in pieces:
        text += stream.push(piece)
        assert expected.startswith(text), "part of a stop string got out"
        if stream.found:
            break
    text += stream.finish()
    assert text == expected
    assert stream.found == (expected != "".join(pieces))


def test_only_what_may_begin_a_stop_string_is_held_back():
    stream = StopStrings(["###", "END"])
    assert [stream.push(p) for p in ["a#", "b", "EN", "E"]] == ["a", "#b", "", "EN"]
    assert stream.finish() == "E" and not stream.found


def test_stop_string_ends_the_sequence_and_streams_nothing_of_it(rng):
    runtime, text = fakes(rng)
    (prompt,) = prompts(rng, 5)
    (full,) = generate(runtime, text, [prompt], Options(max_new_tokens=30))
    stop = full.text[8:11]
    options = Options(max_new_tokens=30, stop=stop)
    (result,) = generate(runtime, text, [prompt], options)
    assert result.text == full.text[: full.text.index(stop)]
    assert result.finish_reason == "stop"
    assert result.token_ids == full.token_ids[: len(result.token_ids)]
    seen = ""
    for piece in stream(runtime, text, prompt, options):
        assert piece
        seen += piece
        assert result.text.startswith(seen)
    assert seen == result.text


def test_stop_string_completed_by_the_last_token(rng):
    """The stream's last piece comes out only when it is finished; the stop still counts."""
    runtime, text = fakes(rng)
    (prompt,) = prompts(rng, 5)
    (full,) = generate(runtime, text, [prompt], Options(max_new_tokens=10))
    stop = full.text[-2:]
    count = full.text.index(stop) + 2
    for length in (count, count + 1):  # the second has a last token behind the stop
        (result,) = generate(runtime, text, [prompt], Options(max_new_tokens=length, stop=[stop]))
        assert (result.finish_reason, result.text) == ("stop", full.text[: count - 2])


def test_leaving_a_stream_early_runs_nothing_more(rng):
    runtime, text = fakes(rng)
    list(itertools.islice(stream(runtime, text, "abc", Options(max_new_tokens=50)), 3))
    assert len(runtime.calls) <= 5


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_empty_prompt(prompt, rng):
    with pytest.raises(InputError, match="the prompt is empty"):
        generate(*fakes(rng), ["fine", prompt])


def test_messages_beside_ids(rng):
    with pytest.raises(InputError, match="the prompt mixes messages and token ids"):
        generate(*fakes(rng), [[{"role": "user", "content": "a"}, 3]])


def test_context(rng):
    runtime, text = fakes(rng, max_context=20)
    (result,) = generate(runtime, text, prompts(rng, 12), Options(max_new_tokens=8))
    assert len(result.token_ids) == 8
    with pytest.raises(InputError, match="12 tokens and 9 new ones exceed .* context of 20"):
        generate(runtime, text, prompts(rng, 3, 12), Options(max_new_tokens=9))
    with pytest.raises(InputError, match="21 tokens; the model's context holds 20"):
        stream(runtime, text, prompts(rng, 21)[0], Options(max_new_tokens=1))
    assert len(runtime.calls) == 8


@pytest.mark.parametrize("token", [-1, 64])
def test_ids_outside_the_vocabulary(token, rng):
    with pytest.raises(InputError, match=f"id {token} is outside the vocabulary of 64"):
        generate(*fakes(rng), [[3, token]])


@pytest.mark.parametrize("token", [-1, 64])
def test_stop_ids_outside_the_vocabulary(token, rng):
    with pytest.raises(InputError, match=f"stop: expected ids in 0-63, found {token}"):
        generate(*fakes(rng), ["a"], Options(stop=(3, token)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, not 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"stop": ""}, "stop takes strings"),
        ({"stop": ("a", "")}, "stop takes strings"),
        ({"stop": (1.5,)}, "stop takes strings"),
        ({"stop": b"x"}, "stop takes strings"),
        ({"stop": 5.0}, "stop takes strings"),
        ({"stop": object()}, "stop takes strings"),
        ({"stop": {"a": 1}}, "stop takes strings"),
        ({"stop": True}, "stop takes strings"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 10**400}, "temperature must be 0"),
        ({"top_p": 10**400}, "top_p must be a number from 0 to 1"),
        ({"repetition_penalty": 10**400}, "repetition_penalty must be a number"),
        ({"seed": 1.0}, "seed must be a whole number, not 1.0"),
        ({"seed": 10**5000}, "seed must be a whole number, not one of so many digits"),
        ({"max_new_tokens": 10**5000}, "max_new_tokens must be a whole number, not one of so many"),
        ({"stop": 10**5000}, "stop takes ids of 32 bits"),
        ({"speculate": ["ngram"]}, "speculate: expected one of ngram"),
        ({"speculate": np.array(["ngram"])}, "speculate: expected one of ngram"),
        ({"speculate": np.array(["ngram", "a"])}, "speculate: expected one of ngram"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(InputError, match=says):
        Options(**options)


def test_whole_numbers_may_be_longer_than_a_float(rng):
    options = Options(temperature=1.0, seed=10**400, top_k=10**400, max_new_tokens=4)
    runtime = fakes(rng)
    first, again = (generate(*runtime, ["a"], options)[0].token_ids for _ in range(2))
    assert first == again and len(first) == 4


def test_the_beginning_of_a_stop_string_is_text_at_the_end(rng):
    runtime, text = fakes(rng)
    plain = generate(runtime, text, ["abc"], Options(max_new_tokens=6))[0].text
    held = generate(runtime, text, ["abc"], Options(max_new_tokens=6, stop=plain[-2:] + "!"))[0]
    assert held.text == plain and held.finish_reason == "length"


def test_stops_of_any_kind():
    assert Options(stop=None).stop == ()
    assert Options(stop="a").stop == ("a",)
    assert Options(stop=np.int64(4)).stop == Options(stop=np.array([4])).stop == (4,)
    assert Options(stop=torch.tensor(4)).stop == (4,)
    assert Options(stop=[torch.tensor(4), "a"]).stop == (4, "a")


def test_unknown_option():
    with pytest.raises(TypeError, match="temprature"):
        Options(temprature=1.0)
