"""Our kernel in training, through the front door: it runs, the losses are the original's, and a wrong gradient is found out."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reattend
from reattend.codegen import trained
from reattend.codegen.forms import base2
from reattend.patterns.mapping import TileMapping

pytestmark = pytest.mark.slow
# no clock decides: the models are small
OURS = reattend.Policy(allow=("reattend",), tune=False)
ONLY_OURS = reattend.Policy(allow=("reattend",), deny=("original",))


@pytest.fixture(autouse=True)
def of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the net found of a kernel is kept on disk: a fault that is put in here is nobody else's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Block(nn.Module):
    """Attention within a window, in plain PyTorch; `bias`: with a learned number a head that is added to its scores."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.slope = nn.Parameter(torch.full((2, 1, 1), 0.1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, 16).permute(2, 0, 3, 1, 4)
        i = torch.arange(n)
        s = q @ k.transpose(-2, -1) * 0.25
        if self.slope is not None:
            s = s + self.slope * (i - i[:, None])
        s = s.masked_fill((i > i[:, None]) | (i[:, None] - i >= 24), float("-inf"))
        out: Tensor = self.out((s.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 32))
        return out


def model(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(bias), nn.GELU(), Block(bias)).train()


def losses(m: nn.Module, steps: int = 6) -> list[float]:
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 96, 32, generator=g) for _ in range(2))
    by = torch.optim.SGD(m.parameters(), lr=1.0)
    out = []
    for _ in range(steps):
        by.zero_grad()
        loss = (m(x) - y).square().mean()
        loss.backward()
        by.step()
        out.append(loss.item())
    return out


@pytest.mark.filterwarnings("error:reattend.*:UserWarning")
def test_the_losses_are_those_of_the_original() -> None:
    m = reattend.optimize(model(), policy=OURS)
    found, wanted = losses(m), losses(model())
    assert wanted[-1] < wanted[0]
    assert found == pytest.approx(wanted, rel=1e-5)
    report = reattend.report(m)
    assert report.kernels["reattend"] == 12, str(report)
    assert not report.fallbacks
    assert all(c.ok for c in report.checks), str(report)
    assert any(c.gradients for c in report.checks), str(report)


def bodies(m: nn.Module) -> set[str]:
    found = set()
    for s in reattend.report(m).sites:
        mapping = s.site.candidate("reattend").mapping
        assert mapping is not None
        found.add(TileMapping.parse(mapping).body)
    return found


def test_a_learned_slope_trains_through_our_kernel() -> None:
    m = reattend.optimize(model(bias=True), policy=ONLY_OURS)
    assert losses(m) == pytest.approx(losses(model(bias=True)), rel=1e-5)
    report = reattend.report(m)
    assert report.kernels["reattend"] == 12, str(report)
    assert all(c.ok for c in report.checks), str(report)
    assert bodies(m) <= {"product", "fused"}  # both give its gradient; which is cheaper depends on the processor
    for name, p in m.named_parameters():
        p.requires_grad_(not name.endswith("slope"))
    losses(m, 1)
    assert "fused" in bodies(m)


def test_where_it_is_slower_a_learned_slope_keeps_the_original() -> None:
    m = reattend.optimize(model(bias=True))
    assert losses(m, 2) == losses(model(bias=True), 2)
    assert not reattend.report(m).kernels["reattend"], str(reattend.report(m))


def test_second_derivatives_are_those_of_the_original() -> None:
    def twice(m: nn.Module) -> Tensor:
        x = torch.randn(2, 96, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (first,) = torch.autograd.grad(m(x).square().mean(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    torch.testing.assert_close(twice(reattend.optimize(model(), policy=OURS)), twice(model()), rtol=1e-4, atol=1e-8)


def test_a_wrong_gradient_is_found_before_it_reaches_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trained._kernel

    def wrong(program: str) -> trained.TrainedKernel:
        made = real(program)

        def backward(*given: Any, **sizes: int) -> list[Tensor]:
            return [g * 1.01 for g in made.backward(*given, **sizes)]

        return replace(made, backward=backward)

    monkeypatch.setattr(trained, "_kernel", wrong)
    m = reattend.optimize(model(), policy=OURS)
    with pytest.warns(UserWarning, match="keeps the original code"):
        found = losses(m)
    assert found == losses(model())


class Filled(nn.Module):
    """The first rows of one sequence keep no key, under the lowest number of 16 bits."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        fill = torch.finfo(q.dtype).min
        return (q @ k.mT * 0.125).masked_fill(~keep, fill).softmax(-1) @ v


def filled(dtype: torch.dtype, width: int = 64) -> tuple[Tensor, ...]:
    keep = torch.ones(2, 1, 192, 192, dtype=torch.bool).tril()
    keep[0, ..., :8] = False
    g = torch.Generator().manual_seed(0)
    return *(torch.randn(2, 2, 192, width, generator=g).to(dtype).requires_grad_() for _ in range(3)), keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_the_lowest_fill_pass_back_what_the_mean_does(dtype: torch.dtype) -> None:
    given = filled(dtype)
    flow = torch.randn(2, 2, 192, 64, generator=torch.Generator().manual_seed(3))
    m = reattend.optimize(Filled(), policy=OURS)
    found = torch.autograd.grad(m(*given), given[:3], flow.to(dtype))
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in given]
    s = (wide[0] @ wide[1].mT * 0.125).masked_fill(~wide[3], torch.finfo(dtype).min).softmax(-1) @ wide[2]
    exact = torch.autograd.grad(s, wide[:3], flow.to(dtype).double())
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm() + 1e-5


def test_the_net_sees_that_such_rows_pass_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound in other units than the fills: the output is right, and a share of each value's gradient is lost."""
    init = base2._Scaling.__init__
    monkeypatch.setattr(base2._Scaling, "__init__", lambda self, bounds, key, filled: init(self, bounds, key, False))
    m = reattend.optimize(Filled(), policy=OURS)
    # of another width: a kernel that was built before stays
    with pytest.warns(UserWarning, match="its gradient is off"):
        m(*filled(torch.bfloat16, 32))


def ours_and_own() -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    given = filled(torch.float32)
    return reattend.optimize(Filled(), policy=OURS), Filled(), given


def test_hooks_may_hand_what_was_saved_back_in_another_layout() -> None:
    m, own, given = ours_and_own()
    m(*given)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.mT.contiguous().mT if x.dim() > 1 else x, lambda x: x):
        out = m(*given)
    found = torch.autograd.grad(out.square().sum(), given[:3])
    wanted = torch.autograd.grad(own(*given).square().sum(), given[:3])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_several_flows_at_once() -> None:
    m, own, given = ours_and_own()
    flows = torch.randn(3, 2, 2, 192, 64, generator=torch.Generator().manual_seed(3))

    def all_of(model: nn.Module) -> Any:
        out = model(*given)
        return torch.vmap(lambda g: torch.autograd.grad(out, given[:3], g, retain_graph=True))(flows)

    for a, b in zip(all_of(m), all_of(own), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert reattend.report(m).kernels["reattend"]


def test_gradients_of_several_flows_as_autograd_maps_them() -> None:
    m, own, given = ours_and_own()
    flows = torch.randn(3, 2, 2, 192, 64, generator=torch.Generator().manual_seed(3))
    found, wanted = (torch.autograd.grad(f(*given), given[:3], flows, is_grads_batched=True) for f in (m, own))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert reattend.report(m).kernels["reattend"]


class Thresholded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.least, self.gain = nn.Parameter(torch.tensor(-1.0)), nn.Parameter(torch.tensor(1.0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * self.gain
        return s.masked_fill(s < self.least, -1e4).softmax(-1) @ v


def test_a_parameter_that_is_only_compared_with_stays_without_a_gradient() -> None:
    m = reattend.optimize(Thresholded(), policy=ONLY_OURS)
    given = filled(torch.float32, 16)[:3]
    m(*given).square().sum().backward()
    assert reattend.report(m).kernels["reattend"] == 1, str(reattend.report(m))
    assert m.gain.grad is not None
    assert m.least.grad is None


@pytest.mark.parametrize("fault", ["differs", "raises"])
def test_a_site_steps_aside_inside_a_checkpoint(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an attempt saved for its backward is counted by nobody."""
    real = trained._kernel

    def wrong(program: str) -> trained.TrainedKernel:
        made = real(program)

        def forward(*given: Any, **sizes: int) -> Any:
            if fault == "raises":
                raise RuntimeError("out of order")
            out, saved = made.forward(*given, **sizes)
            return out * 1.5, saved

        return replace(made, forward=forward)

    monkeypatch.setattr(trained, "_kernel", wrong)

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=False)

    m = reattend.optimize(Checkpointed(model()), policy=OURS)
    with pytest.warns(UserWarning, match="keeps the original code"):
        found = losses(m, 3)
    assert found == losses(model(), 3)


def test_second_derivatives_keep_nothing_alive() -> None:
    m, _, given = ours_and_own()
    refs = []
    for _ in range(2):
        mine = [x.detach().clone().requires_grad_() for x in given[:3]]
        out = m(*mine, given[3])
        first = torch.autograd.grad(out.square().sum(), mine, create_graph=True)
        torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), mine)
        refs += [weakref.ref(x) for x in (*mine, out)]
        del mine, out, first
    gc.collect()
    assert not [r for r in refs if r() is not None]


def test_a_backward_that_cannot_be_compiled_is_found_in_the_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\nfor x in "$@"; do\n  if [ -f "$x" ] && grep -q "printed from the adjoint" "$x"; then exit 1; fi\ndone\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    m = reattend.optimize(Filled(), policy=reattend.Policy(allow=("reattend",), check="never"))
    given = filled(torch.float32, 16)
    with pytest.warns(UserWarning, match="keeps the original code"):
        out = m(*given)
    out.square().sum().backward()
    assert given[0].grad is not None


def test_large_equal_scores_keep_their_share() -> None:
    """Of 64 equal keys each has a 64th, however large the scores are: log 64 is not lost beside them."""
    v = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keep = torch.ones(64, 64, dtype=torch.bool)
    q, k = (torch.full((1, 1, 64, 16), 1e4) for _ in range(2))
    m = reattend.optimize(Filled(), policy=reattend.Policy(allow="reattend", deny="original"))
    flow = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(m(q, k, v, keep), v, flow)
    assert reattend.report(m).kernels["reattend"] == 1, str(reattend.report(m))
    torch.testing.assert_close(found, flow.mean(2, keepdim=True).expand_as(v), rtol=1e-5, atol=1e-6)
