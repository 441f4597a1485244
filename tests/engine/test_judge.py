"""All that is asked of a model: the parts together, and checks before anything runs."""

from contextlib import contextmanager

import pytest
import torch
from support.fake import FakeRuntime, FakeText

from engine.errors import InputError
from engine.evaluate import Asked, evaluate, judge, judge_choices, judge_health
from engine.judgement import BUILT_IN, Judgement
from engine.text.questions import Question

TEXT = FakeText([chr(i) for i in range(64)])
QUESTIONS = (Question("a?", ("x", "yes", "z"), 1, "line 1"), Question("b?", ("no", "u"), 0, "2"))


def fake(rng, **options) -> FakeRuntime:
    return FakeRuntime(int(torch.randint(2**31, (1,), generator=rng)), max_context=512, **options)


def test_a_judgement_is_what_its_parts_are(rng, tmp_path):
    runtime, second, content = fake(rng), fake(rng), "words to predict, " * 9
    asked = Asked({None: content, "b": "b" + content}, 32, 2, None, QUESTIONS, "q", 3, 64)
    said = []

    @contextmanager
    def progress(label):
        yield lambda done, total: said.append((label, done == total))

    found = judge(
        runtime, TEXT, asked, name="m", rule="simple", second=second, against="w", progress=progress
    )
    named = {"name": "m", "rule": "simple", "window": 32, "count": 2, "second": second}
    assert found.texts == {
        BUILT_IN: evaluate(runtime, TEXT, content, **named),
        "b": evaluate(runtime, TEXT, "b" + content, source="b", **named),
    }
    whole = judge_choices(second, TEXT, QUESTIONS, source="q")
    own = judge_choices(runtime, TEXT, QUESTIONS, source="q")
    assert found.choices.against == own.beside(whole)
    assert found.choices.probabilities == own.probabilities
    assert found.health == judge_health(runtime, TEXT, count=3, new_tokens=64, second=second)
    assert (found.model, found.rule, found.against) == ("m", "simple", "w")
    ends = [label for label, ended in said if ended]
    texts = [f"positions of {name}" for name in (BUILT_IN, "b")]
    assert ends == [*texts, "questions", "questions", "prompts"]
    found.save(tmp_path / "found.json")
    assert Judgement.load(tmp_path / "found.json") == found


def test_the_shorter_context_counts(rng):
    runtime, second = fake(rng), FakeRuntime(2, max_context=16)
    with pytest.raises(InputError, match="window must be from 2 to the model's context 16"):
        judge(runtime, TEXT, Asked({None: "a" * 99}, 32), second=second)
    assert not runtime.calls and not second.calls


def test_what_is_not_asked_for_is_not_there(rng):
    found = judge(fake(rng), TEXT, Asked({"a": "words to predict, " * 9}, 32))
    assert found.choices is found.health is found.against is None and [*found.texts] == ["a"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"texts": {None: "a" * 99, "b": "short"}}, "b has 5 tokens"),
        ({"bos": True}, "no BOS token"),
        ({"questions": (Question("x" * 600, ("a", "b"), 0, "line 4"),)}, "line 4: has 620 tokens"),
        ({"prompts": 0}, "prompts: expected 1 to"),
        ({"prompts": 3, "new_tokens": 63}, "new-tokens: expected at least 64, found 63"),
        ({"prompts": 3, "new_tokens": 500}, "the model's context holds 512"),
        ({"second": 32}, "vocabularies of 64 and 32 tokens cannot be compared"),
    ],
)
def test_nothing_runs_before_all_is_checked(change, says, rng):
    runtime = fake(rng)
    second = fake(rng, vocab_size=change["second"]) if "second" in change else None
    fields = {key: value for key, value in change.items() if key != "second"}
    asked = Asked(**{"texts": {None: "a" * 99}, "window": 32} | fields)
    with pytest.raises(InputError, match=says):
        judge(runtime, TEXT, asked, second=second)
    assert runtime.calls == []
