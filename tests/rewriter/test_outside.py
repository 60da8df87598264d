"""What a graph does outside of its attentions: products by shape and how devices divide them, passes by bytes, weights once."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.cost_model.layer.work import COLUMNS, INNER, LayerProduct, LayerWork, Pass, Weights
from reattend.cost_model.mesh.mesh import MeshError
from reattend.cost_model.plan.plan import Plan
from reattend.rewriter.capture import export
from reattend.rewriter.choose.outside import outside
from reattend.rewriter.find.detect import find
from reattend.rewriter.graph.liveness import erase_dead

F = nn.functional


class Block(nn.Module):
    """A decoder layer with a norm before each half, and a head."""

    def __init__(self, gated: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)
        self.o = nn.Linear(64, 64, bias=False)
        self.up, self.gate, self.down = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)
        self.one, self.two = nn.RMSNorm(64), nn.RMSNorm(64)
        self.head = nn.Linear(64, 500, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        q = self.q(y).unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = (layer(y).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        y = self.two(x)
        out: Tensor = self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))
        return out


def work_of(model: nn.Module, *args: Tensor, found: int = 1) -> LayerWork:
    with torch.no_grad():
        gm = export.from_export(model.eval(), args, {}).graph
    erase_dead(gm)
    attentions, _ = find(gm)
    assert len(attentions) == found
    return outside(gm, attentions)


def products(work: LayerWork) -> dict[tuple[object, ...], LayerProduct]:
    return {(p.rows, p.inner, p.columns): p for p, _ in work.products}


def test_products_of_one_input_are_one_and_attention_is_none_of_them() -> None:
    work = work_of(Block(), torch.randn(2, 8, 64))
    assert set(products(work)) == {(16, 64, 128), (16, 64, 64), (16, 64, 192), (16, 96, 64), (16, 64, 500)}
    assert all(n == 1 for _, n in work.products)


def test_columns_are_cut_before_and_the_inner_dimension_behind_what_is_computed_by_heads_or_channels() -> None:
    work = work_of(Block(), torch.randn(2, 8, 64))
    cuts = {key[1:]: p.cut for key, p in products(work).items()}
    assert cuts == {(64, 128): COLUMNS, (64, 64): INNER, (64, 192): COLUMNS, (96, 64): INNER, (64, 500): COLUMNS}
    assert work.sums == ((16 * 64 * 4, 2),)


def test_the_head_is_told_from_what_others_read() -> None:
    assert [p.columns for p in products(work_of(Block(), torch.randn(2, 8, 64))).values() if p.last] == [500]


def test_what_lies_between_products_reads_and_writes_once() -> None:
    passes = dict(work_of(Block(), torch.randn(2, 8, 64)).passes)
    token = 16 * 4
    # the first norm; the sum and the second one; the gate; the last sum
    assert passes == {
        Pass(token * 64 + 4 * 64, token * 64): 1, Pass(2 * token * 64 + 4 * 64, 2 * token * 64): 1,
        Pass(2 * token * 96, token * 96, True): 1, Pass(2 * token * 64, token * 64): 1,
    }


def test_every_parameter_is_counted_once_and_the_head_is_not_stored_in_a_narrower_type() -> None:
    model = Block()
    weights = work_of(model, torch.randn(2, 8, 64)).weights
    assert sum(w.elements for w in weights) == sum(p.numel() for p in model.parameters())
    assert {(w.products, w.cut): w.elements for w in weights} == {
        (True, True): 64 * (128 + 64 + 192) + 96 * 64, (False, True): 500 * 64, (False, False): 128,
    }


class Latents(nn.Module):
    """A product whose columns a norm needs all of: no device may have a part of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.norm, self.high = nn.Linear(64, 24, bias=False), nn.RMSNorm(16), nn.Linear(16, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.low(x).split([16, 8], -1)
        out: Tensor = self.high(self.norm(a)).relu().sum(-1) + b.sum(-1)
        return out


def test_columns_that_meet_in_a_norm_stay_whole() -> None:
    cuts = {key[1:]: p.cut for key, p in products(work_of(Latents(), torch.randn(2, 8, 64), found=0)).items()}
    assert cuts == {(64, 24): "", (16, 64): ""}


def single(fn: Callable[..., Tensor], *args: Tensor) -> LayerProduct:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(args[1])

        def forward(self, x: Tensor) -> Tensor:
            return fn(x, self.weight)

    ((p, _),) = work_of(Holder(), args[0], found=0).products
    return p


def test_shapes_of_every_kind_of_product() -> None:
    x, w = torch.randn(2, 8, 64), torch.randn(64, 96)
    assert single(torch.matmul, x, w) == single(lambda a, b: torch.einsum("bsd,df->bsf", a, b), x, w)
    p = single(torch.matmul, x, w)
    assert (p.rows, p.inner, p.columns, p.matrices) == (16, 64, 96, 1)
    p = single(lambda a, b: (b @ a.mT), x, torch.randn(96, 64))
    assert (p.weight, p.columns if p.rows != 96 else p.rows) == (True, 96)
    p = single(torch.bmm, torch.randn(3, 8, 64), torch.randn(3, 64, 96))
    assert (p.rows, p.inner, p.columns, p.matrices) == (8, 64, 96, 3)
    p = single(F.conv2d, torch.randn(2, 3, 8, 8), torch.randn(16, 3, 2, 2))
    assert (p.rows, p.inner, p.columns, p.matrices) == (2 * 7 * 7, 12, 16, 1)


def test_a_lookup_reads_as_much_as_it_gives() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(1000, 64), nn.Linear(64, 8, bias=False)

        def forward(self, i: Tensor) -> Tensor:
            out: Tensor = self.layer(self.table(i) * 2).sum(-1)
            return out

    work = work_of(Table(), torch.zeros(2, 8, dtype=torch.int64), found=0)
    assert {p.read for p, _ in work.passes} == {16 * 64 * 4 + 16 * 8, 16 * 8 * 4}
    assert Weights(1000 * 64, 4, products=False, cut=True) in work.weights


def test_a_plan_of_open_sizes_prices_its_step_at_others() -> None:
    def made(batch: int, tokens: int, dynamic: bool) -> Plan:
        with torch.no_grad():
            model = Block().eval().to(torch.bfloat16)
            return reattend.plan(model, torch.randn(batch, tokens, 64, dtype=torch.bfloat16), target="h200", dynamic=dynamic)

    moved, fixed = made(2, 128, True).at(seq=256, batch=4).step, made(4, 256, False).step
    assert moved is not None
    assert fixed is not None
    assert (moved.batch, moved.tokens, moved.phase) == (4, 256, "prefill")
    assert moved.parts["products"] == fixed.parts["products"]
    assert moved.seconds == fixed.seconds


def test_a_grid_has_the_step_of_the_whole_model_on_every_mesh() -> None:
    with torch.no_grad():
        model = Block().eval().to(torch.bfloat16)
        plan = reattend.plan(model, torch.randn(2, 128, 64, dtype=torch.bfloat16), target="h200", dynamic=True)
    found = plan.grid(("h200", "a100"), meshes=("", "tp=2", "tp=2,dp=2"), seq=(128, 256), batch=(4,))
    rows: list[dict[str, object]] = [dict(zip(found.columns, r)) for r in found.rows()]
    assert (found.points, len(rows)) == (12, 12)
    for r in rows:
        assert r["fits"] is True
        if r["mesh"] == "":
            there = plan.at(str(r["device"]), seq=int(str(r["seq"])), batch=4).step
            assert there is not None
            assert (r["step_seconds"], r["held_bytes"]) == (there.seconds, there.held_bytes)
    held = {r["mesh"]: r["held_bytes"] for r in rows if r["device"] == "h200" and r["seq"] == 256}
    assert held["tp=2,dp=2"] < held["tp=2"] < held[""]  # type: ignore[operator]
    with pytest.raises(MeshError, match="no link"):
        plan.grid(("cpu",), meshes=("tp=2",), seq=(128,))


class Experts(nn.Module):
    """Tokens dealt out to experts by a top-k, both products of all experts as grouped ones, and what comes back added up."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 8, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(8, 64, 96)), nn.Parameter(torch.randn(8, 48, 64))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).topk(2)
        order = chosen.flatten().sort()[1]
        ends = torch.histc(chosen.flatten().float(), 8, 0, 7).cumsum(0).int()
        a, b = torch._grouped_mm(x[order // 2], self.up, ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(a) * b, self.down, ends) * weight.flatten()[order, None]
        out: Tensor = x + y[order.argsort()].view(-1, 2, 64).sum(1)
        return out


def test_experts_are_products_of_the_rows_that_are_dealt_to_them_and_nothing_between_them_is_a_pass() -> None:
    work = work_of(Experts().to(torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16), found=0)
    dealt = [p for p, _ in work.products if p.experts]
    assert [(p.rows, p.inner, p.columns, p.matrices, p.cut) for p in dealt] == [
        (64, 64, 96, 8, COLUMNS), (64, 48, 64, 8, INNER),
    ]
    assert [p.cut for p, _ in work.products if not p.experts] == [""]
    # the sum over devices is of tokens, not of the rows that were dealt
    assert work.sums == ((32 * 64 * 2, 1),)
    assert max(p.read + p.written for p, _ in work.passes) < 4 * 32 * 64 * 2


def test_a_bug_of_ours_costs_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> LayerWork:
        raise KeyError("lost")

    monkeypatch.setattr("reattend.rewriter.choose.choose.outside", broken)
    with torch.no_grad(), pytest.warns(UserWarning, match="a bug in reattend"):
        plan = reattend.plan(Block().eval(), torch.randn(2, 8, 64), target="h200")
    assert (len(plan.sites), plan.step) == (1, None)
    assert "a bug in reattend, please report it: KeyError" in plan.step_why


def test_without_an_attention_nothing_says_how_long_a_sequence_is() -> None:
    with torch.no_grad():
        plan = reattend.plan(nn.Linear(64, 64).eval(), torch.randn(2, 8, 64), target="h200")
    assert plan.step_why == "there is no attention: how long a sequence is cannot be told"


class Expanded(nn.Module):
    """A step over cached latents, of which keys and values are made again for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(64, 64, bias=False), nn.Linear(24, 128, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = self.kv(latents).unflatten(-1, (4, 32)).transpose(1, 2).chunk(2, -1)
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def test_keys_that_are_made_again_in_every_step_are_told_from_the_step_s_own_tokens() -> None:
    work = work_of(Expanded(), torch.randn(2, 1, 64), torch.randn(2, 40, 24))
    assert {(p.rows, p.inner): p.keys for p, _ in work.products} == {(2, 64): False, (80, 24): True}
    assert {(p.rows, p.inner) for p, _ in work.without_keys().products} == {(2, 64)}


@pytest.mark.slow
def test_a_point_of_a_grid_takes_less_than_a_millisecond() -> None:
    with torch.no_grad():
        model = Block().eval().to(torch.bfloat16)
        plan = reattend.plan(model, torch.randn(2, 128, 64, dtype=torch.bfloat16), target="h200", dynamic=True)
    meshes = ("", "tp=2", "tp=4", "dp=2", "dp=4", "tp=2,dp=2", "tp=4,dp=2", "tp=4,dp=8")
    plan.grid(("h200", "a100"), meshes=meshes, seq=(100,), batch=(3,))
    start = time.process_time()
    found = plan.grid(("h200", "a100"), meshes=meshes, seq=range(128, 4096, 331), batch=(1, 2, 4, 16))
    assert found.points == 2 * 8 * 4 * 12
    assert time.process_time() - start < 1e-3 * found.points
