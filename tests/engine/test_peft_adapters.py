"""Adapters that peft writes, opened: its own model's logits, whatever ranks and scales it gave."""

import json

import peft
import pytest
import torch
import transformers
from support import tiny
from support.close import assert_close

from engine.checkpoint import open_checkpoint
from engine.runtime.reference import ReferenceRuntime

PATTERNS = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "ranks": {"rank_pattern": {"down_proj": 7, "model.layers.1.mlp.down_proj": 2}},
    "scales": {"alpha_pattern": {"layers.1.mlp.down_proj": 5, "o_proj": 3.5}},
    "both, rank-stabilized": {
        "use_rslora": True,
        "rank_pattern": {"layers.2.self_attn.o_proj": 9},
        "alpha_pattern": {"o_proj": 3, "mlp.down_proj": 11},
    },
}


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_logits_of_peft(pattern, case, rng, tmp_path):
    tiny.write(case, tmp_path / "out" / "base", 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "base", dtype=torch.float32, attn_implementation="eager"
    )
    targets = ["o_proj", "down_proj"] + ["qkv_proj"] * (case == "phi3")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, **PATTERNS[pattern]
    )
    model = peft.get_peft_model(model, settings).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=rng) / 8
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    said = json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"}
    path.write_text(json.dumps(said))
    ids = torch.randint(3, tiny.VOCAB, (2, 20), generator=rng)
    checkpoint = open_checkpoint(tmp_path / "out")
    ours = ReferenceRuntime.load(checkpoint, checkpoint.config)
    found = ours.forward(ids, ours.new_cache(2), logits="all")
    plain = ReferenceRuntime.load(checkpoint.base, checkpoint.config)
    assert (found - plain.forward(ids, plain.new_cache(2), logits="all")).abs().max() > 0.01
    assert_close(case, found, model(ids, use_cache=False).logits, 1e-4)
