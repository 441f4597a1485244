"""Tests by an oracle that errs in some of the versions that pyproject.toml allows."""

import pytest
import transformers
from packaging.version import Version


def skip_before(version: str, why: str) -> None:
    """Skips the test where transformers is older than the first that does not err."""
    if Version(transformers.__version__) < Version(version):
        pytest.skip(f"transformers before {version} {why}")
