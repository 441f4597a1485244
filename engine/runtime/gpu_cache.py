"""Keys and values on a GPU: pages of one arena, and for every cache a table of its pages there."""

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engine.architecture.config import ModelConfig
from engine.errors import InputError
from engine.reference.cache import Lengths

PAGE = 64  # positions of a page


@contextmanager
def within_memory(what: str, device: torch.device) -> Iterator[None]:
    """InputError, a sentence that begins with `what`, where a device's memory does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise InputError(out_of_memory(what, str(device), error)) from None


def lacks_memory(error: RuntimeError) -> bool:
    """Whether it is torch's word for it, or Triton's or CUDA's, which have no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def out_of_memory(what: str, device: str, error: RuntimeError) -> str:
    """The sentence for an error that `lacks_memory`."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    more = f" ({asked[1]} at once)" if asked else ""
    return (
        f"{what} needs more memory than {device} has free{more}: fewer sequences, a smaller "
        "context or fewer layers take less"
    )


def free_bytes(device: torch.device) -> int:
    """What a GPU can still give, with what torch keeps of memory that was given back."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class Arena:
    """Pages of keys and values for all caches of a runtime: what a page number means.

    `store` is (pages, S, 2, G, PAGE, E): a page holds PAGE positions of a sequence in every slot.
    It grows by moving to a larger one.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        shape = (0, len(config.layers), 2, config.kv_heads, PAGE, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self.version = 0  # of `store`
        self._free: list[int] = []

    @property
    def page_bytes(self) -> int:
        return self.store.itemsize * self.store.shape[1:].numel()

    def take(self, count: int) -> list[int]:
        """Numbers of so many pages, cleared: what attention masks must be finite all the same."""
        short = count - len(self._free)
        if short > 0:
            self._grow(short)
        taken, self._free = self._free[:count], self._free[count:]
        self.store[taken] = 0
        return taken

    def give(self, pages: list[int]) -> None:
        """Takes pages back."""
        self._free += pages

    def _grow(self, short: int) -> None:
        """By half of what it has, so that growth is rare; by no more than `short` where memory
        ends."""
        held = len(self.store)
        store = self._larger(max(short, held // 2))
        if store is None:
            store = self._larger(short)
        if store is None:
            wanted, free = held + short, free_bytes(self.store.device)
            fitting = max(held, free // self.page_bytes)  # of a store beside the present one
            raise InputError(
                f"context: keys and values of {wanted * PAGE} positions need "
                f"{wanted * self.page_bytes / 1e9:.1f} GB, {self.store.device} has "
                f"{free / 1e9:.1f} GB free: {fitting * PAGE} positions of all sequences would fit, "
                "more with fewer layers"
            )
        store[:held] = self.store
        self.store = store
        self.version += 1
        self._free += range(held, len(store))

    def _larger(self, count: int) -> torch.Tensor | None:
        """Zeros for so many pages more; None where memory does not suffice."""
        try:
            return self.store.new_zeros((len(self.store) + count, *self.store.shape[1:]))
        except torch.OutOfMemoryError:
            return None


class GpuCache(Lengths):
    """A table of pages for every sequence; grows as positions are asked for."""

    def __init__(self, config: ModelConfig, batch: int, arena: Arena) -> None:
        super().__init__(config, batch)
        self.arena = arena
        self._pages: list[int] = []
        self._numbers = torch.zeros(batch, 0, dtype=torch.int32, device="cpu")  # `table` there
        self.table = self._numbers.to(arena.store.device)
        weakref.finalize(self, arena.give, self._pages)

    @property
    def nbytes(self) -> int:
        return self.table.numel() * self.arena.page_bytes

    def reserve(self, length: int) -> None:
        """Room for so many positions of every sequence."""
        more = -(-length // PAGE) - self.table.shape[1]
        if more <= 0:
            return
        taken = self.arena.take(more * self.batch)
        self._pages += taken
        columns = torch.tensor(taken, dtype=torch.int32, device="cpu").view(self.batch, more)
        self._numbers = torch.cat((self._numbers, columns), dim=1)
        self.table = self._numbers.to(self.table.device)

    def truncate(self, lengths: int | Sequence[int] | torch.Tensor) -> None:
        """Clears what it takes back: what attention masks must be finite all the same."""
        before = self.positions.tolist()
        super().truncate(lengths)
        store, whole = self.arena.store, []
        for row, (end, was) in enumerate(zip(self.positions.tolist(), before, strict=True)):
            pages = self._numbers[row, end // PAGE : -(-was // PAGE)].tolist()
            if pages and end % PAGE:
                store[pages.pop(0), :, :, :, end % PAGE :] = 0
            whole += pages
        if whole:
            store[whole] = 0

    def advance(self, chosen: torch.Tensor, positions: torch.Tensor) -> None:
        """Slots `chosen` (B, S) are filled up to `positions` (B, T), -1 where nothing is."""
        ends = positions.amax(dim=1) + 1
        torch.maximum(self.lengths, torch.where(chosen, ends[:, None], 0), out=self.lengths)

    def append(
        self, slot: int, where: "Places", keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (R, G, T, E) keys and values; all that these rows hold then, (R, G, C, E) each.

        C is `where.context`, rounded up to pages; what lies beyond a sequence's own length is to
        be masked.
        """
        store = self.arena.store[:, slot]
        store[where.page, 0, :, where.offset] = keys[where.row, :, where.column]
        store[where.page, 1, :, where.offset] = values[where.row, :, where.column]
        pages = store[where.table].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        return pages[0], pages[1]


class Places:
    """Where a call's keys and values go, for some of the sequences of a cache."""

    def __init__(self, cache: GpuCache, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """`rows` (R,) and `positions` (R, T), -1 at padding, both int64 on the CPU."""
        device = cache.table.device
        own = cache.table[rows.to(device)].long()
        row, column = (positions >= 0).nonzero(as_tuple=True)
        place = positions[row, column]
        self.context = int(positions.max()) + 1
        self.table = own[:, : -(-self.context // PAGE)]
        self.row, self.column = row.to(device), column.to(device)
        self.page = own[self.row, (place // PAGE).to(device)]
        self.offset = (place % PAGE).to(device)
