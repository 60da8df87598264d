"""A drawn attention as a module of plain PyTorch, which can also run with every float of it in float64.

    out = module(*inputs)      mode "own": its own types      "noted": the same, writing down the types of its scores
                               mode "wide": float64, with masks and fills as the noted types make them
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .draws import WINDOW, Draw
from .operands import FAR, TYPES, attended, headed, inputs, operands, parameters

# Scores and parameters → scaled scores.
Scaling = Callable[[Tensor, dict[str, Tensor]], Tensor]


class Composed(nn.Module):
    """The attention of a draw. It takes the tensors of `inputs` in order."""

    def __init__(self, d: Draw) -> None:
        super().__init__()
        self.d, self.mode, self.names = d, "own", tuple(inputs(d, d.queries, d.keys or d.queries))
        self.noted: list[torch.dtype] = []
        self.reading: Iterator[torch.dtype] = iter(())
        made = parameters(d)
        self.weights = tuple(made)
        for n, t in made.items():
            self.register_parameter(n, nn.Parameter(t))

    def widened(self) -> Composed:
        """This module in float64, after a call that noted its types."""
        other = copy.deepcopy(self).double()
        other.mode = "wide"
        return other

    @property
    def w(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {n: getattr(self, n) for n in self.weights}

    def begin(self) -> None:
        """Before a call in a mode other than "own"."""
        if self.mode == "noted":
            self.noted = []
        self.reading = iter(self.noted)

    # --- types ------------------------------------------------------------------------------------------------------

    def _type(self, t: Tensor) -> torch.dtype:
        """The type that a value has in the module's own types."""
        if self.mode == "noted":
            self.noted.append(t.dtype)
        return next(self.reading) if self.mode == "wide" else t.dtype

    def _cast(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return t if self.mode == "wide" else t.to(dtype)

    def _numbers(self, t: Tensor) -> Tensor:
        """Numbers of its own types that are no data, as what is computed with them."""
        return t.double() if self.mode == "wide" else t

    def _fill(self, kind: torch.dtype) -> float:
        low = torch.finfo(kind).min
        value = {"lowest": low, "lowest32": torch.finfo(torch.float32).min, "-inf": -math.inf}.get(self.d.fill)
        value = float(self.d.fill) if value is None else value
        value = value if math.isinf(value) else max(value, low)
        return float(torch.tensor(value, dtype=kind)) if self.mode == "wide" else value

    # --- the call ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Tensor) -> Tensor:
        return self.attend(args, self.w)

    def attend(self, args: Sequence[Tensor], w: dict[str, Tensor]) -> Tensor:
        """The result for these inputs and parameters."""
        d, given = self.d, dict(zip(self.names, args))
        q, k, v = operands(d, given, w)
        q, k = self._normed(q, "q", w), self._normed(k, "k", w)
        k, v = attended(d, k, v, given, w)
        q, k = self._turned(q, k.shape[2]), self._turned(k, k.shape[2])
        if d.row == "sdpa":
            return self._output(self._sdpa(q, k, v, given, w), w)
        q, after = self._scaled_query(q)
        k = k * d.size**-0.25 if d.scale == "both" else k
        p, m, keyed = q.shape[2], k.shape[2], k
        k, v = headed(d, k, given), headed(d, v, given)
        if d.shape == "moving":
            m = WINDOW
            k, v = (F.pad(t, (0, 0, WINDOW - 1, 0)).unfold(2, WINDOW, 1) for t in (k, v))
        if d.heads_map == "grouped" and d.group > 1:
            q = torch.unflatten(q, 1, (d.kv_heads, d.group))
        s = after(self._product(q, k, w), w)
        s = self._biased(s, q, keyed, given, w)
        if d.cap:
            s = d.cap * torch.tanh(s / d.cap)
        keep = self._keep(given, p, m) if d.mask != "none" else None
        s = self._masked(s, keep, given)
        a = self._row(s, w)
        a = self._after(a, keep)
        if a.dtype != v.dtype and not d.autocast:
            a = a.to(v.dtype)
        return self._output(self._second(a, v, w), w)

    def _normed(self, t: Tensor, which: str, w: dict[str, Tensor]) -> Tensor:
        norm = self.d.norm
        if norm == "l2":
            return F.normalize(t, dim=-1)
        if norm == "rms":
            wide = self._cast(t, torch.float32)
            return self._cast(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6), t.dtype) * w[f"norm_{which}"]
        if norm == "layer":
            return F.layer_norm(t, (self.d.size,), w[f"norm_{which}"])
        return t

    def _turned(self, t: Tensor, keys: int) -> Tensor:
        """Rotary positions; queries are the last ones."""
        if self.d.rope == "none":
            return t
        half, n = self.d.size // 2, t.shape[2]
        at = (torch.arange(n) + (keys - n)).float()[:, None] * 10.0 ** (-torch.arange(half) / half)
        cos, sin = (self._numbers(x.to(self._type(t))) for x in (at.cos(), at.sin()))
        if self.d.rope == "half":
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
            x, y = t.chunk(2, dim=-1)
            return t * cos + torch.cat([-y, x], -1) * sin
        x, y = t[..., ::2], t[..., 1::2]
        return torch.stack([x * cos - y * sin, x * sin + y * cos], -1).flatten(-2)

    def _scaled_query(self, q: Tensor) -> tuple[Tensor, Scaling]:
        d = self.d
        if d.scale == "query":
            q = q * d.size**-0.5
        if d.scale == "both":
            q = q * d.size**-0.25

        def after(s: Tensor, w: dict[str, Tensor]) -> Tensor:
            if d.product == "baddbmm" or d.scale in ("query", "both", "none"):
                return s
            if d.scale == "divided":
                return s / math.sqrt(d.size)
            if d.scale == "inplace":
                return s.mul_(d.size**-0.5)
            if d.scale == "after":
                return torch.mul(s, d.size**-0.5)
            learned = w["scale"]
            by = learned.exp() if d.scale == "learned_exp" else learned.clamp(max=0.1).exp() if d.scale == "clamped" else learned
            return s * self._fit(by[None])

        return q, after

    def _fit(self, t: Tensor) -> Tensor:
        """What broadcasts over [b, h, p, m], in the shape of the scores."""
        d = self.d
        while t.dim() < 4:
            t = t[None]
        if d.shape == "merged":
            return t.expand(d.batch, d.heads, -1, -1).reshape(d.batch * d.heads, t.shape[2], t.shape[3])
        if d.heads_map == "grouped" and d.group > 1:
            return t[:, :, None] if t.shape[1] == 1 else torch.unflatten(t, 1, (d.kv_heads, d.group))
        return t

    def _product(self, q: Tensor, k: Tensor, w: dict[str, Tensor]) -> Tensor:
        """[b, h, p, m]; keys [b, h, m, e], or [b, h, p, e, m] where a row has its own."""
        d = self.d
        if d.shape == "moving":
            if d.product == "einsum":
                return torch.einsum("bhpe,bhpem->bhpm", q, k)
            return (q[..., None] * k).sum(-2) if d.product == "mulsum" else (q[..., None, :] @ k).squeeze(-2)
        if d.shape == "merged" or d.product in ("bmm", "baddbmm"):
            rows, keys = q.flatten(0, 1), k.flatten(0, 1)
            if d.product == "baddbmm":
                alpha = d.size**-0.5 if d.scale not in ("query", "both", "none") else 1.0
                empty = torch.empty(rows.shape[0], rows.shape[1], keys.shape[1], dtype=rows.dtype)
                s = torch.baddbmm(empty, rows, keys.mT, beta=0.0, alpha=alpha)
            elif d.product == "einsum":
                s = torch.einsum("bpe,bme->bpm", rows, keys)
            else:
                s = torch.bmm(rows, keys.mT)
            return s if d.shape == "merged" else s.view(d.batch, d.heads, s.shape[1], s.shape[2])
        if d.heads_map == "folded" and d.group > 1:
            b, h, p, e = q.shape
            q = q.reshape(b, d.kv_heads, d.group * p, e)
            s = q @ k.mT if d.product != "reverse" else (k @ q.mT).mT
            return s.reshape(b, h, p, k.shape[2])
        if d.product == "einsum" and q.dim() == 4:
            return torch.einsum("bhpe,bhme->bhpm", q, k.expand(-1, q.shape[1], -1, -1))
        if d.product == "einsum":
            return torch.einsum("bkgpe,bkme->bkgpm", q, k[:, :, 0])
        if d.product == "weighed":
            return torch.einsum("bhpe,bhme,e->bhpm", q, k, w["product_gain"])
        if d.product == "vecdot":
            pairs: Tensor = torch.linalg.vecdot(q[..., :, None, :], k[..., None, :, :])
            return pairs
        if d.product == "mulsum":
            return (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
        if d.product == "reverse":
            return (k @ q.mT).mT
        return q @ k.mT

    def _second(self, a: Tensor, v: Tensor, w: dict[str, Tensor]) -> Tensor:
        """[b, h, p, f]; values [b, h, m, f], or [b, h, p, f, m] where a row has its own."""
        d = self.d
        if d.shape == "moving":
            if d.second == "einsum":
                return torch.einsum("bhpm,bhpfm->bhpf", a, v)
            return (a[..., None, :] * v).sum(-1) if d.second == "mulsum" else (v @ a[..., None]).squeeze(-1)
        if d.shape == "merged":
            values = v.flatten(0, 1)
            out = torch.einsum("bpm,bmf->bpf", a, values) if d.second == "einsum" else torch.bmm(a, values)
            return out.view(d.batch, d.heads, out.shape[1], out.shape[2])
        if d.heads_map == "folded" and d.group > 1:
            b, h, p, m = a.shape
            return (a.reshape(b, d.kv_heads, d.group * p, m) @ v).view(b, h, p, v.shape[3])
        if d.second == "bmm":
            return torch.bmm(a.flatten(0, 1), v.flatten(0, 1)).view(d.batch, d.heads, a.shape[2], v.shape[3])
        if d.second == "einsum" and a.dim() == 4:
            out = torch.einsum("bhpm,bhmf->bhpf", a, v.expand(-1, a.shape[1], -1, -1))
        elif d.second == "weighed":
            out = torch.einsum("bhpm,bhmf,h->bhpf", a, v, w["second_gain"])
        elif d.second == "vecdot":
            out = torch.linalg.vecdot(a[..., :, None, :], v.mT[..., None, :, :])
        elif d.second == "mulsum":
            out = (a[..., None] * v[..., None, :, :]).sum(-2)
        elif d.second == "reverse":
            out = (v.mT @ a.mT).mT
        else:
            out = a @ v
        return out.flatten(1, 2) if out.dim() == 5 else out

    def _output(self, out: Tensor, w: dict[str, Tensor]) -> Tensor:
        if self.d.out == "bhpf":
            return out
        if self.d.out == "permuted":
            return out.permute(2, 0, 1, 3).contiguous()
        out = out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)
        return F.linear(out, w["wo"]) if self.d.out == "projected" else out

    # --- scores -----------------------------------------------------------------------------------------------------

    def _biased(self, s: Tensor, q: Tensor, k: Tensor, given: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        d = self.d
        if d.bias == "none":
            return s
        bias = self._fit(self._bias(q, k, given, w))
        if d.bias_inplace:
            s += bias
            return s
        return s + bias

    def _bias(self, q: Tensor, k: Tensor, given: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        """What the scores get added, broadcasting over [b, h, p, m]; q [b, h, p, e] or by groups, k [b, kv, m, e]."""
        d, p, m = self.d, q.shape[-2], k.shape[2]
        i, j = torch.arange(p)[:, None] + (m - p), torch.arange(m)
        if d.bias == "alibi":
            return -w["slopes"][:, None, None] * (i - j).abs()
        if d.bias == "alibi_keys":
            return w["slopes"][:, None, None] * j
        if d.bias == "alibi_constant":
            slopes = 2.0 ** -(torch.arange(d.heads) + 1.0)
            return self._numbers((slopes[:, None, None] * (j - i)).to(self._type(q)))
        if d.bias == "gaussian":
            return -(i - j).pow(2) * F.softplus(w["slopes"])[:, None, None] * 0.05
        if d.bias == "table":
            return F.embedding((j - i).clamp(-9, 9) + 9, w["table"]).permute(2, 0, 1)
        if d.bias == "buckets":
            far = (j - i).abs()
            near = far < 8
            large = 8 + (torch.log(far.clamp(min=1).float() / 8) / math.log(4.0) * 8).to(torch.int64)
            bucket = torch.where(near, far, large.clamp(max=15)) + (j > i).to(torch.int64) * 16
            return F.embedding(bucket, w["table"]).permute(2, 0, 1).unsqueeze(0)
        if d.bias == "swin":
            return w["table"][given["index"].view(-1)].view(p, m, -1).permute(2, 0, 1).contiguous()
        if d.bias == "data":
            return given["bias"]
        if d.bias == "per_head":
            return w["head_bias"]
        if d.bias == "padded":
            return F.pad(given["bias"], (1, 0))
        if d.bias == "joined":
            return torch.cat([w["head_bias"].expand(-1, p, -1)[None], given["bias"]], -1)
        if d.bias == "keyed":
            gates = (k * w["gate"]).sum(-1)[:, :, None, :]
            return gates.repeat_interleave(d.group, 1) if d.group > 1 else gates
        all_heads = q.flatten(1, 2) if q.dim() == 5 else q
        scores = all_heads @ w["relative"].mT
        at = ((j - i) + FAR).expand(d.batch, d.heads, p, m)
        return scores.gather(-1, at)

    def _keep(self, given: dict[str, Tensor], p: int, m: int) -> Tensor:
        """Which keys a row keeps, of a shape that broadcasts over [b, h, p, m]."""
        d = self.d
        keep = self._one(d.mask, given, p, m)
        if d.second_mask == "none":
            return keep
        other = self._one(d.second_mask, given, p, m)
        return keep & other if d.join == "and" else keep | other

    def _one(self, name: str, given: dict[str, Tensor], p: int, m: int) -> Tensor:
        i, j = torch.arange(p)[:, None] + (m - p), torch.arange(m)
        if name == "causal":
            return torch.ones(p, m, dtype=torch.bool).tril(m - p)
        if name == "triu":
            return ~torch.triu(torch.ones(p, m, dtype=torch.bool), diagonal=m - p + 1)
        if name == "positions":
            return i >= j
        if name == "upper_left":
            return torch.ones(p, m).tril() == 1
        if name == "window":
            return (i >= j) & (i - j < 5)
        if name == "near":
            return (i - j).abs() <= 3
        if name == "blocks":
            return i // 4 == j // 4
        if name == "prefix":
            return (j < 4) | (i >= j)
        if name == "stride":
            return (i - j) % 3 == 0
        if name == "reach":
            return torch.arange(p)[:, None] + j >= m - 1
        if name == "dilated":
            return (i >= j) & ((i - j) % 2 == 0)
        if name == "per_head":
            return (i - j).abs() < 2 * (torch.arange(self.d.heads) + 1)[:, None, None]
        data = given[name]
        if name == "padding_bool":
            return data[:, None, None, :]
        if name == "padding_int":
            return data.bool()[:, None, None, :]
        if name == "padding_float":
            return data[:, None, None, :] > 0.5
        if name == "lengths":
            return (j < data[:, None])[:, None, None, :]
        if name == "data":
            return data
        groups = data.cumsum(-1) if name == "spans" else data
        return (groups[:, -p:, None] == groups[:, None, -m:])[:, None]

    def _added(self, keep: Tensor, kind: torch.dtype) -> Tensor:
        """A mask as numbers that scores get added, made in a type."""
        form = self.d.form
        if form == "logarithm":
            return self._numbers(keep.to(kind).log())
        if form in ("arithmetic", "subtracted"):
            single = kind if kind == torch.float64 else torch.float32
            fill = self._fill(single) if self.d.fill != "lowest" else self._fill(kind)
            made = (1.0 - keep.to(single)) * fill if form == "arithmetic" else -((~keep).to(single) * -fill)
            return self._numbers(made.to(kind))
        return self._numbers(torch.zeros(keep.shape, dtype=kind).masked_fill(~keep, self._fill(kind)))

    def _masked(self, s: Tensor, keep: Tensor | None, given: dict[str, Tensor]) -> Tensor:
        d = self.d
        if keep is None or d.form in ("multiplied_after", "zeroed_after"):
            return s
        kind = self._type(s)
        if d.form == "added_data":
            return s + self._fit(given["additive"])
        if d.form in ("added", "arithmetic", "subtracted", "logarithm"):
            return s + self._fit(self._added(keep, kind))
        if d.form == "added_":
            s += self._fit(self._added(keep, kind))
            return s
        fill, kept = self._fill(kind), self._fit(keep)
        if d.form == "masked_fill_":
            return s.masked_fill_(~kept, fill)
        if d.form == "where":
            return torch.where(kept, s, fill)
        if d.form == "where_tensor":
            return torch.where(kept, s, torch.full((), fill, dtype=s.dtype))
        if d.form == "index_put_":
            s[~kept.expand_as(s)] = fill
            return s
        return s.masked_fill(~kept, fill)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _row(self, s: Tensor, w: dict[str, Tensor]) -> Tensor:
        row = self.d.row
        if row == "softmax":
            return s.softmax(-1)
        if row == "softmax32":
            return self._cast(F.softmax(s, dim=-1, dtype=torch.float64 if self.mode == "wide" else torch.float32), s.dtype)
        if row == "float":
            return self._cast(self._cast(s, torch.float32).softmax(-1), s.dtype)
        if row == "log_softmax":
            return s.log_softmax(-1).exp()
        if row == "logsumexp":
            return (s - s.logsumexp(-1, keepdim=True)).exp()
        if row in ("manual", "manual_where", "off_by_one"):
            top = s.amax(-1, keepdim=True)
            if row == "manual_where":
                top = top.masked_fill(top == -math.inf, 0.0)
            e = (s - top).exp()
            total = e.sum(-1, keepdim=True)
            return e / (total + torch.exp(-top)) if row == "off_by_one" else e / total.clamp_min(1e-6)
        if row == "temperature":
            return (s / (1.0 + F.softplus(self._fit(w["sink"][:, None, None])))).softmax(-1)
        if row.startswith("sink"):
            return self._sink(s, w)
        return self._pointwise(s)

    def _sink(self, s: Tensor, w: dict[str, Tensor]) -> Tensor:
        row, sink = self.d.row, self._fit(w["sink"][:, None, None]).expand(*s.shape[:-1], 1)
        if row == "sink_lse":
            return (s - torch.logaddexp(s.logsumexp(-1, keepdim=True), sink)).exp()
        joined = torch.cat([s, sink.to(s.dtype)], -1)
        if row == "sink_log":
            return joined.log_softmax(-1)[..., :-1].exp()
        if row == "sink32":
            joined = joined - joined.max(-1, keepdim=True).values
            wide = torch.float64 if self.mode == "wide" else torch.float32
            return self._cast(F.softmax(joined, dim=-1, dtype=wide)[..., :-1], s.dtype)
        return joined.softmax(-1)[..., :-1]

    def _pointwise(self, s: Tensor) -> Tensor:
        row = self.d.row
        if row == "sigmoid":
            return torch.sigmoid(s - math.log(4.0))
        if row == "relu2":
            return F.relu(s).square() / s.shape[-1]
        if row == "linear":
            return s / s.shape[-1]
        if row == "elu":
            return (F.elu(s) + 1.0) / s.shape[-1]
        if row == "relu_norm":
            made = F.relu(s)
        elif row == "softplus_norm":
            made = F.softplus(s)
        else:
            made = s.square() if row == "square_norm" else s.abs()
        return torch.div(made, made.sum(-1, keepdim=True) + 0.1)

    def _after(self, a: Tensor, keep: Tensor | None) -> Tensor:
        after = self.d.after
        if keep is not None and self.d.form == "multiplied_after":
            a = a * self._fit(keep)
            a = a / (a.sum(-1, keepdim=True) + 1e-3)
        if keep is not None and self.d.form == "zeroed_after":
            a = a.masked_fill(~self._fit(keep), 0.0)
        if after == "dropout":
            return F.dropout(a, 0.0, training=True)
        if after == "nan_to_num":
            return torch.nan_to_num(a)
        if after == "zeroed" and keep is not None:
            return a.masked_fill(~self._fit(keep), 0.0)
        if after == "any" and keep is not None:
            return a * self._fit(keep).any(-1, keepdim=True)
        return self._cast(a, TYPES[self.d.dtype]) if after == "cast" else a

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        d, mask = self.d, None
        p, m, keyed = q.shape[2], k.shape[2], k
        causal = d.mask == "upper_left" and d.second_mask == "none" and d.form == "masked_fill" and d.bias == "none"
        if d.mask != "none" and not causal:
            kind = self._type(q)
            keep = self._keep(given, p, m)
            plain = d.form == "masked_fill" and d.bias == "none"
            mask = keep if plain else given["additive"] if d.form == "added_data" else self._added(keep, kind)
        if d.bias != "none":
            bias = self._bias(q, keyed, given, w)
            mask = self._cast(bias if mask is None else bias + mask, q.dtype)
        grouped = d.group > 1 and d.heads_map == "index"
        if not grouped:
            k, v = headed(d, k, given), headed(d, v, given)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
