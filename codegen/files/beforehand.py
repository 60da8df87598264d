"""What an attention reads and is computed before its kernel, as torch source.

    QK0[h,p,r] = Σ_e Q[b,h,p,e] · X[b,h,r,e]      →  torch.einsum("abd,acd->abc", Q[0], X[0])        in the model's own type
    N[h,p] = Σ_e Q[b,h,p,e]²                      →  (tile(Q, …) * tile(Q, …)).expand(…).sum((2,))
    IN[p,m] = or_j (T[p,j] = m)                   →  torch.zeros(…).scatter_(-1, T, True)
"""

from __future__ import annotations

import string

from ...cost_model.operations import contraction, factors
from ...patterns import expr as ex
from ...patterns.cascade import Einsum
from ...patterns.expr import Expr
from ...patterns.membership import Membership, membership
from ..forms.operands import Heads, Names, element_type, operand
from ..forms.terms import uncast
from ..text.print_torch import TYPES, TorchBody
from ..text.printer import PrintError

# Operands stand by themselves here: no rank of theirs is the head of a kernel.
ALONE = Heads((), "", 1)
REDUCE = {"add": "sum", "max": "amax", "min": "amin"}


def einsum(names: Names, real: str, e: Einsum) -> str:
    """An Einsum that is computed beforehand, whole, over all its coordinates."""
    if (found := membership(e)) is not None:
        return _members(names, e, found)
    parts = operands_of(e)
    return _reduced(names, real, e) if parts is None else _product(names, real, e, parts)


def operands_of(e: Einsum) -> tuple[Expr, ...] | None:
    """The factors of a contraction that torch's products take; None where it is computed element by element."""
    parts = contraction(e)
    if parts is None or len(e.ranks) > len(string.ascii_letters) or any(i.op != "index" for i in e.out.index):
        return None
    return parts if frozenset().union(*(f.ranks for f in parts)) == e.ranks else None


def made_type(e: Einsum, real: str) -> str:
    """The type in which it lies in memory: products and integers have that of the model's, all else is in `real`."""
    return e.body.dtype if operands_of(e) is not None or _counts(e) else real


def _counts(e: Einsum) -> bool:
    return e.body.dtype in ex.INTEGERS or membership(e) is not None


def _members(names: Names, e: Einsum, found: Membership) -> str:
    order = [*found.rows, found.slot]
    text, _, _ = operand(found.slots, order, ALONE, names, "f32")
    index = text if found.slots.dtype == "i64" else f"{text}.to(torch.int64)"
    # who names no key that there is marks a column behind the last one
    end = names.rank(found.place)
    index = f"torch.where(({index} >= 0) & ({index} < {end}), {index}, {end})"
    shape = ", ".join([*(names.rank(r) for r in found.rows), f"{end} + 1"])
    device = names.tensors[str(found.slots.attr)]
    missing = [r for r in found.rows if r not in found.slots.ranks]
    if missing:
        index += f".expand({', '.join(names.rank(r) if r in missing else '-1' for r in order)})"
    made = f"torch.zeros({shape}, dtype=torch.bool, device={device}.device).scatter_(-1, {index}, True)[..., :-1]"
    declared, own = [str(i.attr) for i in e.out.index], [*found.rows, found.place]
    return made if own == declared else f"{made}.permute({', '.join(str(own.index(r)) for r in declared)})"


def _product(names: Names, real: str, e: Einsum, parts: tuple[Expr, ...]) -> str:
    order = [*(str(i.attr) for i in e.out.index), *e.over]
    letter = dict(zip(order, string.ascii_letters))
    texts, kinds = [], []
    for f in _merged(parts):
        own = [r for r in order if r in f.ranks]
        f = uncast(f)
        text, _, _ = operand(f, own, ALONE, names, real)
        texts.append(text if element_type(f, real) == e.body.dtype else f"{text}.to({TYPES[e.body.dtype]})")
        kinds.append("".join(letter[r] for r in own))
    out = "".join(letter[r] for r in order if r not in e.over)
    text = f'torch.einsum("{",".join(kinds)}->{out}", {", ".join(texts)})'
    scalars = [f for f in factors(e.body) if not f.ranks]
    body = TorchBody(names.scope({}, real), scalars)
    return " * ".join([text, *(body.named(f) for f in scalars)])


def _merged(parts: tuple[Expr, ...]) -> list[Expr]:
    """The factors, those that vary over no more ranks than another multiplied into that."""
    out: list[Expr] = []
    for f in sorted(parts, key=lambda x: -len(x.ranks)):
        at = next((i for i, x in enumerate(out) if f.ranks <= x.ranks and (len(out) > 1 or f.ranks < x.ranks)), None)
        if at is None or len(parts) == 2:
            out.append(f)
        else:
            out[at] = out[at] * f
    return out


def _reduced(names: Names, real: str, e: Einsum) -> str:
    order = [*(str(i.attr) for i in e.out.index), *e.over]
    at = {ex.index(r): names.axis(names.rank(r), len(order) - 1 - d) for d, r in enumerate(order)}
    body = TorchBody(names.scope(at, real), [])
    # an index that is added up stays one
    text = body.term(e.body) if _counts(e) else body.real(e.body)
    shape = ", ".join(names.rank(r) for r in order)
    if e.op is None:
        return f"({text}).expand({shape})"
    if e.op not in REDUCE:
        raise PrintError(f"{e.out.tensor} is reduced by {e.op}")
    return f"({text}).expand({shape}).{REDUCE[e.op]}({tuple(range(len(order) - len(e.over), len(order)))})"
