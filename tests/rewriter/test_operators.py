"""One rule an operator: the term of every element equals what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Tensor, verify
from reattend.patterns.evaluate import DTYPE_NAME, evaluate
from reattend.patterns.operators import OPERATORS, Operator
from reattend.rewriter.graph.aliases import Aliases
from reattend.rewriter.lift.index import ZERO
from reattend.rewriter.lift.lift import Lifter
from reattend.rewriter.lift.rules import RULES

from .helpers import graph_of, values_of

torch.manual_seed(0)
X = torch.randn(4, 6, 8)
Y = torch.randn(4, 6, 8)
I = torch.arange(-12, 36).reshape(6, 8)  # noqa: E741
KEEP = torch.rand(4, 6, 8) > 0.4
AT = torch.tensor([3, -1, 0])

VIEWS: list[Callable[..., Any]] = [
    lambda x: x.reshape(24, 8), lambda x: x.view(2, 2, 48), lambda x: x.flatten(1), lambda x: x.unflatten(2, (2, 4)),
    lambda x: x.transpose(0, 2), lambda x: x.permute(2, 0, 1), lambda x: x.mT, lambda x: x.unsqueeze(1),
    lambda x: x[:, :, None, 2:7:2], lambda x: x[-1], lambda x: x[..., -3:], lambda x: x[1:-1, ::3],
    lambda x: x.expand(5, 4, 6, 8), lambda x: x.repeat(2, 1, 3), lambda x: x.repeat_interleave(3, 1), lambda x: x.flip(1),
    lambda x: x.roll((1, -2), (0, 2)), lambda x: x.unfold(2, 4, 2), lambda x: F.pad(x, (1, 2, 0, 3)),
    lambda x: F.pad(x, (-1, 2), value=0.5), lambda x: torch.cat([x, x * 2, x[:1]]), lambda x: torch.stack([x, x + 1], 1),
    lambda x: x.split(4, 2)[1], lambda x: x.chunk(3, 1)[2], lambda x: x.unbind(1)[4], lambda x: x.movedim(0, 2),
    lambda x: x.narrow(2, 3, 4), lambda x: x.squeeze(), lambda x: x.tril(1), lambda x: x.triu(-1), lambda x: x[AT],
    lambda x: x[:, AT], lambda x: x[:, AT, AT], lambda x: x[AT, :, AT], lambda x: x.index_select(1, AT.abs()),
    lambda x: x.gather(2, (I % 8).expand(4, 6, 8)), lambda x: F.embedding(I % 4, x[:, 0]), lambda x: x.swapaxes(1, 2),
]
POINT: list[Callable[..., Any]] = [
    lambda x, y: x + 2 * y, lambda x, y: torch.add(x, y, alpha=3), lambda x, y: torch.sub(x, y, alpha=0.5),
    lambda x, y: 1 - x, lambda x, y: torch.rsub(x, y, alpha=2), lambda x, y: x * y / 3, lambda x, y: x.div(y, rounding_mode="floor"),
    lambda x, y: x.div(y, rounding_mode="trunc"), lambda x, y: x.fmod(0.7), lambda x, y: x.remainder(0.7),
    lambda x, y: x**2, lambda x, y: x.abs() ** 0.5, lambda x, y: x.abs() ** y, lambda x, y: x.square(),
    lambda x, y: x.clamp(-0.5, 0.5), lambda x, y: x.clamp(min=y), lambda x, y: x.clamp_min(0), lambda x, y: torch.maximum(x, y),
    lambda x, y: torch.where(x > y, x, 0.0), lambda x, y: x.masked_fill(y < 0, -1e9), lambda x, y: (x < y) & (x > 0),
    lambda x, y: torch.logical_xor(x > 0, y > 0), lambda x, y: ~(x > 0), lambda x, y: (x / (y > 0)).nan_to_num(0.0, 1.0, -1.0),
    lambda x, y: (x / 0).nan_to_num(), lambda x, y: F.softplus(x), lambda x, y: x.sigmoid(), lambda x, y: x.tanh(),
    lambda x, y: F.relu(x), lambda x, y: F.silu(x), lambda x, y: x.exp2(), lambda x, y: x.abs().log1p(), lambda x, y: x.erf(),
    lambda x, y: x.abs().rsqrt(), lambda x, y: x.cos() * y.sin(), lambda x, y: x.floor() + y.ceil(),
    lambda x, y: (x > 0).to(torch.float32) * y, lambda x, y: x.to(torch.bfloat16), lambda x, y: x.to(torch.bfloat16) * 3 + 0.1,
    lambda x, y: (x * 10).to(torch.int64) // 3, lambda x, y: (x * 10).to(torch.int64) % -4, lambda x, y: x.isnan(),
    lambda x, y: torch.full_like(x, 3.0) - torch.ones_like(y), lambda x, y: F.dropout(x, 0.3, training=False),
    lambda x, y: x + torch.arange(8) * 0.5, lambda x, y: x + torch.arange(2, 14, 2)[:, None], lambda x, y: x * torch.eye(6, 8),
    lambda x, y: x.new_ones(4, 1, 1) * y, lambda x, y: F.logsigmoid(x), lambda x, y: x.type_as(y) - y.detach(),
    lambda x, y: x + torch.arange(8).diff(prepend=torch.tensor([-1])), lambda x, y: x + torch.ones(8, dtype=torch.int64).cumsum(0),
]
REDUCED: list[Callable[..., Any]] = [
    lambda x: x.softmax(-1), lambda x: x.softmax(1), lambda x: x.log_softmax(0), lambda x: x.logsumexp(1), lambda x: x.amax(2),
    lambda x: x.max(1).values, lambda x: x.min(-1, keepdim=True)[0], lambda x: x.sum((0, 2)), lambda x: x.mean(1, keepdim=True),
    lambda x: x - x.mean(), lambda x: x @ x.mT, lambda x: torch.einsum("bij,bkj->kib", x, x), lambda x: x @ x[0, 0],
    lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5, alpha=2.0), lambda x: (x[:, :, None] * x[:, None]).sum(-1),
    lambda x: F.linear(x, x[0]), lambda x: torch.bmm(x, x.mT), lambda x: torch.einsum("bij->bji", x),
    lambda x: torch.einsum("...ij,kj->...ik", x, x[1]), lambda x: F.softmax(x.to(torch.bfloat16), -1, dtype=torch.float32),
]


def lifted_equals_torch(fn: Callable[..., Any], *args: torch.Tensor) -> None:
    gm = graph_of(fn, args)
    (output,) = next(n for n in gm.graph.nodes if n.op == "output").all_input_nodes
    value = output.meta["val"]
    lifter = Lifter(gm.graph, Aliases(gm.graph), RULES)
    at = []
    for d, s in enumerate(value.shape):
        lifter.ranks[f"d{d}"] = s
        at.append(ZERO if s == 1 else ex.index(f"d{d}"))
    body = lifter.value(output, tuple(at))
    index = tuple(i for i in at if i is not ZERO)
    lifter.tensors["Z"] = Tensor("Z", tuple(s for s in value.shape if s != 1), DTYPE_NAME[value.dtype])
    lifter.einsums.append(Einsum(Access("Z", index), body))
    used = {str(r.attr) for e in lifter.einsums for r in e.reads} | {e.out.tensor for e in lifter.einsums}
    tensors = tuple(t for t in lifter.tensors.values() if t.name in used)
    c = verify(Cascade("test", lifter.rank_list(), tensors, tuple(lifter.einsums), ("Z",)))
    computed = [n for n in lifter.leaves.values() if n.op == "call_function" and lifter.leaves]
    assert not [n for n in computed if n.name in {str(x.attr) for x in ex.loads(body)}], "the operator was not lifted"
    values = values_of(gm, args)
    given = {n: values[lifter.leaves[n]] for n in lifter.leaves if n in c.tensor}
    got = evaluate(c, given)["Z"].reshape(value.shape)
    want = fn(*args)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("i", range(len(VIEWS)))
def test_views_move_coordinates(i: int) -> None:
    lifted_equals_torch(VIEWS[i], X)


@pytest.mark.parametrize("i", range(len(POINT)))
def test_pointwise_operators_build_terms(i: int) -> None:
    lifted_equals_torch(POINT[i], X, Y)


def test_a_running_sum_of_data_is_none_of_a_constant_where_the_last_place_is_padded() -> None:
    gm = graph_of(lambda x: F.pad(x, (0, 2)).cumsum(-1)[..., -1], (X,))
    (output,) = next(n for n in gm.graph.nodes if n.op == "output").all_input_nodes
    lifter = Lifter(gm.graph, Aliases(gm.graph), RULES)
    lifter.ranks.update({"d0": 4, "d1": 6})
    value = lifter.value(output, (ex.index("d0"), ex.index("d1")))
    assert value.op == "load"
    assert lifter.leaves[str(value.attr)].target is torch.ops.aten.cumsum.default


@pytest.mark.parametrize("o", [o for o in OPERATORS.values() if o.result == "float"], ids=lambda o: o.name)
def test_every_function_of_the_table_builds_a_term(o: Operator) -> None:
    lifted_equals_torch(o.in_torch(torch), *(X, Y)[: o.arity])


@pytest.mark.parametrize("i", range(len(REDUCED)))
def test_reductions_define_einsums(i: int) -> None:
    lifted_equals_torch(REDUCED[i], X)
