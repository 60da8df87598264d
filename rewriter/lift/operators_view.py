"""Views, copies, slices, joins and gathers: one rule an operator, each of which only moves coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast as typed

import sympy
from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from ..graph.node import CannotLift, arguments, dtype_of, op_name, tensor_of
from ..graph.sizes import same, shape_of, size_of
from . import index
from .index import ZERO
from .lift import At, Lifter, Rule

Args = Mapping[str, object]


def source(n: fx.Node, a: Args) -> fx.Node:
    """The tensor that a view is taken of: the first argument."""
    node = next(iter(a.values()))
    if not isinstance(node, fx.Node):
        raise CannotLift(f"{n.name} has no tensor argument", n)
    return node


def dim_of(value: object, rank: int) -> int:
    if not isinstance(value, int):
        raise CannotLift(f"dimension {value!r} is not a constant")
    return value % rank if rank else 0


def term_of(lifter: Lifter, value: object, default: Expr) -> Expr:
    """An integer argument (a constant, a symbolic size or a node) as a term."""
    if value is None:
        return default
    if isinstance(value, fx.Node):
        return lifter.scalar(value)
    try:
        return size_term(size_of(value))
    except (TypeError, ValueError):
        raise CannotLift(f"{value!r} is no index") from None


def same_place(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """clone, contiguous, detach, casts:  out[i] = x[i]"""
    return lifter.value(source(n, a), at)


def reshape(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x = source(n, a)
    where = index.reshape(shape_of(tensor_of(n)), shape_of(tensor_of(x)), at, lifter.ranks)
    if where is None:
        raise CannotLift("a reshape whose dimensions cannot be told apart symbolically", n)
    return lifter.value(x, where)


def unsqueeze(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    d = dim_of(a["dim"], len(at))
    return lifter.value(source(n, a), at[:d] + at[d + 1 :])


def transpose(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    _, first, second = a.values()
    i, j = dim_of(first, len(at)), dim_of(second, len(at))
    where = list(at)
    where[i], where[j] = where[j], where[i]
    return lifter.value(source(n, a), tuple(where))


def t(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    return lifter.value(source(n, a), at[::-1])


def matrix_transpose(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    return lifter.value(source(n, a), (*at[:-2], at[-1], at[-2]))


def permute(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    dims = [dim_of(d, len(at)) for d in typed("Sequence[int]", a["dims"])]
    where = [ZERO] * len(at)
    for out, d in enumerate(dims):
        where[d] = at[out]
    return lifter.value(source(n, a), tuple(where))


def movedim(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """The order of dimensions is recovered from the fake tensors' definition of movedim."""
    rank = len(at)
    sources = [dim_of(d, rank) for d in _as_list(a["source"])]
    targets = [dim_of(d, rank) for d in _as_list(a["destination"])]
    order: list[int | None] = [None] * rank
    for s, d in zip(sources, targets):
        order[d] = s
    rest = iter(d for d in range(rank) if d not in sources)
    full = [next(rest) if o is None else o for o in order]
    where = [ZERO] * rank
    for out, d in enumerate(full):
        where[d] = at[out]
    return lifter.value(source(n, a), tuple(where))


def _as_list(value: object) -> list[int]:
    return [value] if isinstance(value, int) else list(typed("Sequence[int]", value))


def expand(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x = source(n, a)
    return lifter.value(x, lifter.broadcast(x, at))


def repeat(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[i] = x[i mod size]"""
    x = source(n, a)
    shape = shape_of(tensor_of(x))
    tail = at[len(at) - len(shape) :]
    out_shape = shape_of(tensor_of(n))[len(at) - len(shape) :]
    where = tuple(i if same(s, o) else i % size_term(s) for i, s, o in zip(tail, shape, out_shape))
    return lifter.value(x, where)


def repeat_interleave(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[i] = x[i // repeats]"""
    times = a["repeats"]
    if not isinstance(times, int) or a.get("dim") is None:
        raise CannotLift("repeat_interleave with a tensor of counts", n)
    d = dim_of(a["dim"], len(at))
    return lifter.value(source(n, a), (*at[:d], at[d] // times, *at[d + 1 :]))


def slice_(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[i] = x[start + step·i]"""
    x = source(n, a)
    d = dim_of(a["dim"], len(at))
    step = a["step"] if a["step"] is not None else 1
    if not isinstance(step, int):
        raise CannotLift("a slice with a symbolic step", n)
    size = shape_of(tensor_of(x))[d]
    start = _start(lifter, n, a["start"], size, shape_of(tensor_of(n))[d], step, a["end"])
    return lifter.value(x, (*at[:d], start + at[d] * step, *at[d + 1 :]))


def _start(lifter: Lifter, n: fx.Node, start: object, size: Size, kept: Size, step: int, end: object) -> Expr:
    if start is None or start == 0:
        return ZERO
    if isinstance(start, int) and isinstance(size, int):
        return ex.const(min(max(start + size if start < 0 else start, 0), size))
    first = term_of(lifter, start, ZERO)
    # the kept length tells whether the start was clamped: it was not iff kept = size − start (to the end, step 1)
    if step == 1 and isinstance(end, int) and end >= 2**62:
        return size_term(sympy.sympify(size) - sympy.sympify(kept))
    if isinstance(start, int) and start < 0:
        return size_term(sympy.sympify(size) + start)
    return first


def select(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x = source(n, a)
    shape = shape_of(tensor_of(x))
    d = dim_of(a["dim"], len(shape))
    i = a["index"]
    where = size_term(size_of(i)) if not isinstance(i, fx.Node) else lifter.scalar(i)
    if where.is_const and int(where.value) < 0:
        where = size_term(shape[d]) + where
    return lifter.value(x, (*at[:d], where, *at[d:]))


def flip(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    shape = shape_of(tensor_of(n))
    where = list(at)
    for d in typed("Sequence[int]", a["dims"]):
        k = dim_of(d, len(at))
        where[k] = size_term(shape[k]) - 1 - at[k]
    return lifter.value(source(n, a), tuple(where))


def roll(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[i] = x[(i − shift) mod size]"""
    shape = shape_of(tensor_of(n))
    where = list(at)
    dims = typed("Sequence[int]", a["dims"])
    if not dims:
        raise CannotLift("roll over the flattened tensor", n)
    for shift, d in zip(typed("Sequence[object]", a["shifts"]), dims):
        k = dim_of(d, len(at))
        where[k] = (at[k] - term_of(lifter, shift, ZERO)) % size_term(shape[k])
    return lifter.value(source(n, a), tuple(where))


def unfold(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[.., i, .., j] = x[.., i·step + j, ..]"""
    x = source(n, a)
    d = dim_of(a["dimension"], len(at) - 1)
    step = term_of(lifter, a["step"], ZERO)
    where = list(at[:-1])
    where[d] = at[d] * step + at[-1]
    return lifter.value(x, tuple(where))


def as_strided(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """The element at Σ stride·i of what lies in memory: chunks that have tokens in common, and windows."""
    x = source(n, a)
    held, size, strides = tensor_of(x), typed("Sequence[object]", a["size"]), typed("Sequence[object]", a["stride"])
    if a.get("storage_offset") not in (None, held.storage_offset()) or not all(
        isinstance(s, int) for s in (*size, *strides, *held.shape)
    ):
        raise CannotLift("as_strided with symbolic sizes, or of other memory", n)
    shape = shape_of(held)
    where = index.strided(shape_of(tensor_of(n)), typed("Sequence[int]", strides), shape, held.stride(), at, lifter.ranks)
    if where is None:
        raise CannotLift("as_strided of memory that its tensor does not fill", n)
    return lifter.value(x, where)


def pad(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[i] = x[i − before] inside, the fill value outside"""
    x = source(n, a)
    if a.get("mode", "constant") not in ("constant", None):
        raise CannotLift(f"padding of mode {a['mode']}", n)
    shape = shape_of(tensor_of(x))
    widths = typed("Sequence[object]", a["pad"])
    where, inside = list(at), ex.TRUE
    for k in range(len(widths) // 2):
        d = len(shape) - 1 - k
        before = term_of(lifter, widths[2 * k], ZERO)
        where[d] = at[d] - before
        if before is not ZERO:
            inside = inside & (where[d] >= 0)
        if widths[2 * k + 1] != 0:
            inside = inside & (where[d] < size_term(shape[d]))
    fill = a["value"] if a.get("value") is not None else 0.0
    if not isinstance(fill, (int, float)):
        raise CannotLift("padding with a computed value", n)
    return ex.where(inside, lifter.value(x, tuple(where)), ex.const(fill, dtype_of(n)))


def cat(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[i] = x_k[i − offset_k] in the k-th piece; empty pieces vanish"""
    pieces = [p for p in typed("Sequence[fx.Node]", a["tensors"]) if 0 not in shape_of(tensor_of(p))]
    d = dim_of(a["dim"], len(at))
    offsets: list[Size] = [0]
    for p in pieces:
        offsets.append(sympy.sympify(offsets[-1]) + shape_of(tensor_of(p))[d])
    ends = [size_term(o) for o in offsets]
    if len(pieces) == 1:
        return lifter.value(pieces[0], at)
    if at[d].is_const and all(e.is_const for e in ends):
        k = next(k for k in range(len(pieces)) if int(at[d].value) < int(ends[k + 1].value))
        return lifter.value(pieces[k], (*at[:d], at[d] - ends[k], *at[d + 1 :]))
    out = lifter.value(pieces[-1], (*at[:d], at[d] - ends[len(pieces) - 1], *at[d + 1 :]))
    for k in reversed(range(len(pieces) - 1)):
        here = lifter.value(pieces[k], (*at[:d], at[d] - ends[k], *at[d + 1 :]))
        out = ex.where(at[d] < ends[k + 1], here, out)
    return out


def stack(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    pieces = typed("Sequence[fx.Node]", a["tensors"])
    d = dim_of(a["dim"], len(at))
    rest = at[:d] + at[d + 1 :]
    if at[d].is_const:
        return lifter.value(pieces[int(at[d].value)], rest)
    out = lifter.value(pieces[-1], rest)
    for k in reversed(range(len(pieces) - 1)):
        out = ex.where(ex.equal(at[d], k), lifter.value(pieces[k], rest), out)
    return out


def getitem(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """One result of an operator with several: split, chunk, unbind, max."""
    origin, i = n.args
    assert isinstance(origin, fx.Node)
    assert isinstance(i, int)
    rule = SEVERAL.get(op_name(origin))
    if rule is None:
        raise CannotLift(f"{origin.name} has several results and no rule", n)
    return rule(lifter, origin, i, at)


def _split(lifter: Lifter, n: fx.Node, i: int, at: At) -> Expr:
    a = arguments(n)
    x = source(n, a)
    d = dim_of(a["dim"], len(at))
    before: Expr = ZERO
    for p in n.meta["val"][:i]:
        before = before + size_term(shape_of(p)[d])
    return lifter.value(x, (*at[:d], at[d] + before, *at[d + 1 :]))


def _unbind(lifter: Lifter, n: fx.Node, i: int, at: At) -> Expr:
    a = arguments(n)
    x = source(n, a)
    d = dim_of(a["dim"], len(at) + 1)
    return lifter.value(x, (*at[:d], ex.const(i), *at[d:]))


def gather_term(lifter: Lifter, i: Expr, size: Size) -> Expr:
    """An index from data, negative values counted from the end unless it is provably not negative."""
    if _nonnegative(i):
        return i
    return ex.where(i < 0, i + size_term(size), i)


def _nonnegative(i: Expr) -> bool:
    """By signs alone, for coordinates and data without a bound: intervals want one, and give products of sizes up."""
    match i.op:
        case "index" | "symbol":
            return True
        case "const":
            return bool(i.value >= 0)
        case "add" | "mul" | "floordiv" | "min":
            return all(_nonnegative(x) for x in i.args)
        case "mod":
            return _nonnegative(i.args[1])
        case "max":
            return any(_nonnegative(x) for x in i.args)
        case "where":
            return _nonnegative(i.args[1]) and _nonnegative(i.args[2])
        case "cast":
            return i.args[0].dtype in ("b1", "u8") or _nonnegative(i.args[0])
    return False


def index_tensor(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """x[i, j, …] with tensors of integers: a gather whose coordinates are terms themselves."""
    x = source(n, a)
    shape = shape_of(tensor_of(x))
    given = list(typed("Sequence[fx.Node | None]", a["indices"]))
    given += [None] * (len(shape) - len(given))
    tensors = [i for i in given if i is not None]
    if any(dtype_of(i) in ("b1", "u8") for i in tensors):
        raise CannotLift("indexing with a boolean mask", n)
    width = max(len(shape_of(tensor_of(i))) for i in tensors)
    places = [d for d, i in enumerate(given) if i is not None]
    together = places == list(range(places[0], places[-1] + 1))
    first = places[0] if together else 0
    shared = at[first : first + width]
    rest = iter(at[:first] + at[first + width :])
    where: list[Expr] = []
    for d, i in enumerate(given):
        if i is None:
            where.append(next(rest))
        else:
            where.append(gather_term(lifter, ex.cast(lifter.value(i, lifter.broadcast(i, shared)), "i64"), shape[d]))
    return lifter.value(x, tuple(where))


def index_select(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x = source(n, a)
    d = dim_of(a["dim"], len(at))
    i = lifter.value(typed("fx.Node", a["index"]), (at[d],))
    return lifter.value(x, (*at[:d], gather_term(lifter, ex.cast(i, "i64"), shape_of(tensor_of(x))[d]), *at[d + 1 :]))


def gather(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x = source(n, a)
    d = dim_of(a["dim"], len(at))
    i = lifter.value(typed("fx.Node", a["index"]), at)
    return lifter.value(x, (*at[:d], ex.cast(i, "i64"), *at[d + 1 :]))


def embedding(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    i = lifter.value(typed("fx.Node", a["indices"]), at[:-1])
    return lifter.value(typed("fx.Node", a["weight"]), (ex.cast(i, "i64"), at[-1]))


SEVERAL: dict[str, Callable[[Lifter, fx.Node, int, At], Expr]] = {
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), _split),
    "unbind": _unbind,
}

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("clone", "contiguous", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy", "lift_fresh", "float",
         "positive", "view_of", "_conj", "resolve_conj", "requires_grad"),
        same_place,
    ),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_as", "reshape_as", "_reshape_alias"),
        reshape,
    ),
    "unsqueeze": unsqueeze, "transpose": transpose, "swapaxes": transpose, "swapdims": transpose, "t": t,
    "numpy_T": t, "mT": matrix_transpose, "matrix_H": matrix_transpose, "adjoint": matrix_transpose, "permute": permute,
    "movedim": movedim, "moveaxis": movedim, "expand": expand, "expand_as": expand, "broadcast_to": expand,
    "repeat": repeat, "tile": repeat, "repeat_interleave": repeat_interleave, "slice": slice_,
    "select": select, "flip": flip, "roll": roll, "unfold": unfold, "as_strided": as_strided,
    "pad": pad, "constant_pad_nd": pad, "cat": cat,
    "concat": cat, "concatenate": cat, "stack": stack, "getitem": getitem, "index": index_tensor,
    "index_select": index_select, "gather": gather, "embedding": embedding,
}


def narrow(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    d = dim_of(a["dim"], len(at))
    return lifter.value(source(n, a), (*at[:d], at[d] + term_of(lifter, a["start"], ZERO), *at[d + 1 :]))


RULES["narrow"] = narrow
