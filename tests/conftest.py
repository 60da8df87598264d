"""What every test process shares: which tier it runs, no network, one thread per worker, goldens."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from . import tiers
from .cpu_times import CpuTimes

# Set before anything imports torch or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
# What is chosen must not depend on the machine: the shipped numbers, without a calibration of it.
os.environ["REATTEND_CALIBRATION"] = ""
# Nor on the width of a screen.
os.environ["COLUMNS"] = "160"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Two workers share two cores with compilers: time says nothing about a property. CI repeats one fixed set of draws.
settings.register_profile(
    "reattend", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
# A mutant is caught by the same draws each time, and nobody reads the smallest of them.
settings.register_profile(
    "mutation",
    settings.get_profile("reattend"),
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
# The fast tier draws a few of each; the slow tier, which runs everything, draws hypothesis' own hundred.
settings.register_profile("fast", settings.get_profile("reattend"), max_examples=20)
settings.load_profile("reattend")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="accept what the code prints now as the golden text")
    parser.addoption(
        "--cpu-times", type=Path, metavar="FILE", help="append the CPU seconds of each test and fixture (tests/cpu_times.py)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" in config.getoption("-m") and settings.get_current_profile_name() == "reattend":
        settings.load_profile("fast")
    if config.getoption("--cpu-times") is not None:
        config.pluginmanager.register(CpuTimes(config.getoption("--cpu-times")))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Few files hold interpreted kernels: their process imports no other, and the other process none that has only these."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    if INTERPRETED:
        return True if "pytest.mark.interpreter" not in text else None
    return True if re.search(r"^pytestmark = \[?pytest\.mark\.interpreter\b", text, re.MULTILINE) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of this process's tier: interpreted kernels under TRITON_INTERPRET=1, all others without it."""
    kept = [i for i in items if (i.get_closest_marker("interpreter") is not None) == INTERPRETED]
    dropped = [i for i in items if (i.get_closest_marker("interpreter") is not None) != INTERPRETED]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    tiers.thin_out(items)
    for item in items:
        if not HAS_TRITON and any(item.get_closest_marker(m) for m in ("interpreter", "aot")):
            item.add_marker(pytest.mark.skip(reason="needs triton: pip install 'reattend[triton]'"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the collector does not walk it again with every model that is built and dropped."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end it may: bindings count what is never freed, and say so."""
    gc.unfreeze()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares text with the file golden/<name> beside the test; --update-golden accepts it."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden file {path.name}: run pytest --update-golden and read what it writes"
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random weights and inputs repeat; torch is not loaded for tests that do without it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of an earlier run is read: a test may change what makes it, or count that it is made."""
    if "torch" in sys.modules and not INTERPRETED:
        from reattend.rewriter.run import kept

        monkeypatch.setattr(kept, "recall", lambda *_: None)
