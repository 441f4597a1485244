"""What QLoRA is held to: peft on the dequantised model, in a loop of its own."""

from pathlib import Path

import torch
from support.healing import WINDOW

from engine.checkpoint import open_checkpoint
from engine.export.hf import prune
from engine.healing.distil import rate
from engine.healing.qlora import targets
from engine.healing.settings import Settings
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe

SETTINGS = Settings(
    ("qlora",), steps=20, qlora_lr=1e-2, rank=4, window=WINDOW, batch_tokens=96, check_every=8,
    precision="float32",
)  # fmt: skip


def pack_base(checkpoint, config, out: Path) -> None:
    pack(checkpoint, config, out, Recipe("nf4", scheme="codebook", group=16, head=None))


def peers_losses(base: Path, data, settings: Settings, work: Path) -> list[float]:
    """One a step: peft's LoRA on float32 weights, AdamW, the same text, rate and dropout."""
    import peft
    import transformers

    packed = open_checkpoint(base)
    prune(packed, packed.config, work / "dequantised", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "dequantised")
    lora = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, lora_dropout=settings.dropout,
        target_modules=targets(packed.config), task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    model = peft.get_peft_model(model.float(), lora).train()
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, weight_decay=0.0)
    asked, losses = settings.of_qlora, []
    for step in range(settings.steps):
        torch.manual_seed((settings.seed * 1_000_003 + step) * 1009)
        windows = data.windows[data.batch(step, settings.batch, settings.seed)]
        loss = model(windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, settings.clip)
        optimizer.param_groups[0]["lr"] = rate((step + 0.5) / settings.steps, asked)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
