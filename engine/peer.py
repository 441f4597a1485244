"""transformers doing the same work, for `--compare transformers`."""

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from engine.errors import InputError
from engine.generation import Timings


class TransformersPeer:
    """Greedy decoding of the same ids by transformers' own `generate`, layers dropped alike."""

    name = "transformers"

    def __init__(
        self,
        path: Path,
        prompts: Sequence[Sequence[int]],
        layers: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`prompts` have equal lengths; `layers` are the kept ones."""
        try:
            import transformers
        except ImportError as error:
            raise InputError(
                f"--compare transformers: {error}; pip install transformers"
            ) from error
        self.version = transformers.__version__
        self._path, self._layers, self._dtype = path, layers, dtype
        self._ids = torch.tensor(prompts, device=device)

    @cached_property
    def _model(self):
        import transformers

        place = {"pretrained_model_name_or_path": self._path}
        if self._path.is_file():
            place = {
                "pretrained_model_name_or_path": self._path.parent,
                "gguf_file": self._path.name,
            }
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(**place, dtype=self._dtype, local_files_only=True).to(self._ids.device).eval()
        keep_layers(model, self._layers)
        model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        return model

    def generate(self, new_tokens: int) -> tuple[list[list[int]], Timings]:
        """Greedy ids (B, new_tokens), no stop token heeded, and the times of every step."""
        model, batch = self._model, len(self._ids)
        ends: list[int] = []

        def clock(ids: torch.Tensor, scores, **_) -> torch.Tensor:
            if ids.device.type == "cuda":
                torch.cuda.synchronize(ids.device)
            ends.append(time.perf_counter_ns())
            return torch.zeros(batch, dtype=torch.bool, device=ids.device)

        start = time.perf_counter_ns()
        ids = model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            max_new_tokens=new_tokens,
            stopping_criteria=[clock],
        )
        prefill_ms = (ends[0] - start) / 1e6
        steps = tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
        tokens = (batch,) * len(steps)
        timings = Timings(self._ids.numel(), prefill_ms, prefill_ms, steps, tokens)
        return ids[:, self._ids.shape[1] :].tolist(), timings


def keep_layers(model, layers: Sequence[int]) -> None:
    """Leaves a transformers decoder only these layers, renumbered for its KV cache."""
    decoder, config = model.base_model, model.config
    if len(layers) == len(decoder.layers):
        return
    decoder.layers = torch.nn.ModuleList(decoder.layers[layer] for layer in layers)
    for slot, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = slot
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
