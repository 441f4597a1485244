"""Distillation into the scales and minimums of a packed model, whose codes stay as they are.

End-to-end training of scales alone: PEQA (Kim et al., 2305.14152), the second phase of EfficientQAT
(Chen et al., 2407.11062). The result has the format, the bytes and the speed of what was given.
"""

import torch
from torch import nn

from engine.architecture.config import ModelConfig
from engine.architecture.families import layer_parts, outer_tensors
from engine.checkpoint import Checkpoint
from engine.errors import InputError
from engine.export.packed import is_packed
from engine.healing.assemble import assemble
from engine.healing.settings import Settings
from engine.healing.student import Student
from engine.kernels.dtypes import dtype_of
from engine.kernels.w4.format import Packed, rows_of
from engine.kernels.w4.learning import LearningEmbedding, LearningLinear


def check_packed(pupil: Checkpoint) -> None:
    """InputError unless it is a packed directory of `engine quantize`."""
    if not is_packed(pupil.config):
        raise InputError(
            f"{pupil.path}: --train scales expected a packed directory; "
            "engine quantize makes one, with --method keep in the bits that are there"
        )


class ScaleStudent(Student):
    """What learns are the changes of scales and minimums."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        settings: Settings,
        device: torch.device | str,
    ) -> None:
        self.config, self.vocab_size = config, config.vocab_size
        self.streams = []
        self.dtype = dtype_of(settings.precision)
        self.matrices: dict[str, LearningLinear] = {}
        model = assemble(checkpoint, config, self._linear, self._embedding, self.dtype)
        self.model = model.requires_grad_(False).to(device)
        self.own = {
            f"{name}.{kind}": parameter.requires_grad_()
            for name, matrix in self.matrices.items()
            for kind, parameter in matrix.changes().items()
        }
        if not self.own:
            raise InputError(f"{checkpoint.path}: holds no quantized matrix whose scales can learn")
        self.learning = self.own

    def _linear(self, name: str, packed: Packed, bias: nn.Parameter | None) -> LearningLinear:
        self.matrices[name] = LearningLinear(packed, bias)
        return self.matrices[name]

    def _embedding(self, matrix: LearningLinear, factor: float) -> LearningEmbedding:
        return LearningEmbedding(matrix, factor, self.dtype)

    def packed(self) -> dict[str, Packed]:
        """Its matrices under the names of a packed directory, what the model fuses apart."""
        found = {}
        for name, _ in outer_tensors(self.config).values():
            if matrix := self.matrices.get(name.removesuffix(".weight")):
                found[name] = matrix.packed
        for slot in range(len(self.config.layers)):
            for part in layer_parts(self.config, slot).values():
                name = part.fused[0] if part.fused else part.name
                if matrix := self.matrices.get(name.removesuffix(".weight")):
                    rows = rows_of(matrix.packed, part.first, part.first + part.shape[0])
                    found[part.name] = rows.to("cpu")
        return found
