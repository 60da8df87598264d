"""What recurrences cost on a CPU, operator by operator: a model's own steps, and our scan.

    own steps   what one step calls, as often as there are steps, and what is computed ahead of them
    our scan    what a chunk of steps calls, as often as there are chunks
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, fx

from ...codegen.cpu.scan import ScanKernel
from ...codegen.skeletons.carried import BLOCK, SOLVED
from ...cost_model.count.eager import EagerOperator, computed
from ...cost_model.devices.device import Device
from ...cost_model.time.cost import Cost
from ...cost_model.time.host import Bill, Host
from ...patterns.recurrence.low_rank import LowRank
from ...patterns.recurrence.recurrence import Recurrence
from ..graph.node import arguments, op_name
from ..lift import operators_view
from ..lift.operators_contract import einsum_spec

# Views and other calls next to no work around a chunk of a carried matrix, in operators: some seventy, of half the price.
AROUND_CHUNK = 35
# A training step by its forward: of a model's own operators under autograd (2.5 to 3.4 measured), and of our scan (3.4).
OWN, OURS = 3.0, 3.4
PRODUCTS = frozenset(("matmul", "bmm", "mm", "linalg_solve_triangular"))


def own_operators(nodes: Iterable[fx.Node | None]) -> tuple[EagerOperator, ...]:
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


def steps_cost(
    device: Device, steps: Sequence[EagerOperator], count: int, before: Sequence[EagerOperator], trained: bool
) -> Cost | None:
    """What a model's own `count` steps take, and what it computes ahead of them."""
    if device.host is None:
        return None
    return _cost(device, [*((o, count) for o in steps), *((o, 1) for o in before)], "original", OWN if trained else 1.0)


def _count(r: Recurrence) -> int:
    size = r.cascade.rank[r.rank].size
    return size if isinstance(size, int) else 1


def scan_cost(r: Recurrence, device: Device, kernel: ScanKernel, trained: bool) -> Cost | None:
    """What our scan takes: terms of a chunk at once, as often as there are chunks, and what carries each state over one."""
    if device.host is None:
        return None
    chunk = kernel.steps
    extent = {x.name: x.size for x in r.cascade.ranks if isinstance(x.size, int)} | {r.rank: chunk}
    often = -(-_count(r) // chunk)
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
        work += [(steps, often), (call, _count(r) - often), (copy, 3 * often)]
        work += [(o, often) for x in (state.factor, state.added) for o in computed(x, extent)]
    names = {x.name for x in r.states} | inside
    for e in r.cascade.einsums:
        if e.out.tensor not in names:
            work += [(o, often) for o in computed(e.body, extent)]
    return _cost(device, work, "our-scan", OURS if trained else 1.0)


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


def _cost(device: Device, work: Sequence[tuple[EagerOperator, int]], kind: str, times: float) -> Cost:
    total = Bill()
    host = Host(device)
    for o, often in work:
        one = Bill()
        host.operator(o, one)
        for name, seconds in one.parts.items():
            total.add(name, seconds * often * times)
        total.flops += one.flops * often
        total.bytes += one.bytes * often
        total.exps += one.exps * often
    return total.cost(device, kind, "f32")
