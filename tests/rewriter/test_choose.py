"""Choice: what may run where, what keeps the original, what each decision says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reattend.codegen.cpu import kernel as cpu
from reattend.codegen.files import native
from reattend.cost_model.devices.device import device
from reattend.cost_model.sites.site import Site
from reattend.rewriter.capture import export
from reattend.rewriter.choose import candidates, choose
from reattend.rewriter.choose.policy import Policy


class Eager(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


def decide(model: nn.Module, *args: Tensor, **request: Any) -> choose.Decision:
    graph = export.from_export(model, args, None).graph
    (decision,), _ = choose.decide(graph, choose.Request(request.pop("policy", Policy()), **request))
    return decision


def qkv(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for _ in range(3)]


def on(target: str, model: nn.Module, *args: Tensor) -> Site:
    return decide(model, *args, target=device(target), executable=False).site


def test_candidates_are_ranked_by_predicted_time() -> None:
    site = decide(Eager(), *qkv(1, 8, 1024, 64)).site
    feasible = [c for c in site.candidates if c.feasible]
    assert [c.seconds for c in feasible] == sorted(c.seconds for c in feasible)
    assert site.chosen is feasible[0]
    assert "faster than" in site.chosen.why
    assert site.candidate("reattend").passes == 1
    assert site.candidate("reattend").mapping


def test_devices_that_are_not_here_are_planned_for() -> None:
    half = qkv(1, 32, 4096, 128, dtype=torch.bfloat16, device="meta")
    for name in ("a100", "h100", "h200", "cpu"):
        site = on(name, Eager(), *half)
        assert site.chosen.cost is not None
        assert site.chosen.cost.flops == 4 * 4096**2 * 128 * 32
        why = site.candidate("reattend").why
        # what matters of a mapping: a CPU has no warps
        assert re.search(r"triton \d+×\d+, \d warps, \d stages" if name != "cpu" else r"\b(sdpa|slices|product|fused) \d+×\d+", why)


class Windowed(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2])
        kept = (i[:, None] >= i) & (i[:, None] - i < 100)
        s = torch.tanh(q @ k.transpose(-1, -2) * 0.01) * 30.0
        return s.masked_fill(~kept, float("-inf")).softmax(-1) @ v


def test_a_kernel_that_must_be_compiled_has_to_pay_for_it() -> None:
    long, short = (decide(Windowed(), *qkv(1, 8, n, 64)).site.candidate("reattend") for n in (3000, 80))
    assert long.feasible
    assert long.mapping is not None
    assert '"body":"fused"' in long.mapping
    assert short.mapping is not None
    assert '"body":"fused"' not in short.mapping
    assert re.search(r"the fused body would save 0\.\d+ ms a call, which does not pay for its compilation", short.why)


def test_without_a_compiler_another_body_is_taken_and_the_plan_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> tuple[str, ...]:
        raise native.CompilerError("the fused CPU kernel needs a C++ compiler: install g++ or clang++, or set CXX to one")

    monkeypatch.setattr(native, "compiler", none)
    cpu.build.cache_clear()
    candidates.answer.cache_clear()
    found = decide(Windowed(), *qkv(1, 8, 3000, 64)).site.candidate("reattend")
    cpu.build.cache_clear()
    candidates.answer.cache_clear()
    assert found.feasible
    assert found.why.startswith("product ")
    assert "needs a C++ compiler: install g++ or clang++" in found.why


def test_symbolic_sizes_are_planned_with_their_hints() -> None:
    graph = export.from_export(Eager(), tuple(torch.randn(2, 4, 100, 16) for _ in range(3)), None, dynamic=True).graph
    (decision,), _ = choose.decide(graph, choose.Request(Policy()))
    assert any(isinstance(n, str) for n in decision.site.shape.sizes.values())
    assert decision.site.chosen.cost is not None
    assert decision.site.chosen.cost.flops == 4 * 2 * 4 * 100 * 100 * 16


def test_the_original_stays_where_everything_is_denied_and_says_so() -> None:
    site = decide(Eager(), *qkv(1, 2, 64, 16), policy=Policy(deny=("sdpa", "flex", "reattend"))).site
    assert site.choice == "original"
    assert "the policy does not permit it" in site.chosen.why


def test_denying_the_original_forces_another() -> None:
    site = decide(Eager(), *qkv(1, 1, 4, 4), policy=Policy(deny=("original", "sdpa", "flex"))).site
    assert site.choice == "reattend"


def test_a_choice_by_name_is_kept_where_it_can_run() -> None:
    args = qkv(1, 2, 64, 16)
    assert decide(Eager(), *args, choices={"": "original"}).site.choice == "original"
    assert decide(Eager(), *args, choices={"": "nothing"}).site.choice != "nothing"


def test_in_place_operators_inside_do_not_bind_to_the_original() -> None:
    class InPlace(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            s = q @ k.transpose(-1, -2)
            s *= 0.25
            return s.softmax(-1) @ v

    assert decide(InPlace(), *qkv(1, 8, 512, 64)).call is not None


def test_the_running_device() -> None:
    assert choose.running_device("cpu").kind == "cpu"
    with pytest.raises(ValueError, match="no device file describes 'xpu' tensors"):
        choose.running_device("xpu")


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        ("NVIDIA H200", "sm_90", "h200"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "a100"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "h100"),
        ("AMD Instinct MI300X", "gfx942", "mi300x"),
        ("NVIDIA H20", "sm_90", "h100"),
        ("NVIDIA GeForce RTX 4090", "sm_89", "rtx4090"),
        ("NVIDIA L40S", "sm_89", "l40s"),
        ("NVIDIA A10", "sm_86", "a10"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "sm_120", "rtxpro6000"),
    ],
)
def test_gpus_are_told_by_name_else_by_architecture(name: str, architecture: str, expected: str) -> None:
    assert choose._gpu(name, architecture).name == expected


def test_an_unknown_gpu_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no device file describes Fancy.*name a target"):
        choose._gpu("Fancy", "sm_999")


@pytest.mark.parametrize("n", [64, 128])
def test_nothing_is_timed_inside_inductor_so_that_doubt_keeps_the_original(n: int) -> None:
    args = qkv(1, 8, n, 64)
    eager, traced = (decide(Eager(), *args, traced=t).site for t in (False, True))
    kernel, own, other = traced.candidates[0], traced.original, eager.original
    assert own is not None
    assert other is not None
    assert kernel.cost is not None
    assert own.cost is not None
    assert other.cost is not None
    assert own.cost.seconds < other.cost.seconds, "what stands between the products is one pass"
    assert own.cost.flops == other.cost.flops
    assert own.cost.exps == other.cost.exps
    in_doubt = kernel.cost.seconds < own.cost.seconds <= kernel.cost.seconds * (1 + kernel.cost.band)
    assert eager.choice == kernel.name
    assert in_doubt
    assert traced.choice == "original"
    assert "which predictions cannot tell here" in traced.chosen.why
    assert decide(Eager(), *args, traced=True, policy=Policy(deny=("original",))).site.choice == kernel.name
    assert decide(Eager(), *args, traced=True, policy=Policy(allow=(kernel.name,))).site.choice == kernel.name


def test_what_is_clearly_faster_runs_inside_inductor() -> None:
    q, k, v = qkv(1, 8, 2048, 64)
    site = decide(Windowed(), q, k, v, traced=True).site
    assert site.original is not None
    assert site.original.cost is not None
    assert site.chosen.cost is not None
    assert site.choice == "reattend"
    assert site.original.cost.seconds > site.chosen.cost.seconds * (1 + site.chosen.cost.band)


class Sloped(nn.Module):
    """A slope that is learned, within a window."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((8, 1, 1), 0.1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2])
        s = q @ k.transpose(-1, -2) * 0.25 + self.slope * (i - i[:, None])
        return s.masked_fill((i > i[:, None]) | (i[:, None] - i >= 64), float("-inf")).softmax(-1).to(v.dtype) @ v


def test_a_body_is_taken_that_gives_the_gradients_that_are_wanted() -> None:
    """Beside an output in bfloat16 the fused body does not give the gradient of a slope in float32; else it does."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 8, 2048, 64))
    model = Sloped()
    for inside in (False, True):
        c = decide(model, q, k, v, traced=inside).site.candidate("reattend")
        assert c.feasible
        assert c.mapping is not None
        assert '"body":"fused"' in c.mapping
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    learned = decide(model, q, k, v).site.candidate("reattend")
    traced = decide(model, q, k, v, traced=True).site.candidate("reattend")
    for c in (learned, traced):
        assert c.feasible
        assert c.mapping is not None
        assert '"body":"product"' in c.mapping
        assert "the fused body's backward gives no gradient of" in c.why
        assert c.cost is not None
        assert c.cost.backward > c.cost.forward
    model.slope.requires_grad_(False)
    frozen = decide(model, q, k, v).site.candidate("reattend")
    assert frozen.mapping is not None
    assert '"body":"fused"' in frozen.mapping
    assert "needs no gradient" in frozen.why
    assert frozen.seconds < learned.seconds


def test_small_attentions_that_are_trained_say_why_they_keep_the_original() -> None:
    for n in (2, 8, 15, 16):
        site = decide(Eager(), *(x.requires_grad_() for x in qkv(1, 2, n, 16))).site
        assert not any(c.why == "" for c in site.candidates if not c.feasible), site.candidates
        assert site.chosen.why


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("sizes", [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 0, 0)])
def test_an_attention_without_an_element_keeps_the_original_and_says_so(sizes: tuple[int, int, int], trained: bool) -> None:
    b, p, m = sizes
    q, k, v = (torch.empty(b, 2, n, 16).requires_grad_(trained) for n in (p, m, m))
    graph = export.from_export(Eager(), (q, k, v), None).graph
    found, missed = choose.decide(graph, choose.Request(Policy()))
    assert not any("bug" in m.reason for m in missed), missed
    for d in found:
        assert d.call is None
        assert "there is nothing to compute" in d.site.chosen.why


class Grouped(nn.Module):
    """A step of generation: four heads share the keys of one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(4, 1) for x in (k, v))
        return (q @ k.transpose(-1, -2) * 0.125).softmax(-1) @ v


def test_few_queries_on_long_keys_take_the_loop_that_reads_them_once() -> None:
    def at(queries: int, keys: int) -> Site:
        k, v = (torch.empty(1, 8, keys, 64) for _ in range(2))
        return decide(Grouped(), torch.empty(1, 32, queries, 64), k, v).site

    for queries in (1, 4):
        site = at(queries, 32768)
        assert site.choice == "reattend"
        assert '"body":"decode"' in (site.chosen.mapping or "")
    assert '"body":"fused"' in (at(64, 32768).candidate("reattend").mapping or "")
