"""Builds the CUDA kernels for the CPU (csrc/cuda/emulate.h) and runs calls on them."""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from filelock import FileLock
from support.attention_calls import Attention
from support.w4_calls import Matmul

from engine.kernels.layer import cuda as attention
from engine.kernels.w4.cuda import Call, Matrix, tensors
from engine.kernels.w4.layout_gpu import to_gpu

ROOT = Path(__file__).parents[2]
# A stack for use-after-return checks per fiber costs ten times the rest.
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
FLAGS = (
    "-std=c++17 -O2 -g1 -Wall -Wextra -Werror -Wno-unknown-pragmas "
    "-fsanitize=address,undefined -fno-sanitize-recover=all"
).split()


def kernels() -> Path:
    """The executable that runs calls of every CUDA kernel."""
    sources = ("w4_matmul.cu", "attention.cu")
    return build("kernels", *(f"csrc/cuda/{n}" for n in sources), "tests/support/emulated.cpp")


def cuda_headers() -> list[str]:
    """Folders that hold NVIDIA's headers; skips the test where they are missing.

    Those of nvcc, or of the packages nvidia-cuda-runtime, nvidia-cuda-cccl and nvidia-cuda-crt.
    """
    nvcc = shutil.which("nvcc")
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    homes += [Path(nvcc).resolve().parent.parent] if nvcc else []
    homes += sorted(Path("/usr/local").glob("cuda-*"))
    homes += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*"))
    found = []
    for header in ("cuda_fp16.h", "crt/host_defines.h", "nv/target"):
        folders = [home / "include" for home in homes if (home / "include" / header).exists()]
        if not folders:
            pytest.skip(
                f"no {header}: it comes with CUDA and with nvidia-cuda-runtime, -cccl, -crt"
            )
        found.append(str(folders[0]))
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
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # of several test workers one compiles
        if not target.exists():
            partial = target.with_suffix(".partial")
            compiled = subprocess.run(
                [*command, "-x", "c++", *sources, "-o", str(partial)],
                cwd=ROOT, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
            assert compiled.returncode == 0, compiled.stderr
            partial.rename(target)
    return target


# What the kernel before may write, or still read.
BEFORE = [
    getattr(Call, name).offset
    for name in ("x", "delta", "stream", "gate", "add", "y", "sums", "parts", "counters")
]
# What may be a view of a larger tensor, as x and y.
BESIDE = ("delta", "post", "stream", "norm", "norm_bias", "bias", "gate", "add")


def arrays_of(case: Matmul) -> dict[int, torch.Tensor]:
    """What the call's pointers point to, by their places in the struct."""
    weights = [(Matrix, name, tensor) for name, tensor in to_gpu(case.packed).tensors().items()]
    others = {"x": case.x, "y": case.output(), "bias": case.bias} | tensors(case.fusion)
    others |= case.scratch()
    named = weights + [(Call, name, tensor) for name, tensor in others.items()]
    present = [entry for entry in named if entry[2] is not None]
    return {getattr(owner, name).offset: tensor for owner, name, tensor in present}


def encode(case: Matmul, call: Call) -> bytes:
    """The call as tests/support/emulated.cpp reads it."""
    moved = {getattr(Call, name).offset: case.offset for name in ("x", "y")}
    moved |= {getattr(Call, name).offset: case.offset // 2 for name in BESIDE}
    written = [getattr(Call, name).offset for name in ("y", "stream", "out_sums", "counters")]
    return encode_arrays(
        call,
        [
            Array(place, tensor, place in written, place in BEFORE, moved.get(place, 0))
            for place, tensor in arrays_of(case).items()
        ],
    )


class Array(NamedTuple):
    """What a pointer of a call points to."""

    place: int  # of the pointer in the struct
    tensor: torch.Tensor
    written: bool
    before: bool  # the kernel before may write it, or still read
    offset: int = 0  # elements off a multiple of 16 bytes


def encode_arrays(call: ctypes.Structure, arrays: Sequence[Array]) -> bytes:
    encoded = [struct.pack("q", ctypes.sizeof(call)), bytes(call), struct.pack("q", len(arrays))]
    for array in arrays:
        data, overlap = storage_bytes(array.tensor), call.overlap != 0
        moved = array.offset * array.tensor.itemsize
        flags = (array.place, array.written, array.before and overlap, moved, len(data))
        encoded += [struct.pack("5q", *flags), data]
    return b"".join(encoded)


def storage_bytes(tensor: torch.Tensor) -> bytes:
    """From the first element to the last, gaps between rows included."""
    if not tensor.numel():
        return b""
    flat = tensor.as_strided((elements_of(tensor),), (1,)).contiguous()
    return flat.view(torch.uint8).numpy().tobytes()


def elements_of(tensor: torch.Tensor) -> int:
    """From the first to the last, gaps between rows included."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in strides)


def run(
    executable: Path, cases: list[Matmul], folder: Path, overlap: bool | None = None
) -> list[torch.Tensor]:
    """The outputs; streams and sums are written. Fails with the emulator's or a sanitizer's report.

    Calls `overlap` with the kernel before, every second one by default.
    """
    calls = [case.call() for case in cases]
    for index, call in enumerate(calls):
        call.overlap = index % 2 == 1 if overlap is None else overlap
    encoded = [encode(*pair) for pair in zip(cases, calls, strict=True)]
    data = run_encoded(executable, encoded, folder)
    found = [case.output() for case in cases]
    counters = [case.scratch().get("counters") for case in cases]
    written = [
        [y, case.fusion.stream, case.out_sums, counts]
        for case, y, counts in zip(cases, found, counters, strict=True)
    ]
    read_results(data, written)
    assert not any(counts.any() for counts in counters if counts is not None)
    for case, y in zip(cases, found, strict=True):
        whole = y.as_strided((len(y), y.shape[1] + case.beside), (y.stride(0), 1))
        assert whole[:, y.shape[1] :].isnan().all(), f"{case.name}: wrote beside y's columns"
    return found


def read_results(data: bytes, written: Iterable[Sequence[torch.Tensor | None]]) -> None:
    """Copies what each call wrote to its tensors, in the order of its arrays."""
    at = 0
    for tensors_of_call in written:
        (message_bytes,) = struct.unpack_from("q", data, at)
        assert message_bytes == 0, data[at + 8 : at + 8 + message_bytes].decode()
        at += 8
        for tensor in tensors_of_call:
            if tensor is None or not tensor.nbytes:
                continue
            size = elements_of(tensor) * tensor.itemsize
            flat = torch.frombuffer(bytearray(data[at : at + size]), dtype=tensor.dtype)
            tensor.as_strided(flat.shape, (1,)).copy_(flat)
            at += size
    assert at == len(data), f"{len(data) - at} bytes of results too many"


ATTENTION_BEFORE = ("qkv", "parts", "counters", "y")
ATTENTION_WRITTEN = ("store", "y", "counters", "parts")


def encode_attention(case: Attention, call: attention.Call) -> bytes:
    given = {name: getattr(case, name) for name in attention.Call.POINTERS if hasattr(case, name)}
    norms = zip(("q_norm", "q_bias", "k_norm", "k_bias"), case.options["norms"], strict=True)
    given |= {"angles": case.options["angles"]} | dict(norms)
    written = {name: given.pop(name) for name in ATTENTION_WRITTEN}  # in this order
    arrays = [
        Array(
            getattr(attention.Call, name).offset, tensor, name in written, name in ATTENTION_BEFORE
        )
        for name, tensor in (given | written).items()
        if tensor is not None
    ]
    return encode_arrays(call, arrays)


def run_attention(
    executable: Path, cases: list[Attention], folder: Path, overlap: bool | None = None
) -> None:
    """Runs them on the cases' own buffers; `overlap` as in `run`."""
    calls = [case.call() for case in cases]
    for index, call in enumerate(calls):
        call.overlap = index % 2 == 1 if overlap is None else overlap
    encoded = [encode_attention(*pair) for pair in zip(cases, calls, strict=True)]
    data = run_encoded(executable, encoded, folder)
    read_results(data, [[getattr(case, name) for name in ATTENTION_WRITTEN] for case in cases])


def attention_error(executable: Path, case: Attention, call: attention.Call, folder: Path) -> str:
    """The message of the exception that the call throws; "" without one."""
    return message_of(run_encoded(executable, [encode_attention(case, call)], folder))


def message_of(data: bytes) -> str:
    (message_bytes,) = struct.unpack_from("q", data)
    return data[8 : 8 + message_bytes].decode()


def error_of(executable: Path, case: Matmul, call: Call, folder: Path) -> str:
    """The message of the exception that the call throws; "" without one."""
    return message_of(run_encoded(executable, [encode(case, call)], folder))


def run_encoded(executable: Path, calls: list[bytes], folder: Path) -> bytes:
    requests, results = folder / "calls", folder / "results"
    requests.write_bytes(b"".join(calls))
    ran = subprocess.run(
        [str(executable), str(requests), str(results)],
        capture_output=True, text=True, timeout=900, env=ENVIRONMENT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return results.read_bytes()
