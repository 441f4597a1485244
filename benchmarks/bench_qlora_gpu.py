"""Measures 20 steps of QLoRA on the 4-bit kernels beside peft on the same weights in bfloat16.

Run by gpu.sh; writes benchmarks/results/<gpu>-qlora.json. Tokens a second are of steps alone: the
first, which compiles, and the last, behind which held-out text is judged, are not timed. `--small
--device cpu` tries the script.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu import gpu_name, output, save

from engine.checkpoint import open_checkpoint
from engine.commands.output import refuse
from engine.errors import InputError
from engine.export.hf import prune
from engine.healing.data import Data
from engine.healing.qlora import adapted_model, targets
from engine.healing.settings import Settings
from engine.healing.trainer import teach
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe

STEPS = 20
SIZES: dict[str, Any] = {  # a fifth of a billion weights in layers: what matters is their products
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
SMALL = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LINE = "{name:10} {tok_s:9.0f} tokens/s, {gib:6.2f} GiB, loss {first:.4f} -> {last:.4f}"


def models(directory: Path, sizes: dict[str, Any]) -> tuple[Path, Path]:
    """(packed in NF4, the same values in bfloat16) of a random Llama."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory / "whole")
    (directory / "whole" / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(directory / "whole")
    recipe = Recipe("nf4", scheme="codebook", head=None)
    pack(checkpoint, checkpoint.config, directory / "packed", recipe)
    packed = open_checkpoint(directory / "packed")
    prune(packed, packed.config, directory / "dense", dtype=torch.bfloat16)
    return directory / "packed", directory / "dense"


def measure(name: str, model: Any, data: Data, settings: Settings, device: str) -> dict[str, Any]:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    ends: list[float] = []  # of steps; each has waited for its loss

    def report(done: int, total: int, note: str = "") -> None:
        ends.append(time.monotonic())

    with tempfile.TemporaryDirectory() as work:
        standing = teach(model, data, settings.of_qlora, Path(work), device, report)
    tok_s = (STEPS - 2) * settings.batch * settings.window / (ends[-2] - ends[0])
    gib = 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / (1 << 30)
    losses = standing.losses
    result = {"name": name, "tok_s": tok_s, "gib": gib, "losses": losses}
    print(LINE.format(first=losses[0], last=losses[-1], **result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>-qlora.json")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    try:
        gpu = "cpu" if asked.device == "cpu" else gpu_name()
        out = output(gpu, asked.out, "-qlora-small" if asked.small else "-qlora")
    except InputError as error:
        refuse(error)
    import peft
    import transformers

    window, batch = (32, 2) if asked.small else (2048, 16)
    settings = Settings(
        ("qlora",), steps=STEPS, rank=8, qlora_lr=1e-3, dropout=0.0, window=window,
        batch_tokens=window * batch, check_every=STEPS, precision="bfloat16",
    )  # fmt: skip
    record: dict[str, Any] = {
        "gpu": gpu,
        "torch": torch.__version__,
        "settings": settings.to_json(),
    }
    with tempfile.TemporaryDirectory() as directory:
        packed, dense = models(Path(directory), SMALL if asked.small else SIZES)
        windows = torch.randint(3, 32000, (batch + 1, window))
        data = Data(windows[:batch], windows[batch:])
        base = open_checkpoint(packed)
        ours = measure("W4Linear", adapted_model(base, settings), data, settings, asked.device)
        record["qlora"] = [ours]
        save(record, out)
        model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        lora = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.rank, lora_dropout=0.0,
            target_modules=targets(base.config), task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(settings.seed)
        theirs = measure("bfloat16", peft.get_peft_model(model, lora), data, settings, asked.device)
    record["qlora"].append(theirs)
    pairs = zip(ours["losses"], theirs["losses"], strict=True)
    worst = record["loss_difference"] = max(abs(one / two - 1) for one, two in pairs)
    if not worst <= 1e-2:
        raise AssertionError(f"losses differ by {worst:.2%}")
    save(record, out)
    print(out)


if __name__ == "__main__":
    main()
