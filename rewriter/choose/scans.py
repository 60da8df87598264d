"""Recurrences of a graph: what each way to run one would cost, which one runs, and the call that is spliced for it.

    graph ─ loops → recurrences ─ candidates → Site (kind "scan") + Call ─ splice → graph

Candidates are the model's own steps and our scan. Our scan has no backward: where gradients are wanted the own steps stay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from ...codegen.cpu import scan as cpu_scan
from ...codegen.skeletons.carried import BLOCK, SOLVED
from ...cost_model.count.eager import EagerOperator, computed
from ...cost_model.count.memory import AttentionMemory
from ...cost_model.devices.device import Device
from ...cost_model.operations import WIDTH
from ...cost_model.sites.site import ORIGINAL, Candidate, Miss, Site, SiteShape, ranked
from ...cost_model.time.cost import Cost
from ...cost_model.time.host import Bill, Host
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.attention.score import bends
from ...patterns.cascade import show
from ...patterns.recurrence.low_rank import LowRank, low_rank
from ...patterns.recurrence.recurrence import Recurrence
from ...patterns.verdict import Obstacle, Refusal
from ..find import defect
from ..find.detect import find
from ..find.pairs import PAIRS, made_by_pairs
from ..fold.chunks import over_tokens
from ..fold.decayed import decayed
from ..fold.loop import loops, unmark
from ..fold.opened import opened
from ..fold.recurrences import FoundScan, OtherScan, lifted
from ..graph.aliases import Aliases
from ..graph.inside import between
from ..graph.node import FOLDED, arguments, op_name
from ..graph.where import module_path, source_line
from ..lift import operators_view
from ..lift.operators_contract import einsum_spec
from ..splice import splice
from ..splice.packed import packed, unpacked
from .policy import Policy

NAME = "reattend"
# Views and other calls next to no work around a chunk of a carried matrix, in operators: some seventy, of half the price.
AROUND_CHUNK = 35


@dataclass(frozen=True)
class Scan:
    """A recurrence as plain data, to be decided again on other devices.

    `steps`: what one of the model's own `count` steps takes; `before`: what it computes ahead of them. `apart`: why a loop
    over chunks is none over tokens.
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
        _own(f.body),
        f.copies,
        _own(f.before),
        value.device.type,
        apart,
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
    if any(v.requires_grad for v in values):
        return "gradients are wanted, and our scan has no backward yet"
    if len(values) > 1 and not all(v.dim() and all(isinstance(s, int) for s in v.shape) for v in values):
        return "its results have open sizes, or no dimension"
    return ""


PRODUCTS = frozenset(("matmul", "bmm", "mm", "linalg_solve_triangular"))


def _own(nodes: Iterable[fx.Node | None]) -> tuple[EagerOperator, ...]:
    """The model's own operators."""
    out = []
    for n in nodes:
        assert n is not None
        made = n.meta["val"]
        # views cost next to nothing, and less than an operator is priced at
        if op_name(n) in operators_view.RULES or not isinstance(made, Tensor):
            continue
        size = math.prod(s for s in made.shape if isinstance(s, int))
        width = made.element_size()
        if op_name(n) in PRODUCTS and made.dim() > 1:
            out.append(_product(n, size, width))
            continue
        if (of_letters := _einsum(n, size, width)) is not None:
            out += of_letters
            continue
        out.append(EagerOperator("point", _point_name(n), "f32", size, 2 * size * width, size * width))
    return tuple(out)


def _einsum(n: fx.Node, size: int, width: int) -> list[EagerOperator] | None:
    """An einsum of two operands: copies of what does not lie as a product wants it, and the product."""
    if op_name(n) != "einsum":
        return None
    specs, out, nodes = einsum_spec(n, arguments(n))
    shapes = [x.meta["val"].shape for x in nodes]
    if len(specs) != 2 or not all(isinstance(s, int) for shape in shapes for s in shape):
        return None
    extent = {c: max(s, 1) for spec, shape in zip(specs, shapes) for c, s in zip(spec, shape)}
    first, second = map(set, specs)

    def of(letters: set[str]) -> int:
        return math.prod(extent[c] for c in letters)

    batch, rows, columns = of(first & second & set(out)), of((first - second) & set(out)), of((second - first) & set(out))
    inner = of((first | second) - set(out))
    read = sum(math.prod(shape) for shape in shapes)
    copies = [
        EagerOperator("copy", "copy", "f32", math.prod(shape), math.prod(shape) * width, math.prod(shape) * width)
        for shape in shapes
    ]
    return [
        *copies,
        EagerOperator(
            "product", "mul", "f32", batch * rows * columns * inner, read * width, size * width, batch, rows, columns, inner
        ),
    ]


def _point_name(n: fx.Node) -> str:
    return op_name(n) if op_name(n) in ("exp", "where") else "mul"


def _product(n: fx.Node, size: int, width: int) -> EagerOperator:
    """A product, or a triangular system: each row is half a product with what was solved before it, one after the other."""
    operands = [x.meta["val"] for x in n.all_input_nodes]
    rows, columns = (int(s) for s in n.meta["val"].shape[-2:])
    inner = int(operands[0].shape[-1])
    solves = op_name(n) == "linalg_solve_triangular"
    inner = inner // 2 + 1 if solves else inner
    read = sum(math.prod(int(s) for s in x.shape) for x in operands)
    batch = size // max(rows * columns, 1)
    batch, rows = (batch * rows, 1) if solves else (batch, rows)
    return EagerOperator("product", "mul", "f32", size * inner, read * width, size * width, batch, rows, columns, inner)


# --- one recurrence -----------------------------------------------------------------------------------------------


def decide(s: Scan, device: Device, policy: Policy) -> tuple[Site, cpu_scan.ScanKernel | None]:
    """The site of a recurrence, and our kernel where it is chosen."""
    c = s.recurrence.cascade
    original = Candidate(ORIGINAL, cost=_steps_cost(s, device))
    kernel = _kernel(s, device)
    if isinstance(kernel, Refusal):
        ours = Candidate(NAME, feasible=False, why="; ".join(x for x in (kernel.reason, s.apart) if x))
    else:
        how = "matrix products carry the state" if kernel.forms else "one operator a step and state, all else"
        why = f"{how} {'over' if kernel.forms else 'for'} {kernel.steps} steps at once"
        text = kernel.source
        ours = Candidate(NAME, cost=_scan_cost(s, device, kernel), why=why, maker=lambda: text)
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
    return site, kernel if isinstance(kernel, cpu_scan.ScanKernel) and chosen.name == NAME else None


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


def _kernel(s: Scan, device: Device) -> cpu_scan.ScanKernel | Refusal:
    if device.kind != "cpu":
        return Refusal(NAME, "our scan runs on CPUs only")
    return cpu_scan.build(s.recurrence)


def _steps_cost(s: Scan, device: Device) -> Cost | None:
    if device.host is None:
        return None
    return _cost(s, device, [*((o, s.count) for o in s.steps), *((o, 1) for o in s.before)], "original")


def _count(s: Scan) -> int:
    size = s.recurrence.cascade.rank[s.recurrence.rank].size
    return size if isinstance(size, int) else 1


def _scan_cost(s: Scan, device: Device, kernel: cpu_scan.ScanKernel) -> Cost | None:
    """Terms of a chunk at once, as often as there are chunks, and what carries each state over one."""
    r, chunk = s.recurrence, kernel.steps
    extent = {x.name: x.size for x in r.cascade.ranks if isinstance(x.size, int)} | {r.rank: chunk}
    often = -(-_count(s) // chunk)
    work: list[tuple[EagerOperator, int]] = []
    inside: set[str] = set()
    for state in r.states:
        form = kernel.forms.get(state.name)
        if form is not None:
            rows = (form.factor, form.write, form.added, form.read, *(q.query for q in form.reads))
            work += [(o, often) for x in rows if x is not None for o in computed(x, extent)]
            work += [(o, often) for o in _carried(form, extent, chunk)]
            inside |= {q.einsum.out.tensor for q in form.reads} | _taken(r, form)
            continue
        size = math.prod(extent[x] for x in state.ranks)
        # every step reads its own factor and addend: those of a chunk pass through the cache, not those of a step
        steps = EagerOperator("point", "mul", "f32", chunk * size, 3 * 4 * chunk * size, 0)
        call = EagerOperator("point", "mul", "f32", 0, 0, 0)
        copy = EagerOperator("copy", "copy", "f32", chunk * size, 4 * chunk * size, 4 * chunk * size)
        work += [(steps, often), (call, _count(s) - often), (copy, 3 * often)]
        work += [(o, often) for x in (state.factor, state.added) for o in computed(x, extent)]
    names = {x.name for x in r.states} | inside
    for e in r.cascade.einsums:
        if e.out.tensor not in names:
            work += [(o, often) for o in computed(e.body, extent)]
    return _cost(s, device, work, "our-scan")


def _taken(r: Recurrence, form: LowRank) -> set[str]:
    """The tensors by which a step reads what it takes off, which the matrix products stand for."""
    producers, out = r.cascade.producers, set[str]()
    stack = [str(x.attr) for x in form.state.step.reads]
    while stack:
        n = stack.pop()
        if n not in out and len(producers.get(n, ())) == 1:
            out.add(n)
            stack += [str(x.attr) for x in producers[n][0].reads]
    return out


def _carried(m: LowRank, extent: Mapping[str, int], n: int) -> list[EagerOperator]:
    """The operators that carry a matrix over n steps, as codegen/skeletons/carried.py calls them."""
    b, k, v = math.prod(extent[x] for x in m.batch), extent[m.key], extent[m.value]
    queries, taken = len(m.reads), int(m.read is not None)
    asked = queries + taken

    def product(rows: int, columns: int, inner: int, batch: int = b) -> EagerOperator:
        read, written = batch * inner * (rows + columns), batch * rows * columns
        return EagerOperator("product", "mul", "f32", written * inner, 4 * read, 4 * written, batch, rows, columns, inner)

    def point(size: int, name: str = "mul", dtype: str = "f32") -> EagerOperator:
        width = 8 if dtype == "f64" else 4
        return EagerOperator("point", name, dtype, size, 2 * size * width, size * width)

    def summed(size: int) -> EagerOperator:
        return EagerOperator("reduce", "add", "f32", size, 4 * size, 0)

    # what each step adds, as an outer product, and what it gives of the steps before it
    out = [product(k, v, n), *[product(n, v, n)] * queries]
    # the matrix under its decay, the values copied, whether all is finite
    out += [point(b * k * v), summed(b * k * v), *[point(b * n * v), summed(b * n * v)] * queries]
    out += [EagerOperator("point", "mul", "f32", 0, 0, 0)] * AROUND_CHUNK
    if taken:
        out += [point(b * n * v)]
        for first in range(0, n, SOLVED):
            rows = min(SOLVED, n - first)
            # a solver makes one row after the other, of half of them each
            out += [product(1, v, rows // 2 + 1, b * rows), point(b * rows * v)]
            out += [product(rows, v, first)] if first else []
    if m.key not in m.factor.ranks:
        # all rows at once, against what is written and against the matrix; decays by pairs of steps
        out += [product(asked * n, n, k), point(b * asked * n * n), product(asked * n, v, k), point(b * asked * n * v)]
        out += [point(b * asked * n * k, "copy")] * (asked > 1)
        return [*out, point(b * n * k), point(b * n * n, "exp"), *[point(b * n * n, dtype="f64")] * 3]
    out += [point(b * n * k)] * (asked + 1) + [product(n, v, k)] * asked
    blocks = -(-n // BLOCK)
    # diagonal by diagonal in a block of steps; the columns before a block are laid out for it
    for d in range(BLOCK - 1):
        size = b * blocks * (BLOCK - 1 - d) * k
        out += [point(size)] * (2 + asked) + [EagerOperator("reduce", "add", "f32", asked * size, 4 * asked * size, 0)]
    out += [point(b * blocks * k)] * (3 * BLOCK)
    for a in range(1, blocks):
        out += [product(BLOCK * asked, a * BLOCK, k), point(b * a * BLOCK * k), point(b * a * BLOCK * k)]
    return out


def _cost(s: Scan, device: Device, work: Sequence[tuple[EagerOperator, int]], kind: str) -> Cost | None:
    total = Bill()
    host = Host(device)
    for o, often in work:
        one = Bill()
        host.operator(o, one)
        for name, seconds in one.parts.items():
            total.add(name, seconds * often)
        total.flops += one.flops * often
        total.bytes += one.bytes * often
        total.exps += one.exps * often
    return total.cost(device, kind, "f32")


# --- into the graph -----------------------------------------------------------------------------------------------


def call_of(f: FoundScan, kernel: cpu_scan.ScanKernel) -> splice.Call:
    """Our scan as a call that gives all results of a recurrence: one tensor, or several packed into one."""
    wanted = [kernel.outputs.index(n) for n in f.results]
    shapes = tuple(tuple(n.meta["val"].shape) for n in f.results.values())
    kinds = tuple(n.meta["val"].dtype for n in f.results.values())

    # an input's dimension may be two of the scan's
    given_shapes = [tuple(f.recurrence.cascade.tensor[n].shape) for n in kernel.inputs]

    def run(*given: Tensor) -> Tensor:
        made = kernel.entry(*(x.reshape(s) for x, s in zip(given, given_shapes)))
        return packed([made[i].reshape(shape) for i, shape in zip(wanted, shapes)])

    def fake(*given: Tensor) -> Tensor:
        return packed([given[0].new_empty(shape, dtype=kind) for shape, kind in zip(shapes, kinds)])

    def arguments(tensors: Mapping[str, Any], size: Any) -> tuple[Any, ...]:
        return tuple(tensors[n] for n in kernel.inputs)

    run.__name__ = NAME
    return splice.Call(NAME, run, arguments, fake=fake)


def output_of(gm: fx.GraphModule, f: FoundScan) -> fx.Node:
    """The node that a call of a recurrence stands for: its one result, or all of them packed, of which they are read."""
    results = list(f.results.values())
    return results[0] if len(results) == 1 else unpacked(gm, results, f.nodes)


def interior(f: FoundScan, output: fx.Node) -> frozenset[fx.Node]:
    """The nodes between what a recurrence reads and a result."""
    return between(set(f.tensors.values()), output)
