"""n-gram drafts: the same tokens as without them, in fewer steps where a text repeats."""

from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.fake import FakeRuntime, FakeText

from engine.api import load
from engine.errors import InputError
from engine.generation import Drafting, Options, generate
from engine.speculate import BELIEF, FORGET, MOST, SHORTEST, Drafts, Pace

LETTERS = [chr(ord("a") + i % 26) for i in range(64)]


class Repeating(FakeRuntime):
    """Prefers the token of `period` ids ago, by so much; the fake's own logits say the rest."""

    period, by = 7, 4.0

    def logits(self, ids):
        found = super().logits(ids)
        if len(ids) >= self.period:
            found[ids[-self.period]] += self.by
        return found


@pytest.fixture
def free(monkeypatch):
    """Steps cost the same whatever they run: drafts are as long as their chance allows."""
    monkeypatch.setattr(Pace, "saw", lambda pace, *_: setattr(pace, "single", 1.0))


def draw(rng, high: int, *shape: int) -> list:
    return torch.randint(high, shape, generator=rng).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "seed": 5},
        {"temperature": 1.0, "top_k": 9, "min_p": 0.05, "repetition_penalty": 1.3, "seed": 1},
        {"repetition_penalty": 1.2},
        {"stop": ("ab", "q", 17)},
        {"slots": (0, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("by", [0.0, 2.0, 9.0])
def test_the_same_tokens(options, by, rng, free):
    runtime, text = Repeating(draw(rng, 2**31, 1)[0], eos_ids=(3,)), FakeText(LETTERS)
    runtime.by = by
    batch = [draw(rng, 64, n) for n in (9, 1, 30)]
    batch.append(3 * draw(rng, 64, 6))
    plain = generate(runtime, text, batch, Options(max_new_tokens=40, **options))
    guessed = generate(
        runtime, text, batch, Options(max_new_tokens=40, speculate="ngram", **options)
    )
    for a, b in zip(plain, guessed, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
    assert sum(guessed[0].timings.step_tokens) == sum(plain[0].timings.step_tokens)


def test_fewer_steps_where_it_repeats(rng, free):
    runtime, text = Repeating(draw(rng, 2**31, 1)[0]), FakeText(LETTERS)
    runtime.by = 99.0
    options = Options(max_new_tokens=80, speculate="ngram")
    found = generate(runtime, text, [2 * draw(rng, 64, 7)], options)[0]
    assert len(found.token_ids) == 80 and len(found.timings.step_ns) <= 80 / MOST + 4
    assert sum(found.timings.step_tokens) == 79
    # Each step gives what was guessed right and a token of its own.
    assert found.timings.accepted == 79 - len(found.timings.step_ns) > 0
    assert found.timings.accepted <= found.timings.drafted
    plain = generate(runtime, text, [[5, 6, 7]], Options(max_new_tokens=9))[0].timings
    assert (plain.drafted, plain.accepted) == (0, 0)


def test_what_ends_within_a_draft_was_guessed_right(rng, free):
    """The end is the fifth of seven that are guessed at the third token; the rest never came."""
    runtime, text = Repeating(draw(rng, 2**31, 1)[0]), FakeText(LETTERS)
    runtime.by = 99.0
    ids = torch.randperm(64, generator=rng)[: runtime.period].tolist()
    options = Options(max_new_tokens=80, speculate="ngram", stop=(ids[-1],))
    found = generate(runtime, text, [2 * ids], options)[0]
    assert list(found.token_ids) == ids and found.timings.step_tokens == (1, 5)
    assert (found.timings.drafted, found.timings.accepted) == (MOST, 5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_a_real_cache_goes_back(case, backend, rng, tmp_path, free):
    """Tiny random models fall into loops; windows are shorter than the text."""
    tiny.write(case, tmp_path, int(torch.randint(2**31, (1,), generator=rng)))
    tiny.save_tokenizer(tmp_path)
    prompts = [3 * draw(rng, tiny.VOCAB, 5), draw(rng, tiny.VOCAB, 3)]
    with load(tmp_path, backend=backend, dtype="float32") as model:
        plain = model.generate(prompts, max_new_tokens=60, ignore_eos=True)
        guessed = model.generate(prompts, max_new_tokens=60, ignore_eos=True, speculate="ngram")
        for a, b in zip(plain, guessed, strict=True):
            differs = [i for i in range(60) if a.token_ids[i] != b.token_ids[i]]
            if differs:  # only where two tokens are as likely, to float32
                ids = [*prompts[plain.index(a)], *a.token_ids[: differs[0]]]
                top = model([ids])[0, -1].topk(2).values
                assert float(top[0] - top[1]) < 1e-3
    assert len(guessed[0].timings.step_ns) <= len(plain[0].timings.step_ns)


def test_the_longest_suffix_and_what_followed_it():
    pace = Pace()
    pace.more = 0.0
    drafts = Drafts(pace)
    ids = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 6, 1, 2, 3]
    assert drafts.propose(ids, 99) == [4, 5, 9, 2, 3, 7, 8]  # three are longer than two
    assert drafts.propose([*ids[:-1], 5], 99) == []
    assert Drafts(pace).propose(ids, 2) == [4, 5]
    assert Drafts(pace).propose([0, *ids[1:-3], 2, 3], 99)[:3] == [7, 8, 6]  # the latest
    assert Drafts(pace).propose([8, 4, 6, 8, 4], 99) == [6, 8, 4, 6, 8, 4, 6]  # into itself
    assert Drafts(pace).propose([4] * (SHORTEST + 1), 99) == [4] * MOST
    assert Drafts(pace).propose([4], 99) == []
    grown = Drafts(pace)
    for length in range(len(ids)):  # no place is missed where the text comes a token at a time
        grown.propose(ids[:length], 99)
    assert grown.propose(ids, 99) == [4, 5, 9, 2, 3, 7, 8]


def test_a_step_without_a_draft_comes_first():
    """What others cost is told by it."""
    drafting = Drafting(1)
    sequence = SimpleNamespace(ids=[3, 4] * 8, room=99)
    drafting.saw(1)  # the prompt
    assert drafting.propose([sequence], [0]) == {}
    drafting.saw(100)  # the lone step that followed
    assert drafting.propose([sequence], [0]) == {0: [3, 4, 3, 4, 3, 4, 3]}
    drafting.saw(800)  # of eight tokens: the seven more as much as one each
    assert drafting._pace.more == pytest.approx(0.8 * 0.1 + 0.2 * 1.0)


def test_drafts_end_where_they_do_not_pay():
    pace = Pace()
    pace.more = 0.5
    drafts, ids = Drafts(pace), list(range(20)) * 2
    lengths = []
    for _ in range(12):
        drafted = drafts.propose(ids, 99)
        lengths.append(len(drafted))
        drafts.learn(len(drafted), 0)
    assert lengths[0] > 0 == lengths[-1]
    assert Pace().best(0.0) == 0 and Pace().best(1.0) == MOST
    for _ in range(50):
        pace.saw(1, 100)
        pace.saw(1 + MOST, 100)
    assert pace.more == pytest.approx(0, abs=1e-3)


def test_what_a_draft_costs_and_how_likely_it_is():
    """By hand; tokens behind the first wrong one were never tried."""
    pace, chances = Pace(), []
    pace.saw(8, 900)  # says nothing before a step of one token
    assert (pace.single, pace.more) == (0, 0.1)
    pace.saw(1, 100)
    pace.saw(1, 200)
    assert pace.single == pytest.approx(0.8 * 100 + 0.2 * 200)
    for tokens, elapsed_ns, found in ((5, 360, 0.5), (2, 90, 0.0), (2, 900, 2.0)):
        expected = 0.8 * pace.more + 0.2 * found
        pace.saw(tokens, elapsed_ns)
        assert pace.more == pytest.approx(expected)
    pace.more = 0.25
    assert pace.best(0.5) == 1  # 1, 1.5 / 1.25, 1.75 / 1.5, ...
    pace.best = lambda chance: chances.append(chance) or 3
    drafts, three = Drafts(pace), [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 6, 1, 2, 3]
    right, tried = BELIEF * (1 - 1 / 3), BELIEF
    for accepted, ran in ((1, 2), (3, 3), (0, 1)):
        drafts.propose(three, 99)
        assert chances[-1] == pytest.approx(right / tried)
        drafts.learn(3, accepted)
        right, tried = FORGET * right + accepted, FORGET * tried + ran
    Drafts(pace).propose([1, 2, 9, 2, 1, 2], 99)  # two in common: nothing is before the first
    assert chances[-1] == 1 - 1 / 2


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="speculate: expected one of ngram, found 'draft'"):
        Options(speculate="draft")
    tiny.write("phi3-longrope", tmp_path, 0)
    tiny.save_tokenizer(tmp_path)
    with load(tmp_path, backend="reference") as model, pytest.raises(InputError, match="rotations"):
        model.generate([3, 4], speculate="ngram")
