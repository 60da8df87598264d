"""Where queries, keys and values come from: inputs and parameters of a drawn module, and its views of them.

    given tensors ─ layout → q [b, h, p, e], k [b, kv, n, e], v [b, kv, n, f] ─ keys_map → m keys ─ heads_map → h heads
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .draws import DATA_MASKS, MODEL, WINDOW, Draw

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
WIDTH = 12
PAST, PAGE, SPARE = 4, 4, 3
FAR = 256


def keys_of(d: Draw, n: int) -> int:
    """How many keys are attended to, of `n` given ones: of a window that moves, by each row."""
    if d.shape == "moving":
        return WINDOW
    more = {"cat": PAST, "written": SPARE, "drop": -1, "pad": 1, "bias_kv": 1}
    return n + more[d.keys_map] if d.keys_map in more else max(1, n * 2 // 3) if d.keys_map in ("select", "gathered") else n


def parameters(d: Draw) -> dict[str, Tensor]:
    """The parameters of a drawn module, by name."""
    g = torch.Generator().manual_seed(d.seed)

    def made(*shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * by).to(TYPES[d.dtype])

    out: dict[str, Tensor] = {}
    h, kv = d.heads, d.kv_heads
    if d.layout == "projected":
        for name, rows in (("wq", h * d.size), ("wk", kv * d.size), ("wv", kv * d.f)):
            out[name] = made(rows, WIDTH, by=WIDTH**-0.5)
    if d.layout in ("fused", "chunk", "interleaved", "split"):
        out["wqkv"] = made((h + 2 * kv) * d.size, WIDTH, by=WIDTH**-0.5)
        out["bqkv"] = made((h + 2 * kv) * d.size, by=0.1)
    if d.keys_map == "bias_kv":
        out["bias_k"], out["bias_v"] = made(1, kv, 1, d.size), made(1, kv, 1, d.f)
    if d.scale in ("learned_exp", "per_head", "clamped"):
        out["scale"] = made(h, 1, 1, by=0.3)
    if d.product == "weighed":
        out["product_gain"] = made(d.size, by=0.3) + 1.0
    if d.second == "weighed":
        out["second_gain"] = made(h, by=0.3) + 1.0
    if d.norm in ("rms", "layer"):
        out["norm_q"], out["norm_k"] = made(d.size) + 1.0, made(d.size) + 1.0
    if d.bias in ("alibi", "alibi_keys", "gaussian"):
        out["slopes"] = made(h, by=0.2).abs()
    if d.bias in ("table", "buckets", "swin"):
        out["table"] = made(32, h)
    if d.bias in ("per_head", "joined"):
        out["head_bias"] = made(h, 1, 1)
    if d.bias == "relative":
        out["relative"] = made(2 * FAR + 1, d.size, by=d.size**-0.5)
    if d.bias == "keyed":
        out["gate"] = made(d.size, by=d.size**-0.5)
    if d.row.startswith("sink") or d.row == "temperature":
        out["sink"] = made(h)
    if d.out == "projected":
        out["wo"] = made(WIDTH, h * d.f, by=(h * d.f) ** -0.5)
    return out


def inputs(d: Draw, queries: int, keys: int) -> dict[str, Tensor]:
    """The inputs of one call, by name, in the order in which the module takes them."""
    g = torch.Generator().manual_seed(d.seed + 1 + queries)
    dtype = TYPES[d.dtype]

    def made(*shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * by).to(dtype)

    b, h, kv, e, f, n = d.batch, d.heads, d.kv_heads, d.size, d.f, keys
    wide = d.spread
    out: dict[str, Tensor] = {}
    if d.layout in MODEL:
        out["x"] = made(b, queries, WIDTH, by=wide)
        if d.layout == "projected" and d.keys:
            out["y"] = made(b, n, WIDTH)
    elif d.layout == "stacked":
        out["qkv"] = made(3, b, h, n, e, by=wide**0.5)
    else:
        out["q"] = made(*_laid(d, b, h, queries, e), by=wide)
        if d.layout == "plane":
            y = 2 if n % 2 == 0 else 1
            out["k"], out["v"] = made(b, kv, y, n // y, e), made(b, kv, y, n // y, f)
        elif d.layout == "pages":
            pages = n // PAGE
            out["k"], out["v"] = made(pages + 2, PAGE, kv, e), made(pages + 2, PAGE, kv, f)
            out["pages"] = torch.randint(0, pages + 2, (b, pages), generator=g)
        else:
            k_shape = (b, kv, e, n) if d.layout == "transposed" else _laid(d, b, kv, n, e)
            out["k"], out["v"] = made(*k_shape), made(*_laid(d, b, kv, n, f))
    m = keys_of(d, n)
    if d.keys_map == "cat":
        out["past_k"], out["past_v"] = made(b, kv, PAST, e), made(b, kv, PAST, f)
    if d.keys_map == "written":
        out["cache_k"], out["cache_v"] = made(b, kv, n + SPARE, e), made(b, kv, n + SPARE, f)
    if d.keys_map in ("select", "index"):
        out["picked"] = torch.randint(0, n, (m,), generator=g)
    if d.keys_map == "gathered":
        out["picked"] = torch.randint(0, n, (b, m), generator=g)
    if d.heads_map == "index_select" and d.group > 1:
        out["groups"] = torch.randint(0, kv, (h,), generator=g)
    if d.bias == "data":
        out["bias"] = made(*spread(d.bias_spread, b, h, queries, m))
    if d.bias in ("padded", "joined"):
        out["bias"] = made(1, h, queries, m - 1)
    if d.bias == "swin":
        out["index"] = torch.randint(0, 32, (queries, m), generator=g)
    for name in dict.fromkeys((d.mask, d.second_mask)):
        if name in DATA_MASKS:
            out[name] = _mask(d, name, queries, m, g)
    if d.form == "added_data" and d.mask != "none":
        keep = torch.rand(spread(d.mask_spread, b, h, queries, m), generator=g) < 0.7
        lowest = torch.finfo(dtype).min
        fill = {"-inf": -math.inf, "lowest": lowest, "lowest32": lowest}.get(d.fill) or float(d.fill)
        out["additive"] = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~_emptied(d, keep), fill).to(dtype)
    return out


def _laid(d: Draw, b: int, h: int, n: int, e: int) -> tuple[int, ...]:
    if d.layout == "bphe":
        return b, n, h, e
    if d.layout == "flat":
        return b, n, h * e
    if d.layout == "pbhe":
        return n, b, h, e
    if d.layout == "strided":
        return b, h, 2 * n + 1, e + 3
    if d.layout == "pages":
        return b, n, h, e
    return b, h, n, e


def spread(text: str, b: int, h: int, p: int, m: int) -> tuple[int, ...]:
    return tuple({"b": b, "h": h, "p": p, "m": m, "1": 1}[c] for c in text)


def _mask(d: Draw, name: str, p: int, m: int, g: torch.Generator) -> Tensor:
    b = d.batch
    if name.startswith("padding"):
        keep = torch.ones(b, m, dtype=torch.bool)
        for i in range(b):
            gone = int(torch.randint(0, m, (), generator=g))
            keep[i, :gone] = False
            if i % 2:
                keep[i] = keep[i].flip(0)
        keep = _emptied(d, keep)
        return keep if name == "padding_bool" else keep.to(torch.int64 if name == "padding_int" else TYPES[d.dtype])
    if name == "lengths":
        lengths = torch.randint(1, m + 1, (b,), generator=g)
        return lengths * int(not d.empty) if b == 1 else torch.where(torch.arange(b) == 0, lengths * int(not d.empty), lengths)
    if name == "documents":
        return torch.randint(0, 3, (b, max(p, m)), generator=g).sort(-1).values
    if name == "spans":
        return (torch.rand(b, max(p, m), generator=g) < 0.2).to(torch.int64)
    return _emptied(d, torch.rand(spread(d.mask_spread, b, d.heads, p, m), generator=g) < 0.7)


def _emptied(d: Draw, keep: Tensor) -> Tensor:
    """Rows that keep nothing where the draw wants some, and else none."""
    if d.empty:
        keep = keep.clone()
        keep.view(-1, keep.shape[-1])[0] = False
        return keep
    return keep | (torch.arange(keep.shape[-1]) == keep.shape[-1] - 1) if keep.dim() > 2 else keep | ~keep.any(-1, keepdim=True)


def operands(d: Draw, given: dict[str, Tensor], w: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q [b, h, p, e], k [b, kv, n, e] and v [b, kv, n, f] as views of what is given."""
    h, kv, e, f = d.heads, d.kv_heads, d.size, d.f
    if d.layout in MODEL:
        return _projected(d, given, w)
    if d.layout == "stacked":
        q, k, v = given["qkv"].unbind(0)
        return q, k, v
    q, k, v = given["q"], given["k"], given["v"]
    if d.layout == "bphe":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    elif d.layout == "flat":
        q, k, v = (t.view(t.shape[0], t.shape[1], n, s).transpose(1, 2) for t, n, s in ((q, h, e), (k, kv, e), (v, kv, f)))
    elif d.layout == "pbhe":
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    elif d.layout == "transposed":
        k = k.mT
    elif d.layout == "strided":
        q, k, v = q[:, :, 1::2, 1 : e + 1], k[:, :, :-1:2, 3:], v[:, :, 1::2, : f]
    elif d.layout == "plane":
        k, v = k.flatten(2, 3), v.flatten(2, 3)
    elif d.layout == "pages":
        q = q.transpose(1, 2)
        k, v = (t[given["pages"]].flatten(1, 2).transpose(1, 2) for t in (k, v))
    return q, k, v


def _projected(d: Draw, given: dict[str, Tensor], w: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, h, kv, e = given["x"], d.heads, d.kv_heads, d.size
    b, p = x.shape[:2]

    def split(t: Tensor, heads: int, size: int) -> Tensor:
        return t.view(t.shape[0], t.shape[1], heads, size).transpose(1, 2)

    if d.layout == "projected":
        y = given.get("y", x)
        each = ((x, "wq", h, e), (y, "wk", kv, e), (y, "wv", kv, d.f))
        q, k, v = (split(torch.nn.functional.linear(t, w[name]), n, s) for t, name, n, s in each)
        return q, k, v
    qkv = torch.nn.functional.linear(x, w["wqkv"], w["bqkv"])
    if d.layout == "fused":
        q, k, v = qkv.view(b, p, 3, h, e).permute(2, 0, 3, 1, 4).unbind(0)
    elif d.layout == "chunk":
        q, k, v = (split(t, h, e) for t in qkv.chunk(3, dim=-1))
    elif d.layout == "interleaved":
        q, k, v = qkv.view(b, p, h, 3 * e).transpose(1, 2).chunk(3, dim=-1)
    else:
        parts = torch.split(qkv, [h * e, kv * e, kv * e], dim=-1)
        q, k, v = (split(t, n, e) for t, n in zip(parts, (h, kv, kv)))
    return q, k, v


def attended(d: Draw, k: Tensor, v: Tensor, given: dict[str, Tensor], w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The m keys and values that are attended to."""
    how = d.keys_map
    if how == "cat":
        return torch.cat([given["past_k"], k], 2), torch.cat([given["past_v"], v], 2)
    if how == "written":
        made = []
        for cache, t in ((given["cache_k"], k), (given["cache_v"], v)):
            own = cache.clone()
            own[:, :, 2 : 2 + t.shape[2]] = t
            made.append(own)
        return made[0], made[1]
    if how == "cache":
        return k[:, :, : v.shape[2]], v[:, :, : k.shape[2]]
    if how == "select":
        return k.index_select(2, given["picked"]), v.index_select(2, given["picked"])
    if how == "index":
        return k[:, :, given["picked"]], v[:, :, given["picked"]]
    if how == "gathered":
        at = given["picked"][:, None, :, None]
        k, v = (t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])) for t in (k, v))
        return k, v
    if how == "flip":
        return k.flip(2), v.flip(2)
    if how == "drop":
        return k[:, :, 1:], v[:, :, 1:]
    if how == "pad":
        return torch.nn.functional.pad(k, (0, 0, 1, 0)), torch.nn.functional.pad(v, (0, 0, 1, 0))
    if how == "bias_kv":
        k, v = (torch.cat([t, w[n].expand(t.shape[0], -1, -1, -1)], 2) for t, n in ((k, "bias_k"), (v, "bias_v")))
        return k, v
    if how == "roll":
        return k.roll(1, 2), v.roll(1, 2)
    return k, v


def headed(d: Draw, t: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Keys or values [b, kv, m, e] with as many heads as queries have, or of a shape that broadcasts to them."""
    g, how = d.group, d.heads_map
    if g == 1 or how in ("broadcast", "folded"):
        return t
    if how == "interleave":
        return t.repeat_interleave(g, 1)
    if how == "expand":
        b, kv, m, e = t.shape
        return t[:, :, None].expand(b, kv, g, m, e).reshape(b, kv * g, m, e)
    if how == "repeat":
        return t.repeat(1, g, 1, 1)
    if how == "index":
        return t[:, torch.arange(d.heads) // g]
    if how == "index_select":
        return t.index_select(1, given["groups"])
    return t[:, :, None]
