"""What is computed before a kernel: products are torch's products, in the model's own type, and mean what the cascade says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reattend
from reattend.codegen.cpu import kernel as cpu
from reattend.codegen.files import cache
from reattend.codegen.vendor import use as vendor
from reattend.codegen.vendor.call import VendorCall
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import DTYPE, evaluate
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping
from tests.tiers import few

SIZES: Mapping[str, int] = {"b": 2, "h": 4, "p": 17, "m": 17, "e": 16, "f": 16, "r": 33}
Made = Callable[[papers.Builder, str], None]


def relative(dtype: str, made: Made) -> Cascade:
    """A softmax over QK plus a plane C[b,h,p,r] that is read at r = m − p + P − 1."""
    b = papers.Builder(dict(SIZES))
    s = b.put("QK", "bhpm", b.input("Q", "bhpe", dtype) * b.input("K", "bhme", dtype), "add", "e")
    made(b, dtype)
    at = (*(ex.index(r) for r in "bhp"), ex.index("m") - ex.index("p") + (SIZES["p"] - 1))
    s = b.put("S", "bhpm", (s + ex.load("C", at, dtype)) * 0.25)
    b.put("O", "bhpf", b.put("A", "bhpm", papers.softmax(b, s)) * b.input("V", "bhmf", dtype), "add", "m")
    return b.cascade("relative", "O")


def product(b: papers.Builder, dtype: str) -> None:
    b.put("C", "bhpr", b.input("Q", "bhpe", dtype) * b.input("R", "hre", dtype), "add", "e")


def scaled(b: papers.Builder, dtype: str) -> None:
    b.put("C", "bhpr", b.input("Q", "bhpe", dtype) * b.input("R", "hre", dtype) * ex.const(0.5, dtype), "add", "e")


def gated(b: papers.Builder, dtype: str) -> None:
    """Three factors, one of which varies with the position alone."""
    b.put("C", "bhpr", b.input("Q", "bhpe", dtype) * b.input("R", "hre", dtype) * b.input("G", "hr", dtype), "add", "e")


def grouped(b: papers.Builder, dtype: str) -> None:
    """Two heads read the positions of one."""
    r = b.given("R", (2, SIZES["r"], SIZES["e"]), (ex.index("h") // 2, ex.index("r"), ex.index("e")), dtype)
    b.put("C", "bhpr", b.input("Q", "bhpe", dtype) * r, "add", "e")


def outer(b: papers.Builder, dtype: str) -> None:
    """A sum of what is no product of two operands."""
    b.put("C", "bhpr", b.input("X", "bhpre", dtype), "add", "e")


def given(c: Cascade) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {t.name: torch.randn([int(s) for s in t.shape], generator=g).to(DTYPE[t.dtype]) for t in c.inputs}


def close(got: Tensor, c: Cascade, x: Mapping[str, Tensor]) -> None:
    exact, own = evaluate(c, x, widen=True)["O"], evaluate(c, x)["O"]
    error, other = (float((t.double() - exact).pow(2).mean().sqrt()) for t in (got, own))
    assert error <= max(1.2 * other, 1e-6)


# A fused body is a compile of more than a second.
COMPILED = ((gated, "f32"), (product, "bf16"))
PLANES = [
    pytest.param(made, dtype, body, marks=pytest.mark.slow if body == "fused" and (made, dtype) not in COMPILED else ())
    for body in ("fused", "product", "sdpa") for made in (product, scaled, gated, grouped, outer) for dtype in ("f32", "bf16", "f16")
]


@pytest.mark.parametrize(("made", "dtype", "body"), PLANES)
def test_a_plane_that_is_computed_before_the_kernel(made: Made, dtype: str, body: str) -> None:
    c = relative(dtype, made)
    x = given(c)
    k = cpu.build(c, TileMapping(32, 32, body=body))
    assert isinstance(k, cpu.CpuKernel), k
    close(k.run(x, {}), c, x)
    assert ("torch.einsum(" in k.source) == (made is not outer)


@pytest.mark.parametrize("make", [vendor.sdpa, vendor.flex])
def test_vendors_calls_compute_it_alike(make: Callable[[Cascade], VendorCall]) -> None:
    call = make(relative("f32", product))
    assert isinstance(call, VendorCall), call
    assert "torch.einsum(" in call.source


def test_a_vendors_function_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is long, and a decoding step short."""
    c = relative("f32", product)
    call, x = vendor.sdpa(c), given(c)
    assert isinstance(call, VendorCall), call
    call.run(x, {})
    monkeypatch.setattr(cache, "load", None)
    call.run(x, {})


def test_gradients_flow_through_it() -> None:
    c = relative("f32", product)
    x = {n: t.requires_grad_() for n, t in given(c).items()}
    call = vendor.sdpa(c)
    assert isinstance(call, VendorCall), call
    out = call.run(x, {})
    want = evaluate(c, x)["O"]
    weight = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), list(x.values())) for y in (out, want))):
        assert torch.allclose(a, b, atol=2e-5)


class Shifted(nn.Module):
    """Relative positions as Transformer-XL, XLNet and Conformer compute them: pad, view the other way round, cut."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        n, bd = q.shape[2], q @ r.mT
        bd = F.pad(bd, (1, 0)).view(*bd.shape[:2], -1, n)[:, :, 1:].view(*bd.shape[:2], n, -1)[..., :n]
        return ((q @ k.mT + bd) * 0.125).softmax(-1) @ v


@pytest.mark.parametrize(("batch", "n"), few([(b, n) for b in (1, 2) for n in (16, 33)], (2, 33)))
def test_a_shifted_plane_is_read_by_strides(batch: int, n: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 4, n, 16) for _ in range(3))
    r = torch.randn(batch, 4, 2 * n - 1, 16)
    (site,) = reattend.plan(Shifted(), (q, k, v, r)).sites
    assert f"m − p + {n - 1}" in site.cascade
    assert "//" not in site.cascade
    torch._dynamo.reset()
    with torch.no_grad():
        run = reattend.optimize(Shifted(), policy=reattend.Policy(allow="reattend", deny=("original", "sdpa", "flex")))
        assert torch.allclose(run(q, k, v, r), Shifted()(q, k, v, r), atol=1e-5)
    assert reattend.report(run).sites[0].fell_back == 0


class Summed(nn.Module):
    """A bias that is looked up at a sum over both coordinates of a grid: the sum is an index, and stays a whole number."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        where = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")).flatten(1)
        self.register_buffer("grid", where[:, :, None] - where[:, None] + 3)
        self.table = nn.Embedding(49, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, row: Tensor) -> Tensor:
        at = (self.grid * row[:, None, None]).sum(0)
        bias = F.pad(self.table(at).permute(2, 0, 1), (1, 0, 1, 0))
        return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def test_a_sum_that_is_an_index_stays_a_whole_number() -> None:
    q, k, v = (torch.randn(2, 2, 13, 16) for _ in range(3))
    model, row = Summed().eval(), torch.tensor([7, 1])
    torch._dynamo.reset()
    with torch.no_grad():
        run = reattend.optimize(Summed().eval(), policy=reattend.Policy(allow="reattend", deny=("original", "sdpa", "flex")))
        run.load_state_dict(model.state_dict())
        assert torch.allclose(run(q, k, v, row), model(q, k, v, row), atol=1e-5)
    (site,) = reattend.report(run).sites
    assert (site.kernel, site.fell_back) == ("reattend", 0)
