"""Meshes and collectives: text, nodes, bytes and seconds of every exchange."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.devices.device import device
from reattend.cost_model.mesh.collectives import KINDS, Collective, backward, packed
from reattend.cost_model.mesh.mesh import Axis, Link, Mesh, MeshError, Route, linked, mesh, parse

H100 = device("h100")


def alone(parts: int, rate: float = 1e9, latency: float = 0.0) -> Route:
    return Route(parts, 1, Link(rate, latency), Link(rate, latency))


def test_text_and_mesh_are_the_same() -> None:
    m = parse("tp=8, cp=2")
    assert m == Mesh((Axis("tp", 8), Axis("cp", 2)))
    assert (m.devices, m.size("tp"), m.size("dp"), str(m)) == (16, 8, 1, "tp=8,cp=2")
    assert mesh(str(m)) == mesh(m) == m


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tp8", "mesh 'tp8' is malformed at 'tp8': write axis=size, as tp=8 or tp=8,cp=2"),
        ("tp=8,", "malformed at ''"),
        ("tp=-2", "malformed"),
        ("", "malformed"),
        ("ep=4", r"mesh axis 'ep' is not known: use tp \(heads and latents\), cp \(the sequence\), dp \(the batch\)"),
        ("tp=2,tp=4", "mesh axis tp stands twice"),
        ("tp=0", "mesh axis tp=0 has no device"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(MeshError, match=sentence) as no:
        parse(text)
    assert "\n" not in str(no.value)


def test_a_device_without_links_names_those_that_have() -> None:
    with pytest.raises(MeshError, match=r"cpu has no link to other devices: .*a100, b200, b300") as no:
        linked(device("cpu"))
    assert "cpu" not in str(no.value).split("(")[1]


def test_axes_fill_nodes_from_the_first() -> None:
    m = parse("tp=8,cp=4")
    assert (m.route("tp", H100).inner, m.route("tp", H100).outer) == (8, 1)
    assert (m.route("cp", H100).inner, m.route("cp", H100).outer) == (1, 4)
    both = parse("tp=4,cp=4").route("cp", H100)
    assert (both.inner, both.outer, both.slowest.bytes_per_s) == (2, 2, H100.network_bytes_per_s)
    assert parse("tp=16").route("tp", H100).outer == 2


def test_an_axis_splits() -> None:
    assert str(parse("tp=8").split("tp", "slice", 2)) == "slice=2,tp=4"
    with pytest.raises(MeshError, match="tp=8 has no part of 3"):
        parse("tp=8").split("tp", "slice", 3)


@given(parts=st.integers(2, 64), n=st.integers(1, 10**9))
def test_seconds_are_the_closed_forms(parts: int, n: int) -> None:
    """The ring formulas with α and β, one node."""
    r, a, b = alone(parts, 2e9, 3e-6), 3e-6, 2e9
    p = parts
    expected = {
        "all-reduce": 2 * (p - 1) * (a + n / (p * b)), "all-gather": (p - 1) * (a + n / b),
        "reduce-scatter": (p - 1) * (a + n / (p * b)), "all-to-all": (p - 1) / p * n / b + (p - 1) * a,
        "ring": (p - 1) * (a + n / b),
    }
    for kind in KINDS:
        x = Collective(kind, "tp", n, "")
        assert x.transfer(r) + x.latency(r) == pytest.approx(expected[kind])
        assert x.sent(p) == pytest.approx(x.transfer(r) * b)


@given(kind=st.sampled_from(KINDS), n=st.integers(1, 10**9))
def test_one_device_sends_nothing(kind: str, n: int) -> None:
    x = Collective(kind, "tp", n, "")
    assert x.sent(1) == x.transfer(alone(1)) == x.latency(alone(1)) == 0


@given(kind=st.sampled_from(KINDS), inner=st.sampled_from([1, 2, 4, 8]), outer=st.integers(2, 4))
def test_nodes_joined_by_an_equal_link_move_no_more_than_a_ring(kind: str, inner: int, outer: int) -> None:
    link = Link(1e9, 0.0)
    x = Collective(kind, "tp", 10**6, "")
    assert x.transfer(Route(inner, outer, link, link)) <= x.transfer(alone(inner * outer)) * (1 + 1e-12)
    slow = Route(inner, outer, link, Link(1e8, 0.0))
    assert x.transfer(slow) >= x.transfer(Route(inner, outer, link, link))


def test_a_ring_hides_behind_computing() -> None:
    x, r = Collective("ring", "cp", 10**6, ""), alone(4, 1e9, 1e-5)
    step = 1e-3 + 1e-5
    assert x.exposed(r) + x.waits(r) == pytest.approx(3 * step)
    assert x.exposed(r, step) + x.waits(r, step) == pytest.approx(0)
    assert x.exposed(r, step / 2) + x.waits(r, step / 2) == pytest.approx(1.5 * step)
    assert Collective("all-gather", "cp", 10**6, "").exposed(r, 1.0) == pytest.approx(3e-3)


def test_messages_of_one_kind_are_packed() -> None:
    k, v = Collective("ring", "cp", 10, "K"), Collective("ring", "cp", 20, "V")
    after = Collective("ring", "cp", 5, "O", after=True)
    assert [(x.payload, x.what) for x in packed([k, v, after])] == [(30, "K; V"), (5, "O")]


def test_gradients_send_the_transpose() -> None:
    gather = Collective("all-gather", "tp", 10, "q")
    there = backward(gather, 4)
    assert (there.kind, there.payload, there.sent(4)) == ("reduce-scatter", 40, gather.sent(4))
    assert backward(Collective("ring", "cp", 10, ""), 4).payload == 20
    assert backward(Collective("all-to-all", "cp", 10, ""), 4).payload == 10


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(ValueError, match="one of all-gather, all-reduce"):
        Collective("broadcast", "tp", 1, "")


def test_link_figures_have_sources() -> None:
    for name in ("a100", "h100", "h200", "b200", "mi300x"):
        d = device(name)
        for field in ("link_bytes_per_s", "link_devices", "network_bytes_per_s", "network_latency_seconds"):
            assert d.sources[field], (name, field)
