"""`plan` without running, `verify` against float64, policies, targets: what they answer and what they refuse."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.patterns.mapping import TileMapping
from reattend.rewriter.choose import candidates
from reattend.rewriter.splice import splice
from tests.tiers import pairs


def test_a_plan_says_what_where_and_why(stack: nn.Module, x: Tensor) -> None:
    plan = reattend.plan(stack, (x,))
    assert [s.name for s in plan.sites] == ["layers.0", "layers.1"]
    site = plan.sites[0]
    assert "conftest.py" in site.where
    assert site.kind == "softmax"
    assert "causal" in site.traits
    assert site.mask is not None
    assert 0.5 <= site.mask.density <= 1
    assert {c.name for c in site.candidates} == {"original", "sdpa", "flex", "reattend"}
    assert site.chosen.why
    assert all(c.why for c in site.candidates if not c.feasible)
    assert reattend.Plan.from_json(plan.to_json()).sites == plan.sites
    assert "layers.[0-1]" in str(plan)


def test_planning_runs_nothing(stack: nn.Module) -> None:
    stack.to("meta")
    plan = reattend.plan(stack, torch.empty(1, 1 << 17, 16, device="meta"), target="h200")
    assert plan.device.name == "h200"
    assert all(s.chosen.cost is not None and s.chosen.cost.flops > 0 for s in plan.sites)


def test_a_policy_narrows_the_choice(stack: nn.Module, x: Tensor) -> None:
    plan = reattend.plan(stack, (x,), policy=reattend.Policy(allow=("sdpa",)))
    site = plan.sites[0]
    assert site.chosen.name in ("sdpa", "original")
    assert site.candidate("reattend").why == "the policy does not permit it"
    assert (
        reattend.plan(stack, (x,), policy=reattend.Policy(deny=("sdpa", "flex", "reattend"))).sites[0].choice
        == "original"
    )


def test_training_is_planned_with_candidates_that_have_a_backward(stack: nn.Module, x: Tensor) -> None:
    policy = reattend.Policy(allow=("reattend",))
    ours = reattend.plan(stack.train(), (x,), policy=policy).sites[0].candidate("reattend")
    assert ours.feasible
    assert TileMapping.parse(ours.mapping).body == "fused"
    away = reattend.plan(stack.train(), (x,), target="h100").sites[0].candidate("reattend")
    assert away.feasible
    assert TileMapping.parse(away.mapping).body == "triton"
    with torch.no_grad():
        assert "no backward" not in reattend.plan(stack, (x,)).sites[0].candidate("reattend").why
    assert "no backward" not in reattend.plan(stack.eval(), (x,)).sites[0].candidate("reattend").why


def test_weights_that_are_read_elsewhere_keep_the_original(x: Tensor) -> None:
    class M(nn.Module):
        def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
            p = (q @ q.transpose(-1, -2)).softmax(-1)
            return p @ q, p.sum(-1)

    site = reattend.plan(M(), (x,)).sites[0]
    assert site.choice == "original"
    assert "read elsewhere" in site.chosen.why


def test_a_gradient_that_is_cut_inside_keeps_the_original(x: Tensor) -> None:
    class M(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            scores = (q @ q.transpose(-1, -2)).detach()
            return scores.softmax(-1) @ q

    site = reattend.plan(M().train(), (x.requires_grad_(),)).sites[0]
    assert site.choice == "original"
    assert "gradient is cut" in site.chosen.why


def test_verification_passes_and_shows_errors(stack: nn.Module, x: Tensor) -> None:
    result = reattend.verify(stack, (x,))
    assert result.ok, str(result)
    assert [s.name for s in result.sites] == ["layers.0", "layers.1"]
    assert result.whole_error <= 1e-5
    assert result.worst is not None
    assert json.loads(result.to_json())["ok"] is True
    assert "verified" in str(result)


@pytest.mark.parametrize(("candidate", "dtype"), pairs(3, ["reattend", "sdpa", "flex"], [torch.float32, torch.bfloat16]))
def test_each_candidate_verifies(stack: nn.Module, x: Tensor, candidate: str, dtype: torch.dtype) -> None:
    policy = reattend.Policy(allow=(candidate,))
    stack.to(dtype)
    reattend.optimize(stack, policy=policy)
    result = reattend.verify(stack, (x.to(dtype),))
    assert result.ok, str(result)
    assert stack._compiled_call_impl is not None


def test_a_plan_can_be_verified(stack: nn.Module, x: Tensor) -> None:
    plan = reattend.plan(stack, (x,), policy=reattend.Policy(deny=("sdpa", "flex", "reattend")))
    result = reattend.verify(stack, (x,), plan=plan)
    assert {s.kernel for s in result.sites} == {"original"}


def test_a_wrong_kernel_fails_verification(stack: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    good = candidates.answer

    def spoiled(q: Any) -> Any:
        site, calls = good(q)
        call = splice.Call(
            "reattend", lambda v: torch.ones(2, 2, 40, 8), lambda tensors, size: tuple(tensors.values())[:1]
        )
        from dataclasses import replace

        candidate = replace(site.candidate("reattend"), feasible=True)
        others = tuple(c for c in site.candidates if c.name != "reattend")
        return replace(site, choice="reattend", candidates=(candidate, *others)), {**calls, "reattend": call}

    monkeypatch.setattr("reattend.rewriter.choose.choose.answer", spoiled)
    result = reattend.verify(stack, (x,))
    assert not result.ok
    assert "FAILED" in str(result)
    assert result.worst is not None
    assert "is off by" in result.worst.why


@pytest.mark.parametrize("verb", ["optimize", "restore", "report", "plan", "verify"])
def test_what_is_no_module_is_refused(verb: str) -> None:
    with pytest.raises(TypeError, match=rf"reattend\.{verb} takes a torch\.nn\.Module, not function"):
        getattr(reattend, verb)(lambda x: x)
    with pytest.raises(TypeError, match=r"the wrapper that torch.compile returns"):
        getattr(reattend, verb)(torch.compile(nn.Linear(2, 2)))


def test_unknown_targets_are_named(stack: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"unknown target 'h2o0'.*did you mean 'h200'"):
        reattend.plan(stack, (x,), target="h2o0")
    with pytest.raises(ValueError, match=r"the model is on cpu, not on h200.*reattend.plan"):
        reattend.optimize(stack, target="h200")
    assert stack._compiled_call_impl is None
    reattend.optimize(stack, target="cpu")


def test_missing_arguments_are_named(stack: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"the argument 'x' of Stack.forward is missing"):
        reattend.plan(stack)


def test_the_meta_device_needs_a_target(stack: nn.Module) -> None:
    with pytest.raises(ValueError, match="name a target"):
        reattend.plan(stack.to("meta"), torch.empty(1, 8, 16, device="meta"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"allow": ("flash",)}, "unknown candidate 'flash'; one of original, sdpa, flex, reattend"),
        ({"deny": "magic"}, "unknown candidate 'magic'"),
        ({"max_error": -1.0}, "must be above 0"),
        ({"mesh": object()}, "a mesh is a text such as .tp=8. or .tp=8,cp=2., not object"),
        ({"mesh": "pp=2"}, r"mesh axis .pp. is not known: use tp \(heads and latents\), cp"),
        ({"calibration": object()}, "needs approximate=True"),
    ],
)
def test_bad_policies_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        reattend.Policy(**options)


def test_a_model_without_attention_has_an_empty_plan() -> None:
    plan = reattend.plan(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert plan.sites == ()
    assert "no attention" in str(plan)
    assert "no two products with a row rule between them were met: the model runs as written" in str(plan)


def test_inputs_on_the_wrong_device_are_named(stack: nn.Module, x: Tensor) -> None:
    for verb in (reattend.plan, reattend.verify):
        with pytest.raises(ValueError, match=r"an input of shape \(2, 40, 16\) is on meta, the model is on cpu"):
            verb(stack, (x.to("meta"),))
    reattend.optimize(stack)
    with pytest.raises(RuntimeError, match="meta"):
        stack(x.to("meta"))


@pytest.mark.parametrize("verb", [reattend.plan, reattend.verify])
def test_inputs_of_the_wrong_shape_say_what_does_not_fit(verb: Callable[..., object], stack: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"Stack itself fails on these inputs \(RuntimeError: mat1 and mat2 .*: change them"):
        verb(stack, (torch.randn(2, 40, 17),))


def test_a_failed_capture_says_what_it_has_to_say_once(stack: nn.Module) -> None:
    """Export logs the traceback of what it raises, and whole graphs; the loggers are as before afterwards."""
    heard: list[logging.LogRecord] = []
    handler, log = logging.Handler(), logging.getLogger("torch._subclasses.fake_tensor")
    handler.emit = heard.append  # type: ignore[method-assign, assignment]
    log.addHandler(handler)
    try:
        with pytest.raises(ValueError, match="itself fails"):
            reattend.plan(stack, (torch.randn(2, 40, 17),))
        assert not heard
        log.error("something else")
        assert len(heard) == 1
    finally:
        log.removeHandler(handler)


def test_a_model_that_calls_sdpa_is_costed_as_such(x: Tensor) -> None:
    class M(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    class Written(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            n = q.shape[-2]
            keep = torch.ones(n, n, dtype=torch.bool).tril()
            return (q @ q.transpose(-1, -2) * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ q

    q = torch.randn(1, 8, 2048, 64)
    fused, eager = (reattend.plan(m, (q,)).sites[0].candidate("original").cost for m in (M(), Written()))
    assert fused is not None
    assert eager is not None
    assert fused.seconds < eager.seconds / 2


def test_identical_layers_are_decided_once(stack: Any) -> None:
    before = candidates.answer.cache_info().misses
    plan = reattend.plan(type(stack)(12).eval(), (torch.randn(1, 77, 16),))
    assert len(plan.sites) == 12
    assert candidates.answer.cache_info().misses == before + 1
