"""Files that no writer makes: their code never runs, their pipes are not waited for, and what they
say of tensors is checked where it is used (SECURITY.md)."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import tiny
from support.commands import call, refused

import engine
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.export.copied import cut
from engine.export.packed import read_shard, rewrite
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.text import load_text


@pytest.fixture
def model(tmp_path):
    tiny.write("llama", tmp_path / "model", 1)
    tiny.save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(3 + at % 40) for at in range(200)))
    return path


def test_code_of_a_directory_does_not_run(model, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (model / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    said = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "eos_token": "2"}
    (model / "tokenizer_config.json").write_text(json.dumps(said))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with engine.load(model) as opened, pytest.raises(InputError, match="contains custom code"):
        opened.tokenizer  # noqa: B018
    assert not mark.exists()


def test_what_is_written_names_no_code_of_others(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Evil"}, "attn_implementation": "someone/kernels"}
    (model / "config.json").write_text(json.dumps(config))
    assert call("prune", model, tmp_path / "out", "--drop", 2)[0] == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "attn_implementation"} & written.keys()


@pytest.mark.parametrize("stage", ["profile", "quantize"])
def test_ids_beyond_the_embedding_in_streamed_runs(stage, model, text, tmp_path):
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"7": 7,', f'"7": {tiny.VOCAB + 9},'))
    common = ("--text", text, "--length", 16)
    arguments = {
        "profile": ("profile", model, "--stream", "--out", tmp_path / "p.json"),
        "quantize": ("quantize", model, tmp_path / "q", "--method", "gptq", "--group", 16),
    }
    refused(f"expected ids below {tiny.VOCAB}, found {tiny.VOCAB + 9}", *arguments[stage], *common)


def test_a_packed_tensor_of_unknown_origin_stays(model, tmp_path):
    checkpoint = open_checkpoint(model)
    pack(checkpoint, checkpoint.config, tmp_path / "packed", Recipe("rtn", group=16))
    shard = sorted((tmp_path / "packed").glob("*.safetensors"))[1]
    with safe_open(shard, "pt") as file:
        tensors, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    for name in [key for key in said if key.endswith(".source")][:3]:
        del said[name]
    said["nothing.source"] = "bf16"
    save_file(tensors, shard, said)
    before = read_shard(shard)
    assert len(before) == len([key for key in said if key.endswith(".source")]) + 2
    rewrite(tmp_path / "packed", tmp_path / "again", {}, {})
    with safe_open(tmp_path / "again" / shard.name, "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)


def test_patterns_that_take_for_ever():
    names = {"model.layers.1.mlp." + "a" * 60 + "!.weight": "model.layers.0.mlp.x.weight"}
    for pattern in (
        r"re:model.layers.1.mlp.(a+)+$",
        r"re:model.layers.1.(a|a)*$",
        "re:layers.1" * 99,
    ):
        with pytest.raises(
            InputError, match="expected a pattern behind 're:' that does not repeat"
        ):
            cut([pattern], {1: 0}, names)
    assert cut([r"re:.*layers\.(1|2)\.mlp.*"], {1: 0}, names) == ["model.layers.0.mlp.x"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_pipes_are_not_waited_for(name, model):
    (model / name).unlink(missing_ok=True)
    if name == "tokenizer.model":
        (model / "tokenizer.json").unlink()
    os.mkfifo(model / name)
    assert stat.S_ISFIFO((model / name).stat().st_mode)
    if name == "chat_template.jinja":
        assert load_text(model).chat_template is None
        return
    with pytest.raises(InputError, match=f"{name}: expected a file, found a pipe or a device"):
        if name == "model.safetensors":
            open_checkpoint(model)
        load_text(model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    refused("pipe.json: expected a file, found a pipe", "budget", tmp_path / "pipe.json")


def test_a_healed_model_whose_config_transformers_refuses(model, text, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"initializer_range": "x"}))
    asked = ("heal", model, tmp_path / "out", "--drop", 2, "--method", "distil", "--steps", 1)
    sizes = ("--window", 16, "--batch-tokens", 32)
    refused("config.json: transformers does not open it", *asked, "--text", text, *sizes)
    shutil.rmtree(tmp_path / "out.healing", ignore_errors=True)


def test_what_lies_in_the_way_is_found_before_the_work(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.pruning.profile.measure", None)  # is not come to
    out = tmp_path / "profile.json"
    asked = ("profile", model, "--text", text, "--length", 16, "--out")
    (tmp_path / ".profile.json.partial").mkdir()
    (tmp_path / ".profile.json.partial" / "mine").touch()
    refused(".profile.json.partial", *asked, out)
    assert (tmp_path / ".profile.json.partial" / "mine").exists() and not out.exists()
    refused("too long", *asked, tmp_path / ("a" * 245 + ".json"))


def test_a_token_far_beyond_the_embedding_is_not_written_out(model, tmp_path):
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"7": 7,', '"7": 4000000000,'))
    refused(
        "token 4000000000 has no row among", "export", model, tmp_path / "o.gguf", "--to", "gguf"
    )
