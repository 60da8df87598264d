"""Kernels compiled for GPUs that are not there: registers, spills and shared memory, as predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings

from reattend.codegen.files import cache
from reattend.codegen.triton import aot
from reattend.codegen.triton.backward import ahead
from reattend.codegen.triton.backward import kernel as training
from reattend.codegen.triton.kernel import TritonKernel, build, default_mapping, shared_bytes
from reattend.cost_model.devices.device import Device, device
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import DTYPE
from reattend.patterns.expr import Expr
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal

from .. import strategies
from ..strategies import INF, LOWEST, M, P, attention
from ..tiers import few
from . import attentions

CAUSAL = M <= P


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "directory", lambda: folder)
        yield


def llama(size: int, dtype: str = "bf16") -> Cascade:
    """Causal with a padding mask, two heads to a key head."""
    keep = CAUSAL & strategies.MASKS["padding"]
    return attention(
        lambda s: ex.where(keep, s, LOWEST), strategies.ROWS["softmax"], b=2, h=8, group=2, e=size, f=size, dtype=dtype
    ).cascade


def learned(size: int, pairs: bool) -> Cascade:
    """Causal with slopes and sinks that are learned, or a bias for each pair of positions."""
    def read(name: str, *at: Expr) -> Expr:
        return ex.cast(ex.load(name, at, "bf16"), "f32")

    many, h, p, m = attentions.size("s"), attentions.H, attentions.P, attentions.M
    if pairs:
        aux = (attentions.aux("bias", (many, many), "bf16"),)
        case = attentions.build(
            lambda s: attentions.added(attentions.CAUSAL)(s + read("bias", p, m)), aux=aux, square=True, e=size, dtype="bf16"
        )
        return case.cascade
    slopes = tuple(attentions.aux(n, (4,), "bf16") for n in ("slope", "sink"))
    return attentions.build(
        lambda s: attentions.added(attentions.CAUSAL)(s + read("slope", h) * ex.cast(m - p, "f32")), sink=read("sink", h),
        aux=slopes, square=True, e=size, dtype="bf16",
    ).cascade


def decode(size: int) -> Cascade:
    p = attention(lambda s: s, strategies.ROWS["softmax"], b=2, h=32, group=8, p=1, m=41, e=size, f=size, dtype="bf16")
    return p.cascade.with_sizes({"s": 1})


def compiled(c: Cascade, mapping: TileMapping, arch: str) -> aot.AotReport:
    made = build(c, mapping, arch)
    assert isinstance(made, TritonKernel), made
    return aot.compile(made, arch)


def default(c: Cascade, target: Device | str) -> TileMapping:
    mapping = default_mapping(c, target)
    assert isinstance(mapping, TileMapping), mapping
    return mapping


@pytest.mark.aot
@pytest.mark.parametrize(
    ("arch", "size"), few([(a, n) for a in ("sm_80", "sm_90", "sm_100") for n in (64, 128)], ("sm_80", 64), ("sm_90", 128))
)
def test_the_default_mapping_neither_spills_nor_overflows(arch: str, size: int) -> None:
    c = llama(size)
    mapping = default(c, arch)
    report = compiled(c, mapping, arch)
    assert report.spill_bytes == 0, report
    assert report.registers <= 255
    assert report.matrix_instructions > 0
    # tcgen05 needs barriers and a buffer for reductions across warps beside the tiles
    slack = 1024 if arch == "sm_100" else 0
    predicted = shared_bytes(c, mapping, arch)
    assert isinstance(predicted, int)
    assert predicted <= report.shared_bytes <= predicted + slack


@pytest.mark.aot
@pytest.mark.parametrize(
    ("arch", "mapping"),
    few(
        [
            ("sm_90", TileMapping(128, 64, 4, 2)), ("sm_90", TileMapping(64, 64, 4, 3)), ("sm_90", TileMapping(32, 64, 4, 2)),
            ("sm_90", TileMapping(128, 64, 4, 1)), ("sm_80", TileMapping(128, 64, 4, 2)), ("sm_80", TileMapping(64, 32, 4, 2)),
        ],
        ("sm_90", TileMapping(32, 64, 4, 2)),
    ),
)
def test_predicted_shared_memory_is_what_triton_reports(arch: str, mapping: TileMapping) -> None:
    c = llama(64)
    assert compiled(c, mapping, arch).shared_bytes == shared_bytes(c, mapping, arch)


@pytest.mark.aot
@pytest.mark.parametrize("arch", few(["sm_80", "sm_90"], "sm_80"))
def test_decode(arch: str) -> None:
    c = decode(128)
    mapping = default(c, arch)
    assert mapping.tile_p == 16
    report = compiled(c, mapping, arch)
    assert report.spill_bytes == 0
    assert report.shared_bytes == shared_bytes(c, mapping, arch)


@pytest.mark.aot
def test_split_keys() -> None:
    c = decode(128)
    mapping = replace(default(c, "sm_90"), split_m=8)
    made = build(c, mapping, "sm_90")
    assert isinstance(made, TritonKernel)
    report, merging = aot.compile(made, "sm_90"), aot.compile_merge(made, "sm_90")
    assert report.spill_bytes == merging.spill_bytes == 0
    assert report.shared_bytes == shared_bytes(c, mapping, "sm_90")
    with pytest.raises(ValueError, match="no parts to merge"):
        aot.compile_merge(compiled_kernel(c, default(c, "sm_90")), "sm_90")


def compiled_kernel(c: Cascade, mapping: TileMapping) -> TritonKernel:
    made = build(c, mapping)
    assert isinstance(made, TritonKernel), made
    return made


@pytest.mark.aot
@pytest.mark.slow
@settings(max_examples=20, deadline=None, phases=[Phase.generate])
@given(strategies.programs(dtype="bf16"))
def test_drawn_programs_compile(p: strategies.Program) -> None:
    """What the interpreter lets through, the compiler must take as well."""
    report = aot.compile(compiled_kernel(p.cascade, TileMapping(32, 32)), "sm_90")
    assert report.matrix_instructions > 0


@pytest.mark.aot
@pytest.mark.parametrize("name", few(["square", "sigmoid", "sink"]))
def test_other_row_rules_take_no_more_than_softmax(name: str) -> None:
    def score(s: ex.Expr) -> ex.Expr:
        return ex.where(CAUSAL, s, 0.0 if name == "square" else -INF)

    c = attention(score, strategies.ROWS[name], h=8, e=64, f=64, dtype="bf16").cascade
    report = compiled(c, default(c, "sm_90"), "sm_90")
    assert report.spill_bytes == 0, report


@pytest.mark.slow
@pytest.mark.aot
def test_head_sizes_in_two_pieces() -> None:
    """80 = 64 + 16 is not padded to 128; values are."""
    c = attention(lambda s: s, strategies.ROWS["softmax"], h=8, e=80, f=64, dtype="f16").cascade
    mapping = TileMapping(128, 64, 8, 2)
    report = compiled(c, mapping, "sm_90")
    assert report.shared_bytes == shared_bytes(c, mapping, "sm_90") == 2 * (128 * 80 + 2 * 64 * (80 + 64))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(("e", "f"), [(80, 64), (96, 96), (192, 128)])
@pytest.mark.parametrize("mapping", [TileMapping(128, 64, 8, 3), TileMapping(64, 64, 4, 2)], ids=str)
def test_head_sizes_in_two_pieces_on_blackwell(e: int, f: int, mapping: TileMapping) -> None:
    """One buffer of keys less, and up to 1 KiB of barriers and reductions."""
    c = attention(lambda s: s, strategies.ROWS["softmax"], h=8, e=e, f=f, dtype="bf16").cascade
    report, predicted = compiled(c, mapping, "sm_100"), shared_bytes(c, mapping, "sm_100")
    assert isinstance(predicted, int)
    assert predicted <= report.shared_bytes <= predicted + 1024


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_the_kernel_that_lists_tiles(arch: str) -> None:
    c = llama(64)
    report = aot.compile_request(aot.list_request(compiled_kernel(c, default(c, arch))), arch)
    assert report.spill_bytes == 0
    causal = attention(lambda s: ex.where(CAUSAL, s, -INF), strategies.ROWS["softmax"], e=64, f=64, dtype="bf16").cascade
    with pytest.raises(ValueError, match="walks no lists"):
        aot.list_request(compiled_kernel(causal, default(causal, arch)))


@pytest.mark.aot
@pytest.mark.slow
def test_amd() -> None:
    c = llama(64)
    report = compiled(c, default(c, "gfx942"), "gfx942")
    assert report.spill_bytes == 0
    assert report.shared_bytes <= 65536
    assert report.matrix_instructions > 0


class NoDriver:
    """Stands for a GPU's driver as far as compiling goes."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@pytest.mark.aot
@pytest.mark.parametrize(
    "c", [pytest.param(llama(64), id="llama"), pytest.param(decode(64), id="decode", marks=pytest.mark.slow)]
)
def test_a_launch_compiles_what_was_compiled_ahead_of_time(c: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of a real launch, specialised by Triton itself, up to the point where a GPU is needed."""
    import triton

    monkeypatch.setattr(triton.runtime.driver, "_active", NoDriver(), raising=False)
    made = build(c, TileMapping(64, 64), "sm_90")
    assert isinstance(made, TritonKernel)
    compiled: list[Any] = []

    class Warm:
        def __init__(self, jit: Any) -> None:
            self.jit = jit

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kw: compiled.append(self.jit.run(*args, grid=grid, warmup=True, **kw))

    for name in {"stream", "list_tiles"} & set(vars(made.module)):
        monkeypatch.setattr(made.module, name, Warm(getattr(made.module, name)))
    sizes = {"s": 64} if "s" in c.free_symbols else {"t": 77}
    bound = c.with_sizes(sizes)
    tensors = {t.name: torch.zeros([int(n) for n in t.shape], dtype=DTYPE[t.dtype]) for t in bound.inputs}
    made.run(tensors, sizes)
    assert compiled[-1].metadata.shared == shared_bytes(c, TileMapping(64, 64), "sm_90")


def test_mappings_that_do_not_fit_are_refused() -> None:
    c = llama(128)
    out = build(c, TileMapping(128, 128, 8, 4), "sm_80")
    assert isinstance(out, Refusal)
    assert "needs 229376 bytes of shared memory; sm_80 has 166912" in out.reason
    odd = build(c, TileMapping(100, 64), "sm_90")
    assert isinstance(odd, Refusal)
    assert "tile_p = 100" in odd.reason


def test_every_target_has_a_default() -> None:
    for name in ("a100", "h100", "h200", "b200", "mi300x", "l4", "rtx4090"):
        target = device(name)
        for size in (64, 128, 256):
            mapping = default(llama(size), target)
            need = shared_bytes(llama(size), mapping, target)
            assert isinstance(need, int)
            assert need <= target.shared_bytes_per_block


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_gradients_compile(arch: str) -> None:
    """Forward that hands over, queries, keys and values: what a few registers too many spill is a turn's, not a tile's."""
    made = training.build(llama(128), TileMapping(128, 64, 8, 2))
    assert isinstance(made, training.TritonTraining), made
    for report in ahead.compile(made, arch):
        assert report.spill_bytes <= 64, report
        assert report.matrix_instructions > 0


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_gradients_of_what_is_no_operand_compile(arch: str, pairs: bool) -> None:
    """Sums of rows take few registers more; shared memory is no more than predicted, with a tile of pairs as well."""
    made = training.build(learned(64, pairs), TileMapping(64, 64, 4, 2))
    assert isinstance(made, training.TritonTraining), made
    assert not made.without
    _, rows, _ = ahead.requests(made)
    place = (rows.function.arg_names.index("LEAVES"),)
    assert rows.literals[place] == 2 ** len(made.b.leaves) - 1
    report = aot.compile_request(rows, arch)
    assert report.matrix_instructions > 0
    assert report.shared_bytes <= training.shared_bytes(made.b, made.mapping)
    if not pairs:
        unwanted = aot.compile_request(replace(rows, literals={**rows.literals, place: 0}), arch)
        assert report.spill_bytes <= unwanted.spill_bytes + 32, (report, unwanted)
