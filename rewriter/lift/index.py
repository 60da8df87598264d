"""Index arithmetic for views: where an element of a reshaped tensor lies in the tensor it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from ...patterns import expr as ex
from ...patterns.cascade import Size, as_size, size_term
from ...patterns.expr import Expr
from ..graph.sizes import product, same

ZERO = ex.const(0)


@dataclass(frozen=True)
class Part:
    """One addend `stride · term` of a linear offset, with `0 ≤ term < extent`."""

    stride: Size
    term: Expr
    extent: Size


def reshape(
    out_shape: Sequence[Size], in_shape: Sequence[Size], at: Sequence[Expr], ranks: Mapping[str, Size]
) -> tuple[Expr, ...] | None:
    """Coordinates in `in_shape` of the element at `at` of the same data seen as `out_shape`.

    Dimensions are matched in groups of equal product, so that untouched dimensions pass through as they are; `ranks` has
    the sizes of the ranks in `at`. None when the groups cannot be told apart symbolically.
    """
    groups = _groups(out_shape, in_shape)
    if groups is None:
        return None
    where: list[Expr] = []
    for outs, ins in groups:
        if len(outs) == 1 and len(ins) == 1:
            where.append(at[outs[0]])
            continue
        parts: list[Part] = []
        for n, d in enumerate(outs):
            stride = product([out_shape[x] for x in outs[n + 1 :]])
            parts += [Part(product([stride, p.stride]), p.term, p.extent) for p in _addends(at[d], out_shape[d], ranks)]
        parts = _join(parts)
        for n, d in enumerate(ins):
            below = product([in_shape[x] for x in ins[n + 1 :]])
            where.append(_digit(parts, below, in_shape[d], first=n == 0))
    return tuple(ZERO if in_shape[d] == 1 else w for d, w in enumerate(where))


def strided(
    out_shape: Sequence[Size], strides: Sequence[int], in_shape: Sequence[Size], in_strides: Sequence[int],
    at: Sequence[Expr], ranks: Mapping[str, Size],
) -> tuple[Expr, ...] | None:
    """Coordinates in a tensor, that fills its memory once, of the element at `at` of a view with strides of its own.

    None where the tensor does not fill its memory once, or the view reaches beyond it.
    """
    order = sorted((d for d in range(len(in_shape)) if in_shape[d] != 1), key=lambda d: -in_strides[d])
    below = [product([in_shape[x] for x in order[n + 1 :]]) for n in range(len(order))]
    parts = [
        Part(product([stride, p.stride]), p.term, p.extent)
        for size, stride, i in zip(out_shape, strides, at) if size != 1 for p in _addends(i, size, ranks)
    ]
    whole = product([in_shape[d] for d in order])
    if [in_strides[d] for d in order] != below or not _less(_reach(parts), whole):
        return None
    where = {d: _digit(parts, b, in_shape[d], first=n == 0) for n, (d, b) in enumerate(zip(order, below))}
    return tuple(where.get(d, ZERO) for d in range(len(in_shape)))


def _groups(out_shape: Sequence[Size], in_shape: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(out_shape) or j < len(in_shape):
        outs, ins = [], []
        a: Size = 1
        b: Size = 1
        if i < len(out_shape):
            outs.append(i)
            a = out_shape[i]
            i += 1
        if j < len(in_shape):
            ins.append(j)
            b = in_shape[j]
            j += 1
        while not same(a, b):
            grow_out = _smaller(a, b)
            if (grow_out and i < len(out_shape)) or j >= len(in_shape):
                if i >= len(out_shape):
                    return None
                outs.append(i)
                a = product([a, out_shape[i]])
                i += 1
            else:
                ins.append(j)
                b = product([b, in_shape[j]])
                j += 1
        groups.append((outs, ins))
    # dimensions of size 1 that ended on one side alone
    return groups


def _smaller(a: Size, b: Size) -> bool:
    """Whether `a` needs more factors to reach `b`."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    ratio = sympy.cancel(sympy.sympify(b) / sympy.sympify(a))
    return bool(ratio.is_polynomial(*ratio.free_symbols)) and ratio != 1 if ratio.free_symbols else bool(ratio > 1)


def _addends(term: Expr, extent: Size, ranks: Mapping[str, Size]) -> list[Part]:
    """`r·n + s` of ranks r and s as two parts; any other term as one."""
    if term.op != "add":
        return [Part(1, term, extent)]
    out: list[Part] = []
    for t in term.args:
        stride: Size = 1
        if t.op == "mul" and t.args[1].is_const:
            t, stride = t.args[0], int(t.args[1].value)
        if t.op == "add" and stride == 1:
            out += _addends(t, extent, ranks)
        elif t.op == "index" and str(t.attr) in ranks:
            out.append(Part(stride, t, ranks[str(t.attr)]))
        else:
            return [Part(1, term, extent)]
    return out


def _join(parts: list[Part]) -> list[Part]:
    """(x // c)·(c·k) + (x % c)·k  =  x·k"""
    for high in parts:
        if high.term.op != "floordiv" or not high.term.args[1].is_const:
            continue
        x, c = high.term.args
        for low in parts:
            if low.term.op == "mod" and low.term.args == (x, c) and same(high.stride, product([low.stride, int(c.value)])):
                rest = [p for p in parts if p is not high and p is not low]
                return _join([*rest, Part(low.stride, x, product([high.extent, low.extent]))])
    return parts


def _digit(parts: Sequence[Part], below: Size, size: Size, first: bool) -> Expr:
    """`(Σ stride·term // below) % size`, with every division that is provably exact carried out."""
    if size == 1:
        return ZERO
    quotient: list[Part] = []
    rest: list[Part] = []
    for p in parts:
        ratio = _exact(p.stride, below)
        if ratio is None:
            rest.append(p)
        else:
            quotient.append(Part(ratio, p.term, p.extent))
    if rest and not _less(_reach(rest), below):
        near, step = _overlapping(parts, below, None if first else size)
        whole = _sum(near) // size_term(step)
        return whole if first else whole % size_term(size)
    if first:
        return _sum(quotient)
    kept: list[Part] = []
    for p in quotient:
        if _exact(p.stride, size) is None:
            kept.append(p)
    if _less(_reach(kept), size):
        return _sum(kept)
    return _sum(kept) % size_term(size)


def _overlapping(parts: Sequence[Part], below: Size, size: Size | None) -> tuple[Sequence[Part], Size]:
    """The parts that decide a digit, and what they are divided by: without those that never carry into it, nor lie above.

        (d·8 + e + c·256 + x·64) // 512,  d·8 + e < 64      →      (c·4 + x) // 8

    A remainder beside its quotient is a whole with it, which says more: n·(x // n) + x % n.
    """
    if not isinstance(below, int) or not all(isinstance(p.stride, int) for p in parts):
        return parts, below
    if any(p.term.op == "mod" and p.term.args[0] // p.term.args[1] in ex.walk(*(x.term for x in parts)) for p in parts):
        return parts, below
    if isinstance(size, int):
        parts = [p for p in parts if _exact(p.stride, below * size) is None]
    for step in sorted({int(p.stride) for p in parts}, reverse=True):
        low = [p for p in parts if int(p.stride) % step]
        if step > 1 and below % step == 0 and _less(_reach(low), step):
            return [Part(int(p.stride) // step, p.term, p.extent) for p in parts if p not in low], below // step
    return parts, below


def _exact(a: Size, b: Size) -> Size | None:
    """a / b when b divides a, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    _, denominator = sympy.fraction(ratio)
    if denominator != 1:
        return None
    return as_size(ratio)


def _reach(parts: Sequence[Part]) -> Size:
    """The largest value of the sum."""
    total: sympy.Expr = sympy.Integer(0)
    for p in parts:
        total += sympy.sympify(p.stride) * (sympy.sympify(p.extent) - 1)
    return as_size(sympy.expand(total))


def _less(a: Size, b: Size) -> bool:
    difference = sympy.expand(sympy.sympify(b) - sympy.sympify(a))
    return bool(difference.is_positive)


def _sum(parts: Sequence[Part]) -> Expr:
    out: Expr = ZERO
    for p in parts:
        out = out + (p.term if p.stride == 1 else p.term * size_term(p.stride))
    return out


def _sum_of_two(t: Expr) -> frozenset[str]:
    """The ranks of `r + s` or `r·n + s`, whose strides are those of the dimension."""
    a, b = t.args
    a = a.args[0] if a.op == "mul" and a.args[1].is_const else a
    return a.ranks | b.ranks if a.op == b.op == "index" and a is not b else frozenset()


def is_simple(at: Sequence[Expr], offsets: bool = False, key: str = "") -> bool:
    """Whether every coordinate is a rank, `rank // n`, `rank % n` or a constant, so that strides can address it.

    With `offsets`, a rank may begin behind the tensor's first element. One coordinate may be a rank and the `key`'s distance
    from it, where a key is given.
    """
    seen: set[tuple[str, str]] = set()
    for t in at:
        if key and t.op == "add" and (own := _sum_of_two(t)) and not any((r, "") in seen for r in own):
            seen |= {(r, "") for r in own}
            continue
        if offsets and t.op == "add" and any(a.is_const and a.value > 0 for a in t.args):
            t = next((a for a in t.args if a.op == "index"), t)
        if t.op in ("const", "symbol"):
            continue
        if t.op == "index":
            read = (str(t.attr), "")
        elif t.op in ("floordiv", "mod") and t.args[0].op == "index" and not t.args[1].ranks and t.args[1].op != "load":
            read = (str(t.args[0].attr), t.op)
        else:
            return False
        if read in seen:
            return False
        seen.add(read)
    return True
