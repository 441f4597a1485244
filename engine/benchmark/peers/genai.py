"""OpenVINO GenAI, which reads GGUF files and keeps their 4 bits."""

from importlib import import_module
from time import perf_counter_ns
from typing import Any


class Engine:
    """A model on the CPU with the plug-in's defaults: 8-bit keys, values and activations."""

    def __init__(self, model: str, threads: int, setting: dict[str, Any], **_: Any) -> None:
        """`setting`: "attention" by the stateful model ("SDPA") or in pages ("PA")."""
        self._genai, self._openvino = import_module("openvino_genai"), import_module("openvino")
        self.version = self._genai.__version__.partition("-")[0]
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if setting.get("attention") == "PA":
            scheduler = self._genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False  # or a prompt seen before costs nothing
            scheduler.cache_size = 1
            options["scheduler_config"] = scheduler
        else:
            options["ATTENTION_BACKEND"] = "SDPA"
        self._pipeline = self._genai.LLMPipeline(model, "CPU", **options)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        import numpy as np

        (prompt,) = prompts
        running, times = self._genai.StreamingStatus.RUNNING, []

        streamer: Any = self._genai.StreamerBase

        class Clock(streamer):
            def write(self, token):
                times.append(perf_counter_ns())
                return running

            def end(self):
                pass

        ids = self._openvino.Tensor(np.array([prompt], dtype=np.int64))
        start = perf_counter_ns()
        result = self._pipeline.generate(
            ids, max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, streamer=Clock()
        )
        steps = [b - a for a, b in zip(times, times[1:], strict=False)]
        return {"ids": result.tokens, "prefill_ns": times[0] - start, "step_ns": steps}
