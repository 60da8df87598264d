"""Prints how gradients of floats that are no operands are added up where these are read: tiles, or all that a loop gathered.

    where(load)      slices of the tensor, each along one dimension of what is added: it is summed over the others
    read_at          a function of the places, where an element is looked up
    gathered         from what the fused loop adds up to the gradient of a leaf
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...patterns import expr as ex
from ...patterns.cascade import Size, size_term
from ...patterns.expr import Expr
from ..files.torch_file import PrintedFunction, Printer, indented
from ..forms.form import Form
from .cpp.leaves import DISTANCES, ENDS, KEYS, PAIRS, ROWS, LeafTerm, folds, own_lead


def where(f: Form, load: Expr, dims: Mapping[str, int]) -> list[tuple[str, int]] | None:
    """What a tensor is read by, dimension for dimension, where these are whole ranks or numbers; None: it is looked up.

    A rank with its place in `dims`, or a number and −1.
    """
    out: list[tuple[str, int]] = []
    for i, n in zip(load.args, f.attention.cascade.tensor[str(load.attr)].shape):
        rank = str(i.attr) if i.op == "index" else ""
        if i.is_const:
            out.append((str(int(i.value)), -1))
        elif rank in dims and f.cascade.rank[rank].size == n and dims[rank] not in (d for _, d in out):
            out.append((rank, dims[rank]))
        else:
            return None
    return out


def read_at(p: Printer, load: Expr, name: str) -> PrintedFunction:
    """The function of the places at which a tensor is read."""
    shape = p.f.attention.cascade.tensor[str(load.attr)].shape
    at = [_inside(i, n) for i, n in zip(load.args, shape)]
    return p.function(name, "Where its elements are read.", at)


def _inside(i: Expr, size: Size) -> Expr:
    """A coordinate that stays in its tensor: what a mask hides may be read from anywhere."""
    return i if i.is_const else ex.minimum(ex.maximum(i, 0), size_term(size) - 1)


@dataclass(frozen=True)
class LeafSums:
    """The leaves of one fused kernel: the text of what its loop is told, and of their gradients from what it gathers.

    What is gathered is seen over the leading ranks, the head, queries and keys, in this order; what is absent has size 1.
    """

    p: Printer
    leaves: tuple[LeafTerm, ...]
    names: tuple[str, ...]

    @property
    def tensors(self) -> list[str]:
        return [self.p.names.tensors[str(x.load.attr)] for x in self.leaves]

    @property
    def functions(self) -> list[PrintedFunction]:
        return [x for x in map(self._places, range(len(self.leaves))) if x is not None]

    def told(self) -> str:
        """What `gradients` is told, as Python text; `leaf_bits` are the wanted ones."""
        f = self.p.f
        kinds = list(enumerate(x.kind for x in self.leaves))
        kept = "".join(f"{self._kept(i)}, " for i, kind in kinds if kind not in (ROWS, ENDS))
        rows, ends = ([i for i, kind in kinds if kind == wanted] for wanted in (ROWS, ENDS))
        return f"Leaves(leaf_bits, {folds(f, self.leaves)}, [{kept.removesuffix(', ')}], {rows}, {ends})"

    def _kept(self, i: int) -> str:
        f, n, leaf = self.p.f, self.p.names, self.leaves[i]
        if leaf.kind != PAIRS:
            return f'({i}, "{leaf.kind}", 1, 1, True)'
        lead, own = f.heads.lead, own_lead(f, leaf)
        after = lead[lead.index(own[-1]) + 1 :] if own else ()
        div, mod = (" * ".join(f"({n.rank(r)})" for r in ranks) or "1" for ranks in (after, own))
        return f'({i}, "{leaf.kind}", {div}, {mod}, {f.heads.head in leaf.load.ranks})'

    def lines(self, first: int) -> list[str]:
        """Lines that put the wanted gradients into `flow`, whose operands come before `first`."""
        out = [f"flow += [None] * {len(self.leaves)}"]
        for i, tensor in enumerate(self.tensors):
            out += [f"if leaf_bits >> {i} & 1:", *indented(self._total(i, tensor, f"flow[{first + i}]"))]
        return out

    def _total(self, i: int, tensor: str, to: str) -> list[str]:
        leaf, part, places = self.leaves[i], self._part(i), self._places(i)
        if places is not None:
            call = places.call(self._coordinates(leaf))
            at = call if len(leaf.load.args) > 1 else f"[{call}]"
            name = self.names[i]
            zeros = f"{name} = torch.zeros({tensor}.shape, dtype=torch.float32, device=\"cpu\")"
            return [zeros, f"gather({name}, {part}, {at})", f"{to} = {name}.to({tensor}.dtype)"]
        found = where(self.p.f, leaf.load, self._dims(leaf)) or []
        order = [d for _, d in found if d >= 0]
        lacking = [d for d in range(len(self._ranks())) if d not in order]
        sums = f"reduced({part}, {lacking}, {order})"
        if all(d >= 0 or n == 1 for (_, d), n in zip(found, self._shape(leaf))):
            return [f"{to} = {sums}.reshape({tensor}.shape).to({tensor}.dtype)"]
        slices = ", ".join(":" if d >= 0 else text for text, d in found)
        return [f"{to} = torch.zeros_like({tensor})", f"{to}[{slices}] = {sums}.to({tensor}.dtype)"]

    def _shape(self, leaf: LeafTerm) -> Sequence[Size]:
        return self.p.f.cascade.tensor[str(leaf.load.attr)].shape

    def _places(self, i: int) -> PrintedFunction | None:
        leaf = self.leaves[i]
        if where(self.p.f, leaf.load, self._dims(leaf)) is not None:
            return None
        return read_at(self.p, leaf.load, f"read_at_{self.names[i]}")

    def _ranks(self) -> tuple[str, ...]:
        f = self.p.f
        return (*(f.heads.lead or ("",)), f.heads.head, f.attention.query, f.attention.key)

    def _dims(self, leaf: LeafTerm) -> dict[str, int]:
        """The dimension of each rank; distances have none that a query or a key moves along alone."""
        hidden = ("", *((self.p.f.attention.query, self.p.f.attention.key) if leaf.kind == DISTANCES else ()))
        return {r: d for d, r in enumerate(self._ranks()) if r not in hidden}

    def _part(self, i: int) -> str:
        """What was gathered of a leaf, dimension for dimension."""
        f, n, leaf = self.p.f, self.p.names, self.leaves[i]
        number = sum(x.kind == leaf.kind or {x.kind, leaf.kind} <= {KEYS, DISTANCES, PAIRS} for x in self.leaves[:i])
        size = {r: n.rank(r) if r else "1" for r in self._ranks()}
        query, key = f.attention.query, f.attention.key
        match leaf.kind:
            case "rows" | "ends":
                text = f"gathered.rows.sum(0)[..., {number}]" if leaf.kind == ROWS else f"gathered.ends[..., {number}]"
                size[key] = "1"
            case "keys":
                text, size[query] = f"gathered.kept[{number}]", "1"
            case "distances":
                text, size[query], size[key] = f"gathered.kept[{number}].sum(0)", "1", "-1"
            case _:
                text = f"gathered.kept[{number}]"
                kept = {*own_lead(f, leaf), *({f.heads.head} & leaf.load.ranks), query, key}
                size = {r: x if r in kept else "1" for r, x in size.items()}
        return f"{text}.view({', '.join(size[r] for r in self._ranks())})"

    def _coordinates(self, leaf: LeafTerm) -> dict[str, str]:
        """Texts of the coordinates of what was gathered."""
        f, n = self.p.f, self.p.names
        ranks = self._ranks()
        out = {self.p.ranks[r]: n.axis(n.rank(r), len(ranks) - 1 - d) for d, r in enumerate(ranks) if r}
        if leaf.kind == DISTANCES:
            query, key = f.attention.query, f.attention.key
            out[self.p.ranks[query]] = n.axis("1", 1)
            past = n.rank(query)
            out[self.p.ranks[key]] = f"{n.axis(f'({past}) + ({n.rank(key)}) - 1', 0)} - (({past}) - 1)"
        return out


