"""Cascades of the papers, as data: FuseMax's Cascades 1 to 5 and the textbook row rules around one attention core.

core     QK[b,h,p,m] = Σ_e Q·K;  S = score(QK);  row rule;  O[b,h,p,f] = Σ_m A·V
letters  b batch, h head, p query, m key, e embedding, f value (Nayak et al., "FuseMax", MICRO 2024, section II)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sympy

from . import expr as ex
from .cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from .expr import Expr


def size(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


@dataclass
class Builder:
    """Collects ranks, tensors and Einsums; ranks take the size symbol of their name in capitals unless told."""

    sizes: dict[str, Size] = field(default_factory=dict)
    iterative: tuple[str, ...] = ()
    dtypes: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    einsums: list[Einsum] = field(default_factory=list)

    def extent(self, rank: str) -> Size:
        return self.sizes.get(rank, size(rank.upper()))

    def input(self, name: str, ranks: str, dtype: str = "f32") -> Expr:
        """Declare an input over one-letter ranks and load it there. `.` separates longer rank names."""
        at = _split(ranks)
        self.tensors[name] = Tensor(name, tuple(self.extent(r) for r in at), dtype)
        return ex.load(name, tuple(ex.index(r) for r in at), dtype)

    def given(self, name: str, shape: tuple[Size, ...], at: tuple[Expr, ...], dtype: str = "f32") -> Expr:
        """Declare an input by shape and load it at index terms."""
        self.tensors[name] = Tensor(name, shape, dtype)
        return ex.load(name, at, dtype)

    def put(self, name: str, ranks: str, body: Expr, op: str | None = None, over: str = "") -> Expr:
        """Add an Einsum that writes `name` over ranks, and load it there."""
        at = tuple(ex.index(r) for r in _split(ranks))
        shape = tuple(self.extent(r) for r in _split(ranks))
        return self.write(name, shape, at, body, op, over)

    def write(
        self,
        name: str,
        shape: tuple[Size, ...],
        at: tuple[Expr, ...],
        body: Expr,
        op: str | None = None,
        over: str = "",
    ) -> Expr:
        self.tensors.setdefault(name, Tensor(name, shape, body.dtype))
        self.einsums.append(Einsum(Access(name, at), body, op, _split(over)))
        return ex.load(name, at, self.tensors[name].dtype)

    def cascade(self, name: str, *outputs: str) -> Cascade:
        used = sorted(frozenset().union(*(e.ranks | set(e.over) for e in self.einsums)))
        ranks = tuple(Rank(r, self.extent(r), r in self.iterative) for r in used)
        return verify(Cascade(name, ranks, tuple(self.tensors.values()), tuple(self.einsums), outputs))


def _split(ranks: str) -> tuple[str, ...]:
    return tuple(ranks.split(".")) if "." in ranks else tuple(ranks)


# --- the core -----------------------------------------------------------------------------------------------------

Score = Callable[[Builder, Expr], Expr]
Rule = Callable[[Builder, Expr], Expr]


def plain(b: Builder, qk: Expr) -> Expr:
    return qk * 0.125


def attention(
    name: str, rule: Rule, score: Score = plain, late: bool = False, group: int = 1, **sizes: Size
) -> Cascade:
    """Scores, a row rule that gives the weights, and the product with the values.

    `group` query heads share a key head; `late`: the rule answers weights whose normaliser `SD` divides the product.
    """
    b = Builder(dict(sizes))
    h = ex.index("h")
    at = (ex.index("b"), h // group, ex.index("m"))
    heads = b.extent("h")
    shape = (b.extent("b"), heads // group if isinstance(heads, int) else heads / group, b.extent("m"))
    q = b.input("Q", "bhpe")
    k = b.given("K", (*shape, b.extent("e")), (*at, ex.index("e")))
    v = b.given("V", (*shape, b.extent("f")), (*at, ex.index("f")))
    qk = b.put("QK", "bhpm", q * k, "add", "e")
    s = b.put("S", "bhpm", score(b, qk))
    w = b.put("A", "bhpm", rule(b, s))
    if not late:
        b.put("O", "bhpf", w * v, "add", "m")
        return b.cascade(name, "O")
    n = b.put("N", "bhpf", w * v, "add", "m")
    b.put("O", "bhpf", n / ex.load("SD", tuple(ex.index(r) for r in "bhp"), b.tensors["SD"].dtype))
    return b.cascade(name, "O")


def softmax(b: Builder, s: Expr) -> Expr:
    """Cascade 4: GM, SN, SD, A."""
    gm = b.put("GM", "bhp", s, "max", "m")
    sn = b.put("SN", "bhpm", ex.exp(s - gm))
    return sn / b.put("SD", "bhp", sn, "add", "m")


def softmax_late(b: Builder, s: Expr) -> Expr:
    """The same with the division deferred to the product."""
    gm = b.put("GM", "bhp", s, "max", "m")
    sn = b.put("SN", "bhpm", ex.exp(s - gm))
    b.put("SD", "bhp", sn, "add", "m")
    return sn


def softmax_zero(b: Builder, s: Expr) -> Expr:
    """SDPA with a boolean mask: a row without a key gets zeros."""
    a = softmax(b, s)
    gm = ex.load("GM", tuple(ex.index(r) for r in "bhp"), "f32")
    return ex.where(ex.equal(gm, float("-inf")), 0.0, a)


def softmax_naive(b: Builder, s: Expr) -> Expr:
    sn = b.put("SN", "bhpm", ex.exp(s))
    return sn / b.put("SD", "bhp", sn, "add", "m")


def softmax_sink(b: Builder, s: Expr) -> Expr:
    """gpt-oss: one more logit without a value."""
    sink = b.input("sink", "h")
    gm = b.put("GM", "bhp", ex.maximum(b.put("RM", "bhp", s, "max", "m"), sink))
    sn = b.put("SN", "bhpm", ex.exp(s - gm))
    return sn / (b.put("SD", "bhp", sn, "add", "m") + ex.exp(sink - gm))


def log_softmax(b: Builder, s: Expr) -> Expr:
    gm = b.put("GM", "bhp", s, "max", "m")
    sd = b.put("SD", "bhp", ex.exp(s - gm), "add", "m")
    return ex.exp((s - gm) - ex.unary("log", sd))


def sigmoid(b: Builder, s: Expr) -> Expr:
    return ex.unary("sigmoid", s)


def power(b: Builder, s: Expr) -> Expr:
    """x²/Σx²"""
    sn = b.put("SN", "bhpm", s * s)
    return sn / b.put("SD", "bhp", sn, "add", "m")


def softplus(b: Builder, s: Expr) -> Expr:
    """softplus and an L1 norm"""
    sn = b.put("SN", "bhpm", ex.unary("softplus", s))
    return sn / b.put("SD", "bhp", sn, "add", "m")


def linear(b: Builder, s: Expr) -> Expr:
    """The quadratic spelling of linear attention."""
    return s / b.put("SD", "bhp", s, "add", "m")
