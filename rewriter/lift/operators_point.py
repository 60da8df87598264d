"""Pointwise operators and tensors made from nothing: one rule an operator, each of which builds a term."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast as typed

from torch import fx

from ...patterns import expr as ex
from ...patterns.cascade import size_term
from ...patterns.evaluate import DTYPE_NAME
from ...patterns.expr import Expr
from ...patterns.operators import OPERATORS
from ...patterns.terms.affine import affine
from ..graph.node import CannotLift, constant_of, dtype_of, tensor_of
from ..graph.sizes import shape_of
from .index import ZERO
from .lift import At, Lifter, Rule
from .operators_view import dim_of, source, term_of

Args = Mapping[str, object]


def operand(lifter: Lifter, n: fx.Node, value: object, at: At, dtype: str | None) -> Expr:
    """An operand in the type in which the operator computes (under autocast that is the result's type)."""
    e = lifter.arg(value, at)
    if dtype is None:
        return e
    return ex.cast(e, dtype)


def unary(op: str) -> Rule:
    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        x = lifter.value(source(n, a), at)
        if op == "not":
            return ex.unary(op, ex.cast(x, "b1"))
        if OPERATORS[op].result == "truth":
            return ex.unary(op, x)
        return ex.unary(op, ex.cast(x, dtype_of(n)))

    return rule


def binary(op: str) -> Rule:
    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        left, right = a["self"], a["other"]
        if op in ex.COMPARISONS:
            return ex.binary(op, *_common(lifter, left, right, at))
        dtype = dtype_of(n)
        return ex.binary(op, operand(lifter, n, left, at, dtype), operand(lifter, n, right, at, dtype))

    return rule


def _common(lifter: Lifter, left: object, right: object, at: At) -> tuple[Expr, Expr]:
    """Both sides of a comparison in one type; a Python scalar, or a tensor without dimensions, takes the other's."""
    x, y = lifter.arg(left, at), lifter.arg(right, at)
    weak_x, weak_y = _is_weak(left), _is_weak(right)
    if weak_y and not weak_x and (x.is_float or not y.is_float):
        return x, ex.cast(y, x.dtype) if x.dtype != "b1" else y
    if weak_x and not weak_y and (y.is_float or not x.is_float):
        return ex.cast(x, y.dtype) if y.dtype != "b1" else x, y
    return x, y


def _is_weak(value: object) -> bool:
    return not isinstance(value, fx.Node) or not hasattr(value.meta.get("val"), "dim") or value.meta["val"].dim() == 0


def scaled_sum(sign: int) -> Rule:
    """add, sub:  out = x ± alpha·y"""

    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        dtype = dtype_of(n)
        x = operand(lifter, n, a["self"], at, dtype)
        y = operand(lifter, n, a["other"], at, dtype)
        alpha = a.get("alpha", 1)
        if alpha != 1:
            y = y * operand(lifter, n, alpha, at, dtype)
        return x + y if sign > 0 else x - y

    return rule


def rsub(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out = y − alpha·x"""
    dtype = dtype_of(n)
    x = operand(lifter, n, a["self"], at, dtype)
    if a.get("alpha", 1) != 1:
        x = x * operand(lifter, n, a["alpha"], at, dtype)
    return operand(lifter, n, a["other"], at, dtype) - x


def divide(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    mode = a.get("rounding_mode")
    dtype = dtype_of(n)
    if mode is None:
        return ex.binary("div", operand(lifter, n, a["self"], at, dtype), operand(lifter, n, a["other"], at, dtype))
    x, y = operand(lifter, n, a["self"], at, dtype), operand(lifter, n, a["other"], at, dtype)
    if mode == "floor":
        return x // y
    if dtype in ex.FLOATS:
        return ex.unary("trunc", ex.binary("div", x, y))
    quotient = ex.unary("abs", x) // ex.unary("abs", y)
    return ex.where(ex.binary("xor", x < 0, y < 0), -quotient, quotient)


def fmod(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """C's remainder: the sign of the dividend."""
    dtype = dtype_of(n)
    x, y = operand(lifter, n, a["self"], at, dtype), operand(lifter, n, a["other"], at, dtype)
    rest = ex.unary("abs", x) % ex.unary("abs", y)
    return ex.where(x < 0, -rest, rest)


def power(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    dtype = dtype_of(n)
    base, exponent = a["self"], a["exponent"]
    if isinstance(exponent, (int, float)) and not isinstance(base, (int, float)):
        x = operand(lifter, n, base, at, dtype)
        match float(exponent):
            case 2.0:
                return x * x
            case 0.5:
                return ex.unary("sqrt", x)
            case -0.5:
                return ex.unary("rsqrt", x)
            case 1.0:
                return x
            case -1.0:
                return ex.unary("reciprocal", x)
    return ex.binary("pow", operand(lifter, n, base, at, dtype), operand(lifter, n, exponent, at, dtype))


def square(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x = lifter.value(source(n, a), at)
    return x * x


def extreme(op: str) -> Rule:
    """maximum and minimum. A number comes first; as the second operand it is a clamp's, whose ties have another gradient."""

    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        x, y = (operand(lifter, n, a[k], at, dtype_of(n)) for k in ("self", "other"))
        return ex.binary(op, y, x) if not ex.loads(y) and y.is_float else ex.binary(op, x, y)

    return rule


def extreme_of_two(op: str) -> Rule:
    """max.other and min.other; of one tensor the extreme of all is no number of one element."""
    both = extreme(op)

    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        if "other" not in a:
            raise CannotLift(f"the {op} of a whole tensor", n)
        return both(lifter, n, a, at)

    return rule


def clamp(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    dtype = dtype_of(n)
    x = operand(lifter, n, a["self"], at, dtype)
    if a.get("min") is not None:
        x = ex.maximum(x, operand(lifter, n, a["min"], at, dtype))
    if a.get("max") is not None:
        x = ex.minimum(x, operand(lifter, n, a["max"], at, dtype))
    return x


def where(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    dtype = dtype_of(n)
    cond = ex.cast(lifter.arg(a["condition"], at), "b1")
    return ex.where(cond, operand(lifter, n, a["self"], at, dtype), operand(lifter, n, a["other"], at, dtype))


def masked_fill(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    dtype = dtype_of(n)
    cond = ex.cast(lifter.arg(a["mask"], at), "b1")
    return ex.where(cond, operand(lifter, n, a["value"], at, dtype), operand(lifter, n, a["self"], at, dtype))


def logical(op: str) -> Rule:
    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        return ex.binary(op, ex.cast(lifter.arg(a["self"], at), "b1"), ex.cast(lifter.arg(a["other"], at), "b1"))

    return rule


def bitwise(op: str) -> Rule:
    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        dtype = dtype_of(n)
        return ex.binary(op, operand(lifter, n, a["self"], at, dtype), operand(lifter, n, a["other"], at, dtype))

    return rule


def bitwise_not(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    x = lifter.value(source(n, a), at)
    return ex.unary("not", x) if x.dtype == "b1" else ex.const(-1, x.dtype) - x


def nan_to_num(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """NaN → nan (0); ±∞ → the largest finite numbers of the type, unless given"""
    x = lifter.value(source(n, a), at)
    top = {"f16": 65504.0, "bf16": 3.3895313892515355e38, "f32": 3.4028234663852886e38, "f64": 1.7976931348623157e308}
    if x.dtype not in top:
        return x
    given = {k: a.get(k) for k in ("nan", "posinf", "neginf")}
    nan = given["nan"] if given["nan"] is not None else 0.0
    high = given["posinf"] if given["posinf"] is not None else top[x.dtype]
    low = given["neginf"] if given["neginf"] is not None else -top[x.dtype]
    for v in (nan, high, low):
        if not isinstance(v, (int, float)):
            raise CannotLift("nan_to_num with a computed replacement", n)
    out = ex.where(ex.equal(x, ex.const(math.inf, x.dtype)), ex.const(float(high), x.dtype), x)  # type: ignore[arg-type]
    out = ex.where(ex.equal(x, ex.const(-math.inf, x.dtype)), ex.const(float(low), x.dtype), out)  # type: ignore[arg-type]
    return ex.where(ex.unary("isnan", x), ex.const(float(nan), x.dtype), out)  # type: ignore[arg-type]


def via(build: Callable[[Expr], Expr]) -> Rule:
    """Activations written in terms of others."""

    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        return build(ex.cast(lifter.value(source(n, a), at), dtype_of(n)))

    return rule


def softplus(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """log(1 + exp(beta·x)) / beta, and x itself beyond the threshold"""
    beta, threshold = a.get("beta", 1), a.get("threshold", 20)
    if beta != 1 or threshold != 20:
        raise CannotLift("softplus with another beta or threshold", n)
    return ex.unary("softplus", lifter.value(source(n, a), at))


LIVE_DROPOUT = (
    "live dropout (model.eval() turns it off): its random numbers cannot be kept; Policy(dropout=\"own\") draws others"
)


def dropout(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    if a.get("train") and a.get("p") != 0.0:
        raise CannotLift(LIVE_DROPOUT, n)
    return lifter.value(source(n, a), at)


def draws(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """Numbers that are counted by row and column under two keys a row (graph/dropout.py)."""
    seed, shape = typed("fx.Node", a["seed"]), shape_of(tensor_of(n))
    row: Expr = ZERO
    for i, size in zip(at[:-1], shape[:-1]):
        row = row * size_term(size) + i
    first, second = (ex.binary("draw", lifter.leaf(seed, (ex.const(k),)), row) for k in (0, 1))
    return ex.binary("draw", second, ex.binary("draw", first, at[-1]))


def tri(lower: bool) -> Rule:
    """tril keeps j − i ≤ k, triu keeps j − i ≥ k"""

    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        x = lifter.value(source(n, a), at)
        k = term_of(lifter, a.get("diagonal", 0), ZERO)
        difference = at[-1] - at[-2] if k is ZERO else at[-1] - at[-2] - k
        inside = difference <= 0 if lower else difference >= 0
        return ex.where(inside, x, ex.const(0, x.dtype))

    return rule


def arange(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[i] = start + step·i"""
    dtype = dtype_of(n)
    start = lifter.arg(a["start"], ()) if a.get("start") is not None else ZERO
    step = lifter.arg(a["step"], ()) if a.get("step") is not None else ex.const(1)
    if dtype in ("f16", "bf16"):
        raise CannotLift("arange in a narrow float type", n)
    if dtype in ex.FLOATS:
        return ex.cast(start, dtype) + ex.cast(at[0], dtype) * ex.cast(step, dtype)
    return ex.cast(start + at[0] * step, dtype)


def filled(value: float | None) -> Rule:
    def rule(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
        v: object = value
        if v is None:
            v = a["fill_value"] if "fill_value" in a else a["value"] if "value" in a else a["s"]
        return ex.cast(lifter.arg(v, ()), dtype_of(n))

    return rule


def diff(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """out[i] = y[i + 1] − y[i] with y = cat(prepend, x)"""
    x = source(n, a)
    before = a.get("prepend")
    d = dim_of(a["dim"], len(at))
    if a["n"] != 1 or a.get("append") is not None or dtype_of(n) not in ex.INTEGERS:
        raise CannotLift("a difference of higher order, of floats, or with something appended", n)
    upper = at[d] if isinstance(before, fx.Node) else at[d] + 1
    high = lifter.value(x, (*at[:d], upper, *at[d + 1 :]))
    low = lifter.value(x, (*at[:d], upper - 1, *at[d + 1 :]))
    if isinstance(before, fx.Node):
        if shape_of(tensor_of(before))[d] != 1 or at[d].op not in ("index", "const"):
            raise CannotLift("a difference with several elements before it", n)
        first = lifter.value(before, (*at[:d], ZERO, *at[d + 1 :]))
        # where(i < 1, f, g(i)) is g(i) when g(0) = f
        if affine(ex.substitute(low, {at[d]: ZERO})) != affine(first):
            low = ex.where(at[d] < 1, first, low)
    return affine(high - low).term()


def eye(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    return ex.cast(ex.equal(at[0], at[1]), dtype_of(n))


def one_element(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """A constant of the graph with one element (Dynamo and export lift Python scalars so)."""
    value = constant_of(n)
    if value is not None and value.numel() == 1:
        return ex.const(value.item(), DTYPE_NAME[value.dtype])
    raise CannotLift("an input", n)


def cumulative_ones(lifter: Lifter, n: fx.Node, a: Args, at: At) -> Expr:
    """cumsum of a constant:  out[i] = c·(i + 1)"""
    x = source(n, a)
    d = dim_of(a["dim"], len(at))
    # at all places: one of them may be a constant (what is padded) where others are none
    place = ex.index(lifter.rank(shape_of(tensor_of(x))[d])) if at else ZERO
    e = lifter.value(x, (*at[:d], place, *at[d + 1 :]))
    if not e.is_const:
        raise CannotLift("a running sum of data", n)
    return ex.cast(e, dtype_of(n)) * ex.cast(at[d] + 1, dtype_of(n))


RULES: dict[str, Rule] = {
    **{o.aten: unary(o.name) if o.arity == 1 else binary(o.name) for o in OPERATORS.values()},
    "maximum": extreme("max"), "minimum": extreme("min"),
    # other names of the same, and then the operators that take more than operands
    "negative": unary("neg"), "absolute": unary("abs"), "logical_not": unary("not"), "multiply": binary("mul"),
    "less": binary("lt"), "less_equal": binary("le"), "greater": binary("gt"), "greater_equal": binary("ge"),
    "not_equal": binary("ne"), "max": extreme_of_two("max"), "min": extreme_of_two("min"),
    "add": scaled_sum(+1), "sub": scaled_sum(-1), "subtract": scaled_sum(-1), "rsub": rsub, "div": divide,
    "divide": divide, "true_divide": divide, "fmod": fmod, "pow": power, "square": square, "clamp": clamp, "clip": clamp,
    "clamp_min": clamp, "clamp_max": clamp, "where": where, "masked_fill": masked_fill,
    "logical_and": logical("and"), "logical_or": logical("or"), "logical_xor": logical("xor"),
    "bitwise_and": bitwise("and"), "bitwise_or": bitwise("or"), "bitwise_xor": bitwise("xor"),
    "__and__": bitwise("and"), "__or__": bitwise("or"), "__xor__": bitwise("xor"), "__iand__": bitwise("and"),
    "__ior__": bitwise("or"), "bitwise_not": bitwise_not, "nan_to_num": nan_to_num, "softplus": softplus,
    "silu": via(lambda x: x * ex.unary("sigmoid", x)),
    "log_sigmoid": via(lambda x: -ex.unary("softplus", -x)),
    "dropout": dropout, "feature_dropout": dropout, "reattend::draws": draws,
    "tril": tri(True), "triu": tri(False), "arange": arange,
    "full": filled(None), "full_like": filled(None), "new_full": filled(None), "scalar_tensor": filled(None),
    "fill": filled(None), "zero": filled(0), "zeros": filled(0), "zeros_like": filled(0), "new_zeros": filled(0),
    "ones": filled(1), "ones_like": filled(1), "new_ones": filled(1), "eye": eye, "get_attr": one_element,
    "cumsum": cumulative_ones, "diff": diff,
}
