"""The compensation token: the mean of the keys that a row drops, and of their values, from running sums over the tokens.

    S[x] = Σ_{m < x} K[m]      k̂(p) = (S[X(p) − W + 1] − S[sink]) / N_d(p)      one sum over the tokens, two reads a row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ... import expr as ex
from ...attention.attention import Attention
from ...cascade import Size, bind
from ...expr import Expr
from ..method import SelectionWork
from ..selecting import steps as st
from ..selecting.program import Laid, TableProgram, bound, laid, laid_out


@dataclass(frozen=True)
class CompensationToken:
    """Makes the score of the token, −∞ where nothing is dropped, and its value: f32 over the rows, and over the rows and the
    width. `full` heads of keys drop nothing; sums are in float64.
    """

    names: tuple[str, str]
    of_keys: TableProgram
    values: Laid
    width: Size
    sink: int
    window: Expr
    full: tuple[int, ...]

    @staticmethod
    def of(
        a: Attention, names: tuple[str, str], sink: int, window: Expr, full: tuple[int, ...]
    ) -> CompensationToken | str:
        """That of an attention, or why its keys cannot be summed."""
        made = bound(a, st.Everything(st.Products(st.Queries(), st.Keys())))
        if isinstance(made, str):
            return made
        if made.own is None:
            return "its queries and keys are two sets: no key is at the place of a query"
        v = a.values.args[0] if a.values.op == "cast" else a.values
        if v.op != "load" or str(v.attr) not in {t.name for t in a.cascade.inputs}:
            return "its values are computed on the way"
        values = laid(v, a, a.key, a.value)
        if values is None or values.group != made.k.group:
            return "its values do not lie as its keys do"
        return CompensationToken(names, made, values, a.cascade.rank[a.value].size, sink, window, full)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.of_keys.reads, self.values.tensor)))

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Mapping[str, Any]:
        """Both tensors, in the order of the attention's batch ranks."""
        p = self.of_keys
        q, k, v = (laid_out(tensors[x.tensor], x) for x in (p.q, p.k, self.values))
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
        q, k, v = (x.expand(*lead, *x.shape[-3:]) for x in (q, k, v))
        cells = p.cells(q.shape[-2], k.shape[-2], sizes)
        places = cells.own_cells(1, 1)
        assert places is not None
        own = torch.from_numpy(places[0]).to(q.device)
        known = {ex.symbol(n): ex.const(x) for n, x in sizes.items()}
        window = ex.substitute(self.window, known)
        assert window.is_const, window
        end = (own - int(window.value) + 1).clamp(min=self.sink)
        count = (end - self.sink).double()
        k_mean, v_mean = (_between(torch, x, self.sink, end) / count.clamp(min=1.0)[:, None] for x in (k, v))
        full = torch.zeros(k.shape[-3], 1, dtype=torch.bool, device=q.device)
        full[list(self.full)] = True
        k_mean, v_mean, full = (x.repeat_interleave(p.k.group, -3 if x.dim() > 2 else 0) for x in (k_mean, v_mean, full))
        score = (q.double() * k_mean).sum(-1) * p.scale + count.log()
        score = score.masked_fill(full | (count == 0), -torch.inf)
        head = () if len(p.back) == len(lead) + 3 else (len(lead),)
        rows, last = len(p.back) - 2, len(p.back) - 1
        score, v_mean = (x.squeeze(head) for x in (score, v_mean.masked_fill(full[..., None], 0.0)))
        return {
            self.names[0]: score.permute(*p.back[:-2], rows).float().contiguous(),
            self.names[1]: v_mean.permute(*p.back[:-2], rows, last).float().contiguous(),
        }

    def work(self, sizes: Mapping[str, int]) -> SelectionWork:
        batch, heads, queries, keys, depth = self.of_keys.extents(sizes)
        width = int(bind(self.width, sizes))
        read = batch * keys * (depth + width) * -(-heads // self.of_keys.k.group)
        rows = batch * heads * queries * (2 * depth + 2 * width)
        return SelectionWork(2.0 * batch * heads * queries * depth, 4.0 * read + 24.0 * read + 8.0 * rows, kernels=16)


def _between(torch: ModuleType, x: Any, first: int, end: Any) -> Any:
    """Σ of tokens from `first` up to each `end`, [..., rows, e] in float64."""
    sums = torch.nn.functional.pad(x.double().cumsum(-2), (0, 0, 1, 0))
    first = min(first, x.shape[-2])
    return sums.index_select(-2, end.clamp(max=x.shape[-2])) - sums[..., first : first + 1, :]
