"""Places that are no attention to a rule are named all the same: states, sums over tokens, scores made pair by pair."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reattend
from reattend.rewriter.choose.policy import StrictError
from reattend.rewriter.find import detect
from tests.tiers import few, one_in

from .helpers import graph_of

pytestmark = pytest.mark.thin(3)

WEIGHT = torch.randn(4, 4)


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def over_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (phi(q) @ (phi(k).mT @ v)) / (phi(q) @ phi(k).sum(-2, keepdim=True).mT)


def channels_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
    return torch.einsum("bhde,bhdn->bhen", state, q.softmax(-2))


def padded_with_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = (F.pad(v, (0, 0, 0, 1), value=1.0) @ k.relu().mT) @ q.relu()
    return out[:, :, :-1] / (out[:, :, -1:] + 1e-15)


def of_a_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(q.relu(), torch.bmm(k.relu().transpose(1, 2), v))


def scores_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (phi(q) @ phi(k).mT) @ v


def three_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhde", phi(k), v)
    total = 1 / torch.einsum("bhnd,bhd->bhn", phi(q), phi(k).sum(-2))
    return torch.einsum("bhnd,bhde,bhn->bhne", phi(q), state, total)


def three_of_one_letter(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bhnd,bhne->bhde", phi(k), v)
    return torch.einsum("bhnd,bhde,bhd->bhne", phi(q), state, 1 / phi(k).sum(-2))


def running(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = (phi(k)[..., None] * v[..., None, :]).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", phi(q), state) / (phi(q) * phi(k).cumsum(2)).sum(-1, keepdim=True)


def running_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))


def by_deltas(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for t in range(2):
        key = k[:, :, t, :, None]
        state = state + key * (v[:, :, t] - (state * key).sum(-2))[..., None, :]
        out.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(out, 2)


def distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k)).softmax(-1) @ v


def squares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(q[:, :, :, None] - k[:, :, None]).pow(2).sum(-1)).softmax(-1) @ v


def vectors(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q[:, :, :, None] - k[:, :, None]).tanh().softmax(-2) * v[:, :, None]).sum(-2)


def normed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.layer_norm(q @ k.mT, (k.shape[-2],)).softmax(-1) @ v


def mixed_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    before = F.linear((q @ k.mT).movedim(1, -1), WEIGHT)
    return F.linear(before.softmax(-2), WEIGHT).movedim(-1, 1) @ v


def mixed_by_images(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = WEIGHT[..., None, None]
    return F.conv2d(F.conv2d(q @ k.mT, mix).softmax(-1), mix) @ v


def added_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.baddbmm(v[:, :1], (q @ k.mT).softmax(-1), v)


SITES = (over_features, normalised, padded_with_ones, of_a_batch, scores_first, three_at_once)
NAMED: tuple[tuple[Callable[..., Tensor], str], ...] = (
    (running, "a running sum (cumsum)"),
    (running_products, "a running sum of data"),
    (by_deltas, "added to a state"),
    (distances, "cdist"),
    (squares, "made pair by pair (by sub)"),
    (vectors, "made pair by pair (by sub)"),
    (normed, "layer_norm changes what it weighs"),
    (mixed_twice, "linear mixes them"),
    (mixed_by_images, "conv2d mixes them"),
    (added_to, "baddbmm"),
)


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [torch.randn(batch, 4, 24, 8, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fn", [*SITES, three_of_one_letter, channels_first])
def test_keys_and_values_first_is_a_site(fn: Callable[..., Tensor], batch: int) -> None:
    args = inputs(batch)
    if fn is channels_first:
        args = [x.mT.contiguous() for x in args]
    found, missed = detect.find(graph_of(fn, args))
    assert len(found) == 1, [m.reason for m in missed]


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16, torch.float16], torch.bfloat16))
@pytest.mark.parametrize("fn", SITES)
def test_products_alone_keep_their_order_and_their_gradients(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return fn(*args)

    torch._dynamo.reset()
    args = [x.requires_grad_() for x in inputs(2, dtype)]
    model = reattend.optimize(Model())
    got, want = model(*args), fn(*args)
    assert torch.equal(got, want)
    ours, own = (torch.autograd.grad(y.float().square().sum(), args) for y in (got, want))
    assert all(map(torch.equal, ours, own))
    (site,) = reattend.report(model).sites
    assert site.kernel == "original"
    assert "nothing stands between its two products" in site.site.chosen.why


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("fn", "words"), NAMED)
def test_what_no_rule_reads_is_named(fn: Callable[..., Tensor], words: str, batch: int) -> None:
    found, missed = detect.find(graph_of(fn, inputs(batch)))
    assert not found
    assert missed
    assert all(words in m.reason for m in missed), [m.reason for m in missed]


def test_open_sizes_are_named_as_well() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return normalised(q, k, v) + running(q, k, v)

    plan = reattend.plan(Model(), tuple(inputs(2)), dynamic=True)
    assert [s.kind for s in plan.sites] == ["linear"]
    assert ["cumsum" in m.reason for m in plan.misses] == [True]


class Experts(nn.Module):
    """A mixture of experts behind an attention: its products are of tokens with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.gate = nn.Linear(32, 32), nn.Linear(32, 4)
        self.experts = nn.Parameter(torch.randn(4, 32, 32))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return torch.einsum("bne,bnf->bnf", self.gate(x).softmax(-1), torch.einsum("bnd,edf->bnf", x, self.experts))


class Adapters(nn.Module):
    """Products of weights, and of tokens with them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ self.down @ self.up + k @ (self.down @ self.up) + v.mul(2)


@pytest.mark.parametrize(("model", "sites"), [(Experts(), 1), (Adapters(), 0)])
def test_products_with_weights_are_no_state(model: nn.Module, sites: int) -> None:
    torch._dynamo.reset()
    ours = reattend.optimize(model)
    with torch.no_grad():
        ours(*inputs(2))
    report = reattend.report(ours)
    assert len(report.sites) == sites
    assert not report.misses


def test_the_same_miss_of_many_layers_is_one_line() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.stack([running_products(x, k, v) for x in (q, k, v)])

    torch._dynamo.reset()
    args = tuple(inputs(2))
    ours = reattend.optimize(Model())
    with torch.no_grad():
        ours(*args)
    report, plan = reattend.report(ours), reattend.plan(Model(), args)
    assert len(report.misses) == len(plan.misses) == 3
    for text in (str(report), str(plan)):
        assert text.count("a running sum of data") == 1
        assert "×3" in text


class Feed(nn.Module):
    """A feed-forward that is spelled by products, with an operator between that has no term."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(32, 8))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + torch.matmul(F.celu(torch.matmul(k, self.up)), self.down) + v


def test_a_feed_forward_of_products_is_no_miss() -> None:
    plan = reattend.plan(Feed(), tuple(inputs(2)))
    assert not plan.sites
    assert not plan.misses


@pytest.mark.parametrize(("fn", "words"), [*NAMED[:2], (scores_first, "nothing stands between its two products")])
def test_strict_raises_with_the_reason(fn: Callable[..., Tensor], words: str) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return fn(*args)

    torch._dynamo.reset()
    model = reattend.optimize(Model(), policy=reattend.Policy(strict=True))
    with torch.no_grad(), pytest.raises(StrictError, match=re.escape(words)):
        model(*inputs(2))


@pytest.mark.parametrize("batch", few([1, 2], 2))
@pytest.mark.parametrize("fn", one_in(2, [*SITES, *(f for f, _ in NAMED)]))
def test_a_plan_and_a_report_agree(fn: Callable[..., Tensor], batch: int) -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return fn(*args)

    torch._dynamo.reset()
    ours, args = reattend.optimize(Model()), tuple(inputs(batch))
    with torch.no_grad():
        got, own = ours(*args), fn(*args)
        plan, report = reattend.plan(Model(), args), reattend.report(ours)
    assert [s.kind for s in plan.sites] == [s.site.kind for s in report.sites]
    if all(s.site.chosen.is_original for s in report.sites):
        assert torch.equal(got, own)
    torch.testing.assert_close(got, own, rtol=1e-5, atol=1e-5)
    assert sorted(m.reason for m in plan.misses) == sorted(m.reason for m in report.misses)


def scaled_by_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotated queries and keys that are scaled by where they stand: their own product looks like a last one."""
    where = torch.arange(q.shape[-2], dtype=q.dtype)
    angle = torch.einsum("i,j->ij", where, 1 / 100 ** torch.linspace(0, 1, q.shape[-1], dtype=q.dtype))
    size = 0.9 ** ((where - where.max() // 2) / 8)[:, None]
    q, k = (t * angle.cos() * s + t.flip(-1) * angle.sin() * s for t, s in ((q, size), (k, 1 / size)))
    return (q @ k.mT).softmax(-1) @ v


def test_what_an_attention_computes_is_no_miss_of_its_own() -> None:
    args = [torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(3)]
    found, missed = detect.find(graph_of(scaled_by_position, args))
    assert len(found) == 1
    assert not missed, [m.reason for m in missed]


def with_a_kernel_of_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token weighs its neighbours by what a layer makes of it: the keys are the layer's, and no tokens."""
    near = F.pad(v, (0, 0, 1, 2)).unfold(-2, 4, 1)
    return (near @ F.linear(q, WEIGHT).softmax(-1)[..., None])[..., 0]


def of_neighbours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = F.conv2d(k.flatten(0, 1).mT[..., None], WEIGHT[:, :, None, None].expand(-1, -1, 3, 1), padding=(1, 0)).flatten(2)
    return torch.einsum("...si,...id->...sd", scores.softmax(-1), v.flatten(0, 1))


@pytest.mark.parametrize(("fn", "layer"), [(with_a_kernel_of_its_own, "linear"), (of_neighbours, "conv2d")])
def test_weights_that_a_layer_makes_are_named(fn: Callable[..., Tensor], layer: str) -> None:
    found, missed = detect.find(graph_of(fn, [torch.randn(2, 3, 7, 4) for _ in range(3)]))
    assert not found
    assert [m.reason for m in missed] == [
        f"a softmax weighs values, but its scores are made by a layer ({layer}), not by a product"
    ]


def a_router(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which of a layer's experts a token gets: the values are weights."""
    return F.linear(q, WEIGHT).softmax(-1) @ WEIGHT


def test_a_router_is_no_miss() -> None:
    found, missed = detect.find(graph_of(a_router, [torch.randn(2, 3, 7, 4) for _ in range(3)]))
    assert not found
    assert not missed


def test_one_query_and_one_key_are_named() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)

    _, missed = detect.find(graph_of(fn, [torch.randn(2, 3, 1, 4) for _ in range(3)]))
    assert [m.reason for m in missed] == ["one key only"]


def test_weights_that_leave_their_graph_are_named() -> None:
    """What reads them stands behind a graph break, where nothing shows that they are weights."""
    args = [torch.randn(2, 3, 7, 4) for _ in range(3)]
    _, missed = detect.find(graph_of(lambda q, k, v: (q @ k.mT).softmax(-1).unsqueeze(1), args))
    assert ["leaves its graph" in m.reason for m in missed] == [True]
    found, missed = detect.find(graph_of(lambda q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p), args))
    assert len(found) == 1
    assert not missed
    assert detect.find(graph_of(lambda q, k, v: F.linear(q, WEIGHT).softmax(-1), args)) == ([], [])


class Outlook(nn.Module):
    """Attention over a window of values whose weights a layer makes and a number scales (VOLO)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.values = nn.Linear(8, 4 * 81), nn.Linear(8, 8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q.reshape(-1, 4, 6, 8)
        windows = F.unfold(self.values(x).permute(0, 3, 1, 2), 3, padding=1)
        windows = windows.reshape(-1, 4, 2, 9, 24).permute(0, 1, 4, 3, 2)
        weights = self.weights(x).reshape(-1, 24, 4, 9, 9).permute(0, 2, 1, 3, 4) * 0.7
        out: Tensor = weights.softmax(-1) @ windows
        return out


def test_weights_that_a_layer_makes_are_named_when_they_are_scaled() -> None:
    plan = reattend.plan(Outlook().eval(), tuple(inputs(2)))
    assert not plan.sites
    assert ["made by a layer (linear)" in m.reason for m in plan.misses] == [True]


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores by distance, put together in place of products of chunks; nothing hides those of no key."""
    b, h, n, _ = q.shape
    c = torch.einsum("bhcxd,bhcyd->bhcxy", q.unfold(2, 8, 4).mT, k.unfold(2, 8, 4).mT)
    c = F.pad(c, (0, 0, 0, 1)).view(b, h, n // 4 - 1, 8, 9)
    out = q.new_zeros(b, h, n // 4, 4, 9)
    out[:, :, :-1, :, 4:] = c[:, :, :, :4, :5]
    out[:, :, 1:, :, :4] = c[:, :, :, 3:7, 5:]
    w = F.pad(out.view(b, h, n // 4, 4, 9).softmax(-1), (0, 5)).view(b, h, n // 4, -1)[..., :-4].view(b, h, n // 4, 4, 13)
    return torch.einsum("bhcwy,bhcyd->bhcwd", w[..., :-1], F.pad(v, (0, 0, 4, 4)).unfold(2, 12, 4).mT)


class Written(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked(q, k, v)


def test_what_looks_like_an_attention_only_without_its_writes_is_named() -> None:
    torch._dynamo.reset()
    model = Written().eval()
    ours = reattend.optimize(model)
    ours(*(torch.randn(2, 2, 24, 4) for _ in range(3)))
    assert [m for m in reattend.report(ours).misses if "einsum" in m.what]


def pairs(decay: Tensor, x: Tensor) -> Tensor:
    """h[t] = decay[t] · h[t − 1] + x[t] along the first dimension, by an associative scan."""
    if len(x) == 1:
        return x
    odd = pairs(decay[1::2] * decay[:-1:2], decay[1::2] * x[:-1:2] + x[1::2])
    even = torch.cat([x[:1], decay[2::2] * odd[: len(x[2::2])] + x[2::2]])
    return torch.stack([even, odd], 1).flatten(0, 1)


class Tree(nn.Module):
    def forward(self, decay: Tensor, x: Tensor, c: Tensor) -> Tensor:
        states = pairs(decay.sigmoid(), x[..., None] * decay)
        return (states @ c[..., None])[..., 0]


def test_a_tree_of_pairs_is_named() -> None:
    gm = graph_of(Tree(), [torch.randn(16, 6, 4), torch.randn(16, 6), torch.randn(16, 4, 1)[..., 0].contiguous()])
    found, missed = detect.find(gm)
    assert not found
    assert all("a tree of pairs" in m.reason for m in missed)
