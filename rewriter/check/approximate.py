"""The watch over a site whose kernel computes a method: it is held against the method's own cascade, as the oracle has it.

How far the method is from the model was measured before it was installed, and is audited (`audit`); here is asked whether
the kernel computes the method. Some rows are evaluated, in float64 and in the cascade's own types.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ...patterns.attention.attention import Attention
from ...patterns.cascade import Cascade, bind
from ...patterns.evaluate import evaluate
from ...patterns.methods.rows import ROWS, some_rows
from ..capture.autocast import no_autocast
from ..graph.torch_private import tree_leaves
from .audit import Audit
from .compare import errors
from .verdicts import Check
from .watch import SEED, SiteWatch

# Scores that are evaluated at most, over all heads: rows are left out where there are more.
SCORES = 1 << 19
# Rows that are evaluated at least.
LEAST = 4


@dataclass(frozen=True)
class Slot:
    """Where a call has a tensor of the cascade among its arguments, or a size."""

    name: str
    is_size: bool = False


@dataclass
class MethodWatch(SiteWatch):
    """Holds a kernel against the cascade of its method, whose attention is `view`.

    `layout`: a call's arguments with slots in the place of tensors and sizes; `tensors(given, sizes)` adds what the method
    makes of them beforehand. `audit` looks at what rows keep, in some later calls.
    """

    view: Attention = field(kw_only=True)
    tensors: Callable[[Mapping[str, Tensor], Mapping[str, int]], Mapping[str, Tensor]] = field(kw_only=True)
    layout: tuple[Any, ...] = field(kw_only=True)
    audit: Audit | None = field(kw_only=True, default=None)

    def __call__(
        self, code: fx.GraphModule, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], out: Any
    ) -> str:
        why = super().__call__(code, target, arguments, given, out)
        if why or self.audit is None or not self.audit.due(self.calls):
            return why
        start = time.perf_counter()
        try:
            with torch.no_grad(), no_autocast(), self.lock:
                tensors, sizes = self._bound(arguments)
                whole = {**sizes, **_sizes(self.view.cascade, tensors, sizes)}
                why = self.audit.look(self.calls, self.tensors(tensors, whole), whole)
        except Exception as error:
            # what cannot be audited is not run: the model's own code is right
            why = f"it cannot be audited: {type(error).__name__}: {' '.join(str(error).split())}"
            self._note(Check(self.site, self.kernel, "unchecked", seconds=time.perf_counter() - start, why=why))
            return why
        if why:
            # nothing is wrong with the kernel: the inputs are others than those that were measured
            self.advice, self.refuse = "calibrate on data that is like these inputs", None
            took = time.perf_counter() - start
            self._note(Check(self.site, self.kernel, "differs", f"audit of {self.audit.looked} rows", seconds=took, why=why))
        return why

    @cached_property
    def some(self) -> Cascade:
        """The cascade for some of its rows."""
        return some_rows(self.view)

    def _compared(
        self, code: fx.GraphModule, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], out: Tensor
    ) -> Check:
        with torch.no_grad(), no_autocast():
            tensors, sizes = self._bound(arguments)
            c = self.view.cascade
            whole = {**sizes, **_sizes(c, tensors, sizes)}
            at = row_sample(self.view, whole, torch.Generator().manual_seed(SEED + self.calls), SCORES)
            all_of_them = {**self.tensors(tensors, whole), ROWS: at.to(out.device)}
            exact, own = (evaluate(self.some, all_of_them, whole, widen=w)[c.outputs[0]] for w in (True, False))
            shape = [bind(c.rank[str(i.attr)].size, whole) for i in c.producers[c.outputs[0]][-1].out.index]
            dim = [str(i.attr) for i in c.producers[c.outputs[0]][-1].out.index].index(self.view.query)
            shown = out.detach().reshape([int(n) for n in shape]).index_select(dim, at.to(out.device))
            e = errors(shown.to(own.dtype), own, exact)
        why = "" if e.within() else f"{self.kernel}: its kernel is {e}, against the method's own cascade"
        how = f"the method's cascade, {len(at)} rows"
        return Check(self.site, self.kernel, "differs" if why else "same", how, e.rms, e.own_rms, why=why)

    def _bound(self, arguments: Sequence[Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
        slots, values = tree_leaves(self.layout), tree_leaves(tuple(arguments))
        pairs = [(s, v) for s, v in zip(slots, values, strict=True) if isinstance(s, Slot)]
        return {s.name: v for s, v in pairs if not s.is_size}, {s.name: int(v) for s, v in pairs if s.is_size}

    def _key(self, code: fx.GraphModule, arguments: Sequence[Any], given: Sequence[Any], kind: str) -> str:
        return ""


def _sizes(c: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, int]:
    known = dict(sizes)
    for t in c.inputs:
        for size, n in zip(t.shape, tensors[t.name].shape if t.name in tensors else ()):
            if not isinstance(size, int) and size.is_Symbol:
                known.setdefault(str(size), int(n))
    return known


def row_sample(view: Attention, sizes: Mapping[str, int], generator: torch.Generator, scores: int) -> Tensor:
    """Rows to look at, in order: all where there are few scores, else the first, the last and some at random."""
    extent = {r.name: int(bind(r.size, sizes)) for r in view.cascade.ranks}
    rows, each = extent[view.query], extent[view.key]
    for r in view.batch:
        each *= extent[r]
    many = max(LEAST, scores // max(each, 1))
    if many >= rows:
        return torch.arange(rows)
    drawn = torch.randperm(rows - 2, generator=generator)[: many - 2] + 1
    return torch.cat([torch.tensor([0, rows - 1]), drawn]).sort().values
