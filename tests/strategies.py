"""Random attentions for hypothesis: a score, a mask and a row rule drawn from pieces that no file of the library names.

    programs()   →   Program(cascade, sizes, label).inputs(seed)

Every generator is tested on the same draws: print the cascade, run it, compare with `evaluate` in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
import torch
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Size, Tensor, verify
from reattend.patterns.evaluate import DTYPE
from reattend.patterns.expr import Expr

B, H, P, M, E, F = (ex.index(r) for r in "bhpmef")
LOWEST = -3.4028234663852886e38
INF = float("inf")
QUERIES, KEYS = (sympy.Symbol(n, integer=True, positive=True) for n in "st")


def _load(name: str, *at: Expr | int, dtype: str = "f32") -> Expr:
    return ex.load(name, tuple(ex.lift_scalar(i, "i64") for i in at), dtype)


def _real(e: Expr) -> Expr:
    return ex.cast(e, "f32")


# What may be done to a score. The names of the loads are those of `_AUXILIARY`.
SCORES: Mapping[str, Callable[[Expr], Expr]] = {
    "cap": lambda s: ex.unary("tanh", s / 5.0) * 5.0,
    "slope": lambda s: s + _load("slope", H) * _real(M - P),
    "distance": lambda s: s * ex.unary("cos", _real(P - M) * 0.1),
    "bias": lambda s: s + _load("bias", 0, H, P, M),
    "temperature": lambda s: s * _load("temperature", B, P),
    "table": lambda s: s + _load("table", ex.minimum(ex.maximum(P - M + 7, 0), 15), H),
    "bounded": lambda s: ex.minimum(ex.maximum(s, -2.0), 2.0),
    "folded": lambda s: ex.unary("abs", s) - 0.5,
    "soft": lambda s: ex.unary("softplus", s),
    "gate": lambda s: s * ex.unary("sigmoid", _load("gate", B, M)),
    "root": lambda s: ex.unary("sqrt", s * s + 1.0),
    "parity": lambda s: ex.where(ex.equal((P - M) % 3, 0), s * 1.5, s),
    "logarithm": lambda s: s - ex.unary("log1p", _real(ex.unary("abs", P - M))),
}
# Which keys a row keeps.
MASKS: Mapping[str, Expr] = {
    "causal": M <= P,
    "window": (P - M < 9) & (M - P < 5),
    "prefix": (M < 6) | (M <= P),
    "padding": _load("pad", B, M, dtype="b1"),
    "segments": ex.equal(_load("group", B, P, dtype="i64"), _load("group", B, M, dtype="i64")),
    "checkerboard": ex.equal((P + M + H) % 2, 0),
    "dilated": ex.equal((P - M) % 4, 0),
    "blocks": ex.equal(P // 8, M // 8),
    "random": _load("keep", 0, H, P, M, dtype="b1"),
    "far": ex.unary("abs", P - M) > 3,
    "band": (P * 3 - M * 2 < 20) & (M * 2 - P * 3 < 20),
}
FILLS: Mapping[str, Callable[[Expr, Expr], Expr]] = {
    "−∞": lambda s, keep: ex.where(keep, s, -INF),
    "lowest": lambda s, keep: ex.where(keep, s, LOWEST),
    "added": lambda s, keep: s + ex.where(keep, 0.0, LOWEST),
    "small": lambda s, keep: s + ex.where(keep, 0.0, -1e4),
    "scaled": lambda s, keep: s + (1.0 - _real(keep)) * -1e9,
    # part of the mask is known only at run time, as a tensor of 0 and −∞
    "barred": lambda s, keep: ex.where(keep, s, -INF) + _load("barred", B, M),
}
Reduce = Callable[[str, str, Expr], Expr]


def _softmax(s: Expr, reduce: Reduce) -> Expr:
    top = reduce("GM", "max", s)
    return ex.exp(s - top) / reduce("SD", "add", ex.exp(s - top))


def _zero(s: Expr, reduce: Reduce) -> Expr:
    top = reduce("GM", "max", s)
    return ex.where(ex.equal(top, -INF), 0.0, ex.exp(s - top) / reduce("SD", "add", ex.exp(s - top)))


def _sink(s: Expr, reduce: Reduce) -> Expr:
    sink = _load("sink", H)
    top = ex.maximum(reduce("GM", "max", s), sink)
    return ex.exp(s - top) / (reduce("SD", "add", ex.exp(s - top)) + ex.exp(sink - top))


def _square(s: Expr, reduce: Reduce) -> Expr:
    return s * s / (reduce("SS", "add", s * s) + 1.0)


def _rectified(s: Expr, reduce: Reduce) -> Expr:
    return ex.unary("relu", s) / (reduce("SR", "add", ex.unary("relu", s)) + 1.0)


def _leveled(s: Expr, reduce: Reduce) -> Expr:
    # the row's largest score is read after the sum, by no weight
    return ex.unary("sigmoid", s) / (ex.unary("abs", reduce("GM", "max", s)) + 1.0)


# From scores to weights. The second half cannot take a fill: it is masked on the weights instead.
ROWS: Mapping[str, Callable[[Expr, Reduce], Expr]] = {
    "softmax": _softmax, "zero": _zero, "sink": _sink, "sigmoid": lambda s, _: ex.unary("sigmoid", s),
    "leveled": _leveled, "square": _square, "rectified": _rectified, "linear": lambda s, _: s * 0.1,
}
FILLED = ("softmax", "zero", "sink", "sigmoid", "leveled")

_AUXILIARY: Mapping[str, Callable[[int, int], tuple[tuple[Size, ...], str]]] = {
    "slope": lambda b, h: ((h,), "f32"), "bias": lambda b, h: ((1, h, QUERIES, KEYS), "f32"),
    "temperature": lambda b, h: ((b, QUERIES), "f32"), "table": lambda b, h: ((16, h), "f32"),
    "gate": lambda b, h: ((b, KEYS), "f32"), "sink": lambda b, h: ((h,), "f32"),
    "pad": lambda b, h: ((b, KEYS), "b1"), "group": lambda b, h: ((b, sympy.Max(QUERIES, KEYS)), "i64"),
    "keep": lambda b, h: ((1, h, QUERIES, KEYS), "b1"), "barred": lambda b, h: ((b, KEYS), "f32"),
    "length": lambda b, h: ((b,), "i64"),
}


@dataclass(frozen=True)
class Program:
    """A drawn attention: its cascade, the sizes that no shape shows by itself, and the pieces it was made of."""

    cascade: Cascade
    sizes: Mapping[str, int]
    label: str

    def inputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return {t.name: _values(t, g) for t in self.cascade.with_sizes(self.sizes).inputs}

    def __str__(self) -> str:
        return self.label


def _values(t: Tensor, g: torch.Generator) -> torch.Tensor:
    shape = [int(n) for n in t.shape]
    if t.dtype == "b1":
        return torch.rand(shape, generator=g) > 0.3
    if t.name == "barred":
        return torch.where(torch.rand(shape, generator=g) > 0.3, 0.0, -INF)
    if t.dtype in ex.FLOATS:
        return torch.randn(shape, generator=g).to(DTYPE[t.dtype])
    return torch.randint(0, 4, shape, generator=g).sort(-1).values


def attention(
    score: Callable[[Expr], Expr], row: Callable[[Expr, Reduce], Expr], *, b: int = 1, h: int = 2, group: int = 1,
    p: int = 33, m: int = 33, e: int = 16, f: int = 16, dtype: str = "f32", on_weights: Expr = ex.TRUE, label: str = "",
) -> Program:
    """The cascade of `Σ_m row(score(Q·K))·V` for symbolic lengths s (queries) and t (keys; s too where p = m)."""
    keys: Size = QUERIES if p == m else KEYS
    sizes: dict[str, Size] = {"b": b, "h": h, "p": QUERIES, "m": keys, "e": e, "f": f}
    head = H // group if group > 1 else H
    q, k, v = _load("Q", B, H, P, E, dtype=dtype), _load("K", B, head, M, E, dtype=dtype), _load("V", B, head, M, F, dtype=dtype)
    tensors = {
        "Q": Tensor("Q", (b, h, QUERIES, e), dtype), "K": Tensor("K", (b, h // group, keys, e), dtype),
        "V": Tensor("V", (b, h // group, keys, f), dtype),
    }
    einsums: list[Einsum] = []

    def write(name: str, ranks: str, body: Expr, op: str | None = None, over: str = "", out: str = "f32") -> Expr:
        at = tuple(map(ex.index, ranks))
        tensors[name] = Tensor(name, tuple(sizes[r] for r in ranks), out)
        einsums.append(Einsum(Access(name, at), body, op, tuple(over)))
        return ex.load(name, at, out)

    qk = write("QK", "bhpm", _real(q) * _real(k), "add", "e")
    s = write("S", "bhpm", score(qk * 0.25))
    weight = row(s, lambda name, op, body: write(name, "bhp", body, op, "m"))
    if on_weights is not ex.TRUE:
        weight = ex.where(on_weights, weight, 0.0)
    a = write("A", "bhpm", weight)
    write("O", "bhpf", a * _real(v), "add", "m", dtype)
    for name in {str(x.attr) for e_ in einsums for x in e_.reads} - set(tensors):
        shape, kind = _AUXILIARY[name](b, h)
        bound = {KEYS: QUERIES} if p == m else {}
        tensors[name] = Tensor(name, tuple(n if isinstance(n, int) else n.subs(bound) for n in shape), kind)
    c = Cascade(
        "drawn", tuple(Rank(r, n) for r, n in sizes.items()), tuple(tensors.values()), tuple(einsums), ("O",)
    )
    return Program(verify(c), {"s": p, **({} if p == m else {"t": m})}, label)


@st.composite
def programs(draw: st.DrawFn, dtype: str = "f32", longest: int = 48) -> Program:
    """An attention of at most `longest` tokens, with up to two score pieces, two masks and any row rule."""
    pieces = draw(st.lists(st.sampled_from(sorted(SCORES)), max_size=2, unique=True))
    masks = draw(st.lists(st.sampled_from(sorted(MASKS)), max_size=2, unique=True))
    fill, rule = draw(st.sampled_from(sorted(FILLS))), draw(st.sampled_from(sorted(ROWS)))
    either = draw(st.booleans())
    heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    lengths = st.sampled_from([n for n in (1, 7, 16, 31, 33, 48, 63) if n <= longest])
    p = draw(lengths)
    # Masks that compare segments or rows of a square mask want as many keys as queries.
    m = p if "segments" in masks or draw(st.booleans()) else draw(lengths)
    keep = ex.TRUE
    for name in masks:
        keep = keep | MASKS[name] if either and keep is not ex.TRUE else keep & MASKS[name]

    def score(s: Expr) -> Expr:
        for name in pieces:
            s = SCORES[name](s)
        return FILLS[fill](s, keep) if keep is not ex.TRUE and rule in FILLED else s

    label = f"{'+'.join(pieces) or 'plain'} {('|' if either else '&').join(masks) or 'all'} {fill} {rule} {heads}/{group} {p}×{m}"
    return attention(
        score, ROWS[rule], b=draw(st.sampled_from([1, 2])), h=heads, group=group, p=p, m=m,
        e=draw(st.sampled_from([8, 16, 24])), f=draw(st.sampled_from([16, 20])), dtype=dtype,
        on_weights=ex.TRUE if rule in FILLED else keep, label=label,
    )
