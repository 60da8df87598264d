"""What runs around a kernel is in its time: products before it, operands that are copied, elements that are fetched."""

from __future__ import annotations

import pytest

from reattend.cost_model.devices.device import Device, alone, shipped, with_threads
from reattend.cost_model.time.cost import Cost
from reattend.cost_model.time.predict import VendorUse, predict, predict_vendor
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.expr import Expr
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping

HERE = with_threads(alone(shipped("cpu")), 1)
B, H, N, E = 1, 4, 512, 64
P, M = ex.index("p"), ex.index("m")
BODIES = [TileMapping(128, 64, warps=1, stages=1, body=b) for b in ("fused", "sdpa", "product")]


def attention(plane: bool = False, at: Expr | None = None, keys: str = "bhme") -> Cascade:
    """Softmax of QK, plus a plane Q·R read at `at` where there is one."""
    b = papers.Builder({"b": B, "h": H, "p": N, "m": N, "e": E, "f": E, "r": 2 * N})
    s = b.put("QK", "bhpm", b.input("Q", "bhpe") * b.input("K", keys), "add", "e")
    if plane or at is not None:
        b.put("C", "bhpr", b.input("Q", "bhpe") * b.input("R", "hre"), "add", "e")
        where = at if at is not None else M - P + (N - 1)
        s = s + ex.load("C", (*(ex.index(r) for r in "bhp"), where), "f32")
    b.put("O", "bhpf", b.put("A", "bhpm", papers.softmax(b, s * 0.125)) * b.input("V", "bhmf"), "add", "m")
    return b.cascade("one", "O")


def ours(c: Cascade, mapping: TileMapping, d: Device = HERE) -> Cost:
    found = predict(c, mapping, d)
    assert isinstance(found, Cost), found
    return found


def sdpa(c: Cascade, d: Device, mask: bool) -> Cost:
    found = predict_vendor(c, VendorUse("flash", mask_elements=B * H * N * N if mask else 0, mask_dtype="f32"), d)
    assert isinstance(found, Cost), found
    return found


@pytest.mark.parametrize("mapping", BODIES, ids=lambda m: m.body)
def test_a_product_before_our_kernel_is_counted(mapping: TileMapping) -> None:
    plain, more = ours(attention(), mapping), ours(attention(plane=True), mapping)
    product = 2 * B * H * N * 2 * N * E
    assert more.flops - plain.flops == product
    assert more.parts["matrix"] - plain.parts["matrix"] > 0.9 * product / HERE.matrix_rate("f32")


def test_a_product_before_a_vendors_kernel_is_counted() -> None:
    product = 2 * B * H * N * 2 * N * E
    for d in (HERE, shipped("h200")):
        plain, more = sdpa(attention(), d, False), sdpa(attention(plane=True), d, True)
        assert more.flops - plain.flops == product
        assert more.seconds > plain.seconds


def test_so_it_is_on_a_gpu() -> None:
    d, mapping = shipped("h200"), TileMapping(64, 32, warps=8, stages=2)
    plain, more = ours(attention(), mapping, d), ours(attention(plane=True), mapping, d)
    assert more.seconds > plain.seconds + d.model.launch_seconds


@pytest.mark.parametrize("mapping", BODIES, ids=lambda m: m.body)
def test_elements_that_are_fetched_singly_cost_more_than_a_stream(mapping: TileMapping) -> None:
    """An index of data or of products of coordinates has no stride."""
    near, far = (ours(attention(at=at), mapping) for at in (M - P + (N - 1), (M * P) % (2 * N)))
    assert HERE.host is not None
    assert far.seconds > near.seconds + (0.9 * B * H * N * N * HERE.host.fused_gather_seconds if mapping.body == "fused" else 0)


@pytest.mark.parametrize("mapping", BODIES, ids=lambda m: m.body)
def test_keys_whose_elements_lie_apart_are_copied(mapping: TileMapping) -> None:
    """Channel attention: the elements of a key lie a whole row apart."""
    assert HERE.host is not None
    rows, columns = (ours(attention(keys=k), mapping) for k in ("bhme", "bhem"))
    assert columns.seconds - rows.seconds > 0.9 * B * H * N * E * HERE.host.transpose_seconds
