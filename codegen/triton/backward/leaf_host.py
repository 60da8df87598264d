"""Prints the host's side of leaves: room for what reaches each wanted one, and its sum over what the tensor lacks.

A tensor that is read at whole ranks is summed over the others; one that is looked up is added up place by place, in the same
order every time.
"""

from __future__ import annotations

from ....patterns import expr as ex
from ....patterns.cascade import Size, size_term
from ....patterns.expr import Expr
from ...forms.operands import Names
from ...text.print_torch import TorchBody
from .. import entry
from .form import LeafGradient, StreamingBackward
from .names import BackwardNames


def room(b: StreamingBackward, names: BackwardNames, first: str) -> list[str]:
    """Lines that say which leaves are wanted, and make room for what reaches them."""
    if not b.leaves:
        return []
    places = [b.s.inputs.index(str(x.load.attr)) for x in b.leaves]
    shapes = ", ".join(entry.tuple_text(entry.size_text(b.s.extent[r], names) for r in x.ranks) for x in b.leaves)
    return [
        f"    leaf_bits = {' | '.join(f'({i} in wanted) << {n}' for n, i in enumerate(places))}",
        f"    leaves = room(leaf_bits, ({shapes},), {first}.device)",
    ]


def direct(b: StreamingBackward, names: BackwardNames) -> list[str]:
    """Lines that add the wanted gradients to `parts`."""
    out = []
    for n, x in enumerate(b.leaves):
        at = b.s.inputs.index(str(x.load.attr))
        if _is_direct(b, x):
            held = [str(i.attr) for i in x.load.args if not i.is_const]
            lacking = [r for r in x.ranks if r not in held]
            left = [r for r in x.ranks if r in held]
            order = entry.tuple_text(str(left.index(r)) for r in held)
            place = entry.tuple_text(str(int(i.value)) if i.is_const else "None" for i in x.load.args)
            summed = entry.tuple_text(str(x.ranks.index(r)) for r in lacking)
            part = f"(leaves[{n}], {summed}, {order}, {place})"
        else:
            tensor = names.operands[str(x.load.attr)].name
            own = ", ".join(names.operands[t].name for t in b.s.inputs)
            sizes = "".join(f", {names.symbols[s]}" for s in b.s.cascade.free_symbols)
            part = f"(looked_up(leaves[{n}], read_at_{n}({own}{sizes}), {tensor}), (), {_same(x)}, {_whole(x)})"
        out += [f"if leaf_bits >> {n} & 1:", f"    parts.setdefault({at}, []).append({part})"]
    return out


def _same(x: LeafGradient) -> str:
    return entry.tuple_text(str(d) for d in range(len(x.load.args)))


def _whole(x: LeafGradient) -> str:
    return entry.tuple_text("None" for _ in x.load.args)


def looked_up(b: StreamingBackward, names: BackwardNames) -> list[str]:
    """Functions that answer where the elements of a leaf are read, over what was gathered of it."""
    s = b.s
    tensors = {t: names.operands[t].name for t in s.inputs}
    own = [*tensors.values(), *(names.symbols[n] for n in s.cascade.free_symbols)]
    out = []
    for n, x in enumerate(b.leaves):
        if _is_direct(b, x):
            continue
        text = Names(s.attention.cascade, tensors, names.symbols, f"{tensors[str(x.load.attr)]}.device")
        ranks = {ex.index(r): text.axis(text.rank(r), len(x.ranks) - 1 - d) for d, r in enumerate(x.ranks)}
        shape = s.attention.cascade.tensor[str(x.load.attr)].shape
        at = [_inside(i, size) for i, size in zip(x.load.args, shape)]
        body = TorchBody(text.scope(ranks, "f32", False), at)
        places = [body.term(i) for i in at]
        doc = f'    """Where the elements of {tensors[str(x.load.attr)]} are read."""'
        head = [f"def read_at_{n}({', '.join(own)}):", doc]
        out.append("\n".join([*head, *body.lines, f"    return {entry.tuple_text(places)}"]))
    return out


def _inside(i: Expr, size: Size) -> Expr:
    """A coordinate that stays in its tensor: what a mask hides may be read from anywhere."""
    return i if i.is_const else ex.minimum(ex.maximum(i, 0), size_term(size) - 1)


def _is_direct(b: StreamingBackward, x: LeafGradient) -> bool:
    """Is a tensor read at whole ranks, each once, and at numbers?"""
    shape = b.s.attention.cascade.tensor[str(x.load.attr)].shape
    ranks = [str(i.attr) if i.op == "index" and b.s.extent.get(str(i.attr)) == n else "" for i, n in zip(x.load.args, shape)]
    read = [r for i, r in zip(x.load.args, ranks) if not i.is_const]
    return all(r in x.ranks for r in read) and len(set(read)) == len(read)
