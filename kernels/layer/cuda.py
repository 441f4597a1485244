"""The CUDA decode attention (csrc/cuda/attention.cu), over the buffers of the Triton kernel."""

import ctypes

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.w4.cuda import TYPES
from engine.kernels.w4.fusion import NORMS

MAX_QUERIES, MAX_WIDTH, MAX_SPLITS = 16, 256, 32
SCOPES = ("", "head", "all")  # of norms, numbered as in csrc/cuda/attention.h


class Call(ctypes.Structure):
    """shallow::DecodeAttention of csrc/cuda/attention.h."""

    borrowed: dict[str, Tensor]  # whose memory it points to

    POINTERS = (
        *("qkv", "store", "table", "positions", "live", "angles", "q_norm", "q_bias", "k_norm"),
        *("k_bias", "parts", "counters", "y"),
    )
    SIZES = (
        *("batch", "heads", "kv_heads", "width", "slots", "slot", "page", "table_width"),
        *("rope", "window", "splits", "type", "norm_kind", "scope"),
    )
    _fields_ = [
        *((name, ctypes.c_uint64) for name in POINTERS),
        *((name, ctypes.c_int32) for name in SIZES),
        *((name, ctypes.c_float) for name in ("epsilon", "scale", "cap")),
        ("overlap", ctypes.c_int32),
    ]


def takes(repeats: int, width: int) -> bool:
    """Whether the kernel has heads so wide, so many of which share a key."""
    return repeats <= MAX_QUERIES and width <= MAX_WIDTH


def launch(call: Call, device: torch.device) -> None:
    """On the device's current stream. RuntimeError with CUDA's own message."""
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        native.load("cuda").decode_attention(ctypes.addressof(call), stream.cuda_stream)


def describe(
    qkv: Tensor,
    store: Tensor,
    table: Tensor,
    positions: Tensor,
    live: Tensor,
    y: Tensor,
    *,
    slot: int,
    scale: float,
    angles: Tensor | None = None,
    norms: tuple[Tensor | None, ...] = (None,) * 4,
    norm: str = "rms",
    scope: str = "",
    epsilon: float = 0.0,
    window: int = 0,
    cap: float = 0.0,
    splits: int = 1,
    parts: Tensor | None = None,
    counters: Tensor | None = None,
    overlap: bool = False,
) -> Call:
    """The kernel's arguments, which keep the tensors. Raises ValueError.

    qkv (B, (H + 2 G) E) and y (B, H E) have the dtype of `store` (pages, S, 2, G, PAGE, E), float16
    or bfloat16. table (B, W), positions (B,) and live (B,) are int32. angles (C, rope) float32:
    cosines, then sines. norms: weights and biases of queries, then of keys, (E,) of `scope` "head",
    of all heads for "all". With splits, parts (B H splits (E + 2) or more,) float32, and
    counters (B G,) int32, zeros.
    """
    if store.dim() != 6 or store.dtype not in TYPES[:2] or not store.is_contiguous():
        raise ValueError(
            "store must be a contiguous (pages, slots, 2, G, positions, E) of float16 or bfloat16, "
            f"found {tuple(store.shape)} {store.dtype}"
        )
    _, slots, _, groups, page, width = store.shape
    batch, heads = len(qkv), y.shape[1] // width
    if not takes(heads // groups, width):
        raise ValueError(
            f"heads must be at most {MAX_WIDTH} wide, {MAX_QUERIES} to a key, "
            f"found {width} and {heads} to {groups}"
        )
    rope = 0 if angles is None else angles.shape[1]
    given: dict[str, Tensor | None] = {"qkv": qkv, "store": store, "table": table}
    given |= {"positions": positions, "live": live, "angles": angles}
    given |= {"parts": parts, "counters": counters, "y": y}
    given |= dict(zip(("q_norm", "q_bias", "k_norm", "k_bias"), norms, strict=True))
    wide, small = torch.float32, torch.int32
    of_queries, of_keys = (width, width) if scope == "head" else (heads * width, groups * width)
    shared = batch * heads * splits * (width + 2) if splits > 1 else 0
    expected = {
        "qkv": (store.dtype, (batch, (heads + 2 * groups) * width)),
        "store": (store.dtype, tuple(store.shape)),
        "table": (small, (batch, table.shape[-1])),
        "positions": (small, (batch,)),
        "live": (small, (batch,)),
        "angles": (wide, (0 if angles is None else len(angles), rope)),
        "parts": (wide, (shared if parts is None else max(shared, len(parts)),)),
        "counters": (small, (batch * groups,)),
        "y": (store.dtype, (batch, heads * width)),
        "q_norm": (wide, (of_queries,)),
        "q_bias": (wide, (of_queries,)),
        "k_norm": (wide, (of_keys,)),
        "k_bias": (wide, (of_keys,)),
    }
    present = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in present.items():
        kind, shape = expected[name]
        lies = tensor.is_contiguous()
        if tensor.dtype != kind or tuple(tensor.shape) != shape or not lies:
            raise ValueError(
                f"{name} must be a contiguous {shape} {kind}, "
                f"found {tuple(tensor.shape)} {tensor.dtype} with stride {tensor.stride()}"
            )
        if tensor.device != store.device:
            raise ValueError(f"{name} is on {tensor.device}, store is on {store.device}")
    call = Call(
        **{name: tensor.data_ptr() for name, tensor in present.items()},
        batch=batch,
        heads=heads,
        kv_heads=groups,
        width=width,
        slots=slots,
        slot=slot,
        page=page,
        table_width=table.shape[1],
        rope=rope,
        window=window,
        splits=splits,
        type=TYPES.index(store.dtype),
        norm_kind=NORMS.index(norm),
        scope=SCOPES.index(scope),
        epsilon=epsilon,
        scale=scale,
        cap=cap,
        overlap=overlap,
    )
    call.borrowed = present
    return call
