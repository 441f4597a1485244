"""How a module's quantized weight is stored: GPTQ, AWQ, compressed-tensors, bitsandbytes' 4 bits,
and this project's own packed directories. A class a method: it reads its configuration once, then
any module.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from engine.checkpoint.files import parse_json
from engine.checkpoint.safetensors import SafetensorsCheckpoint
from engine.errors import InputError
from engine.kernels.w4 import from_hf, store
from engine.kernels.w4.format import GROUPS, Packed, Spec, unpack

GROUP_SIZES = (-1, *GROUPS[1:])  # as the configurations write them; -1 is the whole row


class Parts:
    """The tensors of a module by their part names."""

    def __init__(self, stored: SafetensorsCheckpoint) -> None:
        self.path, self._stored = stored.path, stored
        self._names, self._metadata = set(stored.names()), stored.metadata

    def read(self, module: str, part: str) -> torch.Tensor:
        self._require(module, part)
        return self._stored.read(f"{module}.{part}")

    def read_if_present(self, module: str, part: str) -> torch.Tensor | None:
        return self.read(module, part) if f"{module}.{part}" in self._names else None

    def shape(self, module: str, part: str, dimensions: int) -> tuple[int, ...]:
        self._require(module, part)
        shape = self._stored.shape(f"{module}.{part}")
        if len(shape) != dimensions:
            raise InputError(
                f"{self.path}: {module}: {part} must have {dimensions} dimensions, found {shape}"
            )
        return shape

    def nbytes(self, module: str, part: str) -> int:
        """0 where there is none."""
        name = f"{module}.{part}"
        return self._stored.nbytes(name) if name in self._names else 0

    def described(self, name: str) -> str | None:
        """What the file's metadata says of `name`."""
        return self._metadata.get(name)

    def _require(self, module: str, part: str) -> None:
        if f"{module}.{part}" not in self._names:
            raise InputError(f"{self.path}: {module}: tensor {part!r} is missing")

    def choose(self, key: str, found: Any, allowed: tuple) -> Any:
        """`found`; InputError where the configuration's `key` is none of the allowed values."""
        if not any(found == value and type(found) is type(value) for value in allowed):
            raise InputError(
                f"{self.path}: quantization_config: {key} must be "
                f"{' or '.join(map(repr, allowed))}, found {found!r}"
            )
        return found


class Method(ABC):
    """`marker` is the part that every quantized module has and no other."""

    marker: str
    parts: tuple[str, ...]

    def __init__(self, tensors: Parts, config: dict[str, Any]) -> None:
        self.tensors = tensors

    @abstractmethod
    def shape(self, module: str) -> tuple[int, int]:
        """(N, K) of a module, from its parts' shapes alone."""

    @abstractmethod
    def packed(self, module: str) -> Packed | None:
        """The module in the packed format; None where that cannot hold it without loss."""

    def spec(self, module: str) -> Spec | None:
        """Of `packed`, as far as that is known without making it."""
        return None

    def read(self, module: str) -> torch.Tensor:
        """(N, K) float32, by the source's formula."""
        packed = self.packed(module)
        assert packed is not None  # the one method that may have none reads by itself
        return unpack(packed)


class _Gptq(Method):
    marker, parts = "qweight", ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, tensors: Parts, config: dict[str, Any]) -> None:
        super().__init__(tensors, config)
        tensors.choose("pack_dtype", config.get("pack_dtype", "int32"), ("int32",))
        for key in ("rotation", "activation"):  # GPTQModel's, of what flows through
            tensors.choose(key, config.get(key) or None, (None,))
        written = config.get("checkpoint_format", config.get("format", "gptq"))
        tensors.choose("checkpoint_format", written, ("gptq", "gptq_v2"))
        self.zero_offset = 1 if written == "gptq" else 0
        meta = config.get("meta")
        self.borrowed = "gptqmodel:" in str(meta.get("quantizer") if isinstance(meta, dict) else "")
        rules = self._rules("dynamic", config)
        self.settings = [self._setting(rule) for rule in (config, *(config | r for r in rules))]

    def _rules(self, key: str, config: dict[str, Any]) -> list[dict[str, Any]]:
        """What `key` says of certain modules, whatever these are: their tensors tell."""
        rules = config.get(key) or {}
        if not isinstance(rules, dict) or not all(isinstance(r, dict) for r in rules.values()):
            raise InputError(
                f"{self.tensors.path}: quantization_config: {key} must be an object of objects, "
                f"found {rules!r:.200}"
            )
        return [rule for rule in rules.values() if rule]

    def _setting(self, config: dict[str, Any]) -> tuple[int, int]:
        """(bits, group size)."""
        choose = self.tensors.choose
        group = choose("group_size", config.get("group_size", -1), GROUP_SIZES)
        return choose("bits", config.get("bits"), (4, 8)), group

    def _fitting(self, module: str) -> tuple[int, int]:
        """The setting that the shapes of a module belong to."""
        rows, _ = self.tensors.shape(module, "qweight", 2)
        groups, n = self.tensors.shape(module, "scales", 2)
        _, words = self.tensors.shape(module, "qzeros", 2)
        fitting = [s for s in self.settings if words == -(-n * s[0] // 32)] or self.settings
        for bits, group in fitting:
            k = self._k(module, rows, bits)
            if groups == Spec(bits, max(group, 0), "zero").groups(k):
                return bits, group
        return fitting[0]  # its conversion names what disagrees

    def _k(self, module: str, rows: int, bits: int) -> int:
        if self.tensors.read_if_present(module, "g_idx") is None:
            return rows * 32 // bits
        return self.tensors.shape(module, "g_idx", 1)[0]

    def shape(self, module: str) -> tuple[int, int]:
        rows, n = self.tensors.shape(module, "qweight", 2)
        return n, self._k(module, rows, self._fitting(module)[0])

    def packed(self, module: str) -> Packed:
        bits, group = self._fitting(module)
        return from_hf.gptq(
            self.tensors.read(module, "qweight"),
            self.tensors.read(module, "qzeros"),
            self.tensors.read(module, "scales"),
            self.tensors.read_if_present(module, "g_idx"),
            bits=bits,
            group=group,
            zero_offset=self.zero_offset,
            borrowed=self.borrowed,
            name=module,
        )


class _AutoRound(_Gptq):
    """auto-round's own format, where it packs as GPTQ does."""

    def __init__(self, tensors: Parts, config: dict[str, Any]) -> None:
        packing = config.get("packing_format")
        tensors.choose("packing_format", packing, ("auto_round:auto_gptq",))
        for key, usual in (("data_type", "int"), ("act_bits", 16)):
            tensors.choose(key, config.get(key) or usual, (usual,))
        super().__init__(tensors, config)
        extra = [rule for rule in self._rules("extra_config", config) if rule.get("bits") != 16]
        self.settings += [self._setting(config | rule) for rule in extra]


class _Awq(Method):
    marker, parts = "qweight", ("qweight", "qzeros", "scales")

    def __init__(self, tensors: Parts, config: dict[str, Any]) -> None:
        super().__init__(tensors, config)
        tensors.choose("bits", config.get("bits"), (4,))
        self.group = tensors.choose("group_size", config.get("group_size"), GROUP_SIZES)
        version = config.get("version", config.get("format", "gemm"))
        tensors.choose("version", str(version).lower(), ("gemm",))

    def shape(self, module: str) -> tuple[int, int]:
        k, _ = self.tensors.shape(module, "qweight", 2)
        return self.tensors.shape(module, "scales", 2)[1], k

    def packed(self, module: str) -> Packed:
        parts = (self.tensors.read(module, part) for part in self.parts)
        return from_hf.awq(*parts, group=self.group, name=module)


class _CompressedTensors(Method):
    marker = "weight_packed"
    parts = (marker, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(self, tensors: Parts, config: dict[str, Any]) -> None:
        super().__init__(tensors, config)
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise InputError(f"{tensors.path}: quantization_config: config_groups is missing")
        tensors.choose("transform_config", config.get("transform_config") or None, (None,))
        sparsity = config.get("sparsity_config") or None  # "dense": no more than a count of zeros
        dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
        tensors.choose("sparsity_config", None if dense else sparsity, (None,))
        self.settings = [self._setting(group, config.get("format")) for group in groups.values()]

    def _setting(self, group: Any, written: Any) -> tuple[int, int]:
        """(bits, group size) of one configuration group."""
        choose = self.tensors.choose
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise InputError(
                f"{self.tensors.path}: quantization_config: a group of config_groups must hold "
                f"an object 'weights', found {group!r}"
            )
        choose("format", group.get("format") or written, ("pack-quantized",))
        for key in ("input_activations", "output_activations"):
            choose(key, group.get(key), (None,))
        choose("type", weights.get("type", "int"), ("int",))
        bits = choose("num_bits", weights.get("num_bits"), (4, 8))
        if choose("strategy", weights.get("strategy"), ("group", "channel")) == "channel":
            return bits, -1
        return bits, choose("group_size", weights.get("group_size"), GROUP_SIZES[1:])

    def shape(self, module: str) -> tuple[int, int]:
        self.tensors.shape(module, "weight_shape", 1)
        shape = self.tensors.read(module, "weight_shape").tolist()
        if len(shape) != 2 or not all(map(_is_size, shape)):
            raise InputError(
                f"{self.tensors.path}: {module}: weight_shape must be two positive integers, "
                f"found {shape}"
            )
        return tuple(shape)

    def packed(self, module: str) -> Packed:
        shape = self.shape(module)
        words = self.tensors.read(module, "weight_packed")
        scale = self.tensors.read(module, "weight_scale")
        bits, group = self._fitting(shape[1], words.shape[-1:], scale.shape[-1:])
        return from_hf.compressed_tensors(
            words,
            scale,
            shape,
            self.tensors.read_if_present(module, "weight_zero_point"),
            self.tensors.read_if_present(module, "weight_g_idx"),
            bits=bits,
            group=group,
            name=module,
        )

    def _fitting(self, k: int, words: tuple, scales: tuple) -> tuple[int, int]:
        """The setting that K and the stored widths belong to: they tell any two apart."""
        fitting = [s for s in self.settings if words == (-(-k * s[0] // 32),)] or self.settings
        for bits, group in fitting:
            if scales == (Spec(bits, max(group, 0), "symmetric").groups(k),):
                return bits, group
        return fitting[0]  # its conversion names what disagrees


class _BitsAndBytes(Method):
    """NF4 and FP4, whose sixteen values lie beside the codes."""

    nested = ("weight.nested_quant_map", "weight.nested_absmax")

    def __init__(self, tensors: Parts, config: dict[str, Any]) -> None:
        super().__init__(tensors, config)
        tensors.choose("load_in_8bit", config.get("load_in_8bit", False), (False,))
        kind = config.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
        self.kind = tensors.choose("bnb_4bit_quant_type", kind, ("nf4", "fp4"))
        self.marker = f"weight.quant_state.bitsandbytes__{self.kind}"
        self.parts = (self.marker, "weight", "weight.absmax", "weight.quant_map", *self.nested)

    def shape(self, module: str) -> tuple[int, int]:
        return tuple(self._state(module)["shape"])

    def packed(self, module: str) -> Packed | None:
        return self._load(module, from_hf.nf4)

    def read(self, module: str) -> torch.Tensor:
        return self._load(module, from_hf.nf4_values)

    def _load(self, module: str, convert: Callable[..., Any]) -> Any:
        state = self._state(module)
        stored = self.tensors.read(module, "weight")  # bytes, whatever bnb_4bit_quant_storage says
        return convert(
            stored.flatten().view(torch.uint8),
            self._absmax(module, state),
            self.tensors.read(module, "weight.quant_map"),
            tuple(state["shape"]),
            blocksize=state["blocksize"],
            name=module,
        )

    def _absmax(self, module: str, state: dict[str, Any]) -> torch.Tensor:
        absmax = self.tensors.read(module, "weight.absmax")
        if "nested_blocksize" not in state:
            return absmax
        return from_hf.nf4_absmax(
            absmax,
            *(self.tensors.read(module, part) for part in self.nested),
            nested_blocksize=state["nested_blocksize"],
            nested_offset=state.get("nested_offset", 0.0),
            name=module,
        )

    def _state(self, module: str) -> dict[str, Any]:
        where = f"{self.tensors.path}: {module}: quant_state"
        stored = self.tensors.read(module, self.marker)
        state = parse_json(stored.flatten().view(torch.uint8).numpy().tobytes(), where)
        sizes = state.get("shape")
        checks = {
            "quant_type": state.get("quant_type") == self.kind,
            "shape": isinstance(sizes, list) and len(sizes) == 2 and all(map(_is_size, sizes)),
            "blocksize": _is_size(state.get("blocksize")),
            "nested_blocksize": _is_size(state.get("nested_blocksize", 1)),
            "nested_offset": _is_finite(state.get("nested_offset", 0.0)),
        }
        for key, right in checks.items():
            if not right:
                raise InputError(f"{where}: {key} cannot be {state.get(key)!r}")
        return state


class _Packed(Method):
    """Written by this project: kernels/w4/store.py."""

    parts = tuple(f"weight.{part}" for part in store.PARTS)

    def __init__(self, tensors: Parts, config: dict[str, Any]) -> None:
        super().__init__(tensors, config)
        self.version = config.get("version", store.VERSION)
        if type(self.version) is not int or not 1 <= self.version <= store.VERSION:
            raise InputError(
                f"{tensors.path}: a packed directory of version {self.version!r}; this Shallow "
                f"reads 1 to {store.VERSION}, another one is needed"
            )
        self.marker = "weight.codes" if self.version == 1 else "weight.tiles"

    def shape(self, module: str) -> tuple[int, int]:
        return store.parse_metadata(f"{module}.weight", self._described(module))[1]

    def spec(self, module: str) -> Spec:
        return store.parse_metadata(f"{module}.weight", self._described(module))[0]

    def packed(self, module: str) -> Packed:
        def read(name: str) -> torch.Tensor:
            return self.tensors.read(module, name.removeprefix(f"{module}."))

        name, described = f"{module}.weight", self._described(module)
        return store.from_tensors(name, read, described, self.version)

    def _described(self, module: str) -> str:
        described = self.tensors.described(f"{module}.weight")
        if described is None:
            raise InputError(f"{self.tensors.path}: {module}.weight: its metadata is missing")
        return described


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # far above any use; NaN is not


METHODS: dict[str, Callable[[Parts, dict[str, Any]], Method]] = {
    "gptq": _Gptq,
    "auto-round": _AutoRound,
    "awq": _Awq,
    "compressed-tensors": _CompressedTensors,
    "bitsandbytes": _BitsAndBytes,
    store.METHOD: _Packed,
}
