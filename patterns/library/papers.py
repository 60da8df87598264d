"""Cascades of the papers, as data: FuseMax's Cascades 1 to 5 and the textbook row rules around one attention core.

core     QK[b,h,p,m] = Σ_e Q·K;  S = score(QK);  row rule;  O[b,h,p,f] = Σ_m A·V
letters  b batch, h head, p query, m key, e embedding, f value (Nayak et al., "FuseMax", MICRO 2024, section II)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sympy

from .. import expr as ex
from ..cascade import Access, Cascade, Einsum, Rank, Size, Tensor, size_term, verify
from ..expr import Expr


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
    return tuple(r for r in ranks.split(".") if r) if "." in ranks else tuple(ranks)


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


def softplus_late(b: Builder, s: Expr) -> Expr:
    sn = b.put("SN", "bhpm", ex.unary("softplus", s))
    b.put("SD", "bhp", sn, "add", "m")
    return sn


def linear(b: Builder, s: Expr) -> Expr:
    """The quadratic spelling of linear attention."""
    return s / b.put("SD", "bhp", s, "add", "m")


def differential(b: Builder, s: Expr) -> Expr:
    """(A1 − λ·A2): two softmaxes of one score, the second of twice the temperature."""
    first = softmax(b, s)
    gm = b.put("GM2", "bhp", s * 0.5, "max", "m")
    sn = b.put("SN2", "bhpm", ex.exp(s * 0.5 - gm))
    return first - 0.8 * (sn / b.put("SD2", "bhp", sn, "add", "m"))


def sparsemax(steps: int) -> Rule:
    """Root steps for τ with Σ relu(S − τ) = 1; each sweeps all keys again (Newton's method, from τ = max S − 1)."""

    def rule(b: Builder, s: Expr) -> Expr:
        tau = b.put("GM", "bhp", s, "max", "m") - 1.0
        for i in range(steps):
            over = b.put(f"F{i}", "bhp", ex.unary("relu", s - tau), "add", "m")
            count = b.put(f"N{i}", "bhp", ex.where(s > tau, 1.0, 0.0), "add", "m")
            tau = b.put(f"T{i}", "bhp", tau + (over - 1.0) / count)
        return ex.unary("relu", s - tau)

    return rule


# --- FuseMax ------------------------------------------------------------------------------------------------------


def cascade1() -> Cascade:
    """Y = A_k·B_k;  Z = Y·A_k                                    two passes over k"""
    b = Builder()
    a, x = b.input("A", "k"), b.input("B", "k")
    y = b.put("Y", "", a * x, "add", "k")
    b.put("Z", "", y * a, "add", "k")
    return b.cascade("Cascade 1", "Z")


def cascade2() -> Cascade:
    """Y = A_k·B_k;  X = A_k;  Z = Y·X                            one pass: the product is deferred"""
    b = Builder()
    a, x = b.input("A", "k"), b.input("B", "k")
    y = b.put("Y", "", a * x, "add", "k")
    total = b.put("X", "", a, "add", "k")
    b.put("Z", "", y * total)
    return b.cascade("Cascade 2", "Z")


def cascade3() -> Cascade:
    """RY_i+1 = RY_i + A_i·B_i;  RZ_i+1 = RZ_i·RY_i+1/RY_i + RY_i+1·A_i       one pass: what was summed is repaired

    The division by RY_0 = 0 is guarded: nothing has been summed that would need repair.
    """
    b = Builder(iterative=("i",))
    i, n = ex.index("i"), b.extent("i")
    a, x = b.input("A", "i"), b.input("B", "i")
    one = ex.const(1)
    b.write("RY", (n + 1,), (ex.const(0),), ex.const(0.0))
    b.write("RZ", (n + 1,), (ex.const(0),), ex.const(0.0))
    old = ex.load("RY", (i,), "f32")
    new = b.write("RY", (n + 1,), (i + one,), old + a * x)
    factor = ex.where(ex.equal(old, 0.0), 0.0, new / old)
    b.write("RZ", (n + 1,), (i + one,), ex.load("RZ", (i,), "f32") * factor + new * a)
    b.put("Z", "", ex.load("RZ", (size_term(n),), "f32"))
    return b.cascade("Cascade 3", "Z")


def _head(b: Builder) -> tuple[Expr, Expr, Expr]:
    return b.input("Q", "pe"), b.input("K", "me"), b.input("V", "mf")


def cascade4(deferred: bool = False) -> Cascade:
    """QK; GM; SN = e^(QK − GM); SD; A = SN/SD; AV                three passes over m; two with the division deferred"""
    b = Builder()
    q, k, v = _head(b)
    qk = b.put("QK", "pm", q * k, "add", "e")
    gm = b.put("GM", "p", qk, "max", "m")
    sn = b.put("SN", "pm", ex.exp(qk - gm))
    sd = b.put("SD", "p", sn, "add", "m")
    _divided(b, sn, sd, v, "m", "pm", deferred)
    return b.cascade("Cascade 4", "AV")


def naive(deferred: bool = False) -> Cascade:
    """QK; SN = e^QK; SD; A; AV                                   two passes, one with the division deferred"""
    b = Builder()
    q, k, v = _head(b)
    qk = b.put("QK", "pm", q * k, "add", "e")
    sn = b.put("SN", "pm", ex.exp(qk))
    sd = b.put("SD", "p", sn, "add", "m")
    _divided(b, sn, sd, v, "m", "pm", deferred)
    return b.cascade("naive softmax", "AV")


def _divided(b: Builder, sn: Expr, sd: Expr, v: Expr, over: str, at: str, deferred: bool) -> None:
    if deferred:
        b.put("AV", "pf", b.put("SNV", "pf", sn * v, "add", over) / sd)
    else:
        b.put("AV", "pf", b.put("A", at, sn / sd) * v, "add", over)


def _tiled(b: Builder) -> tuple[Expr, Expr, Expr]:
    """K and V cut into M1 tiles of M0 keys: BK[m1,m0] = K[m1·M0 + m0]. M0 divides M in these textbook forms."""
    m1, m0 = size("M1"), size("M0")
    b.sizes.update({"m1": m1, "m0": m0})
    key = ex.index("m1") * ex.symbol("M0") + ex.index("m0")
    q = b.input("Q", "pe")
    k = b.given("K", (m1 * m0, b.extent("e")), (key, ex.index("e")))
    v = b.given("V", (m1 * m0, b.extent("f")), (key, ex.index("f")))
    bk, bv = b.put("BK", "m1.m0.e", k), b.put("BV", "m1.m0.f", v)
    return b.put("BQK", "p.m1.m0", q * bk, "add", "e"), bk, bv


def local_max(deferred: bool = False) -> Cascade:
    """Per tile a maximum and a sum, combined over tiles; then the weights            two passes, deferred or not"""
    b = Builder()
    qk, _, bv = _tiled(b)
    lm = b.put("LM", "p.m1", qk, "max", "m0.")
    gm = b.put("GM", "p", lm, "max", "m1.")
    sln = b.put("SLN", "p.m1.m0", ex.exp(qk - lm))
    sld = b.put("SLD", "p.m1", sln, "add", "m0.")
    plm = b.put("PLM", "p.m1", ex.exp(lm - gm))
    sd = b.put("SD", "p", sld * plm, "add", "m1.")
    sn = b.put("SN", "p.m1.m0", sln * plm)
    _divided(b, sn, sd, bv, "m1.m0", "p.m1.m0", deferred)
    return b.cascade("local maxima", "AV")


def cascade5() -> Cascade:
    """Running maximum, sum and product, repaired by e^(RM_m1 − RM_m1+1): FlashAttention-2     one pass over (m1, m0)"""
    b = Builder(iterative=("m1",))
    qk, _, bv = _tiled(b)
    p, f, m1 = ex.index("p"), ex.index("f"), ex.index("m1")
    one, start, tiles = ex.const(1), ex.const(0), b.extent("m1")
    rows, values = b.extent("p"), b.extent("f")

    def running(name: str, at: tuple[Expr, ...], shape: tuple[Size, ...], identity: float) -> None:
        b.write(name, (*shape, tiles + 1), (*at, start), ex.const(identity))

    running("RM", (p,), (rows,), -float("inf"))
    running("RD", (p,), (rows,), 0.0)
    running("RNV", (p, f), (rows, values), 0.0)
    # The views of K and V stand in the loop in the paper; they hold no state, and their place is free.
    rm, rd, rnv = ex.load("RM", (p, m1), "f32"), ex.load("RD", (p, m1), "f32"), ex.load("RNV", (p, f, m1), "f32")
    lm = b.put("LM", "p.m1", qk, "max", "m0.")
    new = b.write("RM", (rows, tiles + 1), (p, m1 + one), ex.maximum(rm, lm))
    sln = b.put("SLN", "p.m1.m0", ex.exp(qk - new))
    sld = b.put("SLD", "p.m1", sln, "add", "m0.")
    slnv = b.put("SLNV", "p.f.m1", sln * bv, "add", "m0.")
    prm = b.put("PRM", "p.m1", ex.exp(rm - new))
    spd = b.put("SPD", "p.m1", rd * prm)
    b.write("RD", (rows, tiles + 1), (p, m1 + one), sld + spd)
    spnv = b.put("SPNV", "p.f.m1", rnv * prm)
    b.write("RNV", (rows, values, tiles + 1), (p, f, m1 + one), slnv + spnv)
    last = size_term(tiles)
    b.put("AV", "pf", ex.load("RNV", (p, f, last), "f32") / ex.load("RD", (p, last), "f32"))
    return b.cascade("Cascade 5", "AV")


def reassociated() -> Cascade:
    """KV_e,f = Σ_m K·V;  AV_p,f = Σ_e Q·KV                       linear attention, one pass over m, no scores"""
    b = Builder()
    q, k, v = _head(b)
    kv = b.put("KV", "ef", k * v, "add", "m")
    b.put("AV", "pf", q * kv, "add", "e")
    return b.cascade("linear attention, keys first", "AV")


def scaled_twice() -> Cascade:
    """Y = A_k·B_k;  Z = Y·C_k                                    a barrier, but each input is visited once"""
    b = Builder()
    y = b.put("Y", "", b.input("A", "k") * b.input("B", "k"), "add", "k")
    b.put("Z", "", y * b.input("C", "k"), "add", "k")
    return b.cascade("scaled twice", "Z")


def cosine() -> Cascade:
    """Both operands divided by their length over e; the score is bounded, so no maximum      one pass over m, two over e"""
    b = Builder()
    q, k, v = _head(b)
    qh = b.put("QH", "pe", q * ex.unary("rsqrt", b.put("QN", "p", q * q, "add", "e")))
    kh = b.put("KH", "me", k * ex.unary("rsqrt", b.put("KN", "m", k * k, "add", "e")))
    sn = b.put("SN", "pm", ex.exp(b.put("QK", "pm", qh * kh, "add", "e")))
    _divided(b, sn, b.put("SD", "p", sn, "add", "m"), v, "m", "pm", deferred=True)
    return b.cascade("cosine attention", "AV")
