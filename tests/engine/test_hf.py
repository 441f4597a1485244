"""Packed directories in transformers: its logits, its generation, gradients, adapters, saving."""

import copy
import json
import pickle

import pytest
import torch
from support import tiny
from support.close import assert_close
from support.exported import assert_same_matrices, logits, packed_model

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.kernels.w4.linear import W4Linear

transformers = pytest.importorskip("transformers")
import engine.hf  # noqa: E402


def opened(directory, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, **({"dtype": torch.float32, "attn_implementation": "eager"} | options)
    )
    return model.eval()


@pytest.mark.parametrize("case, head, v", [
    ("qwen2", 8, 8), ("qwen3", 8, 4), ("gemma3", 8, 8), ("phi3", 16, 4), ("phi2", 4, 4),
    ("llama-biased-tied", 16, 8), ("phi2-qk-norm-tied", 8, 4), ("phi2-qk-norm-tied", 16, 4),
])  # fmt: skip
@torch.no_grad()
def test_logits_and_text_are_ours(case, head, v, source, rng, tmp_path):
    ours = packed_model(source(case), tmp_path / "ours", rng, drop=(1,), group=16, head=head, v=v)
    model = opened(tmp_path / "ours")
    linears = [m for m in model.modules() if isinstance(m, W4Linear)]
    assert len(linears) >= 4 * len(ours.config.layers)
    ids = torch.randint(3, tiny.VOCAB, (2, 30), generator=rng)
    expected = logits(ours, ids)
    assert_close(case, expected, model(ids, use_cache=False).logits, 1e-4)
    text = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 30:]
    whole = torch.cat([ids, text], 1)
    assert torch.equal(logits(ours, whole)[:, 29:-1].argmax(-1), text)


@pytest.mark.parametrize("case", ["qwen3", "phi3", "phi2-qk-norm-tied"])
def test_saving_gives_the_directory_back(case, source, rng, tmp_path):
    ours = packed_model(source(case), tmp_path / "ours", rng, group=16, head=8)
    opened(tmp_path / "ours").save_pretrained(tmp_path / "saved")
    again = open_checkpoint(tmp_path / "saved")
    assert sorted(again.names()) == sorted(ours.names())
    assert_same_matrices(ours, again)
    configs = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("ours", "saved")
    ]
    assert configs[0] == configs[1]
    ids = torch.randint(3, tiny.VOCAB, (1, 20), generator=rng)
    assert torch.equal(
        opened(tmp_path / "saved")(ids).logits, opened(tmp_path / "ours")(ids).logits
    )


@pytest.mark.parametrize("case", ["qwen3", "llama"])
def test_saving_in_place(case, source, rng, tmp_path):
    """transformers then leaves the index of the shards that it has replaced by one file."""
    ours = packed_model(source(case), tmp_path / "ours", rng, group=16, head=8)
    model = opened(tmp_path / "ours")
    ids = torch.randint(3, tiny.VOCAB, (1, 20), generator=rng)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").is_file()
    assert_same_matrices(ours, open_checkpoint(tmp_path / "ours"))
    assert torch.equal(opened(tmp_path / "ours")(ids).logits, expected)


@torch.no_grad()
def test_copies_and_casts(source, rng, tmp_path):
    packed_model(source("qwen3"), tmp_path / "ours", rng, group=16, head=8)
    model = opened(tmp_path / "ours")
    ids = torch.randint(3, tiny.VOCAB, (1, 20), generator=rng)
    expected = model(ids).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, expected)
        copied.save_pretrained(tmp_path / "copied")
        assert torch.equal(opened(tmp_path / "copied")(ids).logits, expected)
    model.tie_weights()
    assert torch.equal(model(ids).logits, expected)
    half = model.to(torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16
    assert_close("bfloat16", expected, half.float(), 5e-2)


def test_what_has_no_head_is_refused(source, rng, tmp_path):
    packed_model(source("llama"), tmp_path / "ours", rng, group=16)
    with pytest.raises(
        InputError, match=r"causal language model .* found LlamaModel, which has no"
    ):
        transformers.AutoModel.from_pretrained(tmp_path / "ours")


def test_adapters_learn_on_top(source, rng, tmp_path):
    import peft

    packed_model(source("llama"), tmp_path / "ours", rng, group=16)
    model = opened(tmp_path / "ours")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, engine.hf.adapt(lora))
    ids = torch.randint(3, tiny.VOCAB, (4, 24), generator=rng)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learning, lr=1e-2), []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(
        torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before
    )
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        opened(tmp_path / "ours"),
        tmp_path / "adapter",
        config=engine.hf.adapt(peft.LoraConfig.from_pretrained(tmp_path / "adapter")),
    )
    with pytest.raises(NotImplementedError, match="packed weights take no adapter in"):
        again.merge_and_unload()
    with torch.no_grad():
        assert_close("adapter", model.eval()(ids).logits, again.eval()(ids).logits, 1e-5)


def test_transformers_does_not_quantize_by_it(source):
    config = engine.hf.ShallowConfig(method="rtn")
    with pytest.raises(ValueError, match="pre-quantized"):
        opened(source("llama").path, quantization_config=config)
