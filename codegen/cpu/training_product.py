"""Prints the CPU kernel in tiled torch that is trained: the product body, which hands over row scalars, and a second walk.

    handed         state → scalars of the row, for the backward
    ready          (dOut, out, scalars) → what reaches the product with the values, and δ
    ended          (dOut, out, scalars) → the gradients of what the row's end reads
    back           (products, dW, scalars) → the weight, each product's gradient, those of other floats of the score
    back_full      the same where the mask keeps every key
Whatever floats the score or the row's end reads get their gradients: each tile's is summed over what the tensor lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...patterns import expr as ex
from ...patterns.backward.adjoint import Adjoint, Gradient, adjoint
from ...patterns.backward.outside import sum_of
from ...patterns.expr import TRUE, Expr
from ...patterns.mapping import TileMapping
from ...patterns.terms.conditions import simplify_under
from ...patterns.verdict import Obstacle
from ..files.tile_plan import planned
from ..files.torch_file import PrintedFunction, coordinates, file, indented, parts, prelude, relatives, signature, sizes
from ..forms.form import Form
from ..forms.skip import FINITE, vanishes_backwards
from ..skeletons import cpu, cpu_product
from ..skeletons.backward import cpu_backward, cpu_product_backward
from ..text.print_torch import TYPES, TorchBody
from ..text.printer import PrintError
from .cpp.leaves import outside
from .leaf_sums import read_at, where
from .product import ProductKernel, take
from .training import NARROW, PrintedTraining, visiting

BODY = "two products around the score and the row's state, and five around their derivatives"
LOCALS = (
    *parts(cpu_backward), *parts(cpu_product_backward), "grad", "saved", "wanted", "given", "flow", "handed", "ready",
    "back", "back_full", "begin", "ended", "end_of", "exchanged",
    "update", "dq", "dk", "dv", "dw", "scalars", "scores", "acc", "g", "w",
)


@dataclass(frozen=True)
class Sum:
    """The gradient of what stands at `load`, no operand: a term of every tile, or of every row, and where it is added up."""

    load: Expr
    term: Expr
    of_tiles: bool
    total: str


def printed(f: Form, m: TileMapping, version: str) -> PrintedTraining:
    """The kernel's file. Raises PrintError where the body does not fit the attention."""
    made = adjoint(f.attention)
    if isinstance(made, Obstacle):
        raise PrintError(str(made))
    if made.passes:
        raise PrintError(f"the gradient needs another pass over the keys: {made.passes[0]}")
    if any(f.attention.value in x.load.ranks for x in (*made.saved, *made.row)):
        raise PrintError("the gradient needs what the forward sums, value by value: rows hand over scalars")
    if f.real != "f32":
        raise PrintError("what rows hand over is float32, and this is computed in float64")
    elements = [made.weight, *(g.term for g in (*made.scores, *made.leaves) if a_tile(f, g))]
    return PrintedTraining(_TrainingKernel(visiting(f, made, elements), made).file(m, version), (), len(made.saved))


class _TrainingKernel(ProductKernel):
    """The printed functions of both walks."""

    answer = "out, saved"

    def __init__(self, f: Form, made: Adjoint) -> None:
        super().__init__(f, LOCALS)
        self.made = made
        self.taken = {*self.p.taken, *self.products.values(), *self.state.values()}
        self.scalars = {x.load: take(str(x.load.attr), self.taken) for x in (*made.saved, *made.row)}
        self.sums = [self._sum(g.load, self.whole(g.term), a_tile(f, g)) for g in made.leaves] + self._outside()
        self.read_at = self._read_at()
        self.handed = self._handed()
        self.ready = self._ready()
        self.ended = self._ended()
        self.back = self._back("back", "Of a tile: its weights, and the gradients of what the score reads.", TRUE)
        full = self._back("back_full", "The same where the mask keeps every key.", f.mask.keep)
        self.full = full if body_of(full) != body_of(self.back) else self.back

    def _sum(self, load: Expr, term: Expr, of_tiles: bool) -> Sum:
        return Sum(load, term, of_tiles, take(f"d_{self.p.names.tensors[str(load.attr)]}", self.taken))

    def file(self, m: TileMapping, version: str) -> str:
        f, p = self.f, self.p
        plan = [planned(p, m, always=False, triangles=False)] if f.skips else []
        back = [self.back] if self.full is self.back else [self.back, self.full]
        forward = [*relatives(p, self.near), *self.scores, self.step, self.end, self.handed]
        ended = [self.ended] if self.ended is not None else []
        functions = [*forward, self.ready, *ended, *back, *self.read_at.values(), *plan]
        call = plan[0].call({}) if plan else ""
        main, backward = self.main(call), self.backward(call if self._skips() else "")
        modules = (cpu, cpu_product, cpu_backward, cpu_product_backward)
        return file(p, m, [*(x.text for x in functions), main, backward], modules, [], BODY, version)

    def _skips(self) -> bool:
        """Has a key that the mask hides no part in any gradient? Else every tile is visited."""
        terms = [self.made.weight, *(x.term for x in self.made.scores), *(s.term for s in self.sums if s.of_tiles)]
        return vanishes_backwards(terms, self.f.mask.keep, FINITE)

    # the forward's part

    def _handed(self) -> PrintedFunction:
        terms = [self.whole(x.term) for x in self.made.saved]
        named = {x: self.state[str(x.attr)] for t in terms for x in ex.loads(t) if str(x.attr) in self.state}
        return self.p.function("handed", "What a row hands over for the backward.", terms, [*self.state.values()], named)

    def allocated(self) -> list[str]:
        return [f"saved = torch.empty((*rows.shape[:3], {len(self.made.saved)}), dtype=torch.float32, device=out.device)"]

    def finish(self) -> list[str]:
        first, *rest = super().finish()
        call = self.handed.call({**self.places(), **{x: f"state[{i}]" for i, x in enumerate(self.state.values())}})
        each = call if len(self.made.saved) > 1 else f"[{call}]"
        hand = [f"    for i, x in enumerate({each}):", "        saved[at.z, at.h, at.p, i : i + 1] = x"]
        return [first, *(hand if self.made.saved else []), *rest]

    # the terms of the backward

    def _product_loads(self) -> list[Expr]:
        a = self.f.attention
        return [ex.load(e.out.tensor, e.out.index, a.cascade.tensor[e.out.tensor].dtype) for e in a.products]

    def _of_products(self) -> list[Expr]:
        """The gradient of each product as it is summed, without what multiplies it outside."""
        found = {g.load: self.whole(g.term) for g in self.made.scores}
        pairs = zip(self.f.products, self._product_loads())
        return [found.get(load, ex.const(0.0)) * (x.outside if load in self.outer else 1.0) for x, load in pairs]

    def _outside(self) -> list[Sum]:
        """The gradients of floats that multiply a product outside of its sum."""
        sums = {sum_of(x): x for x in self._product_loads()}
        return [self._sum(y, ex.substitute(self.whole(d), sums), True) for y, d in outside(self.f, self.made)]

    def _ready(self) -> PrintedFunction:
        made = self.made
        named = {made.dout: "g", made.out: "o", **{x.load: self.scalars[x.load] for x in made.saved}}
        body = TorchBody(self.p.scope(named), [made.acc, *(x.term for x in made.row)])
        answer = [body.real(made.acc), *(f"({body.real(x.term)}).sum(-1, keepdim=True)" for x in made.row)]
        doc = "Of rows: what reaches the product with the values, and sums over the values."
        lines = [*body.lines, f"    return {', '.join(answer)}"]
        return self.p.define("ready", doc, lines, ["g", "o", *self._saved()], body.scope)

    def _ended(self) -> PrintedFunction | None:
        terms = [s.term for s in self.sums if not s.of_tiles]
        doc = "Of rows: the gradients of what their end reads."
        return self.p.function("ended", doc, terms, [*self.scalars.values()], self.scalars) if terms else None

    def _rounded(self) -> str:
        """When is a δ wanted that is more exact than what the output tells, for tensors of a wider type: as Python text."""
        c = self.f.cascade
        out = c.tensor[c.outputs[0]].dtype
        if not self.made.row or out not in NARROW:
            return ""
        wide = {self.p.names.tensors[str(s.load.attr)] for s in self.sums if s.load.dtype not in NARROW}
        return " or ".join(f"{t}.requires_grad" for t in sorted(wide))

    def _saved(self) -> list[str]:
        return [self.scalars[x.load] for x in self.made.saved]

    def _back(self, name: str, doc: str, keep: Expr) -> PrintedFunction:
        terms = [self.whole(self.made.weight), *self._of_products(), *(s.term for s in self.sums if s.of_tiles)]
        if keep is not TRUE:
            terms = [simplify_under(t, {keep: True}) for t in terms]
        loads = {x: self.products[str(x.attr)] for t in terms for x in ex.loads(t) if str(x.attr) in self.products}
        named = {**loads, self.made.dweight: "dw", **self.scalars}
        return self.p.function(name, doc, terms, [*self.products.values(), "dw"], named)

    # putting it together

    def backward(self, plan: str) -> str:
        """The text of `backward`."""
        f, p = self.f, self.p
        names = [p.names.tensors[t.name] for t in f.cascade.inputs]
        setup, pairs = self.operands()
        queries, keys = ([x.strip("()").split(", ")[i] for x in pairs] for i in (0, 1))
        made = [*queries, *keys, "v"]
        totals = {s.total: p.names.tensors[str(s.load.attr)] for s in self.sums}
        wide, masked = self._rounded(), f.mask.keep is not TRUE
        exchanged = [*self._exchanged(masked), ""] if wide else []
        exchange, end = f"exchanged if {wide} else None" if wide else "None", "end_of" if self.ended is not None else "None"
        end_of = [*self._end_of(), ""] if self.ended is not None else []
        inner = [
            *self._begin(), "", *exchanged, *end_of, *self._update_backward(masked), "",
            f"walk([{', '.join(pairs)}], v, out.shape[1], (z0, z1), plan, (dq, dk, dv), begin, {exchange}, {end}, update)",
        ]
        lines = [
            f"out, grad = {rows_of(f, 'out')}, {rows_of(f, 'grad')}",
            *(f"d{x} = [torch.zeros_like(x) for x in ({', '.join(of)},)]" for x, of in (("q", queries), ("k", keys))),
            "dv = torch.zeros_like(v)",
            *(f"{total} = torch.zeros({t}.shape, dtype=torch.float32, device={t}.device)" for total, t in totals.items()),
            "", "def part(z0, z1, plan):", *indented(inner), "", *self.parts(plan),
        ]
        flow = ", ".join(["*dq", "*dk", "dv", *(f"{total}.to({t}.dtype)" for total, t in totals.items())])
        body = [
            *sizes(p), f"given = leaves([{', '.join(names)}], wanted)", f"{', '.join(names)}, = given",
            "with torch.enable_grad():", *indented([*prelude(p), *setup]), *coordinates(p, "\n".join(lines)), *lines,
            f"flow = [{flow}]",
            f"return inputs_gradients([{', '.join([*made, *totals.values()])}], flow, given, wanted)",
        ]
        own = signature(p).replace("*, ", "")
        doc = "The gradients of the inputs in the wanted places, from the output and its gradient."
        return f'def backward(grad, out, saved, wanted, {own}):\n    """{doc}"""\n' + "\n".join(indented(body))

    def _begin(self) -> list[str]:
        real = TYPES[self.f.real]
        saved, rows = self._saved(), [self.scalars[x.load] for x in self.made.row]
        lines = [f"g, o = grad[at.z, at.h, at.p].to({real}), out[at.z, at.h, at.p].to({real})"]
        lines += [f"{', '.join(saved)}, = saved[at.z, at.h, at.p].split(1, -1)"] if saved else []
        lines.append(f"{', '.join(['acc', *rows])} = {self.ready.call(self.places())}")
        return ["def begin(at):", *indented([*lines, f"return acc, ({''.join(f'{x}, ' for x in (*saved, *rows))})"])]

    def _read(self) -> list[str]:
        names = list(self.scalars.values())
        return [f"{', '.join(names)}, = scalars"] if names else []

    def _end_of(self) -> list[str]:
        ends = [s for s in self.sums if not s.of_tiles]
        assert self.ended is not None
        lines = [*self._read(), f"{', '.join(f'{s.total}_part' for s in ends)} = {self.ended.call(self.places())}"]
        shape = "(at.z.stop - at.z.start, at.h.stop - at.h.start, at.p.stop - at.p.start, 1)"
        for s in ends:
            lines += self._add(s, f"{s.total}_part", shape)
        return ["def end_of(at, scalars):", *indented(lines)]

    def _of_tile(self, masked: bool) -> list[str]:
        """Lines that give a tile's products their names, and the call of what is printed of it."""
        call = self.back.call(self.places())
        if masked and self.full is not self.back:
            call = f"{call} if masked else {self.full.call(self.places())}"
        return [f"{', '.join(self.products.values())}, = scores", *self._read(), call]

    def _exchanged(self, masked: bool) -> list[str]:
        *lines, call = self._of_tile(masked)
        lines += [f"w, *_ = {call}", "return w * dw"]
        return ["def exchanged(scores, dw, scalars, at, masked):", *indented(lines)]

    def _update_backward(self, masked: bool) -> list[str]:
        tiles = [s for s in self.sums if s.of_tiles]
        parts = [f"d_{x}" for x in self.products.values()]
        *lines, call = self._of_tile(masked)
        lines.append(f"{', '.join(['w', *parts, *(f'{s.total}_part' for s in tiles)])} = {call}")
        for s in tiles:
            lines += self._add(s, f"{s.total}_part", "dw.shape")
        lines.append(f"return w, ({''.join(f'{x}, ' for x in parts)})")
        return ["def update(scores, dw, scalars, at, masked):", *indented(lines)]

    def _add(self, s: Sum, part: str, shape: str) -> list[str]:
        """Lines that add a tile's gradient of a tensor where it is read."""
        if s.term.is_const and s.term.value == 0:
            return []
        found = self._where(s.load)
        if found is not None:
            slices = ", ".join(text if d < 0 else f"at.{'zhpm'[d]}" for text, d in found)
            lacking, order = [d for d in range(4) if d not in (x for _, x in found)], [d for _, d in found if d >= 0]
            return [f"{s.total}[{slices or '...'}] += reduced({part}.expand({shape}), {lacking}, {order})"]
        place = self.read_at[s.total]
        call = place.call(self.places())
        return [f"gather({s.total}, {part}.expand({shape}), {call if len(s.load.args) > 1 else f'[{call}]'})"]

    def _where(self, load: Expr) -> list[tuple[str, int]] | None:
        """What a tile reads of a tensor, dimension for dimension; None: it is looked up."""
        f, a = self.f, self.f.attention
        dims = {a.query: 2, a.key: 3, **dict.fromkeys([f.heads.head] if f.heads.head else [], 1)}
        dims |= dict.fromkeys(f.heads.lead if len(f.heads.lead) == 1 else [], 0)
        return where(f, load, dims)

    def _read_at(self) -> dict[str, PrintedFunction]:
        """For each tensor that is looked up at computed places: the function of those places."""
        looked = [s for s in self.sums if self._where(s.load) is None]
        return {s.total: read_at(self.p, s.load, f"read_at_{s.total}") for s in looked}


def a_tile(f: Form, g: Gradient) -> bool:
    """Is a gradient a term of tiles, not of rows?"""
    return f.attention.key in g.space


def body_of(f: PrintedFunction) -> str:
    """A function's lines, without its name and its doc."""
    return f.text.partition('"""\n')[2]


def rows_of(f: Form, name: str) -> str:
    """The output or its gradient as [batch, head, query, value]."""
    a, c, at = f.attention, f.cascade, f.heads
    declared = [str(i.attr) for i in c.producers[c.outputs[0]][0].out.index]
    order = [declared.index(r) for r in (*at.lead, *([at.head] if at.head else []), a.query, a.value)]
    text = name if order == sorted(order) else f"{name}.permute({', '.join(map(str, order))})"
    if not at.head:
        text = f"{text}.unsqueeze(0)"
    return f"{text}.flatten(0, {len(at.lead) - 1})" if len(at.lead) > 1 else text if at.lead else f"{text}.unsqueeze(0)"
