"""llama.cpp and ik_llama.cpp through the C functions that their Python packages bind."""

import ctypes
import os
from importlib import import_module
from time import perf_counter_ns
from typing import Any

UBATCH = 512  # tokens of one pass, both engines' default


class Engine:
    """A GGUF model in a context of float16 keys and values; a prompt is one call."""

    def __init__(
        self, name: str, model: str, threads: int, context: int, setting: dict[str, Any], **_: Any
    ) -> None:
        """`setting`: llama.cpp's "flash" (attention), ik's "repack" (weights, at run time)."""
        self._ik = name == "ik"
        package = import_module("ik_llama_cpp" if self._ik else "llama_cpp")
        api = import_module("ik_llama_cpp._ctypes_api") if self._ik else package
        self.version, self._api, self._path = package.__version__, api, model
        api.llama_backend_init()
        described = (api._lib if self._ik else api).llama_print_system_info
        described.restype = ctypes.c_char_p
        self.wide = b"AVX512 = 1" in described()
        options = api.llama_model_default_params()
        if self._ik:
            options.repack_tensors = setting.get("repack", False)
        self._model = api.llama_model_load_from_file(os.fsencode(model), options)
        if not self._model:
            raise ValueError(f"{model} does not load")
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_ubatch = min(UBATCH, context)
        options.n_threads = options.n_threads_batch = threads
        if self._ik:
            options.flash_attn = setting.get("flash", True)
        else:
            options.flash_attn_type = int(setting.get("flash", True))
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            raise ValueError(f"no context of {context} tokens")
        self._batch = api.llama_batch_init(context, 0, 1)
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        (prompt,) = prompts
        self._clear()
        self._fill(prompt, 0)
        ids: list[int] = []
        times = [perf_counter_ns()]
        while True:
            self._decode()
            ids.append(int(self._logits(self._batch.n_tokens - 1).argmax()))
            times.append(perf_counter_ns())
            if len(ids) == new_tokens:
                break
            self._fill(ids[-1:], len(prompt) + len(ids) - 1)
        steps = [b - a for a, b in zip(times, times[1:], strict=False)]
        return {"ids": [ids], "prefill_ns": steps[0], "step_ns": steps[1:]}

    def nll(self, ids: list[int]) -> dict[str, float]:
        """Of ids[1:], nats; in float64."""
        import numpy as np

        self._clear()
        self._fill(ids[:-1], 0, every=True)
        self._decode()
        total = 0.0
        for at, following in enumerate(ids[1:]):
            logits = self._logits(at).astype(np.float64)
            peak = logits.max()
            total += float(peak + np.log(np.exp(logits - peak).sum()) - logits[following])
        return {"nll": total}

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        """llama.cpp's own ids of every text, with what it puts around one."""
        vocab = self._api.llama_model_get_vocab(self._model)
        return {"ids": [self._ids(vocab, text.encode()) for text in texts]}

    def _ids(self, vocab: Any, text: bytes) -> list[int]:
        found = (self._api.llama_token * (len(text) + 8))()
        count = self._api.llama_tokenize(vocab, text, len(text), found, len(found), True, True)
        return list(found[:count])

    def quantize(self, path: str, kind: str) -> dict[str, Any]:
        """Writes the model anew with its matrices as `kind`, whatever they were."""
        api = self._api
        options = api.llama_model_quantize_default_params()
        options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
        options.allow_requantize = True
        if api.llama_model_quantize(os.fsencode(self._path), os.fsencode(path), options):
            raise ValueError(f"{path} could not be written as {kind}")
        return {}

    def _clear(self) -> None:
        if self._ik:
            self._api.llama_kv_cache_clear(self._context)
        else:
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _fill(self, ids: list[int], start: int, every: bool = False) -> None:
        """The batch holds ids from position `start`; logits of the last or of `every` one."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at] = token, start + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = every or at + 1 == len(ids)

    def _decode(self) -> None:
        if status := self._api.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode gave {status}")

    def _logits(self, at: int):
        import numpy as np

        address = self._api.llama_get_logits_ith(self._context, at)
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self._vocab,))
