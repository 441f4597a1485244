"""Fixtures that every test may use."""

import os
import secrets
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: as the commands do

import torch

from engine.errors import InputError

# No deadline: a test on a busy machine is slow, not wrong. The blob reproduces a failure.
settings.register_profile("shallow", deadline=None, print_blob=True)
settings.load_profile("shallow")

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))

RATIOS = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser):
    parser.addoption(
        "--peer-python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="the Python that has a peer (llama.cpp) installed, for tests that compare with it",
    )

    parser.addoption(
        "--llama-source",
        metavar="DIR",
        help="llama.cpp's source, whose converter tests compare with: vendor/llama.cpp of "
        "`pip download --no-deps --no-binary :all: llama-cpp-python`",
    )


def pytest_configure(config):
    config.stash[RATIOS] = {}


@pytest.fixture
def ratios(request) -> dict[str, float]:
    """Family case -> RMS ratio to transformers; shown as a table after the run."""
    return request.config.stash[RATIOS]


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash[RATIOS]
    if found:
        terminalreporter.section("logits against transformers, RMS ratio (bound 1e-4)")
        for case, ratio in found.items():
            terminalreporter.write_line(f"{case:20} {ratio:.1e}")


@pytest.fixture(scope="session")
def peer_pythons(request) -> list[str]:
    """NAME=PATH of every --peer-python."""
    return request.config.getoption("--peer-python")


@pytest.fixture(scope="session")
def peer_python(peer_pythons):
    """Peer -> the interpreter of its --peer-python; None: not given."""
    given = dict(pair.split("=", 1) for pair in peer_pythons)
    return given.get


@pytest.fixture
def rng() -> torch.Generator:
    """A generator seeded afresh; the printed seed (shown on failure) reproduces the test."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=INTERPRETED)
def bfloat16_to_nearest(monkeypatch) -> None:
    """float32 becomes the nearest bfloat16, as on a GPU: Triton's interpreter cuts it off, and what
    it cuts is always towards zero, so that sums of rounded weights err by as much as one weight."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def nearest(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        data = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(data, dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", nearest)


@pytest.fixture(autouse=INTERPRETED)
def language_patched_once(monkeypatch) -> None:
    """Triton's interpreter patches its language again at every call of one kernel function by
    another: a third of its time."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, everything = interpreter._patch_lang, SimpleNamespace(__globals__={0: tl, 1: tl.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda _: patch(everything))
    monkeypatch.setattr(
        interpreter.InterpretedFunction,
        "__call__",
        lambda self, *arguments, **options: self.rewrite()(*arguments, **options),
    )


@pytest.fixture(autouse=INTERPRETED)
def programs_in_any_order(rng, monkeypatch) -> None:
    """Those of a launch are interpreted one after another: in another order every time."""
    from triton.runtime.interpreter import InterpreterBuilder

    order, place = [], InterpreterBuilder.set_grid_idx

    def placed(self, *at: int) -> None:
        _, ny, nz = grid = self.grid_dim
        if not any(at):
            order[:] = torch.randperm(prod(grid), generator=rng).tolist()
        number = order[(at[0] * ny + at[1]) * nz + at[2]]
        place(self, number // (ny * nz), number // nz % ny, number % nz)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", placed)


@pytest.fixture
def inside(monkeypatch) -> None:
    """Interpreted kernels touch the tensors that they are given, and no memory beside."""
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    given, launch = [], GridExecutor.__call__

    def span(tensor: torch.Tensor) -> tuple[int, int]:
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize

    def launched(self, *arguments, **options):
        every = (*arguments, *options.values())
        given[:] = [span(value) for value in every if isinstance(value, torch.Tensor)]
        launch(self, *arguments, **options)

    def checked(touch, mask_at: int):
        def touched(self, pointers, *rest):
            at, mask = np.broadcast_arrays(pointers.data, rest[mask_at].data)
            at = at[mask].astype(np.int64)
            size = pointers.get_element_ty().primitive_bitwidth // 8
            known = [(at >= first) & (at + size <= last) for first, last in given]
            assert np.logical_or.reduce(known).all(), f"{touch.__name__} beside every tensor"
            return touch(self, pointers, *rest)

        return touched

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        touch = checked(getattr(InterpreterBuilder, name), mask_at)
        monkeypatch.setattr(InterpreterBuilder, name, touch)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF: from the cache, or fetched; skipped where neither is possible."""
    from engine.checkpoint.locate import locate

    try:
        return locate("smollm2-135m")
    except InputError as error:
        pytest.skip(f"the default model is neither here nor to be fetched: {error}")


@pytest.fixture
def source(tmp_path, rng):
    """A function that writes the tiny model of a case (tests/support/tiny.py) anew and opens it."""
    from support import tiny

    from engine.checkpoint import open_checkpoint

    def write(case: str, **overrides):
        seed = int(torch.randint(2**31, (1,), generator=rng))
        tiny.write(case, tmp_path / "model", seed, **overrides)
        return open_checkpoint(tmp_path / "model")

    return write
