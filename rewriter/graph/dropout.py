"""Dropout whose numbers are counted, not drawn: what a kernel of ours can draw again, forward and backward.

    before   y = dropout(p, 0.1, True)
    after    s = seed(x); d = draws(s, p); y = p · f32(d ≥ 0.1·2³¹)/0.9

`seed` is two numbers from torch's generator, new at every call; `draws` a number for each element, made of the seed, of its
row and of its column alone. SDPA with dropout is spelled as its products, its softmax and this. The rate is the model's, the
elements that are dropped are others than those that torch would drop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ...patterns.operators import OPERATORS
from .functional import call
from .node import arguments, op_name, written_arguments

# In the metadata of numbers that are counted, and of what stands in the place of the model's own operator.
COUNTED, SPELLED = "reattend_counted", "reattend_spelled"
RANGE = 2**31
_ATEN = torch.ops.aten

library = torch.library.Library("reattend", "FRAGMENT")  # type: ignore[no-untyped-call]
library.define("seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))  # type: ignore[no-untyped-call]
library.define("draws(Tensor seed, Tensor like) -> Tensor")  # type: ignore[no-untyped-call]


def _seed(like: Tensor) -> Tensor:
    return torch.randint(0, RANGE, (2,), device=like.device)


def draws_at(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Numbers from 0 to 2³¹ − 1 by row and column (broadcast): two keys a row, and a counter under both."""
    draw = OPERATORS["draw"].in_torch(torch)
    out: Tensor = draw(draw(seed[1], rows), draw(draw(seed[0], rows), columns))
    return out


def _draws(seed: Tensor, like: Tensor) -> Tensor:
    *before, width = like.shape
    rows = torch.arange(math.prod(before), device=like.device).view(*before, 1)
    return draws_at(seed, rows, torch.arange(width, device=like.device))


for _name, _made in (("seed", _seed), ("draws", _draws)):
    library.impl(_name, _made, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("reattend::seed", lib=library)  # type: ignore[untyped-decorator]
def _(like: Tensor) -> Tensor:
    return like.new_empty((2,), dtype=torch.int64)


@torch.library.register_fake("reattend::draws", lib=library)  # type: ignore[untyped-decorator]
def _(seed: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=torch.int64, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class AsWritten:
    """The model's own operator, where a counted dropout stands for it."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def over(self, table: Mapping[fx.Node, fx.Node]) -> AsWritten | None:
        """The same in a copy of the graph; None where the copy has not all that it reads."""
        try:
            args: tuple[Any, ...] = fx.map_arg(self.args, table.__getitem__)
            return AsWritten(self.target, args, fx.map_arg(dict(self.kwargs), table.__getitem__))
        except KeyError:
            return None


def counted(gm: fx.GraphModule) -> fx.GraphModule | None:
    """A copy of a graph whose live dropout is counted; None where there is none that can be."""
    out = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    found = False
    for n in gm.graph.nodes:
        table[n] = out.node_copy(n, table.__getitem__)
        rate, spell = _live(n)
        if spell is None:
            continue
        own = table[n]
        before = own.prev
        made = spell(_Spelling(out, own, rate))
        if made is None:
            # it stays as it is, and nothing of the attempt draws a number
            while own.prev is not before:
                out.erase_node(own.prev)
            continue
        made.meta[SPELLED] = AsWritten(own.target, own.args, dict(own.kwargs))
        out.erase_node(own)
        table[n], found = made, True
    return fx.GraphModule(gm, out) if found else None


def carry(n: fx.Node, copy: fx.Node, table: Mapping[fx.Node, fx.Node]) -> None:
    """Let a copied node know the model's own operator as well."""
    own = n.meta.get(SPELLED)
    copy.meta = {k: v for k, v in copy.meta.items() if k != SPELLED}
    if own is not None and (there := own.over(table)) is not None:
        copy.meta[SPELLED] = there


def as_written(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph with the model's own operators in the place of counted dropout; the graph itself where there is none."""
    if not any(SPELLED in n.meta for n in gm.graph.nodes):
        return gm
    graph, table = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in gm.graph.nodes:
        table[n] = graph.node_copy(n, table.__getitem__)
        carry(n, table[n], table)
    restore_uncounted(graph, {})
    graph.eliminate_dead_code()
    return fx.GraphModule(gm, graph, "Original")


def restore_uncounted(graph: fx.Graph, replaced: Mapping[fx.Node, fx.Node]) -> None:
    """Where no kernel took a counted dropout in, the model's own operator stands again.

    `replaced`: what stands in the place of nodes by now.
    """
    now = dict(replaced)
    for n in list(graph.nodes):
        own = n.meta.pop(SPELLED, None)
        if own is None or not n.users or not _is_drawn(n):
            continue
        given = own.over(_Newest(now))
        assert given is not None
        with graph.inserting_before(n):
            again = graph.call_function(given.target, given.args, dict(given.kwargs))
        again.meta = {k: v for k, v in n.meta.items() if k not in (COUNTED, SPELLED)}
        n.replace_all_uses_with(again)
        now[n] = again
    for n in reversed(graph.nodes):
        if n.op == "call_function" and n.meta.get(COUNTED) and not n.users:
            graph.erase_node(n)


class _Newest(dict[fx.Node, fx.Node]):
    """What stands in the place of a node by now: itself, where nothing else does."""

    def __missing__(self, n: fx.Node) -> fx.Node:
        return n


def _is_drawn(n: fx.Node) -> bool:
    """Do numbers that are counted stand behind a node, or has a kernel taken them in?"""
    if op_name(n) == "reattend::draws":
        return True
    return bool(n.meta.get(COUNTED)) and any(_is_drawn(x) for x in n.all_input_nodes)


_Spell = Callable[["_Spelling"], fx.Node | None]


def _live(n: fx.Node) -> tuple[float, _Spell | None]:
    """The rate of a dropout that is switched on, and how it is spelled."""
    spell = {"dropout": _Spelling.dropout, "scaled_dot_product_attention": _Spelling.sdpa}.get(op_name(n))
    if spell is None or written_arguments(n) or not _wide(n):
        return 0.0, None
    given = arguments(n)
    rate = given["p"] if "p" in given else given["dropout_p"]
    # one that the call brings is no number yet
    known = isinstance(rate, (int, float)) and 0.0 < rate < 1.0 and given.get("train", True) is True
    return (float(cast("float", rate)), spell) if known else (0.0, None)


def _wide(n: fx.Node) -> bool:
    """Can an attention's weights be what is dropped?"""
    value = n.meta.get("val")
    return isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point()


class _Refused(Exception):
    """A node of the spelling has no derivative that is known."""


class _Spelling:
    """One operator with dropout, spelled in the graph in front of it."""

    def __init__(self, graph: fx.Graph, node: fx.Node, rate: float) -> None:
        self.graph, self.node, self.rate = graph, node, rate

    def put(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = call(self.graph, self.node, target, *args, **kwargs)
        if made is None:
            raise _Refused
        made.meta[COUNTED] = True
        return made

    def dropout(self) -> fx.Node | None:
        with self.graph.inserting_before(self.node):
            try:
                return self.dropped(cast("fx.Node", arguments(self.node)["input"]))
            except _Refused:
                return None

    def dropped(self, x: fx.Node) -> fx.Node:
        seed = self.put(torch.ops.reattend.seed.default, self.given(x))
        draws = self.put(torch.ops.reattend.draws.default, seed, x)
        keep = self.put(_ATEN.ge.Scalar, draws, round(self.rate * RANGE))
        own = x.meta["val"].dtype
        # in float32, so that 16 bits do not round the factor; and NaN stays NaN, as in torch's own
        kept = self.put(_ATEN.to.dtype, keep, torch.float64 if own == torch.float64 else torch.float32)
        out = self.put(_ATEN.mul.Tensor, x, self.put(_ATEN.mul.Tensor, kept, 1.0 / (1.0 - self.rate)))
        return out if out.meta["val"].dtype == own else self.put(_ATEN.to.dtype, out, own)

    def given(self, x: fx.Node) -> fx.Node:
        """An input of the graph on the device of `x`, which says where a seed is drawn."""
        for n in self.graph.nodes:
            value = n.meta.get("val")
            if n.op in ("placeholder", "get_attr") and isinstance(value, Tensor) and value.device == x.meta["val"].device:
                found: fx.Node = n
                return found
        raise _Refused

    def sdpa(self) -> fx.Node | None:
        with self.graph.inserting_before(self.node):
            try:
                return self.attention()
            except _Refused:
                return None

    def attention(self) -> fx.Node:
        """The operator as its products and its softmax, in float32 where it is given 16 bits."""
        a = arguments(self.node)
        q, k, v = (cast("fx.Node", a[x]) for x in ("query", "key", "value"))
        given: Tensor = self.node.meta["val"]
        if given.dtype in (torch.float16, torch.bfloat16):
            q, k, v = (self.put(_ATEN.to.dtype, x, torch.float32) for x in (q, k, v))
        if a["enable_gqa"]:
            heads, own = q.meta["val"].shape[-3], k.meta["val"].shape[-3]
            if not isinstance(heads, int) or not isinstance(own, int):
                raise _Refused
            k, v = (self.put(_ATEN.repeat_interleave.self_int, x, heads // own, -3) for x in (k, v))
        width = q.meta["val"].shape[-1]
        scale = a["scale"] if a["scale"] is not None else 1.0 / math.sqrt(width) if isinstance(width, int) else None
        if not isinstance(scale, float):
            raise _Refused
        scores = self.put(_ATEN.matmul.default, q, self.put(_ATEN.transpose.int, k, -2, -1))
        scores = self.masked(self.put(_ATEN.mul.Tensor, scores, scale), a["attn_mask"], bool(a["is_causal"]))
        weights = self.put(_ATEN.softmax.int, scores, -1)
        if a["attn_mask"] is not None:
            # a row without a key gives 0
            empty = self.put(_ATEN.eq.Scalar, self.put(_ATEN.amax.default, scores, [-1], True), -math.inf)
            weights = self.put(_ATEN.masked_fill.Scalar, weights, empty, 0.0)
        out = self.put(_ATEN.matmul.default, self.dropped(weights), v)
        return out if out.meta["val"].dtype == given.dtype else self.put(_ATEN.to.dtype, out, given.dtype)

    def masked(self, scores: fx.Node, mask: object, causal: bool) -> fx.Node:
        keep = None
        if causal:
            keep = self.put(_ATEN.tril.default, self.put(_ATEN.ones_like.default, scores, dtype=torch.bool))
        elif isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool:
            keep = mask
        elif isinstance(mask, fx.Node):
            return self.put(_ATEN.add.Tensor, scores, mask)
        if keep is None:
            return scores
        return self.put(_ATEN.masked_fill.Scalar, scores, self.put(_ATEN.logical_not.default, keep), -math.inf)
