"""peft's LoRA (Hu et al., 2106.09685) around `W4Linear`: adapters in floats on a 4-bit base (QLoRA,
Dettmers et al., 2305.14314)."""

import warnings
from typing import Any

import torch
from torch import nn

from engine.kernels.w4.linear import W4Linear


def adapt(lora: Any) -> Any:
    """A `peft.LoraConfig` that knows `W4Linear`, itself; through peft's interface for such."""
    from peft.tuners.lora.layer import LoraLayer

    class LoraW4(nn.Module, LoraLayer):
        """x -> W x + scaling * B A dropout(x)."""

        def __init__(self, base: W4Linear, adapter_name: str, config: Any, **kwargs: Any) -> None:
            super().__init__()
            with warnings.catch_warnings():  # peft takes the sizes of any module that has them
                warnings.filterwarnings("ignore", "Unsupported layer type")
                LoraLayer.__init__(self, base)
            self._active_adapter = adapter_name
            rank, alpha = kwargs.pop("r"), kwargs.pop("lora_alpha")
            self.update_layer(adapter_name, rank, lora_alpha=alpha, config=config)
            self.to(base.device)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = self.get_base_layer()(x)
            for name in () if self.disable_adapters else self.active_adapters:
                if name in self.lora_A:
                    down, up = self.lora_A[name], self.lora_B[name]
                    own = next(down.parameters()).dtype
                    learnt = up(down(self.lora_dropout[name](x.to(own))))
                    result = result + (learnt * self.scaling[name]).to(result.dtype)
            return result

        def merge(self, *_: Any, **__: Any) -> None:
            """As peft's own layers say it, of what cannot take an adapter in."""
            raise NotImplementedError(
                "packed weights take no adapter in: save it, and merge it into the 16-bit model"
            )

    lora._register_custom_module({W4Linear: LoraW4})
    return lora
