"""engine eval with several texts, questions and generation, and engine compare of its records."""

import json
import math

import pytest
import torch
from support import tiny
from support.commands import call, refused

from engine import api
from engine.artifacts import Evaluation
from engine.judgement import Comparison, Judgement
from engine.report.records import measures, side_by_side


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A model, one of another vocabulary, two texts and questions."""
    path = tmp_path_factory.mktemp("tree")
    for name, options in (("model", {}), ("other", {"vocab_size": tiny.VOCAB + 8})):
        tiny.write("llama", path / name, 1, max_position_embeddings=512, **options)
        tiny.save_tokenizer(path / name)
    numbers = torch.randint(3, tiny.VOCAB, (400,), generator=torch.Generator().manual_seed(1))
    words = list(map(str, numbers.tolist()))
    path.joinpath("a.txt").write_text(" ".join(words[:200]))
    path.joinpath("b.txt").write_text(" ".join(words[200:]))
    rows = [
        {"question": words[at], "choices": words[at + 1 : at + 4], "answer": at % 3}
        for at in range(0, 120, 4)
    ]
    path.joinpath("q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path.joinpath("others.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    return path


@pytest.fixture(scope="module")
def evaluated(tree):
    def evaluate(*options, model="model"):
        code, out, err = call("eval", tree / model, "--window", 32, *options)
        assert code == 0, err
        return json.loads(out.splitlines()[-1]), " ".join(out.replace("│", " ").split())

    return evaluate


@pytest.fixture(scope="module")
def records(tree, evaluated):
    """Judgements of the whole model and of one without a layer, in files."""
    asked = ["--text", tree / "a.txt", "--text", tree / "b.txt", "--choices", tree / "q.jsonl"]
    asked += ["--health", "--prompts", 6, "--new-tokens", 70]
    evaluated(*asked, "--json", tree / "whole.json")
    pruned = ("--drop", 2, "--against", tree / "model", "--json", tree / "pruned.json")
    raw, shown = evaluated(*asked, *pruned)
    return Judgement.load(tree / "whole.json"), Judgement.load(tree / "pruned.json"), raw, shown


def test_one_text_is_an_evaluation(tree, evaluated):
    raw, _ = evaluated("--text", tree / "a.txt")
    found = Evaluation.from_json(raw, "stdout")
    assert found.text == str(tree / "a.txt") and found.bits_per_byte > 0


def test_an_instruction_set_is_of_both_models(tree, monkeypatch):
    text = ("--text", tree / "a.txt", "--window", 32)
    cpu = "--backend", "cpu"
    refused("isa: expected one of", "eval", tree / "model", *text, *cpu, "--isa", "x")
    only = "isa: for the backend cpu alone, found 'generic' for reference"
    refused(only, "eval", tree / "model", *text, "--isa", "generic", "--backend", "reference")
    opened, load = [], api.load
    monkeypatch.setattr(
        api, "load", lambda *of, **how: opened.append(how["isa"]) or load(*of, **how)
    )
    both = ("--against", tree / "model", *cpu, "--isa", "generic")
    code, _, err = call("eval", tree / "model", *text, *both)
    assert (code, opened) == (0, ["generic"] * 2), err


def test_several_texts_and_their_geometric_mean(tree, evaluated):
    asked = [each for name in "ab" for each in ("--text", tree / f"{name}.txt")]
    raw, shown = evaluated(*asked)
    found = Judgement.from_json(raw, "stdout")
    assert [*found.texts] == [str(tree / "a.txt"), str(tree / "b.txt")]
    first, second = found.texts.values()
    assert found.perplexity == pytest.approx(math.sqrt(first.perplexity * second.perplexity))
    alone = Evaluation.from_json(evaluated("--text", tree / "b.txt")[0], "stdout")
    assert second == alone
    assert f"a.txt: perplexity {first.perplexity:,.4f}" in shown
    assert f"perplexity, geometric mean {found.perplexity:,.4f}" in shown


def test_everything_at_once(tree, records):
    whole, pruned, raw, shown = records
    assert Judgement.from_json(raw, "stdout") == pruned
    assert pruned.against == str(tree / "model") and whole.against is None
    assert all(text.kl > 0 for text in pruned.texts.values())
    assert pruned.choices.questions == 30 and pruned.health.prompts == 6
    assert pruned.choices.against == pruned.choices.beside(whole.choices)
    assert whole.choices.against is whole.health.agreement is None
    assert 0 <= pruned.health.agreement <= 1
    assert "accuracy, less the whole model's" in shown and "distinct-4" in shown
    assert f"loop {pruned.health.looping:.1%}" in shown


def test_a_judgement_that_is_damaged(records, tree, tmp_path):
    raw, one = records[2], {"questions": 1, "correct": [True], "probabilities": [0.5]}
    choices = raw["choices"]
    for change, says in (
        ({"choices": {"source": "q"}}, "judgement: choices: 'accuracy' is missing"),
        ({"choices": choices | {"correct": []}}, "correct: expected 30, a question each, found 0"),
        ({"choices": choices | {"probabilities": [1]}}, "expected 30, a question each, found 1"),
        ({"choices": choices | {"questions": 0}}, "questions: expected at least 1, found 0"),
        ({"choices": choices | one}, "not the same questions"),
        ({"health": 3}, "health: expected Health, found 3"),
        ({"texts": {"a": {"colour": 1}}}, "judgement: texts: "),
        ({"texts": {"\ud800": raw["texts"][str(tree / "a.txt")]}}, "texts: expected text, found"),
        ({"perplexity": 10**400}, "judgement: perplexity: expected a number of at most 64 bits"),
    ):
        tmp_path.joinpath("bad.json").write_text(json.dumps(raw | change))
        refused(says, "compare", tree / "whole.json", tmp_path / "bad.json")


def test_an_evaluation_that_is_damaged(records, tree, tmp_path):
    raw = next(iter(records[0].texts.values())).to_json()
    for nll in (-1e308, float("nan"), -1):
        tmp_path.joinpath("bad.json").write_text(json.dumps(raw | {"nll": nll}))
        says = f"bad.json: evaluation: nll: expected at least 0, found {float(nll)}"
        refused(says, "compare", tree / "whole.json", tmp_path / "bad.json")
    for nll in (0, 1e308, float("inf")):
        tmp_path.joinpath("bad.json").write_text(json.dumps(raw | {"nll": nll}))
        assert call("compare", tree / "whole.json", tmp_path / "bad.json")[0] == 0
    huge = Evaluation.from_json(raw | {"nll": 1e308}, "here")
    assert Judgement.of({"a": huge, "b": huge}).perplexity == math.inf


def test_records_side_by_side(records, tree, evaluated, tmp_path):
    whole, pruned, _, _ = records
    evaluated("--text", tree / "a.txt", "--json", tree / "alone.json")
    files = [tree / f"{name}.json" for name in ("whole", "pruned", "alone")]
    code, out, _ = call("compare", *files, "--json", tmp_path / "out.json")
    found = Comparison.from_json(json.loads(out.splitlines()[-1]), "stdout")
    assert code == 0 and Comparison.load(tmp_path / "out.json") == found
    assert found.records[:2] == (whole, pruned) and len(found.records) == 3
    assert found.paired == (None, pruned.choices.beside(whole.choices), None)
    code, out, err = call("--quiet", "compare", *files)
    assert (code, out.count("\n"), err) == (0, 1, "")


def test_multiples_are_of_the_same_windows(records):
    whole, pruned, _, _ = records
    rows = dict(side_by_side(Comparison.of((whole, pruned))))
    for name, text in pruned.texts.items():
        times = text.perplexity / whole.texts[name].perplexity
        short = name.rpartition("/")[2]
        assert rows[f"{short}: perplexity"][1].endswith(f" ({times:.3f}x)")
        assert rows[f"{short}: KL from the whole model"][0] == "-"
    assert rows["layers"] == ["4 of 4: 0-3", "3 of 4: 0-1,3"]
    assert rows["accuracy, less the whole model's"][0] == "-"


def test_texts_of_the_same_name_are_told_apart(records):
    text = next(iter(records[0].texts.values()))
    both = measures(Judgement.of({"x/a.txt": text, "y/a.txt": text}))
    assert {"x/a.txt: perplexity", "y/a.txt: perplexity"} <= set(both)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--text", "{a}", "--text", "{a}"], "a.txt: the text is given twice"),
        (["--text", "{a}", "--text", "{again}"], "../a.txt: the text is given twice"),
        (["--text", "{a}", "--text", "{link}"], "link.txt: the text is given twice"),
        (["--text", "{empty}"], "empty.txt: expected text, found an empty file"),
        (["--choices", "{empty}"], "empty.txt: expected text, found an empty file"),
        (["--choices", "{a}"], "a.txt: line 1: not valid JSON"),
        (["--text", "{a}", "--against", "{other}"], "cannot be compared"),
        (["--text", "{a}", "--bos"], "the tokenizer has no BOS token"),
        (["--health", "--new-tokens", 63], "new-tokens: expected at least 64, found 63"),
        (["--health", "--prompts", 0], "prompts: expected 1 to"),
        (["--health", "--new-tokens", 500], "the model's context holds 512"),
        (["--prompts", 5], "--prompts and --new-tokens are of --health"),
        (["--text", "{a}", "--text", "{short}"], "short.txt has 2 tokens; 1 windows of 32 need 32"),
        (["--choices", "{long}"], "long.jsonl: line 1: has 606 tokens; the model's context holds"),
    ],
)
def test_eval_refuses_in_one_line(options, says, tree):
    tree.joinpath("empty.txt").write_text(" \n")
    tree.joinpath("short.txt").write_text("3 4")
    long = {"question": "5 " * 600, "choices": ["6 7", "8"], "answer": 0}
    tree.joinpath("long.jsonl").write_text(json.dumps(long))
    names = ("a.txt", "empty.txt", "short.txt", "long.jsonl", "other")
    files = {f"{{{name.partition('.')[0]}}}": tree / name for name in names}
    files |= {"{again}": tree / "model" / ".." / "a.txt", "{link}": tree / "link.txt"}
    if not files["{link}"].exists():  # by another case
        files["{link}"].symlink_to(tree / "a.txt")
    given = [files.get(each, each) for each in options]
    if "--text" not in options:
        given += ["--text", tree / "a.txt"]
    refused(says, "eval", tree / "model", "--window", 32, *given)


def test_compare_refuses_in_one_line(records, tree, evaluated):
    refused("expected two records or more, found one", "compare", tree / "whole.json")
    refused("No such file", "compare", tree / "whole.json", tree / "nowhere.json")
    tree.joinpath("plan.json").write_text('{"kind": "plan"}')
    refused("found 'plan'", "compare", tree / "whole.json", tree / "plan.json")
    asked = ("--text", tree / "a.txt", "--choices", tree / "others.jsonl")
    evaluated(*asked, "--json", tree / "others.json")
    refused("not the same questions", "compare", tree / "whole.json", tree / "others.json")
