"""Working models that once raised, or lost every kernel of their graph, when they were optimised: by kind, each a few."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reattend
from reattend.rewriter.capture import mapped
from reattend.rewriter.graph import torch_private
from reattend.rewriter.run.report import Report
from reattend.rewriter.run.session import session_of
from reattend.rewriter.splice import guards
from tests.tiers import few, one_in

pytestmark = pytest.mark.thin(3)

INF = float("inf")
# Something other than the model's own code has to run, whatever is faster.
FORCED = reattend.Policy(deny=("original", "flex"))
# The narrowest mantissa in the short run, the others in the long one.
TYPES = pytest.mark.parametrize("dtype", few([torch.bfloat16, torch.float32, torch.float16], torch.bfloat16))


class Fn(nn.Module):
    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Any) -> Tensor:
        return self.f(*args)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*s).to(dtype) for s in shapes)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return out


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def wide(x: Any) -> Any:
    return x.double() if _is_float(x) else x


def rms(a: Tensor, b: Tensor) -> float:
    a, b = a.double().nan_to_num(0.0), b.double().nan_to_num(0.0)
    return float((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt().clamp_min(1e-12))


def close(got: Tensor, want: Tensor, exact: Tensor) -> None:
    """At most twice the original's own error, in its type, NaN where it has NaN."""
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    assert rms(got, exact) <= max(2 * rms(want, exact), 2e-6)


def results(model: nn.Module, args: tuple[Any, ...], grad: bool, calls: int = 1) -> list[Tensor]:
    """What the last call gives, and with `grad` the gradients of its float arguments."""
    with torch.set_grad_enabled(grad):
        for _ in range(calls):
            given = [x.detach().clone().requires_grad_() if grad and _is_float(x) else x for x in args]
            out: Tensor = model(*given)
    if not grad:
        return [out]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def same(
    model: nn.Module, args: tuple[Any, ...], *, policy: reattend.Policy = FORCED, grad: bool = False, calls: int = 1,
    sites: int = 1,
) -> Report:
    """The report of an optimised copy that computes what the model computes, by so many kernels of ours or a vendor's."""
    ours = reattend.optimize(copy.deepcopy(model), policy=policy)
    exact = results(copy.deepcopy(model).double(), tuple(map(wide, args)), grad, calls)
    for got, want, true in zip(
        results(ours, args, grad, calls), results(copy.deepcopy(model), args, grad, calls), exact, strict=True
    ):
        close(got, want, true)
    report = reattend.report(ours)
    assert not [p.error for p in report.pieces if p.error]
    assert len([s for s in report.sites if s.kernel != "original"]) == sites, [m.reason for m in report.misses]
    return report


# --- in place -----------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Queries scaled where they lie, or as a new tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.in_place:
            q *= 0.25
        else:
            q = q * 0.25
        q, k, v = (t.view(x.shape[0], -1, 4, 16).transpose(1, 2) for t in (q, self.k(x), self.v(x)))
        out: Tensor = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out


class Cached(nn.Module):
    """Keys and values written into buffers of a fixed length."""

    keys: Tensor
    values: Tensor

    def __init__(self, length: int, *, by_slice: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("keys", torch.zeros(1, 4, length, 16))
        self.register_buffer("values", torch.zeros(1, 4, length, 16))
        self.by_slice = by_slice

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k, v = (f(x).view(1, -1, 4, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.by_slice:
            self.keys[:, :, : x.shape[1]] = k
            self.values[:, :, : x.shape[1]] = v
        else:
            self.keys.index_copy_(2, at, k)
            self.values.index_copy_(2, at, v)
        keep = torch.arange(self.keys.shape[2])[None] <= at[:, None]
        out: Tensor = (q @ self.keys.mT / 4).masked_fill(~keep, -INF).softmax(-1) @ self.values
        return out


def test_queries_scaled_in_place() -> None:
    model = nn.Sequential(Scaled(False), Scaled(True))
    same(model, tensors((2, 700, 64)), policy=reattend.Policy(), sites=2)


@TYPES
def test_queries_scaled_in_place_with_gradients(dtype: torch.dtype) -> None:
    same(nn.Sequential(Scaled(True), Scaled(True)).to(dtype), tensors((2, 40, 64), dtype=dtype), grad=True, sites=2)


def test_a_cache_written_in_place() -> None:
    same(Cached(2048), (*tensors((1, 1024, 64)), torch.arange(1024)), policy=reattend.Policy())


@pytest.fixture
def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that the original stands by fails."""
    forward = guards.Guarded.forward

    def failing(self: guards.Guarded, *args: Any) -> Any:
        self.broken = "broken on purpose"
        return forward(self, *args)

    monkeypatch.setattr(guards.Guarded, "forward", failing)


@TYPES
@pytest.mark.parametrize("by_slice", [False, True])
def test_a_cache_written_twice(dtype: torch.dtype, by_slice: bool) -> None:
    args = (*tensors((1, 40, 64), dtype=dtype), torch.arange(40))
    same(Cached(64, by_slice=by_slice).to(dtype), args, calls=2)


@pytest.mark.usefixtures("_broken")
@pytest.mark.parametrize("by_slice", [False, True])
def test_the_original_stands_by_a_cache_that_is_written(by_slice: bool) -> None:
    """It reads what the cache holds, and writes nothing a second time."""
    model = Cached(1024, by_slice=by_slice)
    report = same(model, (*tensors((1, 1000, 64)), torch.arange(1000)), policy=reattend.Policy(), calls=2)
    assert report.fallbacks == 2


@pytest.mark.usefixtures("_broken")
@pytest.mark.parametrize("edit", ["scores", "queries", "both"])
def test_the_original_stands_by_what_is_edited_in_place(edit: str) -> None:
    """Scores are the attention's own and are made again; queries are not, and are read as they are."""

    def f(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = x * 1.0
        if edit != "scores":
            q *= 0.5
        s = q @ k.mT
        if edit != "queries":
            s *= 0.25
            s += 1.0
        return s.softmax(-1) @ v + 0 * q

    assert same(Fn(f), tensors(*3 * [(1, 4, 700, 32)]), policy=reattend.Policy()).fallbacks == 1


# --- scalars ------------------------------------------------------------------------------------------------------

SCALES: list[Callable[[int], float]] = [
    lambda e: e**-0.5, lambda e: 1 / e**0.5, lambda e: 1 / math.sqrt(e), lambda e: 2.0 * (e + 1) / -(e * 40),
]
SPELLINGS = pytest.mark.parametrize(
    "spell",
    [
        lambda q, k, v, t: (q @ k.mT * t).softmax(-1) @ v,
        lambda q, k, v, t: (q @ k.mT / t).softmax(-1) @ v,
        lambda q, k, v, t: ((q * t) @ k.mT + t).softmax(-1) @ v,
    ],
)


def in_turn(model: nn.Module, inputs: list[tuple[Any, ...]], *, sites: int, grad: bool = False) -> None:
    """One optimised model called with these inputs one after the other: right each time, so many graphs with a kernel."""
    ours = reattend.optimize(copy.deepcopy(model), policy=FORCED)
    for args in inputs:
        exact = results(model, tuple(map(wide, args)), grad)
        for got, want, true in zip(results(ours, args, grad), results(model, args, grad), exact, strict=True):
            close(got, want, true)
    report = reattend.report(ours)
    assert [s.kernel != "original" for s in report.sites] == [True] * sites, [m.reason for m in report.misses]


@TYPES
@SPELLINGS
def test_a_float_that_changes(spell: Callable[..., Tensor], dtype: torch.dtype) -> None:
    qkv = tensors(*3 * [(1, 4, 30, 16)], dtype=dtype)
    in_turn(Fn(spell), [(*qkv, t) for t in (0.25, 0.5, 0.75)], sites=2)


@SPELLINGS
def test_a_float_that_changes_with_gradients(spell: Callable[..., Tensor]) -> None:
    in_turn(Fn(spell), [(*tensors(*3 * [(1, 4, 30, 16)]), t) for t in (0.25, 0.5, 0.75)], sites=2, grad=True)


@pytest.mark.parametrize("kernel", ["reattend", "sdpa"])
def test_a_number_is_added_to_every_score(kernel: str) -> None:
    policy = reattend.Policy(allow=(kernel,), deny=("original",))
    same(Fn(lambda q, k, v: (q @ k.mT * 0.2 + 0.5).softmax(-1) @ v), tensors(*3 * [(1, 4, 300, 16)]), policy=policy)


@TYPES
@SPELLINGS
def test_a_number_in_float64_as_a_tensor(spell: Callable[..., Tensor], dtype: torch.dtype) -> None:
    same(Fn(spell), (*tensors(*3 * [(1, 4, 300, 16)], dtype=dtype), torch.tensor(0.3, dtype=torch.float64)))


def test_float64_that_is_compared_stays_float64() -> None:
    """Numbers that float32 does not tell apart."""
    at = torch.arange(30, dtype=torch.float64)
    keep = Fn(lambda q, k, v, a, b: (q @ k.mT).masked_fill(a[:, None] < b, -INF).softmax(-1) @ v)
    args = (*tensors(*3 * [(1, 4, 30, 16)]), 1 + at * 1e-12, 1 + at * 1e-12)
    same(keep, args)
    same(keep, args, policy=reattend.Policy(allow=("reattend",), deny=("original",)))


@pytest.mark.slow
@pytest.mark.parametrize("width", few([64, 32], 64))
@pytest.mark.parametrize("order", few([1, -1], -1))
def test_a_second_model_of_a_class_with_another_head_size(width: int, order: int) -> None:
    for size in (width, 96 - width)[::order]:
        same(Fn(attend), tensors(*3 * [(1, 4, 512, size)]), policy=reattend.Policy())


@pytest.mark.parametrize("kernel", ["reattend", "sdpa"])
@pytest.mark.parametrize("scale", one_in(3, SCALES))
def test_a_head_size_that_changes(scale: Callable[[int], float], kernel: str) -> None:
    model = Fn(lambda q, k, v: (q @ k.mT * scale(q.shape[-1])).softmax(-1) @ v)
    ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(allow=(kernel,), deny=("original",)))
    for size in (64, 32, 48):
        args = tensors(*3 * [(1, 4, 30, size)])
        close(ours(*args), model(*args), model(*map(wide, args)))
    assert reattend.report(ours).kernels == {kernel: 3}


@TYPES
def test_a_head_size_that_changes_under_sdpa(dtype: torch.dtype) -> None:
    model = Fn(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    in_turn(model, [tensors(*3 * [(1, 4, 30, size)], dtype=dtype) for size in (64, 32, 48)], sites=2, grad=True)


# --- shapes -------------------------------------------------------------------------------------------------------

KERNELS = pytest.mark.parametrize("kernel", ["reattend", "sdpa"])


def only(kernel: str) -> reattend.Policy:
    return reattend.Policy(allow=(kernel,), deny=("original",))


@KERNELS
@TYPES
@pytest.mark.parametrize("heads", few([1, 8], 8))
def test_one_key_head_at_batch_one(kernel: str, dtype: torch.dtype, heads: int) -> None:
    model = Fn(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    shapes = (1, heads, 256, 64), (1, 1, 256, 64), (1, 1, 256, 64)
    same(model, tensors(*shapes, dtype=dtype), policy=only(kernel))


def test_one_key_head_at_batch_one_with_gradients() -> None:
    same(Fn(lambda q, k, v: attend(q, k, v)), tensors((1, 8, 40, 16), (1, 1, 40, 16), (1, 1, 40, 16)), grad=True)


@TYPES
def test_an_absorbed_latent_at_batch_one(dtype: torch.dtype) -> None:
    def f(q: Tensor, r: Tensor, c: Tensor, k: Tensor) -> Tensor:
        s = (torch.einsum("bshc,btc->bsht", q, c) + torch.einsum("bshr,btr->bsht", r, k)) * 0.1
        s = s + torch.full((s.shape[1], s.shape[3]), -INF).triu(1)[:, None]
        return torch.einsum("bsht,btc->bshc", s.softmax(-1).to(c.dtype), c)

    args = tensors((1, 256, 4, 64), (1, 256, 4, 16), (1, 256, 64), (1, 256, 16), dtype=dtype)
    same(Fn(f), args, policy=only("reattend"))


@KERNELS
@TYPES
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("keys", [24, 128])
def test_a_batch_with_padding(kernel: str, dtype: torch.dtype, batch: int, keys: int) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return (q @ k.mT * 0.125).masked_fill(~p[:, None, None], -INF).softmax(-1) @ v

    pad = torch.arange(keys).expand(batch, keys) < torch.tensor([[17], [20]][:batch])
    same(Fn(f), (*tensors((batch, 4, 128, 64), *2 * [(batch, 4, keys, 64)], dtype=dtype), pad), policy=only(kernel))


def test_a_batch_of_one_with_padding_where_rows_may_be_empty() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return (q @ k.mT * 0.125).masked_fill(~p[:, None, None], -INF).softmax(-1).nan_to_num(0.0) @ v

    for length in (90, 0):
        same(Fn(f), (*tensors(*3 * [(1, 4, 128, 64)]), torch.arange(128).expand(1, 128) < length))


@KERNELS
@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize(
    ("q", "k", "m"),
    one_in(2, [
        ((2, 4, 1, 64), (2, 4, 16, 64), (1, 1, 16, 16)), ((2, 1, 40, 64), (2, 1, 40, 64), (1, 8, 40, 40)),
        ((2, 1, 1, 16), (2, 1, 48, 16), (1, 8, 24, 48)), ((1, 4, 1, 64), (2, 4, 300, 64), (300, 300)),
    ]),
)
def test_a_mask_for_more_than_there_is(
    kernel: str, dtype: torch.dtype, q: tuple[int, ...], k: tuple[int, ...], m: tuple[int, ...]
) -> None:
    """One query, or one head, that the mask repeats."""
    same(Fn(lambda q, k, v, m: (q @ k.mT * 0.125 + m).softmax(-1) @ v), tensors(q, k, k, m, dtype=dtype),
         policy=only(kernel))


QUERIES = [(2, 4, 256, 32), (4, 256, 32), (1, 1, 256, 32), (2, 2, 3, 64, 32)]


class Learned(nn.Module):
    """Queries that no batch and no head reaches."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(queries, 32), requires_grad=False)

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        p, m = torch.arange(self.q.shape[0])[:, None], torch.arange(k.shape[-2])[None]
        out: Tensor = (self.q @ k.mT * 0.2).masked_fill((m > p) | (m <= p - 32), -INF).softmax(-1) @ v
        return out


@KERNELS
@TYPES
@pytest.mark.parametrize("shape", [pytest.param(s, marks=pytest.mark.slow if len(s) == 4 else ()) for s in QUERIES])
def test_learned_queries_that_no_head_reaches(kernel: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    same(Learned(shape[-2]).to(dtype), tensors(shape, shape, dtype=dtype), policy=only(kernel))


# --- whole graphs -------------------------------------------------------------------------------------------------


@KERNELS
@TYPES
@pytest.mark.parametrize("one", few([False, True], True))
def test_queries_that_are_the_keys(kernel: str, dtype: torch.dtype, one: bool) -> None:
    shapes = [(2, 4, 256, 64)] * (1 if one else 2)
    model = Fn(lambda x, v=None: (x @ x.mT * 0.1).softmax(-1) @ (x if v is None else v))
    same(model, tensors(*shapes, dtype=dtype), policy=only(kernel))


def test_queries_that_are_the_keys_with_gradients() -> None:
    same(Fn(lambda x, v: (x @ x.mT * 0.3).softmax(-1) @ v), tensors(*2 * [(2, 4, 40, 16)]), grad=True)


@KERNELS
@TYPES
@pytest.mark.parametrize("ends", [(0, 1), (1, 0), (2, 3)])
@pytest.mark.parametrize("fill", few([0.0, -1e4], -1e4))
def test_a_bias_padded_by_keys(kernel: str, dtype: torch.dtype, ends: tuple[int, int], fill: float) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        m = F.pad(m[..., : 64 - sum(ends)], ends, value=fill)
        return (q @ k.mT * 0.3 + m).softmax(-1) @ v

    same(Fn(f), tensors(*3 * [(2, 4, 64, 16)], (64, 64), dtype=dtype), policy=only(kernel))


def test_a_bias_padded_by_keys_with_gradients() -> None:
    model = Fn(lambda q, k, v, m: (q @ k.mT * 0.3 + F.pad(m[..., :-1], (0, 1))).softmax(-1) @ v)
    same(model, tensors(*3 * [(2, 4, 64, 16)], (64, 64)), grad=True)


@KERNELS
@TYPES
def test_a_bias_on_the_keys_joined_from_pieces(kernel: str, dtype: torch.dtype) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ends = torch.cat([torch.zeros(260), torch.full((1,), 6.6)]).to(q.dtype)
        return (q @ k.mT * 0.125 + ends + torch.cat([left, right], -1)).softmax(-1) @ v

    same(Fn(f), tensors((1, 4, 16, 64), *2 * [(1, 4, 261, 64)], (16, 200), (16, 61), dtype=dtype), policy=only(kernel))


def test_scores_from_two_places_are_one_attention() -> None:
    """Each product knows a part of the keys only, be it one."""

    def f(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
        return (torch.cat([q @ k.mT, q @ other.mT], -1) * 0.3).softmax(-1) @ torch.cat([v, other], -2)

    for keys in (40, 1):
        shapes = [(2, 4, 64, 16)] * 3
        same(Fn(f), tensors(*shapes, (2, 4, keys, 16)), policy=only("reattend"), sites=1)


@pytest.mark.parametrize(
    "f",
    [
        lambda q, k, v: torch.func.grad(lambda x: attend(x, k, v).sum())(q),
        lambda q, k, v: torch.vmap(torch.func.grad(lambda x, y, z: attend(x, y, z).sum()))(q, k, v),
    ],
)
def test_a_model_that_transforms_functions_runs_as_it_is(f: Callable[..., Tensor]) -> None:
    args = tensors(*3 * [(2, 4, 32, 16)])
    ours = reattend.optimize(Fn(f))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ours(*args), f(*args))
    (piece,) = reattend.report(ours).pieces
    assert "a function is transformed inside it" in piece.error


def test_values_that_are_known_while_tracing_only_are_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other operator is not recorded."""
    monkeypatch.setattr(torch_private, "transform", lambda gm: "")
    monkeypatch.setattr(mapped, "written_out", lambda gm, values, mode, flex: gm)
    args = tensors(*3 * [(2, 4, 32, 16)])
    ours = reattend.optimize(Fn(lambda q, k, v: torch.vmap(attend)(q, k, v) + 0))
    torch.testing.assert_close(ours(*args), attend(*args))
    assert "known while it is traced only" in reattend.report(ours).pieces[0].error


# --- other people's contexts --------------------------------------------------------------------------------------


class Marked(torch.Tensor):
    """A subclass that adds nothing: Dynamo fails where an attribute of such an input is read."""


def test_where_dynamo_fails_by_an_assertion_of_its_own_the_model_runs_as_written() -> None:
    q, k, v = (torch.randn(2, 2, 40, 16).as_subclass(Marked) for _ in range(3))
    model = reattend.optimize(Fn(lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v))
    with pytest.warns(UserWarning, match="runs as written: AssertionError"):
        out = model(q, k, v)
    assert type(out) is Marked
    assert torch.equal(out, (q @ k.mT * 0.25).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Sequential(nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        out: Tensor = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("kernel", ["sdpa", "original"])
@pytest.mark.parametrize("preserve", few([True, False], True))
def test_a_checkpoint_around_a_block(dtype: torch.dtype, kernel: str, preserve: bool) -> None:
    """The first call, in which the block is captured, runs under the checkpoint's hooks on saved tensors."""
    block = Block().train().to(dtype)
    ours = reattend.optimize(copy.deepcopy(block), policy=reattend.Policy(allow=(kernel,)))
    x = torch.randn(2, 30, 64).to(dtype).requires_grad_()
    for _ in range(2):
        outs = checkpoint(ours, x, use_reentrant=False, preserve_rng_state=preserve), block(x)
        got, want = (torch.autograd.grad(out.float().square().sum(), x)[0] for out in outs)
        assert rms(got, want) < (1e-5 if dtype is torch.float32 else 2e-2)


def saved_by(model: nn.Module) -> int:
    """How many tensors a call shows to the caller's hooks."""
    seen: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(torch.randn(2, 30, 64))
    return len(seen)


@pytest.mark.parametrize("kernel", ["original", "sdpa"])
def test_every_call_saves_the_same_tensors(kernel: str) -> None:
    """The first, which captures, the second, which is timed, and others."""
    model = reattend.optimize(Block().train(), policy=reattend.Policy(allow=(kernel,)))
    assert len({saved_by(model) for _ in range(4)}) == 1


@pytest.mark.parametrize("where", few(["", "qkv", "out", "out.0"], "out"))
def test_hooks_that_come_and_go_after_the_first_call(where: str) -> None:
    model, (x,) = Block(), tensors((2, 30, 64))
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    with torch.no_grad():
        reattend.optimize(model, policy=FORCED)(x)
        plain = model(x)
        at = model.get_submodule(where)
        for handle in (
            at.register_forward_hook(lambda m, i, o: o * 0.5), at.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
            at.register_forward_hook(lambda m, i, k, o: o - 1, with_kwargs=True),
        ):
            torch.testing.assert_close(model(x), model._call_impl(x))  # type: ignore[no-untyped-call]
            assert not torch.equal(model(x), plain)
            handle.remove()
        torch.testing.assert_close(model(x), plain)
    assert torch._dynamo.config.skip_nnmodule_hook_guards == before


# --- lifetime -----------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "called": lambda m, x: m(x),
    "trained": lambda m, x: m(x).sum().backward(),
    "reported": lambda m, x: (m(x), str(reattend.report(m))),
    "planned": lambda m, x: (m(x), reattend.plan(m, x)),
    "verified": lambda m, x: (m(x), reattend.verify(m, x)),
    "twice": lambda m, x: (m(x), reattend.optimize(m, policy=reattend.Policy(deny=("sdpa",)))(x)),
    "restored": lambda m, x: (m(x), reattend.restore(m)),
    "hooked": lambda m, x: (m(x), m.register_forward_hook(lambda m, i, o: o), m(x)),
}


@pytest.mark.parametrize("use", few(USES, "hooked"))
def test_a_deleted_model_is_freed(use: str) -> None:
    model = nn.Sequential(Block(), Block())
    reattend.optimize(model)
    USES[use](model, torch.randn(2, 300, 64))
    alive, session = weakref.ref(model), weakref.ref(session_of(model) or model)
    del model
    gc.collect()
    assert alive() is None
    assert session() is None


def test_restore_leaves_nothing_behind() -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 300, 64)
    state = {path: dict(m.__dict__) for path, m in model.named_modules()}
    reattend.optimize(model)(x)
    session = weakref.ref(session_of(model))
    reattend.restore(model)
    gc.collect()
    assert session() is None
    assert {path: dict(m.__dict__) for path, m in model.named_modules()} == state


@pytest.mark.parametrize("first", ["model", "part"])
@pytest.mark.parametrize("last", ["model", "part"])
def test_a_model_and_its_part_are_optimised_and_restored_in_any_order(first: str, last: str) -> None:
    whole = nn.ModuleDict({"part": Block()})
    whole.forward = lambda x: whole["part"](x)
    named: dict[str, nn.Module] = {"model": whole, "part": whole["part"]}
    x = torch.randn(2, 30, 64)
    second, other = ({"model", "part"} - {name} for name in (first, last))
    for name in (first, *second):
        reattend.optimize(named[name])(x)
    for name in (*other, last):
        reattend.restore(named[name])
        assert session_of(named[name]) is None
        calls = {n: reattend.report(m).calls for n, m in named.items() if session_of(m)}
        assert set(calls) == ({last} if name != last else set())
    assert all(m._compiled_call_impl is None for m in whole.modules())


def test_planning_and_verifying_leave_a_session_where_it_was() -> None:
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 30, 64)
    reattend.optimize(model)(x)
    session = session_of(model)
    reattend.plan(model, x)
    reattend.verify(model, x)
    assert session_of(model) is session
    assert reattend.report(model).calls == 1


# --- long chains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_a_bias_made_by_many_operators(steps: int) -> None:
    """Read where the model has computed it: no term is as deep, or as long, as what makes it."""

    def f(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        for i in range(steps):
            b = torch.where(b > i, b * 1.01, b - 0.01)
        return (b + q @ k.mT * 0.35).softmax(-1) @ v

    same(Fn(f), tensors(*3 * [(2, 4, 16, 8)], (4, 16, 16)))


def test_a_recurrence_that_is_unrolled_before_an_attention() -> None:
    def f(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = h * a[:, t].sigmoid() + b[:, t] * x[:, t]
            out.append(h.tanh())
        y = torch.stack(out, 1)
        return attend(y, y, y)

    same(Fn(f), tensors(*3 * [(2, 40, 16)]), sites=2)
