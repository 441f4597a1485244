"""Weights that are no numbers, tokenizers that lie, templates without end: one sentence each."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.commands import call, refused
from support.profiles import make_profile

import engine
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.runtime import RUNTIMES
from engine.text import load_text
from engine.text.chat import render

UP = "model.layers.1.mlp.up_proj.weight"
WORDS = f"produced logits that are not finite numbers: {UP} holds NaN or infinity"


@pytest.fixture(scope="module")
def not_a_number(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write("llama", path, 1)
    tiny.save_tokenizer(path)
    tensors = {
        name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()
    }
    tensors[UP][3, 4] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("backend", [name for name in RUNTIMES if name in ("reference", "cpu")])
def test_weights_that_are_no_numbers(backend, not_a_number):
    model = engine.load(not_a_number, backend=backend)
    with pytest.raises(InputError, match=WORDS):
        model.generate([3, 1, 4], max_new_tokens=2)
    with pytest.raises(InputError, match=WORDS):
        list(model.stream([3, 1, 4], max_new_tokens=2))


@pytest.mark.parametrize("backend", [name for name in RUNTIMES if name in ("reference", "cpu")])
def test_caches(backend, not_a_number):
    runtime = engine.load(not_a_number, backend=backend).runtime
    for room, said in (
        ((0,), "batch: expected at least 1"),
        ((1, -1), "capacity: expected at least"),
    ):
        with pytest.raises(InputError, match=said):
            runtime.new_cache(*room)
    cache = runtime.new_cache(2)
    runtime.forward(torch.tensor([[3, 1], [3, 1]]), cache)
    for lengths in (
        torch.tensor([1, 1, 1]), torch.tensor([[1, 1]]), torch.tensor([1.5, 1]), float("nan"), 1.0,
        3, -1, [1, 3], [1 << 70, 1], "x", None, [[1], [1, 1]], torch.tensor([1j, 1]),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"truncate: expected 2 whole .* to \[2, 2\], found"):
            cache.truncate(lengths)
    for lengths in (2, [2, 1], torch.tensor([2, 1]), torch.tensor([1], dtype=torch.int8)):
        cache.truncate(lengths)
    assert cache.lengths.eq(1).all()


def test_commands_on_them(not_a_number, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n % 150) for n in range(100)))
    refused(WORDS, "run", "--model", not_a_number, "--prompt", "3 1", "--raw", "--new-tokens", 2)
    refused(WORDS, "eval", not_a_number, "--text", text, "--window", 16)
    profiled = "profile", not_a_number, "--out", tmp_path / "p", "--text", text, "--length", 16
    for streamed in ((), ("--stream",)):
        code, _, said = call(*profiled, *streamed)
        assert code == 2 and "is not finite" in said.splitlines()[-1]
    learnt = "--drop", 2, "--text", text, "--window", 16
    for asked in (
        ("prune", "--drop", 2),
        ("export", "--to", "hf"),
        ("heal", *learnt, "--steps", 3),
        ("heal", *learnt, "--steps", 3, "--method", "distil"),
        ("heal", *learnt, "--method", "linear"),
    ):
        refused(f"{UP}: does not fit", asked[0], not_a_number, tmp_path / "out", *asked[1:])
    rounded = "--method", "rtn", "--group", 16
    for keep in ("1-2", "1-3"):
        kept = not_a_number, tmp_path / "out", "--keep", keep
        refused(f"{UP}: holds NaN", "quantize", *kept, *rounded)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("rule", ["greedy", "search"])
@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_scores_of_them(rule, metric, not_a_number, tmp_path):
    text, profile = tmp_path / "text.txt", tmp_path / "profile.json"
    text.write_text(" ".join(str(n % 150) for n in range(1000)))
    config = open_checkpoint(not_a_number).config
    rows = make_profile(
        config.total_layers, random.Random(0), architecture=config.architecture_hash
    )
    rows.save(profile)
    options = ("--rule", rule, "--metric", metric, "--count", 1, "--protect", 1, "--windows", 1)
    asked = (profile, "--model", not_a_number, "--text", text, "--out", tmp_path / "p", *options)
    code, _, said = call("plan", *asked)
    assert code == 2 and WORDS in said.splitlines()[-1] and not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", lambda raw: raw["model"].update(unk_token="none")),
        ("tokenizer.json", lambda raw: raw["model"]["vocab"].update({"\ud800": 7})),
        ("tokenizer_config.json", lambda raw: raw.update(bos_token="\ud800")),
        (
            "tokenizer_config.json",
            lambda raw: raw.update(added_tokens_decoder={"9" * 5000: {"content": "a"}}),
        ),
    ],
)
def test_tokenizers_that_lie(file, change, tmp_path):
    tiny.save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / file
    raw = json.loads(path.read_text()) if path.exists() else {}
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="tokenizer is damaged"):
        load_text(tmp_path).encode("3 what")


def test_templates_that_take_too_much():
    messages = [{"role": "user", "content": "a"}]
    for program in ("{{ '%1000000000s' % 'a' }}", "{{ ''|center(10**9) }}"):
        with pytest.raises(InputError, match="X: .* takes more than 512 MB of memory"):
            render(program, messages, {}, "X")
    assert render("{{ messages[0].content }}", messages, {}, "X") == "a"


@pytest.mark.slow
def test_templates_without_end():
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="takes more than 15 s, or 5 s of a processor"):
        render(loop, [{"role": "user", "content": "a"}], {}, "X")
