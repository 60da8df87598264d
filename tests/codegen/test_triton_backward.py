"""Our Triton kernels backwards, in the interpreter, against autograd over the cascade in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from reattend.codegen.files import cache
from reattend.codegen.triton.backward.form import read_backward
from reattend.codegen.triton.backward.kernel import TritonTraining, build
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum
from reattend.patterns.cascade import Tensor as Shape
from reattend.patterns.evaluate import DTYPE, evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal

from .. import strategies
from ..strategies import M, P, Program, attention, programs
from . import attentions, test_leaf_gradients
from .nearness import ULP

pytestmark = [pytest.mark.interpreter, pytest.mark.thin(4)]
PROGRAMS = int(os.environ.get("REATTEND_PROGRAMS", "20"))
SHORT = ("causal", "alibi", "sinks", "mqa_window", "segments")
# Of the error of the same gradients in torch's own operators.
MOST = 2.5


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "directory", lambda: folder)
        yield


def kernel(c: Cascade, tile: tuple[int, int] = (16, 16)) -> TritonTraining:
    made = build(c, TileMapping(*tile))
    assert isinstance(made, TritonTraining), made
    return made


def wanted(made: TritonTraining, c: Cascade) -> list[int]:
    return [i for i, t in enumerate(c.inputs) if t.dtype in ex.FLOATS and t.name not in made.without]


def by_autograd(
    c: Cascade, x: Mapping[str, Tensor], sizes: Mapping[str, int], names: list[str], flow: Tensor, widen: bool
) -> tuple[Tensor, list[Tensor]]:
    given = {n: t.double() if widen and t.is_floating_point() else t for n, t in x.items()}
    given |= {n: given[n].detach().requires_grad_() for n in names}
    out = evaluate(c, given, sizes, widen=widen)[c.outputs[0]]
    found = torch.autograd.grad(out, [given[n] for n in names], flow.to(out.dtype))
    return out.detach(), list(found)


def check(made: TritonTraining, c: Cascade, x: Mapping[str, Tensor], sizes: Mapping[str, int], ulps: float = 4) -> None:
    """Output and gradients at most `MOST` times as far from float64 as torch's own operators, or some units off."""
    places = wanted(made, c)
    names = [c.inputs[i].name for i in places]
    inputs, named = [x[t.name] for t in c.inputs], {n: sizes[n] for n in made.sizes}
    out, saved = made.forward(*inputs, **named)
    flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    want, exact = by_autograd(c, x, sizes, names, flow, widen=True)
    _, plain = by_autograd(c, x, sizes, names, flow, widen=False)
    got = made.backward(flow, out, saved, places, *inputs, **named)
    torch.testing.assert_close(out.isnan(), want.isnan())
    unit = ULP[c.tensor[c.outputs[0]].dtype]
    for name, g, e, p in zip(names, got, exact, plain, strict=True):
        assert g.shape == e.shape, name
        assert g.dtype == x[name].dtype
        here = e.isfinite() & p.isfinite()
        assert bool(g[here].isfinite().all()), name
        if not here.any():
            continue
        error, reference = (float((t.double() - e)[here].abs().max()) for t in (g, p))
        assert error <= MOST * reference + ulps * unit * max(1.0, float(e[here].abs().max())), (name, error, reference)


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in attentions.VARIANTS])
def test_variants(name: str) -> None:
    case = attentions.VARIANTS[name]()
    check(kernel(case.cascade), case.cascade, case.inputs(), case.sizes, ulps=32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["causal", "causal_padding", "softcap", "sinks", "gqa", "mqa_window", "segments", "sigmoid"])
def test_half_precision(name: str, dtype: str) -> None:
    case = attentions.VARIANTS[name](dtype=dtype)
    check(kernel(case.cascade), case.cascade, case.inputs(DTYPE[dtype]), case.sizes)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (17, 5), (63, 63), (40, 111)])
def test_odd_sizes(queries: int, keys: int) -> None:
    p = attention(lambda s: s, strategies.ROWS["softmax"], p=queries, m=keys)
    check(kernel(p.cascade), p.cascade, p.inputs(), p.sizes, ulps=32)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 24, 40, 80, 96])
def test_head_sizes(size: int) -> None:
    p = attention(lambda s: ex.where(M <= P, s, -math.inf), strategies.ROWS["softmax"], e=size, f=size)
    check(kernel(p.cascade), p.cascade, p.inputs(), p.sizes, ulps=32)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (64, 64), (128, 128)])
def test_tiles(tile: tuple[int, int]) -> None:
    p = attention(lambda s: ex.where((M <= P) & (P - M < 40), s, -math.inf), strategies.ROWS["softmax"], p=150, m=150)
    check(kernel(p.cascade, tile), p.cascade, p.inputs(), p.sizes, ulps=32)


def test_tiles_that_no_row_sees_are_not_read() -> None:
    """A window: what lies outside of all windows of a row block, forwards and backwards, may be NaN."""
    p = attention(lambda s: ex.where((M <= P) & (P - M < 8), s, -math.inf), strategies.ROWS["softmax"], p=96, m=96)
    made = kernel(p.cascade)
    assert made.b.skips
    assert made.b.seen is not None
    x = p.inputs()
    inputs, named = [x[t.name] for t in p.cascade.inputs], {n: p.sizes[n] for n in made.sizes}
    out, saved = made.forward(*inputs, **named)
    flow = torch.ones_like(out)
    flow[..., 64:, :] = math.nan
    dq, dk, dv = made.backward(flow, out, saved, [0, 1, 2], *inputs, **named)
    # keys of a block that only rows before 64 see
    assert all(bool(g[..., :48, :].isfinite().all()) for g in (dq, dk, dv))


@pytest.mark.slow
def test_gradients_that_flow_in_strided() -> None:
    """What `sum` sends back is one number, expanded."""
    case = attentions.VARIANTS["gqa"]()
    made = kernel(case.cascade)
    x = case.inputs()
    inputs, named = [x[t.name] for t in case.cascade.inputs], {n: case.sizes[n] for n in made.sizes}
    out, saved = made.forward(*inputs, **named)
    one = torch.ones(()).expand(out.shape)
    first = made.backward(one, out, saved, [0, 1, 2], *inputs, **named)
    second = made.backward(one.contiguous(), out, saved, [0, 1, 2], *inputs, **named)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


LEAVES = ("slope", "bias", "temperature", "table", "gate")


@pytest.mark.parametrize("piece", [n if n == "gate" else pytest.param(n, marks=pytest.mark.slow) for n in LEAVES])
def test_leaves_of_every_kind(piece: str) -> None:
    """Read at rows, at pairs, looked up, at keys that heads share; the same bits every time."""
    p = attention(strategies.SCORES[piece], strategies.ROWS["sink"], p=37, m=37, b=2, h=4, group=2)
    made = kernel(p.cascade)
    assert not made.without
    x = p.inputs(1)
    check(made, p.cascade, x, p.sizes, ulps=32)
    inputs, named = [x[t.name] for t in p.cascade.inputs], {n: p.sizes[n] for n in made.sizes}
    out, saved = made.forward(*inputs, **named)
    first, second = (made.backward(torch.ones_like(out), out, saved, wanted(made, p.cascade), *inputs, **named) for _ in "ab")
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) and a.count_nonzero() for a, b in zip(first, second))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_leaves_in_16_bits(dtype: str) -> None:
    for make in (test_leaf_gradients.alibi, test_leaf_gradients.bias, test_leaf_gradients.sinks):
        case = make(dtype)
        x = {n: t.to(DTYPE[dtype]) if t.is_floating_point() else t for n, t in case.inputs().items()}
        assert not kernel(case.cascade).without
        check(kernel(case.cascade), case.cascade, x, case.sizes)


def test_a_leaf_that_nobody_wants_gets_no_room() -> None:
    case = attentions.VARIANTS["bias"](p=20, m=20)
    made, x = kernel(case.cascade), case.inputs()
    inputs, named = [x[t.name] for t in case.cascade.inputs], {n: case.sizes[n] for n in made.sizes}
    out, saved = made.forward(*inputs, **named)
    asked: list[tuple[int, ...]] = []
    launch = made.module.launch_backward

    def watched(*given: Any) -> None:
        asked.append(tuple(t.numel() for t in given[11]))
        launch(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.module, "launch_backward", watched)
        for places in ([0], list(range(len(inputs)))):
            made.backward(torch.ones_like(out), out, saved, places, *inputs, **named)
    assert asked == [(1,), (2 * 4 * 20 * 20,)]


def test_heads_that_share_keys_are_summed_in_the_kernel() -> None:
    case = attentions.VARIANTS["gqa"]()
    b = read_backward(case.cascade)
    assert not isinstance(b, Refusal)
    assert b.shared == {"b": 1, "h": 2}
    assert [s.ranks for s in b.keys] == [("b", "h", "m", "e"), ("b", "h", "m", "f")]


@pytest.mark.slow
@given(p=programs())
@settings(max_examples=PROGRAMS)
def test_drawn_programs(p: Program) -> None:
    made = build(p.cascade, TileMapping(16, 16))
    # hypothesis fails where too few are left
    assume(isinstance(made, TritonTraining))
    assert isinstance(made, TritonTraining)
    check(made, p.cascade, p.inputs(), p.sizes, ulps=64)


def test_what_it_does_not_do_is_said() -> None:
    computed = attention(lambda s: s, strategies.ROWS["softmax"])
    assert isinstance(build(computed.cascade, TileMapping(16, 16, split_m=4)), Refusal)
    wide = attention(lambda s: s, strategies.ROWS["softmax"], e=128, f=128).cascade
    fits, not_there = (build(wide, TileMapping(64, 64), target) for target in ("sm_90", "sm_80"))
    assert isinstance(fits, TritonTraining)
    assert isinstance(not_there, Refusal)
    assert "shared memory" in not_there.reason
    # δ of an output that was rounded tells too little of a bias in float32
    assert kernel(attentions.VARIANTS["bias"](dtype="bf16").cascade).without == ("bias",)


def test_the_file_stands_alone() -> None:
    """Gradients from the emitted text, without reattend."""
    case = attentions.VARIANTS["causal"]()
    made = kernel(case.cascade)
    assert "reattend" not in made.source.replace("Generated by reattend", "")
    x = case.inputs()
    inputs, named = [x[t.name] for t in case.cascade.inputs], {n: case.sizes[n] for n in made.sizes}
    out = torch.empty_like(inputs[0])
    saved = made.module.attention(*inputs, out=out)
    found = made.module.backward(torch.ones_like(out), out, saved, [0, 1, 2], *inputs)
    assert [g.shape for g in found] == [t.shape for t in inputs]
    assert not named


def test_a_log_sum_exp_that_leaves_is_handed_over_and_passes_its_gradient_on() -> None:
    """dS = w·(dW − δ + dlse): the gradient of what leaves stands where that stood."""
    p = attention(lambda s: ex.where(M <= P, s, -math.inf), strategies.ROWS["softmax"], p=45, m=45, group=2)
    at = tuple(map(ex.index, "bhp"))
    rows = [e.out.tensor for e in p.cascade.einsums if e.over == ("m",) and e.out.tensor != "O"]
    top, total = (ex.load(name, at, "f32") for name in rows)
    shape = tuple(p.cascade.rank[r].size for r in "bhp")
    c = replace(
        p.cascade, outputs=("O", "L"), tensors=(*p.cascade.tensors, Shape("L", shape)),
        einsums=(*p.cascade.einsums, Einsum(Access("L", at), top + ex.unary("log", total))),
    )
    made, x = kernel(c), p.inputs()
    inputs, named = [x[t.name] for t in c.inputs], {n: p.sizes[n] for n in made.sizes}
    out, saved = made.forward(*inputs, **named)
    given = [t.double().requires_grad_() for t in inputs]
    exact = evaluate(c, dict(zip((t.name for t in c.inputs), given)), p.sizes, widen=True)
    assert made.row_dims == ((1,), (), (2,))
    torch.testing.assert_close(saved[..., 0].transpose(0, 1).double(), exact["L"].detach(), rtol=1e-5, atol=1e-5)
    g = torch.Generator().manual_seed(2)
    flow, of_row = torch.randn(out.shape, generator=g), torch.randn(exact["L"].shape, generator=g)
    want = torch.autograd.grad([exact["O"], exact["L"]], given, [flow.double(), of_row.double()])
    saved[..., 0] = of_row.transpose(0, 1)
    got = made.backward(flow, out, saved, wanted(made, c), *inputs, **named)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)
