"""Fit: shared memory and registers of mappings, as read back from compiled kernels."""

import pytest

from reattend.cost_model.devices.compiled import table
from reattend.cost_model.devices.device import device
from reattend.cost_model.time.fit import (
    MOST_REGISTERS_F32,
    as_compiled,
    candidates,
    chunked,
    footprint,
    padded,
    refuse,
    shared_bytes,
)
from reattend.patterns import expr as ex
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping

# Read back from kernels compiled ahead of time: device, head size, bytes an element, mapping, bytes of shared memory.
COMPILED = [
    ("h200", 64, 2, (128, 128, 8, 2), 81_920),
    ("h200", 128, 2, (128, 128, 8, 2), 163_840),
    ("h200", 128, 2, (32, 64, 4, 2), 45_056),
    ("h200", 64, 4, (64, 64, 8, 2), 65_536),
    ("a100", 64, 2, (128, 64, 8, 2), 32_768),
    ("a100", 128, 2, (64, 64, 4, 2), 57_344),
    ("mi300x", 64, 2, (64, 64, 4, 2), 24_576),
    ("mi300x", 128, 2, (128, 64, 8, 2), 49_152),
]
# … and mappings that spill more than 32 bytes there.
SPILLS = [
    ("h200", 128, 2, (128, 64, 4, 2)), ("h200", 128, 2, (128, 128, 4, 2)), ("h200", 64, 4, (64, 64, 4, 2)),
    ("h200", 128, 4, (32, 64, 4, 2)), ("h200", 128, 4, (64, 64, 8, 2)), ("h200", 64, 4, (64, 128, 8, 2)),
    ("a100", 64, 2, (128, 128, 4, 2)), ("a100", 128, 2, (64, 128, 4, 2)), ("a100", 128, 2, (128, 32, 4, 2)),
    ("a100", 128, 2, (128, 128, 8, 2)), ("mi300x", 64, 2, (64, 128, 8, 2)), ("mi300x", 128, 2, (32, 128, 8, 2)),
]


@pytest.mark.parametrize(("name", "head", "width", "sizes", "expected"), COMPILED)
def test_shared_memory_is_what_compiled_kernels_take(
    name: str, head: int, width: int, sizes: tuple[int, int, int, int], expected: int
) -> None:
    assert shared_bytes(TileMapping(*sizes), head, head, width, device(name)) == expected


@pytest.mark.parametrize(("name", "head", "width", "sizes"), SPILLS)
def test_tiles_that_spill_are_refused(name: str, head: int, width: int, sizes: tuple[int, int, int, int]) -> None:
    assert refuse(TileMapping(*sizes), head, head, width, device(name)) is not None


@pytest.mark.parametrize("name", ["a100", "h200", "b200", "mi300x"])
@pytest.mark.parametrize(("e", "f", "dtype"), [(64, 64, "bf16"), (80, 80, "bf16"), (192, 128, "f16"), (64, 64, "f32")])
def test_the_code_generator_predicts_the_same(name: str, e: int, f: int, dtype: str) -> None:
    from reattend.codegen.triton import kernel as triton_kernel

    b = papers.Builder({"b": 1, "h": 2, "e": e, "f": f})
    q, k, v = (b.input(n, r, dtype) for n, r in (("Q", "bhpe"), ("K", "bhme"), ("V", "bhmf")))
    qk = ex.cast(b.put("QK", "bhpm", q * k, "add", "e"), "f32")
    w = ex.exp(qk - b.put("GM", "bhp", qk, "max", "m"))
    b.put("O", "bhpf", ex.cast(w / b.put("SD", "bhp", w, "add", "m"), dtype) * v, "add", "m")
    c = b.cascade("softmax", "O")
    for m in (TileMapping(128, 64, 8, 3), TileMapping(32, 32, 4, 2), TileMapping(64, 128, 4, 1)):
        theirs = triton_kernel.shared_bytes(c, m, device(name))
        assert theirs == shared_bytes(m, e, f, 4 if dtype == "f32" else 2, device(name))


def test_head_sizes_are_padded() -> None:
    assert [padded(n) for n in (1, 16, 17, 80, 128, 192)] == [16, 16, 32, 128, 128, 256]
    assert [chunked(n) for n in (1, 16, 17, 80, 112, 128, 192)] == [16, 16, 32, 80, 128, 128, 192]


def test_a_tile_too_large_is_refused_with_the_bytes() -> None:
    reason = refuse(TileMapping(128, 128, 8, 3), 128, 128, 2, device("l4"))
    assert reason == "needs 163840 bytes of shared memory, a block of l4 has 101376"
    assert refuse(TileMapping(128, 128, 8, 2), 128, 128, 2, device("h200")) is None


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200", "mi300x", "l4", "rtx4090"])
@pytest.mark.parametrize(("e", "f", "width"), [(64, 64, 2), (128, 128, 2), (256, 256, 2), (80, 80, 4), (192, 128, 2)])
def test_every_candidate_fits(name: str, e: int, f: int, width: int) -> None:
    d = device(name)
    found = candidates(d, e=e, f=f, width=width, queries=4096, keys=4096)
    assert found
    for m in found:
        print_ = footprint(m, e, f, width, d)
        assert refuse(m, e, f, width, d) is None
        assert print_.shared_bytes * print_.resident <= d.shared_bytes_per_unit
        assert print_.threads * print_.resident <= d.threads_per_unit


def test_decode_splits_its_keys() -> None:
    found = candidates(device("h200"), e=128, f=128, width=2, queries=1, keys=131072)
    assert {m.tile_p for m in found} == {16}
    assert max(m.split_m for m in found) == 64
    assert max(m.split_m for m in candidates(device("h200"), e=128, f=128, width=2, queries=1, keys=64)) == 1


def test_nothing_fits_a_head_beyond_the_chip() -> None:
    assert candidates(device("l4"), e=1024, f=1024, width=4, queries=4096, keys=4096) == ()


@pytest.mark.parametrize(("name", "arch"), [("a100", "sm_80"), ("h200", "sm_90"), ("b200", "sm_100")])
def test_what_was_compiled_stands_in_place_of_estimates(name: str, arch: str) -> None:
    d = device(name)
    rows = {key[1:]: row for key, row in table().items() if key[0] == arch}
    assert len(rows) >= 20
    for (kind, head, *tile), row in rows.items():
        mapping, width = TileMapping(tile[0], tile[1], tile[2], 2), {"bf16": 2, "f32": 4}[kind]
        need = shared_bytes(mapping, head, head, width, d)
        # barriers and a buffer for sums across warps, beside tensor memory and in fp32
        slack = 0 if kind == "bf16" and arch != "sm_100" else 1056
        assert need <= row.shared_bytes <= need + slack
        if need > d.shared_bytes_per_block:
            continue
        reason = refuse(mapping, head, head, width, d)
        assert reason == (f"spills {row.spill_bytes} bytes of each thread" if row.spill_bytes else None)
        assert footprint(mapping, head, head, width, d).registers == row.registers


def test_a_tile_that_was_not_compiled_is_estimated() -> None:
    d = device("h200")
    assert as_compiled(TileMapping(128, 128, 8, 2), 192, 128, 2, d) is None
    assert as_compiled(TileMapping(256, 16, 8, 2), 128, 128, 2, d) is None
    assert as_compiled(TileMapping(128, 64, 8, 2), 128, 128, 2, d) == table()["sm_90", "bf16", 128, 128, 64, 8]
    # Ada as Ampere
    l4 = as_compiled(TileMapping(64, 64, 4, 2), 64, 64, 2, device("l4"))
    assert l4 == table()["sm_80", "bf16", 64, 64, 64, 4]


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("length", [512, 4096])
def test_no_candidate_in_fp32_spills(head: int, length: int) -> None:
    """What was compiled and spilled is not offered; what was not compiled is well inside the registers."""
    d = device("h200")
    found = candidates(d, e=head, f=head, width=4, queries=length, keys=length)
    assert found
    for m in found:
        row = as_compiled(m, head, head, 4, d)
        assert row is None or row.spill_bytes == 0
        assert row is not None or footprint(m, head, head, 4, d).registers <= MOST_REGISTERS_F32


def test_more_rows_than_one_instruction_has_split_their_keys() -> None:
    found = candidates(device("h200"), e=128, f=128, width=2, queries=32, keys=131072)
    assert {m.tile_p for m in found} == {16, 32}
    assert max(m.split_m for m in found) == 64
