"""Attention over cached latents, as cascades: what is kept a token is C[m,c] (and KPE[m,r]) and no K or V.

    naive      K[h,m,e] = Σ_c C·WUK;  V[h,m,f] = Σ_c C·WUV;  O = softmax(Q·K + QPE·KPE)·V           expand, then attend
    absorbed   QL[h,p,c] = Σ_e Q·WUK;  OL = softmax(QL·C + QPE·KPE)·C;  O[h,p,f] = Σ_k OL·WUV      C is key and value at once
    grouped    the same with C[m, h // G, c]: each group of heads has a latent of its own           (GLA: trained so)
    sliced     a softmax over each of g slices of C, summed after WUV                               (TPLA: another function)

All end with the output projection Y[p,d] = Σ_h,f O·WO, because there the parts of the heads meet.
Sources: DeepSeek-V2 (MLA); "Hardware-Efficient Attention for Fast Decoding" (GLA); "TPLA", equations 1 to 4. Sizes are
DeepSeek-V3's unless told; letters b h p m e f, c and k latent (contracted, kept), r rotary, d model width, g slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .. import expr as ex
from ..cascade import Cascade, Size
from ..expr import Expr
from ..library.papers import Builder

# Channels that share one scale in an 8-bit cache (FlashMLA's layout: 512 values, 4 scales, 64 bf16 a token).
SCALED = 128


@dataclass(frozen=True)
class Latent:
    """A cascade over latents. `exact` says whether it computes what the model's own attention does; `why` why not."""

    cascade: Cascade
    exact: bool = True
    why: str = ""


@dataclass(frozen=True)
class Widths:
    """Heads and widths; `rotary` 0 leaves the positional part out."""

    heads: int = 128
    latent: int = 512
    rotary: int = 64
    key: int = 128
    value: int = 128
    model: int = 7168
    dtype: str = "bf16"


V3 = Widths()
K2 = Widths(heads=64)


def _builder(w: Widths, batch: Size, queries: Size, keys: Size) -> Builder:
    return Builder({
        "b": batch, "h": w.heads, "p": queries, "m": keys, "e": w.key, "f": w.value, "c": w.latent, "k": w.latent,
        "r": w.rotary, "d": w.model,
    })


def naive(w: Widths = V3, *, batch: Size = 1, queries: Size = 1, keys: Size = 4096) -> Latent:
    """Keys and values expanded from the latents, one set a head: what the eager code of DeepSeek-V3 computes."""
    b = _builder(w, batch, queries, keys)
    latent = b.input("C", "bmc", w.dtype)
    k = b.put("K", "bhme", latent * b.input("WUK", "hec", w.dtype), "add", "c")
    v = b.put("V", "bhmf", latent * b.input("WUV", "hcf", w.dtype), "add", "c")
    qk = b.put("QK", "bhpm", b.input("Q", "bhpe", w.dtype) * k, "add", "e")
    a = _weights(b, w, _scaled(b, w, qk, ""), "")
    b.put("O", "bhpf", a * v, "add", "m")
    return Latent(_projected(b, w, "latent attention, expanded"))


def absorbed(
    w: Widths = V3, *, groups: int = 1, eight_bit: bool = False, batch: Size = 1, queries: Size = 1, keys: Size = 4096
) -> Latent:
    """Scores and values on the latents themselves; with `groups`, heads are bound to one of that many latents (GLA).

    `eight_bit` stores the latents in one byte with a scale for every 128 channels (any 8-bit type: only its size counts).
    """
    b = _builder(w, batch, queries, keys)
    ql = b.put("QL", "bhpc", b.input("Q", "bhpe", w.dtype) * b.input("WUK", "hec", w.dtype), "add", "e")
    qk = b.put("QK", "bhpm", ql * _cached(b, w, groups, eight_bit, "c"), "add", "c")
    a = _weights(b, w, _scaled(b, w, qk, ""), "")
    ol = b.put("OL", "bhpk", a * _cached(b, w, groups, eight_bit, "k"), "add", "m")
    b.put("O", "bhpf", ol * b.input("WUV", "hkf", w.dtype), "add", "k")
    return Latent(_projected(b, w, "grouped latent attention" if groups > 1 else "latent attention, absorbed"))


def _cached(b: Builder, w: Widths, groups: int, eight_bit: bool, channel: str) -> Expr:
    batch, keys = b.extent("b"), b.extent("m")
    j, m, at = ex.index("b"), ex.index("m"), ex.index(channel)
    if eight_bit:
        stored = b.given("C", (batch, keys, w.latent), (j, m, at), "i8")
        scale = b.given("CS", (batch, keys, w.latent // SCALED), (j, m, at // SCALED), "f32")
        return ex.cast(ex.cast(ex.cast(stored, "f16"), "f32") * scale, w.dtype)
    if groups == 1:
        return b.given("C", (batch, keys, w.latent), (j, m, at), w.dtype)
    head = ex.index("h") // (w.heads // groups)
    return b.given("C", (batch, keys, groups, w.latent), (j, m, head, at), w.dtype)


def sliced(slices: int, w: Widths = V3, *, batch: Size = 1, queries: Size = 1, keys: Size = 4096) -> Latent:
    """TPLA: every slice g of the latent has a softmax of its own, with the rotary part repeated in each.

    `MU[g]` scales a slice's scores (1 for one slice; a calibrated number otherwise). With one slice this is `absorbed`;
    with more it is another function, because two softmaxes are not one.
    """
    b = _builder(w, batch, queries, keys)
    b.sizes |= {"g": slices, "c": w.latent // slices, "k": w.latent // slices}
    ql = b.put("QL", "bhpgc", b.input("Q", "bhpe", w.dtype) * b.input("WUK", "hegc", w.dtype), "add", "e")
    qk = b.put("QK", "bhpmg", ql * b.input("C", "bmgc", w.dtype), "add", "c")
    a = _weights(b, w, _scaled(b, w, qk * b.input("MU", "g", w.dtype), "g"), "g")
    values = ex.load("C", tuple(ex.index(r) for r in "bmgk"), w.dtype)
    ol = b.put("OL", "bhpgk", a * values, "add", "m")
    b.put("O", "bhpf", ol * b.input("WUV", "hgkf", w.dtype), "add", "gk")
    why = "" if slices == 1 else f"a softmax over each of {slices} slices of the latent is not one over the whole"
    return Latent(_projected(b, w, f"latent attention in {slices} slices"), slices == 1, why)


def _scaled(b: Builder, w: Widths, qk: Expr, more: str) -> Expr:
    """The scaled scores, with the rotary part where there is one."""
    scale = (w.key + w.rotary) ** -0.5
    if not w.rotary:
        return b.put("S", f"bhpm{more}", qk * scale)
    rotary = b.input("QPE", "bhpr", w.dtype) * b.input("KPE", "bmr", w.dtype)
    return b.put("S", f"bhpm{more}", (qk + b.put("QR", "bhpm", rotary, "add", "r")) * scale)


def _weights(b: Builder, w: Widths, s: Expr, more: str) -> Expr:
    gm = b.put("GM", f"bhp{more}", s, "max", "m")
    sn = b.put("SN", f"bhpm{more}", ex.exp(s - gm))
    return b.put("A", f"bhpm{more}", sn / b.put("SD", f"bhp{more}", sn, "add", "m"))


def _projected(b: Builder, w: Widths, name: str) -> Cascade:
    out = ex.load("O", tuple(ex.index(r) for r in "bhpf"), w.dtype)
    b.put("Y", "bpd", out * b.input("WO", "hfd", w.dtype), "add", "hf")
    return b.cascade(name, "Y")


def hadamard(n: int) -> NDArray[np.float64]:
    """The orthonormal Hadamard matrix of size n, a power of two: TPLA's choice to even out the slices' norms."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard matrix has a power of two rows, not {n}")
    out = np.ones((1, 1))
    while len(out) < n:
        out = np.block([[out, out], [out, -out]]) / np.sqrt(2.0)
    return out
