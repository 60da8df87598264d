"""Prints the functions that add up what reaches leaves, floats that are no operands: by rows, by pairs and by keys.

    leaves[i]   float32 [programs, rows], [programs, rows, keys] or [programs, keys]: every element has one writer
"""

from __future__ import annotations

from collections.abc import Sequence

from ..device_function import DeviceFunction, Printed, coordinates
from .names import BackwardNames


def printed(names: BackwardNames) -> tuple[Printed, ...]:
    return (
        _start(names, "start_l", "BM", "[BM, 1]", _rows(names)), _add_l(names), _store_l(names),
        _start(names, "start_keyed", "BN", "[1, BN]", _keyed(names)), _add_keyed(names), _store_keyed(names),
    )


def _places(names: BackwardNames) -> dict[int, int]:
    """Of each leaf of tiles: its number among what a tile gives."""
    return {i: n for n, i in enumerate(i for i, x in enumerate(names.b.leaves) if not x.ends)}


def _rows(names: BackwardNames) -> list[int]:
    return [i for i, x in enumerate(names.b.leaves) if not x.ends and names.s.key not in x.ranks]


def _keyed(names: BackwardNames) -> list[int]:
    return [i for i, _ in enumerate(names.b.leaves) if names.b.keyed_bits >> i & 1]


def _pairs(names: BackwardNames) -> list[int]:
    both = {names.s.attention.query, names.s.key}
    return [i for i, x in enumerate(names.b.leaves) if both <= set(x.ranks)]


def _start(names: BackwardNames, name: str, size: str, shape: str, own: Sequence[int]) -> Printed:
    f = DeviceFunction(names, name, f"{size}: tl.constexpr", ())
    # one at least: a tuple without an element is carried over no loop
    parts = [f"tl.zeros({shape}, tl.float32)"] * max(1, len(own))
    f.body.line(f"return ({', '.join(parts)},)")
    return f.printed("Accumulators of what reaches leaves.")


def _summed(f: DeviceFunction, names: BackwardNames, own: Sequence[int], axis: int) -> None:
    """Lines that add a tile's sums to the accumulators."""
    places = _places(names)
    sums = [f.body.fresh("part") for _ in own] or [f.body.fresh("part")]
    for n, name in enumerate(sums):
        f.body.line(f"{name} = dl[{n}]")
        if own:
            with f.body.block(f"if LEAVES & {1 << own[n]}:"):
                f.body.line(f"{name} += tl.sum(parts[{places[own[n]]}], {axis}, keep_dims=True)")
    f.body.line(f"return ({', '.join(sums)},)")


def _add_l(names: BackwardNames) -> Printed:
    s = names.s
    m = names.ranks[s.key]
    f = DeviceFunction(names, "add_l", f"leaves, dl, parts, o, inside, {m}, sizes, LEAVES: tl.constexpr", (s.key,))
    size = f.size(s.key)
    for i in _pairs(names):
        with f.body.block(f"if LEAVES & {1 << i}:"):
            part, there = f"parts[{_places(names)[i]}]", f"inside & ({m} < {size})"
            f.body.line(f"tl.store(leaves[{i}] + o * {size} + {m}, {part}, mask={there})")
    _summed(f, names, _rows(names), 1)
    return f.printed("What a tile adds to leaves of its rows; that of its pairs is stored.")


def _store_l(names: BackwardNames) -> Printed:
    s, b = names.s, names.b
    f = DeviceFunction(
        names, "store_l", "leaves, dl, scalars, at, o, inside, inputs, sizes, LEAVES: tl.constexpr", coordinates(s)
    )
    body = f.body
    body.taken |= set(names.scalars.values())
    for n, i in enumerate(_rows(names)):
        with body.block(f"if LEAVES & {1 << i}:"):
            body.line(f"tl.store(leaves[{i}] + o, dl[{n}], mask=inside)")
    ends = [(i, x) for i, x in enumerate(b.leaves) if x.ends]
    for n, scalar in enumerate(b.scalars if ends else ()):
        body.line(f"{names.scalars[scalar]} = scalars[{n}]")
        body.bind(scalar, names.scalars[scalar])
    body.count([x.full for _, x in ends])
    for i, x in ends:
        text = body.real(x.full)
        with body.block(f"if LEAVES & {1 << i}:"):
            body.line(f"tl.store(leaves[{i}] + o, {text}, mask=inside)")
    return f.printed("What reaches leaves of a block's rows, and of their ends.")


def _add_keyed(names: BackwardNames) -> Printed:
    f = DeviceFunction(names, "add_keyed", "dl, parts, LEAVES: tl.constexpr", ())
    _summed(f, names, _keyed(names), 0)
    return f.printed("What a tile adds to leaves of its keys.")


def _store_keyed(names: BackwardNames) -> Printed:
    s = names.s
    m = names.ranks[s.key]
    f = DeviceFunction(names, "store_keyed", f"leaves, dl, i_batch, {m}, sizes, LEAVES: tl.constexpr", (s.key,))
    size = f.size(s.key)
    for n, i in enumerate(_keyed(names)):
        place = f"leaves[{i}] + i_batch.to(tl.int64) * {size} + {m}"
        with f.body.block(f"if LEAVES & {1 << i}:"):
            f.body.line(f"tl.store({place}, dl[{n}], mask={m} < {size})")
    if not _keyed(names):
        f.body.line("pass")
    return f.printed("What reaches leaves of a block's keys, for one of the heads that share them.")
