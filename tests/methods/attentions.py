"""Attentions to put methods upon, what a method keeps of them by brute force, and how many pairs and tiles that is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.cascade import Access, Cascade, Einsum, Tensor, bind
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.library.papers import attention as build
from reattend.patterns.library.papers import size, softmax
from reattend.patterns.masks.split import count_tiles, split
from reattend.patterns.methods.method import Method, Replacement

P, M = ex.index("p"), ex.index("m")


def causal(b: Any, qk: Expr) -> Expr:
    """Bottom-right aligned, as over a cache."""
    return ex.where(M <= P + (ex.symbol("M") - ex.symbol("P")), qk * 0.125, float("-inf"))


def dense(b: Any, qk: Expr) -> Expr:
    return qk * 0.125


def view(score: Any = causal, rule: Any = softmax, **sizes: int) -> Attention:
    """`view(P=16, M=16)`: an attention of two heads with these sizes, of one set of tokens unless both are given."""
    known: dict[str, Any] = {"m": size("P")} if score is dense else {}
    known |= {k.lower(): v for k, v in sizes.items()}
    a = attention(build("core", rule, score, **known))
    assert isinstance(a, Attention), a
    return attention(a.cascade.with_sizes(sizes))  # type: ignore[return-value]


def replaced(method: Method, a: Attention) -> Attention:
    made = method.replace(a)
    assert isinstance(made, Replacement), made
    out = attention(made.cascade)
    assert isinstance(out, Attention), out
    return out


def keep_of(a: Attention) -> Expr:
    return split(a.score, a.key).keep


def kept(a: Attention, heads: int = 1) -> NDArray[np.bool_]:
    """[heads, P, M]: the mask of an attention, each pair evaluated by the oracle."""
    shape = (heads, *(int(bind(a.cascade.rank[r].size, {})) for r in (a.query, a.key)))
    at = tuple(ex.index(r) for r in ("h", a.query, a.key))
    ranks = [r for r in a.cascade.ranks if r.name in ("h", a.query, a.key)]
    ranks = [type(r)(r.name, n) for r, n in zip(sorted(ranks, key=lambda r: ("h", a.query, a.key).index(r.name)), shape)]
    body = keep_of(a) & (ex.index("h") >= 0)
    c = Cascade("mask", tuple(ranks), (Tensor("KEPT", shape, "b1"),), (Einsum(Access("KEPT", at), body),), ("KEPT",))
    return evaluate(c, {})["KEPT"].numpy()


def tiles(a: Attention, side: int, heads: int = 1) -> tuple[int, int]:
    """Visited tiles of side × side, and all."""
    extents = {r: int(bind(a.cascade.rank[r].size, {})) for r in (a.query, a.key)} | {"h": heads, "b": 1}
    n = count_tiles(keep_of(a), query=a.query, key=a.key, extents=extents, tile_p=side, tile_m=side)
    return n.visited, n.total


def draw(a: Attention, heads: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs in float64: batch 1, these heads, width 8."""
    rng = torch.Generator().manual_seed(seed)
    sizes = {"B": 1, "H": heads, "E": 8, "F": 8}
    return {
        t.name: torch.randn([int(bind(n, sizes)) for n in t.shape], generator=rng, dtype=torch.float32)
        for t in a.cascade.inputs
    }
