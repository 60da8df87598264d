"""SLA: exact attention on critical tiles, linear attention on marginal ones, nothing on negligible ones.

    C = softmax(mean(Q) mean(K)ᵀ · scale)                          over tiles of `rows` queries and `keys` keys
    critical: the largest `critical` of a row of C;  negligible: its smallest `negligible`;  marginal: the rest
    Os[p,f] = softmax over the keys of critical tiles
    Ol[p,f] = Σ_m φ(q)·φ(k) V / (1e-5 + Σ_m φ(q)·φ(k))  over the keys of marginal tiles,  φ = softmax over the width
    O = Os + Ol·PROJ                                               PROJ [value, value], learned, 0 at first

This is the paper's definition (section 3.2). Released code differs, and is not followed: its linear branch sums all keys,
those of critical and negligible tiles as well, so that critical keys count twice; its number of critical tiles may round to
0, here a row has at least one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...cascade import Cascade, Tensor, size_term, term_size
from ...expr import Expr
from ...verdict import Refusal
from ..masked import position
from ..method import Method, Replacement, SelectionWork
from .rows import Operands, RowBuilder, is_softmax, operands

# As the paper guards the linear branch's sum.
LEAST = 1e-5


@dataclass(frozen=True)
class CriticalTiles:
    """Makes the table b1[batch…, 2 · ⌈P / rows⌉, ⌈M / keys⌉]: rows of tiles that are critical, and below them those that are
    marginal. `query` and `key` are loads of inputs whose indices are ranks, or ranks divided by a group's size."""

    query: Expr
    key: Expr
    ranks: tuple[str, ...]
    over: str
    rows: int
    keys: int
    critical: float
    negligible: float

    @property
    def reads(self) -> tuple[str, ...]:
        return str(self.query.attr), str(self.key.attr)

    @property
    def own_tile(self) -> bool:
        """A row's best tile may be any."""
        return False

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        q = _pooled(torch, tensors[self.reads[0]], self.query, (*self.ranks[:-1], self.over), self.rows)
        k = _pooled(torch, tensors[self.reads[1]], self.key, (*self.ranks[:-2], self.ranks[-1], self.over), self.keys)
        # a softmax keeps the order of a row, so that its scores alone rank its tiles
        scores = q @ k.transpose(-2, -1)
        n = scores.shape[-1]
        place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        most = max(1, int(self.critical * n))
        critical = place < most
        marginal = (place >= most) & (place < n - min(n - most, int(self.negligible * n)))
        return torch.cat([critical, marginal], -2)

    @property
    def keyed(self) -> bool:
        return False  # run-time data may mask all of a row's critical tiles

    def share(self, table: Any, sizes: Mapping[str, int]) -> float:
        return float(table.float().mean()) * 2  # critical tiles stand before the marginal ones

    def work(self, sizes: Mapping[str, int]) -> SelectionWork:
        batch = 1
        for r in self.ranks[:-2]:
            batch *= sizes[r.upper()]
        p, m, e = (sizes[r.upper()] for r in (*self.ranks[-2:], self.over))
        tiles = batch * -(-p // self.rows) * -(-m // self.keys)
        return SelectionWork(2.0 * tiles * e, 4.0 * batch * (p + m) * e, 0.0, float(tiles), 6)


def _pooled(torch: ModuleType, x: Any, at: Expr, ranks: tuple[str, ...], side: int) -> Any:
    """The tensor over these ranks, the last but one in means of `side`; the last block's mean is over what it has."""
    for d, i in enumerate(at.args):
        if i.op == "floordiv":
            x = x.repeat_interleave(int(i.args[1].value), d)
    names = [str((i.args[0] if i.op == "floordiv" else i).attr) for i in at.args]
    x = x.permute([names.index(r) for r in ranks]).float()
    n = x.shape[-2]
    whole = torch.nn.functional.pad(x, (0, 0, 0, -n % side)).unflatten(-2, (-1, side)).sum(-2)
    count = torch.full((whole.shape[-2],), side)
    count[-1] = n - side * (len(count) - 1)
    return whole / count[:, None]


@dataclass(frozen=True)
class SparseLinear(Method):
    """Tiles of `rows` × `keys` sorted by pooled scores: the share `critical` exact, `negligible` left out, others linear.

    The replacement has an input PROJ [value, value] of its own, read from `projection` (safetensors). Without one it would
    be 0, and the method nothing but its critical tiles.
    """

    name: ClassVar[str] = "sparse-linear"
    source: ClassVar[str] = "Zhang et al., SLA (2509.24006), section 3.2"
    needs: ClassVar[tuple[str, ...]] = ("an attention without a causal mask", "a projection fitted to the attention")

    projection: str = ""
    critical: float = 0.05
    negligible: float = 0.1
    rows: int = 64
    keys: int = 64

    def __post_init__(self) -> None:
        if not (self.critical > 0 and self.negligible >= 0 and self.critical + self.negligible <= 1):
            shares = f"{self.critical} and {self.negligible}"
            raise ValueError(f"SparseLinear needs critical > 0, negligible ≥ 0 and at most 1 together, not {shares}")

    def replace(self, a: Attention) -> Replacement | Refusal:
        if not self.projection:
            return self.refuse("it needs a projection fitted to the attention: give its file as projection")
        if position(a) is not None:
            return self.refuse("its tiles are chosen from means of tiles, which under a causal mask hold later tokens")
        if not is_softmax(a):
            return self.refuse("its rows are no softmax of their scores")
        found = operands(a)
        if isinstance(found, str):
            return self.refuse(found)
        if not (_plain(found.query) and _plain(found.key) and len(found.over) == 1):
            return self.refuse("its queries and keys are computed on the way, and nothing pools them before")
        cascade, table = self._cascade(a, found)
        ranks = (*a.batch, a.query, a.key)
        program = CriticalTiles(
            found.query, found.key, ranks, found.over[0], self.rows, self.keys, self.critical, self.negligible
        )
        return Replacement(cascade, table, program, masks=False)

    def _cascade(self, a: Attention, given: Operands) -> tuple[Cascade, str]:
        rows, c = RowBuilder(a), a.cascade
        sides = ((a.query, self.rows), (a.key, self.keys))
        tiles = [term_size((size_term(c.rank[r].size) + (side - 1)) // side) for r, side in sides]
        name = rows.fresh("TILES")
        sizes = [c.rank[r].size for r in a.batch]
        rows.tensors[name] = Tensor(name, (*sizes, 2 * tiles[0], tiles[1]), "b1")
        batch = tuple(ex.index(r) for r in a.batch)
        at = ex.index(a.query) // self.rows, ex.index(a.key) // self.keys
        critical = ex.load(name, (*batch, *at), "b1")
        marginal = ex.load(name, (*batch, size_term(tiles[0]) + at[0], at[1]), "b1")
        # the sparse half: the model's own score where a tile is critical
        score = ex.where(critical, a.score, float("-inf"))
        top = rows.put("CM", rows.row, score, "max", (a.key,))
        sparse = rows.mean(ex.exp(score - top), "C")
        (e,) = given.over
        q = rows.softmax(given.query, (*a.batch, a.query, e), e, "FQ")
        k = rows.softmax(given.key, (*a.batch, a.key, e), e, "FK")
        product = rows.put("FS", (*rows.row, a.key), q * k, "add", (e,))
        linear = rows.mean(ex.where(given.keep & marginal, product, 0.0), "M", LEAST)
        g = rows.rank("g", c.rank[a.value].size)
        held = rows.put("OL", (*rows.row, a.value), linear)
        turned = ex.substitute(held, {ex.index(a.value): ex.index(g)})
        proj = rows.input("PROJ", (g, a.value), "f32")
        out = sparse + rows.put("OP", (*rows.row, a.value), turned * proj, "add", (g,))
        return rows.cascade(out, str(self)), name


def _plain(x: Expr) -> bool:
    """A load whose indices are ranks, or ranks by a constant."""
    if x.op != "load":
        return False
    return all(
        i.op == "index" or (i.op == "floordiv" and i.args[0].op == "index" and i.args[1].is_const) for i in x.args
    )

