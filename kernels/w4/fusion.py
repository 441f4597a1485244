"""What stands around a product of a decode step, on every backend that fuses it."""

from dataclasses import dataclass

from torch import Tensor

NORMS = ("", "rms", "layer")  # numbered as in csrc/cuda/w4_matmul.h
ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True, eq=False)
class Fusion:
    """What becomes of x before the product and of y after: see kernels/layer/README.md.

    All are float32 but `live`, int32. x and delta are normalised with one `epsilon`.
    """

    norm: str = ""  # one of NORMS
    epsilon: float = 0.0
    norm_weight: Tensor | None = None  # (K,)
    norm_bias: Tensor | None = None  # (K,)
    delta: Tensor | None = None  # (M, K), as x lies
    post: Tensor | None = None  # (K,)
    stream: Tensor | None = None  # (M, K), as x lies: written
    gated: bool = False  # W stacks a gate and an up projection
    activation: str = ""  # one of ACTIVATIONS
    gate: Tensor | None = None  # (M, N), as y lies
    cap: float = 0.0
    live: Tensor | None = None  # (M,)
    add: Tensor | None = None  # (M, N), as y lies


PLAIN = Fusion()
