"""Functions that are mapped over a dimension, written out: below `vmap` its operators take that dimension as one more.

    before   vmap(f)(x): enter; y = add_batch_dim(x, 0); z = f's operators on y; remove_batch_dim(z); leave
    after    f's operators on x, a dimension more each

    before   flex_attention(q, k, v, score, blocks, scale)
    after    s = score(q·kᵀ·scale, b, h, p, m); p = softmax(where(keep(b, h, p, m), s, −∞)); p·v

The second is what PyTorch runs for a FlexAttention that nothing compiles. One that a gradient flows through, or whose row
sums are read, has ways of its own and stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
import torch.fx.traceback as traceback
from torch import Tensor, fx, nn

from ..graph import torch_private

_NO = -float("inf")
_KEPT = ("stack_trace", "nn_module_stack")


Values = Callable[[], dict[fx.Node, Any]]


def written_out(gm: fx.GraphModule, values: Values, mode: torch_private.FakeTensorMode, *, flex: bool) -> fx.GraphModule:
    """The graph with its mapped functions written out, and with `flex` its FlexAttentions too; itself where it has none.

    `values` gives the fake value of every node. What cannot be written out stays as it is.
    """
    regions = _mapped(gm.graph)
    calls = [n for n in gm.graph.nodes if flex and torch_private.is_flex(n.target)]
    if not (regions or calls) or _in_autocast(gm) or not all(_is_closed(gm, r) for r in regions):
        return gm
    known = values()
    if not all(isinstance(known[x], (Tensor, torch.SymInt, torch.SymFloat, int, float)) for r in regions for x in _read(r)):
        return gm
    copy, table = _copied(gm)
    at = {table[n]: value for n, value in known.items()}
    for region in regions:
        _replace_region(copy, [table[n] for n in region], at, mode)
    for n in calls:
        if _plain(table[n], at):
            _replace_flex(copy, table[n], at, mode)
    copy.graph.lint()
    copy.recompile()
    return copy


def values_of(
    gm: fx.GraphModule, given: Sequence[object], mode: torch_private.FakeTensorMode, fake: Callable[[object], object]
) -> dict[fx.Node, Any]:
    """The fake value of every node of a graph for these inputs."""
    found: dict[fx.Node, Any] = {}

    class ValueRecord(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = fake(super().run_node(n)) if n.op == "get_attr" else super().run_node(n)
            return found[n]

    runner = ValueRecord(gm, garbage_collect_values=False)
    with mode, torch.set_grad_enabled(torch.is_grad_enabled()), torch_private.leaving_maps():
        runner.run(*given)
    return found


def _copied(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph, table = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in gm.graph.nodes:
        table[n] = graph.node_copy(n, table.__getitem__)
    out = fx.GraphModule(gm, graph)
    out.meta = dict(gm.meta)
    return out, table


# --- regions ------------------------------------------------------------------------------------------------------


def _mapped(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each outermost mapped function, from where it is entered to where it is left."""
    regions: list[list[fx.Node]] = []
    depth = 0
    for n in graph.nodes:
        step = torch_private.nesting(n.target) if n.op == "call_function" else 0
        if step > 0 and depth == 0:
            regions.append([])
        if depth or step > 0:
            regions[-1].append(n)
        depth += step
    return regions


def _is_closed(gm: fx.GraphModule, region: Sequence[fx.Node]) -> bool:
    """Is all in a region operators on tensors: no state of autograd, no operator with a body, no function of the user's?"""
    for n in region:
        if n.op not in ("call_function", "call_method", "get_attr") or str(n.target).startswith("register_"):
            return False
        if n.target is torch_private.SET_GRAD or torch_private.has_body(n.target):
            return False
        if torch_private.is_own_function(n.target):
            return False
        if n.op == "get_attr" and not isinstance(operator.attrgetter(str(n.target))(gm), Tensor):
            return False
    return True


def _in_autocast(gm: fx.GraphModule) -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or any(
        n.target is torch_private.ENTER_AUTOCAST for n in gm.graph.nodes
    )


def _read(region: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(region)
    return list(dict.fromkeys(x for n in region for x in n.all_input_nodes if x not in inside))


def _replace_region(
    gm: fx.GraphModule, region: Sequence[fx.Node], at: dict[fx.Node, Any], mode: torch_private.FakeTensorMode
) -> None:
    inside, given = set(region), _read(region)
    answers = [n for n in region if any(u not in inside for u in n.users)]
    body = fx.Graph()
    table = {x: body.placeholder(f"given_{i}") for i, x in enumerate(given)}
    for n in region:
        table[n] = body.node_copy(n, table.__getitem__)
    body.output([table[n] for n in answers])
    run = fx.Interpreter(fx.GraphModule(gm, body)).run
    made = _traced(run, [at[x] for x in given], mode)
    news = _inlined(gm, made, given, region[-1])
    for old, new in zip(answers, news, strict=True):
        at[new] = at[old]
        old.replace_all_uses_with(new, delete_user_cb=lambda u: u not in inside)
    for n in reversed(region):
        gm.graph.erase_node(n)


def _traced(run: Callable[..., Any], values: Sequence[Any], mode: torch_private.FakeTensorMode) -> fx.GraphModule:
    """What a function does to fake values below all transforms of functions."""
    with mode, traceback.preserve_node_meta():
        return torch_private.dispatched_graph(run, values)


def _inlined(
    gm: fx.GraphModule, made: fx.GraphModule, given: Sequence[fx.Node], before: fx.Node, like: fx.Node | None = None
) -> list[fx.Node]:
    """The nodes of a traced function in line before a node; answers its results. They stand where `like` does, if given."""
    inputs = [n for n in made.graph.nodes if n.op == "placeholder"]
    table: dict[fx.Node, Any] = dict(zip(inputs, given, strict=True))
    with gm.graph.inserting_before(before):
        for n in made.graph.nodes:
            if n.op in ("placeholder", "output"):
                continue
            table[n] = gm.graph.node_copy(n, table.__getitem__)
            if n.op == "get_attr":
                table[n].target = _held(gm, operator.attrgetter(str(n.target))(made))
            source = like or n
            table[n].meta = {k: source.meta[k] for k in _KEPT if k in source.meta} | {"val": n.meta.get("val")}
    (out,) = next(n for n in made.graph.nodes if n.op == "output").args
    return [table[n] for n in (out if isinstance(out, (list, tuple)) else [out])]


def _held(gm: fx.GraphModule, value: Tensor | nn.Module) -> str:
    name = next(n for i in count() if not hasattr(gm, n := f"_written_out_{i}"))
    if isinstance(value, Tensor):
        gm.register_buffer(name, value, persistent=False)
    else:
        gm.add_module(name, value)
    return name


# --- FlexAttention ------------------------------------------------------------------------------------------------


def _plain(n: fx.Node, at: Mapping[fx.Node, Any]) -> bool:
    """Is only the result read, without gradients?"""
    reads = all(u.target is operator.getitem and (u.args[1] == 0 or not u.users) for u in n.users)
    floats = [at[x] for x in n.all_input_nodes if isinstance(at[x], Tensor)]
    return reads and not (torch.is_grad_enabled() and any(x.requires_grad for x in floats))


def _replace_flex(
    gm: fx.GraphModule, n: fx.Node, at: dict[fx.Node, Any], mode: torch_private.FakeTensorMode
) -> None:
    given: tuple[Any, ...] = (*n.args, *n.kwargs.values())
    q, k, v, score, blocks, scale, _, *others = given
    held = [tuple(x) for x in (*others, (), ())[:2]]
    bodies = [operator.attrgetter(str(x.target))(gm) for x in (score, blocks[-1])]
    read = [q, k, v, scale, *held[0], *held[1]]
    nodes = list(dict.fromkeys(x for x in read if isinstance(x, fx.Node)))

    def of(values: Sequence[Any]) -> list[Any]:
        table = dict(zip(nodes, values, strict=True))
        return [table[x] if isinstance(x, fx.Node) else x for x in read]

    fakes = of([at[x] for x in nodes])
    with mode, torch.no_grad():
        call = _WrittenFlex(len(held[0]), *(_over_all(f, len(h)) for f, h in zip(bodies, held, strict=True)))
        s, places = call.scores(fakes[0], fakes[1], fakes[3])
        parts = [_traced(f, (*places, s, *x), mode) for f, x in zip(call.functions, call.captured(fakes[4:]), strict=True)]
    written = _WrittenFlex(len(held[0]), *parts)
    with mode:
        made = torch_private.pre_dispatch_graph(lambda *values: written(*of(values)), [at[x] for x in nodes])
    (out,) = _inlined(gm, made, nodes, n, like=n)
    for user in list(n.users):
        if user.args[1] == 0:
            at[out] = at[user]
            user.replace_all_uses_with(out)
        gm.graph.erase_node(user)
    gm.graph.erase_node(n)


class _WrittenFlex:
    """What PyTorch computes for a FlexAttention that nothing compiles, in its types.

    `functions` are the score's and the mask's, of all places, all scores and what they captured.
    """

    def __init__(self, of_score: int, *functions: Callable[..., Tensor]) -> None:
        self.of_score, self.functions = of_score, functions

    def captured(self, held: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        return held[: self.of_score], held[self.of_score :]

    def scores(self, q: Tensor, k: Tensor, scale: Any) -> tuple[Tensor, list[Tensor]]:
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        k = _for_all(k, q)
        s = torch.matmul(q.to(exact), k.to(exact).transpose(-2, -1)) * scale
        sizes = (q.size(0), q.size(1), q.size(2), k.size(2))
        return s, [torch.arange(n, device=q.device) for n in sizes]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: Any, *held: Any) -> Tensor:
        s, places = self.scores(q, k, scale)
        score, keep = (f(*places, s, *x) for f, x in zip(self.functions, self.captured(held), strict=True))
        p = torch_private.safe_softmax(torch.where(keep, score, _NO))
        return torch.matmul(p.to(q.dtype), _for_all(v, q).to(q.dtype))


def _for_all(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values for every head and batch of the queries."""
    if x.size(1) != q.size(1):
        x = x[:, :, None].expand(-1, -1, q.size(1) // x.size(1), -1, -1).flatten(1, 2)
    return x if x.size(0) == q.size(0) else x.expand(q.size(0), -1, -1, -1)


def _over_all(body: Callable[..., Tensor], held: int) -> Callable[..., Tensor]:
    """A body of one place, and of its score if it takes one, over all batches, heads, queries and keys."""
    takes_score = len([n for n in body.graph.nodes if n.op == "placeholder"]) - held == 5  # type: ignore[attr-defined]

    def one(b: Tensor, h: Tensor, i: Tensor, j: Tensor, s: Tensor, *captured: Any) -> Tensor:
        out: Tensor = body(s, b, h, i, j, *captured) if takes_score else body(b, h, i, j, *captured)
        return out

    first = 0 if takes_score else None
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        one = torch.vmap(one, in_dims=(*dims, first, *(None,) * held))

    def all_(*given: Any) -> Tensor:
        with torch_private.indexing_by_tensors():
            return one(*given)

    return all_
