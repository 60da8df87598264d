"""Doors without a library: callables taken apart, masks by positions, calls captured without Dynamo, kinds of calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reattend.rewriter.capture.call import from_call, sizes_of
from reattend.rewriter.capture.capture import CaptureError
from reattend.rewriter.check import verdicts
from reattend.rewriter.choose.policy import Policy, StrictError
from reattend.rewriter.doors import site
from reattend.rewriter.doors.book import layer_of, passed
from reattend.rewriter.doors.callables import Opaque, OpenNumber, standing_for, structure
from reattend.rewriter.doors.mask import PositionMask, Positions, added, not_pointwise
from reattend.rewriter.doors.reads import Reads, Seen
from reattend.rewriter.doors.site import Door, DoorCall

pytestmark = pytest.mark.thin(2)

OURS = Policy(allow="reattend", deny="original")
CPU = torch.device("cpu")
TABLE = torch.tensor([0, 0, 1, 1, 2])


def window(size: int) -> Callable[..., Any]:
    return lambda b, h, q, k: (k <= q) & (k > q - size)


def padding(keep: Tensor) -> Callable[..., Any]:
    return lambda b, h, q, k: keep[b, k]


def both(*masks: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *at: functools.reduce(torch.logical_and, [m(*at) for m in masks])


def segments(b: Any, h: Any, q: Any, k: Any) -> Any:
    return TABLE[q] == TABLE[k]


def here() -> tuple[Tensor, ...]:
    b, h, q, k = (torch.arange(n) for n in (2, 1, 5, 5))
    return b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], k[None, None, None, :]


# --- callables ------------------------------------------------------------------------------------------------------


def test_equal_callables_have_equal_keys_and_data_is_a_leaf() -> None:
    one, other = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    a, b = structure(both(window(3), padding(one))), structure(both(window(3), padding(other)))
    assert a.key == b.key
    assert hash(a.key) == hash(b.key)
    assert a.leaves == (one,)
    assert standing_for(a.key) is standing_for(b.key)
    assert structure(both(window(4), padding(one))).key != a.key
    assert standing_for(structure(both(window(4), padding(one))).key) != standing_for(a.key)
    assert structure(both(padding(one), window(3))).key != a.key


def test_a_callable_is_made_anew_with_other_leaves() -> None:
    keep = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    taken = structure(both(window(2), padding(keep)))
    assert torch.equal(taken.make([~keep])(*here()), both(window(2), padding(~keep))(*here()))
    assert torch.equal(taken.make(taken.leaves)(*here()), both(window(2), padding(keep))(*here()))


def test_what_a_callable_reads_of_its_module_is_seen() -> None:
    taken = structure(segments)
    assert taken.leaves[0] is TABLE
    other = torch.arange(5)
    assert torch.equal(taken.make([other])(*here())[0, 0], torch.eye(5, dtype=torch.bool))


def test_open_numbers_are_leaves_and_others_are_not() -> None:
    assert structure(window(OpenNumber(7))).leaves == (7,)
    assert structure(window(OpenNumber(7))).key == structure(window(OpenNumber(9))).key
    assert structure(functools.partial(window, 3)).key != structure(functools.partial(window, 4)).key


class Stateful:
    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return k <= q

    def method(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return k <= q


def endless(b: Any, h: Any, q: Any, k: Any) -> Any:
    return endless(b, h, q, k)


def importing(b: Any, h: Any, q: Any, k: Any) -> Any:
    import math

    return k <= q + math.pi


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (Stateful(), "it reads a Stateful"),
        (Stateful().method, "it reads a method"),
        (padding(torch.ones(2, 5, requires_grad=True)), "a tensor that wants a gradient"),
        (importing, "imports"),
        (both(window({1: 2}[1]), lambda *at, known={1: 2}: True), "it reads a dict"),
    ],
    ids=["object", "method", "gradient", "import", "dict"],
)
def test_what_cannot_be_seen_through_is_said(function: Callable[..., Any], why: str) -> None:
    with pytest.raises(Opaque, match=why):
        structure(function)


# --- masks ----------------------------------------------------------------------------------------------------------


def positions(function: Callable[..., Any], queries: int = 5, keys: int = 5, past: int = 0, **more: Any) -> Positions:
    def dense() -> Tensor:
        b, h, q, k = (torch.arange(n) for n in (2, 1, queries, keys))
        at = b[:, None, None, None], h[None, :, None, None], q[None, None, :, None] + past, k[None, None, None, :]
        return added(function(*at).expand(2, -1, queries, keys), torch.float32)

    given = {"pointwise": True, **more}
    return Positions(2, queries, keys, past, 0, function, torch.float32, CPU, make=dense, **given)


@pytest.mark.parametrize(("queries", "keys", "past"), [(5, 5, 0), (1, 8, 7), (3, 8, 5), (3, 8, 2)])
def test_a_mask_of_its_leaves_is_the_dense_one(queries: int, keys: int, past: int) -> None:
    keep = torch.rand(2, 8) > 0.3
    at = positions(both(window(3), padding(keep)), queries, keys, past)
    made = at.reading(torch.empty(2, 4, queries, 1), torch.empty(2, 4, keys, 1), at.leaves)
    assert torch.equal(made, at.dense)
    assert at.ends_together == (past + queries == keys)


def test_a_mask_is_made_only_where_it_is_read() -> None:
    at = positions(window(3))
    mask = PositionMask.of(at)
    assert mask.shape == (2, 1, 5, 5)
    assert mask.dtype == torch.float32
    assert mask.contiguous() is mask
    assert "dense" not in vars(at)
    assert torch.equal(mask[:, :, :2], at.dense[:, :, :2])
    assert torch.equal(torch.zeros(5) + mask, at.dense)


def test_single_positions_and_ranges_are_told_apart() -> None:
    keep = torch.ones(2, 5, dtype=torch.bool)
    assert not not_pointwise(structure(both(window(3), padding(keep))), CPU)
    # a row of a table, which a range would make a matrix
    assert "index" in not_pointwise(structure(lambda b, h, q, k: keep[b][k]), CPU)
    assert "sum" in not_pointwise(structure(lambda b, h, q, k: q.sum() >= k), CPU)
    assert "cannot be given ranges" in not_pointwise(structure(lambda b, h, q, k: k if q > 0 else q), CPU)
    assert isinstance(positions(lambda b, h, q, k: q.sum() >= k, pointwise=False).lifted, str)


# --- what a function reads of its module ------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups, self.inner = groups, nn.Linear(2, 2)
        self.sinks = nn.Parameter(torch.ones(3))
        self.config = type("Config", (), {"cap": 5.0})()

    def doubled(self) -> int:
        return 2 * self.groups


def test_reads_are_noted_and_held_against_other_modules() -> None:
    reads, given = Reads(), torch.zeros(3)
    seen: Any = Seen(Holder(), {"sinks": given}, reads)
    assert seen.sinks is given
    assert (seen.doubled(), seen.config.cap, hasattr(seen, "missing"), seen.training) == (4, 5.0, False, True)
    assert set(reads.noted) == {"doubled.__func__", "groups", "config.cap", "missing", "training"}
    assert reads.hold(Holder())
    assert not reads.hold(Holder(3))
    assert not reads.hold(Holder().eval())
    changed = Holder()
    changed.config.cap = 6.0
    assert not reads.hold(changed)
    with pytest.raises(Opaque, match="inner"):
        _ = seen.inner
    with pytest.raises(Opaque, match="writes"):
        seen.groups = 3


# --- captured calls ---------------------------------------------------------------------------------------------------


def scores(q: Tensor, k: Tensor, past: int) -> Tensor:
    at = torch.arange(q.shape[-2])[:, None] + past
    return (q @ k.mT).masked_fill(torch.arange(k.shape[-2]) > at, -1.0)


def test_a_call_is_captured_with_the_sizes_that_are_opened() -> None:
    q, k = torch.randn(2, 3, 4), torch.randn(2, 7, 4)
    call = from_call(scores, (q, k, 4), {(0, 1), (1, 1), (2, -1)})
    assert call.opened == {(0, 1), (1, 1), (2, -1)}
    longer = torch.randn(2, 3, 4), torch.randn(2, 6, 4), 5
    assert call.holds(longer, sizes_of(longer))
    assert torch.equal(call.captured.graph(*call.arguments(longer)), scores(*longer))
    for other in [
        (torch.randn(3, 3, 4), torch.randn(3, 7, 4), 4), (q, torch.randn(2, 40, 4), 4), (q, k.mT.contiguous().mT, 4),
        (torch.randn(2, 1, 4), k, 4), (q[:, ::2], k, 4),
    ]:
        assert not call.holds(other, sizes_of(other))


def test_without_open_sizes_a_call_holds_for_its_own_only() -> None:
    given = torch.randn(2, 3, 4), torch.randn(2, 7, 4), 4
    call = from_call(scores, given)
    assert call.holds(given, sizes_of(given))
    assert len(call.arguments(given)) == 2
    other = given[0], given[1], 5
    assert not call.holds(other, sizes_of(other))


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 3


OUTSIDE = torch.ones(4)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda q: q * OUTSIDE, "a tensor that it is not given"),
        (Own.apply, "a backward of its own"),
        (lambda q: q if q.sum() > 0 else -q, "DataDependent"),
    ],
    ids=["constant", "backward", "branch"],
)
def test_what_no_graph_can_hold_is_said(function: Callable[..., Tensor], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        from_call(function, (torch.randn(3, 4, requires_grad=True),))


# --- sites ------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    scale = 0.5


def attend(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.arange(k.shape[-2]) <= torch.arange(q.shape[-2])[:, None]
    out: Tensor = ((q @ k.mT) * layer.scale).masked_fill(~keep, -1e9).softmax(-1) @ v
    return out


def call_of(layer: nn.Module, values: Sequence[Tensor], function: Callable[..., Tensor] = attend) -> DoorCall:
    def code(layer: nn.Module, reads: Reads) -> Callable[..., Tensor]:
        return lambda *given: function(Seen(layer, {}, reads), *given)

    return DoorCall(layer, lambda: "here:1", function, values, code)


def operands(length: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    q, k, v = torch.randn(3, batch, 4, length, 16).to(dtype)
    return q, k, v


def test_layers_share_captures_and_have_watches_of_their_own() -> None:
    door, one, two = Door(OURS), Layer(), Layer()
    given = operands(24)
    for layer in (one, two, one):
        out = layer_of(layer).run(call_of(layer, given), door)
        assert out is not None
        assert torch.allclose(out, attend(layer, *given), atol=1e-6)
    first, second = passed(one).pieces, passed(two).pieces
    assert (first[0].calls, second[0].calls) == (2, 1)
    assert first[0].capture_seconds > 0 == second[0].capture_seconds
    assert [c.verdict for p in (*first, *second) for c in p.checks] == ["same", "same"]


def test_what_was_read_of_a_layer_is_a_guard() -> None:
    door, layer, given = Door(OURS), Layer(), operands(20)
    layer_of(layer).run(call_of(layer, given), door)
    layer.scale = 0.25
    out = layer_of(layer).run(call_of(layer, given), door)
    assert out is not None
    assert torch.allclose(out, attend(layer, *given), atol=1e-6)
    assert len(passed(layer).pieces) == 2


def test_sizes_that_change_are_open_from_then_on() -> None:
    door, layer = Door(OURS), Layer()
    for length in (33, 41, 47, 50, 62):
        given = operands(length)
        out = layer_of(layer).run(call_of(layer, given), door)
        assert out is not None
        assert torch.allclose(out, attend(layer, *given), atol=1e-6)
    assert [p.calls for p in passed(layer).pieces] == [1, 4]


@pytest.mark.parametrize("change", ["type", "gradient", "batch", "autocast"])
def test_every_kind_of_call_is_one_of_its_own(change: str) -> None:
    door, layer = Door(OURS), Layer()
    given = operands(24)
    layer_of(layer).run(call_of(layer, given), door)
    if change == "type":
        given = operands(24, dtype=torch.float64)
    elif change == "batch":
        given = operands(24, batch=1)
    elif change == "gradient":
        given = (given[0].requires_grad_(), *given[1:])
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        layer_of(layer).run(call_of(layer, given), door)
    assert len(passed(layer).pieces) == 2


def wrong(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = v.cumsum(-2) * layer.scale
    return out


def test_what_is_no_attention_is_left_to_the_library_and_said() -> None:
    door, layer = Door(Policy()), Layer()
    assert layer_of(layer).run(call_of(layer, operands(24), wrong), door) is None
    with pytest.raises(StrictError):
        layer_of(layer).run(call_of(layer, operands(24), lambda m, q, k, v: q * OUTSIDE[:1]), Door(Policy(strict=True)))


def test_a_kernel_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # what is found of a wrong kernel is not kept for other processes, and theirs says nothing of it
    monkeypatch.setattr(verdicts, "recall", lambda at: None)
    monkeypatch.setattr(verdicts, "keep", lambda at, check: None)
    door, layer, given = Door(OURS), Layer(), operands(26)
    page, call = layer_of(layer), call_of(layer, given)
    assert page.run(call, door) is not None
    (running,) = page.kinds[call.kind()]
    (guard,) = running.guards
    right, guard.target = guard.target, lambda *x: 1.01 * right(*x)
    assert guard.watch is not None
    guard.watch.seen.clear()
    with pytest.warns(UserWarning, match="Layer keeps the original code"):
        out = page.run(call, door)
    assert out is not None
    assert torch.allclose(out, attend(layer, *given), atol=1e-6)
    assert page.run(call, door) is None
    assert [c.verdict for c in passed(layer).pieces[0].checks] == ["same", "differs"]


def test_a_site_that_steps_aside_leaves_its_calls_to_the_library() -> None:
    door, layer, given = Door(OURS), Layer(), operands(28)
    page = layer_of(layer)
    assert page.run(call_of(layer, given), door) is not None
    (running,) = page.kinds[call_of(layer, given).kind()]
    running.guards[0].broken = "it differs"
    assert page.run(call_of(layer, given), door) is None
    assert passed(layer).pieces[0].fallbacks.total() == 1


def test_captures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "KINDS", 2)
    monkeypatch.setattr(site, "CAPTURES", 1)
    door, layer = Door(OURS), Layer()
    for batch in (2, 1, 1):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert layer_of(layer).run(call_of(layer, operands(18, batch, dtype)), door) is not None
    page = layer_of(layer)
    assert len(page.kinds) <= 2
    assert all(len(k) <= 1 for k in page.kinds.values())
    assert len(page.pieces) <= 2
