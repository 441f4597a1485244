"""What a GPU runtime refuses, and what is chosen instead: one sentence each, without a GPU."""

from dataclasses import replace
from operator import index
from types import SimpleNamespace

import gguf
import pytest
import torch
import triton
from support import llama_files

from engine import api
from engine.benchmark import machine
from engine.benchmark.tables import remarks
from engine.checkpoint import open_checkpoint
from engine.checkpoint.adapter import AdaptedCheckpoint, Pair
from engine.errors import InputError
from engine.healing.qlora import check_gpu
from engine.kernels import dispatch
from engine.kernels.w4 import fused
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.runtime import check_backend, gpu_cache
from engine.runtime.gpu import KEPT_STEPS, GpuRuntime
from engine.runtime.gpu_cache import PAGE, Arena, GpuCache, within_memory
from engine.runtime.gpu_weights import check_memory

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def pretend(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


def test_an_old_gpu_is_named(monkeypatch):
    pretend(monkeypatch, (7, 5))
    assert dispatch.why_not("triton") == "Tesla T4 has compute capability 7.5, 8.0 is the least"
    assert api.choose_backend(None, CUDA) == "reference"
    pretend(monkeypatch, (8, 0))
    assert dispatch.why_not("triton") is None


def test_no_compiler_is_named(monkeypatch):
    pretend(monkeypatch, (8, 0))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "a C compiler, and there is none: install gcc" in dispatch.why_not("triton")


def test_a_reading_that_does_not_fit_is_none(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(machine, "gpu_read_gb_s", full)
    assert machine.ceiling_gb_s(CUDA, 1) is None
    record = SimpleNamespace(compare=(), ceiling_gb_s=None, device="cuda:0")
    assert remarks(record) == ["no ceiling: cuda:0 has no room for what would be read"]


def test_what_qlora_cannot_do_on_a_gpu():
    check_gpu(CUDA, "bfloat16")
    check_gpu(torch.device("cuda:0"), "bfloat16")
    check_gpu(CPU, "float32")
    with pytest.raises(InputError, match="precision: 4-bit matrices on a GPU meet bfloat16"):
        check_gpu(CUDA, "float32")
    with pytest.raises(InputError, match="choose it by CUDA_VISIBLE_DEVICES=1"):
        check_gpu(torch.device("cuda:1"), "bfloat16")


def test_an_old_driver_is_named(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 9000).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert "driver is too old" in dispatch.why_not("triton")
    with pytest.raises(dispatch.BackendUnavailable, match="backend triton: the NVIDIA driver is"):
        check_backend("triton", None)
    with pytest.raises(InputError, match="device: cuda was asked for, but the NVIDIA driver is"):
        api.choose_device("cuda")


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert api.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="device: cuda:2 was asked for, but the last is cuda:1"):
        api.choose_device("cuda:2")


def test_the_default_on_a_gpu(monkeypatch):
    pretend(monkeypatch, (9, 0))
    assert api.choose_backend(None, CUDA) == "triton"
    assert api.choose_backend(None, CUDA, "bfloat16") == "triton"
    assert api.choose_backend(None, CUDA, "float32") == "reference"
    assert api.choose_backend("triton", CUDA, torch.float16) == "triton"
    with pytest.raises(InputError, match="backend: triton does not run on cpu"):
        api.choose_backend("triton", CPU)
    with pytest.raises(InputError, match="backend: cpu does not run on cuda"):
        api.choose_backend("cpu", CUDA)
    with pytest.raises(InputError, match="cuda has float16 and bfloat16, found float32"):
        check_backend("cuda", "float32")


def test_too_little_memory_says_what_fits(source):
    checkpoint = source("llama")
    config, stored = checkpoint.config, checkpoint.nbytes
    outer = (2 * config.vocab_size + 1) * config.hidden_size * 2  # embedding, head, norm
    layer = sum(stored(n) for n in checkpoint.names() if n.startswith("model.layers.0.")) // 2
    check_memory(checkpoint, config, outer + 4 * layer, "cuda:0")
    with pytest.raises(InputError, match=r"4 layers take .* GB free: 3 layers would fit"):
        check_memory(checkpoint, config, outer + 4 * layer - 1, "cuda:0")
    with pytest.raises(InputError, match="not one layer would fit"):
        check_memory(checkpoint, config, outer, "cuda:0")


def test_too_little_memory_is_less_than_is_placed(tmp_path):
    """Blocks of five bits become codes of 8, those of a packed directory too, and what an adapter
    adds to floats of 16."""

    def quantize(fields, tensors):
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": []}
        for name, kind in (("ffn_up", "Q5_1"), ("ffn_down", "Q5_0"), ("attn_v", "Q4_0")):
            kind, name = gguf.GGMLQuantizationType[kind], f"blk.0.{name}.weight"
            tensors[name] = gguf.quants.quantize(tensors[name], kind), kind

    llama_files.write_tiny(tmp_path / "model.gguf", quantize)
    blocks = open_checkpoint(tmp_path / "model.gguf")
    config = blocks.config
    pack(blocks, config, tmp_path / "packed", Recipe("rtn", group=16))
    pair = Pair(torch.zeros(2, config.ffn_size), torch.zeros(config.hidden_size, 2))
    adapted = AdaptedCheckpoint(blocks, {"model.layers.0.mlp.down_proj": pair}, 1.0)
    for checkpoint in (blocks, open_checkpoint(tmp_path / "packed"), adapted):
        gpu = GpuRuntime.load(checkpoint, config, CPU, torch.float16)
        norms = sum(t.nbytes for held in (gpu.outer, *gpu.layers) for t in held.norms.values())
        placed = gpu.weight_bytes - norms // 2  # of 32 bits, and counted as 16
        check_memory(checkpoint, config, placed, "cuda:0")
        with pytest.raises(InputError, match="GB free"):
            check_memory(checkpoint, config, placed - 1, "cuda:0")


def test_memory_that_torch_keeps_is_free(monkeypatch):
    """Of a model that was closed."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    assert gpu_cache.free_bytes(CUDA) == 14


def test_pages_beyond_memory_leave_the_cache_as_it_was(source, monkeypatch):
    """What is asked for is tried without the reserve, and what would fit is said."""
    config = source("llama").config
    arena = Arena(config, CPU, torch.float16)
    cache, new_zeros = GpuCache(config, 2, arena), torch.Tensor.new_zeros
    cache.reserve(4 * PAGE)
    held, most = cache.table.clone(), 10

    def bounded(tensor, shape, **options):
        if shape[0] > most:
            raise torch.OutOfMemoryError
        return new_zeros(tensor, shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", bounded)
    monkeypatch.setattr(gpu_cache, "free_bytes", lambda device: most * arena.page_bytes)
    with pytest.raises(InputError, match=r"768 positions need .*: 640 positions of .* would fit"):
        cache.reserve(6 * PAGE)
    assert torch.equal(cache.table, held)
    cache.reserve(5 * PAGE)
    assert len(arena.store) == most and torch.equal(cache.table[:, :4], held)


def test_too_little_memory_anywhere_is_a_sentence():
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB."
    with pytest.raises(InputError, match=r"^a step of 8 .* free \(2.00 GiB at once"):
        with within_memory("a step of 8 sequences", CUDA):
            raise torch.OutOfMemoryError(said)
    with pytest.raises(InputError, match=r"^a step of 8 .* has free: fewer"):
        with within_memory("a step of 8 sequences", CUDA):
            raise RuntimeError("Triton Error [CUDA]: out of memory")
    with pytest.raises(RuntimeError, match="illegal"):
        with within_memory("a step of 8 sequences", CUDA):
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access")


def test_what_is_taken_back_is_cleared(source):
    """NaN of a token that was taken back is masked, but multiplied all the same."""
    config = source("llama").config
    arena = Arena(config, CPU, torch.bfloat16)
    cache = GpuCache(config, 2, arena)
    cache.reserve(4 * PAGE)
    arena.store.fill_(torch.nan)
    cache.lengths[:] = torch.tensor([[3 * PAGE + 5], [2 * PAGE]])
    lengths = [PAGE + 3, 2 * PAGE]
    cache.truncate(lengths)
    for row, (length, was) in enumerate(zip(lengths, (4 * PAGE, 2 * PAGE), strict=True)):
        held = arena.store[cache.table[row].long()].transpose(0, 3).flatten(3, 4)
        assert held[:, :, :, :length].isnan().all()
        assert not held[:, :, :, length:was].any()
    cache.truncate(0)
    assert not arena.store[cache.table[:, 0].long()].any()


def test_a_gpu_without_a_number_is_the_present_one(monkeypatch):
    class Utils:
        @staticmethod
        def get_device_properties(number):
            return {"multiprocessor_count": 100 + index(number), "max_shared_mem": 1 << 17}

    driver = type("Driver", (), {"utils": Utils})
    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device, cores in ((CUDA, 103), (torch.device("cuda:1"), 101)):
        fused.limits.cache_clear()
        assert fused.limits(device) == (cores, 1 << 17)
    fused.limits.cache_clear()


def test_wide_heads_are_refused(source):
    checkpoint = source("llama")
    wide = replace(checkpoint.config, head_dim=320)
    with pytest.raises(InputError, match="head_dim: the backend triton has heads of at most 256"):
        GpuRuntime.load(checkpoint, wide, CPU, torch.bfloat16)


def test_pages_come_back(source):
    config = source("llama").config
    arena = Arena(config, CPU, torch.float16)
    first, second = GpuCache(config, 1, arena), GpuCache(config, 2, arena)
    first.reserve(PAGE + 1)
    second.reserve(PAGE)
    pages = {*first.table.flatten().tolist(), *second.table.flatten().tolist()}
    assert len(pages) == 4 and first.nbytes == second.nbytes == 2 * arena.page_bytes
    arena.store.fill_(torch.nan)
    del first
    third = GpuCache(config, 2, arena)
    third.reserve(1)
    assert len(arena.store) == 4 and set(third.table.flatten().tolist()) < pages
    assert arena.store[third.table.flatten().long()].isfinite().all()


def test_the_gpu_that_is_asked_for_is_looked_at(monkeypatch):
    """Not the present one, where a machine has two kinds."""
    of = {None: (9, 0), torch.device("cuda:0"): (9, 0), torch.device("cuda:1"): (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: of[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert dispatch.no_gpu() is None and dispatch.no_gpu(torch.device("cuda:0")) is None
    words = "GPU cuda:1 has compute capability 7.5, 8.0 is the least"
    assert dispatch.no_gpu(torch.device("cuda:1")) == words
    with pytest.raises(dispatch.BackendUnavailable, match=words):
        api.choose_backend("triton", torch.device("cuda:1"))


def test_steps_of_many_slot_sets_are_not_all_kept():
    runtime = GpuRuntime.__new__(GpuRuntime)
    runtime.device, runtime._steps, built = torch.device("cpu"), {}, []
    runtime._build = lambda bucket, slots: built.append(slots) or object()
    for slot in range(5 * KEPT_STEPS):
        assert runtime._step_of(1, (slot,)) is not runtime._step_of(1, (-1,))
        assert len(runtime._steps) <= KEPT_STEPS
    assert built.count((-1,)) == 1 and len(built) == 5 * KEPT_STEPS + 1
