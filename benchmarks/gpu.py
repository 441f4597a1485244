"""Measures the GPU kernels and writes benchmarks/results/<gpu>.json. Run by gpu.sh."""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import MATRICES

from engine.commands.output import refuse
from engine.errors import InputError
from engine.kernels import native
from engine.kernels.w4.cuda import cores_of, describe, launch, matmul
from engine.kernels.w4.format import Packed, Spec, unpack
from engine.kernels.w4.launch import stripes
from engine.kernels.w4.layout_gpu import GpuMatrix, to_gpu
from engine.scratch import check_target, write_text

RESULTS = Path(__file__).parent / "results"
SHAPES = {"4096 x 4096": (4096, 4096), "8192 x 8192": (8192, 8192)}  # (N, K)
SHAPES |= {
    name: MATRICES[name]
    for name in (
        "SmolLM2-135M down",
        "Llama-3.2-1B qkv",
        "Llama-3-8B qkv",
        "Llama-3-8B gate and up",
        "Llama-3-8B down",
        "Llama-2-70B gate and up",
        "Llama-2-70B down",
    )
}
SPECS = {
    "symmetric g128": Spec(4, 128, "symmetric"),
    "zero g128": Spec(4, 128, "zero"),
    "minimum g32": Spec(4, 32, "minimum"),
    "kquant": Spec(4, 32, "kquant"),
    "nf4 g64": Spec(4, 64, "codebook", torch.float32),
    "symmetric 8 bits, row": Spec(8, 0, "symmetric"),
}
FLUSH_BYTES = 256 << 20  # weights cycle through more than any L2 holds
REPLAYS = 15
LINE = (
    "{shape:24} {spec:20} M={m} {us:8.2f} us {gb_s:6.0f} GB/s "
    "{share_of_copy:4.0%} of copy, {speedup:5.2f} x float16"
)


def gpu_name() -> str:
    """The GPU's name; InputError without one."""
    if not torch.cuda.is_available():
        raise InputError("torch finds no GPU")
    return torch.cuda.get_device_name()


def output(gpu: str, out: Path | None, kind: str = "") -> Path:
    """Where a record goes: `out`, else the GPU's own of that kind; InputError where it cannot."""
    out = out or RESULTS / f"{gpu.lower().replace(' ', '-')}{kind}.json"
    if out.suffix != ".json":  # another file of that name has the table
        raise InputError(f"{out}: expected a name that ends in .json")
    check_target(out)
    return out


def begin(about: str | None, kind: str = "") -> tuple[str, Path]:
    """(the GPU's name, where the record goes) of a script whose one option is `--out`; where there
    is neither, it ends with the reason."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/<gpu>{kind}.json")
    asked = parser.parse_args()
    try:
        gpu = gpu_name()
        return gpu, output(gpu, asked.out, kind)
    except InputError as error:
        refuse(error)


def save(record: dict[str, Any], out: Path) -> None:
    """After every case, so that what comes after cannot lose it."""
    write_text(out, json.dumps(record, indent=1) + "\n")


def random_weights(spec: Spec, n: int, k: int, device: str = "cuda") -> Packed:
    """(n, k), about unit RMS of w @ x for unit x; made on the device, since it may be large."""
    groups, levels, gpu = spec.groups(k), 1 << spec.bits, dict[str, Any](device=device)
    codes = torch.randint(0, 256, (n, spec.row_bytes(k)), dtype=torch.uint8, **gpu)
    step = (0.5 + torch.rand(n, groups, **gpu)) * 4 / levels * k**-0.5
    parts = {"scales": step.to(spec.scale_dtype)}
    if spec.scheme == "zero":
        parts["zeros"] = torch.randint(0, levels, (n, groups), dtype=torch.uint8, **gpu)
    elif spec.scheme == "minimum":
        parts["mins"] = (-step * levels / 2).to(spec.scale_dtype)
    elif spec.scheme == "codebook":
        parts["codebook"] = torch.linspace(-1, 1, 16, **gpu)
    elif spec.scheme == "kquant":
        sub = [torch.randint(0, 64, (n, groups), dtype=torch.uint8, **gpu) for _ in range(2)]
        supers = torch.rand(n, -(-k // 256), 2, **gpu) * k**-0.5 / 64
        parts = {"scales": sub[0], "mins": sub[1], "supers": supers.half()}
    return Packed(spec, (n, k), codes, **parts)


def time_us(calls: Sequence[Callable[[], object]]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of a call's microseconds, all of them in one CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    del kept
    fifths = statistics.quantiles(times, n=5)
    return statistics.median(times), fifths[0], fifths[3]


def prepared(
    x: torch.Tensor, weights: GpuMatrix, overlap: bool
) -> tuple[Callable[[], object], torch.Tensor]:
    """(a launch as a step's list holds it, the y that it writes, which is there before)."""
    (n, k), device = weights.shape, x.device
    y = torch.full((len(x), n), torch.nan, dtype=x.dtype, device=device)
    sizes = stripes(n, k, cores_of(device))
    parts = torch.empty(sizes.part_values(len(x)), device=device)
    counters = torch.zeros(sizes.tiles, dtype=torch.int32, device=device)
    call = describe(x, weights, y, sizes=sizes, parts=parts, counters=counters, overlap=overlap)
    return partial(launch, call, device), y


def check(case: str, y: torch.Tensor, expected: torch.Tensor) -> float:
    """Its RMS ratio: a wrong result has no speed."""
    ratio = float((y - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not ratio <= 2e-3:
        raise AssertionError(f"{case}: RMS ratio {ratio}")
    return ratio


def measure(name: str, label: str, m: int, copy_gb_s: float, overlaps: bool) -> dict:
    """One case: checked, then timed with and without overlap, beside torch's float16 matmul."""
    (n, k), spec = SHAPES[name], SPECS[label]
    packed = random_weights(spec, n, k)
    weights, x = to_gpu(packed), torch.randn(m, k, device="cuda").half()
    dense = unpack(packed).half()
    expected, y = x.float() @ unpack(packed).T, matmul(x, weights, out_dtype=torch.float32)
    case = f"{name}, {label}, M={m}"
    ratio = check(case, y, expected)
    copies = math.ceil(FLUSH_BYTES / weights.nbytes)
    cycle = [to_gpu(packed) for _ in range(copies)] * math.ceil(16 / copies)
    result: dict[str, Any] = {"shape": name, "n": n, "k": k, "m": m, "spec": label}
    result["rms_ratio"] = ratio
    for overlap in (False, True) if overlaps else (False,):
        launches = [prepared(x, w, overlap) for w in cycle]
        us, low, high = time_us([call for call, _ in launches])
        for _, y in launches:
            check(f"{case}, {overlap=}", y, expected)
        gb_s = (weights.nbytes + x.nbytes + 2 * m * n) / us / 1e3
        prefix = "overlapped_" if overlap else ""
        result |= {f"{prefix}us": us, f"{prefix}us_p20": low, f"{prefix}us_p80": high}
        result |= {f"{prefix}gb_s": gb_s, f"{prefix}share_of_copy": gb_s / copy_gb_s}
    copies = math.ceil(FLUSH_BYTES / dense.nbytes)
    dense_cycle = [dense.clone() for _ in range(copies)] * math.ceil(16 / copies)
    us = time_us([partial(torch.nn.functional.linear, x, w) for w in dense_cycle])[0]
    return result | {"torch_float16_us": us, "speedup": us / result["us"]}


def main() -> None:
    gpu, out = begin(__doc__)
    cuda = native.load("cuda")
    overlaps = torch.cuda.get_device_capability() >= (9, 0)
    copy_gb_s = cuda.copy_bandwidth(1 << 30)
    cases = [(name, "symmetric g128", m) for name in SHAPES for m in (1, 2, 4, 8)]
    cases += [(name, label, 1) for name in list(SHAPES)[:2] for label in list(SPECS)[1:]]
    print(f"{gpu}: copies {copy_gb_s:.0f} GB/s")
    results: list[dict] = []
    record = {"gpu": gpu, "torch": torch.__version__, "copy_gb_s": copy_gb_s, "w4_matmul": results}
    for case in cases:
        results.append(measure(*case, copy_gb_s, overlaps))
        print(LINE.format(**results[-1]))
        save(record, out)
    print(out)


if __name__ == "__main__":
    main()
