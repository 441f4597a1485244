"""Shapes named by the model they come from; benchmarks and tests take them from here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What the benchmarks need of a model."""

    layers: int
    hidden_size: int  # D
    kv_size: int  # G * E; the queries have D
    ffn_size: int  # F

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the matrices of a layer, fused as the runtimes fuse them."""
        D, F = self.hidden_size, self.ffn_size
        return {
            "qkv": (D + 2 * self.kv_size, D),
            "o": (D, D),
            "gate and up": (2 * F, D),
            "down": (D, F),
        }


MODELS = {
    "SmolLM2-135M": Model(30, 576, 192, 1536),
    "Llama-3.2-1B": Model(16, 2048, 512, 8192),
    "Qwen2.5-1.5B": Model(28, 1536, 256, 8960),
    "Llama-3-8B": Model(32, 4096, 1024, 14336),
    "Llama-2-70B": Model(80, 8192, 1024, 28672),
}
MATRICES = {
    f"{name} {matrix}": shape
    for name, model in MODELS.items()
    for matrix, shape in model.matrices.items()
}
