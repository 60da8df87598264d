"""Methods that give heads of one attention different keys: which they keep, what is chosen for whom, and when they are refused."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library.papers import attention as build
from reattend.patterns.library.papers import softmax
from reattend.patterns.methods.by_head.duo_attention import DuoAttention
from reattend.patterns.methods.by_head.knapsack import Item, choose
from reattend.patterns.methods.by_head.moa import MoA, Span
from reattend.patterns.methods.by_head.razor import RazorAttention
from reattend.patterns.methods.fitted import HeadsSeen
from reattend.patterns.methods.method import Replacement
from reattend.patterns.methods.static.sink_window import SinkWindow
from reattend.patterns.verdict import Refusal
from tests.methods.attentions import M, P, causal, dense, draw, kept, replaced, tiles, view


def grouped(n: int, heads: int = 8) -> Attention:
    """Two query heads share a key head."""
    made = attention(build("core", softmax, causal, group=2, h=heads).with_sizes({"P": n, "M": n}))
    assert isinstance(made, Attention)
    return made


def streams(n: int, sink: int, window: int) -> np.ndarray:
    p, m = np.arange(n)[:, None], np.arange(n)
    return (m <= p) & ((m < sink) | (p - m < window))


def seen(*losses: tuple[float, ...], n: int = 16, **more: object) -> HeadsSeen:
    return HeadsSeen(losses, ((n, n),), **more)  # type: ignore[arg-type]


# --- DuoAttention ---------------------------------------------------------------------------------------------------


def test_full_heads_keep_what_the_model_keeps_and_others_stream() -> None:
    a = replaced(DuoAttention(sink=2, window=3, full=(0, 2)), grouped(16))
    found, all_of_it, few = kept(a, 8), np.tri(16, dtype=bool), streams(16, 2, 3)
    for h in range(8):
        assert (found[h] == (all_of_it if h // 2 in (0, 2) else few)).all(), h


@pytest.mark.parametrize(("full", "heads_full"), [((), 0), ((0, 1, 2, 3), 4), ((1,), 1), ((0, 1, 3), 3)])
def test_tiles_are_those_of_both_kinds_of_heads(full: tuple[int, ...], heads_full: int) -> None:
    """64 sinks and 256 keys of 4096: 369 of 2080 tiles of 64, the published sizes."""
    a = replaced(DuoAttention(full=full), view(P=4096, M=4096, H=4))
    visited, total = tiles(a, 64, heads=4)
    assert visited / total == (heads_full * 2080 + (4 - heads_full) * 369) / (4 * 64 * 64)


def test_with_all_heads_full_it_is_the_model_and_with_none_a_window() -> None:
    whole = view(P=24, M=24, H=3)
    assert (kept(replaced(DuoAttention(full=(0, 1, 2)), whole), 3) == kept(whole, 3)).all()
    none, window = (kept(replaced(m, whole), 3) for m in (DuoAttention(sink=2, window=4, full=()), SinkWindow(2, 4)))
    assert (none == window).all()


def test_a_needle_is_found_by_a_full_head_and_lost_by_a_streaming_one() -> None:
    whole = view(P=64, M=64, H=2)
    a, given = replaced(DuoAttention(sink=2, window=8, full=(1,)), whole), draw(whole)
    for n in "QK":
        given[n] = given[n] * 0.01
    given["Q"][:, :, -1, 0], given["K"][:, :, 20, 0] = 30.0, 30.0
    given["V"][:, :, 20] = 5.0
    out = evaluate(a.cascade, given, {"B": 1, "H": 2, "E": 8, "F": 8}, widen=True)["O"]
    assert (out[0, 1, -1] - 5.0).abs().max() < 1e-9
    assert out[0, 0, -1].abs().max() < 3


def test_the_heads_that_lose_most_stay_full_over_all_attentions_together() -> None:
    made = DuoAttention(share=0.4).fit({"a": seen((0.1, 0.5, 0.0)), "b": seen((0.3, 0.2))})
    assert {n: m.full for n, m in made.items()} == {"a": (1,), "b": (0,)}
    # a share is rounded up, and equal heads go in their order
    assert DuoAttention(share=0.3).fit({"a": seen((1.0, 1.0, 1.0))})["a"].full == (0,)
    assert DuoAttention(share=0.34).fit({"a": seen((1.0, 1.0, 1.0))})["a"].full == (0, 1)
    assert DuoAttention(share=1.0).fit({"a": seen((0.0, 0.0))})["a"].full == (0, 1)
    assert DuoAttention(share=0.0).fit({"a": seen((0.0, 9.0))})["a"].full == ()


def test_what_it_cannot_do_is_a_sentence() -> None:
    for method, a, said in (
        (DuoAttention(), view(P=8, M=8, H=2), "found by a calibration"),
        (DuoAttention(full=(4,)), view(P=8, M=8, H=2), "2 heads of keys"),
        (DuoAttention(full=(4,)), grouped(8), "4 heads of keys"),
        (DuoAttention(full=(0,)), view(P=8, M=8), "known number of heads"),
        (DuoAttention(full=(0,)), view(dense, P=8, H=2), "causal attention"),
    ):
        no = method.replace(a)
        assert isinstance(no, Refusal)
        assert said in no.reason
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        DuoAttention(share=1.5)
    assert str(DuoAttention()) == "duo-attention(share=0.5, sink=64, window=256)"
    assert str(DuoAttention(full=(3,))) == "duo-attention(share=0.5, sink=64, window=256, full=(3,))"


# --- MoA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "spans"), [(16, (Span(3), Span(2, 0.25), Span(0, 1.0), Span(3))), (40, (Span(1, 0.5),) * 4)])
def test_every_head_has_its_own_window_that_grows_with_the_text(n: int, spans: tuple[Span, ...]) -> None:
    found = kept(replaced(MoA(sink=2, spans=spans), grouped(n)), 8)
    for h in range(8):
        assert (found[h] == streams(n, 2, spans[h // 2].window(n))).all(), h
        density = MoA(sink=2).share_of(spans[h // 2], n, n)
        assert found[h].sum() / (n * (n + 1) / 2) == pytest.approx(density)


def test_densities_are_the_known_ones() -> None:
    assert MoA(sink=4).share_of(Span(1024), 8192, 8192) == pytest.approx(7_893_498 / (8192 * 8193 / 2))
    assert MoA(sink=64).share_of(Span(256), 4096, 4096) == pytest.approx(0.1501, abs=5e-5)
    # a decode step keeps a window and the sink
    assert MoA(sink=4).share_of(Span(10), 1, 100) == pytest.approx(0.14)
    assert Span(64, 0.25).window(8192) == 2112
    assert Span(64, 0.25).window(80) == 80


@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_finds_what_trying_everything_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = [Item(tuple(rng.random(3)), tuple(rng.random(3))) for _ in range(6)]
    for budget in (0.5, 1.5, 2.5):
        best = np.inf
        for pick in product(range(3), repeat=6):
            if sum(x.costs[i] for x, i in zip(items, pick)) <= budget:
                best = min(best, sum(x.losses[i] for x, i in zip(items, pick)))
        found = choose(items, budget)
        if found is None:
            assert best == np.inf
        else:
            assert sum(x.costs[i] for x, i in zip(items, found)) <= budget * (1 + 1e-9)
            assert sum(x.losses[i] for x, i in zip(items, found)) == pytest.approx(best)


def test_many_items_stay_within_the_budget_and_near_the_best() -> None:
    """Nothing within the budget loses less than the dual's bound: Σ min(loss + λ·cost) − λ·budget for any λ."""
    rng = np.random.default_rng(0)
    items = [Item((0.1, 0.2, 0.4, 1.0), (*rng.random(3), 0.0)) for _ in range(60)]
    found, budget = choose(items, 20.0), 20.0
    assert found is not None
    assert sum(x.costs[i] for x, i in zip(items, found)) <= budget * (1 + 1e-9)
    least = max(
        sum(min(x + dual * c for c, x in zip(item.costs, item.losses)) for item in items) - dual * budget
        for dual in np.linspace(0, 3, 301)
    )
    assert sum(x.losses[i] for x, i in zip(items, found)) < 1.01 * least


def test_spans_go_to_the_heads_that_need_them_within_the_density() -> None:
    method = MoA(density=0.5, sink=0, choices=(Span(4), Span(8)))
    near, far = (0.0, 0.0), (0.9, 0.2)
    made = method.fit({"a": seen((near[0], far[0]), (near[1], far[1]), n=32), "b": seen((0.01,), (0.0,), n=32)})
    # 4 of 32 keys are 0.23 of the pairs, 8 are 0.44: one whole head, and two windows
    assert made["a"].spans == (Span(4), Span(0, 1.0))
    assert made["b"].spans == (Span(4),)
    mean = np.mean([method.share_of(s, 32, 32) for m in made.values() for s in m.spans or ()])
    assert mean <= 0.5
    assert MoA(density=1.0, choices=(Span(4),)).fit({"a": seen((0.1,))})["a"].spans == (Span(0, 1.0),)
    # nothing is that sparse
    assert MoA(density=0.01, choices=(Span(4),)).fit({"a": seen((0.1,))}) == {}


def test_spans_that_mean_nothing_are_named() -> None:
    for bad in ((0, 0.5), (-1, 0.0), (4, 1.5)):
        with pytest.raises(ValueError, match="a span needs"):
            Span(*bad)
    no = MoA(spans=(Span(4), Span(5), Span(6))).replace(grouped(8))
    assert isinstance(no, Refusal)
    assert "3 spans, and this attention 4 heads of keys" in no.reason
    with pytest.raises(ValueError, match="a density above 0"):
        MoA(density=0.0)


def test_rows_over_a_cache_keep_what_the_prompt_would() -> None:
    """The window is that of the keys there are."""
    method = MoA(sink=1, spans=(Span(2, 0.25), Span(0, 1.0)))
    prompt, step = (kept(replaced(method, view(P=p, M=32, H=2)), 2) for p in (32, 3))
    assert (step == prompt[:, -3:]).all()
    assert torch.tensor(step[1]).sum() == 30 + 31 + 32


# --- RazorAttention -------------------------------------------------------------------------------------------------

SIZES = {"B": 1, "H": 2, "E": 8, "F": 8}


def razor(method: RazorAttention, a: Attention, given: dict[str, torch.Tensor], heads: int = 2) -> torch.Tensor:
    made = method.replace(a)
    assert isinstance(made, Replacement), made
    sizes = SIZES | {"H": heads}
    made_of = made.make(torch, given, sizes)
    return evaluate(made.cascade, given | made_of, sizes, widen=True)["O"]


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: int, window: int) -> torch.Tensor:
    """Row by row, as the paper writes it; rows lie at the end of the keys."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for r in range(q.shape[2]):
        p = r + k.shape[2] - q.shape[2]
        at = torch.arange(k.shape[2])
        kept, dropped = (at <= p) & ((at < sink) | (p - at < window)), (at <= p) & (at >= sink) & (p - at >= window)
        s = q[:, :, r : r + 1] @ k.mT * 0.125
        w = s.exp()[:, :, 0]
        above, below = (w[..., kept] [..., None] * v[:, :, kept]).sum(2), w[..., kept].sum(-1)
        if dropped.any():
            k_mean, v_mean = k[:, :, dropped].mean(2), v[:, :, dropped].mean(2)
            more = dropped.sum() * (0.125 * (q[:, :, r] * k_mean).sum(-1)).exp()
            above, below = above + more[..., None] * v_mean, below + more
        out[:, :, r] = above / below[..., None]
    return out


@pytest.mark.parametrize(("rows", "keys"), [(24, 24), (3, 24), (1, 30)])
def test_a_row_has_the_mean_of_what_it_drops_by_the_formula(rows: int, keys: int) -> None:
    a = view(P=rows, M=keys, H=2)
    given = draw(a)
    out = razor(RazorAttention(sink=2, least=4, part=8, full=()), a, given)
    expected = by_formula(given["Q"], given["K"], given["V"], 2, max(4, -(-keys // 8)))
    assert (out - expected).abs().max() < 1e-6
    lost = RazorAttention(sink=2, least=4, part=8, compensate=False, full=())
    assert (razor(lost, a, given) - expected).abs().max() > 1e-2


def test_equal_keys_lose_nothing() -> None:
    a = view(P=40, M=40, H=2)
    given = draw(a)
    given["K"][:, :, 3:36] = given["K"][:, :, 3:4]
    out = razor(RazorAttention(sink=3, least=4, part=100, full=()), a, given)
    q, k, v = (given[n].double() for n in "QKV")
    dense_rows = (q @ k.mT * 0.125).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ v
    assert (out - dense_rows).abs().max() < 1e-6


def test_full_heads_are_the_model_and_so_are_all_where_the_window_holds_everything() -> None:
    a, given = grouped(24, 4), None
    given = draw(a, heads=4)
    q, k, v = (given[n].double() for n in "QKV")
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    exact = (q @ k.mT * 0.125).masked_fill(~torch.ones(24, 24, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ v
    some = razor(RazorAttention(sink=1, least=4, part=8, full=(1,)), a, given, 4)
    assert (some[:, 2:] - exact[:, 2:]).abs().max() < 1e-12
    assert (some[:, :2] - by_formula(q[:, :2], k[:, :2], v[:, :2], 1, 4)).abs().max() < 1e-6
    for method in (RazorAttention(full=(0, 1)), RazorAttention(full=())):
        assert (razor(method, a, given, 4) - exact).abs().max() < 1e-12


def test_what_is_dropped_never_weighs_more_than_it_did() -> None:
    """Jensen: the mean of exponentials is at least the exponential of the mean."""
    a = view(P=64, M=64, H=2)
    given = draw(a, seed=3)
    given["Q"] = given["Q"] * 4
    made = RazorAttention(sink=2, least=4, part=100, full=()).replace(a)
    assert isinstance(made, Replacement)
    score = made.make(torch, given, SIZES)["DROPPED"]
    s = (given["Q"] @ given["K"].mT * 0.125).double()
    p, m = torch.arange(64)[:, None], torch.arange(64)
    dropped = (m >= 2) & (p - m >= 4)
    weight = s.masked_fill(~dropped, -torch.inf).logsumexp(-1)
    assert (score <= weight + 1e-5)[..., 6:].all()
    assert score[..., :6].isneginf().all()


def test_retrieval_heads_are_the_first_of_either_score_and_their_group_with_them() -> None:
    scores = HeadsSeen(((0.0,) * 2,), ((16, 16),), 2, echo=(0.1, 0.2, 0.9, 0.0), induction=(0.0, 0.8, 0.1, 0.0))
    other = HeadsSeen(((0.0,) * 2,), ((16, 16),), 2, echo=(0.0, 0.0, 0.0, 0.0), induction=(0.0, 0.0, 0.0, 0.7))
    both = {"a": scores, "b": other}
    found = RazorAttention(induction=0.125, echo=0.125).fit(both)
    assert {n: m.full for n, m in found.items()} == {"a": (0, 1), "b": ()}
    found = RazorAttention(induction=0.25, echo=0.0).fit(both)
    assert {n: m.full for n, m in found.items()} == {"a": (0,), "b": (1,)}


def test_razor_refuses_what_its_mean_would_be_wrong_for() -> None:
    def windowed(b: Any, qk: ex.Expr) -> ex.Expr:
        return ex.where((M <= P) & (P - M < 9), qk * 0.125, float("-inf"))

    method = RazorAttention(sink=1, least=4, full=())
    for a, said in ((view(windowed, P=16, M=16, H=2), "more than causal"), (view(dense, P=16, H=2), "causal attention")):
        no = method.replace(a)
        assert isinstance(no, Refusal)
        assert said in no.reason
    no = RazorAttention().replace(view(P=8, M=8, H=2))
    assert isinstance(no, Refusal)
    assert "found by a calibration" in no.reason
