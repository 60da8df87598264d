"""What counts as attention: read by structure from any layout and naming, and a concrete reason for what does not."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.attention import ranks
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.attention.rowstate import RowState, derive, stream
from reattend.patterns.attention.score import elements
from reattend.patterns.attention.traits import kind, no_key_rule, traits
from reattend.patterns.cascade import Access, Cascade, Rank, Tensor, parse, to_text, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library import papers
from reattend.patterns.library.papers import Builder
from reattend.patterns.operators import named
from reattend.patterns.verdict import Obstacle

from . import rules

torch.set_num_threads(1)


def seen(c: Any) -> Any:
    view = attention(c)
    assert isinstance(view, Attention), view
    return view


def missed(c: Any) -> Any:
    view = attention(c)
    assert isinstance(view, Obstacle), view
    return view.reason


def rule_of(b: Any, s: Any, row: Any = "bhp", key: Any = "m") -> Any:
    """softmax over one-letter ranks."""
    gm = b.put("GM", row, s, "max", key)
    sn = b.put("SN", row + key, ex.exp(s - gm))
    return b.put("A", row + key, sn / b.put("SD", row, sn, "add", key))


def written(q: Any, k: Any, v: Any, out: Any, row: Any, key: Any = "m", over: Any = "e", late: Any = False) -> Any:
    """softmax(Q·K)·V with each operand over its ranks, the output's dims in the order of `out`."""
    b = Builder()
    s = b.put("S", row + key, b.put("QK", row + key, b.input("Q", q) * b.input("K", k), "add", over) * 0.125)
    a = rule_of(b, s, row, key)
    b.put("O", out, a * b.input("V", v), "add", key)
    return b.cascade("written", "O")


# --- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k", "v", "out", "row", "batch"),
    [
        ("pe", "me", "mf", "pf", "p", ""),
        ("bpe", "bme", "bmf", "bpf", "bp", "b"),
        ("bhpe", "bhme", "bhmf", "bhpf", "bhp", "bh"),
        ("bphe", "bmhe", "bmhf", "bphf", "bph", "bh"),
        ("bhpe", "bhem", "bhmf", "bpfh", "bhp", "bh"),
        ("bhgpe", "bhme", "bhmf", "bhgpf", "bhgp", "bhg"),
        ("bkpe", "bkme", "bkmf", "fpkb", "bkp", "kb"),
        ("hpbe", "mbhe", "bhmf", "hbfp", "bhp", "hb"),
    ],
)
def test_any_layout(q: Any, k: Any, v: Any, out: Any, row: Any, batch: Any) -> None:
    c = written(q, k, v, out, row)
    a = seen(c)
    assert (a.query, a.key, a.value, "".join(a.batch)) == ("p", "m", "f", batch)
    assert a.cascade is c
    assert [e.out.tensor for e in a.products] == ["QK"]
    assert [e.op for e in a.row] == ["max", "add"]
    assert str(a.score).startswith("QK[")
    assert a.contraction.over == ("m",)


def test_the_terms_of_an_attention() -> None:
    a = seen(papers.attention("softmax", papers.softmax, rules.causal))
    assert str(a.score) == "where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞)"
    assert [str(e) for e in a.row] == [
        "GM[b,h,p] = max_m where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞)",
        "SD[b,h,p] = Σ_m exp(where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞) − GM[b,h,p])",
    ]
    assert str(a.weight) == "exp(where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞) − GM[b,h,p]) / SD[b,h,p]"
    assert str(a.values) == "V[b,h,m,f]"
    assert str(a.finish) == "O[b,h,p,f]"
    assert elements(a.weight, a.row_names, a.key) == (a.score,)


def test_late_division_is_the_finish() -> None:
    a = seen(papers.attention("late", papers.softmax_late, late=True))
    assert str(a.finish) == "N[b,h,p,f] / SD[b,h,p]"
    assert a.contraction.out.tensor == "N"


@pytest.mark.parametrize("group", [1, 2, 4])
def test_heads_that_share_keys_by_an_index_map(group: Any) -> None:
    a = seen(papers.attention("gqa", papers.softmax, group=group))
    assert a.batch == ("b", "h")
    assert ("gqa" in traits(a)) == (group > 1)


def test_one_key_head_for_all() -> None:
    """Heads and queries are alike where keys have neither: the coordinate that a mask compares is the query."""
    b = Builder()
    s = b.put("QK", "bhpm", b.input("Q", "bhpe") * b.input("K", "bme"), "add", "e")
    s = b.put("S", "bhpm", ex.where(ex.index("m") <= ex.index("p"), s, -float("inf")))
    b.put("O", "bphf", rule_of(b, s) * b.input("V", "bmf"), "add", "m")
    a = seen(b.cascade("mqa", "O"))
    assert (a.query, a.batch) == ("p", ("b", "h"))


def test_without_a_mask_the_longest_is_the_query() -> None:
    for sizes, want in (({"h": 8, "p": 100}, "p"), ({"h": 8}, "p"), ({"h": 8, "p": 1}, "h")):
        b = Builder(dict(sizes))
        s = b.put("QK", "bhpm", b.input("Q", "bhpe") * b.input("K", "bme"), "add", "e")
        b.put("O", "bhpf", rule_of(b, s) * b.input("V", "bmf"), "add", "m")
        assert seen(b.cascade("mqa", "O")).query == want


def test_one_query() -> None:
    b = Builder({"p": 1})
    s = b.put("QK", "bhpm", b.input("Q", "bhpe") * b.input("K", "bhme"), "add", "e")
    b.put("O", "bhpf", rule_of(b, s) * b.input("V", "bhmf"), "add", "m")
    a = seen(b.cascade("decode", "O"))
    assert a.query == "p"
    assert "decode" in traits(a)


def test_squares_do_not_confuse() -> None:
    """All sizes equal: ranks are told apart by where they occur, never by size."""
    c = written("bhpe", "bhme", "bhmf", "bhpf", "bhp").with_sizes(dict.fromkeys("BHPMEF", 4))
    a = seen(c)
    assert (a.query, a.key, a.value) == ("p", "m", "f")


def test_casts_are_kept_and_seen_through() -> None:
    b = Builder()
    q, k, v = b.input("Q", "pe", "bf16"), b.input("K", "me", "bf16"), b.input("V", "mf", "bf16")
    qk = b.put("QK", "pm", q * k, "add", "e")
    a = rule_of(b, b.put("S", "pm", ex.cast(qk * 0.5, "f32")), "p")
    b.put("O", "pf", b.put("A16", "pm", ex.cast(a, "bf16")) * v, "add", "m")
    view = seen(b.cascade("bf16", "O"))
    assert view.weight.op == "cast"
    assert view.weight.dtype == "bf16"
    assert view.score.dtype == "f32"


def test_a_tensors_own_type_is_a_cast() -> None:
    """A pointwise Einsum that is stored in bf16 rounds; inlining keeps that."""
    b = Builder()
    b.tensors["A16"] = Tensor("A16", (papers.size("P"), papers.size("M")), "bf16")
    qk = b.put("QK", "pm", b.input("Q", "pe") * b.input("K", "me"), "add", "e")
    a = b.put("A16", "pm", rule_of(b, qk, "p"))
    b.put("O", "pf", ex.cast(a, "f32") * b.input("V", "mf"), "add", "m")
    assert str(seen(b.cascade("stored", "O")).weight).startswith("f32(bf16(")


def test_factors_that_scale_rows_or_mask_weights() -> None:
    b = Builder()
    qk = b.put("QK", "pm", b.input("Q", "pe") * b.input("K", "me"), "add", "e")
    a = rule_of(b, qk, "p")
    keep = ex.where(ex.index("m") <= ex.index("p"), 1.0, 0.0)
    b.put("O", "pf", a * b.input("V", "mf") * keep * b.input("gain", "p") / 0.9, "add", "m")
    view = seen(b.cascade("scaled", "O"))
    assert str(view.values) == "V[m,f]"
    assert "gain[p]" in str(view.weight)
    assert "where(m ≤ p, 1, 0)" in str(view.weight)


def test_reductions_over_another_name_of_the_key() -> None:
    """The row reductions bind a rank of their own; it is the key's coordinate that they walk."""
    b = Builder({"m": papers.size("M"), "n": papers.size("M")})
    qk = b.put("QK", "pm", b.input("Q", "pe") * b.input("K", "me"), "add", "e")
    at_n = ex.load("QK", (ex.index("p"), ex.index("n")), "f32")
    gm = b.put("GM", "p", at_n, "max", "n")
    sd = b.put("SD", "p", ex.exp(at_n - gm), "add", "n")
    b.put("O", "pf", ex.exp(qk - gm) / sd * b.input("V", "mf"), "add", "m")
    c = b.cascade("renamed", "O")
    a = seen(c)
    assert {r.over for r in a.row} == {("m",)}
    assert a.score is ex.load("QK", (ex.index("p"), ex.index("m")), "f32")
    check_same(c, a)


def test_equal_reductions_are_one() -> None:
    b = Builder()
    qk = b.put("QK", "pm", b.input("Q", "pe") * b.input("K", "me"), "add", "e")
    g1, g2 = b.put("G1", "p", qk, "max", "m"), b.put("G2", "p", qk, "max", "m")
    sd = b.put("SD", "p", ex.exp(qk - g1), "add", "m")
    b.put("O", "pf", ex.exp(qk - g2) / sd * b.input("V", "mf"), "add", "m")
    assert [e.op for e in seen(b.cascade("twice", "O")).row] == ["max", "add"]


def streamed(a: Attention) -> Cascade:
    state = derive(a)
    assert isinstance(state, RowState), state
    return stream(a, state)


def check_same(c: Any, a: Any, sizes: Any = None) -> None:
    """The view's cascade and its one-pass form compute what the cascade computes."""
    sizes = {"B": 2, "H": 4, "P": 5, "M": 11, "E": 3, "F": 2, "G": 2, "K": 2, **(sizes or {})}
    t = rules.tensors(c, 0, sizes)
    known = {n: sizes[n] for n in c.free_symbols}
    want = evaluate(c, t, known, widen=True)[c.outputs[0]]
    assert rules.error(evaluate(a.cascade, t, known, widen=True)[c.outputs[0]], want) <= 1e-12
    tiled = streamed(a)
    (tile,) = set(tiled.free_symbols) - set(c.free_symbols)
    assert rules.error(evaluate(tiled, t, {**known, tile: 4}, widen=True)[c.outputs[0]], want) <= 1e-12


def test_heads_split_and_joined_by_reshapes() -> None:
    """Grouped heads in five dims, the output back in four: the index map is folded into every term."""
    b = Builder({"k": 2, "g": 2, "h": 4})
    q, k, v = b.input("Q", "bkgpe"), b.input("K", "bkme"), b.input("V", "bkmf")
    s = b.put("QK", "bkgpm", q * k, "add", "e")
    n = b.put("N", "bkgpf", rule_of(b, s, "bkgp") * v, "add", "m")
    h = ex.index("h")
    joined = ex.load("N", (ex.index("b"), h // 2, h % 2, ex.index("p"), ex.index("f")), n.dtype)
    b.put("O", "bhpf", joined)
    c = b.cascade("joined", "O")
    a = seen(c)
    assert a.batch == ("b", "h")
    assert str(a.products[0]) == "QK[b,h,p,m] = Σ_e Q[b,h // 2,h % 2,p,e] · K[b,h // 2,m,e]"
    assert verify(a.cascade) is a.cascade
    check_same(c, a)


def test_row_scalars_that_are_kept_over_two_ranks_at_once() -> None:
    """The heads of a group as the queries of one step, and a row rule over all heads: r = 4·h + p is h and p again."""
    b = Builder({"h": 3, "p": 4, "r": 12})
    qk = b.put("QK", "hpm", b.input("Q", "hpe") * b.input("K", "hme"), "add", "e")
    h, p, r, m = (ex.index(x) for x in "hprm")
    at_r = ex.load("QK", (r // 4, r % 4, m), "f32")
    gm = b.put("GM", "r", at_r, "max", "m")
    sd = b.put("SD", "r", ex.exp(at_r - gm), "add", "m")

    def row(x: ex.Expr) -> ex.Expr:
        return ex.substitute(x, {r: h * 4 + p})

    b.put("O", "hpf", ex.exp(qk - row(gm)) / row(sd) * b.input("V", "hmf"), "add", "m")
    c = b.cascade("folded", "O")
    a = seen(c)
    assert a.score is ex.load("QK", (h, p, m), "f32")
    check_same(c, a, {"H": 3, "P": 4})


def test_a_batch_that_is_split_bears_the_name_of_a_rank_that_is_reduced_elsewhere() -> None:
    """Of one size, they may be one name: O[r] = Σ_m …, SD = Σ_r over the keys."""
    b = Builder({"h": 3, "p": 4, "r": 9, "m": 9, "b": 3})
    qk = b.put("QK", "bhpm", b.input("Q", "bhpe") * b.input("K", "bhme"), "add", "e")
    r, p, m = (ex.index(x) for x in "rpm")
    keys = ex.substitute(qk, {m: r})
    gm = b.put("GM", "bhp", keys, "max", "r")
    sd = b.put("SD", "bhp", ex.exp(keys - gm), "add", "r")

    def read(name: str, *last: ex.Expr) -> ex.Expr:
        return ex.load(name, (r // 3, r % 3, *last), "f32")

    b.input("V", "bhmf")
    weight = ex.exp(read("QK", p, m) - read(str(gm.attr), p)) / read(str(sd.attr), p)
    b.put("O", "rpf", weight * read("V", m, ex.index("f")), "add", "m")
    c = b.cascade("captured", "O")
    cut = verify(ranks.split(c))
    assert {"r", "rq", "rr"} <= {r.name for r in cut.ranks}
    a = seen(ranks.unify(cut))
    assert a.key == "m"
    check_same(cut, a, {"H": 3, "P": 4, "B": 3, "M": 9})


def test_a_transposed_epilogue_takes_the_outputs_ranks() -> None:
    b = Builder({"p": papers.size("P"), "m": papers.size("M"), "x": papers.size("P"), "y": papers.size("F")})
    s = b.put("QK", "pm", b.input("Q", "pe") * b.input("K", "me"), "add", "e")
    b.put("N", "pf", rule_of(b, s, "p") * b.input("V", "mf"), "add", "m")
    b.put("O", "yx", ex.load("N", (ex.index("x"), ex.index("y")), "f32") * 2.0)
    c = b.cascade("transposed", "O")
    a = seen(c)
    assert (a.query, a.value) == ("x", "y")
    check_same(c, a)


# --- what is computed beforehand ----------------------------------------------------------------------------------


def test_norms_are_a_prelude() -> None:
    c = papers.cosine()
    a = seen(c)
    assert {e.out.tensor for e in a.prelude} == {"QN", "KN"}
    check_same(c, a)


def test_projected_values_are_a_prelude() -> None:
    b = Builder()
    s = b.put("QK", "pm", b.input("Q", "pe") * b.input("K", "me"), "add", "e")
    v = b.put("V", "mf", b.input("X", "md") * b.input("W", "df"), "add", "d")
    b.put("O", "pf", rule_of(b, s, "p") * v, "add", "m")
    c = b.cascade("projected", "O")
    a = seen(c)
    assert [e.out.tensor for e in a.prelude] == ["V"]
    assert a.value == "f"
    check_same(c, a, {"D": 3})


def test_projected_operands_are_a_prelude() -> None:
    b = Builder()
    q = b.put("Q", "pe", b.input("X", "pd") * b.input("WQ", "de"), "add", "d")
    k = b.put("K", "me", b.input("Y", "md") * b.input("WK", "de"), "add", "d")
    s = b.put("QK", "pm", q * k, "add", "e")
    b.put("O", "pf", rule_of(b, s, "p") * b.input("V", "mf"), "add", "m")
    c = b.cascade("projected", "O")
    assert [e.out.tensor for e in seen(c).prelude] == ["Q", "K"]
    check_same(c, seen(c), {"D": 3})


def test_gathered_scores_are_a_prelude() -> None:
    """DeBERTa: a second product over relative positions, read at p − m."""
    b = Builder({"r": 16})
    s = b.put("QK", "pm", b.input("Q", "pe") * b.input("K", "me"), "add", "e")
    b.put("C2P", "pr", b.input("Q", "pe") * b.input("R", "re"), "add", "e")
    far = ex.minimum(ex.maximum(ex.index("p") - ex.index("m") + 8, 0), 15)
    s = b.put("S", "pm", s + ex.load("C2P", (ex.index("p"), far), "f32"))
    b.put("O", "pf", rule_of(b, s, "p") * b.input("V", "mf"), "add", "m")
    c = b.cascade("relative", "O")
    a = seen(c)
    assert [e.out.tensor for e in a.prelude] == ["C2P"]
    assert [e.out.tensor for e in a.products] == ["QK"]
    check_same(c, a)


def test_two_products_in_one_score() -> None:
    """MLA: a part without positions and a part with, added."""
    b = Builder()
    s = b.put("S1", "bhpm", b.input("Q", "bhpe") * b.input("K", "bhme"), "add", "e")
    t = b.put("S2", "bhpm", b.input("QR", "bhpd") * b.input("KR", "bmd"), "add", "d")
    s = b.put("S", "bhpm", (s + t) * 0.1)
    b.put("O", "bhpf", rule_of(b, s) * b.input("V", "bhmf"), "add", "m")
    c = b.cascade("latent", "O")
    a = seen(c)
    assert [e.out.tensor for e in a.products] == ["S1", "S2"]
    assert "latent" in traits(a)
    check_same(c, a, {"D": 3})


def test_an_embed_rank_named_like_the_value_rank() -> None:
    """Both are called d: inside the product it is bound, outside it is the value."""
    c = written("bhpd", "bhmd", "bhmd", "bhpd", "bhp", over="d")
    a = seen(c)
    assert a.value == "d"
    check_same(c, a, {"D": 3})


# --- what is none -------------------------------------------------------------------------------------------------


def scores(b: Any) -> Any:
    return b.put("QK", "bhpm", b.input("Q", "bhpe") * b.input("K", "bhme"), "add", "e")


def over_queries(b: Any) -> None:
    s = scores(b)
    gm = b.put("GM", "bhm", s, "max", "p")
    sn = b.put("SN", "bhpm", ex.exp(s - gm))
    a = sn / b.put("SD", "bhm", sn, "add", "p")
    b.put("O", "bhpf", a * b.input("V", "bhmf"), "add", "m")


def over_heads(b: Any) -> None:
    s = scores(b)
    gm = b.put("GM", "bpm", s, "max", "h")
    sn = b.put("SN", "bhpm", ex.exp(s - gm))
    a = sn / b.put("SD", "bpm", sn, "add", "h")
    b.put("O", "bhpf", a * b.input("V", "bhmf"), "add", "m")


def talking_heads(b: Any) -> None:
    a = rule_of(b, scores(b))
    mixed = b.put("MX", "bgpm", a * b.input("W", "hg"), "add", "h")
    b.put("O", "bgpf", mixed * b.input("V", "bgmf"), "add", "m")


def mixed_before(b: Any) -> None:
    s = b.put("MX", "bgpm", scores(b) * b.input("W", "hg"), "add", "h")
    b.put("O", "bgpf", rule_of(b, s, "bgp") * b.input("V", "bgmf"), "add", "m")


def router(b: Any) -> None:
    s = b.put("QK", "bpm", b.input("X", "bpe") * b.input("W", "em"), "add", "e")
    b.put("O", "bpf", rule_of(b, s, "bp") * b.input("V", "mf"), "add", "m")


def pooling(b: Any) -> None:
    s = b.put("QK", "bm", b.input("X", "bme") * b.input("W", "e"), "add", "e")
    b.put("O", "bf", rule_of(b, s, "b") * b.input("X2", "bmf"), "add", "m")


def gate(b: Any) -> None:
    s = b.put("G", "bc", b.input("X", "be") * b.input("W", "ec"), "add", "e")
    b.put("O", "bcx", b.input("Y", "bcx") * rule_of(b, s, "b", "c"))


def mlp(b: Any) -> None:
    """A feed-forward has the form of an attention over a table that no batch rank reaches."""
    h = b.put("H", "bph", b.input("X", "bpe") * b.input("W1", "eh"), "add", "e")
    b.put("O", "bpf", ex.unary("relu", h) * b.input("W2", "hf"), "add", "h")


def no_values(b: Any) -> None:
    b.put("O", "bhp", rule_of(b, scores(b)), "add", "m")


def inputs_only(b: Any) -> None:
    b.put("O", "pf", b.input("A", "pm") * b.input("V", "mf"), "add", "m")


def biggest(b: Any) -> None:
    b.put("O", "bhpf", rule_of(b, scores(b)) * b.input("V", "bhmf"), "max", "m")


def two_keys(b: Any) -> None:
    s = b.put("QK", "pmn", b.input("Q", "pe") * b.input("K", "mne"), "add", "e")
    b.put("O", "pf", ex.unary("sigmoid", s) * b.input("V", "mnf"), "add", "mn")


def two_values(b: Any) -> None:
    b.put("O", "bhpfg", rule_of(b, scores(b)) * b.input("V", "bhmfg"), "add", "m")


def keys_per_query(b: Any) -> None:
    """Every query has keys of its own: nothing to tile."""
    s = b.put("QK", "bpm", b.input("Q", "bpe") * b.input("K", "bpme"), "add", "e")
    b.put("O", "bpf", rule_of(b, s, "bp") * b.input("V", "bmf"), "add", "m")


def difference(b: Any) -> None:
    a1 = rule_of(b, scores(b))
    n1 = b.put("N1", "bhpf", a1 * b.input("V", "bhmf"), "add", "m")
    n2 = b.put("N2", "bhpf", ex.unary("sigmoid", a1) * b.input("V", "bhmf"), "add", "m")
    b.put("O", "bhpf", n1 - n2)


def distance(b: Any) -> None:
    """No product: a sum of |q − k|."""
    s = b.put("QK", "bhpm", ex.unary("abs", b.input("Q", "bhpe") - b.input("K", "bhme")), "add", "e")
    b.put("O", "bhpf", rule_of(b, s) * b.input("V", "bhmf"), "add", "m")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (over_queries, "reduces scores over p (max), not over m"),
        (over_heads, "reduces scores over h (max), not over m"),
        (talking_heads, "MX reduces scores over h (add), not over m"),
        (mixed_before, "MX reduces scores over h (add), not over m"),
        (router, "a table that is looked up (a router)"),
        (mlp, "a table that is looked up (a router)"),
        (pooling, "pooling over m with one token rank"),
        (gate, "no score comes before it"),
        (no_values, "no product of weights and values"),
        (inputs_only, "multiplies inputs"),
        (biggest, "reduces by max"),
        (two_keys, "reduces 2 ranks (m, n)"),
        (two_values, "2 ranks (f, g) of their own"),
        (keys_per_query, "no product of an operand with m and one without"),
        (difference, "joins 2 products with values (N1, N2)"),
        (distance, "no product of an operand with m and one without"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_is_no_attention(build: Any, reason: Any) -> None:
    b = Builder()
    build(b)
    assert reason in missed(b.cascade(build.__name__, "O"))


def test_cascades_of_other_forms() -> None:
    c = papers.attention("softmax", papers.softmax)
    assert "2 outputs" in missed(replace(c, outputs=("O", "SD")))
    a = seen(c)
    assert "carried state" in missed(streamed(a))
    assert "carried state" in missed(papers.cascade5())
    assert isinstance(attention(papers.cascade2()), Obstacle)


def test_the_deepest_attempt_is_told() -> None:
    b = Builder()
    over_queries(b)
    slot, none = attention(b.cascade("slot", "O")), attention(papers.cascade2())
    assert isinstance(slot, Obstacle)
    assert isinstance(none, Obstacle)
    assert slot.depth > none.depth


# --- where the score ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "score", "want"),
    [
        (papers.softmax, rules.capped, "where(m > p − 7, tanh(QK[b,h,p,m] / 3) · 3, −∞)"),
        (papers.softmax_naive, rules.causal, "where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞)"),
        (papers.sigmoid, rules.causal, "where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞)"),
        (papers.power, rules.causal, "where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞)"),
        (papers.softplus, rules.biased, "QK[b,h,p,m] · 0.125 + bias[h,p,m]"),
        (papers.linear, rules.scaled, "QK[b,h,p,m] · 0.125"),
        (rules.shifted_softmax, rules.causal, "where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞)"),
        (rules.masked_after, rules.capped, "where(m > p − 7, tanh(QK[b,h,p,m] / 3) · 3, −∞)"),
        (rules.any_kept, rules.causal, "where(m ≤ p − 3, QK[b,h,p,m] · 0.125, −∞)"),
        (rules.renormalised, rules.scaled, "QK[b,h,p,m] · 0.125"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_score(rule: Any, score: Any, want: Any) -> None:
    assert str(seen(papers.attention("x", rule, score)).score) == want


def test_elements_are_maximal_and_without_rows() -> None:
    a = seen(papers.attention("x", rules.masked_after, rules.scaled))
    found = elements(a.weight, a.row_names, a.key)
    assert [str(e) for e in found] == ["m ≤ p − 3", "QK[b,h,p,m] · 0.125"]


# --- rows without a key -------------------------------------------------------------------------------------------


def small_additive(b: Any, qk: Any) -> Any:
    return qk + ex.where(ex.index("m") <= ex.index("p"), 0.0, -1e4)


def small_where(b: Any, qk: Any) -> Any:
    return ex.where(ex.index("m") <= ex.index("p"), qk, -1e4)


def filled_from_data(b: Any, s: Any) -> Any:
    """Rows without a key get a number of their own where that is positive, else 0."""
    a = b.put("A0", "bhpm", papers.softmax(b, s))
    return ex.where(ex.unary("isnan", a), ex.unary("relu", b.input("own", "bhp")), a)


@pytest.mark.parametrize(
    ("rule", "score", "want"),
    [
        (papers.softmax, rules.scaled, "never"),
        (papers.softmax, rules.causal, "nan"),
        (papers.softmax, rules.causal_lowest, "uniform"),
        (papers.softmax, rules.padded, "uniform"),
        (papers.softmax, rules.padded_inf, "nan"),
        (papers.softmax, small_where, "uniform"),
        (papers.softmax, small_additive, "unmasked"),
        (papers.softmax_zero, rules.causal, "zero"),
        (papers.softmax_zero, rules.causal_lowest, "uniform"),
        (papers.softmax_sink, rules.causal, "zero"),
        (papers.softmax_sink, rules.padded, "zero"),
        (papers.sigmoid, rules.causal, "zero"),
        (papers.log_softmax, rules.causal, "nan"),
        (rules.no_nan, rules.causal, "zero"),
        (rules.masked_after, rules.causal, "zero"),
        (rules.all_masked, rules.causal, "zero"),
        (rules.any_kept, rules.causal_lowest, "zero"),
        (rules.sink_log, rules.causal, "zero"),
        (filled_from_data, rules.causal, "varies"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_no_key_rule(rule: Any, score: Any, want: Any) -> None:
    assert no_key_rule(seen(papers.attention("x", rule, score))) == want


# --- for display --------------------------------------------------------------------------------------------------


def alibi(b: Any, qk: Any) -> Any:
    slope = b.given("slope", (b.extent("h"),), (ex.index("h"),))
    return ex.where(ex.index("m") <= ex.index("p"), qk + slope * ex.cast(ex.index("m") - ex.index("p"), "f32"), -1e30)


def window(b: Any, qk: Any) -> Any:
    p, m = ex.index("p"), ex.index("m")
    return ex.where((m <= p) & (p - m < 4), qk, -float("inf"))


def local(b: Any, qk: Any) -> Any:
    far = ex.unary("abs", ex.index("p") - ex.index("m"))
    return qk + ex.where(far > 4, -1e30, 0.0)


def segments(b: Any, qk: Any) -> Any:
    p, m = (b.given("ids", (b.extent("b"), papers.size("T")), (ex.index("b"), ex.index(r)), "i64") for r in "pm")
    return ex.where(ex.equal(p, m), qk, -1e30)


def slopes(b: Any, qk: Any) -> Any:
    return qk + b.given("alibi", (b.extent("b"), b.extent("h"), b.extent("m")), tuple(ex.index(r) for r in "bhm"))


@pytest.mark.parametrize(
    ("rule", "score", "word", "has"),
    [
        (papers.softmax, rules.causal, "softmax", {"causal"}),
        (papers.softmax, window, "softmax", {"causal", "window"}),
        (papers.softmax, alibi, "softmax", {"causal", "alibi"}),
        (papers.softmax, slopes, "softmax", {"alibi"}),
        (papers.softmax, local, "softmax", {"window"}),
        (papers.softmax, segments, "softmax", {"varlen"}),
        (papers.softmax_sink, rules.capped, "softmax", {"sink", "softcap", "window"}),
        (papers.softmax, rules.biased, "softmax", {"bias"}),
        (papers.softmax, rules.padded, "softmax", {"causal", "mask"}),
        (papers.sigmoid, rules.scaled, "sigmoid", set()),
        (papers.power, rules.scaled, "power", set()),
        (papers.softplus, rules.scaled, "softplus", set()),
        (papers.linear, rules.scaled, "linear", set()),
        (rules.unit_length, rules.scaled, "linear", set()),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_words_for_people(rule: Any, score: Any, word: Any, has: Any) -> None:
    a = seen(papers.attention("x", rule, score))
    assert kind(a) == word
    assert has <= traits(a)
    assert traits(a) <= has | {"cross"}


@pytest.mark.parametrize("op", named(lambda o: o.arity == 1 and o.curved))
def test_every_row_rule_has_its_word(op: str) -> None:
    """A new operator answers by itself: none is left to be called linear."""

    def rule(b: Any, s: Any) -> Any:
        return ex.unary(op, s)

    a = seen(papers.attention("x", rule, rules.scaled))
    assert kind(a) == ("exp" if op == "exp2" else op)
    assert a.score.op == "mul"


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        (lambda s: s * ex.unary("sigmoid", s), "sigmoid"),
        (lambda s: s * (ex.unary("erf", s * 0.7) + 1.0), "erf"),
        (lambda s: ex.unary("relu", s) * ex.unary("relu", s), "relu"),
        (lambda s: ex.unary("erf", ex.unary("relu", s)), "erf"),
        (lambda s: ex.maximum(s, -1.0), "pointwise"),
        (lambda s: ex.where(s > 0.0, s, 0.0), "pointwise"),
        (lambda s: ex.binary("pow", s, 3.0), "power"),
        (lambda s: s * 2.0 + 1.0, "linear"),
    ],
    ids=["silu", "gelu", "squared relu", "outermost", "clamped", "chosen", "cube", "line"],
)
def test_a_row_rule_that_is_no_map_of_the_score_is_no_line(rule: Any, word: str) -> None:
    assert kind(seen(papers.attention("x", lambda b, s: rule(s), rules.scaled))) == word


# --- names mean nothing -------------------------------------------------------------------------------------------


def renamed(c: Any, ranks: Any, names: Any) -> Any:
    terms = {ex.index(a): ex.index(b) for a, b in ranks.items()}

    def term(e: Any) -> Any:
        def rule(t: Any, args: Any) -> Any:
            return ex.load(names[str(t.attr)], args, t.dtype) if t.op == "load" else None

        return ex.rebuild(ex.substitute(e, terms), rule)

    return verify(
        replace(
            c,
            ranks=tuple(Rank(ranks[r.name], r.size) for r in c.ranks),
            tensors=tuple(replace(t, name=names[t.name]) for t in c.tensors),
            einsums=tuple(
                replace(
                    e,
                    out=Access(names[e.out.tensor], tuple(term(i) for i in e.out.index)),
                    body=term(e.body),
                    over=tuple(ranks[r] for r in e.over),
                )
                for e in c.einsums
            ),
            outputs=tuple(names[o] for o in c.outputs),
        )
    )


@given(
    st.sampled_from([*rules.SOFTMAX, *rules.OTHERS]),
    st.sampled_from(rules.SCORES),
    st.integers(0, 10**6),
)
def test_names_of_ranks_and_tensors_mean_nothing(rule: Any, score: Any, seed: Any) -> None:
    c = papers.attention("x", rule, score)
    rng = random.Random(seed)
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", len(c.ranks))
    ranks = {r.name: n for r, n in zip(c.ranks, letters)}
    numbers = rng.sample(range(100), len(c.tensors))
    names = {t.name: f"T{n}" for t, n in zip(c.tensors, numbers)}
    a, b = seen(c), seen(renamed(c, ranks, names))
    assert (b.query, b.key, b.value) == (ranks[a.query], ranks[a.key], ranks[a.value])
    assert b.batch == tuple(ranks[r] for r in a.batch)
    assert [e.out.tensor for e in b.row] == [names[e.out.tensor] for e in a.row]
    assert len(list(ex.walk(b.score))) == len(list(ex.walk(a.score)))
    assert no_key_rule(a) == no_key_rule(b)


def test_a_parsed_cascade_is_read_alike() -> None:
    c = papers.attention("x", papers.softmax_sink, rules.padded, group=2)
    assert seen(parse(to_text(c))) == seen(c)


def test_a_row_of_weights_is_no_attention_of_the_product_that_it_reads() -> None:
    """Channels that are as many as keys: the sum over channels might be values, were its own row not made of it."""
    b = Builder({"h": 2, "p": 5, "m": 5, "c": 5, "e": 3})
    ql = b.put("QL", "hpc", b.input("Q", "hpe") * b.input("W", "hec"), "add", "e")
    qk = b.put("QK", "hpm", ql * b.input("C", "mc"), "add", "c")
    b.put("SN", "hpm", ex.exp(qk - b.put("GM", "hp", qk, "max", "m")))
    assert missed(b.cascade("weights", "SN")) == "GM reads QK, which would come after it"
