"""What a graph does outside of its attentions, as plain data: products by shape, passes between them by bytes, weights.

    level(n)   products and attentions on the longest way to n: what has one level and is connected is one pass
    moves      views, copies, joins and casts to the same type are nobody's work: they are looked through; so is what a call
               of experts does beside its products
    pass       reads what it has from elsewhere once, and writes once what others read of it
    cut        tensor parallelism: a product's columns, unless all of them meet again before the next product; then the
               inner dimension of the product behind it, whose parts of a sum are added up

What an attention is computed of lies inside its candidates and is not counted: it is reached by its tensors alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import fx, nn

from ...cost_model.layer.work import COLUMNS, INNER, LayerProduct, LayerWork, Pass, Weights
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Size
from ...patterns.evaluate import DTYPE_NAME
from ..capture.capture import attribute
from ..capture.weights import weights_of
from ..find.detect import Found
from ..graph.node import FOLDED, arguments, op_name
from ..graph.sizes import product, shape_of
from ..graph.torch_private import expression

T = TypeVar("T")

_LINEAR = ("linear",)
_MATRIX = ("matmul", "mm", "bmm", "mv", "linalg_matmul")
_ADDED = ("addmm", "baddbmm")
_GROUPED = ("_grouped_mm",)
_CONVOLVED = ("conv1d", "conv2d", "conv3d", "convolution")
PRODUCTS = frozenset((*_LINEAR, *_MATRIX, *_ADDED, *_GROUPED, *_CONVOLVED, "einsum"))
MOVES = frozenset((
    "view", "reshape", "transpose", "permute", "t", "contiguous", "clone", "expand", "expand_as", "squeeze", "unsqueeze",
    "slice", "select", "chunk", "split", "split_with_sizes", "unbind", "getitem", "cat", "stack", "to", "_to_copy",
    "detach", "alias", "flatten", "unflatten", "movedim", "dropout", "repeat_interleave", "repeat", "narrow", "lift_fresh",
))
# They read as many elements as they give, however large the table is.
GATHERS = frozenset(("embedding", "index", "index_select", "gather", "take_along_dim"))
# Along the last dimension these need all of it at once.
ACROSS = frozenset((
    "mean", "sum", "softmax", "log_softmax", "topk", "sort", "argmax", "amax", "max", "layer_norm", "rms_norm", "group_norm",
    "var", "std", "norm", "linalg_vector_norm", "cumsum", "argsort",
))


@dataclass
class _Graph:
    """A graph's nodes as they matter here: what is alive outside of attentions, and what each reads through moves."""

    graph: fx.Graph
    found: Mapping[fx.Node, Found]
    weights: frozenset[fx.Node]
    level: dict[fx.Node, int] = field(default_factory=dict)
    read: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    elements: dict[tuple[object, ...], Size] = field(default_factory=dict)

    @cached_property
    def kept(self) -> frozenset[Size]:
        """Lengths of keys where they are other ones than those of queries: what a step has from before, and its own."""
        views = [attention(f.cascade) for f in self.found.values()]
        known = [(v.cascade.rank[v.query].size, v.cascade.rank[v.key].size) for v in views if isinstance(v, Attention)]
        return frozenset(k for _, k in known) - {q for q, _ in known}

    def of_keys(self, n: fx.Node) -> bool:
        """Does a value run over keys from before?"""
        return any(s in self.kept for s in shape_of(_tensor(n)))

    @cached_property
    def tokens(self) -> Mapping[fx.Node, fx.Node]:
        """Each product of experts → the tokens that are dealt out to them, where a gather does that before the first one."""
        out: dict[fx.Node, fx.Node] = {}
        last: fx.Node | None = None
        for n in self.graph.nodes:
            if op_name(n) not in _GROUPED or len(_tensor(_node(n.args[0])).shape) != 2:
                continue
            gather = _node(n.args[0])
            while op_name(gather) in MOVES:
                gather = _node(gather.args[0])
            if op_name(gather) in GATHERS:
                last = _node(gather.args[0])
            if last is not None:
                out[n] = last
        return out

    @cached_property
    def dealt(self) -> frozenset[fx.Node]:
        """What a call of experts does beside its products: dealing tokens out, what lies between, adding up at the end."""
        out: set[fx.Node] = set()
        for n, tokens in self.tokens.items():
            gather = _node(n.args[0])
            while op_name(gather) in MOVES:
                gather = _node(gather.args[0])
            out |= {gather} if op_name(gather) in GATHERS else set()
            stack = list(n.users)
            while stack:
                u = stack.pop()
                if u in out or u.op != "call_function" or not _has_tensor(u) or _is_product(u):
                    continue
                out.add(u)
                if self.count(u) != self.count(tokens):
                    stack.extend(u.users)
        return frozenset(out)

    @cached_property
    def living(self) -> frozenset[fx.Node]:
        return frozenset(self.alive)

    @cached_property
    def given(self) -> frozenset[fx.Node]:
        """What attentions read: there moves end."""
        return frozenset(x for f in self.found.values() for x in f.tensors.values())

    @cached_property
    def alive(self) -> list[fx.Node]:
        """What the outputs need, in graph order; attentions are left through what they read."""
        seen: set[fx.Node] = set()
        stack = [n for n in self.graph.nodes if n.op == "output"]
        while stack:
            n = stack.pop()
            if n in seen:
                continue
            seen.add(n)
            stack.extend(self.inputs(n))
        return [n for n in self.graph.nodes if n in seen]

    def inputs(self, n: fx.Node) -> Iterable[fx.Node]:
        return self.found[n].tensors.values() if n in self.found else n.all_input_nodes

    def kind(self, n: fx.Node) -> str:
        """product, attention, move, weight, given (an input), or work."""
        if n in self.found:
            return "attention"
        if n in self.weights or n.op == "get_attr":
            return "weight"
        if n.op != "call_function" or not _has_tensor(n) or FOLDED in n.meta:
            return "given"
        if n in self.dealt:
            return "move"
        return "product" if _is_product(n) else "move" if op_name(n) in MOVES else "work"

    def sources(self, n: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes behind a node's inputs, moves looked through; sizes are none."""
        known = self.read.get(n)
        if known is not None:
            return known
        out: dict[fx.Node, None] = {}
        for x in self.inputs(n):
            if not _has_tensor(x):
                continue
            out.update(dict.fromkeys(self.sources(x) if self.kind(x) == "move" else (x,)))
        self.read[n] = tuple(out)
        return self.read[n]

    def bytes(self, n: fx.Node) -> Size:
        return self.count(n) * _tensor(n).element_size()

    def count(self, n: fx.Node) -> Size:
        """Elements of a node's value; of several, of the first."""
        shape = _tensor(n).shape
        key = tuple(s if isinstance(s, int) else expression(s) for s in shape)
        if key not in self.elements:
            self.elements[key] = product(shape_of(_tensor(n)))
        return self.elements[key]


def _has_tensor(n: fx.Node) -> bool:
    value = n.meta.get("val")
    several = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(v, torch.Tensor) for v in several)


def _tensor(n: fx.Node) -> torch.Tensor:
    value = n.meta["val"]
    return value if isinstance(value, torch.Tensor) else next(v for v in value if isinstance(v, torch.Tensor))


def outside(gm: fx.GraphModule, found: Collection[Found]) -> LayerWork:
    """The work of a graph outside of the attentions that were found in it, with its sizes as they are: open or not."""
    g = _Graph(gm.graph, {f.output: f for f in found}, weights_of(gm.graph))
    made = _products(g)
    groups = _groups(g)
    passes = [_pass(g, members, made) for members in groups]
    return LayerWork(
        _counted(_side_by_side(g, made)), _counted(p for p in passes if p is not None), _counted(_sums(g, made, groups)),
        _weights(g, gm, made),
    )


def _counted(values: Iterable[T]) -> tuple[tuple[T, int], ...]:
    return tuple(Counter(values).items())


# --- products ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """A product of the graph: its shape, the node of what it is applied to, and of its weights, if it has any."""

    shape: LayerProduct
    given: fx.Node
    weights: fx.Node | None


def _products(g: _Graph) -> dict[fx.Node, _Made]:
    """Every product that is alive, with how tensor parallelism divides it."""
    out: dict[fx.Node, _Made] = {}
    spread: set[fx.Node] = set()
    for n in g.alive:
        kind = g.kind(n)
        if kind in ("attention", "work"):
            if any(s in spread for s in g.sources(n)):
                spread.add(n)
        elif kind == "product":
            made = _shape(g, n)
            divided = any(s in spread for s in g.sources(n) if g.kind(s) != "weight")
            cut = ""
            if not made.shape.weight:
                cut = COLUMNS if divided else ""
            elif divided:
                cut = INNER
            elif not _meets(g, n):
                cut = COLUMNS
            if cut == COLUMNS:
                spread.add(n)
            out[n] = replace(made, shape=replace(made.shape, cut=cut, last=_is_last(g, n), keys=g.of_keys(n)))
    return out


def _shape(g: _Graph, n: fx.Node) -> _Made:
    """A product's rows, inner dimension and columns: the weights, where there are some, are its right side."""
    name, a = op_name(n), arguments(n)
    if name in _CONVOLVED:
        left, right = _node(a["input"]), _node(a["weight"])
        kernel = shape_of(_tensor(right))
        rows = product([s for i, s in enumerate(shape_of(_tensor(n))) if i != 1])
        batch, inner, columns = 1, product(kernel[1:]), kernel[0]
    elif name == "einsum":
        left, right = _operands(n)
        batch, rows, inner, columns = _letters(str(a["equation"]), left, right)
    else:
        left, right = (_node(a[x]) for x in _SIDES[name])
        batch, rows, inner, columns = _sides(n, shape_of(_tensor(left)), shape_of(_tensor(right)))
    if left in g.weights and right not in g.weights:
        left, right, rows, columns = right, left, columns, rows
    known = right in g.weights
    experts = name in _GROUPED and len(_tensor(left).shape) == 2
    shape = LayerProduct(rows, inner, columns, batch, DTYPE_NAME[_tensor(n).dtype], known, experts)
    return _Made(shape, left, right if known else None)


def _sides(n: fx.Node, x: tuple[Size, ...], y: tuple[Size, ...]) -> tuple[Size, Size, Size, Size]:
    """Matrices, rows, inner dimension and columns of a product of two tensors of these shapes."""
    if op_name(n) in _LINEAR:
        return 1, product(x[:-1]), x[-1], product(y[:-1])
    if len(y) == 1:
        return 1, product(x[:-1]), x[-1], 1
    if op_name(n) in _GROUPED and len(x) == 2:
        return product(y[:-2]), x[0], x[1], y[-1]
    if len(y) == 2:
        return 1, product(x[:-1]), x[-1], y[-1]
    return product(shape_of(_tensor(n))[:-2]), (x[-2] if len(x) > 1 else 1), x[-1], y[-1]


def _operands(n: fx.Node) -> list[fx.Node]:
    given = arguments(n)["tensors"]
    return [x for x in given if isinstance(x, fx.Node)] if isinstance(given, (list, tuple)) else []


def _is_product(n: fx.Node) -> bool:
    """Is it a product of two matrices, or of many? A convolution by groups, and an einsum of more, are passes."""
    name = op_name(n)
    if name == "einsum":
        return len(_operands(n)) == 2 and "." not in str(arguments(n)["equation"])
    return name in PRODUCTS and (name not in _CONVOLVED or arguments(n).get("groups", 1) == 1)


_SIDES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(_LINEAR, ("input", "weight")), **dict.fromkeys(_MATRIX, ("self", "other")), "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"), "mv": ("self", "vec"), "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
    **dict.fromkeys(_GROUPED, ("self", "mat2")),
}


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node), value
    return value


def _letters(equation: str, left: fx.Node, right: fx.Node) -> tuple[Size, Size, Size, Size]:
    """Matrices, rows, inner dimension and columns of an einsum of two operands."""
    sides, _, out = equation.replace(" ", "").partition("->")
    first, _, second = sides.partition(",")
    size = dict(zip(first, shape_of(_tensor(left)))) | dict(zip(second, shape_of(_tensor(right))))
    both, one, other = (set(first) & set(second), set(first) - set(second), set(second) - set(first))

    def of(letters: Iterable[str]) -> Size:
        return product([size[x] for x in sorted(letters)])

    return of(both & set(out)), of(one), of(both - set(out)), of(other)


def _meets(g: _Graph, start: fx.Node) -> bool:
    """Are all columns of a product needed at once before the next product, by a norm, a softmax or a top-k over them?"""
    seen, stack = {start}, list(start.users)
    while stack:
        n = stack.pop()
        if n in seen or not _has_tensor(n) or n in g.found or _is_product(n):
            continue
        seen.add(n)
        name = op_name(n)
        if name in ACROSS:
            return True
        if name in MOVES and name not in _PARTS and _regroups(n):
            continue
        stack.extend(n.users)
    return False


_PARTS = frozenset(("chunk", "split", "split_with_sizes", "getitem", "slice", "narrow", "cat"))


def _regroups(n: fx.Node) -> bool:
    """Does a view end in another last dimension than it is given: channels cut into heads?"""
    given = next((x for x in n.all_input_nodes if _has_tensor(x)), None)
    last = (_tensor(n).shape or (1,))[-1]
    return given is not None and str(last) != str((_tensor(given).shape or (1,))[-1])


def _is_last(g: _Graph, start: fx.Node) -> bool:
    """Do a product's rows leave the model as they are, each by itself?"""
    seen, stack = {start}, list(start.users)
    while stack:
        n = stack.pop()
        if n in seen or n.op == "output" or not _has_tensor(n):
            continue
        if g.kind(n) != "move" and (g.kind(n) != "work" or len(g.sources(n)) != 1):
            return False
        seen.add(n)
        stack.extend(n.users)
    return True


def _side_by_side(g: _Graph, made: Mapping[fx.Node, _Made]) -> Iterator[LayerProduct]:
    """Products of one input as one; of experts and of activations each by itself."""
    merged: dict[tuple[object, ...], LayerProduct] = {}
    for n, m in made.items():
        p = m.shape
        source = (m.given,) if g.kind(m.given) != "move" else g.sources(m.given)
        key = (*source, replace(p, columns=0)) if p.weight and not p.experts else (n,)
        merged[key] = replace(p, columns=merged[key].columns + p.columns) if key in merged else p
    yield from merged.values()


# --- passes -----------------------------------------------------------------------------------------------------------


def _groups(g: _Graph) -> list[list[fx.Node]]:
    """Nodes between products that are computed in one go: of one level, and connected."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(n: fx.Node) -> fx.Node:
        while parent[n] is not n:
            parent[n] = n = parent[parent[n]]
        return n

    for n in g.alive:
        kind = g.kind(n)
        if kind not in ("work", "product", "attention"):
            continue
        behind = [(s, g.level.get(s, 0) + (g.kind(s) in ("product", "attention"))) for s in g.sources(n)]
        g.level[n] = max((level for _, level in behind), default=0)
        if kind == "work":
            parent[n] = n
            for s, level in behind:
                if s in parent and level == g.level[n]:
                    parent[root(s)] = root(n)
    out: dict[fx.Node, list[fx.Node]] = {}
    for n in parent:
        out.setdefault(root(n), []).append(n)
    return list(out.values())


def _pass(g: _Graph, members: Sequence[fx.Node], made: Mapping[fx.Node, _Made]) -> Pass | None:
    """What a group reads and writes; None for one that makes nothing anybody reads, or all of it of nothing (positions)."""
    own = set(members)
    reads: dict[fx.Node, Size] = {}
    written: Size = 0
    cut = False
    for n in members:
        for i, s in enumerate(g.sources(n)):
            if s in own:
                continue
            few = (op_name(n) in GATHERS and i == 0) or s in g.tokens
            reads[s] = g.bytes(n) if few else g.bytes(s)
            cut |= s in made and made[s].shape.cut == COLUMNS
        if any(u not in own for u in _readers(g, n)):
            written = written + g.bytes(n)
    keys = any(map(g.of_keys, members))
    return Pass(sum(reads.values(), 0), written, cut, keys) if written != 0 and reads else None


def _readers(g: _Graph, n: fx.Node) -> Iterator[fx.Node]:
    """Who reads a node through moves; attentions by what they are given."""
    seen, stack = set(), [n]
    while stack:
        for u in stack.pop().users:
            if u in seen or u not in g.living:
                continue
            seen.add(u)
            if g.kind(u) == "move" and u not in g.given:
                stack.append(u)
            else:
                yield u


def _sums(g: _Graph, made: Mapping[fx.Node, _Made], groups: Sequence[Sequence[fx.Node]]) -> Iterator[Size]:
    """Bytes of what meets behind products that are cut along their inner dimension: once where one pass adds several."""
    group = {n: i for i, members in enumerate(groups) for n in members}
    done: set[tuple[int, Size]] = set()
    for n, m in made.items():
        if m.shape.cut != INNER:
            continue
        size = g.bytes(g.tokens.get(n, n))
        where = next((group[u] for u in _readers(g, n) if u in group), -1)
        if where < 0 or (where, size) not in done:
            done.add((where, size))
            yield size


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights(g: _Graph, gm: fx.GraphModule, made: Mapping[fx.Node, _Made]) -> tuple[Weights, ...]:
    """Every parameter once, by what it is for."""
    use: dict[int, tuple[bool, bool]] = {}
    for m in made.values():
        for p in _parameters(m.weights, gm) if m.weights is not None else ():
            narrow, cut = use.get(id(p), (True, True))
            use[id(p)] = (narrow and not m.shape.last, cut and bool(m.shape.cut))
    for n in g.alive:
        if op_name(n) == "embedding":
            for p in _parameters(_node(arguments(n)["weight"]), gm):
                use[id(p)] = (False, True)
    total: Counter[tuple[int, bool, bool]] = Counter()
    for p in gm.parameters():
        total[p.element_size(), *use.get(id(p), (False, False))] += p.numel()
    return tuple(Weights(n, width, narrow, cut) for (width, narrow, cut), n in total.items())


def _parameters(n: fx.Node, gm: fx.GraphModule) -> Iterator[nn.Parameter]:
    """The parameters that a node is made of."""
    stack = [n]
    while stack:
        x = stack.pop()
        value = attribute(gm, str(x.target)) if x.op == "get_attr" else None
        if isinstance(value, nn.Parameter):
            yield value
        stack.extend(x.all_input_nodes)
