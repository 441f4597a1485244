"""QLoRA (Dettmers et al., 2305.14314): adapters learn by the language-model loss on a 4-bit base.

The base is a packed directory; transformers' model stands over it with a `W4Linear` in the place of
every quantized matrix, peft's LoRA on the feed-forward ones, and transformers' Trainer teaches it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.adapter import PREFIX, Pair
from engine.errors import InputError
from engine.healing import processes, state
from engine.healing.assemble import assemble
from engine.healing.data import Data
from engine.healing.randomness import own_randomness
from engine.healing.settings import Settings
from engine.healing.student import adapted, targets
from engine.kernels.dtypes import dtype_of
from engine.kernels.w4.embedding import W4Embedding
from engine.kernels.w4.format import Packed
from engine.kernels.w4.linear import W4Linear
from engine.kernels.w4.lora import adapt
from engine.progress import Report


def qlora(
    base: Path,
    data: Data,
    settings: Settings,
    directory: Path,
    device: torch.device | str = "cpu",
    report: Report | None = None,
    backend: str | None = None,
) -> tuple[state.Standing, dict[str, Pair]]:
    """The adapters of the best check by the model's modules, and how the training went.

    `base` is a packed directory. `directory` holds what a killed run is taken up from, to the same
    bits where `steps` end it. `backend` is that of the 4-bit products, the best for training on the
    device if not given. InputError where the disk is full: what was saved last stays.
    """
    from engine.healing.trainer import teach

    if backend is None and torch.device(device).type == "cpu":
        backend = "dense"  # as fast as our kernel in float32, 2.4 times in bfloat16 with AVX-512
    with own_randomness():
        model = adapted_model(open_checkpoint(base), settings, backend)
        standing = teach(model, data, settings.of_qlora, directory, device, report)
    return standing, pairs(model)


def check_installed() -> None:
    """InputError without peft, or accelerate, which transformers' Trainer needs."""
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ImportError:
        raise InputError(
            "method: qlora needs peft and accelerate: pip install 'peft>=0.19' 'accelerate>=1.4'"
        ) from None


def adapted_model(base: Checkpoint, settings: Settings, backend: str | None = None) -> Any:
    """peft's model over the base: float32 adapters, all else frozen in `settings.precision`."""
    import peft

    dtype = dtype_of(settings.precision)

    def linear(name: str, packed: Packed, bias: nn.Parameter | None) -> W4Linear:
        return W4Linear.from_packed(packed, bias, backend=backend, exact=True)

    def embedding(matrix: W4Linear, factor: float) -> W4Embedding:
        return W4Embedding(matrix.packed, factor, dtype)

    model = assemble(base, base.config, linear, embedding, dtype)
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets(base.config),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    return adapted(model, adapt(lora))


def pairs(model: Any) -> dict[str, Pair]:
    """A and B, float32 on the CPU, by the module of the model that peft was given."""
    return {
        name.removeprefix(PREFIX): Pair(*(
            half["default"].weight.detach().float().cpu() for half in (module.lora_A, module.lora_B)
        ))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }  # fmt: skip


def check_gpu(device: torch.device, precision: str) -> None:
    """InputError for what a base in 4 bits, or transformers' Trainer, cannot do on a GPU."""
    if device.type == "cuda" and precision == "float32":
        raise InputError(
            "precision: 4-bit matrices on a GPU meet bfloat16, which qlora needs there, found "
            "float32"
        )
    if device.type == "cuda" and device.index and processes.count() == 1:
        raise InputError(
            f"device: qlora trains on the first GPU that it sees, found {device}; choose it by "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
