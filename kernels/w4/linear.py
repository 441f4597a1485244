"""`W4Linear`, a drop-in for `nn.Linear` on packed weights, and the swap of a model's linears."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels.w4.format import Packed, Spec, expected_tensors, validate, zeros
from engine.kernels.w4.ops import Prepared, autocast, matmul, prepare, restore


class W4Linear(nn.Module):
    """x (..., K) -> x @ W.T + bias, (..., N) as x. x and the bias get gradients, W none.

    Made with weights of zero, or by `from_packed`. W lies in the layout of its backend, once, as
    buffers; casts leave it as it is, a move to another kind of device lays it out anew. A state
    dict holds `weight.codes`, `weight.scales` and so on, the format's own tensors, and loads from
    any device's. `backend` and `exact` are those of `ops.prepare` and `ops.matmul`; autocast casts
    x as it does for `nn.Linear`.
    """

    bias: nn.Parameter | None
    layout: str
    parts: tuple[str, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: Spec,
        bias: bool = True,
        *,
        backend: str | None = None,
        exact: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.backend, self.exact = backend, exact
        self.layout, self.parts = "", ()
        self.hold(zeros(spec, (out_features, in_features), device))
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        bias: Tensor | None = None,
        *,
        backend: str | None = None,
        exact: bool = False,
    ) -> "W4Linear":
        """A linear of these weights, with `bias` (N,) itself as its parameter."""
        n, k = packed.shape
        linear = cls(k, n, packed.spec, False, backend=None, exact=exact, device="meta")
        linear.backend = backend
        linear.hold(packed)
        if bias is not None:
            linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return linear

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return self.qweight.device

    @property
    def qweight(self) -> Tensor:
        """The first part, for its device: where peft looks for a quantized linear's."""
        return getattr(self, self.parts[0])

    @property
    def prepared(self) -> Prepared:
        """The weights as they lie here."""
        tensors = {part: getattr(self, part) for part in self.parts}
        return Prepared(self.spec, self.shape, self.layout, tensors)

    @property
    def packed(self) -> Packed:
        """The weights in the format's own tensors, made anew where a backend laid them out."""
        return restore(self.prepared)

    def hold(self, packed: Packed) -> None:
        """Replaces the weights. Raises what `ops.prepare` does, ValueError for another shape."""
        if (packed.spec, tuple(packed.shape)) != (self.spec, self.shape):
            raise ValueError(
                f"weights must be {self.shape} of {self.spec}, "
                f"found {packed.shape} of {packed.spec}"
            )
        meta = packed.device.type == "meta"
        prepared = prepare(packed, None if meta else self.backend)
        for part in self.parts:
            delattr(self, part)
        for part, tensor in prepared.tensors.items():
            self.register_buffer(part, tensor, persistent=False)
        self.layout, self.parts = prepared.backend, tuple(prepared.tensors)

    def forward(self, x: Tensor) -> Tensor:
        x = autocast(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return matmul(x, self.prepared, bias, self.exact)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={spec.bits}, group={spec.group}, "
            f"scheme={spec.scheme}, layout={self.layout}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "W4Linear":
        def moved(tensor: Tensor) -> Tensor:
            raw = tensor.view(torch.uint8)
            found = fn(raw)  # bytes, which .to() moves and never casts
            if found.dtype != torch.uint8:  # .type() does
                found = raw.to(found.device)
            return found.view(tensor.dtype)

        held = self.prepared.tensors
        for part in held:
            del self._buffers[part]
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers |= held
        target = fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device
        if target.type == self.device.type:
            self._buffers |= {part: moved(tensor) for part, tensor in held.items()}
        elif self.device.type == "meta":
            self.hold(zeros(self.spec, self.shape, target))
        else:
            packed = self.packed
            tensors = {name: moved(tensor) for name, tensor in packed.tensors().items()}
            self.hold(Packed(packed.spec, packed.shape, **tensors))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.packed.tensors().items():
            destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = f"{prefix}weight."
        rest = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        expected = [*expected_tensors(self.spec, self.shape), "perm"]
        found = {part: state_dict[start + part] for part in expected if start + part in state_dict}
        missing = [start + part for part in expected[:-1] if part not in found]
        missing_keys += missing
        known = {start + part for part in found}
        unexpected_keys += [key for key in state_dict if key.startswith(start) and key not in known]
        if missing:
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            packed = validate(Packed(self.spec, self.shape, **found), f"{prefix}weight")
            self.hold(packed if assign else packed.to(self.device))
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))


@dataclass(frozen=True)
class Replacement:
    """What `replace_linears` did, by names of modules."""

    replaced: tuple[str, ...]
    skipped: dict[str, str]  # name -> why it was left alone


def replace_linears(
    model: nn.Module,
    pack: Callable[[str, Tensor], Packed | None],
    skip: str | Sequence[str] = ("lm_head",),
    *,
    backend: str | None = None,
    exact: bool = False,
) -> Replacement:
    """Puts a `W4Linear` in the place of every `nn.Linear` in `model`; says what was left alone.

    `pack` is called with a module's name and its weight (N, K): it quantizes, or gives weights that
    were packed before, or None to leave the module alone. `skip` names modules, by any part of
    their dotted name: models that look at a linear's `weight` (T5 at that of `wo`) need it there.
    A weight that several modules share (tied heads) stays as it is, for they would part; so do
    linears with hooks, subclasses of `nn.Linear`, which may use their weight themselves, and other
    kinds, such as the `Conv1D` of GPT-2. A module that stands in several places is replaced in
    each.

    Goes from module to module, so that memory falls on the way; what `pack` raises leaves those
    before replaced. Biases stay the parameters that they were.
    """
    owners = _owners(model)
    made: dict[nn.Module, W4Linear] = {}
    replaced, skipped = [], {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Linear):
            continue
        reason = _reason(name, module, skip, owners)
        if reason is None and module not in made:
            packed = pack(name, module.weight.detach())
            if packed is None:
                reason = "no packed weight was given"
            else:
                made[module] = W4Linear.from_packed(
                    packed, module.bias, backend=backend, exact=exact
                ).train(module.training)
        if reason is None:
            model.set_submodule(name, made[module])
            replaced.append(name)
        else:
            skipped[name] = reason
    return Replacement(tuple(replaced), skipped)


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every parameter's modules, each with its (first) name."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, name))
    return owners


def _reason(name: str, module: nn.Linear, skip: str | Sequence[str], owners: Mapping) -> str | None:
    """Why a linear stays as it is."""
    if not name:
        return "is the model itself"
    named = {skip} if isinstance(skip, str) else set(skip)
    if named := named & {name, *name.split(".")}:
        return f"skip names {named.pop()}"
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not an nn.Linear itself"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "has hooks of its own"
    others = [other for owner, other in owners[module.weight] if owner is not module]
    return f"shares its weight with {', '.join(others)}" if others else None
