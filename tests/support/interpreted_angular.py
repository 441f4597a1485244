"""The Triton kernel interpreted: test_angular_triton.py runs this file in a child process."""

import numpy as np
import pytest
import torch
from support.angular_cases import CASES, DTYPES, boundaries
from triton.runtime.interpreter import InterpreterBuilder

from engine.kernels.angular import fused, reference
from engine.kernels.angular.accumulate import AngularAccumulator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CASES)
def test_equals_the_reference(rng, shape, dtype):
    x = boundaries(rng, *shape, dtype)
    weights = torch.rand(shape[1], generator=rng, dtype=torch.float64)
    weights[-1] = 0
    expected = reference.angular_sums(x, weights, values=True)
    got = fused.angular_sums(x, weights, values=True)
    assert (got.values - expected.values).abs().max() < 1e-7
    assert (got.sums - expected.sums).abs().max() < 1e-6
    assert torch.allclose(got.squares, expected.squares, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_older_triton_is_given_32_bits(rng, dtype, monkeypatch):
    """To the same sums: both are exact in float64."""
    x = boundaries(rng, 5, 3, 20, dtype)
    monkeypatch.setattr(fused, "WIDENS", False)
    expected = fused.angular_sums(x, values=True)
    read, one_tensor = [], fused._one_tensor
    monkeypatch.setattr(fused, "_one_tensor", lambda rows: read.append(rows) or one_tensor(rows))
    monkeypatch.setattr(fused, "WIDENS", True)
    got = fused.angular_sums(x, values=True)
    assert {row.dtype for rows in read for row in rows} == {torch.float32}
    assert torch.equal(got.sums, expected.sums) and torch.equal(got.values, expected.values)


def test_reads_each_feature_once(rng, monkeypatch):
    x = boundaries(rng, 33, 3, 70, torch.float32)
    reads = np.zeros(x.numel(), dtype=np.int64)
    load = InterpreterBuilder.create_masked_load

    def counted(self, pointers, mask, *rest):
        index = pointers.data[mask.data].astype(np.int64) - x.data_ptr()
        index = index[(index >= 0) & (index < x.nbytes)]
        np.add.at(reads, index // x.itemsize, 1)
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    fused.angular_sums(x)
    assert reads.min() == 1 and reads.max() == 1


def test_many_samples_a_program(rng, monkeypatch):
    x = boundaries(rng, 3, 7, 16, torch.float32)
    monkeypatch.setattr(fused, "PROGRAMS_PER_CORE", 2)
    assert torch.allclose(fused.angular_sums(x).sums, reference.angular_sums(x).sums)


def test_takes_separate_tensors(rng):
    x = boundaries(rng, 4, 3, 20, torch.float32)
    rows = [torch.cat([row, row], dim=1)[:, :20] for row in x]
    assert torch.allclose(fused.angular_sums(rows).sums, reference.angular_sums(x).sums)


def test_reports_the_vector(rng):
    x = boundaries(rng, 3, 5, 8, torch.float32)
    x[2, 4, 1] = torch.inf
    with pytest.raises(ValueError, match="boundary 2, sample 4"):
        AngularAccumulator("triton").update(x)
