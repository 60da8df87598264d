"""Linear attention in chunks, as a cascade with carried state: the state between chunks is what devices exchange.

    D[e,f,i]    = Σ_t K[i,t,e]·V[i,t,f]                     what chunk i adds
    S[e,f,i+1]  = G[i]·S[e,f,i] + D[e,f,i]                  carried over chunks, iterative in i (G = 1 without decay)
    O[i,t,f]    = Σ_e Q[i,t,e]·S[e,f,i] + Σ_s [s ≤ t]·(Q·K)[i,t,s]·V[i,s,f]

Source: Sun et al., "LASP-2" (2025): the states of all devices are gathered once, and each combines those before its own.
"""

from __future__ import annotations

from .. import expr as ex
from ..cascade import Cascade, Size
from ..expr import Expr
from .papers import Builder


def linear_chunks(
    *, batch: Size = 1, heads: int = 32, chunks: int = 64, chunk: int = 64, embed: int = 128, value: int = 128,
    decay: bool = False, dtype: str = "bf16",
) -> Cascade:
    """Causal linear attention over `chunks` chunks of `chunk` tokens; with `decay`, a factor a head and chunk."""
    b = Builder(
        {"b": batch, "h": heads, "i": chunks, "t": chunk, "s": chunk, "e": embed, "f": value}, iterative=("i",)
    )
    q, k, v = b.input("Q", "bhite", dtype), b.input("K", "bhite", dtype), b.input("V", "bhitf", dtype)
    state = tuple(ex.index(r) for r in "bhef")
    shape = (batch, heads, embed, value, chunks + 1)
    i, one = ex.index("i"), ex.const(1)
    b.write("S", shape, (*state, ex.const(0)), ex.const(0.0, dtype))
    added = b.put("D", "bhefi", k * v, "add", "t")
    old = ex.load("S", (*state, i), dtype)
    b.write("S", shape, (*state, i + one), (old * b.input("G", "bhi", dtype) if decay else old) + added)
    carried = b.put("OC", "bhitf", q * old, "add", "e")
    inner = b.put("QK", "bhits", q * _at(k, "t", "s"), "add", "e")
    kept = ex.where(ex.index("s") <= ex.index("t"), inner, ex.const(0.0, dtype))
    own = b.put("OI", "bhitf", kept * _at(v, "t", "s"), "add", "s")
    b.put("O", "bhitf", carried + own)
    return b.cascade("linear attention in chunks", "O")


def _at(load: Expr, old: str, new: str) -> Expr:
    """A load at another rank of the same size."""
    return ex.substitute(load, {ex.index(old): ex.index(new)})
