"""Faults met in the field, as small models: `CASES[name]` has a model and its inputs, and stands for a kind of fault.

A kind has a section of its own. Where a case says `kernel`, a kernel of ours or a vendor's has to run: leaving the model's
code alone is no answer there. Where it says `gradients`, those of its floating inputs have to be the original's as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INF = math.inf
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """`make()` gives a fresh model and its inputs."""

    kind: str
    make: Callable[[], tuple[nn.Module, Inputs]]
    kernel: bool = True
    gradients: bool = False


CASES: dict[str, Case] = {}


def case(kind: str, **options: bool) -> Callable[[Callable[[], tuple[nn.Module, Inputs]]], Any]:
    def add(make: Callable[[], tuple[nn.Module, Inputs]]) -> Callable[[], tuple[nn.Module, Inputs]]:
        CASES[make.__name__] = Case(kind, make, **options)
        return make

    return add


class Fn(nn.Module):
    """A function as a model."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Any) -> Any:
        return self.f(*args)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights: Tensor = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v


def causal(a: Tensor, fill: float = -INF) -> Tensor:
    return a.masked_fill(torch.ones(a.shape[-2:], dtype=torch.bool).triu(1), fill)


# --- 16 bits: operands that are no view ---------------------------------------------------------------------------


def repeated(dtype: torch.dtype, batch: int) -> tuple[nn.Module, Inputs]:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1))

    return Fn(f), tensors((batch, 8, 512, 64), *2 * [(batch, 2, 512, 64)], dtype=dtype)


@case("16 bits")
def heads_repeated_bf16() -> tuple[nn.Module, Inputs]:
    return repeated(torch.bfloat16, 1)


@case("16 bits")
def heads_repeated_fp16_in_a_batch() -> tuple[nn.Module, Inputs]:
    return repeated(torch.float16, 2)


def plane(dtype: torch.dtype, batch: int) -> tuple[nn.Module, Inputs]:
    model = Fn(lambda q, k, v: attend(q, k.flatten(2, 3), v.flatten(2, 3)))
    return model, tensors((batch, 4, 576, 32), *2 * [(batch, 4, 24, 24, 32)], dtype=dtype)


@case("16 bits")
def keys_flattened_from_a_plane_fp16() -> tuple[nn.Module, Inputs]:
    return plane(torch.float16, 1)


@case("16 bits")
def keys_flattened_from_a_plane_bf16_in_a_batch() -> tuple[nn.Module, Inputs]:
    return plane(torch.bfloat16, 2)


@case("16 bits")
def pages_bf16() -> tuple[nn.Module, Inputs]:
    q, k, v = tensors((2, 4, 256, 64), *2 * [(40, 16, 4, 64)], dtype=torch.bfloat16)
    table = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    return Fn(lambda q, k, v, t: attend(q, *(x[t].flatten(1, 2).transpose(1, 2) for x in (k, v)))), (q, k, v, table)


# --- 16 bits: what is rounded once, is rounded alike everywhere -----------------------------------------------------


def learned(dtype: torch.dtype, rule: Callable[[Tensor], Tensor], logits: tuple[float, ...]) -> tuple[nn.Module, Inputs]:
    """Values are 1, so that a row of the result has to be 1."""

    def f(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        a = q @ k.mT * rule(s)
        e = (a - a.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True) @ v

    q, k = tensors(*2 * [(1, 4, 1024, 32)], dtype=dtype)
    return Fn(f), (q, k, torch.ones_like(q), torch.tensor(logits).view(4, 1, 1).to(dtype))


@case("16 bits")
def exp_of_a_learned_scale_bf16() -> tuple[nn.Module, Inputs]:
    return learned(torch.bfloat16, lambda s: s.exp() * 0.35, (0.3, 1.0, 1.5, 2.3))


@case("16 bits")
def softplus_of_a_learned_scale_fp16() -> tuple[nn.Module, Inputs]:
    return learned(torch.float16, lambda s: F.softplus(s) * 0.7, (0.3, 1.0, 5.5, 7.3))


@case("16 bits")
def a_clamped_learned_scale_bf16() -> tuple[nn.Module, Inputs]:
    return learned(torch.bfloat16, lambda s: s.clamp(max=2.0).exp().sqrt() / 3.0, (0.3, 1.0, 1.5, 2.3))


# --- row rules ------------------------------------------------------------------------------------------------------


def sink(
    rule: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32, factor: float = 0.125, fill: float = -INF
) -> tuple[nn.Module, Inputs]:
    def f(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        a = causal(q @ k.mT * factor, fill)
        a = torch.cat([a, s.view(1, -1, 1, 1).expand(*a.shape[:3], 1)], -1)
        return rule(a)[..., :-1] @ v

    return Fn(f), (*tensors(*3 * [(1, 4, 1024, 64)], dtype=dtype), torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=dtype))


def by_log_sum_exp(a: Tensor) -> Tensor:
    return (a - a.logsumexp(-1, keepdim=True)).exp()


@case("row rules")
def sink_by_log_softmax() -> tuple[nn.Module, Inputs]:
    return sink(lambda a: a.log_softmax(-1).exp())


@case("row rules")
def sink_by_log_sum_exp() -> tuple[nn.Module, Inputs]:
    return sink(by_log_sum_exp)


@case("row rules")
def sink_by_log_softmax_of_large_scores() -> tuple[nn.Module, Inputs]:
    """Scores of several hundred: an exponential without its row's bound passes all numbers."""
    return sink(lambda a: a.log_softmax(-1).exp(), factor=12.0)


@case("row rules")
def sink_by_log_sum_exp_of_a_finite_fill() -> tuple[nn.Module, Inputs]:
    return sink(by_log_sum_exp, fill=torch.finfo(torch.float32).min)


@case("row rules")
def sink_by_log_softmax_in_fp32_of_bf16() -> tuple[nn.Module, Inputs]:
    return sink(lambda a: a.log_softmax(-1, dtype=torch.float32).exp().to(a.dtype), torch.bfloat16)


@case("row rules")
def a_gated_row_by_log_sum_exp() -> tuple[nn.Module, Inputs]:
    """The normaliser holds a number of the row that no key has: exp(s − log(Σ exp s + exp g))."""

    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Any:
        a = q @ k.mT * 0.125
        total = (a.logsumexp(-1, keepdim=True).exp() + g.exp()).log()
        return (a - total).exp() @ v

    return Fn(f), (*tensors(*3 * [(1, 4, 1024, 64)]), *tensors((1, 4, 1024, 1)))


# --- rows without a key ---------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """An additive mask of the model's own: numbers that want no gradient."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return (q @ k.mT * 0.125 + self.mask).softmax(-1) @ v


def left_padded(fill: float, dtype: torch.dtype = torch.float32, data: bool = False) -> tuple[nn.Module, Inputs]:
    """A causal mask and padding at the left of one sequence: its first rows keep no key. `data`: the mask is numbers."""
    keep = torch.ones(2, 1, 1, 256, dtype=torch.bool)
    keep[0, ..., :8] = False
    mask = torch.ones(256, 256, dtype=torch.bool).tril() & keep
    qkv = tensors(*3 * [(2, 4, 256, 64)], dtype=dtype)
    if data:
        return Masked(torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, fill)), qkv
    return Fn(lambda q, k, v, keep: (q @ k.mT * 0.125).masked_fill(~keep, fill).softmax(-1) @ v), (*qkv, mask)


@case("rows without a key", kernel=False, gradients=True)
def gradients_of_rows_masked_by_a_finite_fill() -> tuple[nn.Module, Inputs]:
    return left_padded(torch.finfo(torch.float32).min)


@case("rows without a key", kernel=False, gradients=True)
def gradients_of_rows_masked_by_a_finite_fill_bf16() -> tuple[nn.Module, Inputs]:
    return left_padded(torch.finfo(torch.bfloat16).min, torch.bfloat16)


@case("rows without a key", kernel=False)
def additive_mask_of_data_with_empty_rows() -> tuple[nn.Module, Inputs]:
    return left_padded(-INF, data=True)


@case("rows without a key", kernel=False)
def additive_mask_of_data_with_empty_rows_fp16() -> tuple[nn.Module, Inputs]:
    return left_padded(-INF, torch.float16, data=True)


# --- narrow types: a fill beyond their range is an infinity -----------------------------------------------------------


def narrow_fill(f: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float16) -> tuple[nn.Module, Inputs]:
    """`f` masks scores; the first nine rows keep no key, and where a fill becomes −∞ they are NaN."""
    keep = torch.ones(512, 512, dtype=torch.bool).tril()
    keep[:9] = False
    return Fn(lambda q, k, v, keep: f(q @ k.mT * 0.125, keep).softmax(-1) @ v), (*tensors(*3 * [(1, 4, 512, 64)], dtype=dtype), keep)


@case("narrow types")
def a_mask_of_float32_cast_to_fp16() -> tuple[nn.Module, Inputs]:
    return narrow_fill(lambda s, keep: s + torch.where(keep, 0.0, -1e9).to(s.dtype))


@case("narrow types")
def a_mask_by_arithmetic_cast_to_fp16() -> tuple[nn.Module, Inputs]:
    return narrow_fill(lambda s, keep: s + ((1.0 - keep.to(torch.float32)) * -1e9).to(s.dtype))


@case("narrow types")
def scores_filled_in_float32_cast_to_fp16() -> tuple[nn.Module, Inputs]:
    return narrow_fill(lambda s, keep: s.to(torch.float32).masked_fill(~keep, -1e9).to(s.dtype))


@case("narrow types")
def a_mask_doubled_in_fp16() -> tuple[nn.Module, Inputs]:
    return narrow_fill(lambda s, keep: s + torch.where(keep, 0.0, -6e4).to(s.dtype) * 2)


@case("narrow types")
def the_lowest_float32_cast_to_bf16() -> tuple[nn.Module, Inputs]:
    lowest = torch.finfo(torch.float32).min
    return narrow_fill(lambda s, keep: s + torch.where(keep, 0.0, lowest).to(s.dtype), torch.bfloat16)


# --- twins: layers alike --------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A layer whose scores get something of its own that is computed from its values."""

    def __init__(self, gate: Callable[[Tensor, Tensor], Tensor], size: int = 32) -> None:
        super().__init__()
        self.qkv, self.scale, self.gate = nn.Linear(size, 3 * size), nn.Parameter(torch.randn(4)), nn.Linear(size, 4)
        self.rule = gate

    def forward(self, x: Tensor) -> Any:
        q, k, v = (t.view(*x.shape[:2], 4, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        gate = self.rule(self.scale, self.gate(v.transpose(1, 2).reshape(*x.shape))).mT
        weights = (q @ k.mT * 0.35 + gate[:, :, None, :]).softmax(-1)
        return x + weights.matmul(v).transpose(1, 2).reshape(x.shape)


def layers(gate: Callable[[Tensor, Tensor], Tensor], many: int, tokens: int) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated(gate) for _ in range(many))).eval().requires_grad_(False)
    return model, tensors((2, tokens, 32))


@case("twins")
def two_layers_with_a_gate_of_their_own_in_the_score() -> tuple[nn.Module, Inputs]:
    return layers(lambda s, g: torch.exp(s * F.softplus(g)), 2, 16)


@case("twins")
def three_layers_with_a_bounded_gate_in_the_score() -> tuple[nn.Module, Inputs]:
    return layers(lambda s, g: torch.tanh(s + g) * s, 3, 300)


@case("twins")
def two_layers_with_a_gate_bf16() -> tuple[nn.Module, Inputs]:
    model, (x,) = layers(lambda s, g: torch.exp(s.sigmoid() * F.softplus(g)), 2, 64)
    return model.bfloat16(), (x.bfloat16(),)
