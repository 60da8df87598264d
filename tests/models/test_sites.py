"""Every attention of every model, on its own inputs, against float64: at most 1.2 and 2.5 times the error of torch's SDPA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import reattend
from reattend.codegen.vendor import use as vendor
from reattend.patterns.evaluate import evaluate
from reattend.patterns.verdict import Refusal
from reattend.rewriter.capture import capture
from reattend.rewriter.choose import choose
from reattend.rewriter.run.session import Session

from . import zoo

OURS = reattend.Policy(allow=("reattend",), deny=("original",))
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SEEDS = 5
RMS, MOST = 1.2, 2.5
Errors = list[tuple[float, float, float]]


class Compare:
    """A backend that runs graphs as written; at each attention it keeps (RMS, largest, unit) errors of ours and of SDPA."""

    def __init__(self) -> None:
        self.ours: dict[str, Errors] = {}
        self.base: dict[str, Errors] = {}

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object], names: Mapping[int, str]) -> Any:
        captured = capture.from_dynamo(gm, inputs, names)
        decisions: dict[fx.Node, choose.Decision] = {}
        for region in capture.regions(captured.graph):
            made, missed = choose.decide(region, choose.Request(OURS))
            assert not missed
            decisions |= {d.found.output: d for d in made}
        compare = self

        class Run(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n in decisions:
                    compare.site(decisions[n], {x: self.env[v] for x, v in decisions[n].found.tensors.items()},
                                 {x: self.env[v] for x, v in decisions[n].found.scalars.items()}, value)
                return value

        return lambda *values: Run(captured.graph, garbage_collect_values=False).run(*values)

    def site(self, d: choose.Decision, x: Mapping[str, Tensor], scalars: Mapping[str, Any], written: Tensor) -> None:
        c = d.found.cascade
        sizes = choose.bind_sizes(c, x, scalars)
        exact = evaluate(c, x, sizes, widen=True)[c.outputs[0]].reshape(written.shape)
        assert d.call is not None, d.site.chosen.why
        assert d.site.choice == "reattend"
        got = d.call.target(*d.call.arguments(x, lambda name: sizes[name]))
        sdpa = vendor.sdpa(c)
        base = written if isinstance(sdpa, Refusal) else sdpa.run(x, sizes)
        name = f"{d.site.name} {d.site.where}"
        self.ours.setdefault(name, []).append(errors(got, exact))
        self.base.setdefault(name, []).append(errors(base, exact))


def errors(out: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """RMS and largest error, and a unit in the last place of the largest output."""
    assert torch.equal(out.reshape(exact.shape).isfinite(), exact.isfinite())
    e = (out.reshape(exact.shape).double() - exact)[exact.isfinite()]
    return float(e.square().mean().sqrt()), float(e.abs().max()), torch.finfo(out.dtype).eps * float(exact.abs().max())


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep the size of what goes through them: scores then differ enough for the softmax to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_sites_against_float64(name: str, dtype: str) -> None:
    """Mean over five seeds of weights and inputs, left- and right-padded in turn, with a floor of one unit."""
    torch._dynamo.reset()
    model, compare = zoo.build(name, dtype=DTYPES[dtype]), Compare()
    session = Session(OURS, None, backend=compare)
    session.install(model)
    try:
        with torch.no_grad():
            for seed in range(SEEDS):
                randomise(model, seed)
                model(**zoo.inputs(name, pad=("left", "right")[seed % 2], dtype=DTYPES[dtype], seed=seed + 1))
    finally:
        session.detach()
    assert compare.ours
    for site, found in compare.ours.items():
        assert len(found) % SEEDS == 0, site
        rms, most, unit = (sum(column) / len(found) for column in zip(*found))
        base_rms, base_most, _ = (sum(column) / len(found) for column in zip(*compare.base[site]))
        assert rms <= max(RMS * base_rms, unit), site
        assert most <= max(MOST * base_most, unit), site
