"""Prints the `struct Program` of the backward loop, from the adjoint of an attention.

    flow      a row's scalars, and the gradient that reaches its contraction, from the output's gradient
    adjoint   weights again from scores and row scalars, the gradient of each product, what reaches leaves of the score
    ended     what reaches leaves of a row's end
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ....patterns import expr as ex
from ....patterns.backward.adjoint import Adjoint
from ....patterns.backward.outside import sum_of
from ....patterns.expr import TRUE, Expr
from ....patterns.terms.conditions import simplify_under
from ...forms.form import Form
from ...forms.terms import Terms
from ...text.print_cpp import CppBody
from .leaves import ENDS, ROWS, LeafTerm, folds
from .names import Around, LoopProgram, mentions
from .program import fetch, load


class BackwardProgram(LoopProgram):
    """Names of the backward's program, and the terms that it is printed from."""

    mark = "backward "

    def __init__(
        self, f: Form, t: Terms, given: Iterable[str], adjoint: Adjoint, leaves: Sequence[LeafTerm] = ()
    ) -> None:
        """`t`: the terms of the forward as the model wrote them; `given`: tensors that exist when the kernel is called."""
        self.adjoint, self.leaves = adjoint, tuple(leaves)
        super().__init__(f, t, given)
        self.scalars: dict[Expr, str] = {}
        for x in scalars(adjoint):
            self.scalars[x] = self.take(str(x.attr).lower())

    def elements(self, full: bool) -> list[Expr]:
        """The weight, then the gradient of each product as the loop sums it; `full`: every key is known to be kept."""
        gradients = {g.load: g.term for g in self.adjoint.scores}
        # none reaches a product behind a step function
        out = [self.adjoint.weight, *(gradients.get(x, ex.const(0.0)) for x in self.products)]
        if full and self.f.mask.keep is not TRUE:
            out = [simplify_under(e, {self.f.mask.keep: True}) for e in out]
        table = self.table()
        read = [ex.substitute(e, table) for e in out]
        around = [ex.const(1.0), *(ex.substitute(p.outside, table) for p in self.f.products)]
        return [e if x.is_const and x.value == 1 else e * x for e, x in zip(read, around)]

    def reached(self, full: bool) -> list[Expr]:
        """What reaches each leaf of the score."""
        terms = [x.term for x in self.leaves if x.kind != ENDS]
        if full and self.f.mask.keep is not TRUE:
            terms = [simplify_under(e, {self.f.mask.keep: True}) for e in terms]
        sums = {sum_of(x): x for x in self.products}
        return [ex.substitute(ex.substitute(e, self.table()), sums) for e in terms]

    def ended(self) -> list[Expr]:
        """What reaches each leaf of a row's end."""
        return [x.term for x in self.leaves if x.kind == ENDS]

    def terms(self) -> list[Expr]:
        ends = [*(x.term for x in self.adjoint.row), self.adjoint.acc, *self.ended()]
        return [*ends, *(e for full in (False, True) for e in (*self.elements(full), *self.reached(full)))]

    def counts(self) -> str:
        """How many leaves there are of each kind, and what is folded while some are wanted."""
        kinds = [x.kind for x in self.leaves]
        ends, rows = kinds.count(ENDS), kinds.count(ROWS)
        z, h = (f"(LEAVES & {bits}) != 0" if bits else "false" for bits in folds(self.f, self.leaves))
        return "\n".join([
            f"constexpr int KEPT = {len(kinds) - ends - rows}, SUMMED = {rows}, ENDS = {ends};",
            f"constexpr bool FOLD_Z = {z}, FOLD_H = {h};",
        ])


def scalars(a: Adjoint) -> list[Expr]:
    """The scalars of a row: those that the forward hands over, then sums over the values."""
    return [*(x.load for x in a.saved), *(x.load for x in a.row)]


def text(p: BackwardProgram) -> str:
    """The struct."""
    partial, full = (_adjoint(p, p.elements(x), p.reached(x)) for x in (False, True))
    inner = partial
    if partial != full:
        inner = ["if constexpr (PARTIAL) {", *(f"  {x}" for x in partial), "} else {", *(f"  {x}" for x in full), "}"]
    head = ["INLINE void adjoint(const Row& row, const float* scalars, float* const* x, float* w, float* const* kept,",
            "                    float* summed, int64_t m0, int n) const {"]
    doc = "// n products of a row from key m0 on, and its gradient's with values: gradients of the products, and weights"
    adjoint = [doc, "template <bool PARTIAL>", *head, *(f"  {x}" for x in inner), "}"]
    flow = [*_flow(p), *_ended(p)]
    row, fetching = p.fields.text(), fetch(p, adjoint)
    members, loading = load(p, set(re.findall(r"[^\W\d]\w*", "\n".join([*adjoint, *flow, *row]))))
    parts = [loading, row, fetching, flow, adjoint]
    body = [*members, *(line for part in parts for line in ("", *part))]
    return "\n".join(["struct Program {", *(f"  {x}" if x else "" for x in body), "};"])


def _adjoint(p: BackwardProgram, elements: list[Expr], reached: list[Expr]) -> list[str]:
    terms = [*elements, *reached]
    body = CppBody(p.scope, terms, set(p.taken), p.fields)
    body.lines += [f"float* const {x} = x[{i}];" for i, x in enumerate(p.inputs)]
    _bind_scalars(p, body, terms, "scalars")
    key = ex.index(p.key)
    scope = replace(p.scope, names={**p.scope.names, key: p.ranks[p.key]})
    loop = CppBody(scope, terms, body.taken, Around(p, body, p.key), key)
    at = {**{x: f"{p.inputs[i]}[i]" for x, i in p.products.items()}, p.adjoint.dweight: "w[i]"}
    for x in dict.fromkeys(x for e in terms for x in ex.loads(e) if x in at):
        name = loop.fresh(str(x.attr).lower())
        loop.lines.append(f"const float {name} = {at[x]};")
        loop.bind(x, name)
    texts = [loop.real(e) for e in terms]
    written = [f"{x}[i] = {text};" for x, text in zip(("w", *p.inputs), texts)]
    summed, after = _reached(p, body, loop.taken, texts[len(elements) :], written)
    name = p.ranks[p.key]
    where = [f"const int32_t {name} = int32_t(m0) + i;"] if mentions(name, [*loop.lines, *written]) else []
    inner = [*where, *loop.lines, *written]
    simd = f"#pragma omp simd reduction(+ : {', '.join(summed)})" if summed else "#pragma omp simd"
    lines = [*body.lines, simd, "for (int i = 0; i < n; i++) {", *(f"  {x}" for x in inner), "}", *after]
    return [*p.fields.unpacked(lines), *lines]


def _reached(
    p: BackwardProgram, body: CppBody, taken: set[str], texts: Sequence[str], written: list[str]
) -> tuple[list[str], list[str]]:
    """More lines of the loop, which add what reaches leaves; the names of sums over the keys, and lines behind the loop."""
    body.taken |= taken
    summed: list[str] = []
    after: list[str] = []
    kept = 0
    for text, (bit, leaf) in zip(texts, ((i, x) for i, x in enumerate(p.leaves) if x.kind != ENDS)):
        name, wanted = body.fresh(f"d_{leaf.load.attr}"), f"if constexpr (LEAVES >> {bit} & 1)"
        if leaf.kind == ROWS:
            body.lines.append(f"float {name} = 0.0f;")
            written.append(f"{wanted} {name} += {text};")
            after.append(f"{wanted} summed[{len(summed)}] += {name};")
            summed.append(name)
        else:
            body.lines.append(f"float* const {name} = kept[{kept}];")
            written.append(f"{wanted} {name}[i] += {text};")
            kept += 1
    return summed, after


def _ended(p: BackwardProgram) -> list[str]:
    terms = p.ended()
    if not terms:
        return []
    body = CppBody(p.scope, terms, set(p.taken), p.fields)
    _bind_scalars(p, body, terms, "scalars")
    lines = [f"to[{i}] = {text};" for i, text in enumerate([body.real(e) for e in terms])]
    inner = [*p.fields.unpacked([*body.lines, *lines]), *body.lines, *lines]
    head = "INLINE void ended(const Row& row, const float* scalars, float* to) const {"
    return ["", "// what reaches leaves of the end of a row", head, *(f"  {x}" for x in inner), "}"]


def _flow(p: BackwardProgram) -> list[str]:
    adjoint = p.adjoint
    terms = [*(x.term for x in adjoint.row), adjoint.acc]
    body = CppBody(p.scope, terms, set(p.taken), p.fields)
    body.lines += [f"scalars[{i}] = saved[{i}];" for i in range(len(adjoint.saved))]
    _bind_scalars(p, body, terms, "saved", len(adjoint.saved))
    for i, x in enumerate(adjoint.row, len(adjoint.saved)):
        name = p.scalars[x.load]
        text, lines = _over_values(p, body, x.term)
        summed = _loop(p, [*lines, f"{name} += {text};"])
        body.lines += [f"float {name} = 0.0f;", f"#pragma omp simd reduction(+ : {name})", *summed]
        body.lines.append(f"scalars[{i}] = {name};")
        body.bind(x.load, name)
    text, lines = _over_values(p, body, adjoint.acc)
    body.lines += ["#pragma omp simd", *_loop(p, [*lines, f"dacc[i] = {text};"])]
    doc = "// the end of a row, backwards: its scalars, and the gradient of what was summed over its keys"
    head = ["INLINE void flow(const Row& row, const float* saved, const OUT* out, const OUT* grad, float* dacc,",
            "                 float* scalars) const {"]
    return [doc, *head, *(f"  {x}" for x in [*p.fields.unpacked(body.lines), *body.lines]), "}"]


def _over_values(p: BackwardProgram, body: CppBody, term: Expr) -> tuple[str, list[str]]:
    """The text of a term inside a loop over the values, and the lines before it."""
    value = ex.index(p.a.value)
    names = {**p.scope.names, value: p.ranks[p.a.value]}
    loop = CppBody(replace(p.scope, names=names), [term], body.taken, Around(p, body, p.a.value), value)
    for x, source in ((p.adjoint.dout, "grad"), (p.adjoint.out, "out")):
        if x in ex.loads(term):
            name = loop.fresh(f"{source}_x")
            loop.lines.append(f"const float {name} = (float){source}[i];")
            loop.bind(x, name)
    return loop.real(term), loop.lines


def _loop(p: BackwardProgram, lines: list[str]) -> list[str]:
    name = p.ranks[p.a.value]
    where = [f"const int32_t {name} = i;"] if mentions(name, lines) else []
    return ["for (int i = 0; i < F; i++) {", *(f"  {x}" for x in [*where, *lines]), "}"]


def _bind_scalars(p: BackwardProgram, body: CppBody, terms: list[Expr], source: str, count: int | None = None) -> None:
    """Names for the row's scalars that terms read, the first `count` of them."""
    read = {x for e in terms for x in ex.loads(e)}
    for i, (scalar, name) in enumerate(list(p.scalars.items())[:count]):
        if scalar in read:
            body.lines.append(f"const float {name} = {source}[{i}];")
            body.bind(scalar, name)
