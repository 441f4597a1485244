"""The student: transformers' model of a pruned directory, and which of its weights learn."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import FAMILIES, MLP
from engine.checkpoint import open_checkpoint
from engine.checkpoint.adapter import PREFIX
from engine.errors import InputError
from engine.healing.randomness import own_randomness
from engine.healing.settings import Settings, find_cuts
from engine.kernels.dtypes import dtype_of


class Student:
    """A model in `settings.precision`; `learning`: float32 weights that are trained, by name.

    Where the model has 16 bits these are copies: a step is smaller than what bfloat16 tells apart.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, settings: Settings, device: torch.device | str
    ) -> None:
        """`config`: of the layers that `directory` holds, under their original numbers."""
        self.directory, self.vocab_size = directory, config.vocab_size
        self.model = _load(directory, dtype_of(settings.precision)).to(device)
        self.streams: list[torch.Tensor] = []
        if settings.residual:
            self._watch(config)
        self.adapted = settings.train == "lora"
        if self.adapted:
            self.model = _adapt(self.model, config, settings)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(learns(name, config, settings.train))
        named = self.model.named_parameters()
        self.own = {name: weight for name, weight in named if weight.requires_grad}
        given = {} if self.adapted else _read(directory, self.own)
        self.learning = {
            name: weight if weight.dtype == torch.float32 else given[name].to(device)
            for name, weight in self.own.items()
        }

    def _watch(self, config: ModelConfig) -> None:
        """Keeps in `streams` what comes to the end of every cut, (B, W, D), of the last call."""
        norm = FAMILIES[config.family].final_norm
        layers = self.model.get_submodule(norm.rpartition(".")[0]).layers

        def enters(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.streams.append(given[0] if given else named["hidden_states"])

        for cut in find_cuts(config):
            slot = sum(entry.layer < cut.start for entry in config.layers)
            module = layers[slot] if slot < len(layers) else self.model.get_submodule(norm)
            module.register_forward_pre_hook(enters, with_kwargs=True)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, W) -> (B, W, V)."""
        self.streams.clear()
        device = next(iter(self.own.values())).device
        found: torch.Tensor = self.model(tokens.to(device), use_cache=False).logits
        return found

    def collect(self) -> None:
        """Takes the model's gradients over to `learning`."""
        for name, weight in self.own.items():
            if weight is not self.learning[name] and weight.grad is not None:
                self.learning[name].grad, weight.grad = weight.grad.float(), None

    @torch.no_grad()
    def refresh(self) -> None:
        """Gives the model what `learning` holds."""
        for name, weight in self.own.items():
            if weight is not self.learning[name]:
                weight.copy_(self.learning[name])

    @torch.no_grad()
    def take(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self.learning[name].copy_(weight)
        self.refresh()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What has learnt, under the names of the directory; adapters within their matrices."""
        if not self.adapted:
            return {name: weight.detach().cpu() for name, weight in self.learning.items()}
        adapted = {
            f"{name.removeprefix(PREFIX)}.weight": module
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A")
        }
        return {
            name: weight + adapted[name].get_delta_weight("default").detach().cpu()
            for name, weight in _read(self.directory, adapted).items()
        }


def _read(directory: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors of a directory as they are stored, in memory of their own."""
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name).clone() for name in names}


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


def targets(config: ModelConfig) -> list[str]:
    """Last names of the modules that LoRA adapts: those of the feed-forward part, as in the paper
    (Gromov et al., 2403.17887)."""
    names = FAMILIES[config.family].names
    return [names[role].rpartition(".")[2] for role in MLP if role in names]


def _load(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a stage prints nothing
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except Exception as error:  # a config may say what only transformers reads
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory / 'config.json'}: transformers does not open it: {reason:.300}"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval()  # no dropout: the teacher has none either


def check_peft() -> None:
    """InputError where there is none, before anything is written."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("train: lora needs peft: pip install 'peft>=0.19'") from None


def adapted(model: Any, lora: Any) -> Any:
    """peft's model over transformers' own, with the adapters of a `LoraConfig`."""
    import peft

    with warnings.catch_warnings():  # peft asks transformers by names that are on their way out
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, lora)


def _adapt(model: Any, config: ModelConfig, settings: Settings) -> Any:
    import peft

    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        target_modules=targets(config),
        task_type="CAUSAL_LM",
    )
    with own_randomness():
        torch.manual_seed(settings.seed)
        return adapted(model, lora)
