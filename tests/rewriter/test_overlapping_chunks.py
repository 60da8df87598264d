"""Chunks that have tokens in common: scores by distance that are put together of chunks are keys under a mask.

    S[i,j] = Q[i] · K[i + j − W]        cut from products of chunks of 2·W tokens, rows skewed by a padding and a view
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reattend
from reattend.patterns import expr as ex
from reattend.patterns.windows.places import settled
from reattend.rewriter.find import detect
from reattend.rewriter.graph.functional import functional

from .helpers import error_of, graph_of, read, values_of

B, H, D = 2, 3, 8


def tokens(n: int = 24, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, n, D, dtype=dtype) for _ in range(3)]


def strided(x: Tensor, w: int) -> Tensor:
    """(G, S, D) → (G, S/w − 1, 2·w, D): each chunk has w tokens of the next one."""
    g, s, d = x.shape
    return x.contiguous().as_strided((g, s // w - 1, 2 * w, d), (s * d, w * d, d, 1))


def unfolded(x: Tensor, w: int) -> Tensor:
    return x.unfold(1, 2 * w, w).transpose(2, 3)


def by_distance(q: Tensor, k: Tensor, w: int, chunks: Callable[[Tensor, int], Tensor] = strided, masked: bool = True) -> Tensor:
    """(B, H, S, D) twice → (B, H, S, 2·w + 1): scores of each row with the keys at i − w … i + w."""
    b, h, s, _ = q.shape
    q, k = (x.reshape(b * h, s, -1) for x in (q, k))
    c = torch.einsum("gcxd,gcyd->gcxy", chunks(q, w), chunks(k, w))
    c = F.pad(c, (0, 0, 0, 1)).view(b * h, s // w - 1, 2 * w, 2 * w + 1)
    out = q.new_zeros(b * h, s // w, w, 2 * w + 1)
    out[:, :-1, :, w:] = c[:, :, :w, : w + 1]
    out[:, -1, :, w:] = c[:, -1, w:, : w + 1]
    out[:, 1:, :, :w] = c[:, :, -(w + 1) : -1, w + 1 :]
    out[:, 0, 1:w, 1:w] = c[:, 0, : w - 1, 1 - w :]
    out = out.view(b, h, s, 2 * w + 1)
    if masked:
        early = torch.arange(w)[:, None] + torch.arange(w + 1) < w
        out[:, :, :w, : w + 1] = out[:, :, :w, : w + 1].masked_fill(early, -torch.inf)
        out[:, :, -w:, -(w + 1) :] = out[:, :, -w:, -(w + 1) :].masked_fill(early.flip(0, 1), -torch.inf)
    return out


def weighed(p: Tensor, v: Tensor, w: int) -> Tensor:
    """(B, H, S, 2·w + 1), (B, H, S, D) → (B, H, S, D): rows of weights skewed to meet chunks of 3·w values."""
    b, h, s, _ = p.shape
    d = v.shape[-1]
    v = F.pad(v.reshape(b * h, s, d), (0, 0, w, w), value=-1.0)
    v = v.as_strided((b * h, s // w, 3 * w, d), ((s + 2 * w) * d, w * d, d, 1))
    p = F.pad(p.reshape(b * h, s // w, w, 2 * w + 1), (0, w + 1)).view(b * h, s // w, -1)
    p = p[:, :, :-w].view(b * h, s // w, w, 3 * w + 1)[..., :-1]
    return torch.einsum("gcwd,gcdf->gcwf", p, v).view(b, h, s, d)


def attend(q: Tensor, k: Tensor, v: Tensor, w: int) -> Tensor:
    return weighed((by_distance(q, k, w) * 0.3).softmax(-1), v, w)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, 4)


def odd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, 3)


def cut_by_unfold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighed((by_distance(q, k, 4, unfolded) * 0.3).softmax(-1), v, 4)


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask of tokens is put together of chunks as well, and rows of padding are set to 0."""
    drop = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool).index_fill(1, torch.tensor([20, 21, 23]), True)
    bias = drop[:, None, :, None].to(q.dtype) * torch.finfo(q.dtype).min
    s = by_distance(q, k, 4) * 0.3 + by_distance(torch.ones_like(bias), bias, 4)
    return weighed(s.softmax(-1).masked_fill(drop[:, None, :, None], 0.0), v, 4)


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows are normalised in another type than their scores have."""
    return weighed((by_distance(q, k, 4) * 0.3).softmax(-1, torch.float64), v.double(), 4)


@pytest.mark.parametrize("fn", [plain, odd, cut_by_unfold, padded])
def test_scores_put_together_of_chunks_are_keys_under_a_mask(fn: Callable[..., Tensor]) -> None:
    args = tokens()
    gm = functional(graph_of(fn, args))
    assert gm is not None
    (found,), missed = detect.find(gm)
    assert not missed
    assert error_of(found, values_of(gm, args)) <= 1e-12
    assert found.window == (7 if fn is odd else 9)
    assert not {"pad", "einsum", "as_strided"} & {n.name for n in found.tensors.values()}
    assert found.cascade.rank["m"].size == 24


def test_rows_that_are_normalised_in_another_type() -> None:
    gm = functional(graph_of(widened, tokens(dtype=torch.bfloat16)))
    assert gm is not None
    (found,), missed = detect.find(gm)
    assert not missed
    assert found.window == 9


class Model(nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fn", [plain, padded])
def test_our_kernel_runs_as_the_model_does(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    args = [x.requires_grad_() for x in tokens(dtype=dtype)]
    ours = reattend.optimize(Model(fn), policy=reattend.Policy(allow="reattend", deny="original"))
    got, want, exact = ours(*args), fn(*args), fn(*(x.detach().double() for x in args))
    own = float((want - exact).abs().max())
    assert float((got - exact).abs().max()) <= 2 * own + 1e-6
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), args) for y in (got, want))):
        assert float((a - b).abs().max()) <= (1e-4 if dtype is torch.float32 else 0.05) * float(b.abs().max())
    (site,) = reattend.report(ours).sites
    assert site.kernel == "reattend"
    assert not site.fell_back


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_no_window_holds_reaches_no_row(which: int, number: float) -> None:
    torch._dynamo.reset()
    policy = reattend.Policy(allow="reattend", deny="original", check="never")
    ours, args = reattend.optimize(Model(plain), policy=policy), tokens(dtype=torch.float32)
    ours(*args)
    args[which][0, 0, 13] = number
    assert torch.equal(ours(*args).isfinite(), plain(*args).isfinite())


def test_rows_that_weigh_what_is_no_key_are_no_windows() -> None:
    """Without its masks the first rows weigh products of other rows."""
    def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weighed((by_distance(q, k, 4, masked=False) * 0.3).softmax(-1), v, 4)

    args = tokens()
    gm = functional(graph_of(unmasked, args))
    assert gm is not None
    found, missed = detect.find(gm)
    assert all(error_of(f, values_of(gm, args)) <= 1e-12 and not f.window for f in found)
    assert found or missed


def test_only_tiles_in_the_window_are_visited() -> None:
    def long(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, 32)

    site = reattend.plan(Model(long).eval(), tuple(tokens(1024, torch.float32))).sites[0]
    assert {"causal", "window"} <= site.traits
    assert site.mask is not None
    assert site.mask.density < 0.1


def test_a_strided_view_is_read_where_it_lies() -> None:
    def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.transpose(0, 2).contiguous().as_strided((4, D, H), (D * H, 1, D), 0).transpose(1, 2) for x in (k, v))
        return (q[0, 0] @ k[1:3].transpose(1, 2)).softmax(-1) @ v[1:3]

    view = read(chunked, *tokens(4))
    assert view.cascade.rank[view.key].size == H


# --- places -------------------------------------------------------------------------------------------------------

ROW, WINDOW = ex.index("i"), ex.index("j")


def at(*places: ex.Expr) -> ex.Expr:
    return ex.load("T", places, "f32")


def test_places_that_agree_where_they_count_are_one() -> None:
    choice = ex.where(WINDOW < 4, at(ROW + WINDOW - 1), ex.where(WINDOW >= 4, at((ROW * 9 + WINDOW * 9 - 9) // 9), at(ex.const(0))))
    assert settled(choice, {"i": 7, "j": 9}) is at(WINDOW + ROW - 1)


@pytest.mark.parametrize("other", [at(ROW + WINDOW), at(ex.load("at", (ROW,), "i64")), ex.const(0.0, "f32")])
def test_places_that_differ_somewhere_stay(other: ex.Expr) -> None:
    choice = ex.where((WINDOW < 8) | (ROW < 6), at(ROW + WINDOW - 1), other)
    assert settled(choice, {"i": 7, "j": 9}) is choice


def test_a_condition_on_data_may_hold_anywhere() -> None:
    kept = ex.equal(ex.load("keep", (ROW,), "i64"), 0)
    choice = ex.where(kept & (WINDOW < 9), at(ROW + WINDOW), at(ROW))
    assert settled(choice, {"i": 7, "j": 9}) is choice
    assert settled(ex.where(kept & (WINDOW > 9), at(ROW + WINDOW), at(ROW)), {"i": 7, "j": 9}) is at(ROW)
