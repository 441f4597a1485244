"""`engine shrink`: all stages in one go, one page at the end, taken up again wherever it died."""

import json
import os
import secrets
import shutil

import pytest
import torch
from support import tiny
from support.commands import call, refused

from engine.architecture.layers import format_layers
from engine.artifacts import HealRecord, Plan, Profile
from engine.benchmark.speed import RunRecord
from engine.checkpoint import open_checkpoint
from engine.commands.shrink import Run
from engine.errors import InputError
from engine.judgement import Judgement

LAYERS = 6


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Tiny models and text in their vocabulary."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    root = tmp_path_factory.mktemp("shrink")
    for case in ("llama", "gemma3"):
        tiny.write(case, root / case, seed, num_hidden_layers=LAYERS)
        tiny.save_tokenizer(root / case)
    numbers = torch.randint(3, tiny.VOCAB, (1500,), generator=torch.Generator().manual_seed(seed))
    root.joinpath("text.txt").write_text(" ".join(map(str, numbers.tolist())))
    return root


def arguments(tree, out, *options, case: str = "llama") -> tuple:
    text = tree / "text.txt"
    sizes = ("--window", 16, "--windows", 2, "--steps", 3, "--prompts", 2)
    return (
        "shrink",
        tree / case,
        out,
        "--drop",
        2,
        "--text",
        text,
        "--judge-text",
        text,
        *sizes,
        *options,
    )


def test_all_stages_and_the_page(tree, tmp_path):
    code, said, err = call(*arguments(tree, tmp_path / "small"))
    assert code == 0, err
    out, records = tmp_path / "small", tmp_path / "small" / "records"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert len(open_checkpoint(out).config.layers) == LAYERS - 2
    plan, healed = Plan.load(records / "plan.json"), HealRecord.load(records / "heal.json")
    assert len(plan.drop) == 2 and plan.keep == healed.keep and healed.steps == 3 + 1
    assert plan.profile == Profile.load(records / "profile.json").hash
    before, after = (Judgement.load(records / f"{name}.json") for name in ("before", "after"))
    assert HealRecord.load(records / "scales.json").settings["train"] == "scales"
    assert (before.layers_kept, after.layers_kept) == (LAYERS, LAYERS - 2)
    assert before.health and after.health
    speed = RunRecord.load(records / "after-speed.json")
    page = out.joinpath("report.html").read_text()
    for heading in ("What it was", "How well it speaks", "How fast it runs", "How it healed"):
        assert f"<h2>{heading}" in page
    assert page.count("<svg") == 3 and f"{speed.decode_tok_s:,.1f} tok/s" in page
    assert f"the weights are those of step {healed.best_step}<" in page
    computed = RunRecord.load(records / "before-speed.json").dtype, speed.dtype
    assert computed[0] != computed[1]  # floats are not rounded, what multiplies 4 bits is
    cells = "".join(f"<td>cpu, {each}</td>" for each in computed)
    assert f"<td>computed by</td>{cells}" in page
    assert f"{before.perplexity:,.4f}" in page and f"{speed.weight_bytes / 1e6:,.1f} MB" in said
    assert call("eval", out, "--text", tree / "text.txt", "--window", 16)[0] == 0
    code, card, err = call("push", out, "org/name", "--license", "mit", "--card")
    assert code == 0, err
    dropped = format_layers(Plan.load(out / "plan.json").drop)
    assert f"without layers {dropped} (numbered from 0" in card
    assert f"{LAYERS - 2} of {LAYERS} stay" in card and "Healed by linear, distil" in card
    assert "Its scales have learnt once more" in card and ".shrink/" not in card


def test_what_the_help_says_of_texts_and_steps(tree, tmp_path):
    """A second text is trained on, and neither chooses layers nor calibrates."""
    said = " ".join(call("shrink", "--help")[1].replace("│", " ").split())
    assert "Layers are chosen by the first, which also calibrates." in said
    assert "of the weights and of the scales each; the second round takes up to a quarter" in said
    (tmp_path / "more.txt").write_text("5 6 7 8 9 " * 400)
    found = []
    for out, more in (("a", ()), ("b", ("--text", tmp_path / "more.txt"))):
        code, _, err = call(*arguments(tree, tmp_path / out, "--steps", 8, *more))
        assert code == 0, err
        records = tmp_path / out / "records"
        heal, scales = (HealRecord.load(records / f"{name}.json") for name in ("heal", "scales"))
        assert (heal.steps, scales.steps) == (8 + 2, 8)
        config = json.loads((tmp_path / out / "config.json").read_text())
        plan = Plan.load(records / "plan.json")
        found.append((plan.text_hash, config["quantization_config"]["calibration"], heal.text_hash))
    (plan, calibration, learnt), other = found
    assert (plan, calibration) == other[:2] and learnt != other[2]


def test_it_says_what_it_heals_on(tree, tmp_path, monkeypatch):
    def stopped(run, bar):
        raise InputError("enough")

    monkeypatch.setattr(Run, "check", lambda run: None)
    monkeypatch.setattr(Run, "all", stopped)
    monkeypatch.chdir(tree)
    asked, built_in = ("shrink", "llama", tmp_path / "small"), "heals on the built-in text"
    more = "; more text (--text) heals more\n"
    assert call(*asked)[1] == f"{built_in} and 200,000 tokens that llama writes{more}"
    assert call(*asked, "--self", 0)[1] == f"{built_in}{more}"


def test_a_finished_run_is_found_and_settings_tell_runs_apart(tree, tmp_path):
    out = tmp_path / "small"
    code, first, err = call(*arguments(tree, out))
    assert code == 0, err
    code, again, _ = call(*arguments(tree, out))
    assert code == 0 and again.startswith(f"{out} is there already") and first in again
    refused("exists already", *arguments(tree, out, "--bits", 8))
    record = json.loads((out / "shrink.json").read_text())
    for damaged, sentence in (
        ([], "exists already"),
        (record | {"rows": [["a", 1, "b"]]}, "shrink.json: expected rows of three texts, found [["),
        ({"key": record["key"]}, "shrink.json: expected rows of three texts, found None"),
    ):
        (out / "shrink.json").write_text(json.dumps(damaged))
        refused(sentence, *arguments(tree, out))


def test_a_disk_that_is_full_at_the_end(tree, tmp_path, monkeypatch):
    copied = shutil.copyfile

    def full(source, target):
        if target.parent.name == "records":
            raise OSError(28, "No space left on device", str(source), None, str(target))
        return copied(source, target)

    monkeypatch.setattr("engine.commands.shrink.shutil.copyfile", full)
    code, _, err = call(*arguments(tree, tmp_path / "small"))
    assert code == 2 and err.endswith("records/profile.json: No space left on device\n")
    monkeypatch.undo()
    assert call(*arguments(tree, tmp_path / "small"))[0] == 0


def test_refusals(tree, tmp_path):
    (tmp_path / "empty.txt").touch()
    few = tree / "few.txt"
    few.write_text("3 " * 9)
    for sentence, options in [
        ("count: expected 1 to 5 of 6 layers, found 6", ("--drop", 6)),
        ("count: 4 of 6 layers cannot go", ("--drop", 4)),
        ("drop: layer 9 is out of range", ("--drop", "3-9")),
        ("rule: expected one of similarity", ("--rule", "best")),
        ("rule: chooses no layers, --drop 3-4 names them", ("--drop", "3-4", "--rule", "search")),
        ("windows: scores no layers, --drop 3-4 names them", ("--drop", "3-4")),
        ("windows: goes with --rule greedy or search, found --rule simple", ("--rule", "simple")),
        ("bits", ("--bits", 3)),
        ("prompts: expected 1 to", ("--prompts", 100_000)),
        ("seed: expected 0 to", ("--seed", 10**22)),
        ("steps: expected more than 0, found 0", ("--steps", 0)),
        ("minutes: expected more than 0, found -2.0", ("--minutes", -2)),
        ("Invalid value for '--windows'", ("--windows", 0)),
        ("window: expected at most the context's", ("--window", 10**6)),
        ("self: expected at least 0 tokens", ("--self", -1)),
        ("absent.txt: expected a text file, found none", ("--text", "absent.txt")),
        ("empty.txt: expected text, found an empty file", ("--text", tmp_path / "empty.txt")),
        ("absent.txt: expected a text file, found none", ("--judge-text", "absent.txt")),
        ("text.txt: expected 9999 samples of 256, found 5", ("--windows", 9999)),
        ("few.txt: too short for one sample of 16", ("--text", few)),
        ("few.txt has 9 tokens; 1 windows of 256 need 256", ("--judge-text", few)),
        ("absent.jsonl", ("--choices", "absent.jsonl")),
    ]:
        refused(sentence, *arguments(tree, tmp_path / "small", *options))
    os.mkfifo(tmp_path / "pipe")
    for option in ("--text", "--judge-text", "--choices"):
        piped = arguments(tree, tmp_path / "small", option, tmp_path / "pipe")
        refused("pipe: is read several times: expected a file, no pipe", *piped)
    (tmp_path / "pipe").unlink()
    refused("there is no directory", *arguments(tree, tmp_path / "no" / "small"))
    refused("; name a place outside it", *arguments(tree, tree / "small", "--text", tree))
    for nameless in ("", ".", "/"):
        refused("exists already; name a new directory", *arguments(tree, nameless))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
    (tmp_path / "small").symlink_to("nowhere")  # what a directory cannot be renamed to
    alone = "shrink", tree / "llama", tmp_path / "small"  # without a text, which would be checked
    refused("small: exists already; name a new directory", *alone)
