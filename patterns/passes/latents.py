"""Attention over latents, cut in two: the attention itself, and the map that turns what it sums into the output.

    whole    QL[h,p,c] = Σ_e Q·W;  QK = Σ_c QL·C;  …;  OL[h,p,k] = Σ_m A·C;  O[h,p,f] = Σ_k OL·U
    inner    all but the last Einsum: an attention whose keys and values are C           after    O[h,p,f] = Σ_k OL·U

`absorb` makes such cascades. Where rows name their keys, that is what a gather wants: it commutes with a map that acts on
each token alone, and of latents a few numbers are gathered for all heads, where keys and values have so many for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ..attention.attention import Attention
from ..attention.recognise import attention
from ..cascade import Cascade, Einsum, verify
from ..verdict import Obstacle


@dataclass(frozen=True)
class Inner:
    """`cascade` has all inputs of the whole, of which `after` alone may read some; None where nothing follows."""

    cascade: Cascade
    after: Einsum | None


@lru_cache(maxsize=256)
def inner(c: Cascade) -> Inner | Obstacle:
    """The attention inside of an absorbed cascade, and what follows it; the whole where its values are no latents."""
    if len(c.outputs) != 1 or not c.einsums:
        return Obstacle("the attention over latents is not the only output")
    last = c.einsums[-1]
    made = [str(x.attr) for x in last.reads if str(x.attr) in c.producers]
    follows = last.out.tensor == c.outputs[0] and last.op == "add" and len(last.over) == 1 and len(made) == 1
    if not follows or any(i.op != "index" for x in last.reads if x.attr == made[0] for i in x.args):
        return _read(c, None)
    tensors = tuple(t for t in c.tensors if t.name != last.out.tensor)
    found = _read(verify(replace(c, einsums=c.einsums[:-1], outputs=(made[0],), tensors=tensors)), last)
    return _read(c, None) if isinstance(found, Obstacle) else found


def _read(c: Cascade, after: Einsum | None) -> Inner | Obstacle:
    view = attention(c)
    return Inner(c, after) if isinstance(view, Attention) else view
