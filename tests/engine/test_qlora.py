"""QLoRA: equal to peft's, resumed to the bit, merged or beside its base, in every runtime."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.close import assert_close
from support.healing import draw, killed_at, killing, logits, shortened
from support.ops_checks import SPECS
from support.packed import random_packed, spec_id
from support.qlora import SETTINGS, pack_base, peers_losses
from torch import nn

from engine.api import load
from engine.architecture.hf_config import from_hf
from engine.artifacts import HealRecord
from engine.checkpoint import open_checkpoint
from engine.checkpoint.adapter import AdaptedCheckpoint, Pair, places
from engine.errors import InputError
from engine.export.hf import prune
from engine.healing import adapters, trainer
from engine.healing.data import Data, perplexity
from engine.healing.heal import heal
from engine.healing.qlora import qlora
from engine.healing.recipe import parameters, recipe_of
from engine.healing.settings import Settings
from engine.healing.trainer import Learner
from engine.kernels.w4.format import unpack
from engine.kernels.w4.linear import W4Linear
from engine.kernels.w4.lora import adapt

peft = pytest.importorskip("peft")


def lesson(checkpoint, rng) -> Data:
    """Four windows, again and again, and measured with: what must be learnt."""
    windows = draw(checkpoint, rng).windows[:4]
    return Data(windows, windows)


def healed(checkpoint, rng, out, settings=SETTINGS, data=None, **options) -> HealRecord:
    data = lesson(checkpoint, rng) if data is None else data
    return heal(
        checkpoint, shortened(checkpoint), data, out, settings,
        pack=pack_base, **({"dtype": torch.float32} | options),
    )  # fmt: skip


@pytest.mark.parametrize("case, backend", [("llama", "cpu"), ("phi3", None)])
def test_twenty_steps_are_those_of_peft_on_the_dequantised_model(
    case, backend, source, rng, tmp_path
):
    checkpoint = source(case)
    data = lesson(checkpoint, rng)
    pack_base(checkpoint, shortened(checkpoint), tmp_path / "base")
    standing, pairs = qlora(tmp_path / "base", data, SETTINGS, tmp_path, backend=backend)
    expected = peers_losses(tmp_path / "base", data, SETTINGS, tmp_path)
    assert standing.losses == pytest.approx(expected, rel=1e-4)  # asked: 1e-2
    assert standing.step == 20 and standing.losses[-1] < standing.losses[0]
    assert len(pairs) == 3 * (2 if case == "phi3" else 3)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_gradients_against_differences_in_float64(spec, rng):
    """Through one 4-bit matrix into the adapter before it, by peft's own way into a model."""
    first, second = (random_packed(rng, *shape, spec) for shape in ((40, 70), (24, 40)))
    biases = torch.zeros(40), torch.zeros(24)
    net = nn.Sequential(*(
        W4Linear.from_packed(*each, exact=True)
        for each in zip((first, second), biases, strict=True)
    ))  # fmt: skip
    net = peft.get_peft_model(net, adapt(peft.LoraConfig(r=3, lora_alpha=6, target_modules="0|1")))
    learning = [weight for weight in net.parameters() if weight.requires_grad]
    for weight in learning:
        weight.data = torch.randn(weight.shape, generator=rng) / 8
    x, y = (torch.randn(9, k, generator=rng) for k in (70, 24))
    scale = y.square().mean().sqrt()

    def exact(weights):
        h = x.double()
        for packed, (a, b) in zip((first, second), (weights[:2], weights[2:]), strict=True):
            h = h @ unpack(packed).double().T + 2 * (h @ a.T) @ b.T
        return (h - y).square().sum() / scale

    ((net(x) - y).square().sum() / scale).backward()
    wide = [weight.detach().double() for weight in learning]
    for place, weight in enumerate(learning):
        way = torch.randn(weight.shape, generator=rng).double()
        moved = [
            exact([w + step * way if i == place else w for i, w in enumerate(wide)])
            for step in (1e-4, -1e-4)
        ]
        expected = (moved[0] - moved[1]) / 2e-4
        found = (weight.grad.double() * way).sum()
        assert float(found) == pytest.approx(float(expected), rel=1e-3, abs=1e-3 * float(
            weight.grad.norm() * way.norm()
        ))  # fmt: skip


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "gemma3"])
def test_merged_it_is_an_ordinary_directory(case, source, rng, tmp_path):
    import transformers

    checkpoint, out = source(case), tmp_path / "out"
    data = lesson(checkpoint, rng)
    record = healed(checkpoint, rng, out, data=data)
    assert HealRecord.load(out / "heal.json") == record and record.methods == ("qlora",)
    assert (record.steps, record.stopped) == (20, "after 20 steps")
    assert min(record.checks) < 0.9 * record.checks[0]
    assert not list(tmp_path.glob("out.*")), "expected nothing beside the result"
    with load(out, backend="reference") as model:
        ours = model(data.held_out)
        found = perplexity(model, data.held_out)
    assert found == pytest.approx(record.perplexity_after, rel=1e-4)
    peer = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_close("transformers", ours, peer(data.held_out, use_cache=False).logits, 1e-4)
    prune(checkpoint, shortened(checkpoint), tmp_path / "pruned", dtype=torch.float32)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("pruned", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3"])
def test_beside_its_base_it_runs_everywhere(case, source, rng, tmp_path):
    """Our runtimes against peft over `engine.hf`'s model, which both read the same two files."""
    import transformers

    import engine.hf  # noqa: F401  it opens packed directories

    checkpoint, out = source(case), tmp_path / "out"
    data, settings = lesson(checkpoint, rng), replace(SETTINGS, steps=8, adapter=True)
    record = healed(checkpoint, rng, out, settings, data, dtype=None)
    assert record.perplexity_after == pytest.approx(min(record.checks), rel=1e-3)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out / "base", dtype=torch.float32, attn_implementation="eager"
    )
    lora = adapt(peft.LoraConfig.from_pretrained(out))
    model = peft.PeftModel.from_pretrained(model, out, config=lora).eval()
    with torch.no_grad():
        expected = model(data.held_out, use_cache=False).logits
    for backend in ("reference", "cpu"):
        with load(out, backend=backend, dtype="float32") as ours:
            assert_close(backend, expected, ours(data.held_out), 1e-4)
    with load(out) as ours, load(out / "base") as bare:
        assert_close("rounded", expected, ours(data.held_out), 0.1)
        assert (ours(data.held_out) - bare(data.held_out)).abs().max() > 1e-2
    opened = open_checkpoint(out)
    prune(opened, opened.config.keep([0, 2]), tmp_path / "pruned", dtype=torch.float32)
    pruned = open_checkpoint(tmp_path / "pruned")
    expected = logits(opened, opened.config.keep([0, 2]), data.held_out)
    assert_close("pruned", expected, logits(pruned, pruned.config, data.held_out), 1e-5)


@pytest.mark.parametrize("methods", [("qlora",), ("linear", "qlora", "distil")], ids=",".join)
def test_a_killed_run_comes_to_the_same_bits(methods, source, rng, tmp_path):
    checkpoint = source("llama")
    data = draw(checkpoint, rng)
    settings = replace(SETTINGS, methods=methods, steps=11, check_every=4)
    straight = healed(checkpoint, rng, tmp_path / "a", settings, data)
    with pytest.raises(KeyboardInterrupt):
        healed(checkpoint, rng, tmp_path / "b", settings, data, reporting=killing)
    assert not (tmp_path / "b").exists()
    resumed = healed(checkpoint, rng, tmp_path / "b", settings, data)
    assert resumed.losses == straight.losses and resumed.checks == straight.checks
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    if methods == ("qlora",):
        short = replace(settings, seed=1, steps=1)
        other = healed(checkpoint, rng, tmp_path / "c", short, data)
        assert other.losses != straight.losses[:1]
    else:
        assert straight.steps == 22 and straight.stopped == "after 11 steps, then after 11 steps"


def test_a_loss_that_is_no_number_ends_it_with_the_last_good_weights(
    source, rng, tmp_path, monkeypatch
):
    calls, compute = [], Learner.compute_loss

    def broken(*given, **options):
        calls.append(1)
        return compute(*given, **options) * (torch.nan if len(calls) > 10 else 1)

    monkeypatch.setattr(Learner, "compute_loss", broken)
    record = healed(source("llama"), rng, tmp_path / "out")
    assert record.stopped == "the loss is not finite at step 11" and len(record.losses) == 10
    assert record.best_step == 8
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_a_full_disk_leaves_the_last_good_checkpoint(source, rng, tmp_path, monkeypatch):
    checkpoint = source("llama")
    data, save, saved = lesson(checkpoint, rng), trainer.state.save, []
    settings = replace(SETTINGS, steps=10)

    def full(path, *given):
        saved.append(path)
        if len(saved) > 4:
            raise InputError(f"{path}: No space left on device")
        save(path, *given)

    monkeypatch.setattr(trainer.state, "save", full)
    with pytest.raises(InputError, match="No space left"):
        healed(checkpoint, rng, tmp_path / "out", settings, data)
    (left,) = tmp_path.glob("out.healing/*/qlora.safetensors")
    assert trainer.state.standing(left).step == 8 and not (tmp_path / "out").exists()
    monkeypatch.setattr(trainer.state, "save", save)
    assert healed(checkpoint, rng, tmp_path / "out", settings, data).steps == 10


def test_windows_in_parts_are_the_same_step(source, rng, tmp_path, monkeypatch):
    checkpoint = source("llama")
    data, losses = draw(checkpoint, rng), []
    pack_base(checkpoint, shortened(checkpoint), tmp_path / "base")
    for fitting in (1 << 27, 1):
        monkeypatch.setattr(trainer, "LOGITS", fitting)
        (tmp_path / str(fitting)).mkdir()
        settings = replace(SETTINGS, steps=3, dropout=0.0)
        standing, _ = qlora(tmp_path / "base", data, settings, tmp_path / str(fitting))
        losses.append(standing.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_minutes_end_it(source, rng, tmp_path):
    settings = replace(SETTINGS, steps=None, minutes=0.01)
    record = healed(source("llama"), rng, tmp_path / "out", settings)
    assert record.stopped == "after 0.01 minutes" and record.steps > 0 and record.minutes < 0.2


def test_a_killed_run_has_the_minutes_that_are_left(source, rng, tmp_path, monkeypatch):
    """By a clock that says a second more whenever it is asked: once a step, once a check."""
    clock, given = iter(range(10**6)), (source("llama"), rng, tmp_path / "out")
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    settings = replace(SETTINGS, steps=None, minutes=1.0)
    data = lesson(given[0], rng)

    with pytest.raises(KeyboardInterrupt):
        healed(*given, settings, data, reporting=killed_at("seconds", 31))
    assert 48 <= healed(*given, settings, data).steps <= 58


def test_in_bfloat16_it_learns_as_well(source, rng, tmp_path):
    checkpoint = source("llama")
    data = lesson(checkpoint, rng)
    pack_base(checkpoint, shortened(checkpoint), tmp_path / "base")
    found = []
    for name in ("float32", "bfloat16"):
        (tmp_path / name).mkdir()
        settings = replace(SETTINGS, precision=name, steps=8)
        found.append(qlora(tmp_path / "base", data, settings, tmp_path / name)[0].losses)
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_the_papers_recipe_by_family_and_size(source):
    checkpoint = source("qwen2")
    config = checkpoint.config
    found = sum(checkpoint.read(name).numel() for name in checkpoint.names())
    assert parameters(config) == found
    tiny = recipe_of(config)
    assert (tiny.rank, tiny.lr, tiny.window) == (48, 3e-4, 256)  # of Qwen 7B, within its sizes
    raw = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 4096, "eos_token_id": 2,
    }  # fmt: skip
    large = from_hf(raw, "Llama-2-70B")
    assert recipe_of(large).size == pytest.approx(69e9, rel=0.01)
    assert recipe_of(large.keep([0, 1])) == recipe_of(large)  # by what the whole model was
    assert (recipe_of(large).rank, recipe_of(large).lr) == (8, 3e-5)
    assert recipe_of(replace(large, family="mistral")).lr == 3e-6
    assert recipe_of(replace(large, family="gemma3")).rank == 8  # Llama 2's of that size
    short, long = (Settings(("qlora",), steps=steps).of_qlora for steps in (20, 5000))
    assert short.warm_up * 20 == 2 and long.warm_up * 5000 == 100


@pytest.fixture
def adapter(source, rng, tmp_path):
    """A function that writes a sound directory with changes of its config or tensors."""
    checkpoint, out = source("llama"), tmp_path / "out"
    tiny.save_tokenizer(checkpoint.path)
    pack_base(checkpoint, shortened(checkpoint), tmp_path / "base")
    base, drawn = open_checkpoint(tmp_path / "base"), {}
    for module, (shape, _) in places(base.config, base.names()).items():
        a, b = (torch.randn(size, generator=rng) for size in ((4, shape[1]), (shape[0], 4)))
        drawn[module] = Pair(a / 8, b / 8)
    adapters.write(AdaptedCheckpoint(base, drawn, 1.0), SETTINGS, out, beside={})
    config, weights = out / "adapter_config.json", out / "adapter_model.safetensors"
    said, tensors = json.loads(config.read_text()), load_file(weights)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def change(tensor_changes=(), **config_changes):
        config.write_text(json.dumps(said | config_changes))
        new = {k: v for k, v in (tensors | dict(tensor_changes)).items() if v is not None}
        save_file(new, weights, {"format": "pt"})
        return out

    return change


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    "sentence, tensors, config",
    [
        ("peft_type: expected 'LORA', found 'IA3'", {}, {"peft_type": "IA3"}),
        ("r: expected a rank from 1 to 1048575, found 0", {}, {"r": 0}),
        ("r: expected a rank from 1 to 1048575, found True", {}, {"r": True}),
        ("a number above 0, at most 1,000,000, found -1", {}, {"lora_alpha": -1}),
        ("lora_alpha: expected a number above 0, at most", {}, {"lora_alpha": float("nan")}),
        ("use_dora: True is not supported", {}, {"use_dora": True}),
        ("rank_pattern: {'a.*': 3} is not supported", {}, {"rank_pattern": {"a.*": 3}}),
        ("alpha_pattern: ['a'] is not supported", {}, {"alpha_pattern": ["a"]}),
        ("rank_pattern a: expected a rank from 1 to", {}, {"rank_pattern": {"a": 0}}),
        ("alpha_pattern a: expected a number above 0", {}, {"alpha_pattern": {"a": "x"}}),
        ("expected shape (5, K), found (4, ", {}, {"rank_pattern": {"mlp.down_proj": 5}}),
        ("expected shape (5, K), found (4, ", {}, {"r": 5}),
        ("there is no directory or .gguf file 'gone'", {}, {"base_model_name_or_path": "gone"}),
        ("that lies beside it, found None", {}, {"base_model_name_or_path": None}),
        ("that lies beside it, found '.'", {}, {"base_model_name_or_path": "."}),
        ("that lies beside it, found '..'", {}, {"base_model_name_or_path": ".."}),
        ("that lies beside it, found '/'", {}, {"base_model_name_or_path": "/"}),
        ("there is no directory or .gguf file 'tmp'", {}, {"base_model_name_or_path": "/tmp"}),
        ("lacks " + FIRST, {FIRST: None}, {}),
        ("expected one of float32, float16, bfloat16", {FIRST: torch.zeros(4, 80).long()}, {}),
        ("expected an adapter of (48, 80)", {FIRST: torch.zeros(4, 64)}, {}),
        ("is none of a LoRA adapter's", {"lm_head.weight": torch.zeros(2, 2)}, {}),
        (
            "which is no matrix of a layer",
            {
                "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48),
                "base_model.model.lm_head.lora_B.weight": torch.zeros(160, 4),
            },
            {},
        ),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(sentence, tensors, config, adapter):
    with pytest.raises(InputError) as refused:
        open_checkpoint(adapter(tensors, **config))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, True) for name in ("use_qalora", "lora_bias", "fan_in_fan_out")),
        *(("init_lora_weights", each) for each in ("pissa_niter_4", "olora", "loftq", "corda")),
        *(("alora_invocation_tokens", [5, 6]), ("kasa_config", {}), ("arrow_config", {})),
        *(("use_bdlora", {}), ("bias", "all"), ("modules_to_save", ["lm_head"])),
        ("layer_replication", [[0, 1]]),
        *(("trainable_token_indices", [1]), ("target_parameters", ["a"])),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(name, value, adapter):
    with pytest.raises(InputError, match=f"{name}: .* is not supported"):
        open_checkpoint(adapter(**{name: value}))


@pytest.mark.parametrize("said", ["./{}", "org/{}", "/elsewhere/{}/"])
def test_a_base_goes_by_the_last_part_of_its_name(said, adapter):
    out = adapter()
    name = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = open_checkpoint(out).base.path
    assert open_checkpoint(adapter(base_model_name_or_path=said.format(name))).base.path == base


def test_rank_stabilized_scales(adapter):
    """rsLoRA: lora_alpha over the root of r."""
    scale = open_checkpoint(adapter(r=4, lora_alpha=6)).scale
    assert scale == 1.5
    assert open_checkpoint(adapter(r=4, lora_alpha=6, use_rslora=True)).scale == 3


def test_pickled_adapters_are_named(adapter):
    out = adapter()
    (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")
    with pytest.raises(InputError, match=r"pickles \(adapter_model.bin\) are not read"):
        open_checkpoint(out)


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    out = tmp_path / "out"
    tiny.write("llama", tmp_path / "other", 1, num_hidden_layers=3)
    (out / "other").symlink_to("../other")
    change = {"base_model_name_or_path": "other"}
    for_any = adapter(**change)  # its metadata gone: one that says nothing of its base
    assert len(open_checkpoint(for_any).config.layers) == 3
    tensors = load_file(out / "adapter_model.safetensors")
    save_file(
        {k: v.clone() for k, v in tensors.items()},
        out / "adapter_model.safetensors",
        {"base_lineage": "another"},
    )
    with pytest.raises(InputError, match="learnt on another model than .*other"):
        open_checkpoint(out)
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="'other' is an adapter itself"):
        open_checkpoint(out)
    nans = adapter({FIRST: torch.full((4, 80), torch.nan)})
    with pytest.raises(InputError, match="down_proj.weight holds NaN"), load(nans) as model:
        model.generate([3, 4], max_new_tokens=2)
