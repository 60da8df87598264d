"""Passes and forms of a cascade as plain data: what a plan stores and a report prints.

    describe(c)["families"]   one entry a rank family: passes, per input, per tensor, footprint, choices with their bytes
    describe(c)["forms"]      the best form for each number of passes over the key family: rewrites, conditions, state
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...patterns.cascade import Cascade, Size
from ...patterns.passes.rewrites import Family
from .footprint import Choice, choices, revisited, setting
from .passes import families, levels, report
from .search import CascadeForm, search


def describe(
    c: Cascade, sizes: Mapping[str, int] | None = None, *, query: str | None = None, rows: int = 128,
    width: int | None = None, family: Family | None = None,
) -> dict[str, Any]:
    """Passes, footprints, choices and forms of a cascade, as dictionaries, lists, strings and integers.

    `rows` query rows are held at a time, over the rank `query` (the last but one of the first output unless given);
    `family` is the one whose forms are searched (the one with most passes unless given). Sizes that are not given stay
    symbolic, as text. Raises KeyError for a rank that the cascade lacks.
    """
    known = [report(c, f) for f in families(c)]
    wanted = family or max(known, key=lambda r: (r.count, -len(r.family))).family if known or family else None
    return {
        "cascade": c.name,
        "families": [_family(c, r.family, sizes, query or _query(c, r.family), rows, width) for r in known],
        "forms": [] if wanted is None else _forms(c, wanted),
    }


def _query(c: Cascade, family: Family) -> str:
    """The rank of the first output, outside the family, that is written last but one (or last, if it is the only one)."""
    (*_, last) = c.producers[c.outputs[0]]
    ranks = [r for i in last.out.index for r in [str(i.attr)] if i.op == "index" and r not in family]
    return ranks[-2] if len(ranks) > 1 else ranks[0] if ranks else family[0]


def _family(
    c: Cascade, family: Family, sizes: Mapping[str, int] | None, query: str, rows: int, width: int | None
) -> dict[str, Any]:
    passes = report(c, family)
    g = setting(c, family, query, rows, sizes, width)
    found = choices(g)
    return {
        "ranks": list(family),
        "passes": passes.count,
        "inputs": dict(passes.inputs),
        "levels": {c.einsums[i].out.tensor: n for i, n in levels(c, family).items()},
        "footprint": _plain(g.sizes.of(passes.footprint)),
        "rows": rows,
        "revisited": [
            {
                "tensor": r.tensor, "made": r.made, "read": list(r.read),
                "choices": [_choice(x) for x in found if x.tensor == r.tensor],
            }
            for r in revisited(c, family)
        ],
    }


def _choice(x: Choice) -> dict[str, Any]:
    numbers = {"held_bytes": x.held_bytes, "moved_bytes": x.moved_bytes, "flops": x.flops, "exps": x.exps}
    return {"how": x.how, **{k: _plain(v) for k, v in numbers.items()}}


def _forms(c: Cascade, family: Family) -> list[dict[str, Any]]:
    found = search(c, family)
    return [_form(f, f is found.best) for f in found.forms]


def _form(f: CascadeForm, best: bool) -> dict[str, Any]:
    return {
        "ranks": list(f.family),
        "passes": f.passes,
        "state": _plain(f.state),
        "best": best,
        "rewrites": [
            {"name": s.rewrite, "before": s.before, "after": s.after, "conditions": list(s.conditions)} for s in f.steps
        ],
    }


def _plain(n: Size) -> int | str:
    return int(n) if isinstance(n, int) or n.is_Integer else str(n)
