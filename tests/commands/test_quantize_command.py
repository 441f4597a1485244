"""engine quantize: what its options do, what it prints, what it refuses in one sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import call
from support.directories import assert_same, stored
from support.profiles import Case
from support.vocabularies import byte_level

from engine.api import load
from engine.artifacts import Plan
from engine.checkpoint import open_checkpoint
from engine.cli import app
from engine.commands.quantize import as_recipe
from engine.errors import InputError
from engine.evaluate import evaluate
from engine.kernels.w4.format import Spec, unpack
from engine.pruning.plan import Choice, plan_from
from engine.pruning.profile import measure, merge
from engine.quantize.recipe import Recipe
from engine.text import default_text

testing = pytest.importorskip("typer.testing")
UP = "model.layers.1.mlp.up_proj.weight"
V = "model.layers.1.self_attn.v_proj.weight"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(source) -> Path:
    """A tiny Llama with a tokenizer."""
    path = source("llama", vocab_size=700).path
    byte_level().save(str(path / "tokenizer.json"))
    return path


def quantize(*arguments: object) -> str:
    """Standard output; what the command raises comes out."""
    result = testing.CliRunner().invoke(
        app, ["quantize", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "120"}
    )
    assert result.exit_code == 0, result.output
    return result.stdout


SHORT = ("--samples", "4", "--length", "32")


def test_the_help_says_that_keep_keeps_the_head():
    said = " ".join(call("quantize", "--help")[1].replace("│", " ").split())
    assert "Default: 8, but keep with --method keep." in said
    assert as_recipe({}).head == 8 and as_recipe({"method": "keep"}).head is None


def test_by_default_gptq_in_4_bits_with_a_head_of_8(model, tmp_path):
    output = quantize(model, tmp_path / "out", *SHORT)
    found = stored(tmp_path / "out")
    assert found[UP].spec == Spec(4, 64, "codebook")
    assert found["lm_head.weight"].spec == found[V].spec == Spec(8, 64, "symmetric")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = config["quantization_config"]
    calibration = said.pop("calibration")
    assert (calibration["samples"], calibration["tokens"]) == (4, 128)
    assert said == {"quant_method": "shallow", "version": 3} | Recipe(v=8).__dict__
    rows = [line for line in output.splitlines() if "float32" in line]
    assert len(rows) == 5  # matrices, v, norms, embedding, head
    assert any("24" in row and "4 bits, group 64, codebook" in row for row in rows)
    assert any("as it was" in row and "9" in row for row in rows)
    (last,) = [line for line in output.splitlines() if "4 of 4 layers" in line]
    assert re.search(r"gptq: 4 bits, group 64, codebook, v in 8 bits, \d\.\d\d bits a weigh", last)
    opened = load(tmp_path / "out", backend="reference")
    assert opened.generate("The sea", max_new_tokens=4).text is not None
    judged = evaluate(opened.runtime, opened.text, default_text(), window=32, count=2)
    assert judged.perplexity > 1


def test_options_reach_the_directory(model, tmp_path):
    options = ("--bits", 8, "--group", 16, "--method", "rtn", "--clip", "mse", "--scheme", "zero")
    quantize(model, tmp_path / "out", *options, "--scale-dtype", "bfloat16", "--head", "16")
    found = stored(tmp_path / "out")
    assert found[UP].spec == Spec(8, 16, "zero", torch.bfloat16)
    assert found["lm_head.weight"].dtype == torch.float16
    options = ("--act-order", "--group", "0", "--text", ROOT / "README.md", *SHORT)
    quantize(model, tmp_path / "row", *options)
    assert stored(tmp_path / "row")[UP].spec == Spec(4, 0, "codebook")


def test_v_has_bits_of_its_own_where_they_pay(model, source, tmp_path):
    """Not for a scheme that is for other engines, nor where each head has its own v."""

    def bits(*options) -> set[int]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        said = quantize(*options, out, *(() if "rtn" in options else SHORT))
        found = {m.spec.bits for name, m in stored(out).items() if name.endswith("v_proj.weight")}
        assert ("v in 8 bits" in said) == (found == {8} and "8" not in options)
        return found

    assert bits(model, "--group", 32, "--scheme", "codebook") == {8}
    assert bits(model, "--v", 4) == bits(model, "--group", 32) == {4}
    assert bits(model, "--scheme", "symmetric") == bits(model, "--method", "rtn") == {4}
    assert bits(model, "--group", 32, "--v", 8) == {8}
    assert bits(model, "--bits", "8", "--method", "rtn") == {8}
    quantize(model, tmp_path / "rounded", "--method", "rtn", "--v", 8)
    assert stored(tmp_path / "rounded")[V].spec == Spec(8, 64, "symmetric")
    assert stored(tmp_path / "rounded")[UP].spec == Spec(4, 64, "symmetric")
    own = source("llama", vocab_size=700, num_key_value_heads=6).path
    byte_level().save(str(own / "tokenizer.json"))
    assert bits(own) == {4}
    joined = source("phi3", vocab_size=700).path
    byte_level().save(str(joined / "tokenizer.json"))
    assert bits(joined) == {4}
    with pytest.raises(InputError, match="v: expected 4, as phi3 stores q, k and v as one matrix"):
        quantize(joined, tmp_path / "no", "--v", 8)
    assert not list(tmp_path.glob("no*"))


def test_a_quantized_source_is_kept_unless_asked_otherwise(model, tmp_path):
    quantize(model, tmp_path / "first", "--method", "nf4", "--head", "4")
    assert "keep" in quantize(tmp_path / "first", tmp_path / "same").splitlines()[-1]
    assert_same_tensors(tmp_path / "first", tmp_path / "same")
    quantize(tmp_path / "first", tmp_path / "cut", "--drop", "1")
    assert stored(tmp_path / "cut").keys() < stored(tmp_path / "first").keys()
    quantize(tmp_path / "first", tmp_path / "kept", "--method", "keep", "--head", "8")
    assert stored(tmp_path / "kept")["lm_head.weight"].spec.bits == 8
    assert stored(tmp_path / "kept")[UP].spec.scheme == "codebook"
    output = quantize(tmp_path / "first", tmp_path / "other", "--method", "rtn", "--group", "16")
    assert "4 bits, group 64, codebook" in output and "4 bits, group 16, symmetric" in output
    assert stored(tmp_path / "other")[UP].spec == Spec(4, 16, "symmetric")


def assert_same_tensors(first: Path, second: Path) -> None:
    (second / "config.json").write_bytes((first / "config.json").read_bytes())
    assert_same(first, second)


def test_a_plan_goes_into_the_directory(tmp_path):
    case = Case("llama", tmp_path, 1)
    profile = merge([measure(case.decoder, case.samples, case.source())])
    plan = plan_from(profile, Choice((1,)), "manual")
    plan.save(tmp_path / "plan.json")
    path = case.checkpoint.path
    quantize(path, tmp_path / "out", "--method", "rtn", "--plan", tmp_path / "plan.json")
    assert Plan.load(tmp_path / "out" / "plan.json") == plan
    quantize(path, tmp_path / "dropped", "--method", "rtn", "--drop", "1")
    quantize(path, tmp_path / "kept", "--method", "rtn", "--keep", "0,2-3")
    assert_same(tmp_path / "dropped", tmp_path / "kept")
    assert Plan.load(tmp_path / "kept" / "plan.json").keep == (0, 2, 3)
    (tmp_path / "out" / "plan.json").unlink()
    (tmp_path / "kept" / "plan.json").unlink()
    assert_same(tmp_path / "out", tmp_path / "kept")
    with pytest.raises(InputError, match="--plan excludes --drop and --keep"):
        quantize(path, tmp_path / "no", "--plan", tmp_path / "plan.json", "--drop", "1")


@pytest.mark.parametrize(
    "options, scheme, clip",
    [
        ({}, "codebook", "mse"),
        ({"group": 32}, "minimum", "mse"),
        ({"group": 128}, "codebook", "mse"),
        ({"bits": 8}, "symmetric", "mse"),
        ({"method": "rtn"}, "symmetric", "minmax"),
        ({"method": "hqq"}, "minimum", "minmax"),
        ({"method": "nf4"}, "codebook", "minmax"),
        ({"scheme": "symmetric", "clip": "minmax"}, "symmetric", "minmax"),
    ],
)
def test_what_is_chosen_where_nothing_is_said(options, scheme, clip):
    recipe = as_recipe(options)
    assert (recipe.scheme, recipe.clip) == (scheme, clip)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bits": 3}, "bits must be 4 or 8, found 3"),
        ({"bits": 16}, "bits must be 4 or 8, found 16"),
        ({"group": 48}, r"group must be one of \(0, 16, 32, 64, 128\).*, found 48"),
        ({"group": -1}, "group must be one of .*, found -1"),
        ({"method": "awq"}, "method: expected one of gptq, hqq, rtn, nf4, keep, found 'awq'"),
        ({"scheme": "kquant"}, "scheme: expected one of symmetric, zero, minimum, codebook, f"),
        ({"method": "nf4", "scheme": "zero"}, "scheme: expected one of codebook, found 'zero'"),
        ({"method": "nf4", "bits": 8}, "scheme 'codebook' has 4 bits, found 8"),
        ({"scale_dtype": "float64"}, "scale_dtype: expected one of .*bfloat16, found 'float64'"),
        ({"clip": "max"}, "clip: expected one of minmax, mse, found 'max'"),
        ({"clip": "mse", "method": "hqq"}, "clip: belongs to rtn and gptq, not to hqq"),
        ({"act_order": True, "method": "rtn"}, "act-order: belongs to gptq, not to rtn"),
        ({"head": "2"}, "head: expected 4, 8, 16 or keep, found '2'"),
        ({"v": 16}, "v: expected one of 4, 8, None, found 16"),
        ({"v": 4, "bits": 8}, "v: expected one of 8, None, found 4"),
        ({"method": "keep", "v": 8}, "v: has no effect with --method keep"),
        ({"method": "keep", "group": 32}, "group: has no effect with --method keep"),
    ],
)
def test_options_that_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        as_recipe(options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UP, "model.layers.2.input_layernorm.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named(name, value, model, tmp_path):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = value
    save_file(tensors, file)
    for method in ("rtn", "hqq", "nf4"):
        with pytest.raises(InputError, match=rf"{model}: {name}: holds NaN or Inf"):
            quantize(model, tmp_path / "out", "--method", method)
    assert not (tmp_path / "out").exists()


def test_calibration_that_meets_no_finite_activation(model, tmp_path):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"].mul_(1e38)
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"model\.layers\.\d\.\S+: "):
        quantize(model, tmp_path / "out", *SHORT, "--scale-dtype", "float32")


def test_places_and_texts_that_are_refused(model, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there: exists already"):
        quantize(model, tmp_path / "there", "--method", "rtn")
    with pytest.raises(InputError, match=r"no/out: there is no directory .*no$"):
        quantize(model, tmp_path / "no" / "out", "--method", "rtn")
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(InputError, match="too short for one sample"):
        quantize(model, tmp_path / "out", "--text", tmp_path / "text.txt")
    with pytest.raises(InputError, match="length: 300 tokens exceed the context of 256"):
        quantize(model, tmp_path / "out", "--length", "300", "--samples", "2")
    with pytest.raises(InputError, match="samples: calibrates gptq, not rtn"):
        quantize(model, tmp_path / "out", "--method", "rtn", "--samples", "2")
    with pytest.raises(InputError, match="column: calibrates gptq, not rtn"):
        quantize(model, tmp_path / "out", "--method", "rtn", "--column", "body")
    with pytest.raises(InputError, match=r"column: goes with .*, found the built-in text"):
        quantize(model, tmp_path / "out", "--column", "body")
    with pytest.raises(InputError, match="out: lies in the text .*; name a place outside it"):
        quantize(model, tmp_path / "there" / "out", "--text", tmp_path)


def test_one_line_and_exit_code_2(model, tmp_path):
    command = [sys.executable, "-m", "engine.cli", "quantize", str(model), str(tmp_path / "out")]
    done = subprocess.run([*command, "--bits", "5"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "engine: bits must be 4 or 8, found 5\n"


def test_torch_waits_without_spinning():
    """What OpenMP says of itself when torch loads it: set later, the policy would not count."""
    command = [sys.executable, "-m", "engine.cli", "quantize", "model", "out", "--bits", "5"]
    kept = {name: value for name, value in os.environ.items() if name[:4] not in ("OMP_", "GOMP")}
    done = subprocess.run(
        command, env=kept | {"OMP_DISPLAY_ENV": "true"}, capture_output=True, text=True, cwd=ROOT
    )
    assert re.search(r"OMP_WAIT_POLICY *= *'PASSIVE'", done.stderr), done.stderr


def test_a_damaged_directory(model, tmp_path, rng):
    """Cut short anywhere, or with any bit of a header flipped: one sentence, or still readable."""
    out = tmp_path / "out"
    quantize(model, out, "--method", "rtn", "--keep", "0")

    def read() -> None:
        checkpoint = open_checkpoint(out)
        for name in checkpoint.names():
            checkpoint.shape(name), checkpoint.packed(name), checkpoint.read(name)
        load(out, backend="reference")

    read()
    for file in sorted(out.glob("*.safetensors")):
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for length in (0, 7, 8, header - 1, header, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(InputError, match=file.name):
                read()
        refused = 0
        for at in torch.randint(0, header, (100,), generator=rng).tolist():
            bit = 1 << int(torch.randint(0, 8, (1,), generator=rng))
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                read()
            except InputError as error:
                assert str(out) in str(error)
                refused += 1
        assert refused > 20
        file.write_bytes(whole)
    read()


def test_a_directory_of_a_newer_version(model, tmp_path):
    out = tmp_path / "out"
    quantize(model, out, "--method", "rtn", "--keep", "0")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["version"] = 4
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="of version 4; this Shallow reads 1 to 3"):
        open_checkpoint(out)


def test_what_is_asked_for_changes_the_matrices(model, tmp_path):
    rows = [json.dumps({"body": line}) for line in default_text().split("\n\n")[40:80]]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    plain, *changed = (
        stored((quantize(model, tmp_path / str(index), *SHORT, *options), tmp_path / str(index))[1])
        for index, options in enumerate([
            (), ("--text", tmp_path / "rows.jsonl", "--column", "body"), ("--act-order",),
            ("--clip", "minmax"),
        ])
    )  # fmt: skip
    assert changed[1][UP].perm is not None
    assert all(not torch.equal(unpack(plain[UP]), unpack(found[UP])) for found in changed)
