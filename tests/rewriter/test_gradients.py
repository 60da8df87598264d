"""The backward of what is found in a graph: its gradients, passed on to the function's arguments, are those of autograd.

    function → cascade → backward cascade → gradients of the cascade's inputs → (autograd) → gradients of the arguments
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import reattend
from reattend.codegen.cpu.kernel import TrainedKernel, build_trained
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.backward.adjoint import Adjoint, adjoint
from reattend.patterns.backward.gradient import gradient
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.rewriter.find import detect
from tests.tiers import few

from .helpers import graph_of, recorded
from .test_detect import REFUSED, spellings


def passed_on(fn: Callable[..., Tensor], args: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    gm = graph_of(fn, args)
    found, _ = detect.find(gm)
    assert found
    xs = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    leaves = [x for x in xs if x.requires_grad]
    values = recorded(gm, xs)[1]
    for f in found:
        out = values[f.output]
        d = torch.randn(out.shape, dtype=out.dtype)
        wanted = torch.autograd.grad(out, leaves, d, allow_unused=True, retain_graph=True)
        ours = of_cascade(f.cascade, {n: values[x] for n, x in f.tensors.items()}, d)
        outputs = [(x, g) for x, g in ours if x.requires_grad]
        through = torch.autograd.grad(
            [x for x, _ in outputs], leaves, [g.reshape(x.shape).to(x.dtype) for x, g in outputs],
            allow_unused=True, retain_graph=True,
        )
        for x, mine, theirs in zip(leaves, through, wanted, strict=True):
            zero = torch.zeros_like(x)
            torch.testing.assert_close(
                zero if mine is None else mine, zero if theirs is None else theirs, rtol=tolerance, atol=tolerance, equal_nan=True
            )


def of_cascade(c: Cascade, tensors: dict[str, Tensor], d: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(input of the cascade, its gradient)"""
    made, a = gradient(c), attention(c)
    assert isinstance(made, Cascade), made
    assert isinstance(a, Attention)
    known = adjoint(a)
    assert isinstance(known, Adjoint)
    given = {n: t.detach() for n, t in tensors.items()}
    shape = evaluate(c, given)[c.outputs[0]].shape
    found = evaluate(made, {**given, str(known.dout.attr): d.reshape(shape)})
    return [(tensors[n.rstrip("_")[1:]], g) for n, g in found.items()]


@pytest.mark.parametrize("name", [n for n in spellings.CASES if n not in REFUSED])
def test_of_every_spelling(name: str) -> None:
    torch.manual_seed(0)
    args = [a.detach().double() if a.is_floating_point() else a for a in spellings.CASES[name]["args"]()]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        passed_on(spellings.CASES[name]["fn"], args, 1e-6 if name == "upcast_bf16" else 1e-9)
    finally:
        torch.set_default_dtype(default)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """With many that are exactly 0, where a clamp and a maximum pass different gradients on."""
    return torch.relu(q) @ torch.relu(-k).mT


@pytest.mark.parametrize(
    "floor",
    [
        lambda s: s.clamp(min=0.0), lambda s: torch.maximum(s, torch.zeros_like(s)), lambda s: torch.relu(s),
        lambda s: -torch.minimum(-s, torch.zeros_like(s)), lambda s: -(-s).clamp(max=0.0),
    ],
)
def test_ties(floor: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 2, dtype=torch.float64)
    assert (scores(q, k) == 0).any()
    passed_on(lambda q, k, v: floor(q @ k.mT) @ v, [torch.relu(q), torch.relu(-k), v])


def cleaned(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    w = (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1)
    return w.masked_fill(w.isnan(), 0.0) @ v


@pytest.mark.parametrize("body", few(["fused", "product"], "product"))
def test_a_row_that_is_nan_and_set_to_0_passes_nothing_to_the_values(body: str) -> None:
    """The gradients of its scores are NaN, as autograd's are."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16, generator=g) for _ in range(3))
    q[0, 1, 20] = float("nan")
    keep = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    keep[..., :5, :] = False
    gm = graph_of(cleaned, (q, k, v, keep))
    (found,), _ = detect.find(gm)
    values = recorded(gm, [q, k, v, keep])[1]
    made = build_trained(found.cascade, TileMapping(32, 32, body=body))
    assert isinstance(made, TrainedKernel), made
    given = [values[found.tensors[n]] for n in made.inputs]
    flow = torch.randn(1, 2, 70, 16, generator=g)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(cleaned(leaves[0], leaves[1], leaves[2], keep), leaves, flow)
    floats = [i for i, x in enumerate(given) if x.is_floating_point()]
    with torch.no_grad():
        out, saved = made.forward(*given)
        gradients = made.backward(flow.reshape(out.shape), out, saved, floats, *given)
    of = {made.inputs[i]: x for i, x in zip(floats, gradients, strict=True)}
    for x, own in zip((q, k, v), wanted, strict=True):
        (mine,) = (of[n] for n in of if values[found.tensors[n]].data_ptr() == x.data_ptr())
        torch.testing.assert_close(mine.reshape(own.shape), own, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not wanted[2].isnan().any()
    assert wanted[0].isnan().any()


def test_a_coordinate_of_rows_that_a_loop_reads_by_another_name_is_not_hidden() -> None:
    """Rows in groups, whose own place is read by the mask of scores and by that of weights."""
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = torch.einsum("bhpge,bhme->bhpgm", q.view(2, 3, 6, 4, 8), k) * 0.3
        row, m = torch.arange(6)[:, None, None] * 4 + torch.arange(4)[:, None], torch.arange(24)
        w = s.masked_fill((m - row).abs() > 4, -torch.inf).softmax(-1)
        return torch.einsum("bhpgm,bhmf->bhpgf", w.masked_fill((m + 4 + row * 13) // 14 == 23, 0.0), v)

    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return attend(*args)

    torch._dynamo.reset()
    torch.manual_seed(0)
    args = [torch.randn(2, 3, 24, 8).requires_grad_() for _ in range(3)]
    ours = reattend.optimize(Model(), policy=reattend.Policy(allow="reattend", deny="original", check="never"))
    for a, b in zip(*(torch.autograd.grad(f(*args).square().sum(), args) for f in (ours, attend))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
