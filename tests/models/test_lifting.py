"""Every attention of every model is found, and its cascade equals the model's own code in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx

from reattend.patterns.evaluate import evaluate
from reattend.rewriter.capture.capture import from_dynamo
from reattend.rewriter.capture.export import from_export
from reattend.rewriter.find import detect

from ..rewriter.helpers import recorded
from . import zoo
from .count import CountAttention

pytestmark = pytest.mark.thin(3)

ROUTES = ("export", "dynamo", "symbolic")


def cases() -> Iterator[Any]:
    """Every architecture and spelling on every route. The short run has each once: by export, as plans do, which is quickest."""
    for name, attn, route in itertools.product(zoo.CONFIGS, ("eager", "sdpa"), ROUTES):
        # export cannot unroll the loop over experts; symbolic sizes are covered by the eager form
        if (name, route) == ("gpt_oss", "export") or (attn == "sdpa" and (route == "symbolic" or name in zoo.WITHOUT_SDPA)):
            continue
        quickest = attn == "eager" and route == ("dynamo" if name == "gpt_oss" else "export")
        yield pytest.param(name, attn, route, marks=() if quickest else pytest.mark.slow)


def check(captured: fx.GraphModule, errors: list[float], missed: list[str]) -> Callable[..., Any]:
    """The graph as a function that also evaluates every cascade in it on the values that it was read from."""
    found, near = detect.find(captured)
    missed.extend(m.reason for m in near)

    def run(*args: Any) -> Any:
        out, values = recorded(captured, args)
        for f in found:
            tensors = {k: values[v] for k, v in f.tensors.items()}
            got = evaluate(f.cascade, tensors, {k: values[v] for k, v in f.scalars.items()})[f.cascade.outputs[0]]
            want = values[f.output].reshape(got.shape)
            error = float((got - want).abs().max() / want.abs().max())
            narrow = "f32(" in str(f.cascade)
            errors.append(error if narrow else error * 1e6)
        return out

    return run


@pytest.mark.parametrize(("name", "attn", "route"), cases())
def test_found_and_lifted(name: str, attn: str, route: str) -> None:
    """‖evaluate − eager‖∞ ≤ 1e-12·‖eager‖∞, 1e-6 where the module casts to a narrower type inside."""
    model = zoo.build(name, attn, torch.float64)
    given = zoo.inputs(name, dtype=torch.float64)
    errors: list[float] = []
    missed: list[str] = []

    def compare(gm: fx.GraphModule, example: list[Any]) -> Any:
        return check(from_dynamo(gm, example).graph, errors, missed)

    with torch.no_grad():
        with CountAttention() as counted:
            model(**given)
        if route == "export":
            check(from_export(model, (), given).graph, errors, missed)(*given.values())
        else:
            torch._dynamo.reset()
            compiled: Any = torch.compile(model, backend=compare, dynamic=route == "symbolic" or None)
            compiled(**given)
    assert not missed
    assert len(errors) == counted.count > 0
    assert max(errors) <= 1e-6
