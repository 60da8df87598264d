"""The assembler of NVIDIA's GPUs: loops of a text written for the test, and of one small kernel as it is compiled today."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache as once

import pytest

from reattend.codegen.files import cache
from reattend.codegen.triton import aot, assembler
from reattend.codegen.triton.kernel import TritonKernel, build
from reattend.patterns import expr as ex
from reattend.patterns.mapping import TileMapping

from .. import strategies
from ..strategies import LOWEST, M, P, attention
from ..tiers import few

# A loop with a branch around a part of it, a wait that was moved behind the end, and a second loop after it.
TEXT = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;      /* 0x000000ff00ff7b82 */
        /*0010*/                   LDGDEPBAR ;                              /* 0x00000000000079af */
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;                     /* 0x000080000000791a */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;    /* 0x0000000c0804723c */
        /*0040*/              @!P1 BRA 0x60 ;                               /* 0x0000002800000947 */
        /*0050*/                   FMUL R4, R4, R9 ;                        /* 0x0000000904047220 */
        /*0060*/                   SYNCS.PHASECHK.TRANS64 P2, [UR4], R3 ;   /* 0x00000003ff0275a7 */
        /*0070*/              @!P2 BRA 0x100 ;                              /* 0x0000002800000947 */
        /*0080*/                   LDGDEPBAR ;                              /* 0x00000000000079af */
        /*0090*/               @P0 BRA 0x20 ;                               /* 0xffffffd800800947 */
        /*00a0*/                   FADD R4, R4, R9 ;                        /* 0x0000000904047220 */
        /*00b0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;    /* 0x0000000c0804723c */
        /*00c0*/                   MUFU.EX2 R7, R7 ;                        /* 0x0000000700077308 */
        /*00d0*/                   BRA.U !UP0, 0xb0 ;                       /* 0xffffffd800800947 */
        /*00e0*/                   STL [R1], R4 ;                           /* 0x0000000401007387 */
        /*00f0*/                   EXIT ;                                   /* 0x000000000000794d */
        /*0100*/                   SYNCS.PHASECHK.TRANS64 P2, [UR4], R3 ;   /* 0x00000003ff0275a7 */
        /*0110*/              @!P2 BRA 0x100 ;                              /* 0xfffffffc00fc7947 */
        /*0120*/                   BRA 0x80 ;                               /* 0xfffffffc00fc7947 */
        /*0130*/                   BRA 0x130;                               /* 0xfffffffc00fc7947 */
"""


def addresses(loop: assembler.Loop) -> list[int]:
    return [i.address // 16 for i in loop.instructions]


def test_instructions_of_a_text() -> None:
    code = assembler.instructions(TEXT)
    assert [i.address for i in code] == list(range(0, 0x140, 16))
    assert (code[4].guard, code[4].text, code[4].target) == ("@!P1", "BRA 0x60", 0x60)
    assert [i.address // 16 for i in code if i.leaves] == [15, 18, 19]


def test_loops_follow_the_control_flow() -> None:
    """What was moved behind the end belongs to its loop; neither the wait in it nor the one after the end is a loop here."""
    first, second = assembler.loops(TEXT)
    assert addresses(first) == [2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 18]
    assert addresses(second) == [11, 12, 13]


def test_loops_that_hold_another_kind() -> None:
    (waits,) = assembler.loops(TEXT, "barrier")
    assert addresses(waits) == [16, 17]
    assert assembler.loops(TEXT, "spill") == ()
    assert assembler.loops("") == ()


def test_counts_of_a_loop() -> None:
    first, second = assembler.loops(TEXT)
    assert (first.counts["matrix"], first.counts["multiply"], first.counts["barrier"], first.counts["add"]) == (1, 1, 2, 0)
    assert second.counts == {"matrix": 1, "exp2": 1, "branch": 1}


def test_copies_in_flight() -> None:
    first, second = assembler.loops(TEXT)
    assert first.in_flight == 2
    assert second.in_flight is None


def test_order_of_a_loop() -> None:
    first, _ = assembler.loops(TEXT)
    assert first.order == "copy wait, matrix, multiply, barrier, copy group, barrier"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ", "matrix"), ("UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR6]", "matrix"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "matrix wait"), ("MUFU.RCP R3, R4", "special"), ("FMNMX3 R3, R4, R5, R6", "maximum"),
        ("FADD2 R2, R4.F32x2.HI_LO, R6", "add"), ("UIADD3 UR4, UR4, 0x1, URZ", "integer"), ("LDSM.16.M88.4 R4, [R2]", "shared load"),
        ("LDGSTS.E.128 [R5], [R2.64]", "copy"), ("LDG.E.128 R4, [R2.64]", "global load"), ("LDL.64 R4, [R1]", "spill"),
        ("DEPBAR.LE SB1, 0x36", assembler.OTHER), ("PRMT R4, R4, 0x5410, R5", assembler.OTHER),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert assembler.Instruction(0, "", text).kind == kind


# --- a kernel -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "directory", lambda: folder)
        yield


@once
def compiled(arch: str) -> aot.AotReport:
    """Causal attention over heads of 64: full tiles in one loop, partial ones in another."""
    c = attention(
        lambda s: ex.where(M <= P, s, LOWEST), strategies.ROWS["softmax"], h=8, e=64, f=64, dtype="bf16"
    ).cascade
    made = build(c, TileMapping(64, 64, 4, 3), arch)
    assert isinstance(made, TritonKernel), made
    return aot.compile(made, arch)


ARCHITECTURES = few(("sm_80", "sm_90", "sm_100"), "sm_90")
compiles = pytest.mark.usefixtures("_own_cache")


@pytest.mark.aot
@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_kernel_has_a_loop_for_full_tiles_and_one_for_partial_ones(arch: str) -> None:
    full, partial = compiled(arch).loops
    assert full.counts["matrix"] == partial.counts["matrix"] > 0
    assert full.counts["exp2"] == partial.counts["exp2"] > 0
    assert full.counts["multiply"] > 0
    # only there is the mask computed
    assert full.counts["select"] < partial.counts["select"]
    assert len(full.instructions) < len(partial.instructions)


@pytest.mark.aot
@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loops_of_a_kernel_do_not_spill(arch: str) -> None:
    report = compiled(arch)
    assert report.spill_bytes == 0
    assert [loop.counts["spill"] for loop in report.loops] == [0, 0]


@pytest.mark.aot
@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_and_values_are_copied_while_others_are_multiplied(arch: str) -> None:
    """Three stages: tiles arrive by asynchronous copies, and no turn waits for more groups than it started."""
    for loop in compiled(arch).loops:
        assert loop.counts["copy"] > 0
        assert loop.in_flight is not None
        assert 0 <= loop.in_flight <= 3


@pytest.mark.aot
@compiles
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_loops_are_part_of_what_is_counted_as_a_whole(arch: str) -> None:
    report = compiled(arch)
    assert sum(loop.counts["matrix"] for loop in report.loops) <= report.matrix_instructions
    assert sum(loop.counts["exp2"] for loop in report.loops) <= report.exponentials
