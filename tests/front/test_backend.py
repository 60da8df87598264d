"""`torch.compile(model, backend="reattend")`: found by entry point, hands the rest to Inductor or leaves it eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from reattend import backend


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
