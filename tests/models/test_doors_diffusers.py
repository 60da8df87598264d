"""diffusers' doors: a UNet by its processors, a DiT by its backend; outputs, masks, types, gradients, reports."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import reattend

diffusers = pytest.importorskip("diffusers")

OURS = reattend.Policy(allow=("reattend",), deny=("original",))


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """The backend is one for the process: each test leaves the one that it found."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry.set_active_backend(before)


def alive(model: torch.nn.Module) -> Any:
    torch.manual_seed(3)
    for p in model.parameters():
        small = p.detach().abs() < 0.02
        p.data[small] = torch.empty_like(p)[small].uniform_(0.02, 0.1)
    return model.eval()


def unet() -> Any:
    torch.manual_seed(0)
    return alive(diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4,
    ))


def of_unet(dtype: torch.dtype = torch.float32, masked: bool = True) -> dict[str, Any]:
    torch.manual_seed(1)
    mask = torch.ones(2, 9)
    mask[1, 6:] = 0
    given: dict[str, Any] = {
        "sample": torch.randn(2, 4, 16, 16, dtype=dtype), "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(2, 9, 32, dtype=dtype),
    }
    return given | ({"encoder_attention_mask": mask.bool()} if masked else {})


def dit() -> Any:
    torch.manual_seed(0)
    return alive(diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    ))


def of_dit(dtype: torch.dtype = torch.float32, masked: bool = True) -> dict[str, Any]:
    """Texts of two lengths: what is beyond them is padding, and the mask must be honoured."""
    torch.manual_seed(1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    given: dict[str, Any] = {
        "hidden_states": torch.randn(2, 16, 16, dtype=dtype), "encoder_hidden_states": torch.randn(2, 7, 16, dtype=dtype),
        "timestep": torch.tensor([1.0, 1.0], dtype=dtype), "img_shapes": [(1, 4, 4)] * 2,
        "encoder_hidden_states_mask": mask,
    }
    if not masked:
        given["encoder_hidden_states_mask"] = torch.ones_like(mask)
    return given


KINDS = {"unet": (unet, of_unet), "dit": (dit, of_dit)}


def pair(name: str, policy: reattend.Policy | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    reattend.register("diffusers", policy=policy)
    own = KINDS[name][0]().to(dtype)
    door = copy.deepcopy(own)
    if name == "unet":
        door.set_attn_processor(reattend.processors(door))
    else:
        door.set_attention_backend("reattend")
    return own, door


def run(name: str, model: Any, given: dict[str, Any]) -> torch.Tensor:
    from diffusers.models.attention_dispatch import attention_backend

    processors = [getattr(p, "_attention_backend", None) for p in model.attn_processors.values()]
    with attention_backend("reattend" if "reattend" in map(str, processors) else "native"):
        out: torch.Tensor = model(**given).sample
    return out


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("policy", [OURS, None], ids=["ours", "cheapest"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("name", KINDS)
def test_outputs(name: str, masked: bool, policy: reattend.Policy | None) -> None:
    own, door = pair(name, policy)
    given = KINDS[name][1](masked=masked)
    with torch.no_grad():
        got, want = run(name, door, given), run(name, own, given)
    assert relative(got, want) <= 1e-5
    report = reattend.report(door)
    assert report.doors, str(report)
    assert all(c.ok for c in report.checks)
    assert not report.notes
    if policy is OURS:
        assert set(report.kernels) == {"reattend"}, str(report)
    assert not reattend.report(own).doors


@pytest.mark.parametrize("name", KINDS)
def test_masks_are_honoured(name: str) -> None:
    """What stands behind the mask changes nothing."""
    _, door = pair(name, OURS)
    given = KINDS[name][1]()
    other = given | {"encoder_hidden_states": given["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][1, 6:] = 7.0
    with torch.no_grad():
        assert torch.equal(run(name, door, given)[1], run(name, door, other)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    own, door = pair(name, OURS, dtype)
    given = KINDS[name][1](dtype)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        got, want, exact = run(name, door, given), run(name, own, given), run(name, copy.deepcopy(own).double(), wide)

    def error(x: torch.Tensor) -> float:
        return float((x.double() - exact).square().mean().sqrt() / exact.abs().max())

    assert got.dtype == dtype
    assert error(got) <= 1.2 * error(want) + torch.finfo(dtype).eps
    assert all(c.ok for c in reattend.report(door).checks)


@pytest.mark.parametrize("name", KINDS)
def test_gradients(name: str) -> None:
    own, door = pair(name)
    given = KINDS[name][1]()
    for m in (own, door):
        out = run(name, m, given)
        torch.autograd.backward((out * torch.arange(out.numel()).reshape(out.shape).sin()).sum())
    for (path, p), (_, q) in zip(door.named_parameters(), own.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None and q.grad is not None and q.grad.abs().max() > 1e-4:
            assert relative(p.grad, q.grad) <= 1e-3, path


def test_processors_come_after_registering_and_of_a_model_that_has_some() -> None:
    reattend.register("diffusers")
    with pytest.raises(TypeError, match="with attention processors, not Linear"):
        reattend.processors(torch.nn.Linear(2, 2))
    model = unet()
    wrapped = reattend.processors(model)
    assert wrapped.keys() == model.attn_processors.keys()
    model.set_attn_processor(dict(wrapped))
    assert reattend.processors(model) == model.attn_processors
