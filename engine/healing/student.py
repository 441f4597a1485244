"""The student: transformers' model of a pruned directory, and which of its weights learn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import FAMILIES
from engine.errors import InputError
from engine.healing.settings import Settings, find_cuts

FFN = ("gate", "up", "gate_up", "down")  # roles that LoRA adapts, as the paper does


class Student:
    """A float32 model; `learning` are the parameters that are trained, by name."""

    def __init__(
        self, directory: Path, config: ModelConfig, settings: Settings, device: torch.device | str
    ) -> None:
        """`config`: of the layers that `directory` holds, under their original numbers."""
        self.model = _load(directory).to(device)
        self.adapted = settings.train == "lora"
        if self.adapted:
            self.model = _adapt(self.model, config, settings)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(learns(name, config, settings.train))
        named = self.model.named_parameters()
        self.learning = {name: weight for name, weight in named if weight.requires_grad}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, W) -> (B, W, V) float32."""
        device = next(iter(self.learning.values())).device
        found: torch.Tensor = self.model(tokens.to(device), use_cache=False).logits
        return found

    @torch.no_grad()
    def take(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self.learning[name].copy_(weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights under the names of the directory; adapters become part of their matrices."""
        model = self.model.merge_and_unload() if self.adapted else self.model
        return {name: weight.detach().cpu() for name, weight in model.state_dict().items()}


def learns(name: str, config: ModelConfig, train: str) -> bool:
    """Is this parameter of the student trained?"""
    if train == "lora":
        return "lora_" in name
    if train == "norms":
        return "norm" in name
    if train == "all" or ".layers." not in name:
        return train == "all" or "norm" not in name  # around: the embedding and the head
    slot = int(name.partition(".layers.")[2].partition(".")[0])
    layer = config.layers[slot].layer
    return any(layer in (cut.start - 1, cut.stop) for cut in find_cuts(config))


def _load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a stage prints nothing
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval()  # no dropout: the teacher has none either


def _adapt(model: Any, config: ModelConfig, settings: Settings) -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("train: lora needs peft: pip install 'shallow[heal]'") from None
    names = FAMILIES[config.family].names
    targets = [names[role].rpartition(".")[2] for role in FFN if role in names]
    adapters = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return peft.get_peft_model(model, adapters)
