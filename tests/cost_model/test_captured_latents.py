"""Sharding of attentions whose keys and values are made of latents: the same figures as the hand-written forms have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reattend.cost_model.devices.device import device
from reattend.cost_model.mesh.mesh import parse
from reattend.cost_model.mesh.placement import Placed
from reattend.cost_model.mesh.plan import MeshPlan
from reattend.cost_model.mesh.sharding import ShardedSite, latent_ways, placed, shard
from reattend.cost_model.mesh.ways import LATENT_ROLES, Latents, Way, captured_ways, latents, with_projection
from reattend.patterns import expr as ex
from reattend.patterns.attention.latent import K2, V3, Widths, naive
from reattend.patterns.cascade import Cascade
from reattend.patterns.library.papers import Builder
from reattend.patterns.verdict import Obstacle

from .test_sharding import heads

M = 32768
H200 = device("h200")


def made(w: Widths, queries: int = 1, batch: int = 1, keys: int = M) -> Cascade:
    """What a captured model computes: keys of a map and a rotary part in one operand, up to the heads' output."""
    b = Builder({
        "b": batch, "h": w.heads, "p": queries, "m": keys, "e": w.key + w.rotary, "f": w.value, "c": w.latent, "k": w.latent,
    })
    e, m = ex.index("e"), ex.index("m")
    tokens = [ex.load("C", (ex.index("b"), m, ex.index(r)), w.dtype) for r in "ck"]
    b.input("C", "bmc", w.dtype)
    k = b.put("K", "bhme", tokens[0] * b.input("WUK", "hec", w.dtype), "add", "c")
    v = b.put("V", "bhmf", tokens[1] * b.input("WUV", "hkf", w.dtype), "add", "k")
    rotary = b.given("KPE", (batch, keys, w.rotary), (ex.index("b"), m, e - w.key), w.dtype)
    qk = b.put("QK", "bhpm", b.input("Q", "bhpe", w.dtype) * ex.where(e < w.key, k, rotary), "add", "e")
    return finished(b, qk, v)


def plain(w: Widths, queries: int = 1, batch: int = 1, keys: int = M) -> Cascade:
    """The same attention on keys and values as they are."""
    b = Builder({"b": batch, "h": w.heads, "p": queries, "m": keys, "e": w.key + w.rotary, "f": w.value})
    qk = b.put("QK", "bhpm", b.input("Q", "bhpe", w.dtype) * b.input("K", "bhme", w.dtype), "add", "e")
    return finished(b, qk, b.input("V", "bhmf", w.dtype))


def finished(b: Builder, qk: ex.Expr, v: ex.Expr) -> Cascade:
    s = b.put("S", "bhpm", qk * 0.1)
    sn = b.put("SN", "bhpm", ex.exp(s - b.put("GM", "bhp", s, "max", "m")))
    b.put("O", "bhpf", sn / b.put("SD", "bhp", sn, "add", "m") * v, "add", "m")
    return b.cascade("attention", "O")


def ways(w: Widths, mesh: str, queries: int = 1, keys: int = M) -> dict[str, Way]:
    own = with_projection(plain(w, queries, keys=keys), LATENT_ROLES, w.model)
    above = with_projection(made(w, queries, keys=keys), LATENT_ROLES, w.model)
    found = latents(above, own, LATENT_ROLES)
    assert isinstance(found, Latents), found
    return {x.name: x for x in captured_ways(own, found, LATENT_ROLES, parse(mesh))}


def spoken(p: Placed) -> list[tuple[str, str, int]]:
    return sorted((x.kind, x.axis, x.payload) for x in p.exchanges)


SAME = {
    "latent heads": "heads", "latent merge": "merge", "TPLA 2 slices": "TPLA 2 slices", "TPLA 8 slices": "TPLA 8 slices",
    "latent summed scores": "summed scores",
}


@pytest.mark.parametrize("w", [V3, K2], ids=["V3", "K2"])
@pytest.mark.parametrize(("captured", "known"), SAME.items())
def test_a_captured_attention_is_sharded_as_the_written_one(w: Widths, captured: str, known: str) -> None:
    """Cache, weights, products and messages of every way over latents, from the expanded cascade and from the absorbed."""
    a = placed(ways(w, "tp=8")[captured])
    b = placed(next(x for x in latent_ways(w, parse("tp=8"), keys=M) if x.name == known))
    assert a.cache_bytes == b.cache_bytes
    assert sum(a.weights.values()) == sum(n for name, n in b.weights.items() if name != "MU")
    assert a.flops == pytest.approx(b.flops, rel=1e-3)
    assert sum(n for _, _, n in spoken(a)) == pytest.approx(sum(n for _, _, n in spoken(b)), rel=0.02)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_C1_cached_bytes_of_a_captured_MLA(tp: int) -> None:
    """The rows of the table: expanded heads, latents on every device, and tokens dealt out."""
    found = ways(V3, f"tp={tp}")
    a_token = {n: placed(found[n]).cache_bytes // M for n in ("heads", "latent heads", "latent expanded heads", "latent merge")}
    assert a_token == {
        "heads": 128 * (192 + 128) * 2 // tp, "latent heads": 1152, "latent expanded heads": 1152, "latent merge": 1152 // tp,
    }


def test_ranks_of_one_size_are_not_taken_for_another() -> None:
    """As many keys, queries, latent channels and model channels: 512 of each."""
    w = replace(V3, model=512)
    found, longer = ways(w, "tp=2", 512, 512), ways(w, "tp=2", 512, 1024)
    for name in ("latent heads", "latent expanded heads", "latent merge", "TPLA 2 slices"):
        assert 2 * placed(found[name]).cache_bytes == placed(longer[name]).cache_bytes


def test_C9_absorbed_products_are_3_4_times_the_expanded() -> None:
    """Of long rows with many queries: 2·(512 + 64 + 512) FLOP a pair against 2·(128 + 64 + 128)."""
    found = ways(replace(V3, model=1), "tp=1", queries=M)
    ratio = placed(found["latent heads"]).flops / placed(found["heads"]).flops
    assert ratio == pytest.approx(1088 / 320, rel=0.02)


def test_expanding_in_every_step_costs_the_map() -> None:
    """2·S·c·h·(dn + dv) FLOP above the products on keys and values; and what is cached are latents."""
    found = ways(V3, "tp=1")
    more = placed(found["latent expanded heads"]).flops - placed(found["heads"]).flops
    assert more == pytest.approx(2 * M * 512 * 128 * 256, rel=1e-3)


def plan(w: Widths, mesh: str, step_queries: int, approximate: bool = False, batch: int = 8) -> MeshPlan:
    site = ShardedSite("attn", plain(w, step_queries, batch), 61, made(w, step_queries, batch), w.model)
    return shard([site], parse(mesh), H200, weights=10**9, approximate=approximate)


def test_a_plan_shows_every_layout_and_which_is_exact() -> None:
    found = plan(V3, "tp=8", 1)
    assert found.best is not None
    assert found.best.name == "latent merge"
    assert {s.name for s in found.schemes if not s.exact} == {f"TPLA {g} slices{x}" for g in (2, 8) for x in ("", ", heads behind")}
    for s in found.schemes:
        if not s.exact:
            # its figures are there, and it is not taken unasked
            assert not s.feasible
            assert s.parts
            assert s.cache_bytes
            assert "is not one over the whole, however latents are turned; Policy(approximate=True) or --approximate admits it" in s.why
    by = {s.name: s.token_bytes for s in found.schemes}
    assert (by["heads"], by["latent heads"], by["latent merge"]) == (10240, 1152, 144)
    assert (by["TPLA 2 slices"], by["TPLA 8 slices"]) == (640, 256)
    assert "latent ways keep C 1024 + KPE 128 bytes a token and layer in place of 81920" in found.note
    assert "a layout of the cache to plan with, which optimize() does not make" in found.note
    assert found.scheme("latent merge").batch(M) > 60 * found.scheme("heads").batch(M)


def test_an_admitted_approximation_is_ranked_with_the_others() -> None:
    found = plan(V3, "tp=8", 1, approximate=True)
    assert found.scheme("TPLA 2 slices").feasible
    assert not found.scheme("TPLA 2 slices").exact


def test_long_prefills_expand_and_short_steps_absorb() -> None:
    """The crossover of C1: the expanded form has fewer products from some 170 queries on."""
    many, one = (plan(V3, "tp=8", n, batch=1) for n in (4096, 1))
    assert many.scheme("latent expanded heads").seconds < many.scheme("latent heads").seconds
    assert one.scheme("latent expanded heads").seconds > 5 * one.scheme("latent heads").seconds


def test_the_batch_lies_beside_every_layout() -> None:
    site = ShardedSite("attn", plain(V3, 1, 4), 61, made(V3, 1, 4), V3.model)
    found = shard([site], parse("tp=2,dp=2"), H200)
    assert all(s.name.endswith(" × batch") for s in found.schemes)
    alone = shard([replace(site, cascade=plain(V3, 1, 2), upstream=made(V3, 1, 2))], parse("tp=2"), H200)
    for s in alone.schemes:
        there = found.scheme(f"{s.name} × batch")
        assert (there.cache_bytes, there.flops, there.sent_bytes) == (s.cache_bytes, s.flops, s.sent_bytes), s.name


def test_training_keeps_no_latents() -> None:
    site = ShardedSite("attn", plain(K2, 1024, keys=1024), 61, made(K2, 1024, keys=1024), K2.model)
    found = shard([site], parse("tp=8"), H200, step="training")
    assert not any("latent" in s.name or "TPLA" in s.name for s in found.schemes)


def test_a_reason_stands_where_there_is_no_latent() -> None:
    site = ShardedSite("attn", plain(K2), 61, Obstacle("no product with weights stands behind keys or values"), K2.model)
    found = shard([site], parse("tp=8"), H200)
    assert {s.name for s in found.schemes} == {"heads", "ring", "ring zigzag", "all-to-all", "merge"}
    assert "no latent form of attn: no product with weights stands behind keys or values" in found.note


def test_what_is_no_narrower_is_no_latent() -> None:
    """Grouped heads of tokens themselves: two heads of 128 are narrower than the 4096 channels that they are made of."""
    w = Widths(heads=2, latent=4096, rotary=0, model=4096)
    own, above = (with_projection(f, LATENT_ROLES) for f in (plain(w), naive_of(w)))
    obstacle = latents(above, own, LATENT_ROLES)
    assert isinstance(obstacle, Obstacle)
    assert obstacle.reason == "what keys and values are made of is no narrower: C 8192 bytes a token, for 1024"


def naive_of(w: Widths) -> Cascade:
    """The hand-written expanded cascade without its output projection."""
    c = naive(w, keys=M).cascade
    kept = tuple(e for e in c.einsums if e.out.tensor != "Y")
    names = {str(x.attr) for e in kept for x in e.reads} | {e.out.tensor for e in kept}
    ranks = frozenset[str]().union(*(e.ranks | set(e.over) for e in kept))
    return replace(
        c, einsums=kept, outputs=("O",), tensors=tuple(t for t in c.tensors if t.name in names),
        ranks=tuple(r for r in c.ranks if r.name in ranks),
    )


def test_models_mix_attentions_with_latents_and_without() -> None:
    sites = [
        ShardedSite("latent", plain(K2), 4, made(K2), K2.model),
        ShardedSite("plain", heads(64, 8), 2, Obstacle("keys are turned"), K2.model),
    ]
    found = shard(sites, parse("tp=4"), H200)
    both = found.scheme("latent heads")
    alone = [shard([s], parse("tp=4"), H200) for s in sites]
    assert both.cache_bytes == alone[0].scheme("latent heads").cache_bytes + alone[1].scheme("heads").cache_bytes
    assert "no latent form of plain: keys are turned" in found.note


def test_groups_of_heads_divide_their_latents() -> None:
    """GLA: two groups of heads, a latent each, on two devices: each holds half of the latents, and no key twice."""
    b = Builder({"b": 1, "h": 2, "g": 8, "p": 1, "m": M, "e": 64, "f": 64, "c": 256, "k": 256})
    h, g = ex.index("h"), ex.index("g")
    tokens = [b.given("C", (1, M, 512), (ex.index("b"), ex.index("m"), h * 256 + ex.index(r)), "bf16") for r in "ck"]
    k = b.put("K", "bhgme", tokens[0] * b.input("WK", "hgec", "bf16"), "add", "c")
    v = b.put("V", "bhgmf", tokens[1] * b.input("WV", "hgfk", "bf16"), "add", "k")
    q = b.given("Q", (1, 1, 16, 64), (ex.index("b"), ex.index("p"), h * 8 + g, ex.index("e")), "bf16")
    above = grouped_row(b, q * k, v)
    b = Builder({"b": 1, "h": 2, "g": 8, "p": 1, "m": M, "e": 64, "f": 64})
    q = b.given("Q", (1, 1, 16, 64), (ex.index("b"), ex.index("p"), h * 8 + g, ex.index("e")), "bf16")
    own = grouped_row(b, q * b.input("K", "bhgme", "bf16"), b.input("V", "bhgmf", "bf16"))
    found = shard([ShardedSite("gla", own, 1, above)], parse("tp=2"), H200)
    assert found.scheme("latent heads").token_bytes == 512
    assert found.scheme("latent heads").copies == 1.0
    assert not any("TPLA" in s.name for s in found.schemes)


def grouped_row(b: Builder, product: ex.Expr, v: ex.Expr) -> Cascade:
    s = b.put("QK", "bhgpm", product, "add", "e")
    sn = b.put("SN", "bhgpm", ex.exp(s - b.put("GM", "bhgp", s, "max", "m")))
    b.put("O", "bhgpf", sn / b.put("SD", "bhgp", sn, "add", "m") * v, "add", "m")
    return b.cascade("grouped", "O")


def test_weights_that_fill_the_devices_say_on_how_many_they_would_lie() -> None:
    site = ShardedSite("attn", plain(V3), 61, made(V3), V3.model)
    found = shard([site], parse("tp=8"), H200, weights=2 * 671 * 10**9)
    assert found.best is None
    assert "weights alone take 167.8 GB of a device's 126.9 GB: they need 11 devices that share them" in found.note
