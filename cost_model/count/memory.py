"""Memory of one attention over its context: what is kept between steps, and what is alive while it runs.

    cache    keys and values, as the attention reads them: every element of theirs once      kept between decoding steps
    eager    the operator that holds most: its operands and its result                       the original, one by one
    tiled    the result alone: scores and weights stay on chip                               our kernel, and the vendors'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.cascade import Cascade
from ...patterns.expr import Expr
from ..operations import WIDTH, Sizes, product, size_int
from .eager import operators


@dataclass(frozen=True)
class AttentionMemory:
    """Bytes of one attention: `cache` of keys and values, `eager` and `tiled` while it is computed.

    `latent`: of the cache where it holds what keys and values are made of; 0 where no form over that is known.
    """

    cache_bytes: int
    eager_bytes: int
    tiled_bytes: int
    latent_bytes: int = 0


def memory(a: Attention, c: Cascade, sizes: Mapping[str, int]) -> AttentionMemory:
    """The memory of an attention `a` read off cascade `c`. Raises ValueError when a size has no value."""
    bound = Sizes(c, sizes)

    def size(name: str) -> int:
        return size_int(product(bound.shape[name])) * WIDTH[c.tensor[name].dtype]

    inputs = {t.name for t in c.inputs}
    cache = sum(size(n) for n in keyed_inputs(a) & inputs)
    eager = max((o.read_bytes + o.written_bytes for o in operators(c, sizes)), default=0)
    return AttentionMemory(cache, eager, sum(size(n) for n in c.outputs))


def keyed_inputs(a: Attention) -> frozenset[str]:
    """The tensors whose elements belong to keys: factors of the products and the values that move along the key rank.

    Masks, biases and slopes are no such factors: they meet the score, not the products.
    """
    parts: list[Expr] = [e.body for e in a.products] + [a.values]
    found = {str(load.attr) for part in parts for load in ex.loads(part) if a.key in load.ranks}
    for e in reversed(a.prelude):
        if e.out.tensor in found:
            found |= {str(load.attr) for load in e.reads if load.ranks}
    return frozenset(found)
