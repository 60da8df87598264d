"""Selected keys that are maps of latents: what each row gathers is latents, wherever that is proved, and where it pays."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.codegen.cpu.kernel import CpuKernel, build
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.passes.absorb import Absorbed, absorb
from reattend.patterns.passes.latents import Inner, inner
from reattend.rewriter.find import detect
from reattend.rewriter.find.upstream import Reached, upstream
from reattend.rewriter.graph.aliases import Aliases
from reattend.rewriter.graph.functional import functional

from .helpers import graph_of, values_of

HEADS, NOPE, ROPE, VALUE, LATENT = 4, 8, 4, 6, 10
LATENTS = TileMapping(64, 64, body="latent")
MINE = reattend.Policy(tune=False, deny=("sdpa", "flex", "original"))


class Latent(nn.Module):
    """Attention over 16 named keys, all of which are maps of latents; `spoilt` says in which way not quite."""

    def __init__(self, dtype: torch.dtype = torch.float32, spoilt: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False, dtype=dtype)
        self.spoilt = spoilt

    def forward(self, q: Tensor, c: Tensor, r: Tensor, names: Tensor, seen: Tensor) -> Tensor:
        b, m = c.shape[0], c.shape[1]
        both = self.up(c).view(b, m, HEADS, NOPE + VALUE).transpose(1, 2)
        k, v = both.split([NOPE, VALUE], -1)
        if self.spoilt == "normed":
            k = nn.functional.layer_norm(k, (NOPE,))
        k = torch.cat([k, r[:, None].expand(-1, HEADS, -1, -1)], -1)
        keep = torch.zeros(b, q.shape[2], m, dtype=torch.bool).scatter(-1, names, True) & seen
        if self.spoilt == "written":
            c.mul_(2.0)
        # the lowest number of float16 is within reach of its scores
        fill = -torch.inf if q.dtype == torch.float16 else torch.finfo(q.dtype).min
        scores = (q @ k.mT * 0.25).masked_fill(~keep[:, None], fill)
        out: Tensor = scores.softmax(-1) @ v
        return out + k.sum() if self.spoilt == "read elsewhere" else out


def operands(queries: int, keys: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, ...]:
    made = torch.Generator().manual_seed(1)
    q, c, r = (
        torch.randn(batch, *s, generator=made, dtype=torch.float64).to(dtype)
        for s in ((HEADS, queries, NOPE + ROPE), (keys, LATENT), (keys, ROPE))
    )
    names = torch.randn(batch, queries, keys, generator=made).topk(16, -1).indices
    seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    seen[0] = queries == 1
    return q, c, r, names, seen


def absorbed(m: Latent, given: tuple[Tensor, ...]) -> tuple[Cascade, Cascade, dict[str, Tensor]] | None:
    """The attention over latents, as the model's own code has it and absorbed, with the values of its inputs."""
    gm = graph_of(m, given)
    gm = functional(gm) or gm
    (here,), _ = detect.find(gm)
    view = attention(here.cascade)
    assert isinstance(view, Attention)
    made = upstream(gm.graph, Aliases(gm.graph), here)
    if not isinstance(made, Reached):
        return None
    out = absorb(made.cascade, view.key, view.query)
    assert isinstance(out, Absorbed), out
    values = values_of(gm, given)
    return made.cascade, out.cascade, {name: values[n] for name, n in made.tensors.items()}


def run(c: Cascade, tensors: Mapping[str, Tensor]) -> Tensor:
    made = build(c, LATENTS)
    assert isinstance(made, CpuKernel), made
    out: Tensor = made.run(tensors, {})
    return out


@pytest.mark.parametrize("queries", [1, 24])
def test_gathered_latents_are_exact(queries: int) -> None:
    """Rows 0 of several see no key: they are the mean over all values, as they are written."""
    found = absorbed(Latent(torch.float64), operands(queries, 24, torch.float64))
    assert found is not None
    own, whole, tensors = found
    want = evaluate(own, tensors)[own.outputs[0]]
    for out in (run(whole, tensors), evaluate(whole, tensors)[whole.outputs[0]]):
        assert (out - want).abs().max() <= 1e-14 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gathered_latents_in_narrow_types(dtype: torch.dtype) -> None:
    found = absorbed(Latent(dtype), operands(1, 24, dtype))
    assert found is not None
    own, whole, tensors = found
    exact = evaluate(own, tensors, widen=True)[own.outputs[0]]
    written = evaluate(own, tensors)[own.outputs[0]].double()
    off = (run(whole, tensors).double() - exact).square().mean().sqrt()
    assert off <= 2 * (written - exact).square().mean().sqrt()


def test_an_attention_over_latents_is_cut_before_its_last_map() -> None:
    found = absorbed(Latent(), operands(2, 24))
    assert found is not None
    parts = inner(found[1])
    assert isinstance(parts, Inner)
    assert parts.after is not None
    assert isinstance(attention(parts.cascade), Attention)
    assert [t.name for t in parts.cascade.inputs] == [t.name for t in found[1].inputs]


def optimised(spoilt: str = "", queries: int = 1, keys: int = 2048) -> tuple[reattend.Plan, set[str]]:
    """What is planned for a module, once it is seen to compute the same."""
    torch._dynamo.reset()
    model = Latent(spoilt=spoilt)
    ours = reattend.optimize(copy.deepcopy(model), policy=MINE)
    with torch.no_grad():
        want, out = (m(*operands(queries, keys)) for m in (model, ours))
    torch.testing.assert_close(out, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    report = reattend.report(ours)
    assert report.plan is not None
    return report.plan, {c.verdict for c in report.checks}


def over_latents(plan: reattend.Plan) -> str:
    (site,) = plan.sites
    assert (site.kind, site.choice) == ("selected", "reattend")
    return site.chosen.why if "latent" in site.chosen.mapping else ""


def test_few_queries_make_no_keys() -> None:
    plan, checks = optimised()
    assert "which saves" in over_latents(plan)
    assert checks == {"same"}


@pytest.mark.parametrize("spoilt", ["normed", "written"])
def test_what_is_no_map_of_the_latents_at_hand_is_not_gathered(spoilt: str) -> None:
    plan, checks = optimised(spoilt)
    assert not over_latents(plan)
    assert checks == {"same"}


def test_keys_that_something_else_reads_save_nothing() -> None:
    plan, _ = optimised("read elsewhere")
    assert "which saves" not in over_latents(plan)


def test_with_gradients_keys_are_made() -> None:
    torch._dynamo.reset()
    model = Latent()
    ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(tune=False))
    grads = []
    for m in (model, ours):
        m(*operands(1, 512)).square().sum().backward()
        grads.append(m.up.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
    plan = reattend.report(ours).plan
    assert plan is not None
    assert not any("latent" in s.chosen.mapping for s in plan.sites)
