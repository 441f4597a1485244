"""A pruned directory is an ordinary checkpoint: transformers computes what we compute."""

import json
import secrets
from dataclasses import replace

import pytest
import torch
from support import tiny
from support.close import assert_close

from engine.api import choose_layers, load
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.export.directory import cut_shards
from engine.export.hf import prune
from engine.pruning.plan import Choice, plan_from
from engine.runtime.reference import ReferenceRuntime

KEEP = {4: [0, 2, 3], 6: [0, 2, 4, 5]}  # by number of layers; windows and NoPE layers move


def keep_some(config):
    return config.keep(KEEP[config.total_layers])


@pytest.mark.parametrize("case", tiny.CASES)
@torch.no_grad()
def test_every_family_in_transformers(case, tmp_path):
    import transformers

    seed = secrets.randbits(32)
    print(f"seed {seed}")
    tiny.write(case, tmp_path / "model", seed)
    checkpoint = open_checkpoint(tmp_path / "model")
    config = keep_some(checkpoint.config)
    out = tmp_path / "out"
    prune(checkpoint, config, out, dtype=torch.float32, shard_bytes=40_000)
    assert (out / "model.safetensors.index.json").is_file(), "expected several shards"
    ids = torch.randint(3, tiny.VOCAB, (2, 60))
    dropped = ReferenceRuntime.load(checkpoint, config)
    expected = dropped.forward(ids, dropped.new_cache(2), logits="all")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert peer.config.num_hidden_layers == len(config.layers)
    assert_close("transformers", expected, peer(ids, use_cache=False).logits, 1e-4)
    reopened = open_checkpoint(out)
    again = ReferenceRuntime.load(reopened, reopened.config)
    assert_close("ours", expected, again.forward(ids, again.new_cache(2), logits="all"), 1e-6)
    for ours, theirs in zip(reopened.config.layers, config.layers, strict=True):
        assert (ours.window, ours.rope) == (theirs.window, theirs.rope)


@pytest.mark.parametrize("keep", [[0, 1, 3, 4], [2, 5]], ids=["windows alone", "none"])
@torch.no_grad()
def test_one_kind_of_layer_alone(keep, source, rng, tmp_path):
    """Gemma 3's rotary settings are by kind of layer, and a kind may go altogether."""
    import transformers

    checkpoint = source("gemma3")
    config = checkpoint.config.keep(keep)
    prune(checkpoint, config, tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(3, tiny.VOCAB, (2, 40), generator=rng)
    runtime = ReferenceRuntime.load(checkpoint, config)
    expected = runtime.forward(ids, runtime.new_cache(2), logits="all")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert_close("transformers", expected, peer(ids, use_cache=False).logits, 1e-4)
    again = open_checkpoint(tmp_path / "out")
    reopened = ReferenceRuntime.load(again, again.config)
    found = reopened.forward(ids, reopened.new_cache(2), logits="all")
    assert_close("ours", expected, found, 1e-6)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    tiny.write("llama", tmp_path / "model", 1)
    checkpoint = open_checkpoint(tmp_path / "model")
    config = keep_some(checkpoint.config)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    read = []
    original = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda name: read.append(name) or original(name))

    def kill(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint, config, out, shard_bytes=30_000, progress=kill)
    assert not out.exists() and partial.is_dir()
    first = set(read)
    read.clear()
    prune(checkpoint, config, out, shard_bytes=30_000)
    assert first & set(read) <= {"model.embed_tokens.weight"}, "a written shard was read again"
    assert not partial.exists()
    total = sum((out / name).stat().st_size for name in _shards(out))
    assert total > 0
    with pytest.raises(InputError, match="exists already"):
        prune(checkpoint, config, out)


def _shards(out) -> set[str]:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    return set(index["weight_map"].values())


def test_a_plan_drives_copies_of_its_model_alone(tmp_path):
    from support.profiles import Case

    from engine.pruning.profile import measure, merge

    (tmp_path / "one").mkdir()
    case = Case("llama", tmp_path / "one", 1)
    profile = merge([measure(case.decoder, case.samples, case.source())])
    plan = plan_from(profile, Choice((1,)), "manual")
    assert [entry.layer for entry in choose_layers(case.checkpoint, plan).layers] == [0, 2, 3]
    prune(case.checkpoint, case.config, tmp_path / "half", dtype=torch.float32)
    assert len(load(tmp_path / "half", drop=plan).config.layers) == 3  # the same norm weights

    tiny.write("llama", tmp_path / "other", 2)
    with pytest.warns(UserWarning, match="other weights"):
        choose_layers(open_checkpoint(tmp_path / "other"), plan)
    tiny.write("llama", tmp_path / "wide", 1, intermediate_size=96)
    with pytest.raises(InputError, match="other shapes"):
        choose_layers(open_checkpoint(tmp_path / "wide"), plan)
    with pytest.raises(InputError, match="made for 5 layers; .* has 4"):
        choose_layers(case.checkpoint, replace(plan, total_layers=5))
    with pytest.raises(InputError, match="exclude each other"):
        choose_layers(case.checkpoint, plan, keep="0")


def test_values_beyond_float16_are_refused(tmp_path):
    model = tiny.write("llama", tmp_path / "model", 1)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 3] = 1e6
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    with pytest.raises(InputError, match="layers.2.mlp.up_proj.weight: does not fit"):
        prune(checkpoint, keep_some(checkpoint.config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_passes_the_limit_by_a_tensor_alone():
    sizes = {"a": 3, "b": 3, "c": 4, "d": 3, "e": 9, "f": 1}
    assert cut_shards(sizes, 6) == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


def test_what_a_config_leaves_out_and_lists_that_are_not_of_layers(source, tmp_path):
    path = source("llama").path / "config.json"
    said = json.loads(path.read_text())
    said["suppress_tokens"] = list(range(3, 3 + said["num_hidden_layers"]))
    said["another_list"] = list(range(said["num_hidden_layers"] + 1))
    del said["architectures"]
    path.write_text(json.dumps(said))
    checkpoint = open_checkpoint(path.parent)
    prune(checkpoint, keep_some(checkpoint.config), tmp_path / "out", dtype=torch.float32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("suppress_tokens", "another_list"):
        assert written[key] == said[key]
    assert written["architectures"] == ["LlamaForCausalLM"]
    path.write_text(json.dumps(said | {"torch_dtype": "float32", "num_kv_shared_layers": 2}))
    checkpoint = open_checkpoint(path.parent)
    with pytest.raises(InputError, match="num_kv_shared_layers: layers that share"):
        prune(checkpoint, keep_some(checkpoint.config), tmp_path / "none")
    path.write_text(json.dumps(said | {"torch_dtype": "float32"}))
    checkpoint = open_checkpoint(path.parent)
    prune(checkpoint, keep_some(checkpoint.config), tmp_path / "half", dtype=torch.float16)
    written = json.loads((tmp_path / "half" / "config.json").read_text())
    assert written["dtype"] == "float16" and "torch_dtype" not in written
