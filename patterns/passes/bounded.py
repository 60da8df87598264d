"""Dropping a running maximum: where a bound of the score is proved, a constant does as well as the maximum.

    before   GM = max_m s;  SN = exp(s − GM);  SD = Σ SN;  AV = Σ SN·V / SD
    after                   SN = exp(s − c);   SD = Σ SN;  AV = Σ SN·V / SD          −c ≤ s ≤ c for every score
Two things are proved. The result does not depend on the maximum: if it moves by t, each tensor is multiplied by exp(k·t)
or moved by k·t, and for the outputs k = 0. And the exponentials stay in range: s lies in [lo, hi], with hi − lo < 88 in f32.
Source: softmax is invariant to shifts; the bound of a cosine is Cauchy and Schwarz's, the bound of a cap is the cap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .. import expr as ex
from ..attention.score import factors
from ..attention.traits import is_mask, masked_side
from ..cascade import Cascade, Einsum
from ..expr import Expr
from ..operators import facts
from ..terms.constant import REDUCE, number, tries
from ..verdict import Refusal
from .chain import Reading, empty_rows, products, rebuilt
from .rewrites import Family, Rewritten

# The largest spread of exponents, in nats, that each accumulator holds without losing normal numbers.
SPREAD = {"f32": 88.0, "bf16": 88.0, "f64": 708.0, "f16": 9.0}
UNBOUNDED = (-math.inf, math.inf)


def unbound(c: Cascade, family: Family) -> Rewritten | Refusal:
    """Replace a maximum that is only subtracted from bounded scores by the bound.

    before   GM = max_m S;  SN = exp(S − GM)        after   SN = exp(S − c)
    """
    if len(family) != 1:
        return Refusal("unbound", f"{'·'.join(family)} is cut into tiles already")
    (key,) = family
    maxima = [e for e in c.einsums if e.over == (key,) and e.op in ("max", "min")]
    if not maxima:
        return Refusal("unbound", f"no maximum over {key}")
    no: Refusal | None = None
    for e in maxima:
        out = _unbound(c, key, e)
        if isinstance(out, Rewritten):
            return out
        no = no or out
    assert no is not None
    return no


def _unbound(c: Cascade, key: str, e: Einsum) -> Rewritten | Refusal:
    reading, name = Reading(c), e.out.tensor
    lo, hi = _range(reading.inline(e.body), key, c, reading)
    if not (math.isfinite(lo) and math.isfinite(hi)):
        return Refusal("unbound", f"no bound of the scores under {name} is provable")
    dtype = c.tensor[name].dtype
    if hi - lo >= SPREAD.get(dtype, 88.0):
        return Refusal(
            "unbound",
            f"scores spread over {hi - lo:g} nats: exp({lo - hi:g}) leaves the normal numbers of {dtype} "
            f"(limit {SPREAD.get(dtype, 88.0):g}); the running maximum stays",
        )
    # a sink takes its maximum with the row's: then it is the two together that only shift
    why = [depends(c, n) for n in (name, *_alone(c, name, key))]
    if None not in why:
        return Refusal("unbound", f"{why[0]}: the result depends on {name} itself")
    bound = ex.const(hi if e.op == "max" else lo, dtype)
    made = _substituted(c, name, bound)
    if not _rows_keep_a_key(c, reading, key) and not _ends_alike(c, made, key):
        return Refusal("unbound", f"a row without a key would end differently without {name}")
    conditions = (f"{lo:g} ≤ scores of {name} ≤ {hi:g}", f"{hi - lo:g} < {SPREAD.get(dtype, 88.0):g} nats in {dtype}")
    return Rewritten("unbound", made, (key,), conditions)


def _alone(c: Cascade, name: str, key: str) -> list[str]:
    """The row tensor that is the only reader of `name`, if there is one."""
    readers = [e for e in c.einsums if any(str(x.attr) == name for x in e.reads)]
    return [e.out.tensor for e in readers if len(readers) == 1 and e.op is None and key not in e.ranks]


def _substituted(c: Cascade, name: str, value: Expr) -> Cascade:
    def rule(x: Expr, args: tuple[Expr, ...]) -> Expr | None:
        return value if x.op == "load" and str(x.attr) == name else None

    einsums = tuple(replace(e, body=ex.rebuild(e.body, rule)) for e in c.einsums if e.out.tensor != name)
    return rebuilt(c, einsums, c.tensor)


# --- the range of a score ---------------------------------------------------------------------------------------


def _range(e: Expr, key: str, c: Cascade, reading: Reading) -> tuple[float, float]:
    """The least and greatest value of a term that is not masked away; infinite where nothing is known."""
    if facts(e.op).bounded:
        return facts(e.op).range
    if e.op == "const":
        return float(e.value), float(e.value)
    if e.op == "load":
        return _product_range(e, c, reading)
    if is_mask(e, key):
        kept = e.args[2] if masked_side(e) is e.args[1] else e.args[1]
        return _range(kept, key, c, reading)
    args = [_range(a, key, c, reading) for a in (e.args[1:] if e.op == "where" else e.args)]
    match e.op:
        case "neg":
            return -args[0][1], -args[0][0]
        case "cast" if e.is_float:
            return args[0]
        case "where":
            return min(a for a, _ in args), max(b for _, b in args)
        case "add":
            return args[0][0] + args[1][0], args[0][1] + args[1][1]
        case "sub":
            return args[0][0] - args[1][1], args[0][1] - args[1][0]
        case "mul" | "div":
            if e.op == "div" and args[1][0] <= 0 <= args[1][1]:
                return UNBOUNDED
            ends = [_times(x, y if e.op == "mul" else 1.0 / y) for x in args[0] for y in args[1]]
            return min(ends), max(ends)
        case "max" | "min":
            pick = max if e.op == "max" else min
            return pick(args[0][0], args[1][0]), pick(args[0][1], args[1][1])
        case "abs":
            least = 0.0 if args[0][0] <= 0 <= args[0][1] else min(abs(x) for x in args[0])
            return least, max(abs(x) for x in args[0])
        case "relu":
            return max(0.0, args[0][0]), max(0.0, args[0][1])
    return UNBOUNDED


def _times(x: float, y: float) -> float:
    return 0.0 if x == 0.0 or y == 0.0 else x * y


def _product_range(e: Expr, c: Cascade, reading: Reading) -> tuple[float, float]:
    """|Σ_e q̂·k̂·h| ≤ |h| for factors of length at most 1 over e (Cauchy and Schwarz)."""
    writers = c.producers.get(str(e.attr), ())
    if len(writers) != 1 or writers[0].op != "add":
        return UNBOUNDED
    (w,) = writers
    above, below = factors(reading.inline(w.body))
    over = frozenset(w.over)
    vectors = [f for f in above if f.ranks & over]
    if len(vectors) != 2 or any(f.ranks & over for f in below):
        return UNBOUNDED
    rest = [f for f in above if not f.ranks & over]
    for v in vectors:
        up = next((f for f in rest if _normalises(f, v, over, c, reading, below=False)), None)
        down = next((f for f in below if _normalises(f, v, over, c, reading, below=True)), None)
        if up is not None:
            rest.remove(up)
        elif down is not None:
            below = tuple(f for f in below if f is not down)
        else:
            return UNBOUNDED
    scale = 1.0
    for f in (*rest, *below):
        if not f.is_const or (f in below and not f.value):
            return UNBOUNDED
    for f in rest:
        scale *= abs(float(f.value))
    for f in below:
        scale /= abs(float(f.value))
    return -scale, scale


def _normalises(f: Expr, vector: Expr, over: frozenset[str], c: Cascade, reading: Reading, *, below: bool) -> bool:
    """Is f = 1/√(Σ v² + ε) above the line, or √(Σ v² + ε) or max(√Σ v², ε) below it, with ε ≥ 0?"""
    while f.op == "cast":
        f = f.args[0]
    if below and f.op == "max" and f.args[1].is_const:
        f = f.args[0]
    if f.op != ("sqrt" if below else "rsqrt"):
        return False
    norm = f.args[0]
    if norm.op == "add" and norm.args[1].is_const and float(norm.args[1].value) >= 0:
        norm = norm.args[0]
    writers = c.producers.get(str(norm.attr), ()) if norm.op == "load" else ()
    if len(writers) != 1 or writers[0].op != "add" or len(writers[0].over) != len(over):
        return False
    (w,) = writers
    same = dict(zip(w.out.index, norm.args, strict=True))
    same |= {ex.index(a): ex.index(b) for a, b in zip(sorted(w.over), sorted(over), strict=True)}
    square = ex.substitute(reading.inline(w.body), same)
    return square.op == "mul" and square.args[0] is vector and square.args[1] is vector


# --- does the result depend on the maximum? ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Gauge:
    """What moving the maximum by t does: times exp(degree·t), or plus shift·t. `free`: 0 or ±∞, which any factor keeps."""

    degree: float = 0.0
    shift: float = 0.0
    free: bool = False

    @property
    def still(self) -> bool:
        return self.degree == 0.0 and self.shift == 0.0


class _Depends(Exception):
    pass


def depends(c: Cascade, name: str) -> str | None:
    """Why the outputs depend on the value of a row tensor that is written as a maximum; None if they provably do not."""
    known: dict[str, _Gauge] = {}
    try:
        for e in c.einsums:
            g = _Gauge(shift=1.0) if e.out.tensor == name else _reduced(e, _term(e.body, known))
            known[e.out.tensor] = g
            if e.out.tensor in c.outputs and not (g.still or g.free):
                return f"{e.out.tensor} moves with {name}"
    except _Depends as why:
        return str(why)
    return None


def _reduced(e: Einsum, g: _Gauge) -> _Gauge:
    if g.shift and e.op not in (None, "max", "min"):
        raise _Depends(f"{e.out.tensor} sums what moves with the maximum")
    if g.degree and e.op not in (None, "add", "max", "min"):
        raise _Depends(f"{e.out.tensor} reduces what moves with the maximum by {e.op}")
    return g


def _term(root: Expr, known: dict[str, _Gauge]) -> _Gauge:
    memo: dict[Expr, _Gauge] = {}
    for e in ex.walk(root):
        memo[e] = _rule(e, [memo[a] for a in e.args], known)
    return memo[root]


def _rule(e: Expr, args: list[_Gauge], known: dict[str, _Gauge]) -> _Gauge:
    if e.op == "load":
        return known.get(str(e.attr), _Gauge())
    if e.op == "const":
        return _Gauge(free=e.is_float and (float(e.value) == 0.0 or not math.isfinite(float(e.value))))
    if all(g.still for g in args):
        return _Gauge()
    match e.op:
        case "add" | "sub":
            return _sum(e, args)
        case "neg":
            return replace(args[0], shift=-args[0].shift)
        case "cast" if e.is_float:
            return args[0]
        case "mul" | "div":
            return _multiple(e, args)
        case "where" if args[0].still:
            return _either(e, args[1:])
        case "max" | "min":
            return _either(e, args)
        case "pow" if e.args[1].is_const and args[0].shift == 0.0:
            return _Gauge(degree=args[0].degree * float(e.args[1].value))
    o = facts(e.op)
    match o.law:
        case "exponential" if args[0].degree == 0.0:
            return _Gauge(degree=args[0].shift * math.log(o.of))
        case "logarithm" if args[0].shift == 0.0:
            return _Gauge(shift=args[0].degree / math.log(o.of))
        case "power" if args[0].shift == 0.0:
            return _Gauge(degree=args[0].degree * o.of)
        case "homogeneous" if args[0].shift == 0.0:
            return args[0]
    raise _Depends(f"{e.op} of what moves with the maximum")


def _sum(e: Expr, args: list[_Gauge]) -> _Gauge:
    a, b = args
    if a.degree == b.degree == 0.0:
        return _Gauge(shift=a.shift + (b.shift if e.op == "add" else -b.shift))
    return _either(e, args)


def _either(e: Expr, args: list[_Gauge]) -> _Gauge:
    """Terms that move alike; a 0 or an infinity moves with anything."""
    moving = [g for g in args if not g.free]
    if any(g != moving[0] for g in moving[1:]):
        raise _Depends(f"{e.op} of terms that move differently")
    return moving[0] if moving else args[0]


def _multiple(e: Expr, args: list[_Gauge]) -> _Gauge:
    a, b = args
    if a.shift or b.shift:
        k, other = (e.args[1], a) if e.args[1].is_const else (e.args[0], b)
        if not k.is_const or other.degree or (k is e.args[0] and e.op == "div"):
            raise _Depends(f"{e.op} of what moves with the maximum")
        return _Gauge(shift=other.shift * float(k.value) if e.op == "mul" else other.shift / float(k.value))
    return _Gauge(degree=a.degree + (b.degree if e.op == "mul" else -b.degree))


# --- rows without a key -----------------------------------------------------------------------------------------


def _rows_keep_a_key(c: Cascade, reading: Reading, key: str) -> bool:
    """No mask can empty a row: there is none, or each one keeps the key at the row's own coordinate (m ≤ p at m = p)."""
    terms = [reading.inline(e.body) for e in c.einsums if key in e.over]
    masks = [x for x in ex.walk(*terms) if is_mask(x, key)]
    for x in masks:
        keep = ~x.args[0] if masked_side(x) is x.args[1] else x.args[0]
        same = [r for r in c.ranks if r.name in keep.ranks - {key} and r.size == c.rank[key].size]
        if not any(ex.substitute(keep, {ex.index(key): ex.index(r.name)}) is ex.TRUE for r in same):
            return False
    return True


def _ends_alike(before: Cascade, after: Cascade, key: str) -> bool:
    """Does a row without a key end with the same outputs in both cascades?"""
    terms = [Reading(before).inline(e.body) for e in before.einsums if key in e.over]
    rows = empty_rows(terms, (), key, products(before, key), frozenset())
    bodies = [e.body for c in (before, after) for e in c.einsums]
    made = {e.out.tensor for c in (before, after) for e in c.einsums}
    return all(
        np.allclose(a, b, equal_nan=True)
        for row in rows
        for known in tries(bodies, row, made, spread=key)
        for a, b in zip(_outputs(before, key, known), _outputs(after, key, known), strict=True)
    )


def _outputs(c: Cascade, key: str, known: dict[Expr, object]) -> list[np.ndarray]:
    """The outputs of a made-up row of two keys; ranks other than the key have one coordinate."""
    made = {str(x.attr): v for x, v in known.items() if x.op == "load"}
    loads: dict[str, object] = dict(made)
    for e in c.einsums:
        value = made.get(e.out.tensor)
        if value is None:
            value = number(e.body, loads, {x: v for x, v in known.items() if x.op != "load"})
            if e.op is not None and key in e.over:
                value = REDUCE[e.op](np.broadcast_to(value, (2,)))
        loads[e.out.tensor] = value
    return [np.asarray(loads[o], dtype=float) for o in c.outputs]
