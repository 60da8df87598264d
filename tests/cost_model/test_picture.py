"""Pictures of masks: every cell against brute force over its elements, however coarse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from reattend.cost_model.sites import picture as pictures
from reattend.cost_model.sites.picture import Layer, picture
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping

P, M, H = ex.index("p"), ex.index("m"), ex.index("h")


def masked(keep: ex.Expr) -> Cascade:
    return papers.attention("masked", papers.softmax, lambda b, qk: ex.where(keep, qk, -3e38))


def sizes(p: int, m: int, heads: int = 1) -> dict[str, int]:
    return {"B": 1, "H": heads, "P": p, "M": m, "E": 16, "F": 16}


def cells(layer: Layer) -> list[str]:
    return ["".join(run[0] * int(run[1:]) for run in row.split()) for row in layer.rows]


def brute(keep: NDArray[np.bool_], cell_p: int, cell_m: int) -> list[str]:
    out = []
    for i in range(0, keep.shape[0], cell_p):
        row = [keep[i : i + cell_p, j : j + cell_m] for j in range(0, keep.shape[1], cell_m)]
        out.append("".join("f" if c.all() else "p" if c.any() else "e" for c in row))
    return out


@given(st.integers(1, 70), st.integers(1, 40), st.sampled_from([(4, 4), (8, 4), (16, 8)]))
def test_cells_equal_brute_force(n: int, window: int, tile: tuple[int, int]) -> None:
    drawn = picture(masked((M <= P) & (P - M < window)), TileMapping(*tile), sizes(n, n))
    assert drawn is not None
    p, m = np.mgrid[:n, :n]
    (layer,) = drawn.layers
    assert cells(layer) == brute((m <= p) & (p - m < window), drawn.cell_p, drawn.cell_m)
    assert (drawn.queries, drawn.keys, drawn.scale) == (n, n, 1)


def test_long_masks_are_drawn_in_larger_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "SIDE", 8)
    drawn = picture(masked(M <= P), TileMapping(4, 4), sizes(96, 96))
    assert drawn is not None
    assert (drawn.scale, drawn.cell_p) == (4, 16)
    p, m = np.mgrid[:96, :96]
    assert cells(drawn.layers[0]) == brute(m <= p, 16, 16)


def test_a_million_tokens_make_a_small_picture() -> None:
    drawn = picture(masked((M <= P) & (P - M < 4096)), TileMapping(128, 128), sizes(1 << 20, 1 << 20))
    assert drawn is not None
    assert len(drawn.layers[0].rows) <= pictures.SIDE
    assert sum(map(len, drawn.layers[0].rows)) <= pictures.CHARACTERS


def test_heads_that_look_alike_share_a_layer() -> None:
    drawn = picture(masked((M <= P) & (P - M < 8 * (H % 2 + 1))), TileMapping(8, 8), sizes(64, 64, heads=6))
    assert drawn is not None
    assert [x.label for x in drawn.layers] == ["h=0 and 2 more", "h=1 and 2 more"]
    assert drawn.omitted == 0
    many = picture(masked((M <= P) & (P - M < 8 * (H + 1))), TileMapping(8, 8), sizes(128, 128, heads=12))
    assert many is not None
    assert len(many.layers) + many.omitted == 12


def test_without_a_mask_or_a_size_there_is_no_picture() -> None:
    assert picture(papers.attention("full", papers.softmax), TileMapping(8, 8), sizes(64, 64)) is None
    assert picture(masked(M <= P), TileMapping(8, 8), {}) is None
