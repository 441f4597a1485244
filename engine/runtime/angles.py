"""Tables of the angles that decoders rotate queries and keys by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from engine.architecture.config import ModelConfig, Rope
from engine.architecture.rope import inverse_frequencies
from engine.kernels import native
from engine.sample import one_thread


class Tables(NamedTuple):
    reach: int  # positions that all of them have
    tables: Sequence[torch.Tensor]  # (positions, dim) float32 each: cosines, then sines
    spans: Sequence[Any]  # as the native decoder takes them


class Angles:
    """Tables of cosines and sines by position, one for each kind of rotary embedding."""

    def __init__(self, config: ModelConfig) -> None:
        self._ropes = config.ropes
        self.held = Tables(0, (), ())  # the latest
        self._limit = config.max_context
        self._tables: dict[Rope, tuple[int | None, torch.Tensor]] = {}

    def tables(self, length: int) -> Tables:
        """Of at least `length` positions, rotated as in a sequence of that length."""
        tables = [self._table(rope, length) for rope in self._ropes]
        reach = min(map(len, tables), default=self._limit)
        found = Tables(reach, tables, [native.span(table) for table in tables])
        self.held = found  # not read back: another thread may have put its own there
        return found

    def _table(self, rope: Rope, length: int) -> torch.Tensor:
        kind: int | None = None
        if rope.kind == "longrope":
            kind = length > rope.original_context
        elif rope.kind == "dynamic":
            kind = max(length, rope.original_context)
        held, table = self._tables.get(rope, (None, None))
        if table is not None and held == kind and len(table) >= length:
            return table
        count = min(max(2 * length, 256), max(self._limit, length))
        with one_thread():  # a forked child would wait for torch's others, which it has not
            positions = torch.arange(count, dtype=torch.float32, device="cpu")
            angles = positions[:, None] * inverse_frequencies(rope, length)
            table = torch.cat((angles.cos(), angles.sin()), dim=1) * rope.attention_factor
        self._tables[rope] = kind, table
        return table


class DeviceAngles:
    """The same on a device, where they stay in place while they are long enough."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._host, self.device = Angles(config), device
        self._copied: list[torch.Tensor] = []  # the host's that the device has
        self._dynamic = config.whole_prefill
        self.tables: list[torch.Tensor] = []
        self.version = 0  # of their addresses

    def reach(self, length: int) -> None:
        """Tables of at least `length` positions, rotated as in a sequence of that length."""
        if self.tables and length <= self._host.held.reach and not self._dynamic:
            return
        found = list(self._host.tables(length).tables)
        if len(self.tables) != len(found) or any(
            len(held) < len(table) for held, table in zip(self.tables, found, strict=True)
        ):
            self.tables = [table.to(self.device, copy=True) for table in found]
            self._copied, self.version = found, self.version + 1
            return
        for index, table in enumerate(found):
            if table is not self._copied[index]:
                self.tables[index][: len(table)] = table
        self._copied = found
