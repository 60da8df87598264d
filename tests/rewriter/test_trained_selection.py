"""Training through selections: gradients go where the gather read, as autograd's of the model's own code in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reattend.codegen.cpu.kernel import TrainedKernel, build_trained
from reattend.codegen.operator import program_text
from reattend.codegen.trained import call
from reattend.cost_model.devices.device import shipped
from reattend.cost_model.time.predict import ranked_mappings
from reattend.patterns.verdict import Obstacle

from .test_selection import (
    INF,
    LOWEST,
    SELECTED,
    SPELLINGS,
    K,
    N,
    causal,
    found,
    index_score,
    operands,
    waves,
)

Function = Callable[..., Tensor]


def trained(fn: Function, *args: Tensor, of: int = 3) -> None:
    """The gradients of the first arguments, through the gather, are those of the function, to rounding in float64."""
    here, tensors, _ = found(fn, *args)
    made = build_trained(here.cascade, SELECTED)
    assert isinstance(made, TrainedKernel), made
    out, saved = made.forward(*(tensors[n] for n in made.inputs))
    grad = waves(*out.shape, a=0.77)
    wanted = [i for i, n in enumerate(made.inputs) if tensors[n].is_floating_point()]
    names = [made.inputs[i] for i in wanted]
    got = dict(zip(names, made.backward(grad, out, saved, wanted, *(tensors[n] for n in made.inputs))))

    leaves = [x.clone().requires_grad_(i < of) for i, x in enumerate(args)]
    value = fn(*leaves)
    torch.testing.assert_close(out.reshape(value.shape), value.detach(), rtol=0, atol=1e-13, equal_nan=True)
    truth = torch.autograd.grad(value, leaves[:of], grad.reshape(value.shape), allow_unused=True)
    # which of the cascade's inputs is which argument: by its elements, which nobody else has
    for x, g in zip(args, truth):
        (name,) = (n for n in names if tensors[n].data_ptr() == x.data_ptr() or torch.equal(tensors[n].flatten(), x.flatten()))
        expected = torch.zeros_like(x) if g is None else g
        scale = max(float(expected.nan_to_num().abs().max()), 1.0)
        torch.testing.assert_close(got[name].reshape(x.shape), expected, rtol=0, atol=1e-12 * scale, equal_nan=True)


@pytest.mark.thin(3)
@pytest.mark.parametrize("masked", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(masked: Callable[[Tensor, Tensor], Tensor]) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        top = i.masked_fill(~causal(), -INF).topk(K, -1).indices
        return masked(q @ k.mT * 5**-0.5, top).softmax(-1) @ v

    trained(f, *operands(), index_score())


def named(masked_by: float) -> Function:
    """Rows that name keys, of which a finite fill is the score of all others."""

    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        seen = causal() & (torch.arange(N) >= 5)
        top = i.masked_fill(~seen, -INF).topk(K, -1).indices
        mask = torch.zeros(N, N, dtype=torch.float64).masked_fill(~seen, masked_by)
        mask = mask.masked_fill(torch.ones(N, N, dtype=torch.bool).scatter(-1, top, False), masked_by)
        return (q @ k.mT * 5**-0.5 + mask).softmax(-1) @ v

    return f


@pytest.mark.parametrize("fill", [LOWEST, -INF], ids=["mean of all values", "nan"])
def test_rows_without_a_visible_key(fill: float) -> None:
    """Rows 0 … 4 reach all values, or make all gradients NaN that the model's own code makes so."""
    trained(named(fill), *operands(), index_score())


def test_by_sdpa() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        top = i.masked_fill(~causal(), -INF).topk(K, -1).indices
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, top, True) & causal()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    trained(f, *operands(), index_score())


def test_a_key_that_is_named_twice_counts_once() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, names, True)
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v

    trained(f, *operands(), torch.randint(0, 6, (N, 9), generator=torch.Generator().manual_seed(0)))


def test_names_of_nobody_beside_rows_of_nobody() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, names: Tensor) -> Tensor:
        counts = torch.zeros(N, N, dtype=torch.int32)
        counts.scatter_add_(-1, names.clamp(0, N - 1), (names.ge(0) & names.lt(N)).to(torch.int32))
        return (q @ k.mT).masked_fill(~counts.ne(0), LOWEST).softmax(-1) @ v

    names = torch.randint(-3, N + 3, (N, 9), generator=torch.Generator().manual_seed(0))
    names[3], names[N - 1] = -1, N
    trained(f, *operands(), names)


def test_blocks_of_keys_by_group() -> None:
    size, blocks, some = 8, 5, 36

    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        p = torch.arange(some)
        best = i.masked_fill((torch.arange(blocks) * size)[None] > p[:, None], -INF).topk(3, -1)
        names = torch.where(best.values == -INF, -1, best.indices)
        mask = torch.full((2, some, blocks + 1), -INF, dtype=torch.float64)
        mask.scatter_(-1, torch.where(names < 0, blocks, names), 0.0)
        keep = (mask[..., :-1] == 0.0).repeat_interleave(size, -1)[..., :some].repeat_interleave(2, 0)
        keep = keep & (p[None] <= p[:, None])
        s = q @ k.repeat_interleave(2, 0).mT + torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, LOWEST)
        return s.softmax(-1) @ v.repeat_interleave(2, 0)

    trained(f, waves(4, some, 5, a=0.37), waves(2, some, 5, a=0.41), waves(2, some, 6, a=0.43), waves(2, some, blocks, a=0.7))


def test_one_of_two_joined_key_sets_is_named() -> None:
    """A window of near keys, and of entries those that a row names."""
    near, far = 24, 16

    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        behind = torch.arange(N)[:, None] * 24 // N - torch.arange(near)
        window = torch.zeros(N, near, dtype=torch.float64).masked_fill(~((behind >= 0) & (behind < 8)), LOWEST)
        names = torch.full((N, far), -INF, dtype=torch.float64).scatter(-1, i[:, :far].topk(3, -1).indices, 0.0)
        return (q @ k.mT * 5**-0.5 + torch.cat([window, names], -1)).softmax(-1) @ v

    trained(f, *operands(), index_score())


def test_keys_that_are_the_values() -> None:
    """One tensor for both gets both gradients."""

    def f(q: Tensor, k: Tensor, i: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, i.topk(K, -1).indices, True) & causal()
        return (q @ k.mT).masked_fill(~keep, LOWEST).softmax(-1) @ k

    q, k, _ = operands()
    trained(f, q, k, index_score(), of=2)


def test_what_else_the_score_and_the_end_of_a_row_read() -> None:
    """A learned table of positions, gathered at the keys, a slope for each head, and a sink that takes a part of each row."""

    def f(q: Tensor, k: Tensor, v: Tensor, table: Tensor, slope: Tensor, sink: Tensor, i: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, i.topk(K, -1).indices, True) & causal()
        s = q @ k.mT + table + slope[:, None, None] * (torch.arange(N)[None] - torch.arange(N)[:, None])
        s = torch.cat([s.masked_fill(~keep, -INF), sink[:, None, None].expand(-1, N, 1)], -1)
        return s.softmax(-1)[..., :-1] @ v

    trained(f, *operands(), waves(N, N, a=0.3), waves(2, a=0.8), waves(2, a=1.9), index_score(), of=6)


def test_another_row_rule() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
        keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, i.topk(K, -1).indices, True) & causal()
        return torch.where(keep, torch.sigmoid(3.0 * torch.tanh(q @ k.mT)), 0.0) @ v

    trained(f, *operands(), index_score())


# --- through the operator -------------------------------------------------------------------------------------------


def causal_top(q: Tensor, k: Tensor, v: Tensor, i: Tensor) -> Tensor:
    low = torch.finfo(q.dtype).min
    top = i.masked_fill(~causal(), -INF).topk(K, -1).indices
    keep = torch.zeros(N, N, dtype=torch.bool).scatter(-1, top, True) & causal()
    return (q @ k.mT * 5**-0.5).masked_fill(~keep, low).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_narrow_types(dtype: torch.dtype) -> None:
    """As near to float64 as the model's own code is, twice at most."""
    q, k, v = (x.to(dtype) for x in operands())
    here, tensors, want = found(causal_top, q, k, v, index_score())
    program, names = program_text(here.cascade, SELECTED), [t.name for t in here.cascade.inputs]
    grad = waves(*want.shape, a=0.77)

    def errors(fn: Callable[[], tuple[Tensor, list[Tensor]]]) -> list[float]:
        value, leaves = fn()
        got = torch.autograd.grad(value.double().reshape(grad.shape), leaves, grad)
        return [float((g.double() - t.reshape(g.shape)).square().mean().sqrt()) for g, t in zip(got, truth)]

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth = torch.autograd.grad(causal_top(exact[0], exact[1], exact[2], index_score()), exact, grad)

    def own() -> tuple[Tensor, list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        return causal_top(leaves[0], leaves[1], leaves[2], index_score()), leaves

    def ours() -> tuple[Tensor, list[Tensor]]:
        leaves = {n: tensors[n].clone().requires_grad_() for n in ("Q", "K", "V")}
        return call([leaves.get(n, tensors[n]) for n in names], [], program), list(leaves.values())

    for mine, theirs in zip(errors(ours), errors(own), strict=True):
        assert mine <= 2 * theirs + 1e-9


def test_opcheck() -> None:
    q, k, v = (x.float() for x in operands())
    here, tensors, _ = found(causal_top, q, k, v, index_score())
    given = [t.clone().requires_grad_(t.is_floating_point()) for t in (tensors[x.name] for x in here.cascade.inputs)]
    torch.library.opcheck(torch.ops.reattend.cascade_trained.default, (given, [], program_text(here.cascade, SELECTED)))


def test_its_backward_is_priced_with_what_is_scattered() -> None:
    """Beside the forward, gradients of gathered keys are written and added up: more than the backward of a dense body."""
    q, k, v = (x.float() for x in operands())
    here, _, _ = found(causal_top, q, k, v, index_score())

    def seconds(wanted: tuple[str, ...] | None) -> dict[str, float]:
        ranked = ranked_mappings(here.cascade, shipped("cpu"), {}, wanted=wanted)
        assert not isinstance(ranked, Obstacle)
        return {m.body: c.seconds for m, c in reversed(ranked)}

    forward, step = seconds(None), seconds(("Q", "K", "V"))
    assert step["selected"] / forward["selected"] > step["product"] / forward["product"]
