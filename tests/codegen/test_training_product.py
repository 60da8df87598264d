"""Gradients in tiled torch: every float input's, of every attention and drawn ones, by the project's error rule for gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

from reattend.codegen.cpu.kernel import TrainedKernel, build_trained
from reattend.patterns import expr as ex
from reattend.patterns.backward.gradient import gradient
from reattend.patterns.cascade import Cascade
from reattend.patterns.cascade import Tensor as Tensor_
from reattend.patterns.evaluate import evaluate
from reattend.patterns.expr import Expr
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal
from reattend.rewriter.check.compare import MAX_RATIO, errors
from reattend.rewriter.check.gradient import FLAT, LONGER, drowned

from .. import strategies
from ..strategies import INF, SCORES, Program, programs
from .attentions import CAUSAL, PAD, VARIANTS, B, Case, H, M, N, P, S, T, added, aux, build, masked, no_batch, windows
from .test_cpu import TYPES, interleaved

pytestmark = pytest.mark.thin(2)

TILES = TileMapping(16, 16, body="product")
# More scores than a call may have that looks for no tiles to skip.
LONG = {"p": 70, "m": 70}
Values = Mapping[str, Tensor]


def kernel(c: Cascade, tiles: TileMapping = TILES) -> TrainedKernel:
    made = build_trained(c, tiles)
    assert isinstance(made, TrainedKernel), made
    return made


def floats(x: Values) -> list[str]:
    return [n for n, t in x.items() if t.is_floating_point()]


def ours(c: Cascade, x: Values, sizes: Mapping[str, int], flow: Tensor, tiles: TileMapping = TILES) -> dict[str, Tensor]:
    k = kernel(c, tiles)
    given, own = [x[n] for n in k.inputs], {n: sizes[n] for n in k.sizes}
    wanted = [i for i, n in enumerate(k.inputs) if n in floats(x)]
    with torch.no_grad():
        out, saved = k.forward(*given, **own)
        found = k.backward(flow, out, saved, wanted, *given, **own)
    assert saved.shape[-1] == k.scalars
    return {k.inputs[i]: g for i, g in zip(wanted, found, strict=True)}


def written(c: Cascade, x: Values, sizes: Mapping[str, int], flow: Tensor, wide: bool) -> dict[str, Tensor]:
    y = {n: t.double() if wide and t.is_floating_point() else t for n, t in x.items()}
    y = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in y.items()}
    out = evaluate(c, y, sizes, widen=wide)[c.outputs[0]]
    found = torch.autograd.grad(out, [y[n] for n in floats(x)], flow.to(out.dtype), allow_unused=True)
    return {n: torch.zeros_like(y[n]) if g is None else g for n, g in zip(floats(x), found)}


def check(c: Cascade, x: Values, sizes: Mapping[str, int], tiles: TileMapping = TILES) -> dict[str, Tensor]:
    out = evaluate(c, x, sizes)[c.outputs[0]]
    flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    found = ours(c, x, sizes, flow, tiles)
    own, exact = (written(c, x, sizes, flow, wide) for wide in (False, True))
    for n, mine in found.items():
        assert (mine.shape, mine.dtype) == (own[n].shape, own[n].dtype), n
        e = errors(mine, own[n], exact[n])
        rms, most = LONGER * max(e.own_rms, e.floor), LONGER * MAX_RATIO * max(e.own_largest, e.floor)
        assert e.within((rms, most)) or cancels(c, x, sizes, flow, n, mine, exact[n]), f"{n}: {e}"
    return found


def cancels(c: Cascade, x: Values, sizes: Mapping[str, int], flow: Tensor, name: str, mine: Tensor, exact: Tensor) -> bool:
    """Is it off by no more than rounding of what it cancels from? That shows on random numbers and scores near 0."""
    def there(share: float) -> Tensor:
        g = torch.Generator().manual_seed(1)
        noise = {n: torch.randn(t.shape, generator=g) * (share if n == name else 1.0) for n, t in x.items() if n in floats(x)}
        return written(c, {n: noise[n].to(t.dtype) if n in noise else t for n, t in x.items()}, sizes, flow, True)[name]

    return drowned(mine, exact, [(there(FLAT), there(FLAT / 2))])


def of_case(case: Case, dtype: str = "f32") -> dict[str, Tensor]:
    return check(case.cascade, case.inputs(TYPES[dtype]), case.sizes)


EVERY = [pytest.param(n, t, marks=[] if t == "f32" or n in ("gqa", "padding") else pytest.mark.slow) for n in VARIANTS for t in TYPES]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_of_a_variant(name: str, dtype: str) -> None:
    of_case(VARIANTS[name](dtype=dtype) if name == "decode" else VARIANTS[name](**LONG, dtype=dtype), dtype)


@pytest.mark.parametrize("make", [windows, no_batch, lambda: interleaved("f32")])
def test_of_other_ranks(make: Callable[[], Case]) -> None:
    of_case(make())


@pytest.mark.parametrize("tile", [8, 128])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 33), (33, 1), (5, 700), (150, 40)])
def test_of_odd_sizes(p: int, m: int, tile: int) -> None:
    case = VARIANTS["cross"](p=p, m=m, b=1)
    check(case.cascade, case.inputs(), case.sizes, TileMapping(tile, tile, body="product"))


@pytest.mark.parametrize("fill", [-INF, -1e9])
@pytest.mark.parametrize("zero", [False, True])
def test_of_rows_without_a_key(fill: float, zero: bool) -> None:
    """A row that is NaN has NaN in the gradients of all values, of tiles that hold none of its keys too."""
    case = build(masked((M <= P - 40) & PAD, fill), zero=zero, aux=(aux("pad", (N, T), "b1"),), p=100, m=100)
    x = case.inputs()
    found = check(case.cascade, x, case.sizes)
    assert bool(found["V"].isnan().all()) == (fill == -INF and not zero)


@pytest.mark.parametrize("piece", SCORES)
def test_of_every_score(piece: str) -> None:
    """Biases, slopes, tables, temperatures and gates: summed over what they lack, gathered where they are looked up."""
    p = strategies.attention(SCORES[piece], strategies.ROWS["softmax"], p=70, m=70, b=2, h=4, group=2)
    x = p.inputs(1)
    found = check(p.cascade, x, p.sizes)
    for n in set(floats(x)) - {"Q", "K", "V"}:
        assert found[n].count_nonzero() > 0


@pytest.mark.slow
@given(programs(longest=63))
def test_of_drawn_attentions(p: Program) -> None:
    assume("leveled" not in p.label)
    assume(not ("zero" in p.label and "barred" in p.label))
    check(p.cascade, p.inputs(1), p.sizes)


def multiplied(c: Cascade, name: str, factor: Expr, tensor: Tensor_) -> Cascade:
    """With one more factor inside an Einsum."""
    einsums = tuple(replace(e, body=e.body * factor) if e.out.tensor == name else e for e in c.einsums)
    return replace(c, einsums=einsums, tensors=(*c.tensors, tensor))


def test_a_sink_and_a_factor_of_the_scores_outside_of_the_product() -> None:
    tau = ex.load("tau", (H,), "f32")

    case = build(added(CAUSAL), square=True, p=70, sink=ex.load("sink", (H,), "f32"), aux=(aux("sink", (4,)),))
    c = multiplied(case.cascade, "QK", tau, aux("tau", (4,)))
    x = {**case.inputs(), "tau": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    found = check(c, x, case.sizes)
    assert found["tau"].count_nonzero() == 4
    assert found["sink"].count_nonzero() == 4


def test_values_of_which_a_part_is_masked() -> None:
    """What the operands are made of gets its gradient through them."""
    case = VARIANTS["plain"](p=9, m=70)
    c = multiplied(case.cascade, "N", ex.load("open", (B, M), "f32"), aux("open", (N, T)))
    x = {**case.inputs(), "open": torch.rand(2, 70)}
    assert check(c, x, case.sizes)["open"].count_nonzero() > 0


def test_empty_tiles_are_left_out() -> None:
    """A window: the walk visits the tiles that its forward visits, and no other."""
    case = VARIANTS["window"](p=200, m=200)
    k = kernel(case.cascade)
    text = k.source[k.source.index("def backward(") :]
    assert "planned(n, s)" in text
    of_case(case)


def test_the_same_bits_every_time() -> None:
    p = strategies.attention(SCORES["table"], strategies.ROWS["softmax"], p=70, m=70, b=2, h=4, group=2)
    x = p.inputs(1)
    flow = torch.randn(2, 4, 70, 16)
    first, second = (ours(p.cascade, x, p.sizes, flow) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_only_what_is_wanted() -> None:
    case = VARIANTS["alibi"](p=20)
    k, x = kernel(case.cascade), case.inputs()
    given = [x[n] for n in k.inputs]
    with torch.no_grad():
        out, saved = k.forward(*given)
        (found,) = k.backward(torch.ones_like(out), out, saved, [k.inputs.index("slope")], *given)
    assert found.shape == x["slope"].shape


def refused(c: Cascade) -> str:
    made = build_trained(c, TILES)
    assert isinstance(made, Refusal)
    return made.reason


def test_refusals_say_why() -> None:
    assert "which key has a maximum's gradient" in refused(strategies.attention(lambda s: s, strategies.ROWS["leveled"]).cascade)
    gate = ex.load("gate", (B, H, P, ex.index("f")), "f32")
    gated = build(lambda s: s, finish=lambda n: n * gate, aux=(aux("gate", (N, 4, S, 16)),))
    assert "value by value" in refused(gated.cascade)
    assert "float64" in refused(build(lambda s: s, dtype="f64").cascade)


def test_the_oracle_has_the_same() -> None:
    """The printed walk and the backward cascade are two readings of one adjoint."""
    case = VARIANTS["gqa"](p=20)
    made, x = gradient(case.cascade), case.inputs()
    assert isinstance(made, Cascade)
    flow = torch.randn(2, 4, 20, 16)
    cascade = evaluate(made, {**x, "dO": flow}, case.sizes)
    found = ours(case.cascade, x, case.sizes, flow)
    for n in "QKV":
        torch.testing.assert_close(found[n], cascade[f"d{n}"], rtol=1e-4, atol=1e-5)


