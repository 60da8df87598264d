"""Softmaxes between two products that neither an attention nor a miss accounts for: nothing vanishes without a word.

    scores ─ softmax ─ permute ─ linear (mixes heads) ─ permute ─ matmul      the matmul, and that `linear` stands between
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import Tensor, fx

from ..graph.node import arguments, op_name, tensor_of
from ..graph.sizes import shape_of
from ..lift.operators_contract import CONTRACTIONS
from .final import NOT_BETWEEN

SOFTMAXES = frozenset(("softmax", "_softmax", "_safe_softmax", "special_softmax", "log_softmax", "_log_softmax"))
# Layers of weights that may mix scores or probabilities; behind a second one stand other things than scores.
_MIXES = frozenset(("linear", "conv1d", "conv2d", "convolution"))
_LIMIT = 256


def unaccounted(graph: fx.Graph, known: Collection[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """The product with values behind each softmax that no known product is reached from, and why it is left alone."""
    for n in graph.nodes:
        if op_name(n) not in SOFTMAXES:
            continue
        before = _nearest(n, lambda x: x.all_input_nodes)
        after = _nearest(n, lambda x: x.users)
        if before is None or after is None or after[0] in known or _reaches(n, known):
            continue
        mixers = [*before[1], *after[1]]
        # a router's softmax is over experts, which no product before it has
        if len(mixers) > 1 or not _size(n) <= _sizes(before[0]) & _sizes(*after[0].all_input_nodes):
            continue
        between = f"{op_name(mixers[0])} mixes them" if mixers else "something in between has no term"
        yield after[0], f"a softmax stands between two products, but {between}"


def _size(softmax: fx.Node) -> set[str]:
    """The size of the dimension that is normalised."""
    shape, dim = shape_of(tensor_of(softmax)), arguments(softmax)["dim"]
    return {str(shape[dim])} if shape and isinstance(dim, int) else set()


def _sizes(*nodes: fx.Node) -> set[str]:
    return {str(s) for n in nodes if isinstance(n.meta.get("val"), Tensor) for s in shape_of(tensor_of(n))}


def _nearest(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The nearest product in one direction, with the layer passed on the way to it; at most one is passed."""
    queue: deque[tuple[fx.Node, tuple[fx.Node, ...]]] = deque([(start, ())])
    seen: set[fx.Node] = set()
    while queue and len(seen) < _LIMIT:
        n, passed = queue.popleft()
        if n in seen:
            continue
        seen.add(n)
        name = op_name(n)
        if n is not start and name in CONTRACTIONS:
            return n, passed
        if name in _MIXES:
            passed = (*passed, n)
        if len(passed) > 1 or n.op in ("placeholder", "get_attr") or name in NOT_BETWEEN - _MIXES:
            continue
        queue.extend((x, passed) for x in step(n))
    return None


def _reaches(start: fx.Node, known: Collection[fx.Node]) -> bool:
    """Is a product that is accounted for reached before any other?"""
    queue, seen = deque([start]), set[fx.Node]()
    while queue and len(seen) < _LIMIT:
        n = queue.popleft()
        if n in known:
            return True
        if n in seen or (n is not start and op_name(n) in CONTRACTIONS):
            continue
        seen.add(n)
        queue.extend(n.users)
    return False
