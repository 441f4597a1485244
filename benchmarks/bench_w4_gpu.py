"""Measures every launch of the Triton matmul that could serve M rows of x, beside torch's float16:
what the table in kernels/w4/launch.py should say. Run by gpu.sh; writes
benchmarks/results/<gpu>-triton.json."""

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial

import torch
from gpu import (
    FLUSH_BYTES,
    SHAPES,
    SPECS,
    begin,
    check,
    random_weights,
    save,
    time_us,
)
from torch.nn.functional import linear
from triton.runtime.errors import OutOfResources

from engine.kernels.w4 import launch
from engine.kernels.w4.dequantize import Format
from engine.kernels.w4.format import unpack
from engine.kernels.w4.fused import format_of, limits, matmul
from engine.kernels.w4.launch import DENSE, Launch
from engine.kernels.w4.layout_gpu import to_gpu

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CASES = [
    (name, "symmetric g128", m)
    for name in ("4096 x 4096", "8192 x 8192", "Llama-3-8B gate and up", "Llama-3-8B down")
    for m in ROWS
]
CASES += [("8192 x 8192", label, m) for label in list(SPECS)[1:] for m in (1, 64)]
BY_TABLE = "{us:8.2f} us by the table, {speedup:5.2f} x float16"
BEST = "best {us:8.2f} us, {launch}"
FIRST_CALL = """
import time, torch
from engine.kernels.w4.format import Packed, Spec
from engine.kernels.w4.fused import matmul
from engine.kernels.w4.layout_gpu import to_gpu
codes = torch.zeros(4096, 2048, dtype=torch.uint8, device="cuda")
scales = torch.ones(4096, 32, dtype=torch.float16, device="cuda")
weight = to_gpu(Packed(Spec(4, 128, "symmetric"), (4096, 4096), codes, scales))
x = torch.ones(1, 4096, dtype=torch.float16, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
matmul(x, weight)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def candidates(m: int, n: int, k: int, kind: Format, device: torch.device) -> list[Launch]:
    """What the table says, first, and what it might say instead."""
    found, bits = [launch.choose(m, n, k, kind, *limits(device))], kind.bits
    for _, sizes in launch.TABLE:
        if sizes.kernel == "gemv" and m <= sizes.BLOCK_M:
            found += [
                replace(found[0], num_stages=stages, TILES=tiles)
                for stages in (3, 4)
                for tiles in {1, found[0].TILES, 2 * found[0].TILES}
            ]
        elif sizes.kernel == "gemm" and (sizes.BLOCK_M <= 2 * m or sizes.BLOCK_M == 32):
            most = min(k * bits // 512 // launch.SPLIT_CHUNKS, k * bits // (64 * m))
            found += [replace(sizes, SPLITS=n) for n in (1, 2, 4, 8) if n <= max(most, 1)]
    return list(dict.fromkeys(found + [DENSE] * (m >= 128)))


def measure(name: str, label: str, m: int) -> list[dict]:
    """One record a launch that fits, the table's marked; each is checked, then timed."""
    (n, k), spec = SHAPES[name], SPECS[label]
    packed = random_weights(spec, n, k)
    x = torch.randn(m, k, device="cuda").half()
    dense = unpack(packed).half()
    expected = x.float() @ unpack(packed).T
    weights = [to_gpu(packed) for _ in range(math.ceil(FLUSH_BYTES / packed.nbytes))]
    dense_cycle = [dense.clone() for _ in range(math.ceil(FLUSH_BYTES / dense.nbytes))]
    times = math.ceil(16 / len(weights))
    dense_us = time_us([partial(linear, x, w) for w in dense_cycle * times])[0]
    records = []
    asked = candidates(m, n, k, format_of(weights[0], k, 1), x.device)
    for sizes in asked:
        try:
            y = matmul(x, weights[0], out_dtype=torch.float32, sizes=sizes)
        except OutOfResources as error:  # of a table made for a larger GPU
            print(f"{sizes}: {error}")
            continue
        ratio = check(f"{name}, {label}, M={m}, {sizes}", y, expected)
        us, low, high = time_us([partial(matmul, x, w, sizes=sizes) for w in weights * times])
        gb_s = (packed.nbytes + x.nbytes + 2 * m * n) / us / 1e3
        records.append({"shape": name, "n": n, "k": k, "m": m, "spec": label})
        records[-1] |= {"launch": asdict(sizes), "us": us, "us_p20": low, "us_p80": high}
        records[-1] |= {"gb_s": gb_s, "torch_float16_us": dense_us, "speedup": dense_us / us}
        records[-1] |= {"rms_ratio": ratio, "by_table": sizes == asked[0]}
    return records


def line(name: str, label: str, m: int, records: list[dict]) -> str:
    """What the table's launch takes, and the best."""
    table = [BY_TABLE.format(**one) for one in records if one["by_table"]]
    best = [BEST.format(**min(records, key=lambda one: one["us"]))] if records else []
    shown = "; ".join([*(table or ["the table's launch does not fit"]), *best])
    return f"{name:24} {label:20} M={m:4}: {shown}"


def first_call_s() -> float:
    """Seconds of the first matmul of a process, compilation included."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL],
            env=os.environ | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout)


def main() -> None:
    gpu, out = begin(__doc__, "-triton")
    record = {"gpu": gpu, "torch": torch.__version__, "first_call_s": first_call_s()}
    print(f"{gpu}: first call {record['first_call_s']:.2f} s")
    results = record["w4_triton"] = []
    for case in CASES:
        records = measure(*case)
        print(line(*case, records))
        results += records
        save(record, out)
    print(out)


if __name__ == "__main__":
    main()
