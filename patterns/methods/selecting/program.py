"""A selection bound to an attention: which inputs are its queries and keys, what its mask keeps, its scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import expr as ex
from ...attention.attention import Attention
from ...cascade import Size, bind
from ...expr import Expr
from ...masks.split import split
from ...terms.constant import number
from ...verdict import Refusal
from ..masked import block_table, masked, position
from ..method import Method, Replacement, SelectionWork, head_rank
from . import steps as st
from .ahead import ahead
from .cells import Cells
from .execute import Execution
from .work import SelectionSizes, count

# Rows and keys of the smallest tile that a kernel visits or leaves out.
TILE = 32


@dataclass(frozen=True)
class Laid:
    """An operand as an input lies: `order` brings it to [lead…, head, token, element]; a dimension that it has not is None.

    `group`: how many heads share one of this operand's; `fixed`: dimensions that are read at one place.
    """

    tensor: str
    fixed: tuple[tuple[int, int], ...]
    order: tuple[int | None, ...]
    group: int

    @property
    def token(self) -> int:
        """The input's dimension of tokens."""
        at, fixed = self.order[-2], {d for d, _ in self.fixed}
        assert at is not None
        return [d for d in range(len(fixed) + len(self.order)) if d not in fixed][at]


@dataclass(frozen=True)
class TableProgram:
    """Makes the table of `step` from the inputs of one attention. `keep`, `own`: as in `Cells`, over its ranks and sizes."""

    step: st.CellTable
    q: Laid
    k: Laid
    keep: Expr
    own: Expr | None
    query: str
    key: str
    scale: float
    sizes: tuple[Size, ...]
    back: tuple[int, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.q.tensor, self.k.tensor)))

    @property
    def keyed(self) -> bool:
        return True  # `Execution.table` gives such a row its cells back

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        """The table, b1 in the shape that the cascade declares."""
        q, k = (laid_out(tensors[x.tensor], x) for x in (self.q, self.k))
        lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3])
        q, k = (x.expand(*lead, *x.shape[-3:]).flatten(0, -4) if lead else x[None] for x in (q, k))
        made = Execution(torch, q, k, self.cells(q.shape[2], k.shape[2], sizes), self.scale).table(self.step)
        ranks = made.shape[1:] if len(self.back) == len(lead) + 3 else made.shape[2:]
        return made.reshape(*lead, *ranks).permute(self.back).contiguous()

    def work(self, sizes: Mapping[str, int]) -> SelectionWork:
        batch, heads, queries, keys, depth = self.extents(sizes)
        shape = SelectionSizes(batch, heads, -(-heads // self.k.group), depth)
        return count(self.step, self.cells(queries, keys, sizes), shape)

    def extents(self, sizes: Mapping[str, int]) -> tuple[int, int, int, int, int]:
        """Batch, heads, queries, keys and the length of a head."""
        b, h, p, m, e = (_number(n, sizes) for n in self.sizes)
        return b, h, p, m, e

    def share(self, table: Any, sizes: Mapping[str, int]) -> float:
        """The share of the cells with a pair that the model keeps which the table keeps, cells of `TILE` at least: a kernel
        visits a tile where one of its rows asks for it."""
        _, _, queries, keys, _ = self.extents(sizes)
        s = self.step
        rows, columns = (max(1, TILE // n) if n else 1 for n in (s.rows, s.keys))
        kept = joined(table, rows, columns)
        some = self.cells(queries, keys, sizes).some(s.rows * rows, s.keys * columns, s.last)
        return float(kept.sum()) / max(float(some.mean()) * kept.size, 1.0)

    def cells(self, queries: int, keys: int, sizes: Mapping[str, int]) -> Cells:
        """The cells at sizes."""
        known = {ex.symbol(n): ex.const(v) for n, v in sizes.items()}
        own = None if self.own is None else ex.substitute(self.own, known)
        return Cells(queries, keys, ex.substitute(self.keep, known), own, self.query, self.key)


@dataclass(frozen=True)
class SelectedMethod(Method):
    """A method that chooses cells by queries and keys: its law is `selection`, everything else follows."""

    @abstractmethod
    def selection(self, a: Attention) -> st.CellTable | Refusal:
        """The program, whose cells are those of the table."""

    def expected(self, a: Attention) -> float | None:
        """The share of cells that is expected to be kept, of those in which the model keeps a pair; None where unknown."""
        return None

    def replace(self, a: Attention) -> Replacement | Refusal:
        step = self.selection(a)
        if isinstance(step, Refusal):
            return step
        table, keep = block_table(a, step.rows, step.keys)
        program = bound(a, step)
        if isinstance(program, str):
            return self.refuse(program)
        made = masked(a, keep, str(self), (table,))
        if isinstance(made, Refusal):
            return made
        # where a row sees everything anyway, nothing is ahead of it
        later = ahead(step) if position(a) is not None and a.cascade.rank[a.query].size != 1 else ""
        return Replacement(made, table.name, program, self.expected(a), ahead=later)


def bound(a: Attention, step: st.CellTable) -> TableProgram | str:
    """The program of an attention, or why its selection would be another one than the step says (R1)."""
    mask, c = split(a.score, a.key), a.cascade
    if ex.loads(mask.keep):
        return "its mask is read from run-time data, which the selection does not look at"
    if not mask.keep.ranks <= {a.query, a.key}:
        return "its mask differs from head to head, or from sequence to sequence"
    if len(a.products) != 1 or len(a.products[0].over) != 1:
        return "its score is no single product over one rank"
    (product,) = a.products
    scale = _scale(mask.full, product.out.tensor)
    if scale is None:
        return "its score is more than a multiple of the product of queries and keys"
    found = _operands(a)
    if isinstance(found, str):
        return found
    q, k, factor = found
    own = position(a)
    if own is not None and ex.loads(own):
        return "the places of its rows are read from run-time data"
    sizes = {r: c.rank[r].size for r in (a.query, a.key)}
    if own is None and sizes[a.query] == sizes[a.key]:
        own = ex.index(a.query)
    if own is None and any(isinstance(s, st.Forced | st.Raised | st.Offsets) for s in st.walk(step)):
        return "its queries and keys are two sets: no key is at the place of a query"
    lead, head = batch_ranks(a)
    order = (*lead, *((head,) if head else ()))
    back = (*(order.index(r) for r in a.batch), len(order), len(order) + 1)
    batch: Size = 1
    for r in lead:
        batch = batch * c.rank[r].size
    size = tuple(c.rank[r].size if r else 1 for r in (head, a.query, a.key, product.over[0]))
    return TableProgram(step, q, k, mask.keep, own, a.query, a.key, scale * factor, (batch, *size), back)


def joined(table: Any, rows: int, columns: int) -> NDArray[np.bool_]:
    """A table [..., i, j] of coarser cells: so many rows and columns in one, which is kept where one of them is."""
    out: NDArray[np.bool_] = table.cpu().numpy()
    for axis, many in ((-2, rows), (-1, columns)):
        out = np.logical_or.reduceat(out, np.arange(0, out.shape[axis], many), axis=axis)
    return out


def batch_ranks(a: Attention) -> tuple[tuple[str, ...], str | None]:
    """The batch ranks that are none of heads, and the heads."""
    head = head_rank(a) or (a.batch[-1] if a.batch else None)
    return tuple(r for r in a.batch if r != head), head


def _scale(full: Expr, product: str) -> float | None:
    """s of score = s · product; None where the score is anything else."""
    rest = [x for x in ex.loads(full) if str(x.attr) != product]
    if rest or any(e.op in ("index", "symbol") for x in ex.walk(full) if x.op != "load" for e in x.args):
        return None
    tried = np.array([0.0, 1.0, -2.5, 7.0, 300.0])
    table = dict.fromkeys(ex.loads(full), tried)
    found = np.asarray(number(full, {}, table), np.float64)
    scale = float(found[1])
    return scale if found.shape == tried.shape and np.allclose(found, scale * tried, rtol=1e-12, atol=0.0) else None


def _operands(a: Attention) -> tuple[Laid, Laid, float] | str:
    """Queries and keys as inputs lie, and what else multiplies their product."""
    (product,) = a.products
    inputs, factor, loads = {t.name for t in a.cascade.inputs}, 1.0, []
    stack = [product.body]
    while stack:
        e = stack.pop()
        if e.op == "cast" and e.is_float:
            stack.append(e.args[0])
        elif e.op == "mul":
            stack.extend(e.args)
        elif e.is_const:
            factor *= float(e.value)
        elif e.op == "load" and str(e.attr) in inputs:
            loads.append(e)
        else:
            return "its queries or keys are computed on the way to their product"
    near = [x for x in loads if a.query in x.ranks]
    far = [x for x in loads if a.key in x.ranks]
    if len(near) != 1 or len(far) != 1 or len(loads) != 2 or near == far:
        return "its product is not of one tensor of queries and one of keys"
    (over,) = product.over
    q, k = laid(near[0], a, a.query, over), laid(far[0], a, a.key, over)
    if q is None or k is None or q.group != 1:
        return "its queries or keys do not lie as tokens of heads"
    return q, k, factor


def laid(e: Expr, a: Attention, token: str, over: str) -> Laid | None:
    """An operand over tokens and elements (`over`) as its input lies; None where it does not lie so."""
    lead, head = batch_ranks(a)
    place: dict[str, int] = {}
    group, fixed = 1, []
    for d, i in enumerate(e.args):
        if i.is_const:
            fixed.append((d, int(i.value)))
            continue
        if i.op == "floordiv" and i.args[0] is ex.index(head or "") and i.args[1].is_const:
            place[head or ""], group = d, int(i.args[1].value)
        elif i.op == "index" and str(i.attr) not in place:
            place[str(i.attr)] = d
        else:
            return None
    wanted = (*lead, head or "", token, over)
    if not set(place) <= set(wanted) or token not in place or over not in place:
        return None
    # dimensions as they are numbered once the fixed ones are gone
    left = {d: d - sum(f < d for f, _ in fixed) for d in place.values()}
    order: tuple[int | None, ...] = tuple(left[place[r]] if r in place else None for r in wanted)
    return Laid(str(e.attr), tuple(fixed), order, group)


def laid_out(t: Any, x: Laid) -> Any:
    """[lead…, head, token, element], of one row in the place of a dimension that it has not."""
    for at, place in reversed(x.fixed):
        t = t.select(at, place)
    t = t.permute([d for d in x.order if d is not None])
    for i, dim in enumerate(x.order):
        if dim is None:
            t = t.unsqueeze(i)
    return t


def _number(n: Size, sizes: Mapping[str, int]) -> int:
    found = bind(n, sizes)
    if not isinstance(found, int):
        raise ValueError(f"the size {n} has no value")
    return found
