"""Keys and values by slot, with a length for every (sequence, slot)."""

from collections.abc import Sequence

import torch

from engine.architecture.config import ModelConfig
from engine.errors import InputError

_FIRST_CAPACITY = 64  # positions; doubled when full, so a token is copied at most once on average


def check_room(batch: int, capacity: int | None) -> None:
    """InputError for what no cache is made for."""
    if batch < 1:
        raise InputError(f"batch: expected at least 1 sequence, found {batch}")
    if capacity is not None and capacity < 0:
        raise InputError(f"capacity: expected at least 0 positions, found {capacity}")


class Lengths:
    """How far each slot of each sequence is filled: what every cache shares.

    `lengths` (B, S) int64 on the CPU counts the filled positions. A sequence stands at the
    largest of its lengths; a slot that was skipped on the way there cannot run again before
    `truncate` has taken the sequence back to what the slot has seen.
    """

    def __init__(self, config: ModelConfig, batch: int) -> None:
        self.config = config
        self._lengths = torch.zeros(batch, len(config.layers), dtype=torch.int64, device="cpu")

    @property
    def lengths(self) -> torch.Tensor:
        return self._lengths

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def positions(self) -> torch.Tensor:
        """(B,) int64: where each sequence stands, the position of its next token."""
        return self.lengths.amax(dim=1)

    def truncate(self, lengths: int | Sequence[int] | torch.Tensor) -> None:
        """Takes every sequence back to `lengths` ((B,) or one for all); longer is an error."""
        try:
            wanted = torch.as_tensor(lengths, device="cpu").expand(self.batch)
            fits = bool(((wanted >= 0) & (wanted <= self.positions)).all())
        except (RuntimeError, TypeError, ValueError):  # no numbers, or not so many
            fits = False
        if not fits or wanted.is_floating_point():
            raise InputError(
                f"truncate: expected {self.batch} whole lengths from 0 to "
                f"{self.positions.tolist()}, found {lengths}"
            )
        torch.minimum(self.lengths, wanted[:, None].long(), out=self.lengths)

    def require(self, sequence: int, slots: Sequence[int]) -> None:
        """Raises unless each of these slots has seen all that the sequence has."""
        position = int(self.positions[sequence])
        for slot in slots:
            length = int(self.lengths[sequence, slot])
            if length != position:
                raise InputError(
                    f"KV cache: sequence {sequence} stands at position {position}, but slot {slot} "
                    f"is filled only up to {length}; truncate the sequence to {length} first"
                )


class KVCache(Lengths):
    """What attention has seen: per slot, keys and values (B, G, C, E)."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        capacity: int | None = None,
    ) -> None:
        check_room(batch, capacity)
        super().__init__(config, batch)
        first = min(capacity or _FIRST_CAPACITY, config.max_context)
        shape = (batch, config.kv_heads, first, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layers]

    @property
    def nbytes(self) -> int:
        """Bytes held, filled or not."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def append(
        self,
        slot: int,
        rows: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (R, G, T, E) keys and values of sequences `rows` (R,) at `positions` (R, T).

        A negative position is padding and is not stored. Returns everything those rows hold in
        the slot, (R, G, C, E) each, C the longest filled length; what lies beyond a sequence's
        own length is to be masked.
        """
        filled = int(positions.max()) + 1
        self._reserve(slot, filled)
        row, column = (positions >= 0).nonzero(as_tuple=True)
        target = (rows[row], slice(None), positions[row, column])
        self.keys[slot][target] = keys[row, :, column]
        self.values[slot][target] = values[row, :, column]
        self.lengths[rows.cpu(), slot] = torch.maximum(
            self.lengths[rows.cpu(), slot], positions.amax(dim=1).cpu() + 1
        )
        longest = max(filled, int(self.lengths[rows.cpu(), slot].max()))
        if len(rows) == self.batch:
            return self.keys[slot][:, :, :longest], self.values[slot][:, :, :longest]
        return self.keys[slot][rows, :, :longest], self.values[slot][rows, :, :longest]

    def _reserve(self, slot: int, length: int) -> None:
        held = self.keys[slot]
        capacity = held.shape[2]
        if length <= capacity:
            return
        while capacity < length:
            capacity *= 2
        shape = (*held.shape[:2], min(capacity, self.config.max_context), held.shape[3])
        for store in (self.keys, self.values):
            grown = torch.zeros(shape, dtype=held.dtype, device=held.device)
            grown[:, :, : held.shape[2]] = store[slot]
            store[slot] = grown
