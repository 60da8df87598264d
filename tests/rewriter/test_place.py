"""Places: what an attention really reads of what stands before it, and a name of its own for each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.cost_model.sites.site import ORIGINAL, Site

OURS = reattend.Policy(allow="reattend", deny="original")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


class Layers(nn.Module):
    """Two attentions, the second after the first; `part` says what the second borrows of what came before it."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x + attend(self.q(x), self.k(x), x)
        q, k = self.q(y), self.k(y)
        turned = q * 0.8 + torch.cat((-q[..., 8:], q[..., :8]), -1) * 0.6
        if self.part == "empty":
            # a rotary part as wide as the head: nothing is passed through
            q = torch.cat((turned, q[..., 16:]), -1)
        else:
            q = turned
        s = q @ k.transpose(-1, -2) * 0.25
        if self.part == "like":
            s = s + torch.zeros_like(y[..., :1])
        out: Tensor = y + s.softmax(-1) @ self.v(y)
        return out


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def sites(model: nn.Module, *args: Tensor) -> tuple[Site, ...]:
    """The sites that our kernel was forced on; the output is that of the original."""
    expected = model(*args)
    run = reattend.optimize(model, policy=OURS)
    with torch.no_grad():
        torch.testing.assert_close(run(*args), expected, atol=1e-5, rtol=1e-5)
    return tuple(s.site for s in reattend.report(run).sites)


@pytest.mark.parametrize("part", ["none", "empty", "like"])
def test_what_lends_only_its_shape_is_no_part_of_an_attention(part: str) -> None:
    assert [s.choice for s in sites(Layers(part).eval().requires_grad_(False), torch.randn(2, 24, 16))] == ["reattend"] * 2


def test_what_lends_its_type_to_itself_is_read_all_the_same() -> None:
    class Twin(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            s = q @ k.transpose(-1, -2)
            return s.type_as(s).softmax(-1) @ v, s.sum(-1)

    q, k, v = (torch.randn(2, 4, 24, 16) for _ in range(3))
    (site,) = reattend.plan(Twin(), (q, k, v)).sites
    assert site.choice == ORIGINAL
    assert "read elsewhere" in site.chosen.why


def test_a_mask_that_is_expanded_to_the_scores_reads_none_of_them() -> None:
    class Filled(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
            s = q @ k.transpose(-1, -2)
            mask = (keep == 0).view(2, 1, 1, 24).expand_as(s)
            s.masked_fill_(mask, torch.finfo(s.dtype).min)
            return s.softmax(-1) @ v

    q, k, v = (torch.randn(2, 4, 24, 16) for _ in range(3))
    keep = (torch.arange(24) < torch.tensor([24, 9])[:, None]).long()
    (site,) = sites(Filled(), q, k, v, keep)
    assert site.choice == "reattend"


def test_attentions_of_one_module_have_names_of_their_own() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attend(x, x, x) + attend(x, x.flip(1), x).tanh()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Twice()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.pair(x)
            return out

    x = torch.randn(2, 24, 16)
    assert [s.name for s in sites(Model(), x)] == ["pair", "pair#2"]
    plan = reattend.plan(Model(), (x,))
    assert [s.name for s in plan.sites] == ["pair", "pair#2"]
    run = reattend.optimize(Model(), policy=OURS)
    with torch.no_grad():
        for _ in range(4):
            run(x)
    # each was timed by itself
    assert len({s.measured for s in reattend.report(run).sites}) == 2


def test_a_chain_of_projections_is_no_attention() -> None:
    """Relative positions: (x · W + bias) · positionsᵀ are two products as of a linear attention, and W is a weight."""

    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 4, 16) / 4)
            self.bias = nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            q = torch.einsum("bph,hne->bpne", x, self.w) + self.bias
            return torch.einsum("bpne,bmne->bnpm", q, positions)

    plan = reattend.plan(Relative().eval(), (torch.randn(2, 24, 16), torch.randn(2, 40, 4, 16)))
    assert not plan.sites


def test_scores_over_two_kinds_of_keys_are_left_alone_with_a_reason() -> None:
    """Rows normalised over global and local keys, of which the product takes only the local ones."""

    class Mixed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, globally: Tensor) -> Tensor:
            s = torch.cat((q @ globally.transpose(-1, -2), q @ k.transpose(-1, -2)), -1)
            return s.softmax(-1)[..., 8:] @ v

    q, k, v = (torch.randn(2, 4, 24, 16) for _ in range(3))
    model = Mixed()
    args = (q, k, v, torch.randn(2, 4, 8, 16))
    plan = reattend.plan(model, args)
    assert all(s.choice == ORIGINAL for s in plan.sites)
    assert any("would come after it" in m.reason for m in plan.misses)
    run = reattend.optimize(model)
    torch.testing.assert_close(run(*args), model(*args))
    assert not any(p.error for p in reattend.report(run).pieces)
