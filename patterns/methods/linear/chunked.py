"""Linear rows beside a window, chunk by chunk: a state of the far keys' features, and the keys near by pair by pair.

    S(x) = Σ_{m < x} φ(k_m) v_mᵀ     z(x) = Σ_{m < x} φ(k_m)          x: the first key that is in some row's window
    N[p] = exp(gain) φ(q_p) S(x) + Σ_{m ≥ x} w(p, m) v_m               D[p] likewise,  O = N / D

Linear in the tokens; the cascade's quadratic form is its meaning, which it is held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ... import expr as ex
from ...attention.attention import Attention
from ...cascade import Size, bind
from ..method import SelectionWork
from ..selecting import steps as st
from ..selecting.program import Laid, TableProgram, bound, laid, laid_out

# Rows that are done at once.
CHUNK = 128


@dataclass(frozen=True)
class ChunkedRows:
    """Computes the output of a Hedgehog attention with a window; `maps` names its own inputs, `ranks` are its output's."""

    of: TableProgram
    values: Laid
    width: Size
    maps: tuple[str, str, str]
    features: int
    window: int
    ranks: tuple[str, ...]
    order: tuple[str, ...]

    @staticmethod
    def make(a: Attention, maps: tuple[str, str, str], features: int, window: int) -> ChunkedRows | str:
        """That of an attention, or why it cannot go chunk by chunk."""
        program = bound(a, st.Everything(st.Products(st.Queries(), st.Keys())))
        if isinstance(program, str):
            return program
        plain = program.own is not None and program.keep == (ex.index(a.key) <= program.own)
        v = a.values.args[0] if a.values.op == "cast" else a.values
        found = laid(v, a, a.key, a.value) if v.op == "load" else None
        if not plain or found is None or found.group != program.k.group:
            return "its mask is more than causal, or its values are computed on the way"
        (output,) = a.cascade.outputs
        (last,) = a.cascade.producers[output]
        ranks = tuple(str(i.attr) for i in last.out.index)
        head = (a.batch[-1],) if a.batch else ()
        return ChunkedRows(
            program, found, a.cascade.rank[a.value].size, maps, features, window, ranks,
            (*(r for r in a.batch if r not in head), *head, a.query, a.value),
        )

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        """The output, over the ranks that the cascade stores it in."""
        p = self.of
        q, k, v = (laid_out(tensors[x.tensor], x).float() for x in (p.q, p.k, self.values))
        kind = tensors[p.q.tensor].dtype
        k, v = (x.repeat_interleave(p.k.group, -3) for x in (k, v))
        wq, wk, gain = (tensors[n] for n in self.maps)
        fq, fk = _features(torch, q, wq) * gain.exp()[:, None, None], _features(torch, k, wk)
        behind = k.shape[-2] - q.shape[-2]
        x, state, total = 0, 0.0, 0.0
        out = []
        for r in range(0, q.shape[-2], CHUNK):
            rows = slice(r, min(r + CHUNK, q.shape[-2]))
            first, end = max(0, r + behind - self.window + 1), rows.stop + behind
            state = state + fk[..., x:first, :].mT @ v[..., x:first, :]
            total = total + fk[..., x:first, :].sum(-2)[..., None]
            x = first
            gap = torch.arange(r + behind, end, device=q.device)[:, None] - torch.arange(x, end, device=q.device)
            near, later = (gap < self.window) & (gap >= 0), gap < 0
            s = (q[..., rows, :] @ k[..., x:end, :].mT * p.scale).masked_fill(~near, -torch.inf)
            far = (fq[..., rows, :] @ fk[..., x:end, :].mT).masked_fill(later, 0.0)
            w = torch.where(near, (s - s.amax(-1, keepdim=True)).exp(), far)
            above = w @ v[..., x:end, :] + fq[..., rows, :] @ state
            out.append(above / (w.sum(-1, keepdim=True) + fq[..., rows, :] @ total))
        made = torch.cat(out, -2)
        made = made if len(self.order) == made.dim() else made.squeeze(len(self.order) - 3)
        return made.permute([self.order.index(n) for n in self.ranks]).to(kind).contiguous()

    def work(self, sizes: Mapping[str, int]) -> SelectionWork:
        batch, heads, queries, keys, depth = self.of.extents(sizes)
        width, many = int(bind(self.width, sizes)), 2 * self.features
        near = queries * (CHUNK + self.window)
        flops = 2.0 * ((queries + keys) * depth * many / 2 + (queries + keys) * many * width + near * (depth + many + width))
        exps, chunks = (queries + keys) * many + near, -(-queries // CHUNK)
        moved = 4.0 * (6 * (queries + keys) * (many + depth + width) + 10 * near)
        n = batch * heads
        return SelectionWork(n * flops, n * moved, float(n * exps), kernels=20 + 22 * chunks)


def _features(torch: ModuleType, x: Any, w: Any) -> Any:
    at = x @ w
    return torch.cat([at.softmax(-1), (-at).softmax(-1)], -1)
