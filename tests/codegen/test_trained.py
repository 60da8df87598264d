"""The operators that are trained: gradients against autograd in float64, and what torch asks of an operator.

Each kernel is two compiles of about a second: a few run in the fast tier, the breadth is marked slow.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reattend.codegen import trained
from reattend.codegen.files import cache
from reattend.codegen.forms.program import loose, program_text
from reattend.codegen.forms.skip import idle_without_a_key, vanishes_backwards
from reattend.patterns import expr as ex
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal
from tests.codegen.attentions import CAUSAL, VARIANTS, Case, aux, build, masked, no_batch, windows
from tests.codegen.test_cpu import TYPES, interleaved

TILES = TileMapping(32, 32, body="fused")
op = torch.ops.reattend.cascade_trained.default
# A gradient is a longer chain of rounded steps than a result, and weights are made again: so many times the own code's error.
RMS, MOST = 2.0, 4.0
FAST = {("causal_padding", "bf16"), ("sinks", "f32")}
EVERY = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in FAST else pytest.mark.slow)
    for i, name in enumerate(sorted(VARIANTS)) for dtype in TYPES
    # terms are printed alike in every type, operands are read alike in every attention
    if {"f32": True, "bf16": i % 2 == 0 or (name, dtype) in FAST, "f16": name in ("gqa", "causal_padding")}[dtype]
]


def arguments(case: Case, x: Mapping[str, Tensor], tiles: TileMapping = TILES) -> tuple[list[Tensor], list[int], str]:
    c = case.cascade
    return [x[t.name] for t in c.inputs], [case.sizes[s] for s in loose(c)], program_text(c, tiles)


def wanting(x: Mapping[str, Tensor], names: Sequence[str] = ("Q", "K", "V"), wide: bool = False) -> dict[str, Tensor]:
    """The inputs anew, of which the named ones need a gradient."""
    wider = {n: t.double() if wide and t.is_floating_point() else t for n, t in x.items()}
    return {n: t.detach().clone().requires_grad_(n in names) for n, t in wider.items()}


def ours(case: Case, x: Mapping[str, Tensor], flow: Tensor, tiles: TileMapping = TILES) -> list[Tensor]:
    """The output and the gradients of Q, K and V."""
    y = wanting(x)
    out = trained.call(*arguments(case, y, tiles))
    return [out.detach(), *torch.autograd.grad(out, [y[n] for n in "QKV"], flow)]


def written(case: Case, x: Mapping[str, Tensor], flow: Tensor, wide: bool) -> list[Tensor]:
    y = wanting(x, wide=wide)
    out = evaluate(case.cascade, y, case.sizes, widen=wide)[case.cascade.outputs[0]]
    return [out.detach(), *torch.autograd.grad(out, [y[n] for n in "QKV"], flow.to(out.dtype))]


def flow_of(case: Case, x: Mapping[str, Tensor]) -> Tensor:
    out = evaluate(case.cascade, x, case.sizes)[case.cascade.outputs[0]]
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)


def check(case: Case, x: Mapping[str, Tensor], tiles: TileMapping = TILES) -> None:
    """No further from float64 than the model's own code by more than a factor; NaN stands where that has it."""
    flow = flow_of(case, x)
    found, own, exact = ours(case, x, flow, tiles), written(case, x, flow, False), written(case, x, flow, True)
    for name, a, o, e in zip(("out", "dQ", "dK", "dV"), found, own, exact):
        assert (a.shape, a.dtype) == (o.shape, o.dtype), name
        assert torch.equal(a.isnan(), e.isnan()), name
        off, theirs = ((t.double() - e)[~e.isnan()] for t in (a, o))
        if not off.numel():
            continue
        # of one key all cancels: what is left is rounding, in float32, of sums of numbers of size 1
        ulp = max(2 * torch.finfo(a.dtype).eps * float(e[~e.isnan()].abs().max()), 8 * torch.finfo(torch.float32).eps)
        assert float(off.pow(2).mean().sqrt()) <= max(RMS * float(theirs.pow(2).mean().sqrt()), ulp), name
        assert float(off.abs().max()) <= max(MOST * float(theirs.abs().max()), 4 * ulp), name


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_gradients(name: str, dtype: str) -> None:
    case = VARIANTS[name](dtype=dtype)
    check(case, case.inputs(TYPES[dtype]))


def test_inputs_in_another_order_than_the_file_has_them() -> None:
    case = VARIANTS["sinks"]()
    x = case.inputs()
    made = trained.build(case.cascade, replace(TILES, body="product"))
    assert isinstance(made, trained.TrainedKernel), made
    names = ("sink", "V", "Q", "K")
    turned = trained._as_called(made, names, made.sizes)
    assert (turned.inputs, made.inputs) == (names, ("Q", "K", "sink", "V"))
    sizes = {n: case.sizes[n] for n in made.sizes}
    with torch.no_grad():
        own = made.forward(*[x[n] for n in made.inputs], **sizes)
        got = turned.forward(*[x[n] for n in names], **sizes)
        # gradients of K and V, by their places
        dk, dv = made.backward(own[0], *own, [1, 3], *[x[n] for n in made.inputs], **sizes)
        k, v = turned.backward(own[0], *own, [3, 1], *[x[n] for n in names], **sizes)
    assert all(map(torch.equal, (*own, dk, dv), (*got, k, v)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [windows, no_batch])
def test_other_ranks(make: object) -> None:
    assert callable(make)
    case = make()
    check(case, case.inputs())


@pytest.mark.parametrize("name", [pytest.param("sdpa_padding", marks=pytest.mark.slow), pytest.param("padding", marks=pytest.mark.slow), "nan_padding"])
def test_rows_without_a_key(name: str) -> None:
    """What such rows pass back is what autograd passes back, NaN included."""
    case = VARIANTS[name](p=100, m=100)
    x = case.inputs()
    x["pad"][0, :9] = False
    x["pad"][1] = False
    check(case, x)


def test_one_kernel_for_every_length() -> None:
    """One query, one key, sizes that are no multiple of a tile, many tiles of keys for few queries and the other way round."""
    for p, m in ((1, 1), (1, 33), (33, 1), (100, 70), (5, 700), (700, 5)):
        case = VARIANTS["cross"](p=p, m=m, b=1)
        check(case, case.inputs(seed=p))


def test_tiles_of_which_no_key_is_kept_are_left_out_and_nothing_else() -> None:
    case = build(masked(CAUSAL & (ex.index("p") - ex.index("m") < 40)), square=True, group=2, p=333, m=333)
    check(case, case.inputs())


@pytest.mark.slow
def test_operands_that_are_no_view() -> None:
    check(interleaved("f32"), interleaved("f32").inputs())


def test_keys_that_are_the_values_get_both_gradients() -> None:
    """One tensor as both: its gradient is the sum."""
    case = VARIANTS["gqa"]()
    x = case.inputs()
    y = wanting({**x, "V": x["K"]})
    flow = flow_of(case, {**x, "V": x["K"]})
    tensors, sizes, text = arguments(case, {**y, "V": y["K"]})
    (both,) = torch.autograd.grad(trained.call(tensors, sizes, text), [y["K"]], flow)
    _, _, k, v = ours(case, {**x, "V": x["K"]}, flow)
    torch.testing.assert_close(both, k + v)


def test_the_same_again_and_on_other_numbers_of_threads() -> None:
    """Every run gives the same bits; segments of keys, which follow the number of threads, change roundings alone."""
    case = build(masked(CAUSAL), square=True, b=1, h=1, p=300, m=300)
    x, threads = case.inputs(), torch.get_num_threads()
    flow = flow_of(case, x)
    found = {}
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found[n] = ours(case, x, flow)
            assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(found[n], ours(case, x, flow)))
    finally:
        torch.set_num_threads(threads)
    for n in (2, 3):
        for a, b in zip(found[1], found[n]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_what_is_wanted() -> None:
    case = VARIANTS["gqa"]()
    x = case.inputs()
    flow = flow_of(case, x)
    whole = dict(zip("QKV", ours(case, x, flow)[1:]))
    for names in ("Q", "K", "V", "KV"):
        y = wanting(x, names)
        found = torch.autograd.grad(trained.call(*arguments(case, y)), [y[n] for n in names], flow)
        assert all(torch.equal(g, whole[n]) for g, n in zip(found, names)), names
    y = wanting(x)
    # a gradient without memory of its own
    (found_v,) = torch.autograd.grad(trained.call(*arguments(case, y)).sum(), [y["V"]])
    assert torch.equal(found_v, ours(case, x, torch.ones_like(flow))[3])


def test_what_is_only_compared_with_has_no_gradient() -> None:
    """As in autograd: None, where a gradient of 0 would move an optimizer with a momentum."""
    least = ex.load("least", (ex.index("h"),), "f32")
    case = build(lambda s: ex.where(s > least, s, -1e9), aux=(aux("least", (4,)),), p=40, m=40)
    y = wanting(case.inputs(), ("Q", "K", "V", "least"))
    for body in ("fused", "product"):
        out = trained.call(*arguments(case, y, replace(TILES, body=body)))
        found = torch.autograd.grad(out.sum(), [y[n] for n in ("Q", "least")], allow_unused=True)
        assert found[0] is not None
        assert found[1] is None


def test_what_has_no_gradient_is_refused() -> None:
    """A bias in float32 beside an output that was rounded."""
    case = VARIANTS["bias"](dtype="bf16")
    y = wanting(case.inputs(torch.bfloat16), ("Q", "bias"))
    with pytest.raises(RuntimeError, match="no gradient of bias"):
        trained.call(*arguments(case, y))
    check(case, case.inputs(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of another processor")
@pytest.mark.parametrize("flags", ["-march=haswell", "-march=x86-64"])
def test_on_narrower_vectors(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = VARIANTS["gqa"](p=70, m=70)
    made = trained.build(case.cascade, TILES)
    assert not isinstance(made, Refusal), made
    module = cache.load(made.source)
    monkeypatch.setattr(module, "target_flags", lambda: (flags,))
    for entry in (module.compiled, module.backward_compiled):
        entry.cache_clear()
    try:
        check(case, case.inputs())
    finally:
        for entry in (module.compiled, module.backward_compiled):
            entry.cache_clear()


def test_second_derivatives_are_refused_where_they_are_asked_for() -> None:
    case = VARIANTS["gqa"]()
    y = wanting(case.inputs())
    out = trained.call(*arguments(case, y))
    (first,) = torch.autograd.grad(out.square().sum(), [y["Q"]], create_graph=True)
    (again,) = torch.autograd.grad(trained.call(*arguments(case, y)).square().sum(), [y["Q"]])
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="cascade_backward has no derivative"):
        torch.autograd.grad(first.sum(), [y["K"]])


@pytest.mark.parametrize("name", ["gqa", pytest.param("decode", marks=pytest.mark.slow)])
def test_opcheck(name: str) -> None:
    """Sizes that no input tells are arguments as well: `decode` has one."""
    case = VARIANTS[name]()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments(case, wanting(case.inputs())), test_utils=tests)


def test_under_autocast_and_in_a_checkpoint() -> None:
    """The program says in which type each step is computed; what is run again gives the same."""
    case = VARIANTS["gqa"]()
    x = case.inputs()
    flow = flow_of(case, x)
    plain = ours(case, x, flow)
    y = wanting(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = checkpoint(lambda *t: trained.call(t, *arguments(case, y)[1:]), *arguments(case, y)[0], use_reentrant=False)
        assert torch.equal(out, plain[0])
        found = torch.autograd.grad(out, [y[n] for n in "QKV"], flow)
    assert all(map(torch.equal, found, plain[1:]))


def test_other_bodies_and_row_rules_without_a_backward_are_refused() -> None:
    refused = trained.build(VARIANTS["plain"]().cascade, replace(TILES, body="sdpa"))
    assert isinstance(refused, Refusal)
    assert "a backward" in refused.reason


def test_operands_wider_than_a_rounded_output_are_refused() -> None:
    """δ = Σ dOut·out of an output in bfloat16 is off by more than a gradient in float32 may be."""
    c = VARIANTS["plain"]().cascade
    (out,) = c.outputs
    einsums = tuple(replace(e, body=ex.cast(e.body, "bf16")) if e.out.tensor == out and e.op is None else e for e in c.einsums)
    narrow = replace(c, tensors=tuple(replace(t, dtype="bf16") if t.name == out else t for t in c.tensors), einsums=einsums)
    refused = trained.build(narrow, TILES)
    assert isinstance(refused, Refusal)
    assert "wider operands" in refused.reason


def test_a_tile_is_left_out_only_where_its_gradients_are_0() -> None:
    """exp(x − lse) beside a fill of −∞ passes nothing back; x² does where nothing hides it."""
    x, lse = ex.load("X", (ex.index("p"), ex.index("m")), "f32"), ex.load("LSE", (ex.index("p"),), "f32")
    keep = ex.index("m") <= ex.index("p")
    hidden = ex.where(keep, x, float("-inf"))
    assert vanishes_backwards([ex.exp(hidden - lse)], keep)
    assert not vanishes_backwards([x * x], keep)
    assert vanishes_backwards([ex.where(keep, x * x, 0.0)], keep)
    # a row of −∞ alone has weights that are NaN everywhere, unless 0 is selected
    assert not idle_without_a_key([ex.exp(hidden - lse)], [lse])
    assert idle_without_a_key([ex.where(ex.equal(lse, float("-inf")), 0.0, ex.exp(hidden - lse))], [lse])
