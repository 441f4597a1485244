"""Budgets against transformers' parameter counts and the files that we write."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.commands import call, refused

from engine.checkpoint import open_checkpoint
from engine.commands.budget import parse_bytes, read_model
from engine.errors import InputError
from engine.export.hf import prune
from engine.kernels import native
from engine.kernels.w4.format import GROUPS, Spec
from engine.pruning.budget import (
    MODELS,
    Budget,
    Storage,
    budget,
    built_in,
    cost,
    file_bytes,
    packed_bytes,
    smallest_drop,
)
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe


@pytest.mark.parametrize("case", tiny.CASES)
def test_counts_equal_transformers_and_the_file(case, tmp_path):
    model = tiny.write(case, tmp_path / "model", 1)
    config = read_model(str(tmp_path / "model"))[0]
    found = cost(config, context=8)
    assert found.total_parameters == model.num_parameters()
    kept = config.keep([0, 2, 3])
    prune(open_checkpoint(tmp_path / "model"), kept, tmp_path / "out", dtype=torch.float16)
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert cost(kept).total_weight_bytes == sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize("name", MODELS)
def test_known_sizes(name):
    """Parameters as their makers give them, in billions to the digit they give."""
    given = {
        "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98, "llama-3-8b": 8.03,
        "llama-3-70b": 70.55, "mistral-7b": 7.24, "qwen-7b": 7.72, "qwen-14b": 14.17,
        "phi-2": 2.78,
    }  # fmt: skip
    assert round(cost(built_in(name)).total_parameters / 1e9, 2) == given[name]


def test_the_help_names_every_built_in_shape():
    help = " ".join(call("budget", "--help")[1].replace("│", " ").split())
    assert all(f" {name}" in help for name in MODELS)


def test_llama_2_70b_by_hand():
    """Half the layers of the paper's model at 4 bits: 18.2-20.3 GB by group and head."""
    config = built_in("llama-2-70b")
    half = config.keep([*range(39), 79])
    before = cost(config, context=4096)
    assert before.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
    assert before.attention_flops_per_token == 4 * 80 * 8192 * 4096
    matmuls = before.total_parameters - 262_144_000 - before.parameters["norms"]
    assert before.flops_per_token == 2 * matmuls + before.attention_flops_per_token
    assert before.bytes_per_token == 2 * (before.total_parameters - 262_144_000 + 8192) + (
        before.kv_bytes_per_token * 4096
    )
    for group, scale_bits, low, high in [
        (128, 16, 18.2, 18.8),
        (32, 16, 20.2, 20.4),
        (32, 32, 22.3, 22.5),
    ]:
        after = cost(half, Storage(4, group, 16, scale_bits), 4096)
        assert low < after.total_weight_bytes / 1e9 < high
        matrices = after.parameters["attention"] + after.parameters["mlp"]
        assert after.weight_bytes["scales"] == matrices // group * scale_bits // 8


def test_v_in_bits_of_its_own():
    config = built_in("llama-3-8b")
    plain, finer = (cost(config, Storage(4, 64, v_bits=bits)) for bits in (0, 8))
    rows = config.kv_heads * config.head_dim
    assert plain == cost(config, Storage(4, 64, v_bits=4))
    assert finer.total_weight_bytes - plain.total_weight_bytes == 32 * rows * 4096 // 2
    assert finer.bytes_per_token - plain.bytes_per_token == 32 * rows * 4096 // 2


def test_v_has_the_bits_of_the_matrix_that_it_is_stored_in(tmp_path):
    """As `engine quantize --v` has it; "qkv" of Phi-3 is one matrix."""
    tiny.write("phi3", tmp_path / "model", 1)
    config, _ = read_model(str(tmp_path / "model"))
    plain = cost(config, Storage(4, 16), 64)
    assert plain == cost(config, Storage(4, 16, v_bits=4), 64)
    for unsayable in (
        lambda: cost(config, Storage(4, 16, v_bits=8), 64),
        lambda: Recipe(v=8).of(config),
    ):
        with pytest.raises(InputError, match="v: expected 4, as phi3 stores q, k and v as one"):
            unsayable()


def test_windows_bound_what_a_token_reads():
    config = built_in("mistral-7b")
    short, long = cost(config, context=4096), cost(config, context=32768)
    assert short.bytes_per_token == long.bytes_per_token
    assert long.kv_bytes == 8 * short.kv_bytes


def test_smallest_drop():
    config = built_in("llama-3-8b")
    storage = Storage(4, 64)
    whole = cost(config, storage).total_weight_bytes
    assert smallest_drop(config, storage, whole) == 0
    count = smallest_drop(config, storage, whole - 1)
    assert count == 1
    target = parse_bytes("4GB")
    count = smallest_drop(config, storage, target)
    kept = [config.keep(range(32 - n)) for n in (count, count - 1)]
    assert cost(kept[0], storage).total_weight_bytes <= target
    assert cost(kept[1], storage).total_weight_bytes > target
    with pytest.raises(InputError, match="one layer alone takes"):
        smallest_drop(config, storage, 10**9)


def test_goes_to_json(tmp_path):
    config = built_in("phi-2")
    found = budget("phi-2", config, config.keep(range(24)), Storage(4, 128, 8), 2048)
    found.save(tmp_path / "budget.json")
    raw = json.loads((tmp_path / "budget.json").read_text())
    assert raw["after"]["layers"] == 24 and raw["before"]["total_parameters"] > 2.7e9


@pytest.mark.parametrize("number", ["inf", "nan", "0", "-3", "1e305"])
def test_bandwidths_that_are_none(number):
    says = f"bandwidth: expected a number of GB/s above 0, found {float(number)}"
    refused(says, "budget", "--bandwidth", number)


@pytest.mark.parametrize("given", [["phi-2"], ["--drop", "3"], ["--keep", "3"], ["--plan", "p"]])
def test_the_paper_is_of_one_model(given):
    refused("paper: is about llama-2-70b without 39-78", "budget", "--paper", *given)
    assert call("budget", "--paper", "llama-2-70b")[0] == 0


@pytest.mark.parametrize("given", [["--group", 64], ["--minimum"], ["--v", 16, "--group", 0]])
def test_weights_of_16_bits_have_no_groups(given):
    name = next(option for option in given if option in ("--group", "--minimum")).strip("-")
    refused(f"{name}: has no effect at 16 bits", "budget", "phi-2", "--bits", 16, *given)
    assert call("budget", "phi-2", "--bits", 16, "--head", 4, *given)[0] == 0
    assert call("budget", "phi-2", "--bits", 16, *given, "--v", 4)[0] == 0
    assert call("budget", "phi-2", "--bits", 16)[0] == 0


@pytest.mark.parametrize("group", [-1, 7, 1_000_000])
def test_groups_that_no_matrix_has(group):
    words = f"group: expected one of 0, 16, 32, 64, 128, found {group}"
    refused(words, "budget", "phi-2", "--group", group)


@pytest.mark.parametrize("size", ["8", "GB", "-1GB", "8 parsecs", "1e9GB", ""])
def test_sizes_that_are_none(size):
    with pytest.raises(InputError, match="target-memory: expected a size"):
        parse_bytes(size)


def test_the_cache_is_of_no_more_than_the_context():
    for model, positions in (("phi-2", 2048), ("llama-3-8b", 4096)):
        _, out, _ = call("--quiet", "budget", model)
        assert json.loads(out)["context"] == positions


def test_sizes():
    sizes = {"8GB": 8 * 10**9, "1.5 GiB": 3 * 2**29, "500mb": 5 * 10**8, " 7MiB ": 7 * 2**20}
    sizes |= {"2kb": 2000, "2KiB": 2048, "2TB": 2 * 10**12, "2TiB": 2**41}
    assert {size: parse_bytes(size) for size in sizes} == sizes
    for bad in ({"bits": 5}, {"head_bits": 3}, {"v_bits": 2}, {"group": -1}):
        with pytest.raises(InputError):
            Storage(**bad)
    for context in (0, 10**400):
        with pytest.raises(InputError, match="context: expected 1 to 1,000,000,000,000, found"):
            cost(built_in("phi-2"), context=context)


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3", "phi2", "qwen3"])
def test_the_file_is_counted_as_it_lies_on_disk(case, tmp_path):
    tiny.write(case, tmp_path / "model", 1)
    config, sizes = read_model(str(tmp_path / "model"))
    file = tmp_path / "model" / "model.safetensors"
    data = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(file_bytes(config, sizes).values()) == data
    assert file_bytes(config, sizes) == {
        part: 2 * nbytes for part, nbytes in cost(config).weight_bytes.items()
    }  # float32, where the cost is of 16 bits


def test_a_packed_file_is_smaller_than_16_bits(tmp_path):
    tiny.write("phi3", tmp_path / "model", 1)
    checkpoint = open_checkpoint(tmp_path / "model")
    pack(checkpoint, checkpoint.config, tmp_path / "packed", Recipe("rtn", 4, 16, head=16))
    config, sizes = read_model(str(tmp_path / "packed"))
    found = budget("packed", config, config, Storage(4, 16), 64, file_bytes(config, sizes))
    assert sum(found.file.values()) == sum(sizes.values())
    assert found.file["mlp"] < found.before["weight_bytes"]["mlp"] / 2
    assert Budget.from_json(json.loads(json.dumps(found.to_json())), "here") == found
    older = found.to_json()
    del older["file"]
    assert Budget.from_json(older, "here").file is None


@pytest.mark.skipif(native.error("cpu") is not None, reason="engine._cpu does not load")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_matrices_take_the_bytes_of_their_tiles(bits, group):
    from engine.kernels.w4.tiled import tile_bytes

    for scheme, scale_bits in (("symmetric", 16), ("minimum", 32)):
        for n, k in ((1, 1), (16, 32), (17, 33), (48, 80), (576, 576), (1536, 576), (100, 8960)):
            taken = sum(packed_bytes((n, k), bits, group, scale_bits))
            assert taken == -(-n // 16) * tile_bytes(Spec(bits, group, scheme), k), (n, k, scheme)


def test_a_home_of_nobody():
    refused("~nobody-of-this-name/model: no such file", "budget", "~nobody-of-this-name/model")
