"""What a cascade means: `evaluate` runs it in plain torch, and is the oracle of every lift, replacement and kernel.

It is written for plainness, not speed: every Einsum is computed whole, one after another, and iterative ranks in a
Python loop. The short cuts: a sum of products goes to `torch.einsum`, and a membership is scattered, before either is
expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from torch import Tensor

from . import expr as ex
from .cascade import IDENTITY, Cascade, Einsum, Size, bind
from .expr import Expr
from .membership import membership
from .operators import OPERATORS

DTYPE: Mapping[str, torch.dtype] = {
    "b1": torch.bool, "u8": torch.uint8, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
}
DTYPE_NAME: Mapping[torch.dtype, str] = {v: k for k, v in DTYPE.items()}

_FUNCTION: Mapping[str, Callable[..., Tensor]] = {o.name: o.in_torch(torch) for o in OPERATORS.values()}
_REDUCE: Mapping[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "add": lambda t, d: t.sum(d), "max": lambda t, d: t.amax(d), "min": lambda t, d: t.amin(d),
    "mul": lambda t, d: _product(t, d), "or": lambda t, d: _any(t, d), "and": lambda t, d: ~_any(~t, d),
}


def _product(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    for d in sorted(dims, reverse=True):
        t = t.prod(d)
    return t


def _any(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    for d in sorted(dims, reverse=True):
        t = t.any(d)
    return t


def infer_sizes(c: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Bind symbolic sizes from the shapes of the input tensors.

    Raises ValueError when a tensor is missing, a shape contradicts the cascade, or a symbol stays unbound.
    """
    known = dict(sizes or {})
    later: list[tuple[str, int, Size, int]] = []
    for t in c.inputs:
        if t.name not in tensors:
            raise ValueError(f"cascade {c.name!r} needs tensor {t.name}; given {', '.join(sorted(tensors))}")
        shape = tensors[t.name].shape
        if len(shape) != len(t.shape):
            raise ValueError(f"{t.name} has {len(shape)} dimensions, the cascade has {len(t.shape)}")
        for d, (size, actual) in enumerate(zip(t.shape, shape, strict=True)):
            if isinstance(size, sympy.Symbol):
                known.setdefault(str(size), actual)
            later.append((t.name, d, size, actual))
    for name, d, size, actual in later:
        size = bind(size, known)
        if not isinstance(size, int):
            size = _solve(size, actual, known)
        if isinstance(size, int) and size != actual:
            raise ValueError(f"{name} has {actual} elements in dimension {d}, the cascade says {size}")
    missing = [n for n in c.free_symbols if n not in known]
    if missing:
        raise ValueError(f"cascade {c.name!r}: no value for size {', '.join(missing)}")
    return known


def _solve(size: sympy.Expr, actual: int, known: dict[str, int]) -> Size:
    if len(size.free_symbols) == 1:
        (s,) = size.free_symbols
        roots = sympy.solve(size - actual, s)
        if len(roots) == 1 and roots[0].is_Integer:
            known[str(s)] = int(roots[0])
            return actual
    return size


class _Evaluation:
    """Values of terms over an ordered list of ranks; every value has one dimension a rank, of size 1 where constant."""

    def __init__(
        self, order: Sequence[str], extent: Mapping[str, int], at: Mapping[str, int], tensors: Mapping[str, Tensor],
        widen: bool, device: torch.device,
    ) -> None:
        self.order, self.extent, self.at, self.tensors = list(order), extent, at, tensors
        self.widen, self.device = widen, device
        self.memo: dict[Expr, Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float64 if self.widen and name in ex.FLOATS else DTYPE[name]

    def __call__(self, root: Expr) -> Tensor:
        for e in ex.walk(root):
            if e not in self.memo:
                self.memo[e] = self.step(e)
        return self.memo[root]

    def scalar(self, value: ex.Scalar, dtype: str) -> Tensor:
        # by way of float64: what a narrow type cannot hold becomes infinite there instead of raising
        made = torch.float64 if dtype in ex.FLOATS else self.dtype(dtype)
        return torch.full([1] * len(self.order), value, dtype=made, device=self.device).to(self.dtype(dtype))

    def step(self, e: Expr) -> Tensor:
        args = [self.memo[a] for a in e.args]
        match e.op:
            case "const":
                return self.scalar(e.value, e.dtype)
            case "index":
                name = str(e.attr)
                if name in self.at:
                    return self.scalar(self.at[name], "i64")
                shape = [1] * len(self.order)
                shape[self.order.index(name)] = self.extent[name]
                return torch.arange(self.extent[name], device=self.device).reshape(shape)
            case "load":
                return self.load(e)
            case "cast":
                return args[0].to(self.dtype(e.dtype))
            case "where":
                want = self.dtype(e.dtype)
                return torch.where(args[0].bool(), args[1].to(want), args[2].to(want))
            case "isnan" | "isinf":
                return _FUNCTION[e.op](args[0])
        if e.op not in ex.COMPARISONS:
            args = [a.to(self.dtype(e.dtype)) for a in args]
        return _FUNCTION[e.op](*args)

    def load(self, e: Expr) -> Tensor:
        """A read of a tensor. Coordinates outside it are clamped: a `where` around the read never selects those."""
        data = self.tensors[str(e.attr)]
        names = [str(i.attr) if i.op == "index" and str(i.attr) not in self.at else "" for i in e.args]
        used = [n for n in names if n]
        plain = len(set(used)) == len(used) and all(
            (n and self.extent[n] == data.shape[d]) or i.op == "const" for d, (n, i) in enumerate(zip(names, e.args))
        )
        if plain:
            for d in reversed(range(len(names))):
                if not names[d]:
                    data = data.select(d, int(e.args[d].value))
            data = data.permute([used.index(r) for r in self.order if r in used])
            return data.reshape([self.extent[r] if r in used else 1 for r in self.order])
        where = [self.memo[i].clamp(0, data.shape[d] - 1) for d, i in enumerate(e.args)]
        return data[tuple(where)] if where else data.reshape([1] * len(self.order))


def evaluate(
    c: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int] | None = None, *, widen: bool = False
) -> dict[str, Tensor]:
    """Run the cascade and return its outputs by name.

    `tensors` holds every input under its name, in the cascade's shape. With `widen`, inputs, literals and every cast to
    a float type are float64 (mask fill values keep the number that was written): the reference for kernels.
    """
    known = infer_sizes(c, tensors, sizes)
    c = c.with_sizes(known)
    extent = {r.name: _integer(r.size, r.name) for r in c.ranks}
    values = {t.name: tensors[t.name] for t in c.inputs}
    if widen:
        values = {n: v.double() if v.is_floating_point() else v for n, v in values.items()}
    device = next(iter(values.values())).device if values else torch.device("cpu")
    iterative = {r.name for r in c.ranks if r.iterative}
    position = 0
    while position < len(c.einsums):
        loop = c.einsums[position].ranks & iterative
        if not loop:
            _run(c, c.einsums[position], extent, {}, values, widen, device)
            position += 1
            continue
        group: list[Einsum] = []
        while position < len(c.einsums) and c.einsums[position].ranks & iterative:
            group.append(c.einsums[position])
            position += 1
        (name,) = frozenset().union(*(e.ranks for e in group)) & iterative
        for step in range(extent[name]):
            for e in group:
                _run(c, e, extent, {name: step}, values, widen, device)
    return {o: values[o] for o in c.outputs}


def _integer(size: Size, rank: str) -> int:
    if not isinstance(size, int):
        raise ValueError(f"rank {rank} has no value for its size {size}")
    return size


def _run(
    c: Cascade, e: Einsum, extent: Mapping[str, int], at: Mapping[str, int], values: dict[str, Tensor], widen: bool,
    device: torch.device,
) -> None:
    plain = [str(i.attr) for i in e.out.index if i.op == "index" and str(i.attr) not in at]
    order = plain + list(e.over)
    order += sorted(e.ranks - set(order) - set(at))
    terms = _Evaluation(order, extent, at, values, widen, device)
    shape = [extent[r] for r in order]
    if e.op is None:
        out = terms(e.body).expand(shape)
    elif (product := _sum_of_products(e, terms)) is not None:
        out = product
    elif (members := _members(e, terms)) is not None:
        out = members
    else:
        dims = tuple(order.index(r) for r in e.over)
        if any(extent[r] == 0 for r in e.over):
            out = torch.full([extent[r] for r in order if r not in e.over], IDENTITY[e.op], device=device)
        else:
            out = _REDUCE[e.op](terms(e.body).expand(shape), dims)
    out = out.to(terms.dtype(c.tensor[e.out.tensor].dtype))
    declared = [_integer(s, e.out.tensor) for s in c.tensor[e.out.tensor].shape]
    if len(plain) == len(e.out.index) and list(out.shape) == declared:
        values[e.out.tensor] = out
        return
    if e.out.tensor not in values:
        values[e.out.tensor] = torch.full(declared, float("nan"), device=device).to(out.dtype)
    if any(i.op != "index" and i.ranks - set(at) for i in e.out.index):
        _scatter(values[e.out.tensor], [terms(i) for i in e.out.index], out, [r not in e.over for r in order])
        return
    key: list[int | slice | Tensor] = []
    for i in e.out.index:
        name = str(i.attr)
        key.append(slice(0, extent[name]) if i.op == "index" and name not in at else int(terms(i).item()))
    values[e.out.tensor][tuple(key)] = out


def _scatter(target: Tensor, where: list[Tensor], out: Tensor, kept: list[bool]) -> None:
    """Write at computed coordinates (`A[m1·M0 + m0]`); what lies beyond the end, in a ragged last tile, is dropped."""
    points = [w.reshape([n for n, k in zip(w.shape, kept) if k]).expand(out.shape).reshape(-1) for w in where]
    inside = torch.ones_like(points[0], dtype=torch.bool)
    for w, size in zip(points, target.shape):
        inside &= (w >= 0) & (w < size)
    target[tuple(w[inside] for w in points)] = out.reshape(-1)[inside]


def _members(e: Einsum, terms: _Evaluation) -> Tensor | None:
    """`or_j (T[…,j] = m)`: true at the indices, of which those outside are nobody's."""
    found = membership(e)
    if found is None or e.ranks & set(terms.at):
        return None
    order, size = terms.order, terms.extent[found.place]
    shape = [terms.extent[r] for r in order]
    m, j = order.index(found.place), order.index(found.slot)
    # the slots lie along the last of the order, what is looked for has size 1
    slots = terms(found.slots).expand([1 if d == m else n for d, n in enumerate(shape)])
    slots = slots.movedim((m, j), (-2, -1)).squeeze(-2)
    inside = (slots >= 0) & (slots < size)
    spare = torch.zeros((*slots.shape[:-1], size + 1), dtype=torch.bool, device=terms.device)
    out = spare.scatter_(-1, slots.where(inside, size), True)[..., :size]
    return out.movedim(-1, m)


def _sum_of_products(e: Einsum, terms: _Evaluation) -> Tensor | None:
    """`Σ a·b·…` by torch.einsum, each factor over its own ranks."""
    if e.op != "add" or e.body.op != "mul" or not e.body.is_float:
        return None
    factors: list[Expr] = []
    stack = [e.body]
    while stack:
        x = stack.pop()
        if x.op == "mul" and x.dtype == e.body.dtype:
            stack.extend(x.args)
        else:
            factors.append(x)
    letter = {r: chr(ord("a") + i) for i, r in enumerate(terms.order)}
    want = terms.dtype(e.body.dtype)
    operands, specs = [], []
    for f in factors:
        used = [r for r in terms.order if r in f.ranks]
        operands.append(terms(f).to(want).expand([terms.extent[r] if r in used else 1 for r in terms.order]).reshape(
            [terms.extent[r] for r in used]
        ))
        specs.append("".join(letter[r] for r in used))
    kept = [r for r in terms.order if r not in e.over]
    missing = [r for r in terms.order if not any(r in f.ranks for f in factors)]
    if missing:
        operands.append(torch.ones([terms.extent[r] for r in missing], dtype=want, device=terms.device))
        specs.append("".join(letter[r] for r in missing))
    return torch.einsum(f"{','.join(specs)}->{''.join(letter[r] for r in kept)}", *operands)
