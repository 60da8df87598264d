"""`torch.compile(model, backend="reattend")`: found by entry point, hands the rest to Inductor or leaves it eager."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import flex_attention

import reattend
from reattend import backend
from reattend.rewriter.capture.capture import FLOAT
from reattend.rewriter.run.report import Report
from reattend.rewriter.splice.floats import computed_with
from tests.tiers import few


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> None:
    assert ((a - b).abs().max() / b.abs().max()).item() <= limit


def test_the_backend_is_found_without_an_import() -> None:
    assert "reattend" in torch._dynamo.list_backends()


def test_the_rest_stays_eager_when_asked(stack: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        compiled = torch.compile(stack, backend="reattend", options={"rest": "eager"})
        close(compiled(x), stack(x))


OURS = {"deny": ("original", "sdpa", "flex")}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, OURS])
def test_the_rest_goes_to_inductor(stack: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    with torch.no_grad():
        compiled = torch.compile(stack, backend="reattend", options=options)
        for n in (40, 24, 33):
            given = torch.randn(2, n, 16)
            close(compiled(given), stack(given))


@pytest.mark.slow
def test_training_through_inductor(stack: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(stack)
    torch.compile(stack, backend="reattend")(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(stack.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        close(p.grad, q.grad, 1e-4)


def test_inductor_is_told_the_threads(stack: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are part of the key in its cache: what was compiled for one thread must not run on two."""
    told: list[int] = []

    def compile_fx(graph: fx.GraphModule, inputs: object, config_patches: dict[str, int]) -> Any:
        told.append(config_patches["cpp.threads"])
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(backend, "_missing_compiler", lambda: "")
    compiled, threads = torch.compile(stack, backend="reattend"), torch.get_num_threads()
    try:
        with torch.no_grad():
            for n in (1, 2):
                torch.set_num_threads(n)
                close(compiled(x), stack(x))
    finally:
        torch.set_num_threads(threads)
    assert told == [1, 2]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_a_mode_is_inductors(stack: nn.Module, x: Tensor, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def compile_fx(graph: fx.GraphModule, inputs: object, config_patches: dict[str, Any]) -> Any:
        told.append(config_patches)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(backend, "_missing_compiler", lambda: "")
    with torch.no_grad():
        close(torch.compile(stack, backend="reattend", mode=mode)(x), stack(x))
    wanted = torch._inductor.list_mode_options(mode)
    assert all(wanted.items() <= options.items() for options in told)
    assert told


def test_a_mode_that_cannot_be_taken_is_refused(stack: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="mode='fast' is not known: one of default"):
        torch.compile(stack, backend="reattend", mode="fast")(x)
    torch._dynamo.reset()
    monkeypatch.setattr(backend, "_missing_compiler", lambda: "Inductor needs a C++ compiler and found none")
    with pytest.raises(Exception, match="is for Inductor, and the rest runs eagerly here"):
        torch.compile(stack, backend="reattend", mode="max-autotune")(x)


def test_unknown_options_are_named(stack: nn.Module, x: Tensor) -> None:
    with pytest.raises(Exception, match="unknown option 'speed'; one of rest, target, allow, deny, strict"):
        torch.compile(stack, backend="reattend", options={"speed": 11})(x)
    with pytest.raises(Exception, match="use 'inductor' or 'eager'"):
        torch.compile(stack, backend="reattend", options={"rest": "later"})(x)


def test_without_a_compiler_the_rest_is_eager(stack: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_missing_compiler", lambda: "Inductor needs a C++ compiler and found none")
    with torch.no_grad(), pytest.warns(UserWarning, match="found none: the rest of the model runs eagerly"):
        close(torch.compile(stack, backend="reattend")(x), stack(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="install one, or use options"):
        torch.compile(stack, backend="reattend", options={"rest": "inductor"})(x)


# --- what is found ------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return (q @ k.mT * 0.3).masked_fill(~keep, -torch.inf).softmax(-1) @ v


def columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT * 0.3
    s[..., :3] = -torch.inf
    return s.softmax(-1) @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.relu() @ (k.relu().mT @ v)


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(torch.nn.functional.scaled_dot_product_attention)(q, k, v)


def flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flex_attention(q, k, v, lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf))
    assert isinstance(out, Tensor)
    return out


def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = plain(q, k, v)
    torch._dynamo.graph_break()
    return masked(out, k, v)


class Fn(nn.Module):
    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Any) -> Tensor:
        return self.f(*args)


def qkv(n: int = 24, width: int = 16) -> list[Tensor]:
    return [torch.randn(2, 4, n, width) for _ in range(3)]


def report_of(compiled: Any) -> Report:
    return reattend.report(compiled)


def breaks_and_graphs(model: Callable[..., Tensor], args: list[Any], **options: Any) -> tuple[int, int]:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad():
        torch.compile(model, **options)(*args)
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("f", "dynamic"),
    few(
        [(f, d) for f in (plain, masked, columns, keys_first, mapped, flexible, broken) for d in (None, True)],
        (masked, True), (keys_first, None), (broken, None),
    ),
)
def test_it_finds_what_optimize_finds_without_more_breaks(f: Callable[..., Tensor], dynamic: bool | None) -> None:
    model, args = Fn(f), qkv()
    torch._dynamo.reset()
    ours = reattend.optimize(copy.deepcopy(model))
    with torch.no_grad():
        want = ours(*args)
    wanted = reattend.report(ours)
    eager: dict[str, Any] = {"rest": "eager"}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="reattend", dynamic=dynamic, options=eager)
    with torch.no_grad():
        close(compiled(*args), want)
    found = report_of(compiled)
    assert [s.site.kind for s in found.sites] == [s.site.kind for s in wanted.sites]
    if f is not mapped:
        assert [s.site.traits for s in found.sites] == [s.site.traits for s in wanted.sites]
    assert [m.reason for m in found.misses] == [m.reason for m in wanted.misses]
    assert found.calls == 1
    own = breaks_and_graphs(model, args, backend="eager", dynamic=dynamic)
    assert breaks_and_graphs(model, args, backend="reattend", dynamic=dynamic, options=eager) == own


def test_a_report_of_another_compiler_is_refused(stack: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"the wrapper that torch\.compile returns"):
        report_of(torch.compile(stack, backend="eager"))


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_floats_that_change_are_no_new_graphs(rest: str, dynamic: bool | None) -> None:
    def f(*given: Any) -> Tensor:
        q, k, v, scale, n = given
        out: Tensor = (q @ k.mT * scale).softmax(-1) @ v + n
        return out

    torch._dynamo.reset()
    compiled = torch.compile(Fn(f), backend="reattend", dynamic=dynamic, options={"rest": rest})
    with torch.no_grad():
        for scale in (0.3, 0.4, 0.5, 0.6):
            args = qkv()
            close(compiled(*args, scale, 2), f(*args, scale, 2))
    report = report_of(compiled)
    assert len(report.pieces) == (1 if dynamic else 2)
    assert all(len(p.sites) == 1 for p in report.pieces)


def test_a_float_that_is_read_in_place_is_computed_with() -> None:
    graph = fx.Graph()
    scale, x = graph.placeholder("scale"), graph.placeholder("x")
    scale.meta = {"val": torch.tensor(0.5, dtype=torch.float64), FLOAT: True}
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, scale)))
    gm = fx.GraphModule(nn.Module(), graph)
    computed_with(gm)
    assert [n.target for n in scale.users] == [torch.ops.aten.item.default]
    assert torch.equal(gm(torch.tensor(0.3, dtype=torch.float64), torch.ones(2)), torch.full((2,), 0.3))


@pytest.mark.slow
def test_heads_of_open_width_under_a_map() -> None:
    """A scale that uses a part twice is printed in one piece."""
    options: dict[str, Any] = {"rest": "eager", "deny": ("original",)}
    compiled = torch.compile(Fn(mapped), backend="reattend", dynamic=True, options=options)
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for n, width in ((24, 16), (40, 24)):
            args = qkv(n, width)
            close(compiled(*args), mapped(*args))


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_training_with_open_sizes(rest: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Fn(masked), backend="reattend", dynamic=dynamic, options={"rest": rest})
    for n in (24, 40):
        args = [x.requires_grad_() for x in qkv(n)]
        got, want = (torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, masked))
        for a, b in zip(got, want, strict=True):
            close(a, b, 1e-4)
    assert all(len(p.sites) == 1 for p in report_of(compiled).pieces)


@pytest.mark.slow
@pytest.mark.parametrize("f", [masked, keys_first, mapped, flexible])
def test_inductor_gets_the_same_graphs(f: Callable[..., Tensor]) -> None:
    model, args = Fn(f), qkv(32)  # at 24 keys Inductor's own FlexAttention reads behind its last one
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="reattend", dynamic=True)
    with torch.no_grad():
        close(compiled(*args), model(*args))
    report = report_of(compiled)
    assert len(report.sites) + len(report.misses) == 1
    assert not any(p.error for p in report.pieces)
    own = breaks_and_graphs(model, args, backend="inductor", dynamic=True)
    assert breaks_and_graphs(model, args, backend="reattend", dynamic=True) == own
