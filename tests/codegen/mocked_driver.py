"""A CUDA driver that is not there: Triton binds, specialises, compiles and launches as for an H200, on tensors of the host.

    python -m tests.codegen.mocked_driver    launches the kernels of `CASES` and prints what Triton was asked for, as JSON,
                                             beside what the ahead-of-time path would ask for

Replaces the driver of the whole process, so that no test may import it: they start it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reattend.codegen.files import cache
from reattend.codegen.triton import aot
from reattend.codegen.triton.holes import needs_lists
from reattend.codegen.triton.kernel import TritonKernel, build
from reattend.patterns import expr as ex
from reattend.patterns.evaluate import DTYPE
from reattend.patterns.mapping import TileMapping

from .. import strategies
from ..strategies import INF, M, P, Program, attention


@dataclass(frozen=True)
class Asked:
    """What Triton compiles for one launch, as text: arguments by their path, absent where there is nothing to say."""

    function: str
    signature: Mapping[str, str]
    literals: Mapping[str, str]
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class Launch:
    """One launch that the driver was given."""

    asked: Asked
    grid: tuple[int, int, int]


class Utilities:
    """Of an H200: what Triton compares a kernel's shared memory with, and a binary that loads."""

    def get_device_properties(self, device: int) -> Mapping[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, *given: Any) -> tuple[int, ...]:
        """Module, function, registers, spilled bytes, threads at most."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        return None


class Driver:
    """Answers Triton's questions about the device, and keeps every launch."""

    utils = Utilities()

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, *given: Any, **more: Any) -> None:
            asked = asked_of(source.fn, source.signature, source.constants, source.attrs)
            self.launches.append(Launch(asked, (x, y, z)))

        return launch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True


# --- what is compared -------------------------------------------------------------------------------------------------


def asked_of(
    function: Any, signature: Mapping[str, Any], literals: Mapping[Any, Any], attributes: Mapping[Any, Any]
) -> Asked:
    return Asked(
        str(function.__name__),
        {name: str(kind) for name, kind in signature.items()},
        {str(path): _value(v) for path, v in sorted(literals.items())},
        {str(path): str(a) for path, a in sorted(attributes.items()) if a},
    )


def _value(v: Any) -> str:
    """A function by its name: its text would hold where in memory it lies."""
    return str(getattr(v, "__name__", v))


def ahead(request: aot.CompileRequest) -> Asked:
    return asked_of(request.function, request.signature, request.literals, request.attributes)


# --- the kernels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An attention, the mapping that it is launched with, how many row blocks of programs that takes, its heads."""

    program: Program
    mapping: TileMapping
    grid: int
    heads: int


def _case(mapping: TileMapping, programs: int, rows: int, **given: Any) -> Case:
    keep = given.pop("keep", ex.TRUE)
    row = strategies.ROWS[given.pop("row", "softmax")]
    made = attention(lambda s: ex.where(keep, s, -INF), row, e=64, f=64, dtype="bf16", **given)
    return Case(made, mapping, programs * -(-rows // mapping.tile_p) * mapping.split_m, given["h"])


def cases() -> Mapping[str, Case]:
    """Odd lengths: Triton treats multiples of 16 in a launch as it treats strides, and nobody knows them beforehand."""
    padding = (M <= P) & strategies.MASKS["padding"]
    return {
        "plain": _case(TileMapping(64, 64), 2 * 4, 77, b=2, h=4, p=77, m=77),
        "causal": _case(TileMapping(64, 32), 2 * 4, 77, b=2, h=4, p=77, m=77, keep=M <= P),
        "causal, padded, grouped": _case(TileMapping(64, 64), 2 * 8, 77, b=2, h=8, group=2, p=77, m=77, keep=padding),
        "sinks": _case(TileMapping(32, 64), 4, 77, h=4, p=77, m=77, keep=M <= P, row="sink"),
        "decode, split": _case(TileMapping(16, 64, split_m=4), 2 * 4, 8, b=2, h=32, group=8, p=1, m=301),
    }


def kernel(case: Case) -> TritonKernel:
    c = case.program.cascade
    if "t" in c.free_symbols and "s" in c.free_symbols:
        c = c.with_sizes({"s": case.program.sizes["s"]})
    made = build(c, case.mapping, "sm_90")
    assert isinstance(made, TritonKernel), made
    return made


def run(made: TritonKernel, sizes: Mapping[str, int]) -> None:
    bound = made.cascade.with_sizes(sizes)
    tensors = {t.name: torch.zeros([int(n) for n in t.shape], dtype=DTYPE[t.dtype]) for t in bound.inputs}
    made.run(tensors, {n: sizes[n] for n in made.cascade.free_symbols})


def report(case: Case, driver: Driver) -> Mapping[str, object]:
    driver.launches.clear()
    made = kernel(case)
    run(made, case.program.sizes)
    listing = [aot.list_request(made)] if needs_lists(made.streaming) else []
    requests = [*listing, aot.request(made), *([aot.merge_request(made)] if case.mapping.split_m > 1 else [])]
    return {
        "launched": [asdict(x.asked) for x in driver.launches],
        "ahead": [asdict(ahead(r)) for r in requests],
        "grids": [x.grid for x in driver.launches],
        "programs": [*([case.grid // case.heads] if listing else []), case.grid, *([case.grid // case.mapping.split_m] if case.mapping.split_m > 1 else [])],
    }


def main() -> None:
    from triton.runtime import driver

    mocked = Driver()
    driver.set_active(mocked)
    with tempfile.TemporaryDirectory() as folder:
        cache.directory = lambda: Path(folder)  # type: ignore[assignment]
        print(json.dumps({name: report(case, mocked) for name, case in cases().items()}))


if __name__ == "__main__":
    main()
