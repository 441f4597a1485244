"""Damaged files of every kind end in a result or in one sentence: some cases, drawn anew each time.

The long run is `make fuzz`; SECURITY.md has its figures.
"""

import torch
from fuzz.harness import fuzz

CASES, SECONDS = 120, 15.0


def test_no_file_does_more_than_be_refused(rng):
    seed = int(torch.randint(2**31, (1,), generator=rng))
    found = fuzz(seed, CASES, 1, SECONDS)
    assert not found["failed"], f"python -P tests/fuzz/harness.py --seed {seed} --only NUMBER"
    assert found["outcomes"]["refused"] > 0
