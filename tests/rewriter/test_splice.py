"""Splicing keeps what a graph computes: shapes, types, strides, other consumers, writes; the oracle stands in for a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from reattend.patterns.evaluate import evaluate
from reattend.rewriter.capture import export
from reattend.rewriter.find import detect
from reattend.rewriter.find.place import interior
from reattend.rewriter.graph import liveness
from reattend.rewriter.splice import splice
from reattend.rewriter.splice.guards import original_subgraph

pytestmark = pytest.mark.thin(3)


def oracle(found: detect.Found) -> splice.Call:
    """The cascade itself, run by `evaluate`."""
    names = [t.name for t in found.cascade.inputs]

    def run(*tensors: Tensor) -> Tensor:
        return evaluate(found.cascade, dict(zip(names, tensors, strict=True)))[found.cascade.outputs[0]]

    return splice.Call("oracle", run, lambda tensors, size: tuple(tensors[n] for n in names))


def spliced(model: nn.Module, *args: Tensor) -> tuple[fx.GraphModule, list[detect.Found]]:
    graph = export.from_export(model, args, None).graph
    found, _ = detect.find(graph)
    for f in found:
        splice.replace(graph, f.output, f.tensors, f.scalars, oracle(f))
    splice.finish(graph)
    return graph, found


def names(graph: fx.GraphModule) -> list[str]:
    return [str(getattr(n.target, "__name__", n.target)) for n in graph.graph.nodes if n.op == "call_function"]


def qkv(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(*shape), torch.randn(*shape), torch.randn(*shape)


class Eager(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2) * 0.25
        keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
        return s.masked_fill(~keep, float("-inf")).softmax(-1) @ v


def test_the_attention_is_one_call_and_its_interior_is_gone() -> None:
    args = qkv(2, 3, 8, 16)
    graph, found = spliced(Eager(), *args)
    assert len(found) == 1
    torch.testing.assert_close(graph(*args), Eager()(*args))
    left = names(graph)
    assert "run" in left
    assert not [n for n in left if "softmax" in n or "matmul" in n or "tril" in n]


def test_other_consumers_keep_their_nodes() -> None:
    class M(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            p = (q @ k.transpose(-1, -2)).softmax(-1)
            return p @ v, p

    args = qkv(1, 2, 8, 16)
    graph = export.from_export(M(), args, None).graph
    (found,), _ = detect.find(graph)
    alive = {n.name for n in liveness.survivors(found.nodes, [found.output])}
    assert {"softmax", "matmul"} <= alive
    splice.replace(graph, found.output, found.tensors, found.scalars, oracle(found))
    splice.finish(graph)
    for a, b in zip(graph(*args), M()(*args), strict=True):
        torch.testing.assert_close(a, b)
    assert "softmax.int" in names(graph)


def test_strides_are_those_of_the_value_that_was_replaced() -> None:
    class M(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k)).softmax(-1), v)
            return out + 0 * out.as_strided(out.shape, out.stride())

    args = qkv(2, 8, 3, 16)
    graph, found = spliced(M(), *args)
    assert len(found) == 1
    torch.testing.assert_close(graph(*args), M()(*args))
    replaced = next(n for n in graph.graph.nodes if "replaces" in n.meta)
    assert replaced.meta["val"].stride() == found[0].output.meta["val"].stride()


def test_writes_and_live_dropout_elsewhere_stay() -> None:
    class M(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            unused = F.dropout(q, 0.5, training=True)
            kept = q.clone()
            kept[0] = 1
            del unused
            made: Tensor = Eager()(q, k, v) + kept
            return made

    args = qkv(2, 3, 8, 16)
    graph, _ = spliced(M(), *args)
    assert any("dropout" in n for n in names(graph))
    torch.testing.assert_close(graph(*args), M()(*args))


def test_every_layer_of_a_stack() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
            made: Tensor = x + (Eager()(q, k, v)).transpose(1, 2).reshape(x.shape)
            return made

    model = nn.Sequential(*[Block() for _ in range(3)])
    x = torch.randn(2, 9, 16)
    graph, found = spliced(model, x)
    assert len(found) == 3
    torch.testing.assert_close(graph(x), model(x))


def test_a_call_of_another_shape_is_an_error_not_a_wrong_graph() -> None:
    args = qkv(1, 2, 8, 16)
    graph = export.from_export(Eager(), args, None).graph
    (found,), _ = detect.find(graph)
    call = splice.Call("wrong", lambda q: q.sum(), lambda tensors, size: (tensors["Q"],))
    with pytest.raises((RuntimeError, splice.SpliceError)):
        splice.replace(graph, found.output, found.tensors, found.scalars, call)


def test_autocast_is_off_inside_the_call() -> None:
    seen: list[Any] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return F.scaled_dot_product_attention(q, k, v, scale=0.25, is_causal=True)

    class M(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                made: Tensor = Eager()(q, k, v)
                return made

    args = qkv(1, 2, 8, 16)
    graph = export.from_export(M(), args, None).graph
    (found,), _ = detect.find(graph)
    call = splice.Call("sdpa", run, lambda tensors, size: tuple(tensors[n] for n in "QKV"))
    splice.replace(graph, found.output, found.tensors, found.scalars, call)
    splice.finish(graph)
    seen.clear()
    out = graph(*args)
    assert seen == [False]
    assert out.dtype == M()(*args).dtype
    torch.testing.assert_close(out, M()(*args), atol=2e-2, rtol=2e-2)


def transposed(found: detect.Found) -> splice.Call:
    """The oracle, its result in memory as [b, p, h, f]."""
    inner = oracle(found).target

    def run(*tensors: Tensor) -> Tensor:
        made: Tensor = inner(*tensors).transpose(1, 2).contiguous().transpose(1, 2)
        return made

    names = [t.name for t in found.cascade.inputs]
    return splice.Call("transposed", run, lambda tensors, size: tuple(tensors[n] for n in names))


class Merged(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = Eager()(q, k, v)
        made: Tensor = out.transpose(1, 2).contiguous().view(2, 8, 48) * 2
        return made


class Viewed(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = Eager()(q, k, v).view(6, 8, 16)
        return made


@pytest.mark.parametrize(("model", "copies"), [(Merged(), 1), (Viewed(), 1), (Eager(), 1)])
def test_another_order_of_memory_is_undone_only_where_it_matters(model: nn.Module, copies: int) -> None:
    args = qkv(2, 3, 8, 16)
    graph = export.from_export(model, args, None).graph
    (found,), _ = detect.find(graph)
    splice.replace(graph, found.output, found.tensors, found.scalars, transposed(found))
    splice.finish(graph)
    out = graph(*args)
    torch.testing.assert_close(out, model(*args))
    assert out.stride() == model(*args).stride()
    assert sum("contiguous" in n for n in names(graph)) == copies


class InPlace(nn.Module):
    """Scores that are scaled and masked where they lie."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.transpose(-1, -2)
        s *= 0.25
        s.masked_fill_(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        return s.softmax(-1) @ v


def test_in_place_operators_on_the_interior_go_with_it() -> None:
    args = qkv(2, 3, 8, 16)
    graph = export.from_export(InPlace(), args, None).graph
    (found,), _ = detect.find(graph)
    inside = frozenset(n for n in graph.graph.nodes if n.op == "call_function") - {found.output}
    assert liveness.survivors(inside, [found.output]) == frozenset()
    splice.replace(graph, found.output, found.tensors, found.scalars, oracle(found))
    splice.finish(graph)
    torch.testing.assert_close(graph(*args), InPlace()(*args))
    assert not [n for n in names(graph) if "masked_fill" in n or "mul_" in n or "matmul" in n]


def test_in_place_operators_on_what_others_read_stay() -> None:
    class M(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            s = q @ k.transpose(-1, -2)
            s *= 0.25
            kept = s.view(-1)
            s.add_(1)
            k.mul_(2)
            return s.softmax(-1) @ v, kept

    args = qkv(2, 3, 8, 16)
    graph = export.from_export(M(), tuple(a.clone() for a in args), None).graph
    found, _ = detect.find(graph)
    for f in found:
        splice.replace(graph, f.output, f.tensors, f.scalars, oracle(f))
    splice.finish(graph)
    ours, theirs = [a.clone() for a in args], [a.clone() for a in args]
    for a, b in zip(graph(*ours), M()(*theirs), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


class Ended(nn.Module):
    """An attention, and what is made of its result with its heads last."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.end = end

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.end(Eager()(q, k, v).transpose(1, 2))


@pytest.mark.parametrize(("end", "copies", "trained"), [
    (lambda o: o.reshape(2, 8, 48), 0, 1),
    (lambda o: o.reshape(2, 8, 48) @ torch.ones(48, 4), 0, 0),
    (lambda o: (o.reshape(2, 8, 48) @ torch.ones(48, 4), o.reshape(2, 384) * 2), 0, 0),
    (lambda o: (o.reshape(2, 8, 48), o.reshape(2, 384) * 2), 0, 1),
    (lambda o: (o.reshape(2, 8, 48), o.reshape(2, 384)), 1, 1),
    (lambda o: (o.reshape(2, 8, 48).add_(1), o * 2), 1, 1),
], ids=["one", "projected", "read_twice", "one_and_a_reader", "two", "written"])
def test_a_copy_is_dropped_where_nobody_can_tell(end: Callable[[Tensor], Any], copies: int, trained: int) -> None:
    for wanted, args in ((copies, qkv(2, 3, 8, 16)), (trained, tuple(x.requires_grad_() for x in qkv(2, 3, 8, 16)))):
        graph = export.from_export(Ended(end), args, None).graph
        (found,), _ = detect.find(graph)
        splice.replace(graph, found.output, found.tensors, found.scalars, transposed(found))
        splice.finish(graph)
        torch.testing.assert_close(graph(*args), Ended(end)(*args))
        assert sum("contiguous" in n for n in names(graph)) == wanted


class Keeping(torch.autograd.Function):
    """A kernel keeps its result for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return gradient + 0 * out


@pytest.mark.parametrize("once", [False, True])
def test_a_result_that_is_given_away_is_not_what_a_backward_keeps(once: bool) -> None:
    args = tuple(x.requires_grad_() for x in qkv(2, 3, 8, 16))
    graph = export.from_export(Eager(), args, None).graph
    (found,), _ = detect.find(graph)
    call, inner = oracle(found), oracle(found).target
    call = replace(call, target=lambda *x: Keeping.apply(inner(*x)), fake=inner, fragile=True, once=once)  # type: ignore[no-untyped-call]
    original = original_subgraph(graph, found.output, interior(found))
    splice.replace(graph, found.output, found.tensors, found.scalars, call, original=original)
    splice.finish(graph)
    assert not [n for n in names(graph) if "contiguous" in n]
    ours, own = graph(*args), Eager()(*args)
    for y in (ours, own):
        y += 1
    for a, b in zip(torch.autograd.grad(ours.sum(), args), torch.autograd.grad(own.sum(), args), strict=True):
        torch.testing.assert_close(a, b)
