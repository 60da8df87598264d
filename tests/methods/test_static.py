"""Static methods against their known answers: numbers of pairs and tiles, and rules written out pair by pair."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from reattend.patterns.attention.recognise import attention
from reattend.patterns.library.papers import attention as build
from reattend.patterns.library.papers import softmax
from reattend.patterns.methods.static.neighbourhood import Neighbourhood
from reattend.patterns.methods.static.radial import Radial
from reattend.patterns.methods.static.strided_shards import StridedShards
from reattend.patterns.verdict import Refusal
from tests.methods.attentions import causal, dense, kept, replaced, tiles, view

# --- neighbourhoods -------------------------------------------------------------------------------------------------


def near(n: int, k: int, s: int = 1, d: int = 1, ahead: bool = True) -> np.ndarray:
    """[n, n]: the rule, token by token."""
    out = np.zeros((n, n), bool)
    for p, m in product(range(n), range(n)):
        g, x, y = p % d, p // d, m // d
        size = -(-(n - g) // d)
        if m % d != g:
            continue
        if ahead:
            leader = min(x // s * s + s // 2, size - 1)
            c = min(max(leader, k // 2), size - 1 - (-(-k // 2) - 1))
            out[p, m] = c - k // 2 <= y <= c + -(-k // 2) - 1
        else:
            out[p, m] = y <= x and min(x // s * s + s - 1, size - 1) - y < k
    return out


@pytest.mark.parametrize(("k", "s", "d"), [(5, 1, 1), (4, 3, 1), (5, 2, 2), (3, 3, 4), (16, 1, 1), (4, 4, 1)])
def test_every_row_keeps_as_many_keys_as_the_window_has(k: int, s: int, d: int) -> None:
    found = kept(replaced(Neighbourhood((k,), (s,), (d,)), view(dense, P=16)))[0]
    assert (found == near(16, k, s, d)).all()
    assert (found.sum(-1) == k).all()
    if k == s and d == 1:
        assert (found == np.kron(np.eye(16 // k, dtype=bool), np.ones((k, k), bool))).all()


@pytest.mark.parametrize(("s", "rows", "total"), [(1, [1, 2, 3, 4, 5, 5], 70), (2, [1, 2, 3, 4, 4, 5, 4, 5], 64)])
def test_causal_rows_keep_what_lies_behind(s: int, rows: list[int], total: int) -> None:
    whole = view(P=16, M=16)
    found = kept(replaced(Neighbourhood((5,), (s,), causal=(True,)), whole))[0]
    assert (found == near(16, 5, s, ahead=False)).all()
    assert found.sum(-1)[: len(rows)].tolist() == rows
    assert found.sum() == total


@pytest.mark.parametrize(
    ("plane", "window", "stride", "dilation", "ahead"),
    [((4, 6), (3, 4), (1, 2), (1, 1), (False, False)), ((6, 4), (3, 2), (1, 1), (2, 1), (False, True)),
     ((3, 4, 2), (2, 3, 2), (1, 1, 1), (1, 1, 1), (True, False, False))],
)
def test_axes_are_kept_one_by_one(
    plane: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], ahead: tuple[bool, ...]
) -> None:
    method = Neighbourhood(window, stride, dilation, ahead, plane)
    found = kept(replaced(method, view(dense, P=int(np.prod(plane)))))[0]
    expected = np.ones((1, 1), bool)
    for n, k, s, d, c in zip(plane, window, stride, dilation, ahead):
        expected = np.kron(expected, near(n, k, s, d, not c))
    assert (found == expected).all()


def test_neighbourhoods_that_do_not_fit_are_named() -> None:
    for bad, said in (
        ({"window": (4,), "stride": (5,)}, "stride ≤ window"), ({"window": (3, 3)}, "one number an axis"),
        ({"window": (3, 9), "plane": (4, 8)}, "does not fit an axis of 8"),
    ):
        with pytest.raises(ValueError, match=said):
            Neighbourhood(**bad)
    refusals = [
        (Neighbourhood((5,)).replace(view(P=16, M=16)), "looks ahead, and this attention is causal"),
        (Neighbourhood((5,)).replace(view(dense, P=4)), "does not fit 4 tokens"),
        (Neighbourhood((3, 3), plane=(4, 4)).replace(view(dense, P=12)), "not the 16 tokens of a plane of 4 × 4"),
        (Neighbourhood((3,)).replace(attention(build("core", softmax, dense))), "two sets"),  # type: ignore[arg-type]
    ]
    for found, said in refusals:
        assert isinstance(found, Refusal)
        assert said in found.reason


# --- radial ---------------------------------------------------------------------------------------------------------


def radial(frames: int, s: int, sink: int) -> np.ndarray:
    out = np.zeros((frames * s, frames * s), bool)
    for p, m in product(range(frames * s), range(frames * s)):
        (i, k), (j, at) = divmod(p, s), divmod(m, s)
        apart = abs(i - j)
        b = int(np.floor(np.log2(max(apart, 1))))
        window = 2**b <= s and abs(k - at) + 1 <= s / 2**b
        out[p, m] = window or (apart % -(-(2**b) // s) == 0 and k == at) or j < sink
    return out


@pytest.mark.parametrize(("frames", "tokens", "sink"), [(9, 4, 1), (6, 8, 0), (1, 5, 0)])
def test_radial_is_the_rule_of_the_paper(frames: int, tokens: int, sink: int) -> None:
    found = kept(replaced(Radial(frames, tokens, sink), view(dense, P=frames * tokens)))[0]
    assert (found == radial(frames, tokens, sink)).all()
    assert found.any(-1).all()


def test_radial_needs_its_frames() -> None:
    for whole, said in ((view(P=8, M=8), "causal"), (view(dense, P=8), "not the 6 tokens")):
        found = Radial(3, 2).replace(whole)
        assert isinstance(found, Refusal)
        assert said in found.reason


# --- strided shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "expected", "heads"), [(4, [730, 685, 700, 715], 4), (16, [394, 337, 340, 343], 16)]
)
def test_tiles_of_each_head_are_the_published_numbers(stride: int, expected: list[int], heads: int) -> None:
    a = replaced(StridedShards(tile=1, local=4, stride=stride), view(P=64, M=64, H=heads))
    found = kept(a, heads)
    assert found.sum((1, 2)).tolist()[:4] == expected
    assert (found.any(0) == np.tri(64, dtype=bool)).all()


def test_tiles_are_visited_whole_heads_alike() -> None:
    a = replaced(StridedShards(tile=64), view(P=1024, M=1024, H=4))
    visited, total = tiles(a, 64, heads=4)
    one = kept(replaced(StridedShards(tile=1), view(P=16, M=16, H=4)), 4)
    assert (visited, total) == (one.sum(), 4 * 16 * 16)


def test_heads_that_share_keys_share_a_shard_and_none_is_left_to_nobody() -> None:
    grouped = attention(build("core", softmax, causal, group=2, h=8).with_sizes({"P": 32, "M": 32}))
    found = kept(replaced(StridedShards(tile=1), grouped), 8)  # type: ignore[arg-type]
    assert (found[0::2] == found[1::2]).all()
    assert (found.any(0) == np.tri(32, dtype=bool)).all()
    no = StridedShards(stride=16).replace(view(P=64, M=64, H=3))
    assert isinstance(no, Refusal)
    assert "leave some of 16 shards to nobody" in no.reason
