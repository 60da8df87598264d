"""Prints the CPU kernel for any score and row rule: the score and one step of the row state, around two products.

    score, full    a tile's score, where the mask matters and where it keeps everything
    step           (score, state) → (weight, correction of what was summed before, new state)
    end            (sum, state) → output
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...patterns import expr as ex
from ...patterns.attention.rowstate import OLD, Carried
from ...patterns.expr import TRUE, Expr
from ...patterns.mapping import TileMapping
from ..files.tile_plan import planned
from ..files.torch_file import (
    PrintedFunction,
    Printer,
    entry,
    file,
    indented,
    make_near,
    near_names,
    operands,
    query_operand,
    relatives,
    shared_alike,
)
from ..forms.form import Form
from ..forms.operands import element_type
from ..skeletons import cpu, cpu_product
from ..text.print_torch import TYPES, TorchBody, identifier, is_number, literal
from ..text.printer import PrintError
from ..text.tile_terms import relative_parts

REDUCE = {"add": "sum", "max": "amax", "min": "amin"}
BODY = "two products around the score and the row's state"
STEP = "Of a tile: its weights, the correction of what was summed before, and the new state."


def text(f: Form, m: TileMapping, version: str) -> str:
    """The kernel's file."""
    k = ProductKernel(f)
    plan = [planned(k.p, m, always=False, triangles=False)] if f.skips else []
    functions = [*relatives(k.p, k.near), *k.scores, k.step, k.end, *plan]
    main = k.main(plan[0].call({}) if plan else "")
    return file(k.p, m, [*(x.text for x in functions), main], (cpu, cpu_product), [], BODY, version)


class ProductKernel:
    """The printed functions of one kernel, and `attention`, which calls them."""

    # May results be written over what they are made of? Not where torch's tape reads these again.
    reuse = True

    def __init__(self, f: Form, reserved: Sequence[str] = ()) -> None:
        pairs = [f"{x}_{i}" for i in range(len(f.products)) for x in "qk"]
        self.f, self.p = f, Printer(f, reserved=(*reserved, *pairs))
        a, taken = f.attention, set(self.p.taken)
        self.products = {p.name: take(p.name.lower(), taken) for p in f.products}
        self.state = {c.name: take(c.name.lower(), taken) for c in f.state.carried}
        # what multiplies a product outside of its sum belongs to the score
        self.outer: dict[Expr, Expr] = {}
        for p, e in zip(f.products, a.products):
            if not (p.outside.is_const and p.outside.value == 1):
                load = ex.load(p.name, e.out.index, a.cascade.tensor[p.name].dtype)
                self.outer[load] = load * p.outside
        score, full = self.whole(a.score), self.whole(f.mask.full)
        parts = [t for e in (score, full) for t in relative_parts(e, a.query, a.key) if t.ranks == {a.query, a.key}]
        self.near = tuple(dict.fromkeys(parts))
        self.scores = [self.p.function("score", "The score.", [score], named=self.leaves(score), reuse=self.reuse)]
        if full is not score:
            doc = "The score where the mask keeps every key."
            self.scores.append(self.p.function("full", doc, [full], named=self.leaves(full), reuse=self.reuse))
        self.step = self._step()
        self.end = self._end()

    def whole(self, e: Expr) -> Expr:
        return ex.substitute(e, self.outer) if self.outer else e

    def leaves(self, *terms: Expr) -> dict[Expr, str]:
        """Names of the products and of the parts that are at hand."""
        out = {part: name for part, (name, _) in zip(self.near, near_names(self.near))}
        return out | {x: self.products[str(x.attr)] for t in terms for x in ex.loads(t) if str(x.attr) in self.products}

    # the row's state

    def _step(self) -> PrintedFunction:
        f, a = self.f, self.f.attention
        x = ex.load("score of the tile", (), a.score.dtype)
        lifts = [self.whole(ex.substitute(c.lift, {a.score: x})) for c in f.state.carried]
        weight = self.whole(ex.substitute(f.state.weight, {a.score: x}))
        corrections = [c.correction for c in f.state.carried if c.correction is not None]
        last = f.state.correction
        roots = [*lifts, *corrections, weight, *([last] if last is not None else [])]
        body = TorchBody(self.p.scope({x: "x", **self.leaves(*roots)}, reuse=self.reuse), roots)
        body.taken |= {*self.state.values(), "x"}
        reads = [y for r in roots for y in ex.loads(r)]
        before: dict[str, str] = {}
        for y in reads:
            name = str(y.attr).removeprefix(OLD)
            if str(y.attr).startswith(OLD):
                if name not in before:
                    before[name] = body.fresh(f"{self.state[name]}_before")
                body.bind(y, before[name])
        for c, lift in zip(f.state.carried, lifts):
            self._carry(body, c, lift, before.get(c.name), [y for y in reads if str(y.attr) == c.name])
        w, r = body.real(weight), body.real(last) if last is not None else "None"
        body.line(f"return {w}, {r}, {of_values(list(self.state.values()))}")
        return self.p.define("step", STEP, body.lines, ["x", *self.state.values()], body.scope)

    def _carry(self, body: TorchBody, c: Carried, lift: Expr, before: str | None, reads: Sequence[Expr]) -> None:
        """Lines that bring one row scalar up to date."""
        if is_number(lift) or c.op not in REDUCE:
            raise PrintError(f"the row scalar {c.name} reduces {lift} by {c.op}")
        name = self.state[c.name]
        tile = f"{body.named(lift)}.{REDUCE[c.op]}(-1, keepdim=True)"
        factor = body.named(c.correction) if c.correction is not None else ""
        if before is not None:
            body.line(f"{before} = {name}")
        new = f"{name} * {factor} + {tile}" if factor else f"{name} + {tile}"
        body.line(f"{name} = {new if c.op == 'add' else f'torch.{c.op}imum({name}, {tile})'}")
        for y in reads:
            body.bind(y, name)

    def _end(self) -> PrintedFunction:
        f = self.f
        finish = self.whole(f.state.finish)
        names = {**self.state, f.attention.contraction.out.tensor: "acc"}
        leaves = {x: names[str(x.attr)] for x in ex.loads(finish) if str(x.attr) in names}
        return self.p.function("end", "The end of a row.", [finish], ["acc", *self.state.values()], leaves)

    # putting it together

    def main(self, plan: str) -> str:
        """The text of `attention`."""
        f, p = self.f, self.p
        setup, pairs = self.operands()
        batch = {p.ranks[r]: f"{p.ranks[r]}[z0:z1]" for r in f.heads.lead}
        named = {x.name: x for x in relatives(p, self.near)}
        near = make_near(p, [(name, named[made]) for name, made in near_names(self.near)], batch)
        start = of_values([literal(c.identity) for c in f.state.carried])
        inner = [
            *near, *([""] if near else []), *self._update(f.mask.keep is not TRUE), "", *self.finish(), "",
            f"stream([{', '.join(pairs)}], v, rows, (z0, z1), plan, {start}, update, finish)",
        ]
        lines = [*self.allocated(), "", "def part(z0, z1, plan):", *indented(inner), "", *self.parts(plan)]
        return entry(p, lines, setup, answer=self.answer)

    # what `attention` answers, and lines that make what else than the output it answers
    answer = "out"

    def allocated(self) -> list[str]:
        return []

    def parts(self, plan: str) -> list[str]:
        """Lines that call `part` for ranges of the batch, each along its plan."""
        a, p, masked = self.f.attention, self.p, self.f.mask.keep is not TRUE
        queries, keys = p.names.rank(a.query), p.names.rank(a.key)
        few = f"[(0, {p.batch}, strips({queries}, {keys}, {queries}, {masked}))]"
        every = f"[(0, {p.batch}, strips({queries}, {keys}, TILE_P, {masked}))]"
        parts = f"{few} if {queries} * {keys} <= FEW else {plan}" if plan else every
        return [f"for z0, z1, plan in {parts}:", "    part(z0, z1, plan)"]

    def operands(self, cast: bool = True) -> tuple[list[str], list[str]]:
        """Lines that make the operands, in the type that is computed in or as they are, and the pairs of their names."""
        f, p = self.f, self.p
        lines, pairs = [], []
        v = operands(p, f.attention.key, f.values, (f.attention.value,))
        real = f".to({TYPES[f.real]})" if cast else ""
        for i, x in enumerate(f.products):
            suffix = "" if len(f.products) == 1 else f"_{i}"
            k = operands(p, f.attention.key, x.far, x.over)
            far, values = shared_alike(p, k, v)
            lines.append(f"q{suffix} = {query_operand(p, x.near, x.over)}{_cast(x.near, f, real)}")
            lines.append(f"k{suffix} = {far}{_cast(x.far, f, real)}")
            pairs.append(f"(q{suffix}, k{suffix})")
        lines.append(f"v = {values}{_cast(f.values, f, real)}")
        return lines, pairs

    def _update(self, masked: bool) -> list[str]:
        at = self.places()
        score = self.scores[0].call(at)
        if masked and len(self.scores) > 1:
            score = f"{score} if masked else {self.scores[1].call(at)}"
        step = self.stepped(at)
        unpack = f"{''.join(f'{x}, ' for x in self.products.values()).rstrip()} = scores"
        return ["def update(scores, state, at, masked):", f"    {unpack}", f"    x = {score}", f"    return {step}"]

    def stepped(self, at: Mapping[str, str]) -> str:
        """The call that takes a tile's score `x` into the state."""
        step = self.step.call({**at, "x": "x"})
        return step.replace("step(x" + "".join(f", {s}" for s in self.state.values()), "step(x, *state", 1)

    def finish(self) -> list[str]:
        end = self.end.call(self.places())
        end = end.replace("end(acc" + "".join(f", {s}" for s in self.state.values()), "end(acc, *state", 1)
        return ["def finish(acc, state, at):", f"    return {end}"]

    def places(self) -> dict[str, str]:
        """Texts of the coordinates of a tile."""
        p, a = self.p, self.f.attention
        out = {p.ranks[r]: f"{p.ranks[r]}[at.z]" for r in self.f.heads.lead}
        inner = ((self.f.heads.head, "h"), (a.query, "p"), (a.key, "m"))
        out |= {p.ranks[r]: f"{p.ranks[r]}[at.{d}]" for r, d in inner if r}
        where = "at.p.start, at.p.stop, at.m.start, at.m.stop"
        return out | {name: f"{name}.cut({where})" for name, _ in near_names(self.near)}


def take(stem: str, taken: set[str]) -> str:
    name = identifier(stem, taken)
    taken.add(name)
    return name


def of_values(parts: Sequence[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _cast(e: Expr, f: Form, real: str) -> str:
    return real if element_type(e, f.real) != f.real else ""
