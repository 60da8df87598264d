"""A recurrence as a cascade: states carried over an iterative rank, and what each step gives.

    S[d,n,t + 1] = a[d,n,t] · S[d,n,t] + b[d,n,t]        a state under a factor
    M[d,t + 1]   = max(M[d,t] + a[d,t], b[d,t])          a running maximum that decays
    y[d,t]       = Σ_n S[d,n,t + 1] · c[n,t]             what a step gives

The law of a state is read off the term of its step by algebra. A factor may depend on states that are known before. A state
that a step contracts (Sᵀk of a delta rule, the state between chunks) is linear, but no element follows from itself alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .. import expr as ex
from ..cascade import Cascade, Einsum
from ..expr import Expr
from ..verdict import Obstacle

ONE, ZERO = ex.const(1.0), ex.const(0.0)
Law = Literal["factor", "maximum", "matrix"]


@dataclass(frozen=True)
class State:
    """A carried tensor. Under `factor`: S' = factor · S + added; under `maximum`: S' = max(S + factor, added).

    Under `matrix`, a step is linear in the whole state; `factor` is what multiplies each element by itself, `added` is 0.
    """

    name: str
    law: Law
    factor: Expr
    added: Expr
    step: Einsum

    @property
    def ranks(self) -> tuple[str, ...]:
        """The ranks of the state, outermost first."""
        return tuple(str(i.attr) for i in self.step.out.index[:-1] if i.op == "index")


@dataclass(frozen=True)
class Recurrence:
    """The states in an order in which each needs only those before; `rank` is what they are carried over."""

    cascade: Cascade
    rank: str
    states: tuple[State, ...]

    @property
    def elementwise(self) -> bool:
        """Whether each element of a state follows from itself."""
        return all(s.law != "matrix" for s in self.states)

    @property
    def outputs(self) -> tuple[Einsum, ...]:
        """What the steps give."""
        names = {s.name for s in self.states}
        return tuple(e for e in self.cascade.einsums if e.out.tensor in self.cascade.outputs and e.out.tensor not in names)

    @property
    def traits(self) -> frozenset[str]:
        """decay: elements fade; delta: a step reads what the state holds before it writes."""
        fades = any(s.factor is not ONE if s.law != "maximum" else s.factor is not ZERO for s in self.states)
        return frozenset(["decay"] * fades + ["delta"] * (not self.elementwise))


def recurrence(c: Cascade) -> Recurrence | Obstacle:
    """The recurrence of a cascade, or what its step does to a state that no law covers."""
    walked = [r.name for r in c.ranks if r.iterative]
    if len(walked) != 1:
        return Obstacle("no single rank is walked in order")
    (rank,) = walked
    steps = {e.out.tensor: e for e in c.einsums if _carries(e, rank)}
    known: list[State] = []
    left = dict(steps)
    while left:
        found = next((s for n, e in left.items() if isinstance(s := _state(c, e, rank, left), State)), None)
        if found is None:
            return next(s for n, e in left.items() if isinstance(s := _state(c, e, rank, left), Obstacle))
        known.append(found)
        del left[found.name]
    return Recurrence(c, rank, tuple(known)) if known else Obstacle("no state is carried")


def _carries(e: Einsum, rank: str) -> bool:
    last = e.out.index[-1] if e.out.index else None
    return last is not None and last is ex.index(rank) + ex.const(1)


def _state(c: Cascade, e: Einsum, rank: str, unknown: dict[str, Einsum]) -> State | Obstacle:
    name = e.out.tensor
    if c.tensor[name].dtype not in ex.FLOATS:
        return Obstacle(f"{name} counts", str(e.out))
    own = ex.load(name, (*e.out.index[:-1], ex.index(rank)), c.tensor[name].dtype)
    others = set(unknown) - {name}
    if any(r in others for r in _behind(c, e, {name})):
        return Obstacle(f"{name} and {min(others)} need each other in one step", str(e.out))
    mixed = {x.out.tensor for x in c.einsums if x is not e and not _carries(x, rank) and name in _behind(c, x, set())}
    mixed &= {str(x.attr) for x in ex.loads(e.body)}
    if mixed:
        factor = _linear(c, e, own, name, rank)
        return State(name, "matrix", factor, ZERO, e) if isinstance(factor, Expr) else factor
    if any(str(x.attr) == name and x is not own for x in ex.loads(e.body)):
        return Obstacle(f"an element of {name} needs others", str(e.out))
    if (linear := affine(e.body, own)) is not None:
        return State(name, "factor", *linear, e)
    if (top := _maximum(e.body, own)) is not None:
        return State(name, "maximum", *top, e)
    return Obstacle(f"{name} is neither scaled and added to, nor kept as a maximum", str(e.out))


def _behind(c: Cascade, e: Einsum, stop: set[str]) -> set[str]:
    """The tensors that an Einsum of the step rests on."""
    out: set[str] = set()
    stack = [str(x.attr) for x in e.reads]
    while stack:
        n = stack.pop()
        if n in out:
            continue
        out.add(n)
        inner = [p for p in c.producers.get(n, ()) if p.over or not _is_state(c, n)]
        if n not in stop and not _is_state(c, n):
            stack += [str(x.attr) for p in inner for x in p.reads]
    return out


def _is_state(c: Cascade, name: str) -> bool:
    """An iterative tensor has an initialisation and a step."""
    return len(c.producers.get(name, ())) > 1


def affine(e: Expr, own: Expr) -> tuple[Expr, Expr] | None:
    """`(a, b)` with `e = a · own + b`, where neither depends on `own`; None where it is not so, or not seen to be."""
    if own not in set(ex.walk(e)):
        return ZERO, e
    if e is own:
        return ONE, ZERO
    match e.op:
        case "cast" if e.is_float and e.args[0].is_float:
            # a state that is rounded is carried unrounded
            return affine(e.args[0], own)
        case "neg":
            inner = affine(e.args[0], own)
            return None if inner is None else (-inner[0], -inner[1])
        case "add" | "sub":
            left, right = affine(e.args[0], own), affine(e.args[1], own)
            if left is None or right is None:
                return None
            if e.op == "add":
                return _sum(left[0], right[0]), _sum(left[1], right[1])
            return _sum(left[0], -right[0]), _sum(left[1], -right[1])
        case "mul":
            for x, y in (e.args, e.args[::-1]):
                inner = affine(x, own)
                if inner is not None and own not in set(ex.walk(y)):
                    return _product(inner[0], y), _product(inner[1], y)
    # not a choice, nor a quotient: 0 · S is no 0 where S is infinite, and S · (1 / d) not S / d where d is tiny
    return None


def _sum(a: Expr, b: Expr) -> Expr:
    return b if a is ZERO else a if b is ZERO or b is -ZERO else a + b


def _product(a: Expr, b: Expr) -> Expr:
    return ZERO if a is ZERO else b if a is ONE else a * b


def _maximum(e: Expr, own: Expr) -> tuple[Expr, Expr] | None:
    """`(a, b)` with `e = max(own + a, b)`."""
    if e.op == "cast" and e.is_float and e.args[0].is_float:
        return _maximum(e.args[0], own)
    if e.op != "max":
        return None
    for x, y in (e.args, e.args[::-1]):
        inner = affine(x, own)
        if inner is not None and inner[0] is ONE and own not in set(ex.walk(y)):
            return inner[1], y
    return None


def _linear(c: Cascade, e: Einsum, own: Expr, name: str, rank: str) -> Expr | Obstacle:
    """What multiplies an element by itself, where a step is linear in the whole state."""
    reads = {str(x.attr) for x in ex.loads(e.body)}
    mixed = [x for x in c.einsums if x.out.tensor in reads and x is not e and not _carries(x, rank)]
    for x in mixed:
        if name in _behind(c, x, set()) and not _is_linear(c, x.body, name):
            return Obstacle(f"a step is not linear in {name}", str(x.out))
    opaque = {x: ex.load(f"{x.attr} ", (), x.dtype) for x in ex.loads(e.body) if x is not own}
    inner = affine(ex.substitute(e.body, opaque), own)
    return inner[0] if inner is not None else Obstacle(f"a step is not linear in {name}", str(e.out))


def _is_linear(c: Cascade, e: Expr, name: str) -> bool:
    """Whether a term is a sum of multiples of what the state holds, and of things without it."""
    return _degree(c, e, name) is not None


def _degree(c: Cascade, e: Expr, name: str) -> int | None:
    """0 without the state, 1 linear in it, None for anything else."""
    if e.op == "load":
        if str(e.attr) == name:
            return 1
        inner = [p for p in c.producers.get(str(e.attr), ()) if not _is_state(c, str(e.attr))]
        sums = (p.op in (None, "add") or name not in _behind(c, p, set()) for p in inner)
        degrees = [_degree(c, p.body, name) if plain else None for p, plain in zip(inner, sums)]
        return None if None in degrees else max((d for d in degrees if d is not None), default=0)
    under = [_degree(c, a, name) for a in e.args]
    if None in under:
        return None
    found = [d for d in under if d is not None]
    if not any(found):
        return 0
    match e.op:
        case "add" | "sub" | "neg" | "cast":
            return 1
        case "mul":
            return 1 if sum(found) == 1 else None
        case "div":
            return 1 if found[1] == 0 else None
    return None
