"""The list of launches of a decode step at real shapes, on meta tensors: counts and bytes."""

import ctypes
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from roofline import GPUS, MODELS, step, step_us
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from engine.kernels import native
from engine.kernels.layer import cuda as layer_cuda
from engine.kernels.w4 import cuda as w4_cuda
from engine.runtime import GPU_RUNTIMES, gpu_step
from engine.runtime.gpu_step import StepList, split_count
from engine.runtime.gpu_weights import Part, stacked

LLAMA = MODELS["Llama-3-8B"]


@pytest.mark.parametrize("backend", GPU_RUNTIMES)
@pytest.mark.parametrize("family", ["sequential", "post norm", "parallel"])
def test_five_launches_a_layer(family, backend):
    config = replace(LLAMA, post_norm=family == "post norm", parallel=family == "parallel")
    names = [launch.name for launch in step(config, slots=[0, 5], backend=backend).launches]
    layers = ["qkv", "attention", "o", "gate_up", "down"] * 2
    assert names == ["embedding", *layers, "head", "choice"]
    assert len(step(config, backend=backend).launches) == 5 * 32 + 3


def test_what_cannot_be_stacked_takes_a_launch_each():
    names = [launch.name for launch in step(LLAMA, slots=[0], stacked=False).launches]
    assert names[1:-2] == ["qkv"] * 3 + ["attention", "o", "gate", "up", "down"]


def test_what_has_a_bias_is_not_stacked_on_what_has_none():
    plain, biased = Part(torch.zeros(2, 4)), Part(torch.zeros(3, 4), torch.arange(3))
    found = stacked([plain, plain, biased, biased, plain])
    assert [len(part.matrix) for part in found] == [4, 6, 2]
    assert found[1].bias.tolist() == [0, 1, 2, 0, 1, 2] and found[0].bias is found[2].bias is None


@pytest.mark.parametrize("backend", GPU_RUNTIMES)
@pytest.mark.parametrize("batch", [1, 8])
def test_bytes_are_those_of_weights_and_cache(batch, backend):
    """Of Llama-3-8B; half the layers, half of what layers add."""

    def packed(n: int, k: int) -> float:
        return n * k / 2 + n * k / 128 * 2

    context, f, d = 2048, LLAMA.ffn_size, LLAMA.hidden_size
    one = packed(6144, d) + packed(d, d) + packed(2 * f, d) + packed(d, f)
    one += batch * 2 * 8 * 128 * 2 * context
    whole = 32 * one + packed(LLAMA.vocab_size, d)

    def read(launches: StepList) -> int:
        return sum(each.reads(context) - each.x for each in launches.launches)

    every, other = step(LLAMA, batch, backend=backend), range(0, 32, 2)
    found, half = read(every), read(step(LLAMA, batch, other, backend=backend))
    assert found == pytest.approx(whole, rel=0.01)
    assert found - half == pytest.approx(16 * one, rel=0.01)


@pytest.mark.parametrize("backend", GPU_RUNTIMES)
@pytest.mark.parametrize("name", ["Llama-3-8B", "Llama-2-70B"])
def test_x_is_read_again_for_few_rows_of_weights(name, backend):
    """By 8 rows of it, beside which sums in parts move less than a third of the weights."""
    launches = [each for each in step(MODELS[name], 8, backend=backend).launches if each.weights]
    weights = sum(each.weights for each in launches)
    products = [each for each in launches if each.parts]
    assert len(products) == len(launches) - 1  # all but the embedding
    assert sum(each.x for each in products) <= 0.1 * weights
    assert sum(each.parts for each in products) <= 0.33 * weights


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("backend", GPU_RUNTIMES)
def test_kernels_overlap_where_asked_to(backend, overlaps):
    launches = step(LLAMA, slots=[0], backend=backend, overlaps=overlaps).launches
    ours = [launch for launch in launches if not isinstance(launch.kernel, JITFunction)]
    assert len(ours) == (6 if backend == "cuda" else 0)
    assert all(launch.arguments[0].overlap == overlaps for launch in ours)
    for launch in launches:
        if launch not in ours:
            assert launch.options.get("OVERLAP", False) == overlaps
            assert launch.options.get("launch_pdl", False) == overlaps


def test_a_window_bounds_what_is_read():
    config = replace(LLAMA, layers=tuple(replace(entry, window=512) for entry in LLAMA.layers))
    wide, narrow = step(LLAMA, slots=[0]), step(config, slots=[0])
    attention = wide.launches[2], narrow.launches[2]
    assert attention[0].reads(2048) - attention[1].reads(2048) == 2 * 8 * 128 * 2 * (2048 - 512)


def test_a_step_neither_allocates_nor_waits(monkeypatch):
    """Nothing but launches: no operation of torch's, on the device or off it."""

    class Refused(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            raise AssertionError(f"{function} inside a step")

    ran = []
    monkeypatch.setattr(gpu_step.Launch, "__call__", lambda launch: ran.append(launch.name))
    launches = step(LLAMA, slots=[3])
    with Refused():
        launches.run()
    assert ran == [launch.name for launch in launches.launches]


def test_a_step_runs_on_the_device_of_its_model(monkeypatch):
    """Triton launches on the current device, which may be another."""
    current = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.clear()

    launches, ran = step(LLAMA, slots=[3]), []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(gpu_step.Launch, "__call__", lambda launch: ran.extend(current))
    launches.run()
    assert len(ran) == len(launches.launches) and all(each is launches.store for each in ran)


def test_a_capture_leaves_no_trace(monkeypatch):
    """Each kernel runs once before it, for nobody; what was to run is what is replayed."""
    launches, device, seen = step(LLAMA, slots=[3]), torch.device("cuda:1"), []
    inputs = launches.buffers.inputs = torch.ones(5, 1, dtype=torch.int32)
    launches.store = SimpleNamespace(device=device)

    @contextmanager
    def graph(_, stream):
        seen.append(("capture", stream))
        yield
        seen.append("end")

    class Graph:
        def replay(self):
            seen.append(("replay", bool(inputs.all())))

    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(("wait", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(
        gpu_step.Launch, "__call__", lambda launch: seen.append((launch.name, bool(inputs.any())))
    )
    launches.run()
    launches.run()
    each = [(launch.name, False) for launch in launches.launches]
    captured = [*each, ("wait", device), ("capture", device), *each, "end"]
    assert seen == [*captured, ("replay", True), ("replay", True)]


@pytest.mark.parametrize(
    ("module", "name"), [(w4_cuda, "w4_matmul"), (layer_cuda, "decode_attention")]
)
def test_cuda_kernels_run_on_their_device(monkeypatch, module, name):
    """And on its stream, while another device is the present one."""
    device, present, ran, call = torch.device("cuda:1"), [torch.device("cuda:0")], [], module.Call()

    @contextmanager
    def on(chosen):
        present.append(chosen)
        yield
        present.pop()

    def stream_of(chosen=None):
        return SimpleNamespace(cuda_stream=f"stream of {chosen or present[-1]}")

    extension = SimpleNamespace(**{name: lambda *given: ran.append((*given, present[-1]))})
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", stream_of)
    monkeypatch.setattr(native, "load", lambda _: extension)
    module.launch(call, device)
    assert ran == [(ctypes.addressof(call), "stream of cuda:1", device)]


def test_programs_that_share_a_context_keep_a_gpu_busy():
    """Two a multiprocessor, as many as the kernels take at most."""
    found = [split_count(batch, 8, 132) for batch in (1, 2, 4, 8, 16, 32)]
    assert found == [32, 16, 8, 4, 2, 1] and split_count(32, 32, 132) == 1


def test_a_roofline_orders_gpus_and_halves():
    whole, half = step(LLAMA), step(LLAMA, slots=range(16))
    times = [step_us(whole, gpu, 2048) for gpu in GPUS.values()]
    assert times[2] < times[1] < times[0] < times[3]
    assert 1.7 < times[1] / step_us(half, GPUS["H100 SXM"], 2048) < 2
