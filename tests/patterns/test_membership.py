"""Membership: an Einsum that looks for a coordinate among indices; what the oracle makes of indices beyond the end."""

from __future__ import annotations

import torch

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.membership import Membership, membership

P, M, J = (ex.index(r) for r in "pmj")
T = ex.load("T", (P, J), "i64")


def among(body: ex.Expr, op: str = "or") -> Einsum:
    return Einsum(Access("IN", (P, M)), body, op, ("j",))


def test_it_is_read_either_way_round() -> None:
    for body in (ex.equal(T, M), ex.equal(M, T)):
        assert membership(among(body)) == Membership(("p",), "m", T, "j")


def test_what_is_no_membership() -> None:
    for body in (ex.equal(T, M + 1), T <= M, ex.equal(ex.load("T", (P, J + M), "i64"), M), ex.equal(T, P * 0 + M * 2)):
        assert membership(among(body)) is None
    assert membership(among(ex.equal(T, M), "and")) is None
    assert membership(among(ex.equal(ex.load("T", (P, J), "f32"), M))) is None


def test_its_meaning() -> None:
    c = verify(
        Cascade(
            "names", (Rank("p", 3), Rank("m", 5), Rank("j", 2)), (Tensor("T", (3, 2), "i64"), Tensor("IN", (3, 5), "b1")),
            (among(ex.equal(T, M)),), ("IN",),
        )
    )
    names = torch.tensor([[4, 4], [-1, 0], [7, 2]])
    expected = (names[:, None, :] == torch.arange(5)[None, :, None]).any(-1)
    assert torch.equal(evaluate(c, {"T": names})["IN"], expected)
