"""The CUDA kernels against float64, run on a CPU under AddressSanitizer and UBSan."""

import pytest
import torch
from close import assert_close
from emulated import Matmul, build, run
from packed import every_spec, random_packed, spec_id

from engine.kernels.w4.cuda import Norm
from engine.kernels.w4.format import Spec, unpack
from engine.kernels.w4.layout_gpu import to_gpu

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="session")
def kernels():
    return build("w4", "csrc/cuda/w4_matmul.cu", "tests/emulated.cpp")


def test_smoke(kernels, rng, tmp_path):
    import time
    for spec in every_spec():
        for dtype in BOUND:
            packed = random_packed(rng, 33, 300, spec)
            x = torch.randn(3, 300, generator=rng).to(dtype)
            t = time.time()
            (y,) = run(kernels, [Matmul(x, to_gpu(packed), out_dtype=torch.float32)], tmp_path)
            from close import rms_ratio
            ref = x.double() @ unpack(packed).double().T
            print(spec_id(spec), dtype, rms_ratio(ref, y), time.time() - t)
