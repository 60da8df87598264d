"""Where a score ends and the row rule begins; the factors of a product. Walks over terms, nothing else."""

from __future__ import annotations

from .. import expr as ex
from ..cascade import Einsum
from ..expr import Expr
from ..operators import facts, named


def factors(body: Expr) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
    """The factors above and below the line of a product."""
    above: list[Expr] = []
    below: list[Expr] = []

    def go(e: Expr, up: bool) -> None:
        if e.op == "mul" and e.is_float:
            go(e.args[0], up)
            go(e.args[1], up)
        elif e.op == "div":
            go(e.args[0], up)
            go(e.args[1], not up)
        else:
            (above if up else below).append(e)

    go(body, True)
    return tuple(above), tuple(below)


def hiding(added: Expr, key: str) -> tuple[Expr, ...]:
    """The float tensors that may take all scores of a row to −∞: what is added for each key, and what is for all of them.

        QK + bias[p,m] + row[p]    both;        QK + slope[h]·(m − p)    neither
    """
    found: dict[Expr, None] = {}

    def go(e: Expr) -> None:
        if key not in e.ranks:
            found.update(dict.fromkeys(x for x in ex.loads(e) if x.is_float))
        elif e.op in ("add", "sub", "neg", "cast", "max", "min", "where", "mul", "div"):
            for x in e.args[1:] if e.op == "where" else e.args:
                # the other factor of what varies over the keys is a scale, or a slope
                if key in x.ranks or e.op not in ("mul", "div"):
                    go(x)
        else:
            found.update(dict.fromkeys(x for x in ex.loads(e) if x.is_float and key in x.ranks))

    go(added)
    return tuple(found)


def without(body: Expr, value: str) -> Expr | None:
    """The product without the factors that vary over the value rank, otherwise as the model wrote it."""
    if value not in body.ranks:
        return body
    if body.op == "mul":
        left, right = (without(x, value) for x in body.args)
        return right if left is None else left if right is None else left * right
    if body.op == "div":
        above = without(body.args[0], value)
        return (1.0 if above is None else above) / body.args[1]
    return None


def only(body: Expr, value: str) -> Expr | None:
    """The product of the factors that vary over the value rank."""
    if value not in body.ranks:
        return None
    if body.op == "mul":
        left, right = (only(x, value) for x in body.args)
        return right if left is None else left if right is None else left * right
    return only(body.args[0], value) if body.op == "div" else body


def elements(term: Expr, row_names: frozenset[str] | set[str], key: str) -> tuple[Expr, ...]:
    """The largest sub-terms that vary over the key and read no row tensor, each once, left to right."""
    rowed = reading(term, row_names)
    out: dict[Expr, None] = {}
    seen: set[Expr] = set()

    def go(e: Expr) -> None:
        if e in seen or key not in e.ranks:
            return
        seen.add(e)
        if e not in rowed:
            out[e] = None
            return
        for a in e.args:
            go(a)

    go(term)
    return tuple(out)


def reading(term: Expr, names: frozenset[str] | set[str]) -> set[Expr]:
    """The sub-terms that read one of the named tensors."""
    out: set[Expr] = set()
    for e in ex.walk(term):
        if (e.op == "load" and str(e.attr) in names) or any(a in out for a in e.args):
            out.add(e)
    return out


def bends(term: Expr, names: frozenset[str] | set[str]) -> tuple[Expr, ...]:
    """The sub-terms that follow what they read of the named tensors along no line, the innermost first."""
    made = reading(term, names)
    return tuple(e for e in ex.walk(term) if e in made and _bends(e, [a in made for a in e.args]))


def _bends(e: Expr, on: list[bool]) -> bool:
    """`on`: which arguments read them."""
    match e.op:
        case "mul":
            return all(on)
        case "div":
            return on[1]
        case "cast":
            return not e.is_float or e.args[0].dtype == "b1"
        case "where":
            return on[0]
    # a load has no law: of what is looked up at a computed place no line is known
    return any(on) and facts(e.op).law != "affine"


def _gates(term: Expr, key: str) -> list[Expr]:
    """Sub-terms through which all dependence on the key passes, the largest first (a chain)."""
    chain: list[Expr] = []
    keyed = [e for e in reversed(list(ex.walk(term))) if key in e.ranks]
    for e in keyed:
        if not _escapes(term, e, key):
            chain.append(e)
    return chain


def _escapes(root: Expr, gate: Expr, key: str) -> bool:
    """Is there a way from the root to the key's coordinate around `gate`?"""
    seen: set[Expr] = {gate}
    stack = [root]
    while stack:
        e = stack.pop()
        if e in seen or key not in e.ranks:
            continue
        if e.op == "index":
            return True
        seen.add(e)
        stack.extend(e.args)
    return False


def score(
    row: tuple[Einsum, ...], weight: Expr, names: frozenset[str], products: frozenset[str], key: str
) -> Expr:
    """The largest term over products, without row tensors, that carries all key-dependence of row reductions and weight.

    Where the weight brings more of its own (a mask applied to probabilities), the reductions alone decide. Boolean
    reductions ("does the row have a key") do not count. A pointwise map of the row rule itself (`exp`, `relu`, a
    square) is taken off, so that masks and biases lie on the outside of the score.
    """
    terms = [r.body for r in row if key in r.body.ranks and r.op not in ("or", "and")]
    bounds = [r.body for r in row if r.op in ("max", "min")]
    for group in ([*terms, weight], terms, [weight]):
        if not group:
            continue
        shared = [_gates(t, key) for t in group]
        rowed, made = reading(group[0], names), reading(group[0], products)
        for g in shared[0]:
            if g in made and g not in rowed and all(g in s for s in shared[1:]):
                return g if g in bounds else _peel(g, key)
    for t in (*terms, weight):
        made = reading(t, products)
        parts = [e for e in elements(t, names, key) if e in made]
        if parts:
            return max(parts, key=lambda e: sum(1 for _ in ex.walk(e)))
    raise AssertionError("the weight holds a product")


_MAPS = frozenset(named(lambda o: o.arity == 1 and o.curved))


def _peel(top: Expr, key: str) -> Expr:
    e, peeled = top, None
    while True:
        own = list(dict.fromkeys(a for a in e.args if key in a.ranks))
        if len(own) != 1 or e.op == "load":
            break
        nonlinear = e.op in _MAPS or (e.op == "mul" and e.args[0] is e.args[1]) or e.op == "pow"
        linear = e.op in ("cast", "neg", "mul", "div") and not nonlinear
        if not nonlinear and (peeled is not None or not linear):
            break
        e = own[0]
        if nonlinear:
            peeled = e
    return peeled if peeled is not None else top
