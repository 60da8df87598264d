"""Expectations: what a user says of run-time data that masks read, as what the tile counts take.

    NAME=0.25            the masks that read NAME keep a quarter of the key blocks, wherever they lie
    NAME=blocks:16       … 16 key blocks of each row                                    (block tables, top-k)
    NAME=length:700      the first 700 tokens of each sequence are kept; length:1k,4k: sequences in turn; length:60%
    NAME=segments:8      8 packed segments of equal length a sequence                   (padding and packing)
Lengths and segments become tables at the sizes of a plan, which are counted exactly; the others are expectations. NAME is
an input of the model, or a tensor of the cascade.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.cascade import Cascade
from ...patterns.expr import Expr
from ...patterns.masks.split import conjuncts, split
from ...patterns.membership import membership
from ..operations import Sizes, size_int
from .tiles import NOTHING, Data, Expectation, Table

FORM = "write NAME=0.25 (share of key blocks), NAME=blocks:16, NAME=length:700 (or 60%, or 1k,4k), or NAME=segments:8"
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmM%]?)")
Places: TypeAlias = NDArray[np.int64]
_SCALE: Mapping[str, float] = {"": 1, "k": 1 << 10, "m": 1 << 20, "%": 0.01}


class ExpectError(ValueError):
    """An expectation that means nothing, or that no mask reads; the message is one sentence that says what to change."""


@dataclass(frozen=True)
class Expect:
    """What is expected of `name`: `form` share, blocks, length or segments; `parts`: `values` are parts of the whole."""

    name: str
    form: str
    values: tuple[float, ...]
    parts: bool = False

    def __str__(self) -> str:
        shown = ", ".join(f"{v:.4g}" if not self.parts else f"{v:.4g} of all" for v in self.values)
        return {
            "share": f"keeps {self.values[0]:.3g} of the key blocks", "blocks": f"keeps {shown} key blocks of each row",
            "length": f"keeps the first {shown} tokens of a sequence" + (", in turn" if len(self.values) > 1 else ""),
            "segments": f"packs {shown} segments of equal length",
        }[self.form]


def parse(text: str) -> Expect:
    """An expectation from `NAME=FORM`. Raises ExpectError."""
    name, equals, rest = text.partition("=")
    form, colon, numbers = rest.partition(":")
    form, numbers = (form, numbers) if colon else ("share", rest)
    if not equals or not name.strip() or form not in ("share", "blocks", "length", "segments"):
        raise ExpectError(f"--expect {text!r} is no expectation: {FORM}")
    found = [_COUNT.fullmatch(n.strip()) for n in numbers.split(",")]
    if not all(found) or (len(found) > 1 and form != "length"):
        raise ExpectError(f"--expect {text!r}: {numbers!r} is no number: {FORM}")
    units = [m[2].lower() for m in found if m]
    values = tuple(float(m[1]) * _SCALE[m[2].lower()] for m in found if m)
    parts = "%" in units
    if (parts and (set(units) != {"%"} or form not in ("length", "share"))) or not _sensible(form, values, parts):
        raise ExpectError(f"--expect {text!r}: {_RANGE[form]}: {FORM}")
    return Expect(name.strip(), form, values, parts)


_RANGE = {
    "share": "a share lies between 0 and 1", "blocks": "a row keeps 0 blocks or more",
    "length": "a sequence keeps 1 token or more, or a part of 100%", "segments": "a sequence has 1 whole segment or more",
}


def _sensible(form: str, values: Sequence[float], parts: bool) -> bool:
    match form:
        case "share":
            return 0 <= values[0] <= 1
        case "blocks":
            return values[0] >= 0
        case "segments":
            return values[0] >= 1 and values[0].is_integer()
    return all(0 < v <= 1 if parts else v >= 1 for v in values)


# --- what masks read --------------------------------------------------------------------------------------------


def unknowns(a: Attention) -> tuple[str, ...]:
    """The tensors of run-time data that an attention's mask reads, in order."""
    keep = split(a.score, a.key).keep
    return tuple(dict.fromkeys(str(x.attr) for part in conjuncts(keep) for x in ex.loads(part)))


def checked(wishes: Sequence[Expect], known: Mapping[str, Sequence[str]]) -> None:
    """Raise ExpectError for a name that no mask reads; `known` has the inputs behind each tensor that one does."""
    inputs = dict.fromkeys(o for origins in known.values() for o in origins)
    names = list(inputs) or list(known)
    for w in wishes:
        if w.name not in inputs and w.name not in known:
            there = f"one of {', '.join(names)}" if names else "no mask of this model reads run-time data"
            raise ExpectError(f"--expect {w.name}: no mask reads {w.name!r}: {there}")


@dataclass(frozen=True)
class Known:
    """What is taken of run-time data at some sizes: `data` for the counts, `words` for the reader."""

    data: Data
    words: tuple[str, ...]


def known(
    c: Cascade, a: Attention, sizes: Mapping[str, int], wishes: Sequence[Expect], origins: Mapping[str, Sequence[str]],
    constants: Data = NOTHING,
) -> Known:
    """What the wishes say of the tensors that an attention's mask reads. Raises ExpectError where a form does not fit.

    `constants` are read as they are, unless a wish says something else of them.
    Of several tensors that come from one input the first keeps a share of blocks, and the others all that it keeps.
    """
    if any(n not in sizes for n in c.free_symbols):
        # nothing is predicted of an attention without sizes
        wishes = ()
    keep = split(a.score, a.key).keep
    tables: dict[str, Table] = {}
    expected: list[Expectation] = []
    said: dict[str, str] = {}
    for name in unknowns(a):
        w = next((w for w in wishes if w.name in (name, *origins.get(name, ()))), None)
        if w is None:
            if name in constants.tables:
                tables[name] = constants.tables[name]
                said[name] = ""
            continue
        shown = name if w.name == name else f"{w.name} ({name})"
        if w.form in ("share", "blocks"):
            first = not any(w.name in (e, *origins.get(e, ())) for e in said)
            value = w.values[0] if first else 1.0
            blocks = value if first and w.form == "blocks" else None
            expected.append(Expectation(name, share=None if blocks is not None else value, blocks=blocks))
            said[name] = f"expected: {shown} {w}" if first else ""
        else:
            tables[name] = _table(w, name, c, a, keep, sizes)
            said[name] = f"expected: {shown} {w}"
    data = Data.of(tables, *expected) if tables or expected else Data()
    # where the keys lie that a row names does not matter to whoever walks them, and to others they may lie anywhere
    named = {e.out.tensor for e in a.prelude if membership(e) is not None}
    rest = [_unsaid(name, origins) for name in unknowns(a) if name not in {*said, *named}]
    return Known(data, (*(s for s in dict.fromkeys(said.values()) if s), *rest))


def _unsaid(name: str, origins: Mapping[str, Sequence[str]]) -> str:
    came = origins.get(name, ())
    return f"predicted as if {name} kept every key" + (f" (from {', '.join(came)})" if came else "")


# --- tables -----------------------------------------------------------------------------------------------------


def _table(w: Expect, name: str, c: Cascade, a: Attention, keep: Expr, sizes: Mapping[str, int]) -> Table:
    """The values of a tensor over tokens: which are kept, the segment of each, or its place in it."""
    read = [x for x in ex.loads(keep) if str(x.attr) == name]
    along = {d for x in read for d, i in enumerate(x.args) if i.ranks & {a.query, a.key}}
    if len(along) != 1:
        raise ExpectError(
            f"--expect {w.name}: {name} is a table of queries by keys, no row of tokens: give a share (0.25) or blocks:16"
        )
    (token,) = along
    shape = tuple(size_int(n) for n in Sizes(c, sizes).shape[name])
    places = np.arange(shape[token])
    if w.form == "segments":
        row = _segments(int(w.values[0]), places, _ordered(keep, name))
        rows: Table = np.broadcast_to(row, (1, len(row)))
    else:
        lengths = np.array([round(v * shape[token]) if w.parts else v for v in w.values])
        rows = places[None, :] < lengths[:, None]
    return _spread(rows, shape, token).astype(np.bool_ if c.tensor[name].dtype == "b1" else np.int64)


def _segments(count: int, places: Places, ordered: bool) -> Places:
    """The number of each token's segment; where it is compared by order, its place in the segment."""
    ids = places * count // max(len(places), 1)
    starts = np.searchsorted(ids, ids)
    return places - starts if ordered else ids


def _ordered(keep: Expr, name: str) -> bool:
    """Is a tensor's element compared with another of its own by order, as positions are, not by equality?"""
    compared = [t.op for t in ex.walk(keep) if t.op in ex.COMPARISONS and all(_loads(x, name) for x in t.args)]
    return bool(compared) and not {"eq", "ne"} & set(compared)


def _loads(e: Expr, name: str) -> bool:
    return any(str(x.attr) == name for x in ex.loads(e))


def _spread(rows: Table, shape: Sequence[int], token: int) -> Table:
    """Rows in turn over the first other dimension, the same in the rest."""
    first = next((d for d in range(len(shape)) if d != token), None)
    count = shape[first] if first is not None else 1
    picked = rows[np.arange(count) % len(rows)]
    view = [1] * len(shape)
    view[token] = shape[token]
    if first is not None:
        view[first] = count
        picked = picked if first < token else picked.T
    return np.broadcast_to(picked.reshape(view), shape)
