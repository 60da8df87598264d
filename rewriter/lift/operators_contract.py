"""Contractions: a product becomes `QK = Σ_e a·b` over operands that are read as far upstream as strides reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar
from typing import cast as typed

from torch import fx

from ...patterns import expr as ex
from ...patterns.attention.ranks import quotient, remainder
from ...patterns.cascade import Einsum, Size, size_term
from ...patterns.expr import Expr
from ..graph.node import CannotLift, arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import product, shape_of
from .index import ZERO, is_simple
from .lift import At, Lifter, Rule, scratch
from .operators_reduce import dims_of, full_place, reduction
from .operators_view import source

Args = Mapping[str, object]
T = TypeVar("T")

def sum_(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """`(a·b).sum(dim)` is a contraction when the summand is an outer product, else a row sum."""
    found = product_sum(lifter, n)
    if found is None:
        return reduction("R", "add")(lifter, n, a, at)
    return contract(lifter, n, found, at)


def product_sum(lifter: Lifter, n: fx.Node) -> Contraction | None:
    a = arguments(n)
    x = source(n, a)
    shape = shape_of(tensor_of(x))
    dims = dims_of(a, len(shape))
    inner = _see_through(x)
    if op_name(inner) not in ("mul", "multiply") or len(dims) != 1:
        return None
    factors = arguments(inner)
    left, right = factors["self"], factors["other"]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    found = across(lifter, left, right, shape, dims[0])
    place = lambda at: full_place(at, dims, a.get("keepdim"), len(shape))  # noqa: E731
    return replace(found, place=place) if found is not None else None


def across(lifter: Lifter, left: fx.Node, right: fx.Node, shape: Sequence[Size], d: int) -> Contraction | None:
    """Σ_d left·right of two operands that are broadcast to `shape`; None where that is no outer product of tokens."""
    shapes = [_padded(x, len(shape)) for x in (left, right)]
    if shape[d] == 1 or any(s[d] == 1 for s in shapes) or all(s == tuple(shape) for s in shapes):
        return None
    if lifter.is_key(left, d - len(shape)):
        return None

    def operands(w: At, e: Expr) -> Pair:
        full = (*w[:d], e, *w[d + 1 :])
        return (left, lifter.broadcast(left, full)), (right, lifter.broadcast(right, full))

    rest = tuple(1 if k == d else s for k, s in enumerate(shape))
    return Contraction(operands, shape[d], rest, lambda at: (*at[:d], ZERO, *at[d:]))


def vecdot(lifter: Lifter, n: fx.Node) -> Contraction | None:
    """Σ_d x·y, broadcast against each other: a product where no operand has every token."""
    a = arguments(n)
    x, y = (typed("fx.Node", a[k]) for k in (("x", "y") if "x" in a else ("x1", "x2")))
    width = max(tensor_of(x).dim(), tensor_of(y).dim())
    shape = [s if t == 1 else t for s, t in zip(_padded(x, width), _padded(y, width))]
    return across(lifter, x, y, shape, typed("int", a["dim"]) % width)


def inner(lifter: Lifter, n: fx.Node) -> Contraction | None:
    """Σ_e x[…, e]·y[…, e], every row of one with every row of the other."""
    a = arguments(n)
    x, y = typed("fx.Node", a["self"]), typed("fx.Node", a["other"])
    first, second = ("".join(chr(start + d) for d in range(tensor_of(t).dim())) for start, t in ((97, x), (65, y)))
    if not first or not second:
        return None
    return letters_product(lifter, n, (first, second[:-1] + first[-1]), first[:-1] + second[:-1], (x, y))


def _padded(n: fx.Node, rank: int) -> tuple[Size, ...]:
    shape = shape_of(tensor_of(n))
    return (1,) * (rank - len(shape)) + shape


def _see_through(n: fx.Node) -> fx.Node:
    while op_name(n) in ("to", "_to_copy", "contiguous", "clone", "alias", "detach"):
        n = typed("fx.Node", n.args[0])
    return n


# --- contractions -------------------------------------------------------------------------------------------------

Pair = tuple[tuple[fx.Node, At], tuple[fx.Node, At]]


@dataclass(frozen=True)
class Contraction:
    """`out[w] = Σ_e a·b`: the operands' places for output coordinates `w` and a reduced coordinate.

    `shape` is the output's shape with the reduced and missing dimensions kept as 1; `place` turns the node's own
    coordinates into `w`. Where several dimensions are reduced, the coordinate runs over all of them, and `digits` are their
    sizes, the innermost last. `factors` are what else is multiplied, which none of these reaches, by the places at `w`.
    """

    operands: Callable[[At, Expr], Pair]
    size: Size
    shape: tuple[Size, ...]
    place: Callable[[At], At] = lambda at: at
    digits: tuple[Size, ...] = ()
    factors: Callable[[At], tuple[tuple[fx.Node, At], ...]] = lambda w: ()

    def scaled(self, lifter: Lifter, n: fx.Node, term: Expr, w: At) -> Expr:
        """A term times the factors, as the model computes these."""
        for node, place in self.factors(w):
            term = term * ex.cast(lifter.leaf(node, place, reader=n), dtype_of(n))
        return term


def contract(lifter: Lifter, n: fx.Node, c: Contraction, at: At) -> Expr:
    """A product of the cascade, with factors that do not carry the reduced rank taken out of the sum."""
    dtype = dtype_of(n)
    at = tuple(ZERO if s == 1 else i for s, i in zip(c.shape, c.place(at), strict=True))

    def build(where: At) -> Einsum:
        taken = [str(i.attr) for i in where if i.op == "index"]
        over: list[str] = []
        for size in c.digits or (c.size,):
            over.append(lifter.rank(size, "", [*taken, *over]))
        inside: list[Expr] = []
        outside: list[Expr] = []
        for node, place in c.operands(where, _number([ex.index(e) for e in over], c.digits)):
            term, factors = peel(lifter, node, place, frozenset(over), n)
            inside.append(ex.cast(term, dtype))
            outside.extend(factors)
        lifter.outside[n] = (where, tuple(outside))
        return scratch(inside[0] * inside[1], "add", tuple(over))

    out = lifter.define(n, "QK", c.shape, at, build, dtype)
    lifter.products.add(str(out.attr))
    base, factors = lifter.outside[n]
    table = {b: i for b, i in zip(base, at) if b.op == "index"}
    for f in factors:
        out = out * ex.cast(ex.substitute(f, table), dtype)
    return c.scaled(lifter, n, out, at)


def _number(digits: Sequence[Expr], sizes: Sequence[Size]) -> Expr:
    """The coordinate over several dimensions: a·B + b."""
    out = digits[0]
    for d, size in zip(digits[1:], sizes[1:]):
        out = out * size_term(size) + d
    return out


def _digits(number: Expr, sizes: Sequence[Size]) -> list[Expr]:
    """The coordinates in each of several dimensions."""
    out: list[Expr] = []
    for size in reversed(sizes[1:]):
        out.append(remainder(number, size_term(size)))
        number = quotient(number, size_term(size))
    return [number, *reversed(out)]


_PEEL = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "t", "permute",
    "expand", "expand_as", "contiguous", "clone", "detach", "alias", "slice", "select", "narrow", "repeat_interleave",
    "cat", "getitem", "movedim", "swapaxes", "mT", "numpy_T", "lift_fresh_copy", "dropout", "repeat",
))
# … of which these show one tensor, each element as it is.
VIEWS = _PEEL - {"cat", "dropout", "getitem", "repeat", "repeat_interleave"}
# Views that show an element more than once: looked through where the windows move with their row.
WINDOWED = frozenset(("unfold", "as_strided"))
LOOKED_THROUGH = _PEEL | {"to", "_to_copy", "type_as", "float", "mul", "multiply", "div"}


def peel(lifter: Lifter, n: fx.Node, at: At, reduced: frozenset[str], reader: fx.Node) -> tuple[Expr, list[Expr]]:
    """An operand read as far upstream as strides can still address it, and the scalar factors met on the way.

    Views, casts and products with a factor without the reduced coordinate are looked through; anything else is where the
    operand is materialised, and stays the model's own. `reader` is the contraction.
    """
    best, best_reader, best_casts, best_factors = (n, at), reader, 0, 0
    casts: list[str] = []
    factors: list[Expr] = []
    node, where, below = n, at, reader
    while (step := _step_up(lifter, node, where, reduced)) is not None:
        above, place, cast_to, factor = step
        # what was written into a copy is not in what it was copied from
        if lifter.aliases.written_between(node, node, below):
            break
        casts += [cast_to] if cast_to else []
        factors += [factor] if factor is not None else []
        lifter.visited.add(node)
        below, node, where = node, above, place
        if is_simple(where, lifter.offsets, lifter.key if lifter.windows else ""):
            best, best_reader, best_casts, best_factors = (node, where), below, len(casts), len(factors)
    out = lifter.leaf(*best, reader=best_reader)
    for c in reversed(casts[:best_casts]):
        out = ex.cast(out, c)
    return out, factors[:best_factors]


def _step_up(
    lifter: Lifter, n: fx.Node, at: At, reduced: frozenset[str]
) -> tuple[fx.Node, At, str | None, Expr | None] | None:
    """One node upstream: (node, coordinates, cast met, factor met), or None where the operand is materialised."""
    name = op_name(n)
    if name in ("to", "_to_copy", "type_as", "float"):
        x = typed("fx.Node", n.args[0])
        own, other = dtype_of(n), dtype_of(x)
        return x, at, (own if own != other else None), None
    if name in ("mul", "multiply", "div"):
        a = arguments(n)
        if a.get("rounding_mode"):
            return None
        left, right = a["self"], a["other"]
        pairs = [(left, right)] if name == "div" else [(left, right), (right, left)]
        for side, factor in pairs:
            if not isinstance(side, fx.Node) or shape_of(tensor_of(side)) != shape_of(tensor_of(n)):
                continue
            if isinstance(factor, fx.Node) and not _is_scale(factor, at, reduced):
                continue
            try:
                term = ex.cast(lifter.arg(factor, at), dtype_of(n))
            except CannotLift:
                continue
            if reduced & term.ranks:
                continue
            if name == "div":
                term = ex.const(1.0, dtype_of(n)) / term
            own, other = dtype_of(n), dtype_of(side)
            return side, at, (own if own != other else None), term
        return None
    moved = step_through(lifter, n, at) if name in _PEEL or (lifter.windows and name in WINDOWED) else None
    return None if moved is None else (*moved, None, None)


def step_through(lifter: Lifter, n: fx.Node, at: At) -> tuple[fx.Node, At] | None:
    """The one node that a view reads at these coordinates, and where; None where it reads several."""
    spy = _Spy(lifter)
    try:
        lifter.rules[op_name(n)](spy, n, arguments(n), at)  # type: ignore[arg-type]
    except CannotLift:
        return None
    return spy.seen[0] if len(spy.seen) == 1 else None


def _is_scale(n: fx.Node, at: At, reduced: frozenset[str]) -> bool:
    """A factor tensor that has no extent along the reduced coordinate and is small: a temperature, not an operand."""
    value = n.meta.get("val")
    if not hasattr(value, "dim"):
        return True
    shape = shape_of(tensor_of(n))
    tail = at[len(at) - len(shape) :]
    live = [i for s, i in zip(shape, tail) if s != 1]
    return not any(reduced & i.ranks for i in live)


class _Spy:
    """Stands in for the lifter while a view rule moves coordinates, and notes where the rule reads."""

    def __init__(self, lifter: Lifter) -> None:
        self._lifter = lifter
        self.ranks = lifter.ranks
        self.seen: list[tuple[fx.Node, At]] = []

    def value(self, n: fx.Node, at: At) -> Expr:
        shape = shape_of(tensor_of(n))
        place = tuple(ZERO if s == 1 else i for s, i in zip(shape, at, strict=True))
        if (n, place) not in self.seen:
            self.seen.append((n, place))
        return ex.const(0, dtype_of(n))

    def broadcast(self, n: fx.Node, at: At) -> At:
        return self._lifter.broadcast(n, at)

    def scalar(self, n: fx.Node) -> Expr:
        return self._lifter.scalar(n)


def matmul(lifter: Lifter, n: fx.Node) -> Contraction:
    """matmul, mm, bmm, mv, dot with torch's broadcasting"""
    values = list(arguments(n).values())
    x, y = typed("fx.Node", values[0]), typed("fx.Node", values[1])
    sx, sy = shape_of(tensor_of(x)), shape_of(tensor_of(y))

    def with_matrixdims_of(at: tuple[T, ...], one: T) -> tuple[T, ...]:
        out = list(at)
        if len(sx) == 1:
            out.insert(len(out) - (0 if len(sy) == 1 else 1), one)
        if len(sy) == 1:
            out.append(one)
        return tuple(out)

    def operands(w: At, e: Expr) -> Pair:
        left = (e,) if len(sx) == 1 else (*w[:-2], w[-2], e)
        right = (e,) if len(sy) == 1 else (*w[:-2], e, w[-1])
        return (x, lifter.broadcast(x, left)), (y, lifter.broadcast(y, right))

    shape = with_matrixdims_of(shape_of(tensor_of(n)), 1)
    return Contraction(operands, sx[-1], shape, lambda at: with_matrixdims_of(at, ZERO))


def batch_product(lifter: Lifter, n: fx.Node) -> Contraction:
    """The product of addmm and baddbmm, without what they add."""
    a = arguments(n)
    x = typed("fx.Node", a.get("batch1", a.get("mat1")))
    y = typed("fx.Node", a.get("batch2", a.get("mat2")))

    def operands(w: At, e: Expr) -> Pair:
        return (x, lifter.broadcast(x, (*w[:-2], w[-2], e))), (y, lifter.broadcast(y, (*w[:-2], e, w[-1])))

    return Contraction(operands, shape_of(tensor_of(x))[-1], shape_of(tensor_of(n)))


def baddbmm(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out = beta·input + alpha·(batch1 @ batch2)"""
    dtype = dtype_of(n)
    out = contract(lifter, n, batch_product(lifter, n), at)
    if a["alpha"] != 1:
        out = out * ex.cast(lifter.arg(a["alpha"], at), dtype)
    if a["beta"] == 0:
        return out
    bias = ex.cast(lifter.arg(a["self"], at), dtype)
    return (bias if a["beta"] == 1 else bias * ex.cast(lifter.arg(a["beta"], at), dtype)) + out


def _linear_product(lifter: Lifter, n: fx.Node) -> Contraction:
    a = arguments(n)
    x, w = typed("fx.Node", a["input"]), typed("fx.Node", a["weight"])
    return Contraction(
        lambda p, e: ((x, (*p[:-1], e)), (w, (p[-1], e))), shape_of(tensor_of(x))[-1], shape_of(tensor_of(n))
    )


def linear(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    out = contract(lifter, n, _linear_product(lifter, n), at)
    return out if a.get("bias") is None else out + ex.cast(lifter.arg(a["bias"], (at[-1],)), dtype_of(n))


def einsum_spec(n: fx.Node, a: Args) -> tuple[list[str], str, list[fx.Node]]:
    """Letters of each operand and of the output; `...` becomes letters of its own."""
    nodes = list(typed("Sequence[fx.Node]", a["tensors"]))
    text = str(a["equation"]).replace(" ", "")
    left, arrow, right = text.partition("->")
    specs = left.split(",")
    if len(specs) != len(nodes):
        raise CannotLift("einsum with sublist operands", n)
    spare = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in text]
    ranks = [len(shape_of(tensor_of(x))) for x in nodes]
    widths = [r - len(s.replace("...", "")) for s, r in zip(specs, ranks) if "..." in s]
    dots = spare[: max(widths, default=0)]
    specs = [
        s.replace("...", "".join(dots[len(dots) - (r - len(s.replace("...", ""))) :])) if "..." in s else s
        for s, r in zip(specs, ranks)
    ]
    if not arrow:
        once = sorted(c for c in set("".join(specs)) - set(dots) if "".join(specs).count(c) == 1)
        right = "..." + "".join(once) if dots else "".join(once)
    return specs, right.replace("...", "".join(dots)), nodes


def einsum_product(lifter: Lifter, n: fx.Node) -> Contraction | None:
    """Two operands, and any number of factors: operands without a letter that is reduced.

        bhnd,bhde,bhn→bhne        Σ_d a·b, times a factor a row
    """
    specs, out, nodes = einsum_spec(n, arguments(n))
    if any(len(set(s)) != len(s) for s in specs):
        return None
    pair = [i for i, s in enumerate(specs) if not set(s) <= set(out)]
    if len(nodes) == 2 or len(pair) != 2:
        return letters_product(lifter, n, specs, out, nodes) if len(nodes) == 2 else None
    two = letters_product(lifter, n, [specs[i] for i in pair], out, [nodes[i] for i in pair])
    rest = [i for i in range(len(nodes)) if i not in pair]

    def factors(w: At) -> tuple[tuple[fx.Node, At], ...]:
        place = dict(zip(out, w))
        return tuple((nodes[i], lifter.broadcast(nodes[i], tuple(place[c] for c in specs[i]))) for i in rest)

    # a letter of the output that only a factor has is no place of the product's own
    whole = set(out) <= {c for i in pair for c in specs[i]}
    return replace(two, factors=factors) if two is not None and whole else None


def letters_product(
    lifter: Lifter, n: fx.Node, specs: Sequence[str], out: str, nodes: Sequence[fx.Node]
) -> Contraction | None:
    """Two operands whose dimensions have letters: those that the output lacks, and both have, are reduced."""
    sizes = {c: s for spec, x in zip(specs, nodes) for c, s in zip(spec, shape_of(tensor_of(x))) if s != 1}
    reduced = [c for c in dict.fromkeys("".join(specs)) if c not in out]
    many = [c for c in reduced if c in sizes]
    if not many or any(c not in s for c in reduced for s in specs):
        return None
    digits = tuple(sizes[c] for c in many)

    def operands(w: At, e: Expr) -> Pair:
        place = dict.fromkeys(reduced, ZERO) | dict(zip(out, w)) | dict(zip(many, _digits(e, digits)))
        first, second = ((t, lifter.broadcast(t, tuple(place[c] for c in s))) for s, t in zip(specs, nodes))
        return first, second

    return Contraction(operands, product(digits), shape_of(tensor_of(n)), digits=digits if len(digits) > 1 else ())


def tensordot(lifter: Lifter, n: fx.Node) -> Contraction | None:
    """The last dimensions of one operand with the first of the other, or pairs of them, named by letters."""
    a = arguments(n)
    x, y = typed("fx.Node", a["self"]), typed("fx.Node", a["other"])
    dx, dy = typed("Sequence[int]", a["dims_self"]), typed("Sequence[int]", a["dims_other"])
    first, second = ([chr(start + d) for d in range(len(shape_of(tensor_of(t))))] for start, t in ((97, x), (65, y)))
    for i, j in zip(dx, dy):
        second[j] = first[i]
    shared = {first[i] for i in dx}
    out = "".join(c for c in (*first, *second) if c not in shared)
    return letters_product(lifter, n, ("".join(first), "".join(second)), out, (x, y))


def einsum(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    specs, out, nodes = einsum_spec(n, a)
    if any(len(set(s)) != len(s) for s in specs):
        raise CannotLift("einsum with a repeated letter", n)
    found = einsum_product(lifter, n)
    if found is not None:
        return contract(lifter, n, found, at)
    sizes = {c: s for spec, x in zip(specs, nodes) for c, s in zip(spec, shape_of(tensor_of(x)))}
    if any(sizes[c] != 1 for c in sizes.keys() - set(out)):
        raise CannotLift("einsum of more than two operands or over several letters", n)
    letters = dict.fromkeys(sizes, ZERO) | dict(zip(out, at))
    dtype = dtype_of(n)
    terms = [lifter.value(t, lifter.broadcast(t, tuple(letters[c] for c in s))) for s, t in zip(specs, nodes)]
    product = ex.cast(terms[0], dtype)
    for other in terms[1:]:
        product = product * ex.cast(other, dtype)
    return product


def _contraction(build: Callable[[Lifter, fx.Node], Contraction | None]) -> Rule:
    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        found = build(lifter, n)
        if found is None:
            raise CannotLift(f"{op_name(n)} is no product of tokens with tokens", n)
        return contract(lifter, n, found, at)

    return rule


# What may be the last product of an attention, and how its operands lie.
PRODUCTS: dict[str, Callable[[Lifter, fx.Node], Contraction | None]] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "linalg_matmul"), matmul),
    "einsum": einsum_product, "tensordot": tensordot, "sum": product_sum, "linear": _linear_product,
    "inner": inner, "linalg_vecdot": vecdot,
}
# What is by its name a product of two computed tensors: a layer's weights are given, and not every sum is of a product.
CONTRACTIONS = frozenset((*PRODUCTS, "baddbmm", "addmm", "cdist", "cosine_similarity")) - {"sum", "linear"}

RULES: dict[str, Rule] = {
    "sum": sum_, "baddbmm": baddbmm, "addmm": baddbmm, "linear": linear, "einsum": einsum,
    "tensordot": _contraction(tensordot), "inner": _contraction(inner), "linalg_vecdot": _contraction(vecdot),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "linalg_matmul"), _contraction(matmul)),
}
