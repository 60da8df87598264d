"""Prints the CPU kernel for rows that name their keys: two products around the printed score and row state, keys gathered.

    slots   the indices as the model computed them       chosen   the score of a key that is named
    least   what one of a row's scores has to reach      plain    rows where none does, as they are written

A change of the variable that is reduced, exact where an unnamed key's fill is neutral beside some score of the row. Masks
that are added as data may hide all keys that a row names: only the scores tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...patterns import expr as ex
from ...patterns.cascade import Einsum, size_term
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.masks.selection import Selection, selection
from ...patterns.terms.conditions import simplify_under
from ..files.beforehand import einsum
from ..files.torch_file import PrintedFunction, entry, file, indented, make_near, near_names, operands, relatives
from ..forms import skip
from ..forms.form import Form
from ..skeletons import cpu, cpu_product
from ..text.print_torch import TYPES, TorchBody, literal
from ..text.printer import PrintError
from .product import BODY, ProductKernel, of_values

RESERVED = ("slots", "there", "chosen", "named", "take", "plain", "member", "block", "selected")


def text(f: Form, m: TileMapping, version: str, after: Einsum | None = None) -> str:
    """The kernel's file; `after` maps what the attention sums to the output."""
    k = SelectedKernel(f, after)
    functions = [*relatives(k.p, k.near), *k.scores, k.chosen, k.step, k.end]
    walk = [f"Each row sees the keys that {k.choice.slots} names, gathered; {BODY}."]
    return file(k.p, m, [*(x.text for x in functions), k.whole_file()], (cpu, cpu_product), [], BODY, version, walk)


class SelectedKernel(ProductKernel):
    """The printed functions of one kernel: those of the product body for rows as written, and the score of a named key."""

    # names that the printed text uses for itself
    reserved: Sequence[str] = RESERVED

    def __init__(self, f: Form, after: Einsum | None = None) -> None:
        super().__init__(f, self.reserved)
        self.after = after
        self.choice = _choice(f)
        a = f.attention
        null = skip.null(f.state, a.score, a.key)
        if null is None:
            raise PrintError("no score stands for a key that is not there")
        self.null = null
        score = self.whole(simplify_under(a.score, {self.choice.member: True}))
        if any(x.attr == self.choice.member.attr for x in ex.loads(score)):
            raise PrintError("the score of a key that is named reads the mask of all pairs")
        self.chosen = self._apart("chosen", "The score of a key that the row names.", score)

    def _apart(self, name: str, doc: str, term: Expr) -> PrintedFunction:
        """A function at keys that lie anywhere: what it reads is gathered."""
        leaves = {x: self.products[str(x.attr)] for x in ex.loads(term) if str(x.attr) in self.products}
        body = TorchBody(self.p.scope(leaves, views=False, reuse=self.reuse), [term])
        result = body.real(term) if term.is_float else body.term(term)
        return self.p.define(name, doc, [*body.lines, f"    return {result}"], (), body.scope)

    def whole_file(self) -> str:
        """The text of `attention`."""
        setup, pairs = self.setup()
        lines = [*self.allocated(), *self.closures(), "", f"selected([{', '.join(pairs)}], v, rows, {self.told()})"]
        return entry(self.p, lines, setup, without=str(self.choice.member.attr), answer=self._answer())

    def setup(self) -> tuple[list[str], list[str]]:
        """Lines that make the operands as they are and the slots, and the pairs of the operands' names."""
        p, query = self.p, self.f.attention.query
        setup, pairs = self.operands(cast=False)
        slots, _ = operands(p, query, self.choice.slots, (self.choice.slot,))
        return [*setup, f"slots = {slots}.expand(-1, -1, {p.names.rank(query)}, -1)"], pairs

    def closures(self) -> list[str]:
        """Lines of the functions that a walk over rows calls."""
        at_keys = {**self.places(), self.p.ranks[self.f.attention.key]: "keys"}
        unpack = f"{''.join(f'{x}, ' for x in self.products.values()).rstrip()} = scores"
        return [
            *self.finish(), "", "def named(scores, at, keys, there):", f"    {unpack}",
            f"    return torch.where(there, {self.chosen.call(at_keys)}, {literal(self.null)})", "",
            "def take(x, state, at):", f"    return {self.stepped(self.places())}", "", *self._plain(),
        ]

    def told(self) -> str:
        """What a walk over rows is told besides the operands, as arguments."""
        f, p, s = self.f, self.p, self.choice
        least = literal(-skip.FINITE if f.rule == "guarded" else -math.inf)
        places = f"slots, {p.names.size(s.first)}, {p.names.size(s.places)}, {s.block}"
        return f"{places}, {TYPES[f.real]}, {self._start()}, named, take, finish, {least}, plain"

    def _start(self) -> str:
        return of_values([literal(c.identity) for c in self.f.state.carried])

    def _answer(self) -> str:
        """The output: what the rows sum, or what a map makes of that."""
        if self.after is None:
            return self.answer
        names, output = self.p.names, self.f.cascade.outputs[0]
        made = self.f.cascade.producers[output][-1].out.index
        here = all(str(x.attr) in names.tensors or (x.attr == output and x.args == made) for x in self.after.reads)
        if not here or not self.after.ranks <= set(names.c.rank):
            # an index map was folded, and with it what only the map behind reads
            raise PrintError("the map behind the attention reads what is not there in its kernel")
        return einsum(replace(names, tensors={**names.tensors, output: "out"}), self.f.real, self.after)

    def _plain(self) -> list[str]:
        """Lines of the rows that are computed as they are written, and of the mask of all pairs, made once if ever."""
        f, p = self.f, self.p
        member, real = str(self.choice.member.attr), TYPES[f.real]
        (e,) = (e for e in f.attention.prelude if e.out.tensor == member)
        table = {x.name: x for x in relatives(p, self.near)}
        batch = {p.ranks[r]: f"{p.ranks[r]}[z : z + 1]" for r in f.heads.lead}
        near = make_near(p, [(name, table[made]) for name, made in near_names(self.near)], batch)
        wide = f"[(q.to({real}), k.to({real})) for q, k in pairs], v.to({real})"
        inner = [
            f"{p.names.tensors[member]} = member()", "plan = [block]", *near, *self._update(True),
            f"stream({wide}, out, (z, z + 1), plan, {self._start()}, update, finish)",
        ]
        made = ["@cache", "def member():", f"    return {einsum(p.names, f.real, e)}", ""]
        return [*made, "def plain(pairs, v, out, z, block):", *indented(inner)]


def _choice(f: Form) -> Selection:
    """The selection of an attention whose unnamed keys may be left out. Raises PrintError with the reason where not."""
    a = f.attention
    found = selection(a, f.mask.keep)
    if found is None:
        raise PrintError("no row names its keys")
    if f.rule not in ("always", "guarded"):
        raise PrintError("the fill of a key that no row names is not proved to leave it without a weight")
    if a.cascade.rank[found.slot].size == 0:
        raise PrintError("rows have no slots")
    x = ex.load("score", (), a.score.dtype)
    inner = (*(c.lift for c in f.state.carried), f.state.weight)
    if any(a.key in ex.substitute(e, {a.score: x}).ranks for e in inner):
        raise PrintError("the row's state reads the key besides its score")
    if found.first != 0:
        before = simplify_under(a.score, {ex.index(a.key) < size_term(found.first): True})
        if any(y.attr == found.member.attr for y in ex.loads(before)):
            raise PrintError("who is named changes the score of keys that need no name")
    behind = [e for e in a.prelude if any(y.attr == found.member.attr for y in e.reads)]
    if behind:
        raise PrintError(f"{behind[0].out.tensor} reads the mask of all pairs")
    return found
