"""What a graph makes of its constants alone is read when planning; anything else behind a tensor, and it is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from reattend.rewriter.capture.export import from_export
from reattend.rewriter.find.constants import constant, constants
from reattend.rewriter.graph.aliases import Aliases


class Holder(nn.Module):
    table: Tensor
    large: Tensor

    def __init__(self, make: Callable[[Holder, Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("table", torch.arange(12).reshape(3, 4))
        self.register_buffer("large", torch.zeros(1).expand(1 << 13, 1 << 13))
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.make(self, x)


def made(make: Callable[[Holder, Tensor], Tensor]) -> fx.Node:
    """The node of what `make` gives."""
    gm = from_export(Holder(make), (torch.zeros(1),), None).graph
    (add,) = [n for n in gm.graph.nodes if n.op == "call_function"][-1:]
    found = add.args[1]
    assert isinstance(found, fx.Node)
    return found


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda h, x: h.table, np.arange(12).reshape(3, 4)),
        (lambda h, x: (h.table[:, :2] * 2).flatten(), np.array([0, 2, 8, 10, 16, 18])),
        (lambda h, x: torch.arange(4)[:, None] >= torch.arange(4), np.tri(4, dtype=bool)),
        (lambda h, x: h.table.chunk(2, 1)[1].to(torch.bfloat16), np.array([[2, 3], [6, 7], [10, 11]], np.float32)),
    ],
    ids=["buffer", "of a buffer", "of positions", "a part, in 16 bits"],
)
def test_constants_are_read(make: Callable[[Holder, Tensor], Tensor], want: np.ndarray) -> None:
    n = made(make)
    found = constant(n, Aliases(n.graph))
    assert found is not None
    np.testing.assert_array_equal(found, want)
    assert constants({"X": n}) == constants({"X": n})


@pytest.mark.parametrize(
    "make",
    [
        lambda h, x: h.table * x.long(),
        lambda h, x: h.weight * 2,
        lambda h, x: torch.rand(3, 4),
        lambda h, x: h.large * 2,
        lambda h, x: h.table.clone().mul_(x.long()),
    ],
    ids=["an input", "a parameter", "random numbers", "too large", "written with an input"],
)
def test_anything_else_is_not_known(make: Callable[[Holder, Tensor], Tensor]) -> None:
    n = made(make)
    assert constant(n, Aliases(n.graph)) is None


def test_what_is_written_is_no_constant() -> None:
    gm = from_export(Holder(lambda h, x: h.table.add_(1)), (torch.zeros(1),), None).graph
    (held,) = [n for n in gm.graph.nodes if n.op == "get_attr" and "table" in str(n.target)]
    assert constant(held, Aliases(gm.graph)) is None
