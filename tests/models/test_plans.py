"""Plans of real architectures with open sizes: costed again without a capture, as JSON and as a page."""

from __future__ import annotations

import pytest
import torch

import reattend
from reattend.cost_model.report.page import page, swept

from .zoo import CONFIGS, IMAGES, build, inputs


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_with_open_sizes(name: str) -> None:
    model = build(name)
    given = inputs(name)
    with torch.no_grad():
        plan = reattend.plan(model, (), {**given, **({"use_cache": False} if hasattr(model.config, "use_cache") else {})},
                             target="h200", dynamic=True)
    assert plan.at() == plan
    assert reattend.Plan.from_json(plan.to_json()) == plan
    if name not in IMAGES or name == "clip":
        assert "seq" in plan.axes
        (found,) = swept(plan)
        highest = min([1 << 17, *(s.high for s in plan.symbols if s.name in plan.axes["seq"] and s.high is not None)])
        assert max(found.values) == highest
        assert not found.skipped
        assert all(p.estimates for c in found.courses for p in c.points)
    text = page([plan, plan.at("cpu")])
    assert len(text.encode()) < 2e6
    assert text.count('class="site"') == sum(len(p.groups) for p in (plan, plan.at("cpu")))


def test_identical_layers_are_costed_once_per_size() -> None:
    from reattend.rewriter.choose import candidates

    model = build("llama")
    plan = reattend.plan(model, (), {**inputs("llama", pad="none"), "use_cache": False}, target="h200", dynamic=True)
    before = candidates.answer.cache_info().misses
    plan.at(seq=77)
    assert candidates.answer.cache_info().misses == before + len(plan.groups)
