"""Builds the CUDA kernels for the CPU (csrc/cuda/emulate.h) and runs calls on them."""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.kernels.w4.cuda import Call, Matrix, Norm, describe
from engine.kernels.w4.layout_gpu import GpuMatrix

ROOT = Path(__file__).parent.parent
# A stack for use-after-return checks per fiber costs ten times the rest.
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
FLAGS = (
    "-std=c++17 -O2 -g1 -Wall -Wextra -Werror -Wno-unknown-pragmas "
    "-fsanitize=address,undefined -fno-sanitize-recover=all"
).split()


def cuda_headers() -> list[str]:
    """Folders that hold NVIDIA's cuda_fp16.h and nv/target; skips the test where they are missing.

    Those of nvcc, or of the packages nvidia-cuda-runtime and nvidia-cuda-cccl.
    """
    nvcc = shutil.which("nvcc")
    homes = [
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")),
        *Path("/usr/local").glob("cuda*"),
    ]
    homes += [Path(nvcc).resolve().parent.parent] if nvcc else []
    folders = [home / "include" for home in homes]
    folders += [folder / "cccl" for folder in folders]
    folders += Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include")
    folders += Path(sysconfig.get_path("purelib"), "nvidia").glob("*/include/cccl")
    found = []
    for header in ("cuda_fp16.h", "cuda_runtime_api.h", "nv/target"):
        with_header = [str(folder) for folder in folders if (folder / header).exists()]
        if not with_header:
            pytest.skip(f"no {header}: install nvidia-cuda-runtime and nvidia-cuda-cccl, or CUDA")
        found.append(with_header[0])
    return list(dict.fromkeys(found))


def build(name: str, *sources: str) -> Path:
    """The executable `name` of the sources, under sanitizers; rebuilt where one changed."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    command = ["g++", *FLAGS, "-Icsrc", *(f"-isystem{folder}" for folder in cuda_headers())]
    read = [*map(str, sources), *sorted(str(path) for path in ROOT.glob("csrc/**/*.h"))]
    digest = hashlib.sha256(" ".join([*command, *read]).encode())
    for path in read:
        digest.update((ROOT / path).read_bytes())
    target = ROOT / "build" / "emulated" / f"{name}-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        compiled = subprocess.run(
            [*command, "-x", "c++", *sources, "-o", str(partial)],
            cwd=ROOT, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert compiled.returncode == 0, compiled.stderr
        partial.rename(target)
    return target


@dataclass(frozen=True, eq=False)
class Matmul:
    """One call of the W4 matmul; x and y lie `offset` elements off a multiple of 16 bytes."""

    x: torch.Tensor
    weights: GpuMatrix
    bias: torch.Tensor | None = None
    norm: Norm | None = None
    gated: bool = False
    out_dtype: torch.dtype | None = None
    offset: int = 0

    def output(self) -> torch.Tensor:
        """NaN, of the output's shape and dtype."""
        n = self.weights.shape[0] // (2 if self.gated else 1)
        return torch.full((len(self.x), n), torch.nan, dtype=self.out_dtype or self.x.dtype)

    def call(self) -> Call:
        return describe(self.x, self.weights, self.output(), self.bias, self.norm, self.gated)

    def arrays(self) -> dict[int, torch.Tensor]:
        """What the call's pointers point to, by their places in the struct."""
        named = [(Matrix, name, tensor) for name, tensor in self.weights.tensors().items()]
        others = {"x": self.x, "y": self.output(), "bias": self.bias}
        others["norm"] = self.norm and self.norm.weight
        named += [(Call, name, tensor) for name, tensor in others.items() if tensor is not None]
        return {getattr(owner, name).offset: tensor for owner, name, tensor in named}


def encode(matmul: Matmul, call: Call) -> bytes:
    """The call as tests/emulated.cpp reads it."""
    arrays = matmul.arrays()
    encoded = [struct.pack("q", ctypes.sizeof(call)), bytes(call), struct.pack("q", len(arrays))]
    for place, tensor in arrays.items():
        data = storage_bytes(tensor)
        moves = place in (Call.x.offset, Call.y.offset)
        moved = matmul.offset * tensor.itemsize if moves else 0
        encoded += [struct.pack("4q", place, place == Call.y.offset, moved, len(data)), data]
    return b"".join(encoded)


def storage_bytes(tensor: torch.Tensor) -> bytes:
    """From the first element to the last, gaps between rows included."""
    if not tensor.numel():
        return b""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    flat = tensor.as_strided((last + 1,), (1,))
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


def run(executable: Path, matmuls: list[Matmul], folder: Path) -> list[torch.Tensor]:
    """The outputs. Fails with the emulator's or a sanitizer's report."""
    calls = [encode(matmul, matmul.call()) for matmul in matmuls]
    data, at, found = run_encoded(executable, calls, folder), 0, []
    for matmul in matmuls:
        y = matmul.output()
        (message_bytes,) = struct.unpack_from("q", data, at)
        assert message_bytes == 0, data[at + 8 : at + 8 + message_bytes].decode()
        stored = bytearray(data[at + 8 : at + 8 + y.nbytes])
        found.append(torch.frombuffer(stored, dtype=y.dtype).view(y.shape) if y.nbytes else y)
        at += 8 + y.nbytes
    assert at == len(data), f"{len(data) - at} bytes of results too many"
    return found


def error_of(executable: Path, matmul: Matmul, call: Call, folder: Path) -> str:
    """The message of the exception that the call throws; "" without one."""
    data = run_encoded(executable, [encode(matmul, call)], folder)
    (message_bytes,) = struct.unpack_from("q", data)
    return data[8 : 8 + message_bytes].decode()


def run_encoded(executable: Path, calls: list[bytes], folder: Path) -> bytes:
    requests, results = folder / "calls", folder / "results"
    requests.write_bytes(b"".join(calls))
    ran = subprocess.run(
        [str(executable), str(requests), str(results)],
        capture_output=True, text=True, timeout=900, env=ENVIRONMENT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return results.read_bytes()
