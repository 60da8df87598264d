"""Small attentions for the code generators' tests: cascades as the lifter writes them, and inputs that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
import torch

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from reattend.patterns.evaluate import DTYPE
from reattend.patterns.expr import Expr

B, H, P, M, E, F = (ex.index(r) for r in "bhpmef")
LOWEST = -3.4028234663852886e38
INF = float("inf")
Score = Callable[[Expr], Expr]


def size(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


@dataclass(frozen=True)
class Case:
    """A cascade and the shapes of its inputs once its sizes are bound."""

    cascade: Cascade
    sizes: Mapping[str, int]

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        bound = self.cascade.with_sizes(self.sizes)
        return {t.name: make(t, dtype, g) for t in bound.inputs}


def make(t: Tensor, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    shape = [int(s) for s in t.shape]
    if t.dtype == "b1":
        return torch.rand(shape, generator=g) > 0.3
    if t.dtype in ex.FLOATS:
        return torch.randn(shape, generator=g).to(dtype if t.name in ("Q", "K", "V") else DTYPE[t.dtype])
    return torch.randint(0, 4, shape, generator=g).sort(-1).values.to(DTYPE[t.dtype])


def build(
    score: Score, *, row: str = "softmax", b: int = 2, h: int = 4, group: int = 1, p: int = 37, m: int = 37, e: int = 16,
    f: int = 0, dtype: str = "f32", aux: tuple[Tensor, ...] = (), scale: float = 0.25, zero: bool = False,
    finish: Callable[[Expr], Expr] | None = None, sink: Expr | None = None, symbols: Mapping[str, int] | None = None,
    square: bool = False, factor: Expr | None = None,
) -> Case:
    """Attention over ranks b, h, p, m, e, f with symbolic lengths; `square` says that queries and keys are as many."""
    f = f or e
    queries: Size = size("s")
    keys: Size = queries if square else size("t")
    ranks = (Rank("b", size("n")), Rank("h", h), Rank("p", queries), Rank("m", keys), Rank("e", e), Rank("f", f))
    head = H // group if group > 1 else H
    q, k, v = ex.load("Q", (B, H, P, E), dtype), ex.load("K", (B, head, M, E), dtype), ex.load("V", (B, head, M, F), dtype)
    bhpm, bhp = (size("n"), h, queries, keys), (size("n"), h, queries)
    tensors = [
        Tensor("Q", (size("n"), h, queries, e), dtype), Tensor("K", (size("n"), h // group, keys, e), dtype),
        Tensor("V", (size("n"), h // group, keys, f), dtype), *aux, Tensor("QK", bhpm), Tensor("S", bhpm),
        Tensor("A", bhpm), Tensor("N", (size("n"), h, queries, f)), Tensor("O", (size("n"), h, queries, f), dtype),
    ]
    qk, s = ex.load("QK", (B, H, P, M), "f32"), ex.load("S", (B, H, P, M), "f32")
    einsums = [
        Einsum(Access("QK", (B, H, P, M)), ex.cast(q, "f32") * ex.cast(k, "f32"), "add", ("e",)),
        Einsum(Access("S", (B, H, P, M)), score(qk * scale)),
    ]

    def reduce(name: str, op: str, body: Expr) -> Expr:
        tensors.append(Tensor(name, bhp))
        einsums.append(Einsum(Access(name, (B, H, P)), body, op, ("m",)))
        return ex.load(name, (B, H, P), "f32")

    match row:
        case "softmax":
            top = reduce("GM", "max", s)
            if sink is not None:
                top = ex.maximum(top, sink)
            total = reduce("SD", "add", ex.exp(s - top))
            if sink is not None:
                total = total + ex.exp(sink - top)
            weight = ex.exp(s - top) / total
            if zero:
                weight = ex.where(ex.equal(top, -INF), 0.0, weight)
        case "sigmoid":
            weight = ex.unary("sigmoid", s)
        case "square":
            weight = s * s / reduce("SS", "add", s * s)
        case "linear":
            weight = s
        case _:
            raise ValueError(row)
    weight = weight * factor if factor is not None else weight
    einsums.append(Einsum(Access("A", (B, H, P, M)), weight))
    einsums.append(Einsum(Access("N", (B, H, P, F)), ex.load("A", (B, H, P, M), "f32") * ex.cast(v, "f32"), "add", ("m",)))
    n = ex.load("N", (B, H, P, F), "f32")
    einsums.append(Einsum(Access("O", (B, H, P, F)), ex.cast(finish(n) if finish else n, dtype)))
    sizes = {"n": b, "s": p, **({} if square else {"t": m}), **(symbols or {})}
    c = Cascade("attention", ranks, tuple(tensors), tuple(einsums), ("O",))
    return Case(verify(c), sizes)


def aux(name: str, shape: tuple[Size, ...], dtype: str = "f32") -> Tensor:
    return Tensor(name, shape, dtype)


def masked(keep: Expr, fill: float = -INF) -> Score:
    return lambda s: ex.where(keep, s, fill)


def added(keep: Expr, fill: float = LOWEST) -> Score:
    return lambda s: s + ex.where(keep, 0.0, fill)


CAUSAL = M <= P
N, S, T = size("n"), size("s"), size("t")
PAD = ex.load("pad", (B, M), "b1")
SEGMENT = ex.equal(ex.load("seg", (B, P), "i64"), ex.load("seg", (B, M), "i64"))


def window(w: int) -> Expr:
    return CAUSAL & (w > P - M)


def dropped(rate: float) -> Expr:
    """What weights are multiplied with where their dropout is counted (rewriter/graph/dropout.py)."""
    first, second = (ex.binary("draw", ex.load("seed", (ex.const(k),), "i64"), (B * 4 + H) * ex.symbol("s") + P) for k in (0, 1))
    drawn = ex.binary("draw", second, ex.binary("draw", first, M))
    return ex.where(drawn >= round(rate * 2**31), 1 / (1 - rate), 0.0)


def long_sum(p: int) -> tuple[Case, dict[str, torch.Tensor]]:
    """Many small weights beside a few large ones, under values with a common mean: a sum that is long loses them."""
    case = build(lambda s: s, p=p, m=8192, b=1)
    x = case.inputs()
    return case, {**x, "Q": x["Q"] * 4, "V": x["V"] + 5}


def relative_rms(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of a result beside the largest number of its row."""
    return float(((out - exact) / exact.abs().amax(-1, keepdim=True)).square().mean().sqrt())


VARIANTS: dict[str, Callable[..., Case]] = {
    "plain": lambda **k: build(lambda s: s, **k),
    "causal": lambda **k: build(masked(CAUSAL), **k, square=True),
    "causal_added": lambda **k: build(added(CAUSAL), **k, square=True),
    "window": lambda **k: build(masked(window(9)), **k, square=True),
    "padding": lambda **k: build(added(PAD), aux=(aux("pad", (N, T), "b1"),), **k),
    "causal_padding": lambda **k: build(added(CAUSAL & PAD), aux=(aux("pad", (N, S), "b1"),), square=True, **k),
    "sdpa_padding": lambda **k: build(masked(PAD), zero=True, aux=(aux("pad", (N, T), "b1"),), **k),
    "nan_padding": lambda **k: build(masked(PAD), aux=(aux("pad", (N, T), "b1"),), **k),
    "small_fill": lambda **k: build(masked(CAUSAL, -1e9), square=True, **k),
    "small_added": lambda **k: build(added(window(9), -1e4), square=True, **k),
    "small_padding": lambda **k: build(added(CAUSAL & PAD, -1e4), aux=(aux("pad", (N, S), "b1"),), square=True, **k),
    "segments": lambda **k: build(masked(CAUSAL & SEGMENT), aux=(aux("seg", (N, S), "i64"),), square=True, **k),
    "prefix": lambda **k: build(masked(CAUSAL | (M < 11)), square=True, **k),
    "alibi": lambda **k: build(
        lambda s: added(CAUSAL)(s + ex.load("slope", (H,), "f32") * ex.cast(M - P, "f32")),
        aux=(aux("slope", (4,)),), square=True, **k,
    ),
    "softcap": lambda **k: build(lambda s: added(CAUSAL)(ex.unary("tanh", s / 5.0) * 5.0), square=True, **k),
    "sinks": lambda **k: build(added(CAUSAL), sink=ex.load("sink", (H,), "f32"), aux=(aux("sink", (4,)),), square=True, **k),
    "bias": lambda **k: build(lambda s: s + ex.load("bias", (ex.const(0), H, P, M), "f32"), aux=(aux("bias", (1, 4, S, T)),), **k),
    "gqa": lambda **k: build(masked(CAUSAL), group=2, square=True, **k),
    "mqa_window": lambda **k: build(masked(window(5)), group=4, square=True, **k),
    "wide_values": lambda **k: build(masked(CAUSAL), f=24, square=True, **k),
    "cross": lambda **k: build(lambda s: s, **{"p": 19, "m": 53, **k}),
    "decode": lambda **k: build(added(P + ex.symbol("past") >= M), p=1, m=41, symbols={"past": 40}, **k),
    "sigmoid": lambda **k: build(masked(CAUSAL), row="sigmoid", square=True, **k),
    "square": lambda **k: build(lambda s: ex.where(CAUSAL, s, 0.0), row="square", square=True, **k),
    "cosine_cap": lambda **k: build(
        lambda s: ex.unary("tanh", s * ex.unary("cos", ex.cast(P - M, "f32") * 0.1)) * 3.0, **k
    ),
    "dropped": lambda **k: build(masked(CAUSAL), factor=dropped(0.25), aux=(aux("seed", (2,), "i64"),), square=True, **k),
    "checkerboard": lambda **k: build(masked(ex.equal((P + M + H) % 2, 0)), square=True, **k),
}


def windows(dtype: str = "f32") -> Case:
    """Swin-like: batch of images, of windows, heads; a mask per window and a bias per head over three batch ranks."""
    i, w, h, p, m, e, f = (ex.index(r) for r in "iwhpmef")
    n = size("n")
    sizes: dict[str, Size] = {"i": n, "w": 3, "h": 2, "p": 16, "m": 16, "e": 8, "f": 8}

    def at(ranks: str) -> tuple[Size, ...]:
        return tuple(sizes[r] for r in ranks)

    tensors = (
        Tensor("Q", at("iwhpe"), dtype), Tensor("K", at("iwhme"), dtype), Tensor("V", at("iwhmf"), dtype),
        Tensor("table", at("hpm")), Tensor("shift", at("wpm"), "b1"), Tensor("QK", at("iwhpm")), Tensor("S", at("iwhpm")),
        Tensor("GM", at("iwhp")), Tensor("SD", at("iwhp")), Tensor("A", at("iwhpm")), Tensor("O", at("iwhpf"), dtype),
    )
    qk, s, a = (ex.load(x, (i, w, h, p, m), "f32") for x in ("QK", "S", "A"))
    gm, sd = (ex.load(x, (i, w, h, p), "f32") for x in ("GM", "SD"))
    score = qk * 0.25 + ex.load("table", (h, p, m), "f32") + ex.where(ex.load("shift", (w, p, m), "b1"), 0.0, LOWEST)
    q, k, v = ex.load("Q", (i, w, h, p, e), dtype), ex.load("K", (i, w, h, m, e), dtype), ex.load("V", (i, w, h, m, f), dtype)
    einsums = (
        Einsum(Access("QK", (i, w, h, p, m)), ex.cast(q, "f32") * ex.cast(k, "f32"), "add", ("e",)),
        Einsum(Access("S", (i, w, h, p, m)), score), Einsum(Access("GM", (i, w, h, p)), s, "max", ("m",)),
        Einsum(Access("SD", (i, w, h, p)), ex.exp(s - gm), "add", ("m",)),
        Einsum(Access("A", (i, w, h, p, m)), ex.exp(s - gm) / sd),
        Einsum(Access("O", (i, w, h, p, f)), a * ex.cast(v, "f32"), "add", ("m",)),
    )
    c = Cascade("windows", tuple(Rank(r, x) for r, x in sizes.items()), tensors, einsums, ("O",))
    return Case(verify(c), {"n": 2})


def no_batch(dtype: str = "f32") -> Case:
    """One head by itself: queries, keys, and nothing around them."""
    p, m, e, f = (ex.index(r) for r in "pmef")
    sizes: dict[str, Size] = {"p": size("s"), "m": size("s"), "e": 16, "f": 16}
    tensors = tuple(
        Tensor(n, tuple(sizes[r] for r in ranks), kind)
        for n, ranks, kind in (
            ("Q", "pe", dtype), ("K", "me", dtype), ("V", "mf", dtype), ("QK", "pm", "f32"), ("GM", "p", "f32"),
            ("SD", "p", "f32"), ("A", "pm", "f32"), ("O", "pf", dtype),
        )
    )
    s = ex.where(m <= p, ex.load("QK", (p, m), "f32") * 0.25, -INF)
    gm, sd, a = ex.load("GM", (p,), "f32"), ex.load("SD", (p,), "f32"), ex.load("A", (p, m), "f32")
    q, k, v = (ex.cast(ex.load(n, at, dtype), "f32") for n, at in (("Q", (p, e)), ("K", (m, e)), ("V", (m, f))))
    einsums = (
        Einsum(Access("QK", (p, m)), q * k, "add", ("e",)), Einsum(Access("GM", (p,)), s, "max", ("m",)),
        Einsum(Access("SD", (p,)), ex.exp(s - gm), "add", ("m",)), Einsum(Access("A", (p, m)), ex.exp(s - gm) / sd),
        Einsum(Access("O", (p, f)), a * v, "add", ("m",)),
    )
    return Case(verify(Cascade("alone", tuple(Rank(r, x) for r, x in sizes.items()), tensors, einsums, ("O",))), {"s": 37})
