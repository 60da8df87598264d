"""Fit: shared memory and registers of mappings, as read back from compiled kernels."""

import pytest

from reattend.cost_model.device import device
from reattend.cost_model.fit import candidates, footprint, padded, refuse, shared_bytes
from reattend.patterns.mapping import Mapping


@pytest.mark.parametrize(
    ("mapping", "head", "expected"),
    [(Mapping(128, 128, 8, 2), 64, 81_920), (Mapping(128, 128, 8, 2), 128, 163_840), (Mapping(128, 64, 8, 2), 256, 196_608)],
)
def test_shared_memory_formula(mapping: Mapping, head: int, expected: int) -> None:
    assert shared_bytes(mapping, head, head, 2) == expected


def test_head_sizes_are_padded() -> None:
    assert [padded(n) for n in (1, 16, 17, 80, 128, 192)] == [16, 16, 32, 128, 128, 256]


def test_a_tile_too_large_is_refused_with_the_bytes() -> None:
    reason = refuse(Mapping(128, 128, 8, 2), 128, 128, 2, device("l4"))
    assert reason == "needs 163840 bytes of shared memory, a block of l4 has 101376"
    assert refuse(Mapping(128, 128, 8, 2), 128, 128, 2, device("h200")) is None


def test_a_tile_that_spills_is_refused() -> None:
    # compiled for sm_90 this tile spills 192 bytes and more
    assert "registers" in (refuse(Mapping(128, 64, 4, 3), 128, 128, 2, device("h100")) or "")


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
    assert max(m.split_m for m in found) == 32
    assert max(m.split_m for m in candidates(device("h200"), e=128, f=128, width=2, queries=1, keys=64)) == 1


def test_nothing_fits_a_head_beyond_the_chip() -> None:
    assert candidates(device("l4"), e=1024, f=1024, width=4, queries=4096, keys=4096) == ()
