"""Scripts that no package holds as modules, for the tests of what stands in them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def benchmark(name: str) -> ModuleType:
    """The script benchmarks/<name>.py, loaded."""
    return script(f"benchmarks/{name}.py")


def script(where: str) -> ModuleType:
    """A script of the repository, loaded."""
    path = Path(__file__).resolve().parents[1] / where
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
