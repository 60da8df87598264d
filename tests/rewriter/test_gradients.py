"""The backward of what is found in a graph: its gradients, passed on to the function's arguments, are those of autograd.

    function → cascade → backward cascade → gradients of the cascade's inputs → (autograd) → gradients of the arguments
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.backward.adjoint import Adjoint, adjoint
from reattend.patterns.backward.gradient import gradient
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.rewriter.find import detect

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
