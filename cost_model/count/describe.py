"""Passes and forms of a cascade as plain data: what a plan stores and a report prints.

    describe(c)["families"]   one entry a rank family: passes, per input, per tensor, footprint, choices with their bytes
    describe(c)["forms"]      the best form for each number of passes over the key family: rewrites, conditions, state
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from ...patterns.cascade import Cascade, Size
from ...patterns.passes.rewrites import Family
from .footprint import Choice, choices, revisited, setting
from .passes import families, levels, report
from .search import CascadeForm, search


class ChoiceRow(TypedDict):
    """A way to have a tensor again; numbers are text where a size is open."""

    how: str
    held_bytes: int | str
    moved_bytes: int | str
    flops: int | str
    exps: int | str


class RevisitRow(TypedDict):
    tensor: str
    made: int
    read: list[int]
    choices: list[ChoiceRow]


class FamilyRow(TypedDict):
    ranks: list[str]
    passes: int
    inputs: dict[str, int]
    levels: dict[str, int]
    footprint: int | str
    rows: int
    revisited: list[RevisitRow]


class RewriteRow(TypedDict):
    name: str
    before: int
    after: int
    conditions: list[str]


class FormRow(TypedDict):
    ranks: list[str]
    passes: int
    state: int | str
    best: bool
    rewrites: list[RewriteRow]


class Description(TypedDict):
    cascade: str
    families: list[FamilyRow]
    forms: list[FormRow]


def describe(
    c: Cascade, sizes: Mapping[str, int] | None = None, *, query: str | None = None, rows: int = 128,
    width: int | None = None, family: Family | None = None,
) -> Description:
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
) -> FamilyRow:
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


def _choice(x: Choice) -> ChoiceRow:
    return {
        "how": x.how, "held_bytes": _plain(x.held_bytes), "moved_bytes": _plain(x.moved_bytes), "flops": _plain(x.flops),
        "exps": _plain(x.exps),
    }


def _forms(c: Cascade, family: Family) -> list[FormRow]:
    found = search(c, family)
    return [_form(f, f is found.best) for f in found.forms]


def _form(f: CascadeForm, best: bool) -> FormRow:
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
