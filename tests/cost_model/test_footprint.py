"""Buffer, spill or recompute (A6), and FuseMax's and FLAT's traffic from them, exactly."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.count.footprint import (
    BUFFER,
    RECOMPUTE,
    REREAD,
    SPILL,
    Choice,
    cheapest,
    choices,
    moved,
    revisited,
    setting,
)
from reattend.cost_model.count.search import search
from reattend.cost_model.devices.device import device
from reattend.cost_model.time import fusemax
from reattend.patterns.library import papers, variants

K = 1024
M = ("m",)
TILED = ("m1", "m0")
CASCADE4, CASCADE5 = papers.cascade4(), papers.cascade5()
HEADS = {"bert": (64 * 12, 64), "xlm": (64 * 16, 128)}


def sizes(n: int, d: int = 64) -> dict[str, int]:
    return {"P": n, "M": n, "E": d, "F": d, "M1": n // 256, "M0": 256}


def by_way(found: Any, tensor: str) -> dict[str, Choice]:
    return {x.how: x for x in found if x.tensor == tensor}


def test_revisited_tensors_of_the_forms() -> None:
    assert [(r.tensor, r.made, r.read) for r in revisited(CASCADE4, M)] == [("QK", 1, (2,)), ("SN", 2, (3,))]
    assert [(r.tensor, r.made, r.read) for r in revisited(papers.cascade4(deferred=True), M)] == [("QK", 1, (2,))]
    assert [r.tensor for r in revisited(papers.local_max(), TILED)] == ["SLN"]
    assert revisited(CASCADE5, TILED) == ()
    assert [(r.tensor, r.is_input) for r in revisited(papers.cascade1(), ("k",))] == [("A", True)]
    assert [(r.tensor, r.made, r.read) for r in revisited(CASCADE5, ("m0",))] == [("BQK", 1, (2,))]


def test_a6_choices_of_cascade_4() -> None:
    """w·M·Pt held; w·M·P·(writes + reads); w·⌈P/Pt⌉·M·E and 2·E·M·P FLOP again, M·P exponentials more for SN."""
    m = p = 4096
    found = choices(setting(CASCADE4, M, "p", 256, sizes(p), 2))
    qk, sn = by_way(found, "QK"), by_way(found, "SN")
    assert qk[BUFFER] == Choice("QK", BUFFER, held_bytes=2 * m * 256)
    assert qk[SPILL] == Choice("QK", SPILL, moved_bytes=2 * m * p * 2)
    assert qk[RECOMPUTE] == Choice("QK", RECOMPUTE, moved_bytes=2 * 16 * m * 64, flops=2 * 64 * m * p)
    assert sn[SPILL].moved_bytes == 2 * m * p * 2
    assert (sn[RECOMPUTE].flops, sn[RECOMPUTE].exps) == (2 * 64 * m * p, m * p)


def test_a6_an_input_is_read_again() -> None:
    g = setting(papers.cascade1(), ("k",), "k", 1, {"K": 100}, 2)
    assert by_way(choices(g), "A")[REREAD].moved_bytes == 200
    assert RECOMPUTE not in by_way(choices(g), "A")


def test_a6_choices_are_symbolic_without_sizes() -> None:
    found = by_way(choices(setting(CASCADE4, M, "p", 128)), "QK")
    assert str(found[BUFFER].held_bytes) == "512*M"
    assert str(found[SPILL].moved_bytes) == "8*M*P"


def test_batch_entries_are_held_one_at_a_time() -> None:
    c = papers.attention("softmax", papers.softmax)
    known = {"B": 4, "H": 8, "P": 512, "M": 512, "E": 64, "F": 64}
    assert by_way(choices(setting(c, M, "p", 128, known)), "S")[BUFFER].held_bytes == 4 * 512 * 128


@pytest.mark.parametrize(
    ("model", "n", "expected"),
    [("bert", K, 6845104128), ("bert", 4 * K, 104689827840), ("bert", 64 * K, 26414048870400), ("xlm", K, 9663676416)],
)
def test_a16_unfused_is_two_spills(model: str, n: int, expected: int) -> None:
    heads, d = HEADS[model]
    g = setting(CASCADE4, M, "p", n, sizes(n, d), 2)
    assert heads * moved(g, {"QK": SPILL, "SN": SPILL}) == expected


@pytest.mark.parametrize(
    ("n", "expected"),
    list(zip((K, 4 * K, 16 * K, 64 * K, 256 * K, 1024 * K),
             (402653184, 1610612736, 6442450944, 38654705664, 463856467968, 6803228196864))),
)
@pytest.mark.parametrize("form", ["Cascade 5", "found by search"])
def test_a12_one_pass_moves_inputs_only(form: str, n: int, expected: int) -> None:
    rows = fusemax.query_tile(n, 64, 64, device("fusemax"), scores_on_chip=False)
    best = search(CASCADE4, M).best
    c, family = (CASCADE5, TILED) if form == "Cascade 5" else (best.cascade, best.family)
    assert 64 * 12 * moved(setting(c, family, "p", rows, sizes(n), 2)) == expected


@pytest.mark.parametrize(("n", "expected"), [(16 * K, 9663676416), (1024 * K, 26594437496832)])
def test_a15_with_scores_on_chip(n: int, expected: int) -> None:
    rows = fusemax.query_tile(n, 64, 64, device("fusemax"), scores_on_chip=True)
    assert 64 * 12 * moved(setting(CASCADE5, TILED, "p", rows, sizes(n), 2)) == expected


@pytest.mark.parametrize(("n", "expected"), [(256 * K, 435458144206848), (1024 * K, 6966711832018944)])
def test_a19_flat_spills_both(n: int, expected: int) -> None:
    g = setting(CASCADE4, M, "p", fusemax.FLAT_SPILLED_ROWS, sizes(n), 2)
    assert 64 * 12 * moved(g, {"QK": SPILL, "SN": SPILL}) == expected


def test_cheapest_buffers_while_there_is_room() -> None:
    g = setting(CASCADE4, M, "p", 256, sizes(4 * K), 2)
    fiber = 2 * 4 * K * 256
    assert cheapest(g, 2 * fiber) == {"QK": BUFFER, "SN": BUFFER}
    assert sorted(cheapest(g, fiber).values()) == [BUFFER, RECOMPUTE]
    assert set(cheapest(g, 0).values()) == {RECOMPUTE}


def test_errors_name_what_to_change() -> None:
    with pytest.raises(ValueError, match="has no rank q; one of"):
        setting(CASCADE4, M, "q", 1)
    with pytest.raises(KeyError, match="the choices are QK: buffer"):
        moved(setting(CASCADE4, M, "p", 1), {"QK": "burn"})
    with pytest.raises(KeyError):
        revisited(CASCADE4, ("x",))


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_more_rows_on_chip_never_move_more(blocks: int, tiles: int, more: int) -> None:
    known = {"P": 16 * blocks, "M": 16 * tiles, "E": 8, "F": 8}
    for c in (CASCADE4, variants.returned()):
        few, many = (setting(c, M, "p", r, known, 2) for r in (16, 16 * more))
        assert moved(many) <= moved(few)
        for x, y in zip(choices(few), choices(many)):
            assert x.held_bytes <= y.held_bytes
            assert y.moved_bytes <= x.moved_bytes


@given(st.integers(1, 50), st.integers(1, 50))
def test_every_choice_beyond_the_first_visit_costs_something(p: int, m: int) -> None:
    known = {"P": p, "M": m, "E": 8, "F": 8, "H": 2, "B": 1}
    for c in (CASCADE4, papers.attention("sparsemax", papers.sparsemax(2)), variants.talking_heads()):
        for x in choices(setting(c, M, "p", 1, known)):
            assert (x.held_bytes if x.how == BUFFER else x.moved_bytes) > 0
