"""The operands of an attention's products as torch tensors: views, views laid end to end, a gather where neither will do.

    QK[b,h,p,m] = Σ_e c · Q[b,h,p,e] · K[b,h//2,m,e]
        near = Q as [b, h, p, e]     far = K as [b, h//2, m, e]     outside = c, all that does not vary over e
    where(m < M, K[b,h,m,e], X[b,h,m − M,e])                        torch.cat of K and X along m
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.concat import joined_rank, pieces
from ...patterns.attention.score import factors
from ...patterns.cascade import Cascade, Einsum, Size
from ...patterns.expr import Expr
from ..text.print_torch import TorchBody, TorchScope, size_source
from .terms import uncast


@dataclass(frozen=True)
class Product:
    """A score-shaped contraction: `outside · Σ_over near·far`; `near` lacks the key, `far` the query."""

    name: str
    near: Expr
    far: Expr
    over: tuple[str, ...]
    outside: Expr


def product(e: Einsum, query: str, key: str) -> Product | str:
    """Split a contraction into its two operands, or say why it has no two."""
    above, below = factors(e.body)
    over = frozenset(e.over)
    sides: dict[str, Expr] = {}

    def put(side: str, f: Expr, up: bool) -> None:
        if side not in sides:
            sides[side] = f if up else ex.const(1.0, f.dtype) / f
        else:
            sides[side] = sides[side] * f if up else sides[side] / f

    for f, up in [(f, True) for f in above] + [(f, False) for f in below]:
        f = uncast(f)
        if not f.ranks & over:
            put("outside", f, up)
        elif {query, key} <= f.ranks:
            return f"{e.out.tensor} sums a term over {', '.join(e.over)} that varies over both {query} and {key}: no product"
        else:
            put("far" if key in f.ranks else "near", f, up)
    if "near" not in sides or "far" not in sides:
        return f"{e.out.tensor} has only one operand"
    return Product(e.out.tensor, sides["near"], sides["far"], tuple(e.over), sides.get("outside", ex.const(1.0)))


@dataclass(frozen=True)
class Heads:
    """Batch ranks as kernels take them: all but one in front, then the head, whose groups of `group` share keys."""

    lead: tuple[str, ...]
    head: str
    group: int

    @property
    def order(self) -> tuple[str, ...]:
        return (*self.lead, self.head) if self.head else self.lead


def heads(a: Attention, sides: Sequence[Expr]) -> Heads:
    """The head is the rank by whose quotient keys or values are read, else the last batch rank."""
    groups: dict[str, set[int]] = {}
    for s in sides:
        for load in ex.loads(s):
            for i in load.args:
                if i.op == "floordiv" and i.args[0].op == "index" and i.args[1].is_const:
                    groups.setdefault(str(i.args[0].attr), set()).add(int(i.args[1].value))
    found = [(r, g) for r, g in groups.items() if r in a.batch and len(g) == 1]
    if len(found) == 1 and len(groups) == 1:
        ((head, group),) = found
        return Heads(tuple(r for r in a.batch if r != head), head, min(group))
    return Heads(a.batch[:-1], a.batch[-1] if a.batch else "", 1)


@dataclass(frozen=True)
class Names:
    """How a cascade's tensors and sizes are called in the text; `device`: where coordinates are made (empty: cached)."""

    c: Cascade
    tensors: Mapping[str, str]
    symbols: Mapping[str, str]
    device: str = ""

    def axis(self, size: str, after: int) -> str:
        """Text of the coordinates 0 … size - 1 along a dimension that has `after` dimensions behind it."""
        if not self.device:
            return f"axis({size}, {after})"
        shape = ", ".join(["-1", *["1"] * after])
        return f"torch.arange({size}, device={self.device})" + (f".view({shape})" if after else "")

    def size(self, s: Size) -> str:
        return size_source(s, self.symbols)

    def rank(self, r: str) -> str:
        return self.size(self.c.rank[r].size)

    def scope(self, names: Mapping[Expr, str], real: str, views: bool = True) -> TorchScope:
        known = {**{ex.symbol(n): t for n, t in self.symbols.items()}, **names}
        shapes = {t.name: t.shape for t in self.c.tensors}
        return TorchScope(known, self.tensors, shapes, {r.name: r.size for r in self.c.ranks}, real, views)


def operand(e: Expr, order: Sequence[str], at: Heads, names: Names, real: str) -> tuple[str, int, bool]:
    """Text of a term as a tensor [lead..., head, ...] over the ranks of `order`, absent ones of size 1.

    Also: how many heads share one element along the head's dimension (0: it has size 1), and whether the tensor is
    a view of an input as it is.
    """
    if e.op == "load":
        found = view(e, order, at, names)
        if found is not None:
            return *found, True
    elif (joined := _end_to_end(e, order, at, names)) is not None:
        return *joined, False
    return _gathered(e, order, names, real), (1 if at.head in e.ranks else 0), False


def element_type(e: Expr, real: str) -> str:
    """The type of the elements that `operand` gives: what is read or joined keeps its own, what is computed is `real`."""
    return e.dtype if e.op == "load" or _lies_end_to_end(e) else real


def view(e: Expr, order: Sequence[str], at: Heads, names: Names) -> tuple[str, int] | None:
    """A chain of views, or None where an index map needs more. A rank that two dimensions make is flattened of them."""
    text, args, shape = _unflattened(e, names)
    parts = _parts(e, names)
    picks: list[str] = []
    ranks: list[str] = []
    share = 0
    for i, size in zip(args, shape, strict=True):
        rank, start = _plain_index(i)
        extent = names.c.rank[rank].size if rank else 1
        if i.is_const:
            picks.append(str(int(i.value)))
            continue
        if i in parts:
            rank, extent, share = parts[i], size, max(share, int(i.args[0] is ex.index(at.head)))
        elif i.op == "floordiv" and i.args[0] is ex.index(at.head) and i.args[1].is_const and i.args[1].value == at.group:
            rank, start, share = at.head, 0, at.group
            extent = sympy.sympify(names.c.rank[rank].size) / at.group
        elif rank == at.head and rank:
            share = 1
        if not rank or rank in ranks or start < 0:
            return None
        ranks.append(rank)
        whole = start == 0 and sympy.sympify(size) == sympy.sympify(extent)
        stop = names.size(sympy.floor(extent) + start if isinstance(extent, sympy.Expr) else extent + start)
        picks.append(":" if whole else f"{start or ''}:{stop}")
    arranged = _arranged(text, picks, ranks, order, parts)
    return None if arranged is None else (arranged, share)


def _unflattened(e: Expr, names: Names) -> tuple[str, list[Expr], list[Size]]:
    """Text of a tensor with every dimension that two ranks index taken for two, its index terms and its shape.

        W[h·64 + (f + 32),k]   →   W.unflatten(0, (16, 64))[h,f + 32,k]
    """
    text, args, shape = names.tensors[str(e.attr)], list[Expr](), list[Size]()
    for i, size in zip(e.args, names.c.tensor[str(e.attr)].shape, strict=True):
        outer, width, inner = two_ranks(i)
        many = names.c.rank[outer].size if inner is not None else 0
        rank, start = _plain_index(inner) if inner is not None else ("", 0)
        own = names.c.rank[rank].size if rank else 0
        known = inner is not None and isinstance(many, int) and isinstance(own, int)
        if inner is not None and known and size == many * width and own + start <= width:
            text += f".unflatten({len(args)}, ({many}, {width}))"
            args += [ex.index(outer), inner]
            shape += [many, width]
        else:
            args.append(i)
            shape.append(size)
    return text, args, shape


def two_ranks(i: Expr) -> tuple[str, int, Expr | None]:
    """The rank, the width and the rest of an index `rank · width + (other + offset)`; no rest where it is something else."""
    outer = i.args[0] if i.op == "add" else i
    if outer.op != "mul" or outer.args[0].op != "index" or not outer.args[1].is_const:
        return "", 0, None
    rank, start = _plain_index(i.args[1])
    fits = rank and start >= 0 and rank != outer.args[0].attr
    return str(outer.args[0].attr), int(outer.args[1].value), i.args[1] if fits else None


def _parts(e: Expr, names: Names) -> dict[Expr, str]:
    """Index terms `r // n` and `r % n` of a rank that two whole dimensions make, with a name for each."""
    out: dict[Expr, str] = {}
    sizes = dict(zip(e.args, names.c.tensor[str(e.attr)].shape))
    for i in e.args:
        high = i.args[0] // i.args[1] if i.op == "mod" and i.args[0].op == "index" and i.args[1].is_const else i
        if high is not i and high in sizes:
            r, n = str(i.args[0].attr), int(i.args[1].value)
            if sizes[i] == n and sympy.sympify(sizes[high]) * n == sympy.sympify(names.c.rank[r].size):
                out |= {high: f"{r} //", i: f"{r} %"}
    return out


def _arranged(text: str, picks: list[str], ranks: list[str], order: Sequence[str], parts: Mapping[Expr, str]) -> str | None:
    """Dimensions picked, in the order that is wanted, pairs made one, missing ones of size 1."""
    made = {str(i.args[0].attr) for i in parts}
    if not {r.partition(" ")[0] for r in ranks} <= set(order):
        return None
    if set(picks) != {":"}:
        while picks[-1] == ":":
            picks.pop()
        text += f"[{', '.join(picks)}]"
    wanted = [x for r in order for x in ((f"{r} //", f"{r} %") if r in made else (r,)) if x in ranks]
    if wanted != ranks:
        text += f".permute({', '.join(str(ranks.index(r)) for r in wanted)})"
    for d, r in reversed(list(enumerate(wanted))):
        if r.endswith("%"):
            text += f".flatten({d - 1}, {d})"
    for d, r in enumerate(order):
        if r not in ranks and r not in made:
            text += f".unsqueeze({d})"
    return text


def _lies_end_to_end(e: Expr) -> bool:
    """Is a term made of tensors and numbers of one type, laid end to end?"""
    if joined_rank(e) is None:
        return e.op in ("load", "const")
    return e.args[1].dtype == e.args[2].dtype and all(_lies_end_to_end(x) for x in e.args[1:])


def _end_to_end(e: Expr, order: Sequence[str], at: Heads, names: Names) -> tuple[str, int] | None:
    """Views joined by torch.cat, and how many heads share one; None where a piece is no view, or pieces share differently.

        where(m < M, K[h,m,e], where(m < M + 1, 0, X[h,m − M − 1,e]))   →   torch.cat([K, zeros, X], -2)
    """
    loads = ex.loads(e)
    if joined_rank(e) is None or not _lies_end_to_end(e) or not loads or not e.ranks <= set(order):
        return None
    shares = {_share(x, at) for x in loads} - {0}
    if len(shares) > 1:
        return None
    share = shares.pop() if shares else 0
    text = _laid(e, e.ranks, order, at, names, share)
    return None if text is None else (text, share)


def _share(e: Expr, at: Heads) -> int:
    """How many heads read one element of a tensor: 1 where each reads its own, 0 where all read the same."""
    if at.head not in e.ranks:
        return 0
    return 1 if ex.index(at.head) in e.args else at.group


def _laid(e: Expr, whole: frozenset[str], order: Sequence[str], at: Heads, names: Names, share: int) -> str | None:
    """Text of a term with all the ranks of `whole`."""
    rank = joined_rank(e)
    if rank is None:
        return _whole_view(e, whole, order, at, names, share)
    texts: list[str] = []
    for p in pieces(e, rank, names.c.rank[rank].size):
        own = replace(names, c=replace(names.c, ranks=tuple(
            replace(r, size=p.size) if r.name == rank else r for r in names.c.ranks
        )))
        text = _laid(p.own, whole, order, at, own, share)
        if text is None:
            return None
        texts.append(text)
    return f"torch.cat([{', '.join(texts)}], {order.index(rank) - len(order)})"


def _whole_view(
    e: Expr, whole: frozenset[str], order: Sequence[str], at: Heads, names: Names, share: int
) -> str | None:
    """A tensor or a number as a view in which no rank is missing."""

    def size(r: str) -> str:
        text = names.rank(r)
        return f"({text}) // {share}" if r == at.head and share > 1 else text

    if e.is_const:
        like = next(t for t in names.c.inputs if t.dtype == e.dtype)
        shape = ", ".join(size(r) if r in whole else "1" for r in order)
        return f"{names.tensors[like.name]}.new_full(({shape}), {e.value})"
    found = view(e, order, at, names)
    if found is None:
        return None
    if missing := whole - e.ranks:
        return f"{found[0]}.expand({', '.join(size(r) if r in missing else '-1' for r in order)})"
    return found[0]


def _plain_index(i: Expr) -> tuple[str, int]:
    """The rank and offset of `rank + constant`; no rank where an index is something else."""
    if i.op == "index":
        return str(i.attr), 0
    if i.op == "add" and i.args[0].op == "index" and i.args[1].is_const:
        return str(i.args[0].attr), int(i.args[1].value)
    return "", 0


def _gathered(e: Expr, order: Sequence[str], names: Names, real: str) -> str:
    """The term computed over all its coordinates; what is read alone is gathered in the type that it has."""
    coordinates = {
        ex.index(r): names.axis(names.rank(r), len(order) - 1 - d) for d, r in enumerate(order) if r in e.ranks
    }
    body = TorchBody(names.scope(coordinates, real), [])
    text = body.element(e) if e.op == "load" else body.real(e)
    shape = ", ".join(names.rank(r) if r in e.ranks else "1" for r in order)
    return f"({text}).expand({shape})"


def joined(text: str, lead: Sequence[str], present: frozenset[str], names: Names) -> str:
    """A tensor [lead..., head, row, column] with one batch dimension in front."""
    if not lead:
        return _whole_tensor(text, names) or f"{text}.unsqueeze(0)"
    missing = [r for r in lead if r not in present]
    if missing:
        text += f".expand({', '.join(names.rank(r) if r in missing else '-1' for r in lead)}, -1, -1, -1)"
    return text if len(lead) == 1 else f"{text}.flatten(0, {len(lead) - 1})"


def _whole_tensor(text: str, names: Names) -> str:
    """The tensor of one batch of which a text takes the first: there is nothing to take off and put back."""
    tensors = (t for t in names.c.inputs if t.shape and t.shape[0] == 1)
    return next((names.tensors[t.name] for t in tensors if text == f"{names.tensors[t.name]}[0]"), "")
