"""Config values that no decoder takes: one sentence, whoever makes the config."""

import json
from dataclasses import replace

import pytest
from support import tiny

from engine.architecture.config import Rope
from engine.architecture.hf_config import from_hf
from engine.errors import InputError

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LARGE = {"max_position_embeddings": 1 << 20}
WRONG = [
    ({"rope_parameters": YARN | {"factor": 1e308}}, "factor: expected a number from"),
    ({"rope_parameters": YARN | {"factor": 1e30}}, "factor: expected a number from"),
    ({"rope_parameters": YARN | {"factor": float("nan")}}, "factor: expected a number from"),
    ({"rope_parameters": YARN | {"factor": 1e4}} | LARGE, "max_context: expected a whole number"),
    ({"rope_parameters": YARN | {"beta_fast": "x"}}, "beta_fast: expected a number"),
    ({"rope_parameters": YARN | {"mscale": "x", "mscale_all_dim": 1}}, "mscale: expected"),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": "x"}}, "original_max_.*: exp"),
    ({"rope_parameters": YARN | {"rope_theta": 1}}, "theta: expected more than 1"),
    ({"rope_parameters": LONG | {"original_max_position_embeddings": 1}}, "original_max.* from 2"),
    ({"rope_parameters": {"full_attention": 3}}, "full_attention: expected an object"),
    ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
    ({"rope_scaling": 3}, "rope_scaling: expected an object"),
    ({"rope_scaling": YARN}, "rope_scaling: expected none beside another rope_parameters"),
    ({"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 1e6}}, "rope_scaling: exp"),
    ({"architectures": None, "model_type": "mamba"}, "expected a list 'architectures'"),
    ({"architectures": None, "model_type": ["llama"]}, "expected a list 'architectures'"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type: expected one of"),
    ({"hidden_act": ["silu"]}, "hidden_act: expected one of"),
    ({"rms_norm_eps": 1e308}, "rms_norm_eps: expected a number"),
    ({"is_causal": False}, r"is_causal: expected true \(a causal decoder\), found False"),
    ({"partial_rotary_factor": 1e308}, "partial_rotary_factor: expected"),
    ({"eos_token_id": [1, "x"]}, "eos_token_id: expected"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false"),
    ({"head_dim": 4096}, "head_dim: expected a whole number from 1 to 1024"),
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write("llama", path, 1)
    return json.loads((path / "config.json").read_text())


@pytest.mark.parametrize(("change", "sentence"), WRONG, ids=lambda x: str(x)[:60])
def test_values_out_of_range(change, sentence, raw):
    with pytest.raises(InputError, match=f"^FILE: {sentence}"):
        from_hf(raw | change, "FILE")


@pytest.mark.parametrize(
    "change",
    [{"kv_heads": 4}, {"norm_eps": 0.0}, {"head_dim": 6}, {"layers": ()}, {"activation": "mish"}],
    ids=str,
)
def test_no_config_holds_them(change, raw):
    config = from_hf(raw, "FILE")
    with pytest.raises(InputError, match="expected"):
        replace(config, **change)


@pytest.mark.parametrize(
    "change",
    [{"dim": 7}, {"kind": "yarn"}, {"kind": "divisors", "divisors": (1.0,)}, {"theta": 1e300}],
    ids=str,
)
def test_no_rope_holds_them(change):
    with pytest.raises(InputError, match="expected"):
        Rope(**({"theta": 1e4, "dim": 8} | change))


@pytest.mark.parametrize("case", ["llama", "phi2", "gemma3"])
def test_architectures_left_out(case, tmp_path):
    tiny.write(case, tmp_path, 1)
    raw = json.loads((tmp_path / "config.json").read_text())
    expected = replace(from_hf(raw, "FILE"), source={})
    del raw["architectures"]
    for found in (raw, raw | {"architectures": []}):
        assert replace(from_hf(found, "FILE"), source={}) == expected


def test_rope_scaling_that_says_what_rope_parameters_say(raw):
    same = {"rope_parameters": YARN | {"rope_theta": 1e4}, "rope_scaling": YARN}
    older = {"type": "yarn", "factor": 4.0, "mscale": None}
    for scaling in (YARN, older):
        found = from_hf(raw | same | {"rope_scaling": scaling}, "FILE")
        assert found.ropes == from_hf(raw | same | {"rope_scaling": None}, "FILE").ropes
        assert {rope.kind for rope in found.ropes} == {"yarn"}


def test_keep_names_the_layers_that_are_left(raw):
    left = from_hf(raw, "FILE").keep([0, 1, 3])
    with pytest.raises(InputError, match=r"^kept layers: .* out of 0-1,3, found \[2\]$"):
        left.keep([2])


@pytest.mark.parametrize("case", ["gemma3", "qwen2-window"])
def test_more_types_than_layers(case, tmp_path):
    """Left by who drops a layer and edits the count alone: which one went, nobody can say."""
    tiny.write(case, tmp_path, 1)
    raw = json.loads((tmp_path / "config.json").read_text())
    fewer = {"num_hidden_layers": raw["num_hidden_layers"] - 1}
    with pytest.raises(InputError, match="layer_types: expected a list of"):
        from_hf(raw | fewer, "FILE")


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        ("gemma2", {}),
        ("gemma3", {}),
        ("gemma3", {"sliding_window_pattern": 4}),
        ("qwen2-window", {"max_window_layers": 1}),
        ("smollm3-window", {"no_rope_layer_interval": 2}),
    ],
    ids=str,
)
def test_windows_by_a_rule_are_those_of_transformers(case, rule, tmp_path):
    """In configs that are older than the list of layer_types."""
    transformers = pytest.importorskip("transformers")
    tiny.write(case, tmp_path, 1)
    raw = json.loads((tmp_path / "config.json").read_text()) | rule
    raw = {key: raw[key] for key in raw.keys() - {"layer_types", "no_rope_layers"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    layers = from_hf(raw, "FILE").layers
    windowed = [
        "full_attention" if entry.window is None else "sliding_attention" for entry in layers
    ]
    assert windowed == theirs.layer_types and len(set(windowed)) == 2
    if case.startswith("smollm3"):
        assert [int(entry.rope is not None) for entry in layers] == theirs.no_rope_layers


@pytest.mark.parametrize(("case", "factor"), [("llama", 8), ("gemma3", 1)])
def test_linear_scaling_goes_beyond_the_context_but_where_it_is_named(case, factor, tmp_path):
    """Gemma 3 of 4B and more: max_position_embeddings 131,072 and a linear factor of 8."""
    tiny.write(case, tmp_path, 1)
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": None}
    config = from_hf(raw | scaling | {"max_position_embeddings": 131072}, "FILE")
    assert config.max_context == factor * 131072
    assert "linear" in {rope.kind for rope in config.ropes}
