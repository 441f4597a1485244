"""Weights that are absent, misshapen or asked for in vain: one sentence, on every runtime."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.runtimes import HERE

import engine
from engine.errors import InputError

every_backend = pytest.mark.parametrize("backend", HERE)
LAYER = "model.layers.1."
QKV, GATE_UP = LAYER + "self_attn.qkv_proj.weight", LAYER + "mlp.gate_up_proj.weight"
Q, NORM = LAYER + "self_attn.q_proj.weight", LAYER + "input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def grown(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat((tensor, tensor[:rows]))


# family, what edits a sound model's tensors -> words of the error
DAMAGES = {
    "q with extra rows": ("llama", lambda t: t.update({Q: grown(t[Q], 8)}), f"{Q}: expected shape"),
    "q with fewer rows": ("llama", lambda t: t.update({Q: t[Q][:-8]}), f"{Q}: expected shape"),
    "q with extra columns": (
        "llama",
        lambda t: t.update({Q: grown(t[Q].T, 8).T.contiguous()}),
        f"{Q}: expected shape",
    ),
    "a matrix for a norm": ("llama", lambda t: t.update({NORM: t[Q]}), f"{NORM}: expected shape"),
    "a short norm": ("llama", lambda t: t.update({NORM: t[NORM][:-1]}), f"{NORM}: expected shape"),
    "a small embedding": (
        "llama",
        lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1]}),
        f"{EMBEDDING}: expected shape",
    ),
    "a narrow embedding": (
        "llama",
        lambda t: t.update({EMBEDDING: t[EMBEDDING][:, :-1].contiguous()}),
        f"{EMBEDDING}: expected shape",
    ),
    "a small tied embedding": (
        "qwen3",
        lambda t: t.update({EMBEDDING: t[EMBEDDING][:-1]}),
        f"{EMBEDDING}: expected shape",
    ),
    "a small head": ("llama", lambda t: t.update({HEAD: t[HEAD][:-1]}), f"{HEAD}: expected shape"),
    "a head that is not its embedding": (
        "qwen3",
        lambda t: t.update({HEAD: t[EMBEDDING].roll(1, 0)}),
        f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}",
    ),
    "a small head beside a tied embedding": (
        "qwen3",
        lambda t: t.update({HEAD: t[EMBEDDING][:-1]}),
        f"{HEAD}: expected shape",
    ),
    "fused, too many rows": (
        "phi3",
        lambda t: t.update({QKV: t[GATE_UP]}),
        "qkv_proj.weight: expected shape",
    ),
    "whole numbers": (
        "llama",
        lambda t: t.update({Q: t[Q].int()}),
        f"{Q}: expected floats, .* int32",
    ),
    "truths for a norm": (
        "llama",
        lambda t: t.update({NORM: t[NORM] > 0}),
        f"{NORM}: expected floats, found bool",
    ),
    "a byte an embedding": (
        "llama",
        lambda t: t.update({EMBEDDING: t[EMBEDDING].byte()}),
        f"{EMBEDDING}: expected floats, found uint8",
    ),
    "no layer": ("llama", lambda t: t.pop(Q), f"no tensor '{Q}'"),
    "no fused tensor": (
        "phi3",
        lambda t: t.pop(GATE_UP),
        "no tensor .*gate_up_proj",
    ),
    "no embedding": ("llama", lambda t: t.pop(EMBEDDING), f"no tensor '{EMBEDDING}'"),
    "no head": ("llama", lambda t: t.pop(HEAD), f"no tensor '{HEAD}'"),
    "no norm of q": (
        "qwen3",
        lambda t: t.pop(LAYER + "self_attn.q_norm.weight"),
        "no tensor .*q_norm",
    ),
    "no bias": (
        "qwen2",
        lambda t: t.pop(LAYER + "self_attn.v_proj.bias"),
        "no tensor .*v_proj.bias",
    ),
}
# family, what is added to its config.json -> words of the error
RULES = {
    "a size": ("llama", {"intermediate_size": 96}, "gate_proj.weight: expected shape"),
    "the vocabulary": ("llama", {"vocab_size": 170}, "embed_tokens.weight: expected shape"),
    "biases": ("llama", {"attention_bias": True}, "no tensor .*q_proj.bias"),
    "biases of fused parts": (
        "phi3",
        {"attention_bias": True},
        "attention_bias: .*no q of its",
    ),
    "norms of q and k": ("llama", {"qk_layernorm": True}, "qk_layernorm: .*no q_norm of its own"),
    "no norms of q and k": ("phi2", {"qk_layernorm": True}, "no tensor .*q_layernorm"),
}


@every_backend
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(damage, backend, tmp_path):
    family, change, words = DAMAGES[damage]
    tiny.write(family, tmp_path, 1)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=words) as caught:
        engine.load(tmp_path, backend=backend)
    assert str(tmp_path) in str(caught.value)


def test_layers_behind_the_last_are_told(tmp_path):
    """They are left out, as transformers does."""
    tiny.write("llama", tmp_path, 1)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"num_hidden_layers": said["num_hidden_layers"] - 1}))
    with pytest.warns(UserWarning, match="the layers behind these are left out"):
        model = engine.load(tmp_path)
    assert len(model.config.layers) == said["num_hidden_layers"] - 1


def test_biases_that_the_config_does_not_speak_of_are_told(tmp_path, recwarn):
    """They are left out, as transformers does; zeros, as GPTQ directories have, go unsaid."""
    tiny.write("qwen3", tmp_path, 1)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    bias = tensors[LAYER + "self_attn.k_proj.bias"] = torch.zeros(32)
    save_file(tensors, file, {"format": "pt"})
    engine.load(tmp_path)
    assert not [each for each in recwarn if "left out" in str(each.message)]
    bias[3] = 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.warns(
        UserWarning, match=f"{LAYER}self_attn.k_proj.bias is left out: by its config"
    ):
        engine.load(tmp_path)


@every_backend
@pytest.mark.parametrize("rule", RULES)
def test_rules_without_their_weights(rule, backend, tmp_path):
    family, change, words = RULES[rule]
    tiny.write(family, tmp_path, 1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words) as caught:
        engine.load(tmp_path, backend=backend)
    assert str(tmp_path) in str(caught.value)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_floats_that_no_kernel_has(dtype, backend, tmp_path):
    """They become float32, whatever runs them."""
    tiny.write("llama", tmp_path, 1)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file({name: tensor.float() for name, tensor in tensors.items()}, file, {"format": "pt"})
    expected = engine.load(tmp_path, backend=backend)([3, 1, 4])
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(engine.load(tmp_path, backend=backend)([3, 1, 4]), expected)


@every_backend
@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv", "scale_weight"])
def test_eight_bit_floats_beside_a_scale(part, backend, tmp_path):
    """As modelopt writes them, whose config.json need not say so."""
    tiny.write("llama", tmp_path, 1)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors |= {Q: tensors[Q].to(torch.float8_e4m3fn), Q.replace("weight", part): torch.tensor(0.5)}
    save_file(tensors, file, {"format": "pt"})
    words = rf"{Q}: float8_e4m3fn beside a scale \({part}\)"
    with pytest.raises(InputError, match=words) as caught:
        engine.load(tmp_path, backend=backend)
    assert str(tmp_path) in str(caught.value)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_head_that_is_its_embedding(dtype, backend, tmp_path):
    """What tied models' directories may hold twice: other tools write it."""
    tiny.write("qwen3", tmp_path, 1)
    expected = engine.load(tmp_path, backend=backend)([3, 1, 4])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {HEAD: tensors[EMBEDDING].to(dtype, copy=True)}, file, {"format": "pt"})
    assert torch.equal(engine.load(tmp_path, backend=backend)([3, 1, 4]), expected)
