"""Expectations as text: what they mean for the tiles of a mask, and one sentence for what means nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reattend.cost_model.count.expect import Expect, ExpectError, Known, checked, known, parse, unknowns
from reattend.cost_model.devices.device import shipped
from reattend.cost_model.time.predict import best_mapping, tiles_of
from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping
from reattend.patterns.masks.split import PARTIAL
from reattend.patterns.verdict import Obstacle

B, P, M = ex.index("b"), ex.index("p"), ex.index("m")
SIZES = {"B": 2, "H": 4, "P": 1024, "M": 1024, "E": 64, "F": 64}


def masked(
    keep: Callable[[Callable[..., ex.Expr]], ex.Expr], shape: tuple[int, ...], dtype: str
) -> tuple[Cascade, Attention]:
    """An attention whose mask loads run-time tensors of one shape: `keep(load)`."""

    def score(b: papers.Builder, qk: ex.Expr) -> ex.Expr:
        return ex.where(keep(lambda name, *at: b.given(name, shape, at, dtype)), qk * 0.125, -3e38)

    c = papers.attention("masked", papers.softmax, score)
    view = attention(c)
    assert isinstance(view, Attention), view
    return c, view


def padded(load: Callable[..., ex.Expr]) -> ex.Expr:
    return (M <= P) & load("pad", B, M)


PAD = masked(padded, (2, 1024), "b1")
PACKED = masked(
    lambda load: ex.equal(load("seg", B, P), load("seg", B, M)) & (load("pos", B, M) <= load("pos", B, P)),
    (2, 1024), "i64",
)
BLOCKS = masked(lambda load: load("table", B, P // 64, M // 64) & (M <= P), (2, 16, 16), "b1")


def taken(site: tuple[Cascade, Attention], *texts: str, **origins: tuple[str, ...]) -> Known:
    return known(*site, SIZES, [parse(t) for t in texts], origins)


def visited(site: tuple[Cascade, Attention], *texts: str, **origins: tuple[str, ...]) -> tuple[float, float]:
    """Tiles visited and partial, over the batch."""
    found = tiles_of(site[0], TileMapping(64, 64), SIZES, taken(site, *texts, **origins).data)
    assert not isinstance(found, Obstacle)
    rows = found.visited.shape[0]
    return float(found.visited.sum()) * 2 / rows, float(found.partial.sum()) * 2 / rows


def brute(keep: np.ndarray[Any, Any]) -> tuple[int, int]:
    tiles = keep.reshape(2, 16, 64, 16, 64)
    some, all_ = tiles.any((2, 4)), tiles.all((2, 4))
    return int(some.sum()), int((some & ~all_).sum())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pad=0.25", Expect("pad", "share", (0.25,))),
        ("pad=25%", Expect("pad", "share", (0.25,), True)),
        ("table=blocks:16", Expect("table", "blocks", (16.0,))),
        ("a.b=length:1k,4k,700", Expect("a.b", "length", (1024.0, 4096.0, 700.0))),
        ("pad=length:60%", Expect("pad", "length", (0.6,), True)),
        ("ids=segments:8", Expect("ids", "segments", (8.0,))),
    ],
)
def test_forms(text: str, expected: Expect) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("pad", "is no expectation"), ("=0.5", "is no expectation"), ("pad=mean:4", "is no expectation"),
        ("pad=many", "'many' is no number"), ("pad=", "'' is no number"), ("pad=1.5", "a share lies between 0 and 1"),
        ("pad=blocks:1,2", "is no number"), ("pad=length:0", "a sequence keeps 1 token or more"),
        ("pad=length:120%", "or a part of 100%"), ("pad=length:50%,700", "a part of 100%"),
        ("ids=segments:2.5", "1 whole segment or more"), ("ids=segments:50%", "1 whole segment or more"),
    ],
)
def test_what_means_nothing_is_refused_with_the_forms(text: str, reason: str) -> None:
    with pytest.raises(ExpectError, match=r"write NAME=0.25") as no:
        parse(text)
    assert reason in str(no.value)


def test_lengths_are_counted_exactly() -> None:
    """Causal and padded to 300 and 1024 of 1024 tokens, in turn over the batch."""
    p, m = np.arange(1024)[:, None], np.arange(1024)[None, :]
    keep = np.stack([(m <= p) & (m < n) for n in (300, 1024)])
    assert visited(PAD, "pad=length:300,1024") == brute(keep)
    assert visited(PAD, "pad=length:300") == brute(np.stack([keep[0]] * 2))
    assert visited(PAD, "pad=length:50%") == brute(np.stack([(m <= p) & (m < 512)] * 2))
    assert visited(PAD, "pad=length:9999") == brute(np.stack([keep[1]] * 2))


def test_segments_number_what_is_compared_by_equality_and_order_what_is_compared_by_order() -> None:
    p, m = np.arange(1024)[:, None], np.arange(1024)[None, :]
    keep = np.stack([(m <= p) & (m * 8 // 1024 == p * 8 // 1024)] * 2)
    origins = {"seg": ("position_ids",), "pos": ("position_ids",)}
    assert visited(PACKED, "position_ids=segments:8", **origins) == brute(keep)
    words = taken(PACKED, "position_ids=segments:8", **origins).words
    assert words == tuple(f"expected: position_ids ({n}) packs 8 segments of equal length" for n in ("seg", "pos"))


def test_block_tables_are_expectations() -> None:
    assert visited(BLOCKS, "table=0.5")[0] == pytest.approx(0.5 * visited(BLOCKS)[0])
    # rows with fewer than four causal tiles keep them all
    assert visited(BLOCKS, "table=blocks:4")[0] == pytest.approx(2 * (1 + 2 + 3 + 13 * 4), abs=1)
    with pytest.raises(ExpectError, match="table is a table of queries by keys, no row of tokens: give a share"):
        taken(BLOCKS, "table=length:100")


def test_a_share_of_one_input_thins_once() -> None:
    """Two tensors that come from one input are one condition."""
    origins = {"seg": ("ids",), "pos": ("ids",)}
    assert visited(PACKED, "ids=0.25", **origins)[0] == pytest.approx(0.25 * visited(PACKED)[0], rel=0.01)
    assert len(taken(PACKED, "ids=0.25", **origins).words) == 1


def test_what_is_not_expected_is_said() -> None:
    assert taken(PAD).words == ("predicted as if pad kept every key",)
    assert taken(PAD, pad=("attention_mask",)).words == ("predicted as if pad kept every key (from attention_mask)",)
    assert unknowns(PACKED[1]) == ("seg", "pos")


def test_without_sizes_nothing_is_expected() -> None:
    """A table has the sizes of its tokens."""
    short = known(*PAD, {"B": 2}, [parse("pad=length:300")], {})
    assert short.data.tables == {}
    assert short.words == ("predicted as if pad kept every key",)


def test_names_are_checked() -> None:
    checked([parse("attention_mask=0.5"), parse("X2=0.5")], {"X2": ("attention_mask",)})
    with pytest.raises(ExpectError, match="no mask reads 'mask': one of attention_mask"):
        checked([parse("mask=0.5")], {"X2": ("attention_mask",)})
    with pytest.raises(ExpectError, match="no mask of this model reads run-time data"):
        checked([parse("mask=0.5")], {})


@pytest.mark.parametrize("device", ["h200", "cpu"])
def test_shorter_sequences_are_predicted_faster(device: str) -> None:
    """On a long sequence, an eighth of the keys takes less than half of the time."""
    sizes = {**SIZES, "H": 32, "P": 4096, "M": 4096}
    c, view = masked(padded, (2, 4096), "b1")
    whole = best_mapping(c, shipped(device), sizes)
    data = known(c, view, sizes, [parse("pad=length:512")], {}).data
    short = best_mapping(c, shipped(device), sizes, data)
    assert not isinstance(whole, Obstacle)
    assert not isinstance(short, Obstacle)
    assert short[1].seconds < 0.5 * whole[1].seconds
    found = tiles_of(c, TileMapping(64, 64), sizes, data)
    assert not isinstance(found, Obstacle)
    assert found.map is not None
    # in both sequences the tiles of the diagonal are partial, and the length is a multiple of a tile
    assert found.partial.sum() == 2 * 8 == found.map.counts(PARTIAL).sum()
