"""What several files of these tests are given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from reattend.codegen.files import cache
from tests.loading import benchmark


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """benchmarks/kernel_counts.py, with a cache of generated code of its own."""
    folder = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "directory", lambda: folder)
        # benchmarks find one another beside themselves
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield benchmark("kernel_counts")
