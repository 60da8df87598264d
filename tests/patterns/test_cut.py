"""Cuts: the parts of all devices together are the whole, and the states of a row's parts merge into its output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.latent import Widths, absorbed
from reattend.patterns.attention.recognise import attention
from reattend.patterns.attention.rowstate import RowState, derive
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.library import papers
from reattend.patterns.library.papers import Builder
from reattend.patterns.passes.cut import PART, Cut, CutError, cut, merge, pieces

Tensors = dict[str, torch.Tensor]


def causal(b: Builder, qk: Expr) -> Expr:
    return ex.where(ex.index("m") <= ex.index("p"), qk * 0.125, float("-inf"))


def far(b: Builder, qk: Expr) -> Expr:
    """Some rows keep no key at all."""
    return ex.where(ex.index("m") > ex.index("p") + 3, qk * 0.125, float("-inf"))


RULES = {
    "softmax": (papers.softmax, causal, False), "deferred": (papers.softmax_late, causal, True),
    "sink": (papers.softmax_sink, causal, False), "no key": (papers.softmax_zero, far, False),
    "sigmoid": (papers.sigmoid, papers.plain, False), "power": (papers.power, papers.plain, False),
}
SIZES = {"b": 2, "h": 4, "p": 6, "m": 12, "e": 5, "f": 3}


def made(name: str, **sizes: int) -> Cascade:
    rule, score, late = RULES[name]
    return papers.attention(name, rule, score, late, group=2, **(SIZES | sizes))


def random_inputs(c: Cascade) -> Tensors:
    g = torch.Generator().manual_seed(3)
    return {t.name: torch.randn([int(s) for s in t.shape], generator=g, dtype=torch.float64) for t in c.inputs}


def state_of(c: Cascade) -> tuple[Attention, RowState]:
    a = attention(c)
    assert isinstance(a, Attention), a
    state = derive(a)
    assert isinstance(state, RowState), state
    return a, state


def merged(c: Cascade, data: Tensors, parts: int, block: int | None) -> torch.Tensor:
    """The output from each device's row state, by the derived merge."""
    a, state = state_of(c)
    found = []
    for d in range(parts):
        here, its = state_of(cut(c, [Cut("m", parts, d, block)]))
        found.append(evaluate(pieces(here, its), data, widen=True))
    stacked = {PART + n: torch.stack([f[n] for f in found]) for n in found[0]}
    both = merge(a, state, parts)
    inputs = {t.name: stacked.get(t.name, data.get(t.name)) for t in both.inputs}
    return evaluate(both, {n: t for n, t in inputs.items() if t is not None}, widen=True)[both.outputs[0]]


@pytest.mark.parametrize("name", RULES)
@given(parts=st.integers(1, 5), block=st.sampled_from([None, 1, 2, 3]), keys=st.integers(1, 13))
def test_merged_states_are_the_output_whatever_the_parts(name: str, parts: int, block: int | None, keys: int) -> None:
    """DCP: independent of the number of devices and of the interleave, empty shards and rows without a key included."""
    c = made(name, m=keys)
    data = random_inputs(c)
    whole = evaluate(c, data, widen=True)["O"]
    assert torch.allclose(merged(c, data, parts, block), whole, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_C12_sequence_sharded_latents_are_exact(parts: int) -> None:
    """C12: the log-sum-exp merge of latents dealt to devices, below 1e-12 in float64."""
    w = Widths(heads=4, latent=16, rotary=8, key=6, value=5, model=7, dtype="f64")
    c = absorbed(w, batch=2, queries=1, keys=32).cascade
    data = random_inputs(c)
    names = {str(e.out.tensor) for e in c.einsums} - {"O", "Y"}
    before = Cascade(
        c.name, c.ranks, tuple(t for t in c.tensors if t.name in names | {i.name for i in c.inputs}),
        tuple(e for e in c.einsums if e.out.tensor in names), ("OL",),
    )
    whole = evaluate(before, data, widen=True)["OL"]
    assert (merged(before, data, parts, 1) - whole).abs().max() < 1e-12


@pytest.mark.parametrize(("rank", "dim"), [("h", 1), ("p", 2)])
@given(parts=st.sampled_from([1, 2, 3, 4]), block=st.sampled_from([None, 1]), name=st.sampled_from(sorted(RULES)))
def test_parts_side_by_side_are_the_whole(rank: str, dim: int, parts: int, block: int | None, name: str) -> None:
    c = made(name)
    data = random_inputs(c)
    n = int(c.rank[rank].size)
    whole = evaluate(c, data, widen=True)["O"]
    for d in range(parts):
        k = Cut(rank, parts, d, block)
        mine = [i for i in range(n) if (i // k.width(n)) % parts == d]
        if len(mine) != k.size(n) or not mine:
            assert len(mine) == k.size(n)
            continue
        part = evaluate(cut(c, [k]), data, widen=True)["O"]
        assert torch.allclose(part, whole.index_select(dim, torch.tensor(mine)), rtol=0, atol=1e-12, equal_nan=True)


@given(parts=st.integers(1, 6), blocks=st.integers(1, 4))
def test_zigzag_deals_every_coordinate_once_and_evens_causal_rows(parts: int, blocks: int) -> None:
    n = 2 * parts * blocks
    dealt = []
    for d in range(parts):
        k = Cut("p", parts, d, zigzag=True)
        assert k.size(n) == n // parts
        mine = [_at(k.position(n), i) for i in range(k.size(n))]
        dealt += mine
        # D: N(N+1)/2 pairs, the same for every device
        assert sum(p + 1 for p in mine) * parts == n * (n + 1) // 2
    assert sorted(dealt) == list(range(n))


@given(n=st.integers(1, 40), parts=st.integers(1, 7), block=st.sampled_from([None, 1, 2, 5]))
def test_every_coordinate_is_dealt_once(n: int, parts: int, block: int | None) -> None:
    cuts = [Cut("m", parts, d, block) for d in range(parts)]
    dealt = [_at(k.position(n), i) for k in cuts for i in range(k.size(n))]
    assert sorted(dealt) == list(range(n))


def _at(term: Expr, i: int) -> int:
    folded = ex.substitute(term, {x: ex.const(i) for x in ex.walk(term) if x.op == "index"})
    return int(folded.value)


def test_zigzag_refuses_what_does_not_divide() -> None:
    with pytest.raises(CutError, match="13 coordinates of p do not divide into 4 zigzag blocks"):
        cut(made("softmax", p=13, m=13), [Cut("p", 2, zigzag=True)])


def test_state_that_is_carried_along_the_rank_is_not_cut() -> None:
    b = Builder({"i": 4}, iterative=("i",))
    one = ex.const(1)
    a = b.input("A", "i")
    b.write("S", (5,), (ex.const(0),), ex.const(0.0))
    b.write("S", (5,), (ex.index("i") + one,), ex.load("S", (ex.index("i"),), "f32") + a)
    b.put("Z", "", ex.load("S", (ex.const(4),), "f32"))
    with pytest.raises(CutError, match="carries state"):
        cut(b.cascade("sum", "Z"), [Cut("i", 2)])


def test_heads_that_share_a_key_head_read_one() -> None:
    here = cut(made("softmax"), [Cut("h", 4, 3)])
    (k,) = [x for e in here.einsums for x in e.reads if x.attr == "K"]
    assert k.args[1] is ex.const(1)
