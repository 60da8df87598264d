"""The fused body's time model: what it counts, where it may be printed, and that it is tried on a CPU alone."""

from dataclasses import replace

import pytest

from reattend.cost_model.count.subject import Subject, subject
from reattend.cost_model.devices.device import Device, alone, shipped, with_threads
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.fit import candidates
from reattend.cost_model.time.fused import fits
from reattend.cost_model.time.predict import predict, ranked_mappings
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Obstacle

P, M = ex.index("p"), ex.index("m")
HERE = with_threads(alone(shipped("cpu")), 1)
FUSED = TileMapping(128, 64, warps=1, stages=1, body="fused")


def attention(mask: str = "none", cap: bool = False, e: int = 64, group: int = 1, dtype: str = "f32") -> Cascade:
    b = papers.Builder({"b": 1, "h": 8, "e": e, "f": e, "m": papers.size("P")})
    q = b.input("Q", "bhpe", dtype)
    at, shape = (ex.index("b"), ex.index("h") // group, M), (1, 8 // group, papers.size("P"), e)
    k, v = b.given("K", shape, (*at, ex.index("e")), dtype), b.given("V", shape, (*at, ex.index("f")), dtype)
    s = b.put("QK", "bhpm", q * k, "add", "e") * 0.125
    s = ex.unary("tanh", s / 30.0) * 30.0 if cap else s
    kept = {"causal": M <= P, "window": (M <= P) & (P - M < 200)}.get(mask)
    s = b.put("S", "bhpm", s if kept is None else ex.where(kept, s, -3e38))
    b.put("O", "bhpf", b.put("A", "bhpm", papers.softmax(b, s)) * v, "add", "m")
    return b.cascade(mask, "O")


def cost(c: Cascade, n: int = 2048, mapping: TileMapping = FUSED, d: Device = HERE) -> Cost:
    found = predict(c, mapping, d, {"P": n})
    assert isinstance(found, Cost), found
    return found


def test_masked_tiles_take_no_time() -> None:
    whole, causal, window = (cost(attention(m)).seconds for m in ("none", "causal", "window"))
    assert 0.5 * whole < causal < 0.6 * whole
    assert window < 0.25 * whole


def test_products_and_programs_are_counted() -> None:
    plain, capped, wide = cost(attention()), cost(attention(cap=True)), cost(attention(e=128))
    assert capped.parts["exp"] > 1.5 * plain.parts["exp"]
    assert capped.parts["matrix"] == plain.parts["matrix"]
    assert wide.parts["matrix"] == pytest.approx(2 * plain.parts["matrix"])
    assert plain.flops == 2 * 8 * 2048 * 2048 * 128


@pytest.mark.parametrize(("dtype", "head", "padded"), [("f32", 72, 80), ("bf16", 72, 96), ("bf16", 40, 64)])
def test_head_sizes_are_padded(dtype: str, head: int, padded: int) -> None:
    given, full = (cost(attention(e=e, dtype=dtype)).parts["matrix"] for e in (head, padded))
    assert given == pytest.approx(full)


def test_rows_are_padded_to_blocks() -> None:
    assert cost(attention(), 130).parts["matrix"] < 0.7 * cost(attention(), 256).parts["matrix"]


def test_keys_are_laid_out_once_for_the_heads_that_share_them() -> None:
    assert cost(attention(group=4), 256).parts["element"] == pytest.approx(0.5 * cost(attention(), 256).parts["element"])


def test_threads_share_the_units() -> None:
    one, two = (cost(attention(), d=with_threads(alone(shipped("cpu")), n)).seconds for n in (1, 2))
    assert 1.6 < one / two <= 2.0


def test_long_masks_are_planned_quickly_and_exactly() -> None:
    near, far = (cost(attention("window"), n).seconds for n in (50_000, 200_000))
    assert far == pytest.approx(4 * near, rel=0.02)


def known(c: Cascade) -> Subject:
    s = subject(c)
    assert isinstance(s, Subject)
    return s


def test_where_it_may_be_printed() -> None:
    assert fits(known(attention()))
    assert fits(known(attention(dtype="f16")))
    assert not fits(known(attention(dtype="f64")))
    # head sizes that are symbols
    assert not fits(known(papers.attention("full", papers.softmax)))


def test_it_is_tried_on_a_cpu_with_enough_queries() -> None:
    bodies = {n: {m.body for m in candidates(HERE, e=64, f=64, width=4, queries=n, keys=512)} for n in (1, 15, 16, 512)}
    assert ["fused" in bodies[n] for n in (1, 15, 16, 512)] == [False, False, True, True]
    found = ranked_mappings(attention("window"), HERE, {"P": 2048})
    assert isinstance(found, tuple)
    assert {m.body for m, _ in found} == {"fused", "sdpa", "slices", "product"}
    assert all(m.body == "triton" for m in candidates(shipped("h200"), e=64, f=64, width=2, queries=512, keys=512))


def test_a_faster_machine_is_faster_by_as_much() -> None:
    h = HERE.host
    assert h is not None
    half = {t: x / 2 for t, x in h.fused_multiply_seconds.items()}
    quick = replace(HERE, host=replace(h, fused_multiply_seconds=half))
    assert cost(attention(), d=quick).parts["matrix"] == pytest.approx(cost(attention()).parts["matrix"] / 2)


def test_the_backward_computes_in_float32() -> None:
    """Where the forward has a matrix unit."""

    def trained(dtype: str) -> Cost:
        found = ranked_mappings(attention("causal", dtype=dtype), HERE, {"P": 2048}, wanted=("Q", "K", "V"))
        assert not isinstance(found, Obstacle)
        return next(c for m, c in found if m.body == "fused")

    wide, short = trained("f32"), trained("bf16")
    assert short.forward < 0.6 * wide.forward
    assert short.backward > 0.9 * wide.backward
