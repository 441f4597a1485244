"""What the launches of a decode step compute, in plain torch and float32: the oracle of both."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, kind: str) -> Tensor:
    """RMSNorm ("rms") or LayerNorm ("layer") over the last dimension."""
    if kind == "layer":
        return functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def returned(x: Tensor, delta: Tensor, post: Tensor, epsilon: float) -> Tensor:
    """The stream x (M, K) with what a sublayer gave, behind a norm of its own."""
    return x + normalised(delta, post, None, epsilon, "rms")


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Heads x (B, H, E), the first values of each rotated by angles (B, dim): cosines, sines."""
    cos, sin = (torch.cat((half, half), dim=-1)[:, None] for half in angles.chunk(2, dim=-1))
    part, rest = x[..., : angles.shape[1]], x[..., angles.shape[1] :]
    first, second = part.chunk(2, dim=-1)
    return torch.cat((part * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def attended(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, cap: float
) -> Tensor:
    """One query a head (H, E) over keys and values (G, C, E), itself the last: (H, E)."""
    first = 0 if window is None else max(0, keys.shape[1] - window)
    grouped = query.unflatten(0, (len(keys), -1))
    scores = grouped @ keys[:, first:].transpose(1, 2) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return (scores.softmax(-1) @ values[:, first:]).flatten(0, 1)


def likeliest(logits: Tensor) -> Tensor:
    """(B, V) -> (B,) int32, the lowest id of the largest logit, -1 where one is NaN or it is not
    finite."""
    best = logits.max(dim=1)
    lowest = (logits == best.values[:, None]).int().argmax(dim=1)
    return torch.where(best.values.isfinite(), lowest, -1).int()
