"""Matrices whose scales and minimums learn: what they compute, their gradients, what is stored."""

import pytest
import torch
from support.close import assert_close
from support.ops_checks import SPECS, case
from support.packed import every_spec, random_packed, spec_id

from engine.kernels.w4.embedding import W4Embedding
from engine.kernels.w4.format import SUPER, Packed, steps, unpack, validate
from engine.kernels.w4.learning import LearningEmbedding, LearningLinear

every_spec_kind = pytest.mark.parametrize("spec", SPECS, ids=spec_id)


def learnt(rng, packed: Packed, bias=None) -> LearningLinear:
    """After steps of a few per cent."""
    linear = LearningLinear(packed, bias)
    with torch.no_grad():
        for parameter in linear.changes().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return linear


def formula(linear: LearningLinear, scale: torch.Tensor, minimum) -> torch.Tensor:
    """W (N, K) float64 by the docstring, unrounded."""
    given = linear.given
    if given.supers is None:
        units, offsets = given.scales.double(), given.mins
    else:
        units, offsets = given.supers.double().unbind(-1)
    scales, mins = units * (1 + scale), 0 * scale
    if minimum is not None:
        mins = offsets.double() + units * minimum
    if given.supers is not None:
        scales, mins = (
            t.repeat_interleave(SUPER // 32, 1)[:, : given.groups] * part.double() * sign
            for t, part, sign in ((scales, given.scales, 1), (mins, given.mins, -1))
        )
    values = steps(given).double() * scales[..., None] + mins[..., None]
    values = values.flatten(1)[:, : given.shape[1]]
    return values if given.perm is None else values[:, given.perm.argsort()]


@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_untaught_it_is_what_was_given(rng, spec):
    packed = random_packed(rng, 5, 90, spec, bool(torch.randint(2, (), generator=rng)))
    linear, x = LearningLinear(packed), torch.randn(3, 90, generator=rng)
    stored = linear.packed.tensors()
    assert stored.keys() == packed.tensors().keys() and linear.packed.spec == spec
    assert all(torch.equal(stored[name], tensor) for name, tensor in packed.tensors().items())
    assert_close("y", x @ unpack(packed).T, linear(x), 1e-6)


@every_spec_kind
def test_it_computes_what_it_stores(rng, spec):
    packed = case(rng, spec)
    linear = learnt(rng, packed, torch.randn(34, generator=rng))
    stored = validate(linear.packed)
    assert stored.spec == spec and stored.nbytes == packed.nbytes
    assert not torch.equal(unpack(stored), unpack(packed))
    for name in {"codes", "zeros", "codebook", "perm"} & packed.tensors().keys():
        assert torch.equal(stored.tensors()[name], packed.tensors()[name])
    x = torch.randn(2, 7, 201, generator=rng)
    assert_close("y", x @ unpack(stored).T + linear.bias, linear(x), 1e-6)
    ids = torch.randint(34, (2, 9), generator=rng)
    assert torch.equal(linear.rows(ids), unpack(stored)[ids])
    embedding = W4Embedding(stored, 1.0, torch.float32)
    assert torch.equal(embedding(ids), unpack(stored)[ids])
    scaled = W4Embedding(stored, 48**0.5, torch.bfloat16)(ids)  # both rounded first, as Gemma's are
    assert torch.equal(scaled, unpack(stored).bfloat16()[ids] * torch.tensor(48**0.5).bfloat16())
    learning = {name for name, parameter in linear.named_parameters() if parameter.requires_grad}
    assert learning == linear.changes().keys()
    for rows in (linear.rows, embedding):
        with pytest.raises(IndexError, match="ids must be from 0 to 33, found -1"):
            rows(torch.tensor([[3, -1]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


@pytest.mark.parametrize("embeds", [False, True])
@every_spec_kind
def test_gradients(rng, spec, embeds):
    """Against autograd in float64 through the formula; as an embedding too."""
    linear = learnt(rng, case(rng, spec))
    wide = [parameter.detach().double().requires_grad_() for parameter in linear.changes().values()]
    weight = formula(linear, *wide, *[None] * (2 - len(wide)))
    if embeds:
        ids = torch.randint(34, (40,), generator=rng)
        y, expected = LearningEmbedding(linear, 1.5)(ids), 1.5 * weight[ids]
    else:
        x = torch.randn(40, 201, generator=rng)
        y, expected = linear(x), x.double() @ weight.T
    dy = torch.randn(y.shape, generator=rng)
    found = torch.autograd.grad(y, list(linear.changes().values()), dy)
    for ours, right in zip(found, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        assert_close("gradient", right, ours, 1e-5)
