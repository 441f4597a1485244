"""Measures the Triton kernel of the angular distances beside a batched torch einsum. Run by gpu.sh;
writes benchmarks/results/<gpu>-angular.json."""

import math
from functools import partial

import torch
from cases import MODELS
from gpu import FLUSH_BYTES, begin, save, time_us

from engine.kernels import native
from engine.kernels.angular import fused, reference

CASES = [
    (model, samples, dtype)
    for model in MODELS
    for samples in (64, 256, 1024)
    for dtype in (torch.float32, torch.bfloat16)
]
LINE = (
    "{model:14} B={samples:4} {dtype:14} {us:8.1f} us {gb_s:6.0f} GB/s "
    "{share_of_copy:4.0%} of copy, {speedup:5.2f} x einsum"
)


def einsum(x: torch.Tensor) -> torch.Tensor:
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    cosine = torch.einsum("ibd,jbd->bij", unit, unit)
    return (cosine.float().clamp(-1, 1).arccos() / torch.pi).mean(0)


def measure(model: str, samples: int, dtype: torch.dtype, copy_gb_s: float) -> dict:
    """One case: checked on its first samples, then timed; x comes from memory, not a cache."""
    shape = MODELS[model].layers + 1, samples, MODELS[model].hidden_size
    x = torch.randn(shape, device="cuda").cumsum(0).to(dtype)
    few = x[:, :4].unbind()
    expected = reference.angular_sums(few, values=True).values
    found = fused.angular_sums(few, values=True).values
    assert found is not None and expected is not None  # both were asked for
    error = float((found - expected).abs().max())
    if not error < 1e-6:
        raise AssertionError(f"{model}, {dtype}: error {error}")
    copies = math.ceil(FLUSH_BYTES / x.nbytes)
    cycle = [x.clone() for _ in range(copies)] * math.ceil(4 / copies)
    us, low, high = time_us([partial(fused.angular_sums, x.unbind()) for x in cycle])
    einsum_us = time_us([partial(einsum, x) for x in cycle])[0]
    gb_s = x.nbytes / us / 1e3
    return {
        "model": model, "samples": samples, "dtype": str(dtype), "error": error,
        "us": us, "us_p20": low, "us_p80": high, "gb_s": gb_s, "share_of_copy": gb_s / copy_gb_s,
        "einsum_us": einsum_us, "speedup": einsum_us / us,
    }  # fmt: skip


def main() -> None:
    gpu, out = begin(__doc__, "-angular")
    copy_gb_s = native.load("cuda").copy_bandwidth(1 << 30)
    record = {"gpu": gpu, "torch": torch.__version__, "copy_gb_s": copy_gb_s}
    results = record["angular"] = []
    for case in CASES:
        results.append(measure(*case, copy_gb_s))
        print(LINE.format(**results[-1]))
        save(record, out)
    print(out)


if __name__ == "__main__":
    main()
