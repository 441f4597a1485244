"""Shapes named by the model they come from; benchmarks and tests take them from here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What the benchmarks need of a model: L layers and D features of the residual stream."""

    layers: int
    hidden_size: int


MODELS = {
    "SmolLM2-135M": Model(30, 576),
    "Llama-3-8B": Model(32, 4096),
    "Llama-2-70B": Model(80, 8192),
}
