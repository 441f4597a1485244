"""A runtime and a tokenizer of a few lines that keep the protocol to the letter, for the loops."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch


class FakeCache:
    def __init__(self, batch: int, capacity: int):
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.capacity = capacity
        self.nbytes = batch * capacity * 8

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor([[len(seen)] * 3 for seen in self.tokens])

    def truncate(self, lengths) -> None:
        wanted = torch.as_tensor(lengths).expand(len(self.tokens)).tolist()
        for seen, length in zip(self.tokens, wanted, strict=True):
            assert 0 <= length <= len(seen), "longer than what the cache holds"
            del seen[length:]


class FakeRuntime:
    """Logits at a position depend on every id before it, in order, through a random table."""

    name = "fake"
    device = torch.device("cpu")
    dtype = torch.float32
    prefill_chunk = 80
    precision = "float32"
    weight_bytes = weight_bytes_per_token = 16384
    threads = 1

    def __init__(self, seed: int, vocab_size: int = 64, max_context: int = 256, eos_ids=()):
        rng = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(
            vocab_size=vocab_size,
            max_context=max_context,
            eos_ids=tuple(eos_ids),
            family="fake",
            layers=tuple(SimpleNamespace(layer=layer) for layer in (0, 1, 4)),
            total_layers=5,
            whole_prefill=False,
            rope_switch=None,
        )
        self.table = torch.randn(vocab_size, vocab_size, generator=rng)
        self.calls: list[tuple[torch.Size, object, str]] = []

    def new_cache(self, batch: int, capacity: int | None = None) -> FakeCache:
        return FakeCache(batch, capacity)

    def forward(self, tokens, cache, slots=None, logits="last"):
        self.calls.append((tokens.shape, slots, logits))
        out = torch.full((*tokens.shape, self.config.vocab_size), float("nan"))
        for row, (ids, seen) in enumerate(zip(tokens.tolist(), cache.tokens, strict=True)):
            for column, token in enumerate(ids):
                if token < 0:
                    assert all(i < 0 for i in ids[:column]), "padding after a token"
                    continue
                seen.append(token)
                assert len(seen) <= cache.capacity, "more tokens than the capacity asked for"
                if logits == "all" or column == len(ids) - 1:
                    out[row, column] = self.logits(seen)
        return out if logits == "all" else out[:, -1:]

    def logits(self, ids: list[int]) -> torch.Tensor:
        weights = 0.5 ** torch.arange(len(ids) - 1, -1, -1)
        return weights @ self.table[ids]


@dataclass
class FakeText:
    """Id i is the i-th string of `vocabulary`; encoding is one id a character (its code % V)."""

    vocabulary: list[str]
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    chat_template: str | None = None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        start = [self.bos_id] if add_special and self.bos_id is not None else []
        return start + [ord(c) % len(self.vocabulary) for c in text]

    def span_bytes(self, text: str, tokens: int) -> int:
        return len(text[:tokens].encode())

    def decode(self, ids, skip_special: bool = True) -> str:
        return "".join(self.vocabulary[i] for i in ids)

    def chat(self, messages: list[dict]) -> list[int]:
        return self.encode("".join(m["content"] for m in messages))

    def piece_stream(self):
        return _Pieces(self)


class _Pieces:
    """Keeps one id back until the next or the end, as a real stream does with partial UTF-8."""

    def __init__(self, text: FakeText):
        self.text, self.kept = text, []

    def push(self, token: int) -> str:
        ready, self.kept = self.kept, [token]
        return self.text.decode(ready)

    def finish(self) -> str:
        ready, self.kept = self.kept, []
        return self.text.decode(ready)
