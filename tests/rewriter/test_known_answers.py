"""Known answers of recurrences that models contain: sums over sines in float64, of the loop as written and of our scan.

`wave(a, …)` is sin(a·n) for n = 1, 2, … in row-major order. Each is written as its model writes a step. Those of Mamba-1 and RG-LRU
are in test_scans.py, those of selections in test_selection.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reattend.codegen.cpu.scan import ScanKernel, build

from ..tiers import few
from .helpers import values_of
from .test_chunked_scans import widened
from .test_scans import Function, found, wave
from .test_state_spaces import found as found_in
from .test_state_spaces import inputs as state_space_inputs
from .test_state_spaces import state_space


def sums(x: Tensor) -> list[float]:
    return [float(x.sum()), float(x.square().sum())]


def answers(fn: Function, args: tuple[Tensor, ...], *known: tuple[float, float]) -> None:
    """The function's results have these sums, and our scan of its loop gives the same to rounding."""
    said = fn(*args)
    for x, want in zip(said if isinstance(said, tuple) else (said,), known, strict=True):
        assert sums(x) == pytest.approx(want, abs=1e-9)
    same(fn, args, 1e-14)


def same(fn: Function, args: tuple[Tensor, ...], least: float) -> None:
    scan, given, want = found(fn, args)
    kernel = build(scan.recurrence)
    assert isinstance(kernel, ScanKernel), kernel
    got = dict(zip(kernel.outputs, kernel.entry(*(given[n] for n in kernel.inputs))))
    for n, x in want.items():
        assert x.isfinite().all()
        assert (got[n].reshape(x.shape) - x).abs().max() <= least * x.abs().max(), n


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """S' = γ S + k β (v − γ Sᵀk)ᵀ, [b,h,t,·]; the decay g of a head [b,h,t], or of each of its channels [b,h,t,d]."""
    out = []
    for t in range(q.shape[2]):
        decay = g[:, :, t].exp()
        s = s * (decay[..., None, None] if g.dim() == 3 else decay[..., None])
        held = (s * k[:, :, t, :, None]).sum(-2)
        s = s + k[:, :, t, :, None] * (beta[:, :, t, None] * (v[:, :, t] - held))[:, :, None]
        out.append((s * q[:, :, t, :, None]).sum(-2))
    return torch.stack(out, 2), s


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def by_head(*tensors: Tensor) -> list[Tensor]:
    """[b,t,h,…] as [b,h,t,…]."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def delta_case(t: int) -> tuple[Tensor, ...]:
    """Two heads of keys for four of values; half of the published extent."""
    q, k, v = by_head(wave(0.7, 1, t, 2, 8), wave(0.9, 1, t, 2, 8), wave(1.1, 1, t, 4, 6))
    g, beta = by_head(-(1 + wave(1.3, 1, t, 4)), 0.5 + 0.5 * wave(1.7, 1, t, 4))
    q, k = (normed(x).repeat_interleave(2, 1) for x in (q, k))
    return q * 8**-0.5, k, v, g, beta, wave(0.3, 1, 4, 8, 6)


def test_gated_delta_rule() -> None:
    answers(gated_delta, delta_case(70), (0.4126580130, 21.9389983529), (0.0991697916, 6.8622223783))


def channel_case(t: int) -> tuple[Tensor, ...]:
    q, k, v = by_head(wave(0.7, 1, t, 4, 8), wave(0.9, 1, t, 4, 8), wave(1.1, 1, t, 4, 6))
    g, beta = by_head(-2 * (1 + wave(1.3, 1, t, 4, 8)), 0.5 + 0.5 * wave(1.7, 1, t, 4))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    return q * 8**-0.5, k, v, g, beta, wave(0.3, 1, 4, 8, 6)


def test_delta_rule_under_a_decay_of_each_channel() -> None:
    answers(gated_delta, channel_case(70), (-0.6855288447, 16.6814689219), (-0.0767568156, 4.7513788490))


def test_state_space_in_chunks() -> None:
    args = state_space_inputs(70)
    y, s = state_space(*args)
    assert sums(y) == pytest.approx([78.6614972218, 9807.1283860784], rel=1e-6)
    assert sums(s) == pytest.approx([0.9572997415, 88.0835165059], rel=1e-6)
    # what the model rounds to float32 inside is float64 here
    gm = widened(state_space, args)
    scan, _ = found_in(gm)
    values = values_of(gm, args)
    kernel, c = build(scan.recurrence), scan.recurrence.cascade
    assert isinstance(kernel, ScanKernel)
    got = dict(zip(kernel.outputs, kernel.entry(*(values[scan.tensors[n]].reshape(c.tensor[n].shape) for n in kernel.inputs))))
    assert sums(got["S"]) == pytest.approx([0.9572997415, 88.0835165059], abs=1e-9)


def constant_decay(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """S' = λ S + k vᵀ, λ = exp(−slope) of each head."""
    s = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=k.dtype)
    out = []
    for t in range(q.shape[2]):
        s = rate[:, None, None] * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((s * q[:, :, t, :, None]).sum(-2))
    return torch.stack(out, 2), s


def test_lightning() -> None:
    q, k, v = (wave(a, 1, 4, 45, 4) for a in (0.7, 0.9, 1.1))
    rate = torch.exp(-(2.0 ** -torch.arange(1, 5, dtype=torch.float64)))
    answers(constant_decay, (q, k, v, rate), (0.4981273134, 866.6128158631), (-0.8008799066, 18.4633755768))


def weighted_mean(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RWKV-4: a mean under a running maximum, and its states."""
    m, n, d = torch.full_like(k[:, 0], -1e38), torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
    out = torch.zeros_like(v)
    for t in range(k.shape[1]):
        q = torch.maximum(m, k[:, t] + u)
        e, f = torch.exp(m - q), torch.exp(k[:, t] + u - q)
        out[:, t] = (e * n + f * v[:, t]) / (e * d + f)
        q = torch.maximum(m + w, k[:, t])
        e, f = torch.exp(m + w - q), torch.exp(k[:, t] - q)
        m, n, d = q, e * n + f * v[:, t], e * d + f
    return out * 1, n * 1, d * 1


def test_rwkv() -> None:
    args = 3 * wave(0.7, 1, 33, 5), wave(0.9, 1, 33, 5), -wave(0.5, 5).exp(), wave(0.6, 5)
    answers(
        weighted_mean, args,
        (2.0606639725, 58.4479884805), (1.9990435757, 2.7842000695), (5.4348645537, 5.9707838942),
    )


@pytest.mark.parametrize(
    ("of", "g"), few([(of, g) for of in ("head", "channel") for g in (0.0, -1e-6, -100.0, -1000.0)], ("channel", -1000.0))
)
def test_extreme_decays(of: str, g: float) -> None:
    """150 steps of one decay, of every second channel where each has its own: never an overflow."""
    case = delta_case(150) if of == "head" else channel_case(150)
    decay = torch.full_like(case[3], g)
    if of == "channel":
        decay[..., ::2] = 0.0
    same(gated_delta, (*case[:3], decay, *case[4:]), 1e-13)
