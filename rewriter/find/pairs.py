"""Scans that are written as a tree of pairs: neighbours are combined, level by level, where a loop would take steps.

    x[0::2], x[1::2]  →  y = x[1::2] ∘ x[0::2]  →  y[0::2], y[1::2]  → …            (an associative scan)

No such tree is read back as the recurrence that it computes: it is named.
"""

from __future__ import annotations

from collections import deque

from torch import fx

from ..graph.node import arguments, op_name

PAIRS = "its states are made by a tree of pairs (an associative scan), in which no loop of steps is there to be folded"
# What a tree is made of, and how many of these are looked at.
_MADE_OF = frozenset((
    "mul", "add", "slice", "stack", "flatten", "cat", "pad", "constant_pad_nd", "movedim", "transpose", "permute", "view",
    "reshape", "unsqueeze", "squeeze", "to", "_to_copy", "select", "clone", "contiguous", "getitem", "split_with_sizes",
))
_LIMIT = 512


def made_by_pairs(start: fx.Node) -> bool:
    """Is a value made of neighbours that were combined at two levels or more?"""
    queue, seen = deque([start]), set[fx.Node]()
    while queue and len(seen) < _LIMIT:
        n = queue.popleft()
        if n in seen or op_name(n) not in _MADE_OF:
            continue
        seen.add(n)
        if _is_every_second(n) and any(map(_is_every_second, _combined(n.all_input_nodes[0]))):
            return True
        queue.extend(n.all_input_nodes)
    return False


def _combined(n: fx.Node) -> list[fx.Node]:
    """What a sum of products combines."""
    if op_name(n) not in ("mul", "add"):
        return []
    return [y for x in n.all_input_nodes for y in (x, *_combined(x))]


def _is_every_second(n: fx.Node) -> bool:
    return op_name(n) == "slice" and arguments(n)["step"] == 2
