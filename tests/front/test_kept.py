"""Plans on disk: what an earlier process left alone is not captured again, and nothing but a plan of that graph is read."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.codegen.files import cache
from reattend.cost_model.devices.device import Device
from reattend.rewriter.capture import capture
from reattend.rewriter.check import verdicts
from reattend.rewriter.choose.remake import Remade, remade
from reattend.rewriter.run import graph_data, kept
from reattend.rewriter.splice.recipe import Recipe
from tests.tiers import few, one_in

pytestmark = pytest.mark.thin(3)

# Other tests read no plans.
RECALL = kept.recall


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, scale: float = 0.25) -> Tensor:
        made: Tensor = x + (self.q(x) @ self.k(x).mT * scale).softmax(-1) @ self.v(x)
        return made


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setattr(cache, "directory", lambda: tmp_path)
    monkeypatch.setattr(kept, "_own", set())
    monkeypatch.setattr(kept, "recall", RECALL)
    torch.manual_seed(0)
    return tmp_path / "plans"


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for every graph that was captured."""
    seen: list[int] = []
    before = capture.from_dynamo

    def counted(*args: Any, **kwargs: Any) -> capture.Captured:
        seen.append(1)
        return before(*args, **kwargs)

    monkeypatch.setattr(capture, "from_dynamo", counted)
    return seen


def run(model: nn.Module, *args: Any, **policy: Any) -> tuple[Tensor, reattend.Report]:
    """A call in a process that starts anew, as far as plans know."""
    torch._dynamo.reset()
    kept._own.clear()
    ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(**policy))
    with torch.no_grad():
        out: Tensor = ours(*args)
    return out, reattend.report(ours)


LEAVE: dict[str, Any] = {"allow": ("sdpa",), "deny": ("sdpa",)}


def said(report: reattend.Report) -> list[tuple[str, str, str, str]]:
    return [(s.name, s.site.where, s.kernel, s.site.chosen.why) for s in report.sites]


def test_what_was_left_alone_is_not_captured_again(captured: list[int]) -> None:
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(2, 9, 16)
    first, before = run(model, x, **LEAVE)
    again, after = run(model, x, **LEAVE)
    assert len(captured) == 1
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(again, model(x), rtol=0, atol=0)
    assert said(after) == said(before)
    assert len(said(after)) == 2
    assert [p.close for p in after.pieces] == [p.close for p in before.pieces]
    assert [p.plan.note for p in after.pieces if p.plan is not None] == [kept.NOTE]


REPLACE: dict[str, Any] = {"deny": ("original",)}


@pytest.mark.parametrize(
    ("allow", "check"),
    few([(a, c) for a in ("reattend", "sdpa") for c in ("first", "never")], ("reattend", "first"), ("sdpa", "never")),
)
def test_what_was_replaced_is_not_captured_again(captured: list[int], allow: str, check: str) -> None:
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(2, 9, 16)
    policy = {**REPLACE, "allow": (allow,), "check": check}
    first, before = run(model, x, **policy)
    again, after = run(model, x, **policy)
    assert len(captured) == 1
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert said(after) == said(before)
    assert [s.kernel for s in after.sites] == [allow, allow]
    assert [(c.site, c.kernel, c.verdict) for c in after.checks] == [(c.site, c.kernel, c.verdict) for c in before.checks]
    assert len(after.checks) == (2 if check == "first" else 0)
    assert [p.close for p in after.pieces] == [p.close for p in before.pieces]
    assert [p.plan.note for p in after.pieces if p.plan is not None] == [kept.NOTE]


@pytest.mark.parametrize("dtype", few([torch.float64, torch.bfloat16, torch.float16], torch.bfloat16))
def test_replaced_in_other_types(captured: list[int], dtype: torch.dtype) -> None:
    model, x = Layer().to(dtype), torch.randn(2, 9, 16, dtype=dtype)
    exact = copy.deepcopy(model).double()(x.double())
    out = [run(model, x, **REPLACE)[0] for _ in range(2)]
    assert len(captured) == 1
    torch.testing.assert_close(out[1], out[0], rtol=0, atol=0)
    own = (model(x).double() - exact).norm()
    assert (out[1].double() - exact).norm() <= 2 * own + 1e-12


class Masked(Layer):
    """With a mask, numbers that the trace makes constants of, an edge of ±∞, and a tuple of results."""

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        s = self.q(x) @ self.k(x).mT * 0.25 + torch.tensor([0.5])
        p = s.masked_fill(~keep, float("-inf")).softmax(-1)
        return p @ self.v(x), {"x": x[:, ..., 1:]}


def test_a_guard_is_kept_as_well(captured: list[int]) -> None:
    model, x, keep = Masked(), torch.randn(2, 9, 16), torch.ones(9, 9, dtype=torch.bool).tril()
    none = keep.clone()
    none[3] = False
    for mask in (keep, none):
        for allow in ("sdpa", "reattend"):
            policy = {**REPLACE, "allow": (allow,)}
            (first, _), before = run(model, x, mask, **policy)
            (again, other), after = run(model, x, mask, **policy)
            torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(again, model(x, mask)[0], equal_nan=True)
            torch.testing.assert_close(other["x"], x[:, :, 1:])
            assert [s.fell_back for s in after.sites] == [s.fell_back for s in before.sites]
            assert [s.site.guards for s in after.sites] == [s.site.guards for s in before.sites]
    # the masks' values are no part of a graph
    assert len(captured) == 2


def test_gradients_of_a_kept_graph(captured: list[int]) -> None:
    model, x = Layer(), torch.randn(2, 9, 16)
    for allow in ("reattend", "sdpa"):
        found = []
        for _ in range(2):
            torch._dynamo.reset()
            kept._own.clear()
            ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(**REPLACE, allow=(allow,)))
            ours(x).square().sum().backward()
            assert [s.kernel for s in reattend.report(ours).sites] == [allow]
            found.append(ours.q.weight.grad)
        own = copy.deepcopy(model)
        own(x).square().sum().backward()
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        torch.testing.assert_close(found[1], own.q.weight.grad)
    assert len(captured) == 2


def test_the_net_watches_what_was_kept(captured: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel gives in the later process is held against the model's own code there."""
    model, x = Layer(), torch.randn(2, 9, 16)
    policy = {**REPLACE, "allow": ("sdpa",)}
    run(model, x, **policy)
    made = remade

    def wrong(r: Recipe, device: Device) -> Remade:
        call = made(r, device)
        return replace(call, target=lambda *given: call.target(*given) + 1)

    monkeypatch.setattr(graph_data, "remade", wrong)
    monkeypatch.setattr(verdicts, "recall", lambda at: None)
    with pytest.warns(UserWarning, match="keeps the original code"):
        out, report = run(model, x, **policy)
    assert len(captured) == 1
    assert [c.verdict for c in report.checks] == ["differs"]
    torch.testing.assert_close(out, model(x))


def test_a_kept_graph_is_timed(captured: list[int]) -> None:
    model, x = Layer(), torch.randn(2, 9, 16)
    for _ in range(2):
        torch._dynamo.reset()
        kept._own.clear()
        ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(**REPLACE))
        with torch.no_grad():
            for _ in range(4):
                torch.testing.assert_close(ours(x), model(x))
        assert [s.measured is not None for s in reattend.report(ours).sites] == [True]
    assert len(captured) == 1


@pytest.mark.parametrize("damage", few(["digest", "operator", "text", "cut"], "digest", "operator"))
def test_a_damaged_graph_is_made_again(captured: list[int], folder: Path, damage: str) -> None:
    """Also where the sum was made to fit: names are looked up among torch's operators and ours, nothing else is called."""
    model, x = Layer(), torch.randn(2, 9, 16)
    run(model, x, **REPLACE)
    (path,) = folder.iterdir()
    whole = path.read_text()
    title, body, plan = whole.split("\n", 2)
    if damage == "cut":
        path.write_text(whole[: len(whole) // 2])
    elif damage == "digest":
        path.write_text(whole.replace("aten.add", "aten.sub"))
    else:
        bad = body.replace("aten.add.Tensor", "os.system.default") if damage == "operator" else body.replace("softmax", "other")
        assert bad != body or damage == "text"
        rest = (bad if bad != body else body[:-9]) + "\n" + plan
        path.write_text(f"{title.rsplit(' ', 1)[0]} {hashlib.sha256(rest.encode()).hexdigest()}\n{rest}")
    with pytest.warns(UserWarning, match="a plan on disk is damaged and made anew"):
        out, _ = run(model, x, **REPLACE)
    assert len(captured) == 2
    torch.testing.assert_close(out, model(x))
    assert path.read_text() == whole


def test_a_plan_of_another_graph_is_not_taken(captured: list[int], folder: Path) -> None:
    x = torch.randn(2, 9, 16)
    run(Layer(), x, **REPLACE)
    (path,) = folder.iterdir()
    run(Layer(), x[:1], **REPLACE)
    (other,) = set(folder.iterdir()) - {path}
    other.write_text(path.read_text())
    with pytest.warns(UserWarning, match="not what was written for this graph"):
        run(Layer(), x[:1], **REPLACE)
    assert len(captured) == 3


@pytest.mark.filterwarnings("ignore:reattend. a plan on disk is damaged")
@pytest.mark.parametrize("damage", one_in(3, ["", "{", '{"schema": 3}', '{"schema": 99}', "[]", "\x00"]))
def test_a_damaged_plan_is_made_again(captured: list[int], folder: Path, damage: str) -> None:
    model, x = Layer(), torch.randn(2, 9, 16)
    run(model, x, **LEAVE)
    (path,) = folder.iterdir()
    whole = path.read_text()
    path.write_text(damage)
    run(model, x, **LEAVE)
    assert len(captured) == 2
    assert path.read_text() == whole
    path.write_bytes(b"\xff\xfe")
    run(model, x, **LEAVE)
    assert len(captured) == 3


@pytest.mark.filterwarnings("ignore:reattend. a plan on disk is damaged")
def test_a_plan_that_replaces_something_is_not_taken(captured: list[int], folder: Path) -> None:
    model, x = Layer(), torch.randn(2, 9, 16)
    run(model, x, **LEAVE)
    (path,) = folder.iterdir()
    path.write_text(path.read_text().replace('"choice": "original"', '"choice": "reattend"'))
    _, report = run(model, x, **LEAVE)
    assert len(captured) == 2
    assert [s.kernel for s in report.sites] == ["original"]


def test_a_process_looks_at_its_own_graphs_itself(captured: list[int]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        reattend.optimize(Layer(), policy=reattend.Policy(**LEAVE))(torch.randn(2, 9, 16))
    assert len(captured) == 2


class Other(Layer):
    """The same, on other lines."""

    def forward(self, x: Tensor, scale: float = 0.25) -> Tensor:
        made: Tensor = x + (self.q(x) @ self.k(x).mT * scale).softmax(-1) @ self.v(x)
        return made


def test_another_graph_is_captured(captured: list[int]) -> None:
    x = torch.randn(2, 9, 16)
    with_grad = {**LEAVE, "tune": False}
    for model, args, policy in (
        (Layer(), (x,), LEAVE), (Layer(), (x[:1],), LEAVE), (Layer(), (x, 0.5), LEAVE), (Layer().double(), (x.double(),), LEAVE),
        (Other(), (x,), LEAVE), (nn.Sequential(Layer()), (x,), LEAVE), (Layer(), (x,), with_grad),
        (Layer().requires_grad_(False), (x,), LEAVE),
    ):
        run(model, *args, **policy)
    assert len(captured) == 8
    torch._dynamo.reset()
    reattend.optimize(Layer(), policy=reattend.Policy(**LEAVE))(x)
    assert len(captured) == 9, "gradients are wanted"


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(LEAVE, id="left"), pytest.param(REPLACE, id="replaced"),
        pytest.param({**REPLACE, "allow": ("reattend",)}, id="ours", marks=pytest.mark.slow),
    ],
)
def test_open_sizes_are_part_of_it(captured: list[int], policy: dict[str, Any]) -> None:
    model = Layer()
    for _ in range(2):
        torch._dynamo.reset()
        kept._own.clear()
        ours = reattend.optimize(copy.deepcopy(model), policy=reattend.Policy(**policy))
        with torch.no_grad():
            for n in (9, 12, 31):
                x = torch.randn(2, n, 16)
                torch.testing.assert_close(ours(x), model(x))
        report = reattend.report(ours)
        assert [p.close for p in report.pieces] == [policy is LEAVE, False]
        assert all(c.ok for c in report.checks)
    assert len(captured) == 2


def test_a_graph_that_holds_a_tensor_is_captured(captured: list[int]) -> None:
    class Held(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            made: Tensor = (q @ q.mT + torch.tensor([0.0] * 9)).softmax(-1) @ q
            return made

    for _ in range(2):
        out, _ = run(Held(), x := torch.randn(2, 9, 16), **LEAVE)
        torch.testing.assert_close(out, Held()(x))
    assert captured


def test_a_size_that_no_trace_tells_is_not_kept(folder: Path) -> None:
    class Chosen(Layer):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
            y = x[keep]
            made: Tensor = (self.q(y) @ self.k(y).mT * 0.25).softmax(-1) @ self.v(y)
            return made

    x, keep = torch.randn(9, 16), torch.tensor([True, False, True] * 3)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for _ in range(2):
            out, report = run(model := Chosen(), x, keep, **REPLACE)
            torch.testing.assert_close(out, copy.deepcopy(model)(x, keep))
            assert not [p.error for p in report.pieces if p.error]


class Written(nn.Module):
    """What is read as keys may lie in what is written before the attention ends."""

    def forward(self, q: Tensor, a: Tensor, b: Tensor) -> Tensor:
        k = b.repeat(1, 1, 1)
        a.mul_(0.5)
        return (q @ k.mT * 0.25).softmax(-1) @ q


def test_inputs_that_share_memory_are_part_of_it(captured: list[int]) -> None:
    """A graph that was rewritten for tensors apart is not taken for two views of one; where it is taken, it looks again."""
    q, k = torch.randn(2, 3, 40, 16).flatten(0, 1), torch.randn(6, 40, 16)
    for together, captures in ((False, 1), (True, 2), (False, 2)):
        a, b = (k.clone(), k) if not together else (k.clone(),) * 2
        want = Written()(q, a.clone(), k)
        out, report = run(Written(), q, a[:1], b.view(b.shape), allow=("reattend",), deny=("original",), tune=False)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
        assert len(captured) == captures
        assert report.kernels["reattend"] == (not together)
    torch._dynamo.reset()
    kept._own.clear()
    ours = reattend.optimize(Written(), policy=reattend.Policy(allow=("reattend",), deny=("original",), tune=False))
    with torch.no_grad():
        for together in (False, True):
            a = k.clone()
            out = ours(q, a[:1], a.view(a.shape) if together else k)
            torch.testing.assert_close(out, Written()(q, k.clone(), k), rtol=0, atol=1e-5)
    assert len(captured) == 2
    assert reattend.report(ours).kernels["reattend"] == 1
