"""transformers' own `generate`, with the same layers dropped."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any


class Engine:
    """A directory or a GGUF file, which transformers unpacks to `dtype`."""

    def __init__(
        self,
        model: str,
        threads: int,
        layers: Sequence[int],
        device: str,
        dtype: str,
        setting: dict[str, Any],
        **_: Any,
    ) -> None:
        """`layers` are the kept ones. `setting`: another "dtype"."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.version, self._torch, self._device = transformers.__version__, torch, device
        path = Path(model)
        place: dict[str, Any] = {"pretrained_model_name_or_path": path}
        if path.is_file():
            place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        dtype = getattr(torch, setting.get("dtype", dtype))
        load = transformers.AutoModelForCausalLM.from_pretrained
        loaded: Any = load(**place, dtype=dtype, local_files_only=True, trust_remote_code=False)
        self._model = loaded.to(device).eval()
        keep_layers(self._model, layers)
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        torch = self._torch
        prompt = torch.tensor(prompts, device=self._device)
        unfinished = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)
        times: list[int] = []

        def clock(*_: Any, **__: Any):
            if self._model.device.type == "cuda":
                torch.cuda.synchronize(self._model.device)
            times.append(perf_counter_ns())
            return unfinished

        start = perf_counter_ns()
        ids = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            stopping_criteria=[clock],
        )
        steps = [b - a for a, b in zip(times, times[1:], strict=False)]
        ids = ids[:, prompt.shape[1] :].tolist()
        return {"ids": ids, "prefill_ns": times[0] - start, "step_ns": steps}


def keep_layers(model: Any, layers: Sequence[int]) -> None:
    """Leaves a transformers decoder only these layers, renumbered for its KV cache."""
    decoder, config = model.base_model, model.config
    if len(layers) == len(decoder.layers):
        return
    decoder.layers = type(decoder.layers)(decoder.layers[layer] for layer in layers)
    for slot, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = slot
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
