"""`plan(dynamic=True)`: one capture, costed at other sizes and on other devices; equal to plans that were captured there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.cost_model.sites.course import SweepError
from reattend.cost_model.sites.site import PlanError
from reattend.rewriter.capture import export
from reattend.rewriter.choose import choose
from reattend.rewriter.find.detect import Found
from reattend.rewriter.find.place import place

from .conftest import Stack


@pytest.fixture(scope="module")
def plan() -> reattend.Plan:
    torch.manual_seed(0)
    return reattend.plan(Stack().eval(), (torch.randn(2, 40, 16),), target="h200", dynamic=True)


def test_sizes_stay_open_and_have_names(plan: reattend.Plan) -> None:
    assert set(plan.axes) == {"seq", "batch"}
    assert {s.value for s in plan.symbols} == {2, 40}
    assert plan.sites[0].shape.size("p") == 40
    assert plan.weight_bytes == 2 * 4 * (16 * 48 + 48 + 16 * 16 + 16)


@pytest.mark.parametrize("target", ["h200", "cpu"])
@pytest.mark.parametrize("length", [7, 1000])
def test_costs_are_those_of_a_plan_that_was_captured_there(
    stack: nn.Module, plan: reattend.Plan, target: str, length: int
) -> None:
    there = reattend.plan(stack, (torch.empty(2, length, 16),), target=target)
    moved = plan.at(target, seq=length)
    for a, b in zip(moved.sites, there.sites, strict=True):
        assert a.choice == b.choice
        assert [(c.name, c.cost) for c in a.candidates] == [(c.name, c.cost) for c in b.candidates]
        assert a.memory == b.memory


def test_a_model_that_passes_a_mask_to_sdpa_is_costed_with_a_mask_of_that_size() -> None:
    class M(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = x.view(*x.shape[:2], 4, 64).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    def given(n: int) -> tuple[Tensor, Tensor]:
        return torch.empty(2, n, 256), torch.empty(2, 1, n, n, dtype=torch.bool)

    moved = reattend.plan(M(), given(64), target="cpu", dynamic=True).at(seq=512).sites[0].candidate("original").cost
    there = reattend.plan(M(), given(512), target="cpu").sites[0].candidate("original").cost
    assert moved == there


def test_nothing_is_captured_again(plan: reattend.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "from_export", lambda *_, **__: pytest.fail("captured"))
    found = plan.over("seq", [64, 128], ["h200", "a100"])
    assert isinstance(found, reattend.Sweep)
    assert {c.device for c in found.courses} == {"h200", "a100"}
    assert plan.at("a100", batch=5).device.name == "a100"


def test_fixed_sizes_say_so(stack: nn.Module, x: Tensor) -> None:
    fixed = reattend.plan(stack, (x,), target="h200")
    with pytest.raises(SweepError, match="all sizes of this plan are fixed, seq among them: make it with dynamic=True"):
        fixed.over("seq", [64])
    assert fixed.at("a100").device.name == "a100"
    with pytest.raises(PlanError, match="read from a file"):
        reattend.Plan.from_json(fixed.to_json()).at("a100")


def test_a_branch_on_a_size_bounds_the_sweep() -> None:
    class M(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            scores = q @ q.transpose(-1, -2)
            return (scores if q.shape[-2] <= 100 else scores * 0.5).softmax(-1) @ q

    found = reattend.plan(M(), (torch.empty(2, 3, 50, 16),), target="h200", dynamic=True).over("seq", [32, 64, 128])
    assert found.values == (32, 64)
    assert "seq=128: the graph was captured for seq from 1 to 100" in found.skipped


def test_a_page_sweeps_open_sizes(plan: reattend.Plan, tmp_path: Path) -> None:
    text = plan.to_html(tmp_path / "plan.html").read_text("utf-8")
    assert 'data-chart="sweep"' in text
    assert "layers.[0-1]" in text


def test_the_plan_holds_no_graph(plan: reattend.Plan) -> None:
    """What is kept to cost again are cascades and plain data, so that the model's weights are not held by its plan."""
    seen: list[object] = [c.cell_contents for c in plan.retake.__closure__ or ()]  # type: ignore[union-attr]
    assert seen
    for value in seen:
        for x in value if isinstance(value, list) else [value]:
            assert not isinstance(x, (torch.fx.Graph, torch.fx.Node, nn.Module))
            assert not any(isinstance(v, torch.fx.Node) for v in vars(x).values()) if hasattr(x, "__dict__") else True


def test_caches_that_grow_apart_have_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's rule for shapes compares no keys with values; the graph is guarded to have as many of each."""

    class Cached(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
            keys, values = torch.cat([k, new], 2), torch.cat([v, new], 2)
            return nn.functional.scaled_dot_product_attention(q, keys, values)

    def given(length: int) -> tuple[Tensor, ...]:
        return (*(torch.randn(1, 2, n, 16) for n in (1, length, length)), torch.randn(1, 2, 1, 16))

    seen: list[int] = []
    at = place

    def noted(f: Found, name: str) -> object:
        seen.append(len(f.cascade.free_symbols))
        return at(f, name)

    monkeypatch.setattr(choose, "place", noted)
    model = reattend.optimize(Cached().eval(), policy=reattend.Policy(deny=("original",)))
    with torch.no_grad():
        for length in (20, 21, 22, 30):
            x = given(length)
            torch.testing.assert_close(model(*x), Cached()(*x), rtol=0, atol=1e-5)
    assert seen == [0, 1], str(reattend.report(model))
