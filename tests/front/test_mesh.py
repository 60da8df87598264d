"""Plans for a mesh through the front doors: Policy(mesh=…), `reattend plan --mesh`, JSON, and every mistake in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import reattend
from reattend.cost_model.mesh.mesh import Axis, Mesh, MeshError
from reattend.cost_model.plan.plan import Plan

from .commands import run


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def plan(mesh: str | Mesh, tokens: int = 512, train: bool = False, dynamic: bool = False) -> Plan:
    model = Causal().train(train)
    policy = reattend.Policy(mesh=mesh)
    return reattend.plan(model, torch.randn(2, tokens, 64), target="h200", policy=policy, dynamic=dynamic)


def test_a_policy_with_a_mesh_adds_the_ways_to_a_plan() -> None:
    made = plan("tp=4", train=True)
    assert made.sharding is not None
    assert (made.sharding.mesh, made.sharding.device, made.sharding.step) == ("tp=4", "h200", "training")
    assert made.sharding.best is not None
    assert [s.name for s in made.sites] == [s.name for s in plan(Mesh((Axis("tp", 4),)), train=True).sites]
    heads = made.sharding.scheme("heads")
    assert heads.weight_bytes > 0
    assert any(x.kind == "all-reduce" for x in heads.exchanges)
    with torch.no_grad():
        serving = plan("tp=4").sharding
    assert serving is not None
    assert serving.step == "prefill"
    # two sequences of 512 keys and values of 4 heads, on four devices
    assert serving.scheme("heads").cache_bytes == 2 * 512 * 2 * 64 * 4 // 4


def test_symbolic_sizes_are_planned_as_captured() -> None:
    with torch.no_grad():
        dynamic, static = plan("tp=2", dynamic=True).sharding, plan("tp=2").sharding
    assert dynamic is not None
    assert static is not None
    assert dynamic.scheme("heads").cache_bytes == static.scheme("heads").cache_bytes


def test_a_plan_with_a_mesh_survives_json() -> None:
    made = plan("tp=2,cp=2")
    again = Plan.from_json(made.to_json())
    assert again.sharding == made.sharding
    assert str(again) == str(made)
    assert Plan.from_json(reattend.plan(Causal(), torch.randn(1, 64, 64), target="h200").to_json()).sharding is None


def test_plan_mesh(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", config, "--seq", "1024", "--target", "h200", "--mesh", "tp=8")
    assert (code, err) == (0, "")
    assert "sharded over tp=8 (8 h200), prefill" in out
    for word in ("heads", "ring zigzag", "merge", "largest batch", "why"):
        assert word in out
    assert "2 key heads of K do not divide over 8 devices" in " ".join(out.split())


def test_plan_mesh_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "plan", config, "--phase", "decode", "--past", "4k", "--batch", "4", "--target", "h100",
        "--mesh", "tp=2,dp=2", "--json",
    )
    assert code == 0
    found = json.loads(out)["sharding"]
    assert (found["mesh"], found["step"], found["devices"]) == ("tp=2,dp=2", "decode", 4)
    first = found["schemes"][0]
    assert first["feasible"]
    assert first["exact"]
    assert first["seconds"] > 0
    # four sequences on two groups of two devices
    assert first["cache_bytes"] == 2 * (2 * 4097 * 2 * 2 * 8 * 4) // 2


@pytest.mark.parametrize(
    ("target", "mesh", "sentence"),
    [
        ("h200", "tp=3", "mesh tp=3 does not divide the 8 query heads of model.layers.0.self_attn: use tp=1, 2, 4 or 8, or cp"),
        ("h200", "tp", "mesh 'tp' is malformed at 'tp': write axis=size, as tp=8 or tp=8,cp=2"),
        ("h200", "ep=2", "mesh axis 'ep' is not known: use tp (heads and latents), cp (the sequence), dp (the batch)"),
        ("h200", "dp=2", "mesh dp=2 does not divide a batch of 1: use a --batch that is a multiple of 2, or dp=1"),
        ("cpu", "tp=2", "cpu has no link to other devices: drop the mesh, or plan for a target with one (a10, a100"),
    ],
)
def test_bad_meshes_are_one_sentence(
    target: str, mesh: str, sentence: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "plan", config, "--seq", "64", "--target", target, "--mesh", mesh)
    assert (code, out) == (2, "")
    assert err.startswith(f"reattend: {sentence}")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_mesh_over_a_sweep_on_two_devices_with_a_page(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "plan.html"
    arguments = ("plan", config, "--seq", "256", "--target", "h200", "--target", "a100", "--mesh", "tp=2,cp=2")
    code, out, err = run(capsys, *arguments, "--sweep", "seq=256:1k", "--html", str(where))
    assert code == 0, err
    assert "sharded over tp=2,cp=2 (4 h200), prefill" in out
    assert "sharded over tp=2,cp=2 (4 a100), prefill" in out
    rows = out[out.index("all attentions, spread over tp=2,cp=2") :].splitlines()
    assert [r.split()[0] for r in rows[2:5]] == ["256", "512", "1k"]
    text = where.read_text("utf-8")
    assert text.count("<h2 id=\"d") == 2
    assert text.count('data-chart="meshsweep"') == 4
    code, out, _ = run(capsys, *arguments, "--sweep", "seq=256:1k", "--json")
    for made in json.loads(out):
        (course,) = made["sweeps"][0]["meshes"]
        assert course["device"] == made["device"]["name"]
        assert [p["value"] for p in course["points"]] == [256, 512, 1024]


@pytest.mark.slow
def test_a_batch_that_the_mesh_does_not_divide_is_a_row(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "plan", config, "--seq", "128", "--batch", "4", "--target", "h200", "--mesh", "dp=4", "--sweep", "batch=1:8"
    )
    assert code == 0, err
    assert "mesh dp=4 does not divide a batch of 2" in out
    assert any(r.split()[:2] == ["8", "batch"] for r in out.splitlines())


@pytest.mark.slow
def test_a_page_sweeps_a_mesh_by_itself(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "plan.html"
    code, _, err = run(
        capsys, "plan", config, "--phase", "decode", "--past", "1k", "--batch", "2", "--target", "h200", "--mesh", "tp=2",
        "--html", str(where),
    )
    assert code == 0, err
    assert 'data-chart="meshsweep"' in where.read_text("utf-8")


@pytest.mark.parametrize("option", [["--sweep", "seq=64:256"], ["--html", "{page}"], ["--json"]])
@pytest.mark.parametrize(
    ("target", "mesh", "sentence"),
    [
        ("cpu", "tp=2", "cpu has no link to other devices: drop the mesh"),
        ("h200", "tp=3", "mesh tp=3 does not divide the 8 query heads"),
        ("h200", "dp=3", "mesh dp=3 does not divide a batch of 1"),
    ],
)
def test_with_other_options_a_mistake_is_still_one_sentence(
    option: list[str], target: str, mesh: str, sentence: str, config: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [o.replace("{page}", str(tmp_path / "plan.html")) for o in option]
    code, out, err = run(capsys, "plan", config, "--seq", "64", "--target", target, "--mesh", mesh, *filled)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "plan.html").exists()


def test_a_bad_mesh_stops_a_policy() -> None:
    with pytest.raises(MeshError, match="malformed"):
        reattend.Policy(mesh="4")


def test_a_parameter_inside_an_attention_trains_nothing_without_gradients() -> None:
    """A learned sink is a leaf that wants gradients; under no_grad the step still serves."""

    class Sink(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sink = nn.Parameter(torch.zeros(4))

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = torch.cat([q @ k.mT * 0.25, self.sink[None, :, None, None].expand(*q.shape[:3], 1)], -1)
            return scores.softmax(-1)[..., :-1] @ v

    q, k, v = torch.randn(3, 1, 4, 64, 16)
    with torch.no_grad():
        made = reattend.plan(Sink(), (q, k, v), target="h200", policy=reattend.Policy(mesh="tp=2")).sharding
    assert made is not None
    assert (made.step, made.scheme("heads").cache_bytes) == ("prefill", 2 * 64 * 2 * 16 * 4)
