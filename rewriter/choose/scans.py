"""Recurrences of a graph: what each way to run one would cost, which one runs, and the call that is spliced for it.

    graph ─ loops → recurrences ─ candidates → Site (kind "scan") + Call ─ splice → graph

Candidates are the model's own steps and our scan. Where gradients are wanted, our scan is one that autograd follows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from ...codegen.cpu.scan import ScanKernel, build
from ...codegen.cpu.trained_scan import build_trained
from ...cost_model.count.eager import EagerOperator
from ...cost_model.count.memory import AttentionMemory
from ...cost_model.devices.device import Device
from ...cost_model.operations import WIDTH
from ...cost_model.sites.site import ORIGINAL, Candidate, Miss, Site, SiteShape, ranked
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.attention.score import bends
from ...patterns.cascade import Size, show
from ...patterns.recurrence.low_rank import LowRank, low_rank
from ...patterns.recurrence.recurrence import Recurrence
from ...patterns.verdict import Obstacle, Refusal
from ..find import defect
from ..find.detect import find
from ..find.place import gradient_cut
from ..find.unaccounted import PAIRS, made_by_pairs
from ..fold.chunks import over_tokens
from ..fold.decayed import decayed
from ..fold.loop import loops, unmark
from ..fold.opened import opened
from ..fold.recurrences import FoundScan, OtherScan, lifted
from ..fold.scan_costs import own_operators, scan_cost, steps_cost
from ..graph.aliases import Aliases
from ..graph.inside import between
from ..graph.node import FOLDED, op_name
from ..graph.where import module_path, source_line
from ..splice import splice
from ..splice.packed import packed, unpacked
from .policy import Policy

NAME = "reattend"


@dataclass(frozen=True)
class Scan:
    """A recurrence as plain data, to be decided again on other devices.

    `steps`: what one of the model's own `count` steps takes; `before`: what it computes ahead of them. `apart`: why a loop
    over chunks is none over tokens. `trained`: gradients flow through its results.
    """

    recurrence: Recurrence
    name: str
    where: str
    dtype: str
    bound: str
    steps: tuple[EagerOperator, ...]
    count: int
    before: tuple[EagerOperator, ...]
    device_type: str
    apart: str = ""
    trained: bool = False


def scans(graph: fx.Graph, taken: Counter[str]) -> tuple[list[tuple[FoundScan, Scan]], list[Miss]]:
    """Every recurrence of a graph, and what carries values on in another way. Marks what belongs to them."""
    found: list[tuple[FoundScan, Scan]] = []
    folded, failed = loops(graph)
    aliases = Aliases(graph)
    misses: list[Miss] = []
    for x in failed:
        misses += _other(x.copies, x.node, x.reason)
    for loop in folded:
        first = next(n for n in loop.copies[0] if n is not None)
        try:
            out = lifted(loop)
            if isinstance(out, OtherScan):
                misses += _other(loop.copies, first, out.reason)
                continue
            out, apart = _over_tokens(out, graph, aliases)
            out = _with_before(opened(out, graph, aliases), aliases)
            found.append((out, _scan(out, aliases, taken, apart)))
        except Exception as error:
            unmark(loop.copies)
            misses.append(_miss(first, defect.reason(source_line(first) or first.name, error)))
    try:
        for d in decayed(graph, aliases, lambda f: over_tokens(f, graph, aliases)):
            if isinstance(d, OtherScan):
                misses.append(_miss(d.node, d.reason))
                continue
            made = _with_before(opened(d, graph, aliases), aliases)
            found.append((made, _scan(made, aliases, taken, "")))
    except Exception as error:
        last = next(iter(reversed(graph.nodes)))
        misses.append(_miss(last, defect.reason("a recurrence over chunks", error)))
    return found, misses


def _scan(f: FoundScan, aliases: Aliases, taken: Counter[str], apart: str) -> Scan:
    taken[f.module] += 1
    name = f.module if taken[f.module] == 1 else f"{f.module}#{taken[f.module]}"
    value = f.output.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    return Scan(
        f.recurrence,
        name,
        f.where,
        dtype,
        _bound(f, aliases),
        own_operators(f.body),
        f.copies,
        own_operators(f.before),
        value.device.type,
        apart,
        any(n.meta["val"].requires_grad for n in f.results.values()),
    )


def _over_tokens(f: FoundScan, graph: fx.Graph, aliases: Aliases) -> tuple[FoundScan, str]:
    """A loop over chunks as the recurrence over tokens that it computes, or as it is and why."""
    if all(isinstance(low_rank(f.recurrence, s), LowRank) for s in f.recurrence.states):
        return f, ""
    out = over_tokens(f, graph, aliases)
    if isinstance(out, Obstacle):
        return f, str(out)
    return out, ""


def _with_before(f: FoundScan, aliases: Aliases) -> FoundScan:
    """A recurrence with what is ahead of the model's own steps, which is marked."""
    before = between(set(f.tensors.values()), f.output) - f.nodes
    mine = before | f.nodes
    for n in before:
        if all(u in mine for u in n.users):
            n.meta[FOLDED] = True
    return replace(f, before=tuple(sorted(before, key=aliases.position.__getitem__)))


def _other(copies: Sequence[Sequence[fx.Node | None]], at: fx.Node, reason: str) -> list[Miss]:
    """What is said of steps that are no recurrence we know: nothing of layers that attend, which are found elsewhere."""
    if not _attend([n for copy in copies[:2] for n in copy if n is not None]):
        return [_miss(at, PAIRS if made_by_pairs(at) else reason)]
    unmark(copies)
    return []


def _attend(nodes: Sequence[fx.Node]) -> bool:
    """Whether an attention lies inside two steps: layers whose weights lie in one tensor, or which share them."""
    graph, inside, table = fx.Graph(), set(nodes), dict[fx.Node, fx.Node]()
    for i in dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside):
        table[i] = graph.placeholder(i.name)
        table[i].meta = dict(i.meta)
    for n in nodes:
        table[n] = graph.node_copy(n, table.__getitem__)
    unmark([list(table.values())])
    graph.output([table[n] for n in nodes if any(u not in inside for u in n.users)])
    found, _ = find(fx.GraphModule(nn.Module(), graph))
    views = [attention(f.cascade) for f in found]
    # what has nothing between its products may as well be a recurrence
    return any(isinstance(v, Attention) and bends(v.weight, {e.out.tensor for e in v.products}) for v in views)


def _miss(n: fx.Node, reason: str) -> Miss:
    module = module_path(n)
    what = f"{op_name(n)} in {module}" if module else op_name(n)
    return Miss(source_line(n), what, f"a recurrence of another kind: {reason}")


def _bound(f: FoundScan, aliases: Aliases) -> str:
    """Why a recurrence cannot be replaced where it stands; empty where it can."""
    values, at = [n.meta["val"] for n in f.results.values()], aliases.position
    start = min(at[n] for n in (*f.body, *f.before))
    last, inside = max(f.results.values(), key=at.__getitem__), f.nodes
    if any(aliases.written_between(n, start - 1, last) for n in f.tensors.values()):
        return "what its steps read is written in place meanwhile"
    if any(at[u] < at[last] for n in f.results.values() for u in n.users if u not in inside):
        return "a result is read before the others are there"
    if f.strays:
        return "a value of its last step is read elsewhere"
    trained = [v.requires_grad for v in values]
    if any(trained) and not all(trained):
        return "gradients flow through some of its results alone"
    if any(trained) and (cut := gradient_cut(_computed(f))) is not None:
        return f"a gradient is cut inside the recurrence (at {cut.name})"
    if len(values) > 1 and not all(v.dim() and all(isinstance(s, int) for s in v.shape) for v in values):
        return "its results have open sizes, or no dimension"
    return ""


# --- one recurrence -----------------------------------------------------------------------------------------------


def decide(s: Scan, device: Device, policy: Policy) -> tuple[Site, ScanKernel | None]:
    """The site of a recurrence, and our kernel where it is chosen."""
    c = s.recurrence.cascade
    original = Candidate(ORIGINAL, cost=steps_cost(device, s.steps, s.count, s.before, s.trained))
    kernel = _kernel(s, device)
    if isinstance(kernel, Refusal):
        ours = Candidate(NAME, feasible=False, why="; ".join(x for x in (kernel.reason, s.apart) if x))
    else:
        how = "matrix products carry the state" if kernel.forms else "one operator a step and state, all else"
        why = f"{how} {'over' if kernel.forms else 'for'} {kernel.steps} steps at once"
        text = kernel.source
        ours = Candidate(NAME, cost=scan_cost(s.recurrence, device, kernel, s.trained), why=why, maker=lambda: text)
        no = s.bound or ("" if policy.permits(ours) else "the policy does not permit it")
        ours = replace(ours, feasible=False, why=no) if no else ours
    order = ranked((original, ours))
    chosen = next((x for x in order if x.feasible and policy.permits(x)), original)
    why = chosen.why or ours.why
    order = tuple(replace(x, why=why) if x is chosen else x for x in order)
    sizes = {r.name: r.size if isinstance(r.size, int) else str(r.size) for r in c.ranks}
    proofs = (
        f"{s.count} copies of one step, argument by argument"
        if s.count > 1
        else "the states between chunks decay place by place",
        *(["a chunk computes what its tokens would, factor by factor"] if s.before else []),
        "nothing but the states is handed from a step to the next",
    )
    site = Site(
        s.name, s.where, "scan", s.recurrence.traits, SiteShape(sizes, s.dtype), None, proofs, (), order, chosen.name,
        cascade=show(c), memory=_memory(s),
    )
    return site, kernel if isinstance(kernel, ScanKernel) and chosen.name == NAME else None


def _memory(s: Scan) -> AttentionMemory | None:
    """What is kept between calls: the states. What is alive meanwhile: the own operator that holds most, our results."""
    c, states = s.recurrence.cascade, {x.name for x in s.recurrence.states}
    if any(not isinstance(n, int) for t in c.tensors for n in t.shape):
        return None

    def size(name: str) -> int:
        # a state stands in the cascade once a step
        shape = c.tensor[name].shape[:-1] if name in states else c.tensor[name].shape
        return math.prod(int(str(n)) for n in shape) * WIDTH[c.tensor[name].dtype]

    eager = max((o.read_bytes + o.written_bytes for o in (*s.steps, *s.before)), default=0)
    return AttentionMemory(sum(map(size, states)), eager, sum(map(size, c.outputs)))


def _kernel(s: Scan, device: Device) -> ScanKernel | Refusal:
    if device.kind != "cpu":
        return Refusal(NAME, "our scan runs on CPUs only")
    return (build_trained if s.trained else build)(s.recurrence)


# --- into the graph -----------------------------------------------------------------------------------------------


def call_of(f: FoundScan, kernel: ScanKernel) -> splice.Call:
    """Our scan as a call that gives all results of a recurrence: one tensor, or several packed into one."""
    wanted = [kernel.outputs.index(n) for n in f.results]
    shapes = tuple(tuple(n.meta["val"].shape) for n in f.results.values())
    kinds = tuple(n.meta["val"].dtype for n in f.results.values())

    # an input's dimension may be two of the scan's; an open one may hold more steps than are taken
    given_shapes = [_open(f.recurrence.cascade.tensor[n].shape) for n in kernel.inputs]

    def run(*given: Tensor) -> Tensor:
        made = kernel.entry(*(x.reshape(s) for x, s in zip(given, given_shapes)))
        return packed([made[i].reshape(shape) for i, shape in zip(wanted, shapes)])

    def fake(*given: Tensor) -> Tensor:
        return packed([given[0].new_empty(shape, dtype=kind) for shape, kind in zip(shapes, kinds)])

    def arguments(tensors: Mapping[str, Any], size: Any) -> tuple[Any, ...]:
        return tuple(tensors[n] for n in kernel.inputs)

    run.__name__ = NAME
    trained = any(n.meta["val"].requires_grad for n in f.results.values())
    return splice.Call(NAME, run, arguments, fake=fake, once=trained, one_flow=trained)


def _open(shape: Sequence[Size]) -> tuple[int, ...]:
    """A shape as `reshape` takes it; one dimension may be open."""
    return tuple(s if isinstance(s, int) else -1 for s in shape)


def output_of(gm: fx.GraphModule, f: FoundScan) -> fx.Node:
    """The node that a call of a recurrence stands for: its one result, or all of them packed, of which they are read."""
    results = list(f.results.values())
    return results[0] if len(results) == 1 else unpacked(gm, results, f.nodes)


def _computed(f: FoundScan) -> frozenset[fx.Node]:
    """The nodes that a call of a recurrence computes."""
    given = set(f.tensors.values())
    return frozenset(f.results.values()).union(*(between(given, n) for n in f.results.values()))


def interior(f: FoundScan, output: fx.Node) -> frozenset[fx.Node]:
    """The nodes between what a recurrence reads and a result."""
    return between(set(f.tensors.values()), output)
