"""Cutting one operator: which positions of its inputs give the wanted positions of its output.

    softmax(x, -1), rows 3 and 9 wanted      →  rows 3 and 9 of x, every column
    a [P, E] @ b [E, M], rows 3 and 9        →  rows 3 and 9 of a, all of b

An operator without a rule is computed whole, and its output is cut. That is always right, and dear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.dropout import draws_at
from ..graph.torch_private import OpOverload, schema
from .demand import Demand, Picked, everything, groups, kept, positions, ravelled, unravelled

Given = dict[str, Any]
Run = Callable[[Given], Any]
Wants = Any
# What is asked of an argument that lends its type or device alone.
ANYTHING = "anything"


@dataclass(frozen=True)
class PlacedOperator:
    """An operator where it stands: arguments by name, fake values of the tensors, and what is wanted of its output."""

    target: OpOverload
    given: Mapping[str, Any]
    values: Mapping[fx.Node, Tensor]
    out: tuple[int, ...]
    wanted: Demand

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shape_of(self.given[name])

    def shape_of(self, n: fx.Node) -> tuple[int, ...]:
        return tuple(self.values[n].shape)

    def dim(self, name: str = "dim", count: int | None = None) -> int:
        """A dimension that an argument names, counted from the front."""
        d = int(self.given[name])
        return d + (len(self.out) if count is None else count) if d < 0 else d

    @property
    def tensors(self) -> list[str]:
        return [n for n, v in self.given.items() if isinstance(v, fx.Node) and v in self.values]


@dataclass(frozen=True)
class RowCut:
    """How the cut value is made: what is wanted of the arguments, by name (of a list: one by one), what of the output
    comes out, and, where it is not the operator itself on cut arguments, how."""

    wants: Mapping[str, Wants] = field(default_factory=dict)
    gives: Demand = ()
    run: Run | None = None


Rule = Callable[[PlacedOperator], RowCut]


def whole(p: PlacedOperator) -> RowCut:
    """Everything of every input gives everything of the output."""
    return RowCut({}, everything(p.out))


def spread(shape: Sequence[int], out: Sequence[int], wanted: Demand) -> Demand:
    """What an input that is broadcast to the output has to give."""
    lead = len(out) - len(shape)
    return tuple(None if n == 1 else wanted[lead + d] for d, n in enumerate(shape))


def point(p: PlacedOperator) -> RowCut:
    return RowCut({n: spread(p.shape(n), p.out, p.wanted) for n in p.tensors}, p.wanted)


def convert(p: PlacedOperator) -> RowCut:
    """`type_as` and `to` read no element of the other tensor."""
    return RowCut({"self": p.wanted, **{n: ANYTHING for n in p.tensors if n != "self"}}, p.wanted)


def without(demand: Demand, *dims: int) -> Demand:
    return tuple(None if d in dims else x for d, x in enumerate(demand))


def along(p: PlacedOperator) -> RowCut:
    """An operator that mixes one dimension: softmax, a running sum."""
    wanted = without(p.wanted, p.dim())
    return RowCut({"self": wanted}, wanted)


def reduce(p: PlacedOperator) -> RowCut:
    """A reduction over some dimensions, kept with one element or dropped."""
    shape = p.shape("self")
    given = p.given.get("dim")
    dims = range(len(shape)) if given is None or given == [] else given if isinstance(given, (list, tuple)) else [given]
    over = {d % max(len(shape), 1) for d in dims}
    keep = bool(p.given.get("keepdim"))
    rest = iter(p.wanted)
    wants: list[Picked | None] = []
    for d in range(len(shape)):
        if d in over:
            wants.append(None)
            if keep:
                next(rest)
        else:
            wants.append(next(rest))
    gives = without(p.wanted, *over) if keep else p.wanted
    return RowCut({"self": tuple(wants)}, gives)


def matmul(p: PlacedOperator) -> RowCut:
    names = [n for n in ("self", "other", "mat2", "batch1", "batch2", "mat1") if n in p.given]
    a, b = (p.shape(n) for n in _factors(names))
    if len(a) < 2 or len(b) < 2:
        return whole(p)
    left = spread((*a[:-2], 1, 1), p.out, p.wanted)[:-2]
    right = spread((*b[:-2], 1, 1), p.out, p.wanted)[:-2]
    first, second = _factors(names)
    wants: dict[str, Wants] = {first: (*left, p.wanted[-2], None), second: (*right, None, p.wanted[-1])}
    if first != "self":
        wants["self"] = spread(p.shape("self"), p.out, p.wanted)
    return RowCut(wants, p.wanted)


def _factors(names: Sequence[str]) -> tuple[str, str]:
    """matmul and bmm name them self and other or mat2; baddbmm and addmm add them to self."""
    if "batch1" in names:
        return "batch1", "batch2"
    return ("mat1", "mat2") if "mat1" in names else ("self", "other" if "other" in names else "mat2")


def linear(p: PlacedOperator) -> RowCut:
    wants: dict[str, Wants] = {"input": (*p.wanted[:-1], None)}
    if len(p.shape("weight")) != 2:
        return whole(p)
    wants["weight"] = (p.wanted[-1], None)
    if "bias" in p.tensors:
        wants["bias"] = (p.wanted[-1],)
    return RowCut(wants, p.wanted)


def einsum(p: PlacedOperator) -> RowCut:
    left, arrow, right = str(p.given["equation"]).replace(" ", "").partition("->")
    if not arrow or "." in left or p.given.get("path") is not None:
        return whole(p)
    at = dict(zip(right, p.wanted))
    repeated = [s for s in left.split(",") if len(set(s)) != len(s)]
    nodes = p.given["tensors"]
    # A dimension of one element is spread over the others'.
    wide: dict[str, int] = {}
    for spec, n in zip(left.split(","), nodes):
        for letter, size in zip(spec, p.shape_of(n)):
            wide[letter] = max(size, wide.get(letter, 1))
    if repeated:
        return whole(p)
    wants = tuple(
        tuple(None if size == 1 and wide[letter] > 1 else at.get(letter) for letter, size in zip(spec, p.shape_of(n)))
        for spec, n in zip(left.split(","), nodes)
    )
    return RowCut({"tensors": wants}, p.wanted)


def row_products(p: PlacedOperator) -> RowCut:
    """Products of rows over one dimension, broadcast against each other: `linalg_vecdot`, `cosine_similarity`."""
    d = p.dim(count=len(p.out) + 1)
    wanted: Demand = (*p.wanted[:d], None, *p.wanted[d:])
    full = tuple(max(n) for n in zip(*((1,) * (len(wanted) - len(s)) + s for s in map(p.shape, p.tensors))))
    return RowCut({n: spread(p.shape(n), full, wanted) for n in p.tensors}, p.wanted)


def inner(p: PlacedOperator) -> RowCut:
    """Every row of one with every row of the other."""
    rows = len(p.shape("self")) - 1
    if rows < 0 or not p.shape("other"):
        return whole(p)
    return RowCut({"self": (*p.wanted[:rows], None), "other": (*p.wanted[rows:], None)}, p.wanted)


def sdpa(p: PlacedOperator) -> RowCut:
    """Rows of queries; heads only where every query head has its own key head. Causal rows bring their positions along."""
    q, k = p.shape("query"), p.shape("key")
    if p.given["dropout_p"] != 0.0:
        return whole(p)
    wanted = (*p.wanted[:-1], None)
    if p.given.get("enable_gqa") and len(q) > 2:
        wanted = without(wanted, len(q) - 3)
    batch = spread((*k[:-2], 1, 1), p.out, wanted)[:-2]
    wants: dict[str, Wants] = {
        "query": (*spread((*q[:-2], 1, 1), p.out, wanted)[:-2], wanted[-2], None), "key": (*batch, None, None),
        "value": (*spread((*p.shape("value")[:-2], 1, 1), p.out, wanted)[:-2], None, None),
    }
    if "attn_mask" in p.tensors:
        mask = p.shape("attn_mask")
        wants["attn_mask"] = (*spread((*mask[:-1], 1), (*p.out[:-1], k[-2]), wanted)[:-1], None)
    rows = wanted[-2]
    if not p.given["is_causal"] or rows is None:
        return RowCut(wants, wanted)

    def causal(given: Given) -> Tensor:
        at = positions(rows, given["query"])
        keep = at[:, None] >= torch.arange(k[-2], device=at.device)
        out: Tensor = called(p.target, {**given, "attn_mask": keep, "is_causal": False})
        return out

    return RowCut(wants, wanted, causal)


def draws(p: PlacedOperator) -> RowCut:
    """Numbers that are counted by row and column are those of the wanted rows and columns."""

    def run(given: Given) -> Tensor:
        seed, rows, columns = given["seed"], None, None
        for d, (size, picked) in enumerate(zip(p.out, p.wanted)):
            at = torch.arange(size, device=seed.device) if picked is None else positions(picked, seed)
            at = at.view(-1, *[1] * (len(p.out) - 1 - d))
            if d == len(p.out) - 1:
                columns = at
            else:
                rows = at if rows is None else rows * size + at
        assert rows is not None
        assert columns is not None
        return draws_at(seed, rows, columns)

    return RowCut({"seed": None, "like": ANYTHING}, p.wanted, run)


# --- views --------------------------------------------------------------------------------------------------------


def unfold(p: PlacedOperator) -> RowCut:
    """Windows of one dimension, which is read whole; their places come last."""
    d = p.dim("dimension", len(p.out) - 1)
    return RowCut({"self": without(p.wanted[:-1], d)}, without(p.wanted, d, len(p.out) - 1))


def pad(p: PlacedOperator) -> RowCut:
    """Dimensions that are padded are read whole."""
    padded = {len(p.out) - 1 - k // 2 for k in range(len(p.given["pad"]))}
    return RowCut({"self": without(p.wanted, *padded)}, without(p.wanted, *padded))


def transpose(p: PlacedOperator) -> RowCut:
    a, b = (int(p.given[n]) % len(p.out) for n in (("dim0", "dim1") if "dim0" in p.given else ("axis0", "axis1")))
    order = list(range(len(p.out)))
    order[a], order[b] = b, a
    return _ordered(p, order)


def permute(p: PlacedOperator) -> RowCut:
    return _ordered(p, [d % len(p.out) for d in p.given["dims"]])


def matrix_transpose(p: PlacedOperator) -> RowCut:
    order = list(range(len(p.out)))
    order[-2:] = order[-2:][::-1]
    return _ordered(p, order)


def _ordered(p: PlacedOperator, order: Sequence[int]) -> RowCut:
    wants: list[Picked | None] = [None] * len(order)
    for d, source in enumerate(order):
        wants[source] = p.wanted[d]
    return RowCut({"self": tuple(wants)}, p.wanted)


def expand(p: PlacedOperator) -> RowCut:
    sizes = kept(p.out, p.wanted)
    wants = spread(p.shape("self"), p.out, p.wanted)
    return RowCut({"self": wants}, p.wanted, lambda given: given["self"].expand(sizes))


def reshape(p: PlacedOperator) -> RowCut:
    """Dimensions that go together are cut together: merged ones by gathering, without the merged tensor in memory."""
    shape = p.shape("self")
    if 0 in shape:
        return whole(p)
    wants: list[Picked | None] = [None] * len(shape)
    gathered: list[tuple[list[int], Picked]] = []
    for ins, outs in groups(shape, p.out):
        flat = ravelled([p.out[d] for d in outs], [p.wanted[d] for d in outs])
        real = [d for d in ins if shape[d] != 1]
        if flat is None:
            continue
        if len(real) == 1:
            wants[real[0]] = flat
        elif real:
            gathered.append((real, flat))
    sizes = kept(p.out, p.wanted)

    def run(given: Given) -> Tensor:
        x: Tensor = given["self"]
        for ins, flat in reversed(gathered):
            x = _gather(x, ins, unravelled(flat, [shape[d] for d in ins]))
        return x.reshape(sizes)

    return RowCut({"self": tuple(wants)}, p.wanted, run)


def _gather(x: Tensor, dims: Sequence[int], at: Sequence[Picked]) -> Tensor:
    """Some dimensions of a tensor read point by point: they become one, in the place of the first."""
    rest = [d for d in range(x.dim()) if d not in dims]
    first = sum(d < dims[0] for d in rest)
    read = x.permute([*dims, *rest])[tuple(positions(i, x) for i in at)]
    return read.movedim(0, first)


def unsqueeze(p: PlacedOperator) -> RowCut:
    d = p.dim()
    return RowCut({"self": p.wanted[:d] + p.wanted[d + 1 :]}, without(p.wanted, d))


def select(p: PlacedOperator) -> RowCut:
    d = p.dim(count=len(p.out) + 1)
    return RowCut({"self": (*p.wanted[:d], None, *p.wanted[d:])}, p.wanted)


def piece(p: PlacedOperator) -> RowCut:
    """`slice`: positions of what was sliced."""
    d, n = p.dim(), p.shape("self")[p.dim()]
    if isinstance(p.given["start"], fx.Node) or isinstance(p.given["step"], fx.Node):
        return whole(p)
    # where it ends does not move where it starts, and may be a size that is open
    start, _, step = slice(p.given["start"], None, int(p.given["step"])).indices(n)
    at = p.wanted[d]
    if at is None:
        return RowCut({"self": p.wanted}, p.wanted)
    there = tuple(start + i * step for i in at)
    return RowCut({"self": (*p.wanted[:d], there, *p.wanted[d + 1 :])}, p.wanted, lambda given: given["self"])


def cat(p: PlacedOperator) -> RowCut:
    wanted = without(p.wanted, p.dim())
    nodes = p.given["tensors"]
    fit = all(len(p.shape_of(n)) == len(p.out) for n in nodes)
    return RowCut({"tensors": tuple(wanted for _ in nodes)}, wanted) if fit else whole(p)


def parts(p: PlacedOperator) -> RowCut:
    """A tensor cut into several along a dimension: all of that one, and of the others what is wanted of any part."""
    wanted = without(p.wanted, p.dim())
    return RowCut({"self": wanted}, wanted)


def stack(p: PlacedOperator) -> RowCut:
    d = p.dim()
    each = p.wanted[:d] + p.wanted[d + 1 :]
    return RowCut({"tensors": tuple(each for _ in p.given["tensors"])}, without(p.wanted, d))


def repeat(p: PlacedOperator) -> RowCut:
    shape = p.shape("self")
    lead = len(p.out) - len(shape)
    cut = {d: tuple(i % shape[d - lead] for i in w) for d, w in enumerate(p.wanted) if w is not None and d >= lead}
    wants = tuple(cut.get(lead + d) for d in range(len(shape)))

    def run(given: Given) -> Tensor:
        # how often may be an open size, which is a number where the code runs
        often = enumerate(zip(p.wanted, given["repeats"], strict=True))
        out: Tensor = given["self"].repeat([1 if d in cut else len(w) if w is not None else int(r) for d, (w, r) in often])
        return out

    return RowCut({"self": wants}, p.wanted, run)


def repeat_interleave(p: PlacedOperator) -> RowCut:
    if p.given["dim"] is None or not isinstance(p.given["repeats"], int):
        return whole(p)
    d, times = p.dim(), p.given["repeats"]
    at = p.wanted[d]
    if at is None:
        return RowCut({"self": p.wanted}, p.wanted)
    there = tuple(i // times for i in at)
    return RowCut({"self": (*p.wanted[:d], there, *p.wanted[d + 1 :])}, p.wanted, lambda given: given["self"])


# --- tables and made tensors ----------------------------------------------------------------------------------------


def embedding(p: PlacedOperator) -> RowCut:
    return RowCut({"indices": p.wanted[:-1]}, without(p.wanted, len(p.out) - 1))


def index_select(p: PlacedOperator) -> RowCut:
    d = p.dim()
    return RowCut({"self": without(p.wanted, d), "index": (p.wanted[d],)}, p.wanted)


def gather(p: PlacedOperator) -> RowCut:
    return RowCut({"self": without(p.wanted, p.dim()), "index": p.wanted}, p.wanted)


def index(p: PlacedOperator) -> RowCut:
    """`x[:, i, j]`: the dimensions of the indices, broadcast, stand where the first of them stood."""
    shape, given = p.shape("self"), list(p.given["indices"])
    given += [None] * (len(shape) - len(given))
    at = [d for d, i in enumerate(given) if i is not None]
    if at != list(range(at[0], at[0] + len(at))):
        return whole(p)
    if any(p.values[given[d]].dtype in (torch.bool, torch.uint8) for d in at):
        return whole(p)
    first, many = at[0], len(p.out) - len(shape) + len(at)
    inner, shown = p.out[first : first + many], p.wanted[first : first + many]
    rest = iter((*p.wanted[:first], *p.wanted[first + many :]))
    wants = tuple(None if d in at else next(rest) for d in range(len(shape)))
    indices = tuple(spread(p.shape_of(i), inner, shown) if i is not None else None for i in p.given["indices"])
    return RowCut({"self": wants, "indices": indices}, p.wanted)


def triangle(p: PlacedOperator) -> RowCut:
    """`tril` and `triu` know rows and columns by their positions."""
    wanted = without(p.wanted, len(p.out) - 1)
    rows, lower = wanted[-2], "tril" in schema(p.target).name
    if rows is None:
        return RowCut({"self": wanted}, wanted)

    def run(given: Given) -> Tensor:
        x = given["self"]
        over = torch.arange(p.out[-1], device=x.device) - positions(rows, x)[:, None]
        keep = over <= given["diagonal"] if lower else over >= given["diagonal"]
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))

    return RowCut({"self": wanted}, wanted, run)


def made(p: PlacedOperator) -> RowCut:
    """`ones`, `full` and their like hold one value everywhere."""
    sizes = kept(p.out, p.wanted)
    return RowCut(dict.fromkeys(p.tensors, ANYTHING), p.wanted, lambda given: called(p.target, {**given, "size": sizes}))


# --- edits: other values at some places ------------------------------------------------------------------------------


def scatter(*named: str) -> Rule:
    """Slices and indices that are laid in: all of the dimensions that they name, which `src` has as well."""

    def rule(p: PlacedOperator) -> RowCut:
        wanted = without(p.wanted, *(p.dim(n) for n in named))
        return RowCut({"self": wanted, "src": wanted}, wanted)

    return rule


def select_scatter(p: PlacedOperator) -> RowCut:
    d = p.dim()
    wanted = without(p.wanted, d)
    return RowCut({"self": wanted, "src": wanted[:d] + wanted[d + 1 :]}, wanted)


def diagonal_scatter(p: PlacedOperator) -> RowCut:
    dims = {p.dim("dim1"), p.dim("dim2")}
    wanted = without(p.wanted, *dims)
    return RowCut({"self": wanted, "src": (*(w for d, w in enumerate(wanted) if d not in dims), None)}, wanted)


def diagonal(p: PlacedOperator) -> RowCut:
    dims = sorted(p.dim(n, len(p.out) + 1) for n in ("dim1", "dim2"))
    wants = list(p.wanted[:-1])
    for d in dims:
        wants.insert(d, None)
    return RowCut({"self": tuple(wants)}, without(p.wanted, len(p.out) - 1))


def index_fill(p: PlacedOperator) -> RowCut:
    wanted = without(p.wanted, p.dim())
    return RowCut({"self": wanted}, wanted)


def index_put(p: PlacedOperator) -> RowCut:
    """One number at some places: all of the dimensions that the indices are of."""
    if any(n != 1 for n in p.shape("values")):
        return whole(p)
    at, d = list[int](), 0
    for i in p.given["indices"]:
        kind = p.values[i].dtype if i is not None else None
        many = len(p.shape_of(i)) if kind in (torch.bool, torch.uint8) else 1
        at += range(d, d + many) if i is not None else ()
        d += many
    wanted = without(p.wanted, *at)
    return RowCut({"self": wanted, "indices": (None,) * len(p.given["indices"])}, wanted)


def several(p: PlacedOperator) -> RowCut:
    """A reduction with several outputs (`max` with its positions), or a sort: all of them are cut alike."""
    return reduce(p) if "keepdim" in p.given else along(p)


POINTS = (
    "clone", "contiguous", "detach", "alias", "masked_fill", "where", "rsub", "__and__", "__or__",
    "__xor__", "floor_divide", "lift_fresh_copy", "dropout", "zeros_like", "ones_like", "full_like", "expand_as", "isneginf",
    "feature_dropout",
)
# Operators with several outputs, each a part of their input.
PARTS = ("split", "split_with_sizes", "chunk")
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(POINTS, point), **dict.fromkeys(("to", "_to_copy", "type_as"), convert),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"), along),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), along),
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "logsumexp", "prod", "any", "all", "linalg_vector_norm", "norm", "nansum"), reduce
    ),
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm", "addmm"), matmul), "linear": linear, "einsum": einsum,
    **dict.fromkeys(("linalg_vecdot", "cosine_similarity"), row_products), "inner": inner, "unfold": unfold,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    "scaled_dot_product_attention": sdpa, "reattend::draws": draws,
    "transpose": transpose, "swapaxes": transpose, "permute": permute,
    "expand": expand, "unsqueeze": unsqueeze, "select": select, "slice": piece, "cat": cat, "concat": cat, "stack": stack,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"), reshape),
    **dict.fromkeys(("mT", "adjoint", "t", "numpy_T"), matrix_transpose),
    "repeat": repeat, "repeat_interleave": repeat_interleave, "embedding": embedding, "index_select": index_select,
    "gather": gather, "index": index, "tril": triangle, "triu": triangle,
    **dict.fromkeys(("ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "new_empty", "empty"), made),
    **dict.fromkeys(PARTS, parts),
    "slice_scatter": scatter("dim"), "select_scatter": select_scatter, "diagonal_scatter": diagonal_scatter,
    "diagonal": diagonal, "index_fill": index_fill, "index_put": index_put, "fill": point, "zero": point,
}
# Operators with several outputs that are cut alike.
SEVERAL = ("max", "min", "topk", "sort", "kthvalue", "median", "cummax", "cummin", "var_mean", "aminmax")
# Operators whose output shares its input's memory, or is taken to.
VIEWS = frozenset(
    ("transpose", "permute", "expand", "unsqueeze", "select", "slice", "view", "reshape", "flatten", "unflatten", "squeeze",
     "mT", "t", "adjoint", "detach", "alias", "swapaxes", "view_as", "reshape_as", "expand_as", "split", "chunk", "unbind",
     "movedim", "getitem", "unfold")
)


def rule_of(p: PlacedOperator, name: str) -> Rule:
    """The rule of an operator; without one it is computed whole."""
    if name in SEVERAL and "dim" in p.given:
        return several
    if "dtype" in p.given and name == "view":
        return whole
    found = RULES.get(name)
    if found is not None:
        return found
    return point if torch.Tag.pointwise in p.target.tags else whole


def called(target: OpOverload, given: Given) -> Any:
    """An operator called with arguments by name."""
    takes = schema(target).arguments
    args = [given[a.name] for a in takes if not a.kwarg_only]
    return target(*args, **{a.name: given[a.name] for a in takes if a.kwarg_only})
