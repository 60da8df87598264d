"""Gradients of what is no operand in the fused backward: biases, slopes, tables, temperatures, gates, sinks, scales.

By the project's error rule for gradients, as those of the tiled torch body. Each kernel is two compiles of about a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reattend.codegen import trained
from reattend.codegen.cpu.kernel import build_trained
from reattend.codegen.forms.program import loose, program_text
from reattend.patterns import expr as ex
from reattend.patterns.expr import Expr
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Refusal

from .. import strategies
from ..strategies import SCORES
from ..tiers import few
from .attentions import CAUSAL, VARIANTS, B, Case, H, M, N, P, S, T, added, aux, build, masked, windows
from .test_cpu import TYPES
from .test_training_product import check, floats, kernel, multiplied, written

pytestmark = pytest.mark.thin(3)

TILES = TileMapping(32, 32, body="fused")
OTHERS = {"Q", "K", "V"}
# Scores that read a float of their own.
READING = [n for n in SCORES if n in ("slope", "bias", "temperature", "table", "gate")]
LOOKED = ex.load("place", (P, M), "i64")


def wanting(x: dict[str, Tensor], names: set[str] | None = None) -> dict[str, Tensor]:
    """The inputs, of which the named ones, else all floats, need a gradient."""
    chosen = names if names is not None else set(floats(x))
    return {n: t.detach().clone().requires_grad_(n in chosen) for n, t in x.items()}


def of_case(case: Case, x: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    given = wanting(x if x is not None else case.inputs())
    assert not kernel(case.cascade, TILES).without
    found = check(case.cascade, given, case.sizes, TILES)
    for n in set(found) - OTHERS:
        assert found[n].count_nonzero() > 0, n
    return found


@pytest.mark.parametrize("piece", few(READING, "table"))
def test_of_every_score(piece: str) -> None:
    p = strategies.attention(SCORES[piece], strategies.ROWS["softmax"], p=70, m=70, b=2, h=4, group=2)
    found = check(p.cascade, wanting(p.inputs(1)), p.sizes, TILES)
    for n in set(found) - OTHERS:
        assert found[n].count_nonzero() > 0


def in_type(make: Callable[[str], Case], dtype: str) -> None:
    """Operands, leaf and output in one type."""
    case = make(dtype)
    of_case(case, {n: t.to(TYPES[dtype]) if t.is_floating_point() else t for n, t in case.inputs(TYPES[dtype]).items()})


def alibi(dtype: str) -> Case:
    slope = ex.cast(ex.load("slope", (H,), dtype), "f32")
    return build(lambda s: added(CAUSAL)(s + slope * ex.cast(M - P, "f32")), aux=(aux("slope", (4,), dtype),), square=True,
                 dtype=dtype, p=70, m=70)


def bias(dtype: str) -> Case:
    return build(lambda s: s + ex.cast(ex.load("bias", (ex.const(0), H, P, M), dtype), "f32"),
                 aux=(aux("bias", (1, 4, S, T), dtype),), dtype=dtype, p=70, m=70)


def sinks(dtype: str) -> Case:
    return build(added(CAUSAL), sink=ex.cast(ex.load("sink", (H,), dtype), "f32"), aux=(aux("sink", (4,), dtype),),
                 square=True, group=2, dtype=dtype, p=70, m=70)


@pytest.mark.parametrize(("make", "dtype"), few([(m, t) for m in (alibi, bias, sinks) for t in ("bf16", "f16")], (alibi, "bf16")))
def test_in_16_bits(make: Callable[[str], Case], dtype: str) -> None:
    in_type(make, dtype)


@pytest.mark.slow
def test_sinks_and_a_factor_outside_of_the_product() -> None:
    case = build(added(CAUSAL), square=True, sink=ex.load("sink", (H,), "f32"), aux=(aux("sink", (4,)),), p=70, m=70)
    c = multiplied(case.cascade, "QK", ex.load("tau", (H,), "f32"), aux("tau", (4,)))
    found = of_case(Case(c, case.sizes), {**case.inputs(), "tau": torch.tensor([0.5, -1.0, 2.0, 0.0])})
    assert found["tau"].count_nonzero() == 4


def test_batches_and_heads_that_share_a_bias_take_turns() -> None:
    """One bias of pairs for all: no two threads add to one place, and every run gives the same bits."""
    def score(s: Expr) -> Expr:
        return added(CAUSAL)(s + ex.load("bias", (P, M), "f32"))

    case = build(score, aux=(aux("bias", (S, S)),), square=True, group=2, p=70, m=70)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, second = (of_case(case) for _ in range(2))
        assert all(torch.equal(first[n], second[n]) for n in first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_bias_of_some_leading_ranks() -> None:
    """Windows of images: a table of heads for all windows, of which there are several in an image."""
    found = of_case(windows())
    assert found["table"].shape == (2, 16, 16)


@pytest.mark.slow
def test_a_table_that_is_looked_up_by_a_tensor_of_places() -> None:
    """Swin: places of a table for each query and key, read through a tensor of integers."""
    case = build(lambda s: s + ex.load("table", (LOOKED, H), "f32"), aux=(aux("table", (9, 4)), aux("place", (S, T), "i64")), p=70, m=70)
    x = case.inputs()
    x["place"] = torch.randint(0, 9, x["place"].shape, generator=torch.Generator().manual_seed(2))
    of_case(case, x)


@pytest.mark.slow
def test_a_bias_of_keys_and_slopes_at_once() -> None:
    def score(s: Expr) -> Expr:
        slope, own = ex.load("slope", (H,), "f32"), ex.load("own", (B, M), "f32")
        return added(CAUSAL)(s + slope * ex.cast(M - P, "f32") + own)

    of_case(build(score, aux=(aux("slope", (4,)), aux("own", (N, S))), square=True, p=70, m=70))


@pytest.mark.slow
def test_only_what_is_wanted_is_added_up() -> None:
    """A mask of floats that needs no gradient costs none: its sums are not even allocated."""
    def score(s: Expr) -> Expr:
        return s + ex.load("slope", (H,), "f32") * ex.cast(M - P, "f32") + ex.load("bias", (ex.const(0), H, P, M), "f32")

    case = build(score, aux=(aux("slope", (4,)), aux("bias", (1, 4, S, T))), p=70, m=70)
    x = case.inputs()
    flow = torch.randn(2, 4, 70, 16)
    exact = written(case.cascade, x, case.sizes, flow, True)
    for names in ({"slope"}, {"bias"}, {"slope", "bias"}, {"Q"}):
        y = wanting(x, names)
        out = trained.call([y[t.name] for t in case.cascade.inputs], [case.sizes[s] for s in loose(case.cascade)], program_text(case.cascade, TILES))
        found = torch.autograd.grad(out, [y[n] for n in sorted(names)], flow)
        for n, g in zip(sorted(names), found):
            torch.testing.assert_close(g.double(), exact[n].double(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_on_other_numbers_of_threads() -> None:
    """Segments of keys, which follow the number of threads, change roundings alone; one head, so that there are segments."""
    case = build(lambda s: added(CAUSAL)(s + ex.load("table", (ex.minimum(P - M, 31) + 32, H), "f32")),
                 aux=(aux("table", (64, 1)),), square=True, b=1, h=1, p=300, m=300)
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            of_case(case)
    finally:
        torch.set_num_threads(threads)


def test_what_a_rounded_output_tells_too_little_of_is_left_to_another_body() -> None:
    """δ = Σ dOut·out of an output in bfloat16 is off by more than a gradient in float32 may be."""
    case = VARIANTS["alibi"](dtype="bf16", p=70, m=70)
    assert kernel(case.cascade, TILES).without == ("slope",)
    refused = build_trained(case.cascade, replace(TILES, body="product"))
    assert not isinstance(refused, Refusal)
    assert not refused.without
    y = wanting(case.inputs(torch.bfloat16), {"Q", "slope"})
    tensors = [y[t.name] for t in case.cascade.inputs]
    with pytest.raises(RuntimeError, match="no gradient of slope"):
        trained.call(tensors, [], program_text(case.cascade, TILES))


def test_a_row_without_a_key_passes_nothing_to_its_leaves() -> None:
    """The model sets such rows to 0; tiles of them are visited all the same where their data may make them NaN."""
    def score(s: Expr) -> Expr:
        return masked(M <= P - 40)(s + ex.load("slope", (H,), "f32") * ex.cast(M - P, "f32"))

    of_case(build(score, zero=True, square=True, aux=(aux("slope", (4,)),), p=100, m=100))
