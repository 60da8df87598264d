"""Prints the CPU kernel of an attention with further outputs: whole rows at a time, whose scores stay in the cache.

    weigh      products → (weights, the row's reductions, what else leaves: of rows, of pairs, at keys that the mask hides)
    end        (sum, the row's reductions) → output
    keep       puts what else leaves where it belongs: numbers of rows, weights, their sums over heads

A row is computed as it is written, without a state that is carried: whatever reads its scores reads the same ones.
"""

from __future__ import annotations

from ...patterns import expr as ex
from ...patterns.cascade import term_size
from ...patterns.expr import TRUE, Expr
from ...patterns.mapping import TileMapping
from ...patterns.passes.further import Further, Several
from ...patterns.terms.conditions import conjuncts, simplify_under
from ..files.tile_plan import planned
from ..files.torch_file import PrintedFunction, entry, file, indented, make_near, near_names, relatives
from ..forms.form import Form
from ..skeletons import cpu, cpu_product
from ..text.print_torch import TYPES, TorchBody, is_number
from ..text.printer import PrintError
from .product import REDUCE, ProductKernel, of_values, take

BODY = "two products around the scores of whole rows, which are read by more than the second product"
LOCALS = ("weigh", "keep", "more", "whole_rows", "summed", "outside", "seen")


def text(f: Form, s: Several, m: TileMapping, version: str) -> str:
    """The kernel's file. Raises PrintError where the body does not fit the attention."""
    k = WholeKernel(f, s)
    plan = [planned(k.p, m, always=False, triangles=False)] if k.skips else []
    functions = [*relatives(k.p, k.near), k.weigh, k.end, *k.afters.values(), *plan]
    main = k.main(plan[0].call({}) if plan else "")
    return file(k.p, m, [*(x.text for x in functions), main], (cpu, cpu_product), [], BODY, version)


def hidden(x: Further, keep: Expr, key: str) -> Expr | None:
    """What a number of pairs is at the keys that the mask hides, where that is a number of the row."""
    found = {simplify_under(x.term, {part: False}) for part in conjuncts(keep)}
    return next(iter(found)) if len(found) == 1 and not any(key in e.ranks for e in found) else None


class WholeKernel(ProductKernel):
    """The printed functions of one kernel, and `attention`, which calls them."""

    def __init__(self, f: Form, s: Several) -> None:
        super().__init__(f, LOCALS)
        a = f.attention
        self.further = s.further
        taken = {*self.p.taken, *self.products.values()}
        self.row = {e.out.tensor: take(e.out.tensor.lower(), taken) for e in a.row}
        self.held = {x.name: take(x.name.lower(), taken) for x in s.further}
        self.pairs = [x for x in s.further if x.of_pairs(a)]
        self.outside = {x.name: hidden(x, f.mask.keep, a.key) for x in self.pairs} if f.mask.keep is not TRUE else {}
        self.skips = f.skips and all(e is not None for e in self.outside.values())
        for x in s.further:
            self._check(x)
        self.weigh = self._weigh()
        self.end = self._whole_end()
        self.afters = {x.name: self._after(x) for x in s.further if x.after is not x.total}

    def _check(self, x: Further) -> None:
        f = self.f
        order = [*f.heads.lead, f.heads.head, f.attention.query, f.attention.key]
        places = [order.index(r) for r in x.index]
        if places != sorted(places) or (x.head and x.head != f.heads.head):
            raise PrintError(f"{x.name} has its ranks in another order than the kernel")
        if missing := [r for r in (*f.heads.lead, f.attention.query) if r not in x.index]:
            raise PrintError(f"{x.name} does not vary over {missing[0]}")

    def _weigh(self) -> PrintedFunction:
        a = self.f.attention
        x = ex.load("score of the tile", (), a.score.dtype)

        def scored(e: Expr) -> Expr:
            return self.whole(ex.substitute(e, {a.score: x}))

        bodies, weight = [scored(e.body) for e in a.row], scored(a.weight)
        more = [scored(y.term) for y in self.further]
        hidden_terms = [self.outside[y.name] for y in self.pairs] if self.skips else []
        outside = [scored(e) for e in hidden_terms if e is not None]
        score = self.whole(a.score)
        roots = [score, *bodies, weight, *more, *outside]
        names = {y: n for r in roots for y, n in self.leaves(r).items()}
        body = TorchBody(self.p.scope(names, reuse=True), roots)
        body.taken |= {*self.row.values(), "x"}
        # a product is a tile's own: who alone reads it may write to it
        body.made |= {y for y in names if str(y.attr) in self.products and body.uses[y] == 1}
        body.line(f"x = {body.real(score)}")
        body.bind(x, "x")
        reads = [y for r in roots for y in ex.loads(r)]
        for e, own in zip(a.row, bodies):
            if is_number(own) or e.op not in REDUCE:
                raise PrintError(f"the row's {e.out.tensor} reduces {own} by {e.op}")
            body.line(f"{self.row[e.out.tensor]} = {body.named(own)}.{REDUCE[e.op]}(-1, keepdim=True)")
            for y in reads:
                if str(y.attr) == e.out.tensor:
                    body.bind(y, self.row[e.out.tensor])
        w, texts = body.let("w", weight), [body.real(e) for e in [*more, *outside]]
        body.line(f"return {w}, {of_values(list(self.row.values()))}, {of_values(texts)}")
        doc = "Of whole rows: the weights, the row's reductions, and what else leaves."
        return self.p.define("weigh", doc, body.lines, [*self.products.values()], body.scope)

    def _whole_end(self) -> PrintedFunction:
        a = self.f.attention
        finish = self.whole(a.finish)
        names = {**self.row, a.contraction.out.tensor: "acc"}
        leaves = {x: names[str(x.attr)] for x in ex.loads(finish) if str(x.attr) in names}
        return self.p.function("end", "The end of a row.", [finish], ["acc", *self.row.values()], leaves)

    def _after(self, x: Further) -> PrintedFunction:
        loads = dict.fromkeys(ex.loads(x.after), "total")
        return self.p.function(f"after_{self.held[x.name]}", "Of sums over heads.", [x.after], ["total"], loads)

    # putting it together

    def main(self, plan: str) -> str:
        f, p = self.f, self.p
        setup, pairs = self.operands()
        batch = {p.ranks[r]: f"{p.ranks[r]}[z0:z1]" for r in f.heads.lead}
        named = {x.name: x for x in relatives(p, self.near)}
        near = make_near(p, [(name, named[made]) for name, made in near_names(self.near)], batch)
        at = self.places()
        weigh = [
            "def weigh_tile(scores, at):", f"    {''.join(f'{x}, ' for x in self.products.values()).rstrip()} = scores",
            f"    return {self.weigh.call(at)}",
        ]
        end = self.end.call(at).replace("end(acc" + "".join(f", {s}" for s in self.row.values()), "end(acc, *row", 1)
        finish = ["def finish(acc, row, at):", f"    return {end}"]
        inner = [
            *near, *([""] if near else []), *weigh, "", *finish, "", *self._keep(), "",
            f"whole_rows([{', '.join(pairs)}], v, rows, (z0, z1), plan, weigh_tile, finish, keep)",
        ]
        made = [self._made(x) for x in self.further]
        lines = [*made, "", "def part(z0, z1, plan):", *indented(inner), "", *self.parts(plan)]
        answers = ", ".join(["out", *(self._answer(x) for x in self.further)])
        return entry(p, lines, setup, answer=f"({answers})")

    def _shape(self, x: Further) -> list[str]:
        """The sizes of what is held of an output: [Z, H or groups of heads, P, M or 1]."""
        f, n = self.f, self.p.names
        heads = n.rank(f.heads.head) if f.heads.head else "1"
        if x.head:
            heads = "1" if x.group is None else f"{heads} // {n.size(term_size(x.group))}"
        return [self.p.batch, heads, n.rank(f.attention.query), n.rank(f.attention.key) if x in self.pairs else "1"]

    def _made(self, x: Further) -> str:
        kind = self.f.real if x.head else x.dtype
        make = "zeros" if x in self.pairs else "empty"
        device = self.p.names.tensors[self.f.cascade.inputs[0].name]
        shape = ", ".join(self._shape(x))
        return f"{self.held[x.name]} = torch.{make}({shape}, dtype={TYPES[kind]}, device={device}.device)"

    def _keep(self) -> list[str]:
        lines = []
        keys = self.p.names.rank(self.f.attention.key)
        places = [str(self.pairs.index(x) + len(self.further)) if x in self.pairs else "" for x in self.further]
        for i, (x, there) in enumerate(zip(self.further, places)):
            name, part = self.held[x.name], f"more[{i}]"
            if x not in self.pairs:
                lines.append(f"{name}[at.z, at.h, at.p] = {part}")
                continue
            place = "{1}.z, {1}.h, {1}.p, {1}.m"
            add = f"summed({name}, {{}}, {{}}, {self._group(x)})" if x.head else f"{name}[{place}] = {{0}}"
            lines.append(add.format(part, "at"))
            if self.skips:
                lines.append(f"for at_hidden in outside(more[{there}], at, {keys}):")
                lines.append(f"    {add.format(f'more[{there}]', 'at_hidden')}")
        return ["def keep(more, at):", *indented(lines)]

    def _group(self, x: Further) -> str:
        n = self.p.names
        return n.rank(self.f.heads.head) if x.group is None else n.size(term_size(x.group))

    def _answer(self, x: Further) -> str:
        """The output as the cascade declares it, in its type."""
        name = self.held[x.name]
        if x.name in self.afters:
            name = self.afters[x.name].call({"total": name})
        if x.head:
            name = f"({name}).to({TYPES[x.dtype]})"
        n = self.p.names
        sizes = [n.rank(r) for r in x.index]
        if x.head and x.group is not None:
            place = x.index.index(x.head)
            sizes[place] = f"{sizes[place]} // {self._group(x)}"
        return f"{name}.reshape({', '.join(sizes)})" if sizes else name

