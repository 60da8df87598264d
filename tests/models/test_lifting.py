"""Every attention of every model is found, and its cascade equals the model's own code in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from reattend.patterns.evaluate import evaluate
from reattend.rewriter import detect
from reattend.rewriter.capture import from_dynamo

from . import zoo
from .count import CountAttention

CASES = zoo.CASES


@pytest.mark.parametrize(("name", "attn"), CASES)
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_found_and_lifted(name: str, attn: str, dynamic: bool | None) -> None:
    """‖evaluate − eager‖∞ ≤ 1e-12·‖eager‖∞, 1e-6 where the module casts to a narrower type inside."""
    if dynamic and attn == "sdpa":
        pytest.skip("symbolic sizes are covered by the eager form")
    torch._dynamo.reset()
    model = zoo.build(name, attn, torch.float64)
    given = zoo.inputs(name, dtype=torch.float64)
    errors: list[float] = []
    missed: list[str] = []

    def compare(gm: fx.GraphModule, example: list[Any]) -> Any:
        captured = from_dynamo(gm, example).graph
        found, near = detect.find(captured)
        missed.extend(m.reason for m in near)

        def run(*args: Any) -> Any:
            values: dict[fx.Node, Any] = {}

            class Record(fx.Interpreter):
                def run_node(self, n: fx.Node) -> Any:
                    values[n] = super().run_node(n)
                    return values[n]

            out = Record(captured).run(*args)
            for f in found:
                tensors = {k: values[v] for k, v in f.tensors.items()}
                got = evaluate(f.cascade, tensors, {k: values[v] for k, v in f.scalars.items()})[f.cascade.outputs[0]]
                want = values[f.output].reshape(got.shape)
                error = float((got - want).abs().max() / want.abs().max())
                narrow = "f32(" in str(f.cascade)
                errors.append(error if narrow else error * 1e6)
            return out

        return run

    with torch.no_grad():
        with CountAttention() as counted:
            model(**given)
        compiled: Any = torch.compile(model, backend=compare, dynamic=dynamic)
        compiled(**given)
    assert not missed
    assert len(errors) == counted.count > 0
    assert max(errors) <= 1e-6
