"""Generation health: loops, distinct n-grams and agreement by definition."""

import random
import re
import secrets

import pytest
import torch
from support.fake import FakeRuntime, FakeText

from engine.errors import InputError
from engine.evaluate import judge_health
from engine.evaluate.health import LAST, LONGEST, agreement, distinct, loops, prompts
from engine.generation import generate
from engine.options import Options

TEXT = FakeText([chr(i) for i in range(64)], eos_ids=(3,))


@pytest.fixture
def draw():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


def fake(rng) -> FakeRuntime:
    return FakeRuntime(int(torch.randint(2**31, (1,), generator=rng)), max_context=512)


@pytest.mark.parametrize("period", [1, 2, 31, 32, 33, 40])
def test_a_loop_has_a_short_period(period, draw):
    start = [draw.randrange(100) for _ in range(draw.randrange(50))]
    circle = [100 + at for at in range(period)]  # without a shorter period of its own
    ids = (start + circle * LAST)[: len(start) + LAST]
    assert loops(ids) == loops(ids[-LAST:]) == (period <= LONGEST)
    assert not loops(ids[-LAST + 1 :])  # too few to say
    changed = ids.copy()
    changed[len(start) + draw.randrange(LAST)] = -1
    assert not loops(changed) and not loops(ids + [7])


def test_distinct_n_grams():
    assert distinct([[1, 1, 1, 1]], 1) == 0.25 and distinct([[1, 2, 1, 2]], 2) == 2 / 3
    assert distinct([[1, 2], [1, 2]], 1) == 1  # each generation's own
    assert distinct([[1]], 2) == 0


def test_agreement_ends_at_the_first_difference():
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert agreement([1, 2], [1, 2, 3, 4]) == agreement([1, 2, 3, 4], [1, 2]) == 0.5
    assert agreement([1], [1]) == 1 and agreement([1], [2]) == 0


def test_prompts_are_fixed():
    found = prompts()
    assert len(set(found)) == 200 and found == prompts()
    assert {len(prompt.split()) for prompt in found} == {16}
    assert len(prompts(1)) == 1 and len(prompts(7)) == 7
    for count in (0, 10**4):
        with pytest.raises(InputError, match=f"prompts: expected 1 to .*, found {count}") as said:
            prompts(count)
    most = int(re.search(r"1 to (\d+)", str(said.value))[1])
    assert len(set(prompts(most))) == most  # none comes twice


def test_equals_the_definition(rng):
    runtime, second, seen = fake(rng), fake(rng), []
    result = judge_health(
        runtime, TEXT, count=20, new_tokens=70, second=second,
        progress=lambda *done: seen.append(done),
    )  # fmt: skip
    options = Options(max_new_tokens=70)
    own, whole = (
        generate(each, TEXT, [TEXT.encode(prompt) for prompt in prompts(20)], options)
        for each in (runtime, second)
    )
    ids = [each.token_ids for each in own]
    assert result.looping == sum(map(loops, ids)) / 20
    assert result.ended == sum(each.finish_reason == "stop" for each in own) / 20
    assert result.mean_tokens == sum(map(len, ids)) / 20
    assert result.distinct == tuple(distinct(ids, n) for n in (1, 2, 3, 4))
    pairs = zip(own, whole, strict=True)
    shares = [agreement(a.token_ids, b.token_ids) for a, b in pairs]
    assert result.agreement == pytest.approx(sum(shares) / 20)
    assert seen == [(16, 20), (20, 20)]
    assert judge_health(runtime, TEXT, count=3, new_tokens=64).agreement is None
    itself = judge_health(runtime, TEXT, count=3, new_tokens=64, second=runtime)
    assert itself.agreement == 1


def test_bos_begins_every_prompt(rng):
    runtime, text = fake(rng), FakeText(TEXT.vocabulary, bos_id=9)
    found = [judge_health(runtime, text, count=2, new_tokens=64, bos=bos) for bos in (None, False)]
    assert [each.bos for each in found] == [True, False]
    assert found[0].prompts_hash != found[1].prompts_hash


def test_refusals(rng):
    with pytest.raises(InputError, match="new-tokens: expected at least 64, found 63"):
        judge_health(fake(rng), TEXT, new_tokens=63)
    with pytest.raises(InputError, match="vocabularies of 64 and 32 tokens cannot be compared"):
        judge_health(fake(rng), TEXT, second=FakeRuntime(1, vocab_size=32))
