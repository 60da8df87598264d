"""Loops over chunks: read back as the recurrence over tokens that they compute, in the spelling of the models' own code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.node import Argument

import reattend
from reattend.codegen.cpu.scan import ScanKernel, build
from reattend.patterns.recurrence.low_rank import LowRank, low_rank
from reattend.rewriter.choose.scans import Scan, scans
from reattend.rewriter.fold.recurrences import FoundScan
from reattend.rewriter.fold.substitution import inverses
from reattend.rewriter.graph.aliases import Aliases
from reattend.rewriter.graph.functional import functional
from reattend.rewriter.graph.liveness import erase_dead

from ..tiers import few, one_in
from .helpers import graph_of, values_of

models = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

Results = tuple[Tensor, Tensor]
Rule = Callable[..., Results]


def plain(fn: Rule) -> Rule:
    return getattr(fn, "__wrapped__", fn)


def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor) -> Results:
    """transformers' chunks of the gated delta rule: two triangular systems."""
    o, s = plain(qwen.torch_chunk_gated_delta_rule)(
        q, k, v, g, beta, initial_state=s, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    return o * 1, s * 1


def channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor) -> Results:
    """transformers' chunks of Kimi's delta attention: a decay a channel, forward substitution row by row."""
    o, s = plain(models.chunk_kimi_delta_attention)(q, k, v, g, beta, 64, s, True, True)
    return o * 1, s * 1


def linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor) -> Results:
    """A gated linear attention in chunks of 16, whose tokens are laid side by side."""
    return masked(q, k, v, g, s, 1)


def masked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, causal: int) -> Results:
    """The same; `causal`: the first token behind one that it does not see."""
    b, t, h, _ = k.shape
    n = t // 16
    q, k, v = (x.transpose(1, 2).reshape(b, h, n, 16, -1) for x in (q, k, v))
    total = g.transpose(1, 2).reshape(b, h, n, 16).cumsum(-1)
    over = torch.ones(16, 16, dtype=torch.bool).triu(causal)
    pairs = (q @ k.mT) * (total[..., None] - total[..., None, :]).masked_fill(over, -math.inf).exp()
    out = []
    for i in range(n):
        out.append((q[:, :, i] * total[:, :, i].exp()[..., None]) @ s + pairs[:, :, i] @ v[:, :, i])
        end = total[:, :, i, -1:]
        s = s * end.exp()[..., None] + (k[:, :, i] * (end - total[:, :, i]).exp()[..., None]).mT @ v[:, :, i]
    return torch.cat(out, 2), s


RULES: dict[str, Rule] = {"gated": gated, "channels": channels, "linear": linear}


def inputs(name: str, t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(t)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    heads = 2 if name == "gated" else 4
    decay = -draw(2, t, 4, 8).exp() if name == "channels" else -draw(2, t, 4).exp()
    given = (draw(2, t, heads, 8), draw(2, t, heads, 8), draw(2, t, 4, 6), decay, draw(2, t, 4).sigmoid(), draw(2, 4, 8, 6))
    return tuple(x.to(dtype) for x in given)


def widened(fn: Rule, args: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph of a function in which no value is narrower than float64."""
    gm = graph_of(fn, args)

    def wide(x: Argument) -> Argument:
        return torch.float64 if x is torch.float32 else x

    for n in gm.graph.nodes:
        n.args, n.kwargs = fx.node.map_aggregate(n.args, wide), fx.node.map_aggregate(n.kwargs, wide)
    gm.recompile()
    gm = graph_of(gm, args)
    gm = functional(gm) or gm
    erase_dead(gm)
    return gm


def found(gm: fx.GraphModule) -> tuple[FoundScan, Scan]:
    (one,), misses = scans(gm.graph, Counter())
    assert not misses
    return one


@pytest.mark.parametrize(
    ("name", "t"),
    few([("linear", 48), *((n, t) for n in ("gated", "channels") for t in (128, 130, 200))], ("linear", 48), ("gated", 130)),
)
def test_a_loop_over_chunks_is_the_recurrence_over_its_tokens(name: str, t: int) -> None:
    args = inputs(name, t)
    gm = widened(RULES[name], args)
    scan, _ = found(gm)
    values = values_of(gm, args)
    kernel = build(scan.recurrence)
    assert isinstance(kernel, ScanKernel), kernel
    # over tokens, those that pad the last chunk among them
    tokens = scan.recurrence.cascade.rank[scan.recurrence.rank].size
    assert tokens == (t if name == "linear" else -(-t // 64) * 64)
    form = low_rank(scan.recurrence, scan.recurrence.states[0])
    assert isinstance(form, LowRank)
    assert ((form.read is not None), form.key in form.factor.ranks) == (name != "linear", name == "channels")
    shapes = {n: scan.recurrence.cascade.tensor[n].shape for n in kernel.inputs}
    got = dict(zip(kernel.outputs, kernel.entry(*(values[scan.tensors[n]].reshape(shapes[n]) for n in kernel.inputs))))
    assert set(scan.results) == {"O", "S"}
    for n, node in scan.results.items():
        want = values[node]
        assert (got[n].reshape(want.shape) - want).abs().max() <= 1e-14 * want.abs().max()


def test_rows_that_are_substituted_one_by_one_are_an_inverse() -> None:
    def substituted(x: Tensor, grown: bool = False) -> Tensor:
        x = x.tril(-1)
        for i in range(1, 6):
            row, above = x[..., i, :i].clone(), x[..., :i, :i].clone()
            x[..., i, :i] = (2 if grown else 1) * row + (row[..., None] * above).sum(-2)
        return x + torch.eye(6, dtype=x.dtype)

    def one(fn: Callable[[Tensor], Tensor], x: Tensor) -> int:
        gm = graph_of(fn, (x,))
        gm = functional(gm) or gm
        erase_dead(gm)
        return len(inverses(gm.graph.nodes, gm.graph, Aliases(gm.graph)))

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    low = x.tril(-1)
    torch.testing.assert_close(substituted(x.clone()), torch.linalg.inv(torch.eye(6, dtype=x.dtype) - low))
    assert one(lambda y: substituted(y) * 1, x) == 1
    assert one(lambda y: substituted(y, True) * 1, x) == 0
    assert one(lambda y: (substituted(y) + torch.eye(6, dtype=x.dtype).flip(0)) * 1, x) == 1


def bad(name: str) -> Rule:
    """Chunks of linear attention that are no recurrence over tokens, by one change."""

    def fn(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor) -> Results:
        if name == "sees ahead":
            return masked(q, k, v, g, s, 2)
        if name == "leaves itself out":
            return masked(q, k, v, g, s, 0)
        n = k.shape[1] // 16
        q, k, v = (x.transpose(1, 2).reshape(2, 4, n, 16, -1) for x in (q, k, v))
        total = g.transpose(1, 2).reshape(2, 4, n, 16).cumsum(-1)
        pairs = (q @ k.mT) * (total[..., None] - total[..., None, :]).masked_fill(
            torch.ones(16, 16, dtype=torch.bool).triu(1), -math.inf).exp()
        out = []
        for i in range(n):
            here, end = total[:, :, i], total[:, :, i, -1:]
            key = k[:, :, i] if name == "never fades" else k[:, :, i] * (end - here).exp()[..., None]
            query = q[:, :, i] * (2.0 if name == "reads twice as much" else 1.0) * here.exp()[..., None]
            if name == "another decay":
                end = 2 * end
            if name == "reads behind":
                s = s * end.exp()[..., None] + key.mT @ v[:, :, i]
            out.append(query @ s + pairs[:, :, i] @ v[:, :, i])
            if name != "reads behind":
                s = s * end.exp()[..., None] + key.mT @ v[:, :, i]
        return torch.cat(out, 2), s

    return fn


@pytest.mark.parametrize(("name", "why"), one_in(2, [
    ("sees ahead", "others than those up to itself"), ("leaves itself out", "others than those up to itself"),
    ("never fades", "not what its tokens would compute"), ("reads twice as much", "not what its tokens would compute"),
    ("another decay", "no running sum|fades otherwise|no exponential"), ("reads behind", "after it has changed"),
]))
def test_chunks_that_are_no_recurrence_stay_chunks(name: str, why: str) -> None:
    gm = widened(bad(name), inputs("linear", 48))
    scan, made = found(gm)
    assert scan.recurrence.cascade.rank[scan.recurrence.rank].size == 3
    assert any(w in made.apart for w in why.split("|")), made.apart
    assert not isinstance(build(scan.recurrence), ScanKernel)


class Model(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Tensor) -> Results:
        return RULES[self.name](*args)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_model_runs_our_scan_instead_of_its_chunks(dtype: torch.dtype) -> None:
    args = inputs("gated", 130, dtype)
    torch._dynamo.reset()
    own, exact = gated(*args), found_exactly(args)
    model = reattend.optimize(Model("gated").eval(), policy=reattend.Policy(tune=False, deny=("original",)))
    with torch.no_grad():
        got = model(*args)
    report = reattend.report(model)
    (site,) = [s for p in report.pieces if p.plan for s in p.plan.sites]
    assert (site.kind, site.choice) == ("scan", "reattend")
    assert site.traits == {"decay", "delta"}
    assert not [m for p in report.pieces if p.plan for m in p.plan.misses]
    assert [c.verdict for c in report.checks] == ["same"]
    for x, y, z in zip(got, own, exact):
        assert x.dtype == y.dtype
        errors = [float((a.double() - z).abs().max()) for a in (x, y)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * float(z.abs().max())


def found_exactly(args: tuple[Tensor, ...]) -> Results:
    """The token form in float64."""
    q, k, v, g, beta, s = (x.double() for x in args)
    q, k = (x.repeat_interleave(2, 2) for x in (q, k))
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    out = []
    for t in range(q.shape[1]):
        s = s * g[:, t].exp()[..., None, None]
        delta = (v[:, t] - (s * k[:, t, ..., None]).sum(-2)) * beta[:, t, :, None]
        s = s + k[:, t, ..., None] * delta[..., None, :]
        out.append((s * q[:, t, ..., None]).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1), s


@pytest.mark.slow
def test_export_and_dynamo_see_the_same_recurrence() -> None:
    """Under export the model's own code substitutes row by row, elsewhere it asks for a solver."""
    plan = reattend.plan(Model("gated").eval(), inputs("gated", 130, torch.float32))
    (site,) = plan.sites
    assert (site.kind, site.choice) == ("scan", "reattend")
    assert site.traits == {"decay", "delta"}
    assert not plan.misses


def test_products_of_a_recurrence_that_stays_are_no_misses() -> None:
    """The model writes what chunks give in place, so that its graph stays as it is where its own code does."""
    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Results:
            return gated(*args)

    torch._dynamo.reset()
    args = inputs("gated", 130, torch.float32)
    ours = reattend.optimize(Model().eval(), policy=reattend.Policy(deny="reattend"))
    ours(*args)
    report = reattend.report(ours)
    assert [s.site.kind for s in report.sites] == ["scan"]
    assert not report.misses
