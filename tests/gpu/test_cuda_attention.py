"""The CUDA decode attention against float64, run on a CPU under AddressSanitizer and UBSan."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.attention_calls import (
    BOUND,
    SHAPES,
    Attention,
    check,
    make,
    random_case,
    without_results,
)
from support.emulated import (
    Array,
    attention_error,
    encode_arrays,
    kernels,
    message_of,
    run_attention,
    run_encoded,
)

from engine.kernels.layer.cuda import Call

EDGES = (0, 1, 15, 16, 17, 63, 64, 65)


@pytest.fixture(scope="session")
def executable() -> Path:
    return kernels()


def check_all(executable: Path, cases: list[Attention], folder: Path) -> None:
    copies = [without_results(case) for case in cases]
    run_attention(executable, copies, folder)
    for case, ran in zip(cases, copies, strict=True):
        print({k: v for k, v in case.options.items() if k not in ("angles", "norms")})
        check(case, ran)


@pytest.mark.parametrize("dtype", BOUND)
def test_edges_of_tiles_and_pages(executable, rng, tmp_path, dtype):
    cases = [
        make(rng, dtype, (4, 2, 16), list(EDGES), page=64, splits=splits, rope=16)
        for splits in (1, 3)
    ]
    check_all(executable, cases, tmp_path)


@pytest.mark.parametrize("dtype", BOUND)
def test_heads_of_every_shape(executable, rng, tmp_path, dtype):
    cases = [make(rng, dtype, shape, [33], rope=shape[2] // 2 * 2) for shape in SHAPES]
    check_all(executable, cases, tmp_path)


def test_random_options(executable, rng, tmp_path):
    check_all(executable, [random_case(rng, dtype) for dtype in BOUND for _ in range(6)], tmp_path)


def test_windows_that_begin_anywhere_in_a_page(executable, rng, tmp_path):
    positions = list(range(14, 50))
    cases = [
        make(rng, torch.float16, (2, 1, 16), positions, window=17, splits=splits)
        for splits in (1, 2)
    ]
    check_all(executable, cases, tmp_path)


@pytest.mark.parametrize("splits", (1, 3))
def test_what_is_no_number_stays_none(executable, rng, tmp_path, splits):
    """In the head whose query has it, and in those that read a key or a value that has it."""
    case = make(rng, torch.float16, (4, 2, 16), [40, 40, 40], splits=splits)
    case.qkv[1, 3] = torch.nan  # a query of the first head
    case.qkv[2, -1] = torch.inf  # the token's value, of the second key
    page = int(case.table[3, 1])
    case.store[page, case.options["slot"], 0, 1, 5, 2] = torch.nan  # one of many keys
    run_attention(executable, [case], tmp_path)
    query, value, key = case.y[1:].unflatten(1, (4, 16))
    assert query[0].isnan().all() and query[1:].isfinite().all()
    assert value[:2].isfinite().all() and not value[2:, -1].isfinite().any()
    assert key[:2].isfinite().all() and key[2:].isnan().all()


@pytest.mark.parametrize("scope", ("head", "all"))
def test_heads_without_a_variance(executable, rng, tmp_path, scope):
    """The mean of squares less the square of the mean may be below zero."""
    case = make(rng, torch.float16, (4, 2, 80), [20], scope=scope, norm="layer")
    case.qkv[:, : 6 * 80] = 1999.0
    check_all(executable, [case], tmp_path)


@pytest.mark.slow
def test_sweep(executable, rng, tmp_path):
    check_all(executable, [random_case(rng, d) for d in BOUND for _ in range(100)], tmp_path)


def test_runs_give_the_same_bits(executable, rng, tmp_path):
    """In whatever order blocks arrive."""
    case = make(rng, torch.float16, (8, 2, 64), [150, 70], page=16, splits=8)
    copies = [without_results(case) for _ in range(4)]
    run_attention(executable, copies, tmp_path)
    assert all(torch.equal(copies[0].y[1:], other.y[1:]) for other in copies[1:])


def test_native_errors(executable, rng, tmp_path):
    case = make(rng, torch.float16, (4, 2, 16), [3])

    def error(**fields) -> str:
        call = case.call()
        for name, value in fields.items():
            setattr(call, name, value)
        return attention_error(executable, case, call, tmp_path)

    assert "at most 16 query heads share a key, found 17" in error(heads=34)
    assert "multiple of those of keys" in error(heads=5)
    assert "heads must be 1 to 256 wide, found 257" in error(width=257)
    assert "multiple of 16 positions, found 24" in error(page=24)
    assert "multiple of 16 positions, found 0" in error(page=0)
    assert "a launch needs a sequence" in error(batch=0)
    assert "no such slot" in error(slot=2)
    assert "no such slot" in error(slot=-1)
    assert "window must be 0 or more" in error(window=-1)
    assert "an even part of a head, found 18" in error(rope=18)
    assert "needs its angles" in error(rope=16)
    assert "splits must be 1 to 32, found 33" in error(splits=33)
    assert "a norm needs its weights" in error(scope=1)
    assert "type must be float16 or bfloat16" in error(type=2)
    normed = make(rng, torch.float16, (4, 2, 16), [3], scope="head").call()
    normed.norm_kind = 0
    assert "a norm needs its weights" in attention_error(executable, case, normed, tmp_path)
    case = replace(case, parts=None)
    assert "splits need parts and counters" in error(splits=2)
    store = Array(Call.store.offset, case.store, written=True, before=False, offset=4)
    data = run_encoded(executable, [encode_arrays(case.call(), [store])], tmp_path)
    assert "store must lie on a multiple of 16 bytes" in message_of(data)


def test_a_call_keeps_its_tensors(rng):
    call = make(rng, torch.float16, (4, 2, 16), [3], rope=16, scope="head", splits=2).call()
    gc.collect()
    given = {name: getattr(call, name) for name in Call.POINTERS if not name.endswith("_bias")}
    assert given == {name: tensor.data_ptr() for name, tensor in call.borrowed.items()}


def test_python_errors(rng):
    case = make(rng, torch.float16, (4, 2, 16), [3])

    def raises(message: str, part: str = "", value=None, **options) -> None:
        with pytest.raises(ValueError, match=message):
            (replace(case, **{part: value}) if part else case).call(**options)

    raises("store must be a contiguous", "store", case.store.float())
    raises(r"qkv must be a contiguous \(2, 128\)", "qkv", case.qkv[:, :64])
    raises("positions must be a contiguous", "positions", case.positions.long())
    raises("parts must be a contiguous", "parts", case.parts[:8], splits=4)
    whole = 2 * 4 * 4 * (16 + 2)  # of two sequences, four heads and as many splits
    case.call(parts=torch.empty(whole), splits=4)
    raises("parts must be a contiguous", parts=torch.empty(whole - 1), splits=4)
    raises("qkv must be a contiguous", "qkv", case.qkv.T.contiguous().T)
    raises("counters must be a contiguous", "counters", case.counters[:1])
    raises("q_norm must be a contiguous", norms=(torch.zeros(3),) * 4, scope="head")
    raises("table is on meta, store is on cpu", "table", case.table.to("meta"))
    raises("16 to a key", "y", torch.zeros(2, 33 * 2 * 16).half())
