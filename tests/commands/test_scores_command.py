"""`engine plan --rule greedy`: what it runs on, what it says, how it is taken up again."""

import json
import math
import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny
from support.commands import call, refused

from engine.artifacts import Plan
from engine.checkpoint import open_checkpoint
from engine.commands.scores import SCORES, Asked, read_windows
from engine.errors import InputError
from engine.healing.patch import patch
from engine.healing.replaced import Replaced
from engine.kernels import native
from engine.pruning.score import DecoderStreams, PrefixScorer
from engine.reference.decoder import load_decoder
from engine.text import load_text
from engine.text.samples import read_samples

LAYERS = 8


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Models of 8 layers whose context is 64, text in their vocabulary, and profiles on it."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    root = tmp_path_factory.mktemp("scores")
    numbers = torch.randint(3, tiny.VOCAB, (2400,), generator=torch.Generator().manual_seed(seed))
    root.joinpath("text.txt").write_text(" ".join(map(str, numbers.tolist())))
    for case in ("llama", "gemma2"):
        tiny.write(case, root / case, seed, num_hidden_layers=LAYERS, max_position_embeddings=64)
        tiny.save_tokenizer(root / case)
        sampling = ("--text", root / "text.txt", "--length", 16, "--no-bos", "--samples", 20)
        assert call("profile", root / case, *sampling, "--out", root / f"{case}.json")[0] == 0
    return root


def arguments(tree, out, *options, count: int = 2, case: str = "llama") -> tuple:
    scored = ("--text", tree / "text.txt", "--windows", 4)
    plan = ("plan", tree / f"{case}.json", "--out", out, "--rule", "greedy", "--count", count)
    return *plan, *scored, *options


class Killed(BaseException):
    """Not caught by anything on the way."""


def killed_after(monkeypatch, scores: int) -> list:
    """The next run dies before that many have been scored and one more; the sets scored."""
    seen: list = []
    original = PrefixScorer.__call__

    def scored(self, kept):
        if len(seen) == scores:
            raise Killed
        seen.append(kept)
        return original(self, kept)

    monkeypatch.setattr(PrefixScorer, "__call__", scored)
    return seen


def test_the_runtime_and_the_reference_choose_the_same(tree, tmp_path):
    plans = []
    for options, where in (((), "CPU runtime"), (("--backend", "reference"), "reference")):
        code, out, _ = call(*arguments(tree, tmp_path / "plan.json", *options))
        assert code == 0 and f"scored on the {where}" in out
        plans.append(Plan.load(tmp_path / "plan.json"))
    if plans[0].drop != plans[1].drop:  # a tie, as far as rounding goes
        assert plans[0].score == pytest.approx(plans[1].score, rel=1e-4)
    assert plans[0].score == pytest.approx(plans[1].score, rel=1e-3)
    assert not list(tmp_path.glob("*.partial"))


DAMAGED = ("5", "[1]", '{"a": 1}', "[" * 9999, '[[], ["0"], 0.5, true]', "[[], 0, 0.5, true]")
DAMAGED += ('[[], KEPT, "x", true]', "[[], KEPT, null, true]", "[[], KEPT, NaN, true]")
DAMAGED += ("[[], KEPT, 0.0]", "[[], KEPT, 0.0, 1]", "[[], KEPT, 0.0, null]")


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_lines_are_left_out(tree, tmp_path, monkeypatch, line):
    first = killed_after(monkeypatch, 2)
    with pytest.raises(Killed):
        call(*arguments(tree, tmp_path / "plan.json"))
    with (tmp_path / "plan.json.partial" / SCORES).open("a") as file:
        for layer in range(2, LAYERS - 1):
            kept = [other for other in range(LAYERS) if other != layer]
            file.write(line.replace("KEPT", str(kept)) + "\n")
    monkeypatch.undo()
    second = killed_after(monkeypatch, 1000)
    assert call(*arguments(tree, tmp_path / "plan.json"))[0] == 0
    assert len(first) + len(second) == 5 + 4


@pytest.mark.parametrize("options", [(), ("--patch",), ("--rule", "search")])
def test_a_killed_run_scores_only_what_is_left(tree, tmp_path, monkeypatch, options):
    call(*arguments(tree, tmp_path / "whole.json", *options))
    first = killed_after(monkeypatch, 7)
    with pytest.raises(Killed):
        call(*arguments(tree, tmp_path / "plan.json", *options))
    work = tmp_path / "plan.json.partial" / SCORES
    assert len(first) == 7 and len(work.read_text().splitlines()) == 7
    with work.open("a") as file:
        file.write("[[1, 2")  # the half line of a kill
    monkeypatch.undo()
    second = killed_after(monkeypatch, 1000)
    code, _, _ = call(*arguments(tree, tmp_path / "plan.json", *options))
    assert code == 0 and not set(first) & set(second[: 9 - 7]) and not work.parent.exists()
    found, whole = (Plan.load(tmp_path / name) for name in ("plan.json", "whole.json"))
    assert found == whole


def test_a_score_that_was_given_up_is_not_taken_for_a_whole_one(tree, tmp_path, monkeypatch):
    best = Plan.load(planned(tree, tmp_path / "one.json", count=1)).drop
    killed_after(monkeypatch, 5)  # all of the first layer to go, but the best given up on the way
    with pytest.raises(Killed):
        call(*arguments(tree, tmp_path / "plan.json"))
    monkeypatch.undo()
    options = "--protect", ",".join(map(str, (0, 1, *best, LAYERS - 1)))
    found, fresh = (
        Plan.load(planned(tree, tmp_path / name, *options, count=1))
        for name in ("plan.json", "fresh.json")
    )
    assert found == fresh and not set(best) & set(found.drop)


def planned(tree, out: Path, *options, count: int) -> Path:
    code, _, err = call(*arguments(tree, out, *options, count=count))
    assert code == 0, err
    return out


@pytest.mark.parametrize("other", ["metric", "weights"])
def test_what_another_run_left_is_not_believed(other, tree, tmp_path, monkeypatch):
    first = killed_after(monkeypatch, 3)
    with pytest.raises(Killed):
        call(*arguments(tree, tmp_path / "plan.json"))
    monkeypatch.undo()
    seen = killed_after(monkeypatch, 1000)
    if other == "weights":
        os.utime(tree / "llama" / "model.safetensors")
    options = ("--metric", "loss") if other == "metric" else ()
    assert call(*arguments(tree, tmp_path / "plan.json", *options))[0] == 0
    assert seen[:3] == first and len(seen) == 5 + 4


def test_patches_that_another_text_made_are_not_believed(tree, tmp_path, monkeypatch):
    """Of the same rows to score, and others to fit on."""
    numbers = torch.randint(3, tiny.VOCAB, (12, 64), generator=torch.Generator().manual_seed(1))
    rows = [json.dumps({"text": " ".join(map(str, row.tolist()))}) for row in numbers]
    source = tmp_path / "rows.jsonl"
    asked = arguments(tree, tmp_path / "plan.json", "--patch", "--text", source)
    source.write_text("\n".join(rows[:8]))
    first = killed_after(monkeypatch, 7)
    with pytest.raises(Killed):
        call(*asked)
    monkeypatch.undo()
    source.write_text("\n".join(rows[:4] + rows[8:]))
    seen = killed_after(monkeypatch, 1000)
    assert call(*asked)[0] == 0
    assert seen[:5] == first[:5] and len(seen) == 5 + 4


def test_a_disk_that_is_full(tree, tmp_path, monkeypatch):
    opened = Path.open

    def full(self, *how, **options):
        return opened(Path("/dev/full") if self.name == SCORES else self, *how, **options)

    monkeypatch.setattr(Path, "open", full)
    scores = tmp_path / "plan.json.partial" / SCORES
    asked = "--quiet", *arguments(tree, tmp_path / "plan.json")
    refused(f"{scores}: No space left on device", *asked)
    assert not (tmp_path / "plan.json").exists()


def test_without_the_extension_the_reference_runs_and_says_so(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "error", lambda name: "it was not built")
    code, out, _ = call(*arguments(tree, tmp_path / "plan.json"))
    assert code == 0
    assert "reference (float32 on cpu), as the CPU runtime cannot run: it was not built" in out
    refused("it was not built", *arguments(tree, tmp_path / "plan", "--backend", "cpu"))


def test_progress_tells_count_and_best(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.progress.EVERY_S", 0.0)
    _, _, err = call(*arguments(tree, tmp_path / "plan.json"))
    lines = [line for line in err.splitlines() if line.startswith("scores: ")]
    assert len(lines) == 5 + 4
    assert lines[-1].startswith("scores: 9 of 9, best ") and ", 0 s left" in lines[-1]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert f"best {plan['score']:.4f} without " in lines[-1]


def test_patched_plans_are_those_of_patched_models(tree, tmp_path, monkeypatch):
    """The second layer is chosen in the model that the first cut's patch has mended."""
    code, _, err = call(*arguments(tree, tmp_path / "one.json", "--patch", count=1))
    assert code == 0, err
    heard, original = {}, PrefixScorer.__call__

    def whole(self, kept):
        self.most = math.inf
        heard[kept] = original(self, kept)
        return heard[kept]

    monkeypatch.setattr(PrefixScorer, "__call__", whole)
    assert call(*arguments(tree, tmp_path / "two.json", "--patch"))[0] == 0
    monkeypatch.undo()
    one, two = (Plan.load(tmp_path / name) for name in ("one.json", "two.json"))
    assert set(one.drop) < set(two.drop)
    checkpoint = open_checkpoint(tree / "llama")
    text, source = load_text(tree / "llama"), str(tree / "text.txt")
    windows, _ = read_samples(source, text, 64, count=4, bos=False)
    spread, _ = read_samples(source, text, 64, most=20, bos=False)
    others = [torch.tensor([row]) for row in spread if row not in windows]
    mended = Replaced(
        checkpoint, patch("linear", checkpoint, checkpoint.config.keep(one.keep), others)
    )
    score = PrefixScorer(load_decoder(checkpoint, checkpoint.config), torch.tensor(windows))
    assert score(one.keep) == pytest.approx(one.score, rel=1e-3)
    left = {
        layer: tuple(other for other in one.keep if other != layer)
        for layer in one.keep
        if layer not in (0, 1, 7)
    }
    unmended = {layer: score(kept) for layer, kept in left.items()}
    score.anchor(one.keep, DecoderStreams(load_decoder(mended, mended.config)))
    scores = {layer: score(kept) for layer, kept in left.items()}
    # A patch changes little here, and nothing where its layer goes too; the runtimes differ less.
    changes = max(abs(scores[layer] - unmended[layer]) for layer in left)
    assert max(abs(scores[layer] - heard[kept]) for layer, kept in left.items()) < 0.1 * changes
    best = min(scores.values())
    assert two.score == pytest.approx(best, rel=1e-3)
    (chosen,) = set(two.drop) - set(one.drop)
    assert scores[chosen] == pytest.approx(best, rel=1e-3)


def test_what_cannot_be_patched_is_refused(tree, tmp_path):
    for options in (("--patch",), ("--patch", "--protect", "7")):
        refused("a norm follows", *arguments(tree, tmp_path / "x", *options, case="gemma2"))
    refused(
        "patch: layer 0 may be dropped, and no kept layer before it can mend that; name it in "
        "--protect",
        *arguments(tree, tmp_path / "x", "--patch", "--protect", "7"),
    )
    refused(
        "patch: goes with --rule greedy",
        *arguments(tree, tmp_path / "x", "--rule", "search", "--patch"),
    )
    refused("backend: expected one of", *arguments(tree, tmp_path / "x", "--backend", "gpu"))
    assert not list(tmp_path.iterdir())


def test_a_context_in_which_nothing_is_predicted(tree, tmp_path):
    tiny.write("llama", tmp_path / "model", 1, max_position_embeddings=1)
    tiny.save_tokenizer(tmp_path / "model")
    (tmp_path / "few.txt").write_text("3 4 5 6")
    text, profile = ("--text", tmp_path / "few.txt"), tmp_path / "profile.json"
    assert call("profile", tmp_path / "model", *text, "--length", 1, "--out", profile)[0] == 0
    asked = "plan", profile, *text, "--rule", "greedy", "--count", 1, "--protect", "none", "--out"
    for windows in (1, 3):
        sentence = "model: a context of 1 token leaves none to predict and score"
        refused(sentence, *asked, tmp_path / "plan", "--windows", windows)
    assert not list(tmp_path.glob("plan*"))


def test_windows_are_the_first_rows_that_are_long_enough_and_begin_as_the_tokenizer_does(tree, rng):
    text, size = load_text(tree / "llama"), 64
    numbers = torch.randint(3, tiny.VOCAB, (9, size), generator=rng).tolist()
    rows = [
        " ".join(map(str, row[: size if at in (0, 6, 8) else 5])) for at, row in enumerate(numbers)
    ]
    path = tree / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = open_checkpoint(tree / "llama").config
    asked = Asked("llama", str(path), windows=3)
    assert read_windows(asked, config, text) == ([numbers[0], numbers[6], numbers[8]], [])
    with pytest.raises(InputError, match="expected 4 samples of 64, found 3"):
        read_windows(replace(asked, windows=4), config, text)

    habit = tree / "habit"
    shutil.copytree(tree / "llama", habit)
    raw = json.loads((habit / "tokenizer.json").read_text())
    raw["model"]["vocab"]["<s>"] = raw["model"]["vocab"].pop("1")
    first, piece = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    named = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": [first, piece], "pair": [first, piece],
        "special_tokens": named,
    }  # fmt: skip
    (habit / "tokenizer.json").write_text(json.dumps(raw))
    (habit / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    windows, _ = read_windows(replace(asked, windows=3), config, load_text(habit))
    assert windows == [[1, *numbers[at][: size - 1]] for at in (0, 6, 8)]
