"""Index arithmetic of views against torch's own reshape, element by element."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.rewriter.lift import index


def factorisations(n: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [(n,)]
    for a in range(2, n):
        if n % a == 0:
            found += [(a, *rest) for rest in factorisations(n // a)]
    return found


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n = draw(st.sampled_from([6, 8, 12, 24, 30]))
    shapes = st.sampled_from(factorisations(n))
    ones = st.integers(0, 2)

    def padded(shape: tuple[int, ...]) -> tuple[int, ...]:
        out = list(shape)
        for _ in range(draw(ones)):
            out.insert(draw(st.integers(0, len(out))), 1)
        return tuple(out)

    return padded(draw(shapes)), padded(draw(shapes))


@given(reshapes())
def test_reshape_finds_the_element(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    out_shape, in_shape = shapes
    names = [f"r{d}" for d in range(len(out_shape))]
    at = tuple(ex.const(0) if s == 1 else ex.index(n) for n, s in zip(names, out_shape))
    where = index.reshape(out_shape, in_shape, at, dict(zip(names, out_shape)))
    assert where is not None
    data = torch.arange(math.prod(in_shape)).reshape(in_shape)
    for place in itertools.product(*map(range, out_shape)):
        table = {ex.index(n): ex.const(i) for n, i in zip(names, place)}
        found = tuple(int(ex.substitute(w, table).value) for w in where)
        assert data[found] == data.reshape(out_shape)[place]


def test_untouched_dimensions_pass_through() -> None:
    b, p, h, e = map(ex.index, "bphe")
    where = index.reshape((2, 5, 4, 16), (2, 5, 64), (b, p, h, e), {"b": 2, "p": 5, "h": 4, "e": 16})
    assert where == (b, p, h * 16 + e)
    assert index.reshape((2, 5, 64), (2, 5, 4, 16), (b, p, e), {}) == (b, p, e // 16, e % 16)


def test_split_and_merge_cancel() -> None:
    """A window shift in Swin: view to (n, 4, …) and back again names the same window."""
    w, p = ex.index("w"), ex.index("p")
    split = index.reshape((8, 16), (2, 4, 16), (w, p), {"w": 8, "p": 16})
    assert split == (w // 4, w % 4, p)
    merged = index.reshape((2, 4, 16), (8, 16), split, {"w": 8, "p": 16})
    assert merged == (w, p)


def test_simple_coordinates() -> None:
    h, m = ex.index("h"), ex.index("m")
    assert index.is_simple((h // 4, m, ex.const(0)))
    assert index.is_simple((h // 4, h % 4, m))
    assert not index.is_simple((h * 16 + m,))
    assert not index.is_simple((m, m))
    assert not index.is_simple((ex.load("seg", (m,), "i64"),))
