"""Prints `step`: a run of scores becomes weights, and the row's scalars are brought up to date.

    for each scalar that reads one before it: a loop over the keys        numbers that lie in memory: the loop's reductions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ....patterns import expr as ex
from ....patterns.attention.rowstate import OLD, Carried
from ....patterns.expr import Expr
from ...text.print_cpp import CppBody, number
from ...text.printer import PrintError
from .names import SCORE, Around, LoopProgram, mentions
from .terms import Tile

# How a loop over keys reduces: the clause's operator, the first value, one more element.
REDUCE = {
    "add": ("+", "0.0f", "{0} += {1}"),
    "max": ("top", "-INFINITY", "{0} = max_({0}, {1})"),
    "min": ("least", "INFINITY", "{0} = min_({0}, {1})"),
}
DECLARED = {
    "top": "// the largest, where a NaN stays one\n#pragma omp declare reduction(top : float : omp_out = "
    "max_(omp_out, omp_in)) initializer(omp_priv = -INFINITY)",
    "least": "// the least, where a NaN stays one\n#pragma omp declare reduction(least : float : omp_out = "
    "min_(omp_out, omp_in)) initializer(omp_priv = INFINITY)",
}


class TileStep:
    """The body of `step` on one kind of tile: loops over the keys, and the row's scalars between them."""

    def __init__(self, p: LoopProgram, tile: Tile) -> None:
        self.p, self.score, self.state = p, tile.score, tile.state
        self.here = ex.load(SCORE, (ex.index(p.key),), tile.score.dtype)
        self.body = CppBody(p.scope, tile.state.corrections, set(p.taken), p.fields)
        self.around = Around(p, self.body, p.key)
        self.phases, self.last = self._order()
        # a product times a positive number is computed again by each loop; its largest is that of the products
        self.scale = self._scale()
        # products whose memory may hold another score: no term reads them beside it
        self.free = [i for x, i in p.products.items() if all(x not in ex.loads(t) for t in self._all())]
        # which one does
        self.buffer: int | None = None
        # what a scalar's elements come to, by its name
        self.rows: dict[str, str] = {}

    def _order(self) -> tuple[list[int], int]:
        """In which loop each scalar is reduced: after all that it reads. The weights are written by the last loop."""
        phase: dict[str, int] = {}

        def after(*terms: Expr | None) -> int:
            reads = {str(x.attr) for t in terms if t is not None for x in ex.loads(t)}
            return max((phase[n] + 1 for n in reads if n in phase), default=0)

        for c in self.state.carried:
            phase[c.name] = after(c.lift, c.correction)
        return list(phase.values()), max([after(self.state.weight, self.state.correction), *phase.values()])

    def _scale(self) -> tuple[int, float] | None:
        if self.score.op != "mul":
            return None
        for x, c in (self.score.args, self.score.args[::-1]):
            if x in self.p.products and c.is_const and 0 < float(c.value) < math.inf:
                return self.p.products[x], float(c.value)
        return None

    def lines(self) -> list[str]:
        p, body = self.p, self.body
        body.lines += [f"float* const {x} = x[{i}];" for i, x in enumerate(p.inputs)]
        for i, c in enumerate(self.state.carried):
            body.lines.append(f"const float {p.old[c.name]} = state[{i}];")
        for e in {x for t in self.state.corrections for x in ex.loads(t) if str(x.attr).startswith(OLD)}:
            body.bind(e, p.old[str(e.attr).removeprefix(OLD)])
        for phase in range(self.last + 1):
            self._loop(phase)
            self._update(phase)
        correction = self.state.correction
        factor = "1.0f" if correction is None else body.let("c", correction)
        body.lines += [f"state[{i}] = {p.carried[c.name]};" for i, c in enumerate(self.state.carried)]
        return [*p.fields.unpacked(body.lines), *body.lines, f"return {factor};"]

    def _terms(self, phase: int) -> list[Expr]:
        out = [c.lift for c, n in zip(self.state.carried, self.phases) if n == phase]
        return [*out, self.state.weight] if phase == self.last else out

    def _loop(self, phase: int) -> None:
        p, body = self.p, self.body
        terms = self._terms(phase)
        if not terms:
            return
        key = ex.index(p.key)
        scores = any(self.here in ex.loads(t) for t in terms)
        again = scores and (self.scale is not None or not self.free)
        first = scores and self.buffer is None and not again
        roots = [*terms, *([self.score] if first or again else [])]
        names = dict(p.scope.names) | {key: p.ranks[p.key]}
        loop = CppBody(replace(p.scope, names=names), roots, body.taken, self.around, key)
        self._products(loop, roots)
        if again:
            loop.bind(self.here, loop.let("s", self.score))
        elif first:
            self._first(loop, phase)
        elif scores:
            name = loop.fresh("s")
            loop.lines.append(f"const float {name} = {p.inputs[self.buffer or 0]}[i];")
            loop.bind(self.here, name)
        loop.count(terms)
        clauses = self._reduce(loop, phase)
        if phase == self.last:
            loop.lines.append(f"w[i] = {loop.real(self.state.weight)};")
        if all(" = " in x and x.startswith("const ") for x in loop.lines):
            # nothing but names: what is reduced lies there already
            return
        name = p.ranks[p.key]
        where = [f"const int32_t {name} = int32_t(m0) + i;"] if mentions(name, loop.lines) else []
        body.lines += [
            f"#pragma omp simd{clauses}", "for (int i = 0; i < n; i++) {", *(f"  {x}" for x in [*where, *loop.lines]), "}",
        ]

    def _products(self, loop: CppBody, roots: Sequence[Expr]) -> None:
        read = {x for t in roots for x in ex.loads(t)}
        for x, i in self.p.products.items():
            if x in read:
                name = loop.fresh(str(x.attr).lower())
                loop.lines.append(f"const float {name} = {self.p.inputs[i]}[i];")
                loop.bind(x, name)

    def _first(self, loop: CppBody, phase: int) -> None:
        """Compute the score, and keep it for the loops after this one."""
        p = self.p
        later = [t for n in range(phase + 1, self.last + 1) for t in self._terms(n)]
        name = loop.let("s", self.score)
        loop.bind(self.here, name)
        if self.score in p.products:
            self.buffer = p.products[self.score]
        elif any(self.here in ex.loads(t) for t in later):
            self.buffer = self.free[0]
            loop.lines.append(f"{p.inputs[self.buffer]}[i] = {name};")

    def _reduce(self, loop: CppBody, phase: int) -> str:
        """One more element for each scalar of this loop; answers the loop's clauses."""
        p = self.p
        clauses: dict[str, list[str]] = {}
        for c, n in zip(self.state.carried, self.phases):
            if n != phase:
                continue
            if c.op not in REDUCE:
                raise PrintError(f"the row scalar {c.name} reduces {c.lift} by {c.op}")
            if row := self._whole_row(c, phase):
                self.rows[c.name] = row
                continue
            sign, first, rule = REDUCE[c.op]
            name = self.body.fresh(f"{p.carried[c.name]}_tile")
            self.body.lines.append(f"float {name} = {first};")
            loop.lines.append(rule.format(name, loop.real(c.lift)) + ";")
            clauses.setdefault(sign, []).append(name)
            if sign in DECLARED:
                p.reductions.add(sign)
            self.rows[c.name] = name
        return "".join(f" reduction({sign} : {', '.join(names)})" for sign, names in clauses.items())

    def _whole_row(self, c: Carried, phase: int) -> str:
        """The reduction of numbers that lie in memory as they are: scores by now, or weights. Else nothing."""
        old = self.p.old[c.name]
        # the last loop writes the weights, which may lie where the scores were
        there = c.op == "max" and c.lift is self.here and phase < self.last
        if there and self.scale is not None:
            product, factor = self.scale
            return f"max_({old}, row_max({self.p.inputs[product]}, n, -INFINITY) * {number(factor)})"
        if there and self.buffer is not None:
            return f"row_max({self.p.inputs[self.buffer]}, n, {old})"
        return "row_sum(w, n)" if c.op == "add" and c.lift is self.state.weight and phase == self.last else ""

    def _update(self, phase: int) -> None:
        """The scalars of a loop, brought up to date."""
        p, body = self.p, self.body
        for c, n in zip(self.state.carried, self.phases):
            if n != phase:
                continue
            new, old, row = p.carried[c.name], p.old[c.name], self.rows[c.name]
            if c.op == "add":
                before = old if c.correction is None else f"{old} * {body.let('c', c.correction)}"
                row = f"{before} + {row}"
            elif row.isidentifier():
                row = f"{c.op}_({old}, {row})"
            body.lines.append(f"const float {new} = {row};")
            for t in (*self._all(), *self.state.corrections):
                for x in ex.loads(t):
                    if str(x.attr) == c.name:
                        body.bind(x, new)

    def _all(self) -> list[Expr]:
        return [self.state.weight, *(c.lift for c in self.state.carried)]
