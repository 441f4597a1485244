"""Sizes that a C++ header keeps and Python keeps, too: one changed alone would go unnoticed."""

import re
from pathlib import Path

import pytest
import scaling

from engine.architecture import schema
from engine.kernels import dispatch
from engine.kernels.layer import cuda
from engine.kernels.w4 import launch

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.parametrize(
    ("header", "name", "here"),
    [
        ("cpu/attention.h", "kMaxHeadDim", schema.MOST_HEAD),
        ("cpu/kv_cache.h", "kPage", scaling.PAGE),
        ("cpu/step.h", "kMaxSpans", scaling.MOST_SPANS),
        ("cuda/attention.h", "kMaxQueries", cuda.MAX_QUERIES),
        ("cuda/attention.h", "kMaxHeadWidth", cuda.MAX_WIDTH),
        ("cuda/attention.h", "kMaxSplits", cuda.MAX_SPLITS),
        ("cuda/w4_matmul.h", "kW4MaxRows", dispatch.CUDA_ROWS),
        ("cuda/w4_matmul.h", "kW4SliceColumns", launch.STRIPE_COLUMNS),
        ("cuda/w4_params.h", "kMaxWarps", launch.STRIPE_WARPS),
    ],
)
def test_a_header_and_python_keep_the_same_size(header, name, here):
    (there,) = re.findall(rf"constexpr [\w:]+ {name} = (\d+);", (CSRC / header).read_text())
    assert int(there) == here
