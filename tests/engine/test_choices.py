"""Multiple choice against its definition, lm-eval's rule by transformers, statistics by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support import tiny
from support.fake import FakeRuntime, FakeText
from support.versions import skip_before

from engine.api import load
from engine.errors import InputError
from engine.evaluate import choices as module
from engine.evaluate import judge_choices
from engine.evaluate.choices import Encoded, encode, log_likelihoods
from engine.judgement import Choices, wilson
from engine.text.questions import Question, read_questions

VOCABULARY = [chr(i) for i in range(64)]


def numbers(rng, most: int) -> str:
    """1 to `most` words of the tiny tokenizers."""
    count = int(torch.randint(1, most + 1, (1,), generator=rng))
    return " ".join(map(str, torch.randint(3, tiny.VOCAB, (count,), generator=rng).tolist()))


def ask(rng, count: int) -> list[Question]:
    """Questions of 2 to 4 choices, some of a single token."""
    widths = torch.randint(2, 5, (count,), generator=rng).tolist()
    return [
        Question(numbers(rng, 20), tuple(numbers(rng, 5) for _ in range(n)), n - 1, f"line {at}")
        for at, n in enumerate(widths)
    ]


@torch.no_grad()
def by_transformers(model, context: list[int], choice: list[int]) -> float:
    logits = model(torch.tensor([context + choice[:-1]])).logits[0, -len(choice) :]
    ids = torch.tensor(choice)[:, None]
    return float(logits.double().log_softmax(-1).gather(-1, ids).sum())


# Short windows, scaling by length, LongRoPE's switch, softcaps: what a shared prefix could break.
@pytest.mark.parametrize("case", ["llama", "llama-dynamic", "phi3-longrope", "gemma2", "qwen3"])
def test_log_likelihoods_equal_transformers(case, rng, tmp_path):
    if case == "llama-dynamic":
        skip_before("5.16", "scales by the longest text so far, not by this one's length")
    peer = tiny.write(case, tmp_path, int(torch.randint(2**31, (1,), generator=rng)))
    tiny.save_tokenizer(tmp_path)
    questions = ask(rng, 11)
    # Beyond every original context; of one length: transformers' dynamic NTK keeps the longest's.
    words = torch.randint(3, tiny.VOCAB, (68,), generator=rng).tolist()
    long, *choices = (" ".join(map(str, each)) for each in (words[:60], words[60:64], words[64:]))
    questions.insert(3, Question(long, tuple(choices), 0, "long"))
    for backend in ("reference", "cpu"):
        with load(tmp_path, backend=backend, dtype="float32") as model:
            encoded = [encode(model.text, question) for question in questions]
            found = list(log_likelihoods(model.runtime, encoded))
        for each, likelihoods in zip(encoded, found, strict=True):
            expected = [by_transformers(peer, each.context, choice) for choice in each.choices]
            assert likelihoods.sums.tolist() == pytest.approx(expected, abs=1e-3)


def test_a_choice_is_encoded_with_its_question(default_model):
    """lm-eval's rule written out with transformers' own tokenizer."""
    from engine.text import load_text

    text = load_text(default_model)
    peer = text.to_transformers()
    for question in ("What is the capital of France?", "Who wrote 12 books in 1999"):
        asked = Question(question, ("Paris", "a dog's 10 naïve bones", "!"), 0, "here")
        context = f"Question: {question}\nAnswer:"
        alone = peer.encode(context, add_special_tokens=False)
        whole = [peer.encode(f"{context} {c}", add_special_tokens=False) for c in asked.choices]
        expected = [ids[len(alone) :] for ids in whole]
        assert encode(text, asked) == Encoded(alone, expected)
        begun = encode(text, asked, bos=True)
        assert begun == Encoded([text.bos_id, *alone], expected)


def test_no_more_at_once_than_a_runtime_decodes():
    """Questions of one token each: a decode step where nothing bounds them."""
    encoded = [Encoded([at], [[at + 1, at]]) for at in range(20)]
    every = list(log_likelihoods(FakeRuntime(1), encoded, 64))
    runtime = FakeRuntime(1)
    runtime.most_sequences = 6
    for found, expected in zip(log_likelihoods(runtime, encoded, 64), every, strict=True):
        assert found.greedy == expected.greedy
        torch.testing.assert_close(found.sums, expected.sums)
    assert {shape[0] for shape, _, _ in runtime.calls} == {6, 2}


def test_a_question_runs_once(rng):
    runtime, text = FakeRuntime(1), FakeText(VOCABULARY)
    encoded = [encode(text, each) for each in ask(rng, 20)]
    list(log_likelihoods(runtime, encoded))
    assert len(runtime.calls) <= math.ceil(20 / module.BATCH) * (1 + 4)
    contexts = [shape for shape, _, logits in runtime.calls if logits == "last"]
    assert sum(shape[0] for shape in contexts) == 20


@pytest.mark.parametrize("room", [1, 50, 10**6])
def test_equals_the_definition(room, rng, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 64 * room)
    runtime = FakeRuntime(int(torch.randint(2**31, (1,), generator=rng)))
    text, questions = FakeText(VOCABULARY, bos_id=9), ask(rng, 13)
    seen = []
    result = judge_choices(
        runtime, text, questions, source="q", progress=lambda *done: seen.append(done)
    )
    right, shares = [], []
    for question in questions:
        context = [9, *text.encode(module.CONTEXT.format(question.question), add_special=False)]
        scores = []
        for choice in question.choices:
            ids = text.encode(f" {choice}", add_special=False)
            rows = [runtime.logits(context + ids[:at]).double() for at in range(len(ids))]
            each = [row.log_softmax(-1)[id] for row, id in zip(rows, ids, strict=True)]
            scores.append(sum(each) / len(choice))
        spread = torch.tensor(scores).softmax(-1)
        right.append(int(spread.argmax()) == question.answer)
        shares.append(float(spread[question.answer]))
    assert result.correct == tuple(right) and result.bos and result.questions == 13
    assert result.probabilities == pytest.approx(shares, abs=1e-5)
    assert result.probability == pytest.approx(sum(shares) / 13, abs=1e-5)
    assert result.accuracy == sum(right) / 13
    assert result.chance == pytest.approx(sum(1 / len(q.choices) for q in questions) / 13)
    assert seen == [(done, 13) for done in range(1, 14)]


def test_other_questions_choices_or_answers_are_told_apart():
    one, hashes = Question("a?", ("x", "y"), 1, "line 1"), []
    others = {"question": "b?"}, {"choices": ("x", "z")}, {"answer": 0}
    for more in ({}, {"where": "line 2"}, *others):
        asked = [replace(one, **more)]
        found = judge_choices(FakeRuntime(1), FakeText(VOCABULARY), asked, source="q")
        hashes.append(found.questions_hash)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_a_question_too_long_for_the_context():
    asked = [Question("x" * 240, ("a", "b"), 0, "file: line 7")]
    with pytest.raises(InputError, match="file: line 7: has 260 tokens; the .* holds 256"):
        judge_choices(FakeRuntime(1), FakeText(VOCABULARY), asked, source="file")


def test_logits_that_are_no_numbers():
    runtime = FakeRuntime(1)
    runtime.table[:, 5] = float("nan")
    with pytest.raises(ArithmeticError, match="not finite"):
        judge_choices(
            runtime, FakeText(VOCABULARY), [Question("a?", ("x", "y"), 0, "here")], source="q"
        )


def test_a_choice_without_a_token():
    class Forgetful(FakeText):
        def encode(self, text, add_special=True):
            return super().encode(text.removesuffix(" b"), add_special)

    with pytest.raises(InputError, match="line 1: 'b' adds no token to its question"):
        encode(Forgetful(VOCABULARY), Question("a", ("a", "b"), 0, "line 1"))


def test_questions_are_read(tmp_path):
    rows = [
        {"question": "a\u2028b?", "choices": ["x", "y"], "answer": 1, "more": 3},
        {"question": "c?", "choices": ["x", "y", "z"], "answer": 0},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n")
    first, second = read_questions(path)
    assert first == Question("a\u2028b?", ("x", "y"), 1, f"{path}: line 1")
    assert (second.choices, second.where) == (("x", "y", "z"), f"{path}: line 3")


GOOD = {"question": "a?", "choices": ["x", "y"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not valid JSON"),
        ([1], "expected an object, found list"),
        ({"question": "a?", "choices": ["x", "y"]}, "'answer' is missing"),
        (GOOD | {"question": " "}, "question: expected text, found ' '"),
        (GOOD | {"question": 3}, "question: expected text, found 3"),
        (GOOD | {"choices": ["x"]}, "choices: expected two or more, found"),
        (GOOD | {"choices": "xy"}, "choices: expected two or more, found 'xy'"),
        (GOOD | {"choices": ["x", ""]}, "choices: expected text, found ''"),
        (GOOD | {"answer": 2}, "answer: expected a number from 0 to 1, found 2"),
        (GOOD | {"answer": -1}, "answer: expected a number from 0 to 1, found -1"),
        (GOOD | {"answer": True}, "answer: expected a number from 0 to 1, found True"),
    ],
)
def test_rows_that_are_no_question(row, says, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)))
    with pytest.raises(InputError, match="q.jsonl: line 2: ") as error:
        read_questions(path)
    assert says in str(error.value)


def record(correct, probabilities, questions="same") -> Choices:
    return Choices.of("f", questions, False, 1 / 3, tuple(correct), tuple(probabilities))


def test_the_interval_is_wilsons():
    """Against the quadratic that defines it: |share - p| = z sqrt(p (1 - p) / n)."""
    for right, count in ((0, 10), (10, 10), (3, 10), (250, 500)):
        for p in wilson(right, count):
            assert (right / count - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / count)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1, abs=1e-12)


def test_what_is_left_of_the_whole_model():
    whole = record([True] * 6 + [False] * 4, [0.6] * 10)
    pruned = record([True] * 5 + [False, True] + [False] * 3, [0.5] * 10)
    found = pruned.beside(whole)
    assert found.accuracy_difference == 0  # one lost, one gained
    margin = 1.959964 * math.sqrt(2 / 9 / 10)
    assert (found.difference_low, found.difference_high) == pytest.approx((-margin, margin))
    assert found.lead_share == pytest.approx((0.5 - 1 / 3) / (0.6 - 1 / 3))
    assert (found.whole_accuracy, found.whole_probability) == pytest.approx((0.6, 0.6))
    same = whole.beside(whole)
    assert same.lead_share == 1 and same.difference_low == same.difference_high == 0
    assert whole.beside(record([False] * 10, [0.3] * 10)).lead_share is None
    with pytest.raises(InputError, match="not the same questions"):
        whole.beside(record([True], [0.5], "others"))


def test_a_worse_model_has_less():
    found = record([True] + [False] * 9, [0.5] * 10).beside(
        record([True] * 6 + [False] * 4, [0.6] * 10)
    )
    assert found.accuracy_difference == pytest.approx(-0.5)
    assert found.difference_low < -0.5 < found.difference_high < 0
