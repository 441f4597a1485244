"""GGUF files, for llama.cpp and what is built on it.

Matrices keep their bits: packed ones become blocks of the same values (`gguf_blocks`), the blocks
of a GGUF pass through, plain ones stay as they are. Vectors and norms are float32, as llama.cpp
wants them. q and k rows are interleaved and Gemma's norms offset as its converter does.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf import GgufCheckpoint
from engine.checkpoint.gguf_blocks import GgufBlocks
from engine.checkpoint.gguf_names import EMBEDDING, FINAL_NORM, HEAD, LAYER_NAMES, PERMUTED
from engine.checkpoint.weights import Stored
from engine.errors import InputError
from engine.export import gguf_copy
from engine.export.directory import plain
from engine.export.gguf_blocks import to_blocks
from engine.export.gguf_fields import architecture, model_fields, require_said, rope_tensors
from engine.export.gguf_file import Place, Progress, Value, require_name, typed_fields, write_gguf
from engine.export.tensors import Item, Unsupported, stored_tensors
from engine.kernels.w4.format import Packed, unpack_codes
from engine.text import load_text
from engine.text.to_gguf import to_gguf

_OUTER = {"embedding": EMBEDDING, "norm": FINAL_NORM, "head": HEAD}
_PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}  # that llama.cpp asks of one by that name
_PADDED = ("embedding", "head")  # roles with a row a token
_TYPE_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# general.file_type by the type that most matrices have; a mixture is called by that too.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
_FILE_TYPES |= {"Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32}


class Gguf:
    """`dtype` is of matrices that are not quantized; a GGUF is copied where none is given."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None
    ) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, config, dtype
        self.source = None  # a GGUF that is copied as it is
        if isinstance(checkpoint, GgufCheckpoint) and dtype is None:
            self.source = checkpoint
        self.places: dict[int | None, list[Place]] = {}  # by slot
        self.fields: dict[str, Value] = {}
        self.lowest = ""  # a matrix with a code of -128
        self.rows = config.vocab_size  # of embedding and head; fewer where they are padded
        if self.source is None:
            self.vectors = rope_tensors(config)

    def look(self, item: Item, stored: Stored) -> None:
        if self.source is None:
            kind, _ = self._encoded(item, stored)
            if kind == "Q8_0" and isinstance(stored, Packed) and not unpack_codes(stored).all():
                self.lowest = item.source
            self.places.setdefault(item.slot, []).append(Place(self._name(item), kind, item.shape))

    def ready(self) -> None:
        if self.source is not None:
            return gguf_copy.require_cut(self.source, self.config)
        if self.lowest:
            warnings.warn(
                f"{self.checkpoint.path}: {self.lowest} has codes of -128, which no quantizer of "
                "llama.cpp's writes: ik_llama.cpp takes them for others on AVX-512",
                stacklevel=2,
            )
        name, tokenizer = architecture(self.config), self._tokenizer()
        places = [place for slot in self.places.values() for place in slot]
        kinds = Counter(place.type for place in places if len(place.shape) == 2)
        general = {
            "general.architecture": name,
            "general.type": "model",
            "general.name": self._named(tokenizer),
            "general.file_type": _FILE_TYPES[kinds.most_common(1)[0][0]],
            "general.quantization_version": 2,
        }
        said = {f"{name}.{key}": value for key, value in model_fields(self.config).items()}
        if self.config.family == "gemma3":  # as llama.cpp's converter trims its padding
            self.rows = len(tokenizer["tokenizer.ggml.tokens"].value)
            said[f"{name}.vocab_size"] = self.rows
        self.fields = typed_fields(general | said) | tokenizer
        metadata = {key: field.value for key, field in self.fields.items()}
        require_said(self.config, metadata, {place.name: place.tensor for place in places})

    def write(self, out: Path, progress: Progress | None) -> None:
        if self.source is not None:
            return gguf_copy.copy(self.source, self.config, out, progress)
        require_name(out)
        ropes = [Place(name, "F32", (len(values),)) for name, values in self.vectors.items()]
        whole = [self._trimmed(place) for slot in self.places.values() for place in slot]
        write_gguf(
            out, self.checkpoint.path, self.config, self.fields, ropes + whole, self._data, progress
        )

    def _data(self, first: int) -> Iterator[torch.Tensor]:
        """The bytes of the tensors, from that one on."""
        for values in list(self.vectors.values())[first:]:
            yield torch.tensor(values, dtype=torch.float32).view(torch.uint8)
        skip = max(first - len(self.vectors), 0)
        for slot, places in self.places.items():
            if skip >= len(places):
                skip -= len(places)
                continue
            pairs = stored_tensors(self.checkpoint, self.config, slot)
            for item, stored in islice(pairs, skip, None):
                _, data = self._encoded(item, stored)
                yield data[: self.rows] if item.role in _PADDED else data
            skip = 0

    def _trimmed(self, place: Place) -> Place:
        if place.name not in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
            return place
        return replace(place, shape=(self.rows, *place.shape[1:]))

    def _encoded(self, item: Item, stored: Stored) -> tuple[str, torch.Tensor]:
        """GGUF type, and bytes (..., bytes a row) uint8 with rows in llama.cpp's order."""
        where = f"{self.checkpoint.path}: {item.source}"
        if isinstance(stored, Packed):
            found = to_blocks(stored)
            if isinstance(found, str):
                raise Unsupported(f"{item.source}: {found}")
            stored = found
        if isinstance(stored, GgufBlocks):
            return stored.type, self._rows(item, stored.data)
        if len(item.shape) == 1:
            tensor = plain(stored, torch.float32, where)
            if item.role.endswith("norm"):
                tensor = tensor + self.config.norm_offset
        else:
            tensor = plain(stored, self.dtype, where)
        return _TYPE_OF[tensor.dtype], self._rows(item, tensor).contiguous().view(torch.uint8)

    def _rows(self, item: Item, rows: torch.Tensor) -> torch.Tensor:
        """q and k for interleaved RoPE: (2, E / 2) of every head as (E / 2, 2)."""
        heads = {"q": self.config.heads, "k": self.config.kv_heads}.get(item.role.partition(".")[0])
        if heads is None or architecture(self.config) not in PERMUTED:
            return rows
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def _name(self, item: Item) -> str:
        role, _, kind = item.role.partition(".")
        suffix = kind or "weight"
        if item.slot is None:
            return f"{_OUTER[role]}.{suffix}"
        return f"blk.{item.slot}.{LAYER_NAMES[role]}.{suffix}"

    def _named(self, tokenizer: dict[str, Value]) -> str:
        """llama.cpp knows Phi-3's tags, behind which white space is left out, by this name, and
        opens no other model that is called so."""
        name = self.checkpoint.path.name.removesuffix(".gguf")
        if not _PHI3_TOKENS.issubset(tokenizer["tokenizer.ggml.tokens"].value):
            return re.sub(r"(?i)(phi)-?(?=3)", r"\1 ", name)
        if architecture(self.config) != "phi3" or "phi3" in name.lower().replace("-", ""):
            return name
        tagged = tokenizer["tokenizer.ggml.model"].value == "llama"  # Phi-4's are not
        return f"Phi-3 {name}" if tagged else name

    def _tokenizer(self) -> dict[str, Value]:
        """Of a GGUF as it is, of a directory as its tokenizer does."""
        if isinstance(self.checkpoint, GgufCheckpoint):
            metadata = self.checkpoint.file.metadata
            return {
                key: Value(metadata[key], *metadata.kind(key))
                for key in metadata
                if key.startswith("tokenizer.")
            }
        try:
            text = load_text(self.checkpoint.path)
            trimmed = max(text.tokenizer.get_vocab().values()) + 1
            rows = self.config.vocab_size
            size = min(trimmed, rows) if self.config.family == "gemma3" else rows
            return typed_fields(to_gguf(text, size, architecture(self.config)))
        except InputError as error:
            raise Unsupported(str(error)) from None
