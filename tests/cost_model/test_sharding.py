"""Sharding: the known answers by their ids, and the laws of what devices hold, compute and send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.devices.device import Device, TimeModel, device
from reattend.cost_model.mesh.capacity import DeviceMemory, largest_batch
from reattend.cost_model.mesh.core import Refused, Roles, core, roles
from reattend.cost_model.mesh.mesh import Axis, Mesh, MeshError, parse
from reattend.cost_model.mesh.placement import Assignment, Placed, place, scalars
from reattend.cost_model.mesh.plan import MeshPlan
from reattend.cost_model.mesh.sharding import (
    LATENT_ROLES,
    ShardedSite,
    Way,
    assignments,
    exchanges,
    hidden_from,
    latent_ways,
    placed,
    rank_ways,
    scheme,
    shard,
    times,
    with_projection,
)
from reattend.cost_model.operations import operations
from reattend.patterns import expr as ex
from reattend.patterns.attention.latent import K2, V3, Latent, Widths, absorbed, naive, sliced
from reattend.patterns.attention.rowstate import RowState, derive
from reattend.patterns.cascade import Cascade, to_text
from reattend.patterns.cascade import parse as parse_cascade
from reattend.patterns.expr import Expr
from reattend.patterns.library import papers
from reattend.patterns.library.chunked import linear_chunks
from reattend.patterns.library.papers import Builder

H100, H200 = device("h100"), device("h200")
M = 32768
IDEAL = TimeModel(matrix_efficiency=1.0, vendor_matrix_efficiency=1.0, bandwidth_efficiency=1.0)


def causal(b: Builder, qk: Expr) -> Expr:
    return ex.where(ex.index("m") <= ex.index("p"), qk * 0.125, float("-inf"))


def heads(
    h: int, kv: int, *, p: int = 1, m: int = M, d: int = 128, b: int = 1, masked: bool = False, rule: papers.Rule = papers.softmax
) -> Cascade:
    """Grouped attention in bf16."""
    c = papers.attention("gqa", rule, causal if masked else papers.plain, group=h // kv, b=b, h=h, p=p, m=m, e=d, f=d)
    return replace(parse_cascade(to_text(c).replace('"f32"', '"bf16"')), accumulate="f32")


ROLES = Roles(("b",), "h", "p", "m")


def way(c: Cascade, name: str, mesh: str | Mesh, who: Roles = ROLES) -> Way:
    m = parse(mesh) if isinstance(mesh, str) else mesh
    return Way(name, c, who, dict(assignments(who, m))[name], m)


def latent(name: str, tp: int, w: Widths = V3, keys: int = M, queries: int = 1, batch: int = 1) -> Placed:
    ways = latent_ways(w, Mesh((Axis("tp", tp),)), keys=keys, queries=queries, batch=batch)
    return placed(next(x for x in ways if x.name == name))


def tpla(g: int, tp: int, w: Widths = V3, keys: int = M) -> Placed:
    how = Assignment((("g", "slice"), ("h", "tp")), (("g", "slice"), ("h", "tp")))
    n = min(g, tp)
    return place(sliced(g, w, keys=keys).cascade, LATENT_ROLES, how, {"slice": n, "tp": tp // n})


def head_parallel(c: Cascade, tp: int) -> Placed:
    how = Assignment((("h", "tp"),), (("h", "tp"),))
    return place(c, ROLES, how, {"tp": tp})


# --- bytes ----------------------------------------------------------------------------------------------------------

TP = (1, 2, 4, 8)
GQA_TABLE = [
    ("MHA h=128", 128, 128, (65536, 32768, 16384, 8192)), ("MHA h=64", 64, 64, (32768, 16384, 8192, 4096)),
    ("GQA-8", 64, 8, (4096, 2048, 1024, 512)), ("MQA", 64, 1, (512, 512, 512, 512)),
]


@pytest.mark.parametrize(("h", "kv", "row"), [r[1:] for r in GQA_TABLE], ids=[r[0] for r in GQA_TABLE])
def test_C1_cached_bytes_of_heads(h: int, kv: int, row: tuple[int, ...]) -> None:
    assert tuple(head_parallel(heads(h, kv), tp).cache_bytes // M for tp in TP) == row


@pytest.mark.parametrize("w", [V3, K2], ids=["V3", "K2"])
def test_C1_cached_bytes_of_MLA(w: Widths) -> None:
    assert [latent("heads", tp, w).cache_bytes // M for tp in TP] == [1152] * 4
    assert [latent("merge", tp, w).cache_bytes // M for tp in TP] == [1152, 576, 288, 144]


@pytest.mark.parametrize(("groups", "row"), [(2, (1152, 640, 640, 640)), (8, (4224, 2176, 1152, 640))])
def test_C1_cached_bytes_of_GLA(groups: int, row: tuple[int, ...]) -> None:
    c = absorbed(Widths(latent=256), groups=groups, keys=M).cascade
    assert tuple(head_parallel(c, tp).cache_bytes // M for tp in TP) == row


def test_C1_cached_bytes_of_TPLA() -> None:
    assert [tpla(2, tp).cache_bytes // M for tp in TP] == [1152, 640, 640, 640]
    assert [tpla(tp, tp).cache_bytes // M for tp in TP] == [1152, 640, 384, 256]


def test_C1_cached_bytes_of_the_GLA_paper() -> None:
    """h = 16, d = 128 at one and two devices: MHA, GQA-4, GTA-4 (tied keys and values), GLA-2, MLA."""
    small = Widths(heads=16, latent=256)
    forms = {
        "MHA": (heads(16, 16), 8192, 4096), "GQA-4": (heads(16, 4), 2048, 1024),
        "GTA-4": (absorbed(replace(small, latent=128), groups=4, keys=M).cascade, 1152, 640),
        "GLA-2": (absorbed(small, groups=2, keys=M).cascade, 1152, 640),
        "MLA": (absorbed(replace(small, latent=512), keys=M).cascade, 1152, 1152),
    }
    for name, (c, one, two) in forms.items():
        assert (head_parallel(c, 1).cache_bytes // M, head_parallel(c, 2).cache_bytes // M) == (one, two), name


def test_C2_TPLA_on_two_devices() -> None:
    """C2: 320 numbers, 640 bytes a token."""
    p = tpla(2, 2)
    assert p.cache_bytes // M == 640
    assert p.cache_bytes // M // 2 == 320


def test_C3_cache_of_V3_at_128k() -> None:
    assert 62 * latent("heads", 1, keys=131072).cache_bytes / 2**30 == 8.71875


def test_C4_a_token_in_eight_bits() -> None:
    c = absorbed(eight_bit=True, keys=M).cascade
    p = place(c, LATENT_ROLES, Assignment((), ()), {})
    assert p.cache_bytes // M == 656
    assert {n: b // M for n, b in p.cache.items()} == {"C": 512, "CS": 16, "KPE": 128}


def test_heads_that_straddle_key_heads_hold_both() -> None:
    """24 heads on 6 key heads, 8 devices: the second device's heads 3, 4 and 5 read key heads 0 and 1."""
    assert head_parallel(heads(24, 6), 8).cache_bytes // M == 2 * 2 * 128 * 2
    assert head_parallel(heads(24, 6), 2).cache_bytes // M == 2 * 3 * 128 * 2


# --- operations -----------------------------------------------------------------------------------------------------


def attention_flops(c: Cascade) -> int:
    """FLOP of the products inside the attention, projections left out."""
    found = core(c)
    assert found is not None
    inside = [e for i, e in enumerate(c.einsums) if i in found.products | found.unit]
    return int(operations(inside, {r.name: int(r.size) for r in c.ranks}).flops)


def test_C5_arithmetic_intensity_of_absorbed_latents() -> None:
    """C5: 241.78 FLOP a byte for 128 heads; 2h = 256 where the rotary part is left out."""
    c = absorbed(keys=M).cascade
    assert attention_flops(c) / latent("heads", 1).cache_bytes == pytest.approx(241.78, abs=0.005)
    plain = replace(V3, rotary=0)
    c = absorbed(plain, keys=M).cascade
    assert attention_flops(c) / place(c, LATENT_ROLES, Assignment((), ()), {}).cache_bytes == 256


def test_keys_and_values_of_latents_counted_apart_are_rejected() -> None:
    """Known wrong: a second tensor for the values would halve the intensity of the latents and double their bytes."""
    c = absorbed(replace(V3, rotary=0), keys=M).cascade
    apart = replace(
        c, tensors=(*c.tensors, replace(c.tensor["C"], name="C2")),
        einsums=tuple(
            replace(e, body=ex.substitute(e.body, {x: ex.load("C2", x.args, x.dtype) for x in e.reads if x.attr == "C"}))
            if e.out.tensor == "OL" else e for e in c.einsums
        ),
    )
    right, wrong = (place(x, LATENT_ROLES, Assignment((), ()), {}).cache_bytes for x in (c, apart))
    assert wrong == 2 * right
    assert attention_flops(apart) / wrong == 128 != attention_flops(c) / right


def test_C6_heads_from_which_latents_are_bound_by_products() -> None:
    """C6: h·s_q ≥ ½·865 TFLOP/s / 3.35 TB/s = 129.1 (the rotary part left out, as the paper rounds)."""
    per_head = {}
    for h in (16, 32):
        w = replace(V3, rotary=0, heads=h)
        c = absorbed(w, keys=M).cascade
        per_head[h] = attention_flops(c) / place(c, LATENT_ROLES, Assignment((), ()), {}).cache_bytes / h
    assert per_head[16] == per_head[32]
    assert 865e12 / 3.35e12 / per_head[16] == pytest.approx(129.1, abs=0.05)


def test_C7_ridge_of_the_H100() -> None:
    assert round(H100.matrix_rate("bf16") / H100.dram_bytes_per_s) == 295


def pair_flops(form: Callable[..., Latent]) -> float:
    """FLOP for each query and key of a head: the part that grows with both."""
    def at(p: int, m: int) -> int:
        return attention_flops(form(queries=p, keys=m).cascade)

    n = 512
    return (at(2 * n, 2 * n) - at(2 * n, n) - at(n, 2 * n) + at(n, n)) / n / n / V3.heads / 2


def test_C9_pairs_of_the_absorbed_and_the_expanded_form() -> None:
    assert pair_flops(absorbed) == 1088
    assert pair_flops(naive) == 320
    assert pair_flops(absorbed) / pair_flops(naive) == 3.4


def key_flops(p: Callable[[int], Placed]) -> int:
    return p(2 * M).flops - p(M).flops


@pytest.mark.parametrize(("g", "ratio"), [(2, 1.0588), (4, 1.1765), (8, 1.4118)])
def test_C10_extra_FLOP_of_TPLA(g: int, ratio: float) -> None:
    ours = key_flops(lambda m: tpla(g, g, keys=m))
    mla = key_flops(lambda m: latent("heads", g, keys=m))
    assert ours / mla == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize(("g", "bound"), [(2, 1.8), (4, 3.0), (8, 4.5)])
def test_C11_bandwidth_bound_of_TPLA(g: int, bound: float) -> None:
    assert latent("heads", g).cache_bytes / tpla(g, g).cache_bytes == pytest.approx(bound)


def test_D4_cycles_a_token_on_H800() -> None:
    """D4: 34 cycles of the matrix unit for 64 heads, 50 to turn 512 bytes into bf16 (rates a clock and unit: FlashMLA)."""
    c = absorbed(K2, eight_bit=True, keys=M).cascade
    a_clock = H100.matrix_rate("bf16") / H100.units / H100.clock_hz
    assert round(attention_flops(c) / M / a_clock) == 34
    rate = {"i8→f16": 64, "f16→f32": 64, "f32→bf16": 16, "mul": 256}
    (score,) = [e for e in c.einsums if e.out.tensor == "QK"]
    (latents,) = [x for x in ex.walk(score.body) if x.op == "cast" and x.dtype == "bf16"]
    steps = [f"{x.args[0].dtype}→{x.dtype}" if x.op == "cast" else x.op for x in ex.walk(latents) if x.op in ("cast", "mul")]
    assert sorted(steps) == sorted(rate)
    assert 512 * sum(1 / rate[s] for s in steps) == pytest.approx(50)


# --- exchanges ------------------------------------------------------------------------------------------------------


def kinds(p: Placed, mesh: Mesh) -> list[tuple[str, float]]:
    return [(x.kind, x.sent(mesh.size(x.axis))) for x in exchanges(p, mesh, "decode")]


@given(tp=st.sampled_from([2, 4, 8, 16]), batch=st.integers(1, 64), keys=st.sampled_from([4096, M]))
def test_latents_dealt_by_tokens_send_what_does_not_grow_with_the_context(tp: int, batch: int, keys: int) -> None:
    """Queries gathered: h(dc+dr)w(P−1)/P; products and one fp32 number a row exchanged: h(dc·w+4)(P−1)/P, a sequence."""
    m, h, share = Mesh((Axis("tp", tp),)), 128, (tp - 1) / tp
    p = latent("merge", tp, keys=keys, batch=batch)
    found = kinds(p, m)
    assert [k for k, _ in found] == ["all-gather", "all-to-all", "all-reduce"]
    expected = [batch * h * 576 * 2 * share, batch * h * (512 * 2 + 4) * share, 2 * share * batch * 7168 * 2]
    assert [n for _, n in found] == pytest.approx(expected)


def test_head_parallel_TPLA_and_MLA_share_one_all_reduce() -> None:
    m = parse("tp=8")
    assert kinds(latent("heads", 8), m) == [("all-reduce", 2 * 7 / 8 * 7168 * 2)]
    p = tpla(8, 8)
    assert kinds(p, Mesh((Axis("slice", 8), Axis("tp", 1)))) == [("all-reduce", 2 * 7 / 8 * 7168 * 2)]


@pytest.mark.parametrize(("name", "limit"), [("h100", 34.4), ("h200", 24.0), ("b200", 28.8), ("a100", 37.7)])
@pytest.mark.parametrize("g", [2, 4])
def test_C14_heads_up_to_which_summed_scores_pay(name: str, limit: float, g: int) -> None:
    """C14: summing the scores of latent slices costs less than the cache it saves below so many heads; S and g cancel."""
    d = device(name)

    def grows(keys: int) -> tuple[float, float]:
        p = latent("summed scores", g, keys=keys)
        (scores,) = [x for x in p.exchanges if x.what == "partial sums of QK"]
        saved = latent("heads", g, keys=keys).cache_bytes - p.cache_bytes
        return scores.sent(g) / d.link_bytes_per_s, saved / d.dram_bytes_per_s

    (link, memory), (link2, memory2) = grows(M), grows(2 * M)
    assert 128 * (memory2 - memory) / (link2 - link) == pytest.approx(limit, abs=0.05)


@pytest.mark.parametrize(
    ("flops", "link", "tokens"),
    [(312e12, 300e9, 1040), (312e12, 12.5e9, 24960), (275e12, 268e9, 1026), (989.4e12, 450e9, 2199)],
    ids=["A100 NVLink", "A100 InfiniBand", "TPUv4", "H100"],
)
def test_C15_local_tokens_from_which_a_ring_hides(flops: float, link: float, tokens: int) -> None:
    d = replace(H100, matrix_flops_per_s={"bf16": flops}, link_bytes_per_s=link, model=IDEAL)
    m = parse("cp=8")
    n = 4096
    p = placed(way(heads(32, 32, p=8 * n, m=8 * n), "ring", m))
    assert hidden_from(p, n, m, d) == pytest.approx(tokens, rel=5e-4)


def test_ring_steps_carry_the_keys_and_values_of_a_neighbour() -> None:
    """W−1 steps of 2·(N/P)·h_kv·d·w bytes."""
    m = parse("cp=8")
    p = placed(way(heads(32, 8, p=65536, m=65536), "ring", m))
    (ring,) = exchanges(p, m, "prefill")
    assert (ring.kind, ring.payload) == ("ring", 2 * 65536 // 8 * 8 * 128 * 2)


def test_all_to_all_moves_queries_keys_values_and_the_output() -> None:
    """Ulysses: (2h + 2h_kv)(N/P)·d·w·(P−1)/P bytes in all."""
    m, n = parse("cp=8"), 65536
    p = placed(way(with_projection(heads(32, 8, p=n, m=n), ROLES), "all-to-all", m))
    found = exchanges(p, m, "prefill")
    assert [x.kind for x in found] == ["all-to-all", "all-to-all"]
    assert sum(x.sent(8) for x in found) == (2 * 32 + 2 * 8) * (n // 8) * 128 * 2 * 7 / 8


def test_C17_state_of_LASP_2() -> None:
    """C17: B1 H32 d128 bf16: 1 048 576 bytes, whatever the length and the number of devices."""
    how, who = Assignment((("i", "cp"),), (("i", "cp"),)), Roles(("b",), "h", "t", "s")
    for chunks, parts, decay in ((64, 8, False), (256, 16, True)):
        p = place(linear_chunks(chunks=chunks, decay=decay), who, how, {"cp": parts})
        (x,) = p.exchanges
        assert (x.kind, x.payload) == ("all-gather", 1_048_576)


def test_a_step_that_does_not_combine_is_refused() -> None:
    """A running maximum inside a product cannot be summed before its own device's turn."""
    b = Builder({"i": 8}, iterative=("i",))
    a, one, i = b.input("A", "i"), ex.const(1), ex.index("i")
    b.write("S", (9,), (ex.const(0),), ex.const(0.0))
    old = ex.load("S", (i,), "f32")
    b.write("S", (9,), (i + one,), ex.unary("tanh", old) + a)
    b.put("Z", "i", old * 2.0)
    how = Assignment((("i", "cp"),), (("i", "cp"),))
    with pytest.raises(Refused, match="no sum and no scaled sum: devices would wait in turn"):
        place(b.cascade("recurrence", "Z"), Roles((), "", "i", "m"), how, {"cp": 4})


def test_a_sum_over_all_keys_is_summed_over_devices() -> None:
    """Linear attention without a mask: one all-reduce of E × F, whatever the length."""
    c = papers.reassociated().with_sizes({"P": 1024, "M": 1024, "E": 64, "F": 32})
    how = Assignment((("p", "cp"), ("m", "cp")), (("p", "cp"), ("m", "cp")))
    (x,) = place(c, Roles((), "", "p", "m"), how, {"cp": 4}).exchanges
    assert (x.kind, x.payload) == ("all-reduce", 64 * 32 * 4)


def test_C19_cache_read_of_a_layer() -> None:
    """C19: 32k, one sequence: 11.27, 6.26 and 5.63 µs at 3.35 TB/s."""
    rate = H100.dram_bytes_per_s
    assert latent("heads", 2).cache_bytes / rate * 1e6 == pytest.approx(11.27, abs=0.005)
    assert tpla(2, 2).cache_bytes / rate * 1e6 == pytest.approx(6.26, abs=0.005)
    assert latent("merge", 2).cache_bytes / rate * 1e6 == pytest.approx(5.63, abs=0.005)


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [(papers.softmax, 1), (papers.sigmoid, 0), (papers.softmax_sink, 1), (papers.power, 1)],
    ids=["softmax", "sigmoid", "sink", "power"],
)
def test_numbers_that_a_row_sends(rule: papers.Rule, numbers: int) -> None:
    """A maximum and the sum it repairs are one log-sum-exp; a sigmoid's row is its product alone."""
    found = core(heads(4, 4, rule=rule))
    assert found is not None
    state = derive(found.view)
    assert isinstance(state, RowState)
    assert scalars(state) == numbers


def test_rows_that_do_not_merge_are_refused() -> None:
    c = heads(4, 4, p=1, m=64, rule=papers.sparsemax(2))
    with pytest.raises(Refused, match="the parts of a row do not merge: no one-pass form"):
        placed(way(c, "merge", "tp=4"))
    assert placed(way(c, "heads", "tp=4")).exchanges == ()


# --- causal balance -------------------------------------------------------------------------------------------------


def test_zigzag_is_even_and_contiguous_is_not() -> None:
    c = heads(8, 8, p=32768, m=32768, masked=True)
    ring, zigzag = (placed(way(c, n, "cp=8")) for n in ("ring", "ring zigzag"))
    assert zigzag.even == pytest.approx(1.0, abs=0.01)
    # D: the last of P devices has (2P − 1)/P of the mean
    assert ring.even == pytest.approx(15 / 8, abs=0.01)
    assert zigzag.exchanges == ring.exchanges
    assert ring.flops > 1.8 * zigzag.flops


def test_interleaved_keys_are_even_under_a_causal_mask() -> None:
    c = heads(8, 8, p=16384, m=16384, masked=True)
    assert placed(way(c, "merge", "tp=8")).even == pytest.approx(1.0, abs=0.1)


# --- time, memory, choice -------------------------------------------------------------------------------------------


def test_the_time_of_sharded_latents_is_the_formula() -> None:
    """G3: max(bytes/bandwidth, FLOP/rate) + h(P−1)/P(576·w + 512·w + 4)/link + 2(P−1)·α, beside what all ways share."""
    d = replace(H100, model=IDEAL)
    m, batch = parse("tp=8"), 32
    merge, plain = latent("merge", 8, batch=batch), latent("heads", 8, batch=batch)
    t, common = times(merge, m, d, "decode"), times(plain, m, d, "decode")
    sent = batch * 128 * 7 / 8 * (576 * 2 + 512 * 2 + 4)
    assert t.exposed - common.exposed == pytest.approx(sent / d.link_bytes_per_s)
    assert t.latency - common.latency == pytest.approx(2 * 7 * d.link_latency_seconds)
    assert t.memory == pytest.approx(merge.traffic / d.dram_bytes_per_s)
    assert t.matrix == pytest.approx(merge.flops / d.matrix_rate("bf16"))
    assert t.seconds == max(t.compute, t.memory) + t.exposed + t.latency


@given(x=st.sampled_from([0.5, 2.0, 8.0]), name=st.sampled_from(["heads", "merge", "summed scores"]), tp=st.sampled_from([2, 8, 16]))
def test_faster_rates_shorten_the_time_alike(x: float, name: str, tp: int) -> None:
    def at(factor: float) -> Device:
        return replace(
            H100, dram_bytes_per_s=H100.dram_bytes_per_s * factor, clock_hz=H100.clock_hz * factor,
            matrix_flops_per_s={k: v * factor for k, v in H100.matrix_flops_per_s.items()},
            link_bytes_per_s=H100.link_bytes_per_s * factor, network_bytes_per_s=H100.network_bytes_per_s * factor,
            link_latency_seconds=0.0, network_latency_seconds=0.0,
        )

    p, m = latent(name, tp), Mesh((Axis("tp", tp),))
    assert times(p, m, at(x)).seconds == pytest.approx(times(p, m, at(1.0)).seconds / x)


@given(keys=st.integers(1, 64), more=st.integers(1, 64), name=st.sampled_from(["heads", "merge", "TPLA 8 slices"]))
def test_longer_contexts_take_longer(keys: int, more: int, name: str) -> None:
    m = parse("tp=8")
    if name.startswith("TPLA"):
        m = m.split("tp", "slice", 8)
    short, long = (times(latent(name, 8, keys=n * 1024), m, H200, "decode").seconds for n in (keys, keys + more))
    assert short <= long


@given(tp=st.sampled_from([1, 2, 4, 8]))
def test_more_slices_hold_less(tp: int) -> None:
    held = [tpla(g, 8).cache_bytes for g in (1, 2, 4, 8)]
    assert held == sorted(held, reverse=True)
    one, mla = tpla(1, tp), latent("heads", tp)
    assert (one.cache_bytes, one.exchanges) == (mla.cache_bytes, mla.exchanges)
    assert one.flops == mla.flops


def test_TPLA_is_never_chosen_unasked() -> None:
    """Known wrong: TPLA counted as exact. It is refused by default and marked where it is admitted."""
    m = parse("tp=8")
    ways = {w.name: [(w, 61)] for w in latent_ways(V3, m, keys=M)}
    plan = rank_ways(ways, m, H100, step="decode")
    assert plan.best is not None
    assert plan.best.exact
    for s in plan.schemes:
        if s.name.startswith("TPLA"):
            assert (s.exact, s.feasible) == (False, False)
            assert "Policy(approximate=True) or --approximate admits it" in s.why
    asked = rank_ways(ways, m, H100, step="decode", approximate=True)
    assert asked.scheme("TPLA 2 slices").feasible
    assert not asked.scheme("TPLA 2 slices").exact


def test_sequence_sharding_wins_from_a_batch_on() -> None:
    """Two collectives' latency against the cache they save: heads at small B·S, the merge at large."""
    m = parse("tp=8")

    def best(batch: int) -> str:
        found = rank_ways(
            {w.name: [(w, 1)] for w in latent_ways(V3, m, keys=M, batch=batch)}, m, H200, step="decode"
        ).best
        assert found is not None
        return found.name

    assert (best(1), best(8)) == ("heads", "merge")


# What an 80 GB H800 takes for a step over 32k tokens with DeepSeek-V3 or Kimi-K2 without experts: 61 layers of attention,
# embeddings and head, the feed-forward of the first layers. Sources: the models' configs; TPLA, section 5 (1.79 and 1.93).
DENSE = {"V3": (V3, 129280, 3, 1.79), "K2": (K2, 163840, 1, 1.93)}


def dense_bytes(w: Widths, vocabulary: int, first: int) -> int:
    layer = 7168 * 1536 + 1536 * w.heads * 192 + 7168 * 576 + 512 * w.heads * 256 + w.heads * 128 * 7168
    return 2 * (61 * layer + 2 * vocabulary * 7168 + first * 3 * 7168 * 18432)


def tokens_per_s(name: str, w: Widths, weights: int, batch: int | None = None) -> tuple[float, int]:
    """Tokens a second at a batch (None: the largest that fits), every weight read once a step; and the batch."""
    h800, m = replace(H100, link_bytes_per_s=200e9), parse("tp=2")

    def at(n: int) -> tuple[MeshPlan, Way]:
        way = next(x for x in latent_ways(w, m, keys=M, batch=n) if x.name == name)
        return rank_ways({name: [(way, 61)]}, m, h800, step="decode", weights=weights, approximate=True), way

    n = batch or at(1)[0].scheme(name).batch(M)
    plan, way = at(n)
    s = plan.scheme(name)
    others = s.weight_bytes - 61 * sum(placed(way).weights.values())
    return n / (s.seconds + others / (h800.model.bandwidth_efficiency * h800.dram_bytes_per_s)), n


@pytest.mark.parametrize(("model", "predicted", "tolerance"), [("V3", 1.738, 0.03), ("K2", 1.756, 0.10)])
def test_C11_capacity_is_part_of_the_measured_gain(model: str, predicted: float, tolerance: float) -> None:
    """TPLA over MLA at the largest batch of each, nothing fitted: 2.9% below the 1.79 reported for V3, 9.0% below K2's 1.93.

    At equal batches reading the weights lowers the bound of 1.8; the batch that fits in memory lifts it again, to 1.8 and
    what rounding down a batch may add. 1.93 lies above even that, so that it holds more than bytes and room explain.
    """
    w, vocabulary, first, reported = DENSE[model]
    weights = dense_bytes(w, vocabulary, first)
    mla, few = tokens_per_s("heads", w, weights)
    tpla, many = tokens_per_s("TPLA 2 slices, heads behind", w, weights)
    equal, _ = tokens_per_s("TPLA 2 slices, heads behind", w, weights, few)
    assert equal / mla < 1.6 < tpla / mla <= many / few <= 1.8 * (few + 1) / few
    assert tpla / mla == pytest.approx(predicted, abs=2e-3)
    assert tpla / mla == pytest.approx(reported, rel=tolerance)
    if model == "K2":
        assert 1.8 * (few + 1) / few < reported


def test_TPLA_with_heads_behind_divides_the_output_weights() -> None:
    """The same cache; half the output's weights, for a reduce-scatter of what heads yield and a gather of queries."""
    m = parse("tp=2")
    ways = {x.name: x for x in latent_ways(V3, m, keys=M)}
    whole, dealt = (placed(ways[n]) for n in ("TPLA 2 slices", "TPLA 2 slices, heads behind"))
    assert whole.cache == dealt.cache
    assert whole.weights["WO"] == 2 * dealt.weights["WO"]
    assert [x.kind for x in whole.exchanges] == ["all-reduce"]
    sent = exchanges(dealt, ways["TPLA 2 slices"].mesh, "decode")
    assert sorted(x.kind for x in sent) == ["all-gather", "all-reduce", "reduce-scatter"]


@given(length=st.sampled_from([1024, 4096, M]), batch=st.integers(1, 8), weights=st.integers(0, 10**10))
def test_the_largest_batch_fits_and_one_more_does_not(length: int, batch: int, weights: int) -> None:
    cache = batch * 1152 * M * 61
    m = DeviceMemory(weights, cache, batch * 4096, per_key=False)
    n = largest_batch(m, 80e9, batch, M, length)
    one = cache / batch * length / M + 4096
    assert weights + n * one <= m.room(80e9) < weights + (n + 1) * one
    assert largest_batch(replace(m, weights=10**12), 80e9, batch, M, length) == 0


def test_what_does_not_fit_says_how_much_it_needs() -> None:
    plan = shard([ShardedSite("x", heads(64, 8, p=1, m=131072, b=64), 80)], parse("tp=2"), H100)
    assert plan.best is None
    assert all(" GB of the 72.0 GB that h100 has for it" in s.why for s in plan.schemes if s.parts)


def test_training_counts_both_directions() -> None:
    """Forward two products, backward five; keys, values and their gradients travel; every layer's operands are kept."""
    m, n = parse("cp=8"), 8192
    c = heads(16, 16, p=n, m=n)
    p = placed(way(c, "ring", m))
    assert p.backward.flops == 2.5 * p.flops
    there, back = exchanges(p, m, "training")
    assert (there.kind, back.kind, back.payload) == ("ring", "ring", 2 * there.payload)
    serving, training = (scheme([(way(c, "ring", m), 10)], H200, step=s) for s in ("prefill", "training"))
    assert training.seconds > 2.5 * serving.seconds
    assert training.activation_bytes == 10 * (serving.cache_bytes // 10 + serving.activation_bytes)
    linear = linear_chunks()
    how = Assignment((("i", "cp"),), (("i", "cp"),))
    q = place(linear, Roles(("b",), "h", "t", "s"), how, {"cp": 8})
    assert [x.sent(8) for x in exchanges(q, m, "training")] == [7 * 2**20, 7 * 2**20]


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefill() -> MeshPlan:
    return shard([ShardedSite("model.layers.0.self_attn", heads(32, 8, p=M, m=M, masked=True), 32)], parse("tp=16"), H200)


def test_a_plan_ranks_all_ways_and_says_why(prefill: MeshPlan) -> None:
    assert prefill.step == "prefill"
    assert prefill.best is not None
    able = [s for s in prefill.schemes if s.feasible]
    assert [s.seconds for s in able] == sorted(s.seconds for s in able)
    assert "bound by" in prefill.best.why
    assert all("× the time: more for" in s.why or "as fast as" in s.why for s in able[1:])
    assert "8 key heads of K do not divide over 16 devices" in prefill.scheme("all-to-all").why
    assert "every key lies on 2 devices" in prefill.scheme("heads").why
    for s in able:
        assert s.seconds == pytest.approx(
            max(s.parts["compute"], s.parts["memory"]) + s.parts["exposed"] + s.parts["latency"]
        )
    text = str(prefill)
    assert "sharded over tp=16 (16 h200), prefill" in text
    assert all(s.name in text for s in prefill.schemes)


def test_a_plan_survives_its_dictionary(prefill: MeshPlan) -> None:
    assert MeshPlan.from_dict(prefill.to_dict()) == prefill
    with pytest.raises(ValueError, match="schema 99, newer than 1"):
        MeshPlan.from_dict(prefill.to_dict() | {"schema": 99})


def test_decoding_divides_no_query() -> None:
    plan = shard([ShardedSite("x", heads(32, 8, b=4), 2)], parse("cp=8"), H200)
    assert plan.step == "decode"
    assert "1 query token does not divide over 8 devices" in plan.scheme("ring").why
    assert plan.best is not None
    assert plan.best.name == "merge"


def test_two_axes_carry_heads_and_the_sequence() -> None:
    plan = shard([ShardedSite("x", heads(32, 8, p=M, m=M, masked=True), 1)], parse("tp=4,cp=4"), H200)
    assert plan.best is not None
    assert {s.name.split(" × ")[0] for s in plan.schemes} == {"heads"}
    both = plan.scheme("heads × ring zigzag")
    assert {x.axis for x in both.exchanges} == {"tp", "cp"}
    assert both.cache_bytes == M * 2 * 8 * 128 * 2 // 16


def test_the_batch_is_carried_by_dp() -> None:
    plan = shard([ShardedSite("x", heads(8, 8, b=4, m=4096), 1)], parse("dp=4"), H200)
    assert plan.best is not None
    assert (plan.best.name, plan.best.sent_bytes) == ("batch", 0)
    assert plan.best.cache_bytes == 4096 * 4096


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("tp=6", "mesh tp=6 does not divide the 32 query heads of x: use tp=1, 2, 4, 8, 16 or 32, or cp, which cuts the sequence"),
        ("dp=3", "mesh dp=3 does not divide a batch of 1: use a --batch that is a multiple of 3, or dp=1"),
    ],
)
def test_a_mesh_that_does_not_divide_says_what_would(mesh: str, sentence: str) -> None:
    with pytest.raises(MeshError, match=sentence):
        shard([ShardedSite("x", heads(32, 8), 1)], parse(mesh), H200)


@pytest.mark.parametrize(("h", "kv", "p"), [(8, 8, 64), (8, 2, 64), (8, 1, 64), (8, 1, 1), (8, 2, 1)])
def test_roles_are_read_off_the_cascade(h: int, kv: int, p: int) -> None:
    assert roles(heads(h, kv, p=p, m=64)) == ROLES


def test_the_projection_joins_the_heads() -> None:
    c = with_projection(heads(8, 2, p=4, m=16, d=32), ROLES)
    assert str(c.einsums[-1]) == "Y[b,p,d] = Σ_h,f O[b,h,p,f] · WO[h,f,d]"
    assert c.tensor["WO"].shape == (8, 32, 256)


def test_one_device_sends_nothing() -> None:
    for name, how in assignments(ROLES, parse("tp=1")):
        assert place(heads(8, 2, p=64, m=64), ROLES, how, {"tp": 1}).exchanges == (), name


@pytest.mark.parametrize("keys", [512, 128, 64])
def test_sizes_that_agree_by_chance_change_nothing(keys: int) -> None:
    """As many keys as latent, value or rotary channels: the attention inside is still the one over keys."""
    c = absorbed(queries=1024, keys=keys).cascade
    found = core(c, "m")
    assert found is not None
    assert (found.view.key, found.output) == ("m", "OL")


def test_operands_stacked_in_one_tensor_are_told_apart() -> None:
    """GPT-2 and BLOOM project queries, keys and values into one tensor; a bias over keys is no cache."""
    b = Builder({"b": 2, "h": 4, "p": 64, "m": 64, "e": 16, "f": 16})
    at = {r: ex.index(r) for r in "bhpmef"}

    def part(k: int, token: str, channel: str) -> Expr:
        return b.given("QKV", (2, 64, 4, 3, 16), (at["b"], at[token], at["h"], ex.const(k), at[channel]), "bf16")

    qk = b.put("QK", "bhpm", part(0, "p", "e") * part(1, "m", "e"), "add", "e")
    a = papers.softmax(b, b.put("S", "bhpm", qk + b.input("bias", "hm", "bf16")))
    b.put("O", "bhpf", a * part(2, "m", "f"), "add", "m")
    c = b.cascade("stacked", "O")
    p = head_parallel(c, 2)
    assert p.cache_bytes == 2 * (2 * 64 * 2 * 16) * 2
    ring = placed(way(c, "ring", "cp=4"))
    assert ring.cache_bytes == 2 * (2 * 16 * 4 * 16) * 2
    (x,) = exchanges(ring, parse("cp=4"), "prefill")
    assert x.payload == ring.cache_bytes + 4 * 16 * 2


def test_a_ragged_sequence_is_padded_and_heads_are_not() -> None:
    c = with_projection(heads(8, 8, p=17, m=17), ROLES)
    assert len(placed(way(c, "all-to-all", "cp=4")).exchanges) == 4
    with pytest.raises(Refused, match="6 query heads do not divide over 4 devices"):
        placed(way(heads(6, 6, p=17, m=17), "all-to-all", "cp=4"))
