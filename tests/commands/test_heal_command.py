"""engine heal: from options to a directory that every other command takes; what it refuses."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from support import tiny
from support.commands import call, refused

from engine.artifacts import HealRecord
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.healing.settings import Settings

TRAINED = ("--method", "linear,distil", "--window", 16, "--batch-tokens", 32, "--steps", 3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Tiny models, and text in their vocabulary."""
    root = tmp_path_factory.mktemp("heal")
    for seed, (name, case, changes) in enumerate(
        [
            ("model", "llama", {"num_hidden_layers": 6}),
            ("wide", "llama", {"num_hidden_layers": 5, "intermediate_size": 96}),
            ("other", "llama", {"vocab_size": 170}),
            ("gemma3", "gemma3", {}),
        ]
    ):
        tiny.write(case, root / name, seed, **changes)
        tiny.save_tokenizer(root / name)
    numbers = torch.randint(3, tiny.VOCAB, (600,), generator=torch.Generator().manual_seed(1))
    root.joinpath("text.txt").write_text(" ".join(map(str, numbers.tolist())))
    root.joinpath("empty.txt").write_text(" ")
    return root


def asked(tree, out, *options, model="model") -> tuple:
    return "heal", tree / model, out, "--text", tree / "text.txt", *options


def test_the_result_goes_on_through_the_other_commands(tree, tmp_path):
    out = tmp_path / "healed"
    code, said, err = call(*asked(tree, out, "--drop", "2-3", *TRAINED))
    assert code == 0, err
    record = HealRecord.load(out / "heal.json")
    assert (record.keep, record.methods) == ((0, 1, 4, 5), ("linear", "distil"))
    assert record.model == record.teacher == str(tree / "model") and len(record.losses) == 3
    assert "stopped after 3 steps" in said and f"{out}: 4 of 6 layers, healed" in said
    assert len(open_checkpoint(out).config.layers) == 4
    assert call("eval", out, "--text", tree / "text.txt", "--window", 16)[0] == 0
    assert call("prune", out, tmp_path / "pruned", "--drop", 2)[0] == 0
    assert call("quantize", out, tmp_path / "small", "--method", "rtn", "--group", 16)[0] == 0
    again = asked(tree, tmp_path / "again", *TRAINED[2:], model="../" + out.name)
    again = ("heal", out, *again[2:], "--method", "distil", "--teacher", tree / "model")
    assert call(*again)[0] == 0
    record = HealRecord.load(tmp_path / "again" / "heal.json")
    assert (record.model, record.teacher) == (str(out), str(tree / "model"))


@pytest.mark.parametrize("model, methods", [("model", "linear,distil"), ("gemma3", "distil")])
def test_the_usual_methods_are_those_that_the_family_takes(model, methods, tree, tmp_path):
    out = tmp_path / "healed"
    code, said, err = call(*asked(tree, out, "--drop", 2, *TRAINED[2:], model=model))
    assert code == 0, err
    assert HealRecord.load(out / "heal.json").methods == tuple(methods.split(","))
    assert f" after {methods}\n" in said


QLORA = (
    "--method", "qlora", "--window", 16, "--batch-tokens", 32, "--steps", 3, "--check-every", 2,
)  # fmt: skip


def test_what_a_kill_leaves_behind_a_result_goes(tree, tmp_path, monkeypatch):
    """In whatever order the system lists it: its record first."""
    listed, removed = Path.iterdir, shutil.rmtree
    work = tmp_path / "healed.healing"

    def in_order(self):
        return sorted(listed(self), key=lambda entry: entry.name != "heal.json")

    def killed(path):
        if Path(path).parent == work:
            raise KeyboardInterrupt
        removed(path)

    monkeypatch.setattr(Path, "iterdir", in_order)
    monkeypatch.setattr("engine.scratch.shutil.rmtree", killed)
    assert call(*asked(tree, tmp_path / "healed", "--drop", "2", *TRAINED))[0] == 130
    monkeypatch.undo()
    assert work.exists() and (tmp_path / "healed").exists()
    refused("exists already", *asked(tree, tmp_path / "healed", "--drop", "2", *TRAINED))
    assert [file.name for file in tmp_path.iterdir()] == ["healed"]


def test_a_tokenizer_that_changed_after_a_kill_is_the_one_written(tree, tmp_path, monkeypatch):
    shutil.copytree(tree / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("old")
    command = asked(tree, tmp_path / "healed", "--drop", "2", *TRAINED, model=tmp_path / "model")

    def killed(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.healing.heal.distil", killed)
    assert call(*command)[0] == 130
    monkeypatch.undo()
    template.write_text("new")
    assert call(*command)[0] == 0
    assert (tmp_path / "healed" / "chat_template.jinja").read_text() == "new"


def test_adapters_within_the_weights_and_beside_their_base(tree, tmp_path):
    pytest.importorskip("peft")
    out, beside = tmp_path / "healed", tmp_path / "beside"
    code, said, err = call(*asked(tree, out, "--drop", "2-3", *QLORA))
    assert code == 0, err
    record = HealRecord.load(out / "heal.json")
    assert record.methods == ("qlora",) and len(record.checks) == 3 and len(record.losses) == 3
    assert (record.settings["rank"], record.settings["qlora_lr"]) == (2, 3e-4)  # of Llama 2 7B
    assert "after qlora" in said and len(open_checkpoint(out).config.layers) == 4
    assert call("quantize", out, tmp_path / "small", "--method", "rtn", "--group", 16)[0] == 0
    options = *QLORA, "--adapter", "--rank", 3, "--lr", 1e-3
    assert call("heal", out, beside, "--text", tree / "text.txt", *options)[0] == 0
    assert {path.name for path in beside.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base", "heal.json",
    }  # fmt: skip
    record = HealRecord.load(beside / "heal.json")
    assert (record.settings["rank"], record.settings["qlora_lr"]) == (3, 1e-3)
    assert call("run", "--model", beside, "--prompt", "3 4", "--new-tokens", 2)[0] == 0
    assert call("prune", beside, tmp_path / "pruned", "--drop", 2)[0] == 0
    assert call("export", beside, tmp_path / "hf", "--to", "hf")[0] == 0
    assert call("quantize", beside, tmp_path / "again", "--method", "rtn", "--group", 16)[0] == 0
    taught = "--method", "distil", "--train", "scales", "--teacher", tree / "model", *QLORA[2:]
    refused(
        "--train scales expected a packed directory",
        "heal", beside, tmp_path / "no", "--text", tree / "text.txt", *taught,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["linear", "scale"])
def test_without_training_torch_alone_is_enough(method, tree, tmp_path):
    out = tmp_path / "healed"
    done = call(*asked(tree, out, "--drop", "2,4", "--method", method, "--window", 16))
    assert done[0] == 0 and f"after {method}" in done[1]
    assert HealRecord.load(out / "heal.json").stopped == ""


def test_the_teachers_words_are_kept_where_one_says(tree, tmp_path):
    options = "--drop", 2, *TRAINED, "--cache", tmp_path / "cache"
    assert call(*asked(tree, tmp_path / "a", *options))[0] == 0
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.joinpath("cache").iterdir()}
    assert len(stamps) == 3
    assert call(*asked(tree, tmp_path / "b", *options, "--lr", 1e-3))[0] == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_text_of_the_teachers_own(tree, tmp_path):
    out = tmp_path / "healed"
    done = call(*asked(tree, out, "--drop", 2, *TRAINED, "--self", 100))
    assert done[0] == 0, done[2]
    record = HealRecord.load(out / "heal.json")
    assert record.settings["written"] == 100 and record.settings["precision"] != "auto"


def test_text_of_its_own(tree, tmp_path):
    out = tmp_path / "healed"
    done = call(*asked(tree, out, "--drop", 2, *TRAINED, "--own", 100))
    assert done[0] == 0, done[2]
    record = HealRecord.load(out / "heal.json")
    assert record.settings["own"] == 100 and ", then " in record.stopped


@pytest.mark.parametrize(
    "sentence, options",
    [
        ("lr: expected more than 0, found -1.0", ("--drop", 2, "--lr", -1)),
        ("lr: expected more than 0, found nan", ("--drop", 2, "--lr", "nan")),
        ("lr: expected a finite number, found inf", ("--drop", 2, "--lr", "inf")),
        ("steps: expected more than 0, found 0", ("--drop", 2, "--steps", 0)),
        (
            "method: expected some of linear, scale, qlora, distil, found 'magic'",
            ("--method", "magic"),
        ),
        ("method: distil comes last", ("--method", "distil,linear")),
        ("method: distil comes last", ("--method", "distil,qlora")),
        ("method: linear and scale come before qlora", ("--method", "qlora,linear")),
        ("lr: expected more than 0, found 0.0", ("--drop", 2, "--method", "qlora", "--lr", 0)),
        ("rank: expected more than 0, found 0", ("--drop", 2, "--method", "qlora", "--rank", 0)),
        ("steps: expected at most", ("--drop", 2, "--steps", 10**400)),
        ("self: expected at most 2147483648, found 9999", ("--drop", 2, "--self", 10**20 - 1)),
        ("own: expected at most", ("--drop", 2, "--own", 10**20)),
        ("batch-tokens: expected at most 16777216", ("--drop", 2, "--batch-tokens", 10**20)),
        ("check-every: expected at most", ("--drop", 2, "--check-every", 10**20)),
        (
            "rank: expected up to the model's width of 48, found 49",
            ("--drop", 2, "--train", "lora", "--rank", 49),
        ),
        (
            "rank: expected up to the model's width",
            ("--drop", 2, "--method", "qlora", "--rank", 10**6),
        ),
        ("cache: expected a directory of its own", ("--drop", 2, "--cache", "")),
        ("check-every: expected more than 0", ("--drop", 2, "--check-every", 0)),
        (
            "adapter: needs qlora as the last method, found linear,distil",
            ("--drop", 2, "--adapter"),
        ),
        (
            "so it excludes --adapter",
            ("--drop", 2, "--method", "qlora", "--adapter", "--dtype", "float16"),
        ),
        ("self: expected at least 0 tokens, found -1", ("--drop", 2, "--self", -1)),
        ("self: needs distil or qlora", ("--drop", 2, "--method", "linear", "--self", 9)),
        ("own: expected at least 0 tokens, found -1", ("--drop", 2, "--own", -1)),
        ("own: needs distil as the last method", ("--drop", 2, "--method", "linear", "--own", 9)),
        ("residual: expected a weight of at least 0", ("--drop", 2, "--residual", -1)),
        ("residual: expected a weight of at least 0", ("--drop", 2, "--residual", "inf")),
        (
            "residual: needs distil as the last method",
            ("--drop", 2, "--method", "linear", "--residual", 1),
        ),
        ("precision: expected one of auto,", ("--drop", 2, "--precision", "int3")),
        ("excludes scale", ("--method", "linear,scale")),
        (
            "train: expected one of all, around, norms, lora, scales, found 'some'",
            ("--train", "some"),
        ),
        ("nothing is dropped", ()),
        ("drop: layer 6 is out of range; the model has layers 0 to 5", ("--drop", 6)),
        ("linear: layer 0 is dropped and no kept layer before it", ("--drop", "0-1")),
        ("--plan excludes --drop", ("--drop", 2, "--plan", "plan.json")),
        ("plan.json: No such file", ("--plan", "plan.json")),
        ("window: expected up to the model's context of 256", ("--drop", 2, "--window", 300)),
        ("absent.txt: expected a text file, found none", ("--drop", 2, "--text", "absent.txt")),
        ("found none", ("--drop", 2, "--held-out", "absent.txt")),
        ("dtype: expected one of", ("--drop", 2, "--dtype", "int3")),
        ("device", ("--drop", 2, "--device", "gpu7")),
    ],
)
def test_refusals(sentence, options, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(sentence, *asked(tree, tmp_path / "out", *TRAINED, *options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value",
    [
        ("steps", 3),
        ("minutes", 1),
        ("lr", 1e-4),
        ("rank", 16),
        ("cache", "cache"),
        ("batch-tokens", 32),
        ("check-every", 3),
        ("train", "norms"),
        ("precision", "float32"),
        ("seed", 3),
    ],
)
def test_what_says_nothing_without_training_is_refused(option, value, tree, tmp_path):
    fitted = asked(tree, tmp_path / "out", "--drop", 2, "--window", 16, "--method", "linear")
    said = f"{option}: has no effect with --method linear"
    refused(said, *fitted, f"--{option}", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "method, option, value, sentence",
    [
        ("qlora", "train", "norms", "train: has no effect with --method qlora"),
        ("qlora", "cache", "cache", "cache: has no effect with --method qlora without --self"),
        ("qlora", "teacher", "model", "teacher: has no effect with --method qlora without --self"),
        ("distil", "own", 30, "own: expected windows of at least 4 tokens, found 3"),
        ("distil", "rank", 4, "rank: has no effect with --method distil without --train lora"),
        ("linear,distil", "rank", 4, "rank: has no effect with --method linear,distil"),
        ("distil", "column", "body", "column: goes with a .jsonl, .parquet or hub source, found"),
        ("linear", "column", "body", "column: goes with a .jsonl, .parquet or hub source, found"),
        ("distil", "seed", 1 << 32, "seed: expected 0 to 4294967295, found 4294967296"),
    ],
)
def test_what_a_method_does_not_read(method, option, value, sentence, tree, tmp_path):
    trained = () if method == "linear" else ("--steps", 3)
    window = 3 if option == "own" else 16
    given = "--drop", 2, "--window", window, "--method", method, *trained, f"--{option}", value
    refused(sentence, *asked(tree, tmp_path / "out", *given))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, given", [("WORLD_SIZE", "abc"), ("RANK", "-1")])
def test_what_a_launcher_does_not_say(name, given, tree, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, given)
    sentence = f"{name}: expected a number, as launchers set it, found '{given}'"
    refused(sentence, *asked(tree, tmp_path / "out", "--drop", 2, *QLORA))
    assert not list(tmp_path.iterdir())


def test_refusals_of_what_is_named(tree, tmp_path):
    out = tmp_path / "out"
    dropped = *TRAINED, "--drop", 2
    refused("exists already", *asked(tree, tmp_path, *dropped))
    refused("there is no directory", *asked(tree, tmp_path / "no" / "out", *dropped))
    for nameless in ("", ".", "/"):
        refused("exists already; name a new one", *asked(tree, nameless, *dropped))
    refused("text: expected a text to learn from", "heal", tree / "model", out, *dropped)
    assert "built-in" not in call("heal", "--help")[1]
    text = tree / "model" / ".." / "text.txt"
    for option in ("--text", "--held-out"):
        refused("../text.txt: the text is given twice", *asked(tree, out, *dropped, option, text))
    refused("found neither", *asked(tree, out, "--drop", 2, "--method", "distil"))
    refused(
        "expected text, found an empty", *asked(tree, out, *dropped, "--text", tree / "empty.txt")
    )
    refused(
        "linear: a norm follows the down projection in gemma3",
        *asked(tree, out, *dropped, model="gemma3"),
    )
    refused("; name a place outside it", *asked(tree, tree / "out", *dropped, "--text", tree))
    for taken in ("out", "out/taught", "out.healing", "out.healing/taught", "out.partial"):
        own = "cache: expected a directory of its own, found "
        refused(own, *asked(tree, out, *dropped, "--cache", tmp_path / taken))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    refused("out.partial: is in the way", *asked(tree, out, *dropped))
    shutil.rmtree(tmp_path / "out.partial")
    teacher = "--method", "qlora", *TRAINED[2:], "--self", 9, "--teacher", tree / "other"
    refused("its vocabulary differs", *asked(tree, out, *teacher))
    distil = "--method", "distil", *TRAINED[2:], "--teacher"
    refused("its vocabulary differs", *asked(tree, out, *distil, tree / "other"))
    refused("excludes --teacher", *asked(tree, out, *distil, tree / "wide", "--drop", 2))
    assert not list(tmp_path.iterdir())


def test_without_peft_it_says_what_to_install(tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    install = "pip install 'peft>=0.19' 'accelerate>=1.4'"
    refused(install, *asked(tree, tmp_path / "out", "--drop", 2, *QLORA))
    lora = *TRAINED, "--train", "lora"
    refused("train: lora needs peft", *asked(tree, tmp_path / "out", "--drop", 2, *lora))
    assert not list(tmp_path.iterdir())


def test_a_plan_of_another_model_is_refused(tree, tmp_path):
    sampling = "--text", tree / "text.txt", "--length", 16, "--no-bos"
    profile, plan = tmp_path / "profile.json", tmp_path / "plan.json"
    assert call("profile", tree / "wide", *sampling, "--out", profile)[0] == 0
    chosen = "--rule", "manual", "--drop", 2
    assert call("plan", profile, *chosen, "--out", plan)[0] == 0
    refused(
        "whose layers have other shapes", *asked(tree, tmp_path / "out", *TRAINED, "--plan", plan)
    )
    options = "--method", "linear", "--window", 16, "--plan", plan
    assert call(*asked(tree, tmp_path / "out", *options, model="wide"))[0] == 0
    assert HealRecord.load(tmp_path / "out" / "heal.json").keep == (0, 1, 3, 4)


def test_a_refusal_needs_no_torch(tree, tmp_path):
    import subprocess

    code = (
        "import sys\nfrom engine.cli import app\nfrom engine.errors import InputError\n"
        "try:\n    app(sys.argv[1:], standalone_mode=False)\n"
        "except InputError as error:\n    print(error, 'torch' in sys.modules)\n"
    )
    asking = asked(tree, tmp_path / "out", *TRAINED, "--drop", "0-1")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, asking)], capture_output=True, text=True
    )
    assert done.stdout.endswith("can mend it False\n"), done.stdout + done.stderr


@pytest.mark.parametrize(("given", "field", "value"), [
    (("--batch-tokens", 48), "batch_tokens", 48), (("--lr", 3e-4), "lr", 3e-4),
    (("--seed", 7), "seed", 7), (("--residual", 0.5), "residual", 0.5),
    (("--precision", "float32"), "precision", "float32"), (("--minutes", 9), "minutes", 9.0),
    (("--check-every", 3), "check_every", 3), (("--train", "norms"), "train", "norms"),
])  # fmt: skip
def test_what_is_asked_for_reaches_the_run(given, field, value, tree, tmp_path, monkeypatch):
    seen = []

    def heal(*arguments, **options):
        seen.append(arguments)
        raise InputError("seen")

    monkeypatch.setattr("engine.healing.heal.heal", heal)
    refused("seen", *asked(tree, tmp_path / "out", "--drop", 2, *TRAINED, *given))
    (settings,) = (each for each in seen[0] if isinstance(each, Settings))
    assert getattr(settings, field) == value
