"""Canonical names: ranks b, h, p, m, e, f and operands Q, K, V, so that equal attentions are equal texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Access, Cascade, Einsum

T = TypeVar("T")
_BATCH = ("b", "h", "g", "i", "j", "u", "v", "w")


def canonical(c: Cascade, leaves: Mapping[str, T]) -> tuple[Cascade, dict[str, T]]:
    """Rename ranks and inputs by the part they play; `leaves` keeps pace."""
    view = attention(c)
    assert isinstance(view, Attention), view
    ranks = {view.key: "m"}
    if view.query:
        ranks[view.query] = "p"
    if view.value:
        ranks[view.value] = "f"
    letters = iter(_BATCH)
    if len(view.batch) == 1:
        ranks[view.batch[0]] = "h"
    else:
        ranks.update(zip(view.batch, letters))
    for e in view.products:
        for r in e.over:
            ranks.setdefault(r, _free("e", ranks))
    for rank in c.ranks:
        ranks.setdefault(rank.name, _free("r", ranks))
    parts: dict[str, str] = {}
    for e in view.products:
        for load in ex.loads(e.body):
            name = str(load.attr)
            if name not in c.producers:
                letter = "K" if view.key in load.ranks else "Q"
                parts[name] = parts.get(name, "") + (letter if letter not in parts.get(name, "") else "")
    for load in ex.loads(view.values):
        parts[str(load.attr)] = parts.get(str(load.attr), "") + "V"
    tensors: dict[str, str] = {}
    for n, t in enumerate(c.inputs):
        # one tensor that is queries and keys would be called as the product is
        tensors[t.name] = _free(parts.get(t.name, f"X{n}"), dict.fromkeys([*tensors.values(), *c.producers]))
    return rename(c, ranks, tensors), {tensors.get(n, n): v for n, v in leaves.items()}


def _free(stem: str, taken: Mapping[str, object]) -> str:
    values = set(taken.values()) | set(taken)
    if stem not in values:
        return stem
    k = 2
    while f"{stem}{k}" in values:
        k += 1
    return f"{stem}{k}"


def rename(c: Cascade, ranks: Mapping[str, str], tensors: Mapping[str, str]) -> Cascade:
    """The same cascade under other names."""

    def go(root: ex.Expr) -> ex.Expr:
        def rule(e: ex.Expr, args: tuple[ex.Expr, ...]) -> ex.Expr | None:
            if e.op == "index":
                return ex.index(ranks.get(str(e.attr), str(e.attr)))
            if e.op == "load":
                return ex.load(tensors.get(str(e.attr), str(e.attr)), args, e.dtype)
            return None

        return ex.rebuild(root, rule)

    return replace(
        c,
        ranks=tuple(replace(r, name=ranks.get(r.name, r.name)) for r in c.ranks),
        tensors=tuple(replace(t, name=tensors.get(t.name, t.name)) for t in c.tensors),
        einsums=tuple(
            Einsum(
                Access(tensors.get(e.out.tensor, e.out.tensor), tuple(go(i) for i in e.out.index)),
                go(e.body),
                e.op,
                tuple(ranks.get(r, r) for r in e.over),
            )
            for e in c.einsums
        ),
        outputs=tuple(tensors.get(o, o) for o in c.outputs),
    )
