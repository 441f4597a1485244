"""W4Linear and `replace_linears`: in models of transformers, saved, moved, compiled, trained."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.close import assert_close, rms_ratio
from support.ops_checks import SPECS, case
from support.packed import random_packed, spec_id
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.errors import InputError
from engine.kernels.dispatch import BackendUnavailable
from engine.kernels.w4.format import Packed, Spec, unpack, zeros
from engine.kernels.w4.linear import W4Linear, replace_linears
from engine.quantize.methods import nf4, rtn

Q4_1 = Spec(4, 32, "minimum")
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "LlamaConfig": {"num_key_value_heads": 2, "attention_bias": True},
    "GPTNeoXConfig": {},
    "Qwen3Config": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
}


def to_q4(name: str, weight: torch.Tensor) -> Packed:
    return rtn(weight, Q4_1, name=name)


def build(rng: torch.Generator, config: str = "LlamaConfig") -> nn.Module:
    """A tiny model of transformers with random weights."""
    import transformers

    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**SIZES | MODELS[config])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=rng) * 0.05
    return model.eval()


def linear(rng, spec: Spec = Q4_1, n: int = 34, k: int = 201, **options) -> W4Linear:
    return W4Linear.from_packed(case(rng, spec, n, k), torch.randn(n, generator=rng), **options)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("config", MODELS)
def test_logits_of_models(rng, config):
    """Against the same model with dequantized weights; heads stay in 16 or 32 bits."""
    model = build(rng, config)
    dense, tokens = copy.deepcopy(model), torch.randint(160, (2, 23), generator=rng)
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    done = replace_linears(model, to_q4, skip=("lm_head", "embed_out"), exact=True)
    (head,) = done.skipped
    assert set(done.replaced) == linears - {head} and "head" in head or "embed" in head
    for name in done.replaced:
        dense.get_submodule(name).weight.data = unpack(model.get_submodule(name).packed)
    expected = dense(tokens).logits
    assert_close(config, expected, model(tokens).logits, 1e-4)
    if config == "LlamaConfig":
        ids = [m.generate(tokens, max_new_tokens=5, do_sample=False) for m in (model, dense)]
        assert torch.equal(*ids)


def test_names_that_were_left_alone_say_why():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
            self.head.weight = self.embed.weight
            self.attention = nn.MultiheadAttention(16, 2)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight
            self.twice = nn.ModuleList([nn.Linear(16, 4)] * 2)
            self.wo, self.other, self.kept, self.hooked = (nn.Linear(16, 8) for _ in range(4))
            self.hooked.register_forward_pre_hook(lambda module, args: None)

    model = Shared()
    done = replace_linears(
        model, lambda name, w: None if name == "kept" else to_q4(name, w), skip=("wo", "lm_head")
    )
    assert done.replaced == ("twice.0", "twice.1", "other")
    assert model.twice[0] is model.twice[1] and isinstance(model.twice[0], W4Linear)
    assert done.skipped == {
        "head": "shares its weight with embed",
        "attention.out_proj": "is a NonDynamicallyQuantizableLinear, not an nn.Linear itself",
        "first": "shares its weight with second",
        "second": "shares its weight with first",
        "wo": "skip names wo",
        "kept": "no packed weight was given",
        "hooked": "has hooks of its own",
    }
    assert replace_linears(nn.Linear(4, 4), to_q4).skipped == {"": "is the model itself"}
    assert replace_linears(model, to_q4, skip="wo").replaced == ("kept",)
    patched = nn.Sequential(nn.Linear(32, 4), nn.Linear(32, 4)).eval()  # as accelerate moves them
    patched[0].forward = lambda x: x
    assert replace_linears(patched, to_q4).skipped == {"0": "has hooks of its own"}
    assert not patched[1].training
    broken = nn.Sequential(nn.Linear(32, 4))
    broken[0].weight.data[1, 1] = torch.nan
    with pytest.raises(InputError, match="0: holds NaN or Inf"):
        replace_linears(broken, to_q4)
    assert type(broken[0]) is nn.Linear


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_state_dict(rng, tmp_path, spec, backend):
    """The format's own tensors, through a safetensors file, into a linear of either backend."""
    first = linear(rng, spec, backend=backend)
    state = first.state_dict()
    packed = first.packed.tensors()
    assert state.keys() == {"bias", *(f"weight.{name}" for name in packed)}
    assert all(torch.equal(state[f"weight.{name}"], tensor) for name, tensor in packed.items())
    save_file(state, tmp_path / "linear.safetensors")
    x = torch.randn(5, 201, generator=rng)
    for assign in (False, True):
        other = W4Linear(201, 34, spec)
        loaded = load_file(tmp_path / "linear.safetensors")
        assert not other.load_state_dict(loaded, assign=assign).missing_keys
        assert same_weights(first, other)
        expected = x @ unpack(first.packed).T + first.bias
        assert_close("loaded", expected, other(x), 1e-2)


def test_state_dicts_that_do_not_fit(rng):
    state = linear(rng).state_dict()
    for change, match in (
        ({"weight.scales": None}, 'Missing key.*"weight.scales"'),
        ({"weight.zeros": state["weight.codes"]}, 'Unexpected key.*"weight.zeros"'),
        ({"weight": torch.zeros(34, 201)}, 'Unexpected key.*"weight"'),
        ({"weight.codes": state["weight.codes"][:, 16:]}, r"codes must be \(34, 112\), found"),
        ({"weight.mins": state["weight.mins"].float()}, "mins must be torch.float16, found"),
        ({"weight.perm": torch.zeros(201, dtype=torch.int32)}, "perm must hold each of 0..200"),
    ):
        given = {key: value for key, value in (state | change).items() if value is not None}
        other = W4Linear(201, 34, Q4_1)
        with pytest.raises(RuntimeError, match=match):
            other.load_state_dict(given)
        assert "Unexpected" in match or not unpack(other.packed).any(), "the weights stay"
    del state["weight.scales"]
    assert other.load_state_dict(state, strict=False).missing_keys == ["weight.scales"]
    with pytest.raises(ValueError, match=r"weights must be \(34, 201\) of Spec.*found \(8, 32\)"):
        other.hold(random_packed(rng, 8, 32, Q4_1))


def test_built_on_meta(rng):
    """An empty model takes its weights, assigned or copied, from a file of another's."""
    model = build(rng)
    tokens = torch.randint(160, (1, 7), generator=rng)
    replace_linears(model, to_q4)
    expected = model(tokens).logits
    with torch.device("meta"):
        empty = build_empty(model)
        replace_linears(empty, lambda name, weight: zeros(Q4_1, tuple(weight.shape)))
        alone = W4Linear(201, 34, Q4_1)
    assert {t.device.type for t in [*empty.parameters(), *alone.buffers()]} == {"meta"}
    assert empty(tokens.to("meta")).logits.shape == expected.shape
    with pytest.raises(NotImplementedError, match="meta"):
        alone.to("cpu")
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(model.state_dict(), assign=True)
    copied = empty.to_empty(device="cpu")
    copied.load_state_dict(model.state_dict())
    for other in (assigned, copied):
        other.model.rotary_emb = model.model.rotary_emb  # whose buffers no state dict holds
        assert torch.equal(other(tokens).logits, expected)
    assert alone.to_empty(device="cpu")(torch.zeros(2, 201)).shape == (2, 34)
    permuted = W4Linear.from_packed(random_packed(rng, 34, 201, Q4_1, permuted=True)).to("meta")
    assert permuted(torch.empty(2, 201, device="meta")).shape == (2, 34)


def build_empty(model: nn.Module) -> nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_config(model.config)


def test_weights_lie_there_once(rng):
    first = linear(rng, n=512, k=1024)
    size = sum(tensor.nbytes for tensor in first.buffers())
    assert first.layout == "cpu" and size < first.packed.nbytes * 1.01 + 4096


def test_deepcopy_and_casts(rng):
    first = linear(rng)
    x = torch.randn(5, 201, generator=rng)
    expected, state = first(x), copy.deepcopy(first.state_dict())
    other = copy.deepcopy(first)
    del first
    assert torch.equal(other(x), expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        assert other.to(dtype).bias.dtype == dtype
        weights = {key: value for key, value in other.state_dict().items() if key != "bias"}
        assert all(torch.equal(value, state[key]) for key, value in weights.items())
        if dtype != torch.float64:
            y = other(x.to(dtype))
            assert y.dtype == dtype and rms_ratio(expected, y) < 1e-2
    assert other.type(torch.bfloat16).bias.dtype == torch.bfloat16
    assert rms_ratio(expected, other(x)) < 1e-2
    before = other(x.float())  # the bias was rounded by the casts
    assert torch.equal(other.share_memory().cpu().requires_grad_(False)(x.float()), before)
    assert "bits=4, group=32, scheme=minimum, layout=cpu" in repr(other)


def test_autocast(rng):
    module, x = linear(rng), torch.randn(5, 201, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module(x.bfloat16()))


@pytest.mark.parametrize("exact", [False, True])
def test_compiled_whole(rng, exact):
    module = nn.Sequential(linear(rng, exact=exact), nn.GELU(), linear(rng, SPECS[1], 7, 34))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((5, 201), (2, 9, 201)):
        x = torch.randn(*shape, generator=rng, requires_grad=True)
        results = [f(x) for f in (compiled, module)]
        assert torch.equal(*results)
        leaves = (x, *module.parameters())
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in results]
        for name, (got, expected) in enumerate(zip(*grads, strict=True)):
            assert_close(f"gradient {name}", expected, got, 1e-5)


def test_exported(rng):
    module, x = linear(rng), torch.randn(5, 201, generator=rng)
    program = torch.export.export(module, (x,))
    assert "shallow.w4_matmul" in str(program.graph)
    assert torch.equal(program.module()(x), module(x))


def test_adapters_learn_through_it(rng):
    """Low-rank adapters at every linear, trained through frozen 4-bit weights below and above."""

    class Adapted(nn.Module):
        def __init__(self, base: W4Linear):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down = nn.Parameter(torch.randn(4, base.in_features, generator=rng) * 0.1)
            self.up = nn.Parameter(torch.zeros(base.out_features, 4))

        def forward(self, x):
            return self.base(x) + x @ self.down.T @ self.up.T

    model, tokens = build(rng).requires_grad_(False), torch.randint(160, (4, 16), generator=rng)
    for name in replace_linears(model, lambda name, w: nf4(w, Spec(4, 64, "codebook"))).replaced:
        model.set_submodule(name, Adapted(model.get_submodule(name)))
    weights = {key: value.clone() for key, value in model.state_dict().items() if ".base." in key}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(rng, reentrant):
    """The way of transformers and of torch's default gives saved tensors a single time."""
    module = linear(rng)
    found = []
    x = torch.randn(5, 201, generator=rng)
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        module.bias.grad = None
        run(leaf).square().sum().backward()
        found.append((leaf.grad, module.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_explicit_backend_runs_or_raises(rng):
    reference = linear(rng, backend="reference")
    x = torch.randn(3, 201, generator=rng, dtype=torch.float64)
    expected = x @ unpack(reference.packed).double().T + reference.bias
    torch.testing.assert_close(reference(x), expected.detach())
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="backend triton: torch finds no GPU"):
            W4Linear(201, 34, Q4_1, backend="triton")
    with pytest.raises(BackendUnavailable, match='there is no backend "fast"'):
        linear(rng, backend="fast")


def test_the_readme_example_runs(rng, tmp_path):
    text = Path(__file__).parents[2].joinpath("kernels/w4/README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    model, scope = build(rng), {}
    model.save_pretrained(tmp_path / "model")
    name = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    exec(code.replace(name, repr(str(tmp_path / "model"))), scope)
    ours = scope["model"]
    assert {type(m) for n, m in ours.named_modules() if n.endswith("_proj")} == {W4Linear}
    ours.save_pretrained(tmp_path / "w4")
    saved = load_file(tmp_path / "w4" / "model.safetensors")
    assert saved.keys() == ours.state_dict().keys()
